"""What a stranger wrote does not steer the terminal of who looks at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rule_cases import make_quick
from strangers import CONTROLS, write_rule_file

PRESET = '[task]\nname = "{}"\n'


@pytest.mark.parametrize("text", CONTROLS, ids=ascii)
def test_nothing_that_a_stranger_wrote_steers_the_terminal(run, tmp_path: Path, text: str) -> None:  # type: ignore[no-untyped-def]
    weights = make_quick("linear").state_dict()
    card = write_rule_file(tmp_path / "card.safetensors", weights, card={"description": text, text: text, "name": text})
    kind = write_rule_file(tmp_path / "kind.safetensors", weights, kind=text)
    preset = tmp_path / "preset.toml"
    preset.write_text(PRESET.format("".join(f"\\U{ord(c):08x}" for c in text)))
    commands = [("inspect", str(card), "--no-pictures"), ("inspect", str(kind)), ("train", str(preset))]
    for command, status in zip(commands, (0, 2, 2), strict=True):
        result = run(*command)
        assert result.status == status, result.err
        printed = result.out + result.err
        assert printed.replace("\n", "").isprintable()
        assert len(printed) > 20
