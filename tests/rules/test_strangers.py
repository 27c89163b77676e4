"""Rule files of strangers: what would spoil a model, a terminal or a machine is refused, or shown as text."""

from __future__ import annotations

import json
import re
import time
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_cases import make_quick
from strangers import CONTROLS, write_rule_file
from torch import nn

import lopt
from lopt.core.foreign_text import make_printable
from lopt.rules import RULES
from lopt.rules.files import MAX_CARD, load, load_card, save


def read_error(path: Path) -> str:
    """What `load` and `load_card` say of a file that they refuse, which is the same."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path)
    message = str(caught.value)
    assert len(message) < 700
    assert message.isprintable()
    return message


ESCAPE = r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\r"

# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["small_fc", "adam", "celo2"])
def test_meta_weights_that_are_not_finite_are_refused_wherever_a_rule_comes_in(
    tmp_path: Path, name: str, bad: float
) -> None:
    rule = make_quick(name)
    weights = {key: value.clone() for key, value in rule.state_dict().items()}
    key = next(iter(weights))
    weights[key].view(-1)[-1] = bad
    path = write_rule_file(tmp_path / "r.safetensors", weights, rule=name, config=rule.config)
    message = read_error(path)
    assert f"rule.{key} is nan or infinite" in message
    rule.load_state_dict(weights)
    for refuse in (
        lambda: save(rule, tmp_path / "x"),
        lambda: lopt.LearnedOptimizer([nn.Parameter(torch.ones(2))], rule),
    ):
        with pytest.raises(ValueError, match=f"{key} is nan or infinite"):
            refuse()  # type: ignore[no-untyped-call]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [nan, inf])
def test_options_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    for name, config in (("small_fc", {"step_mult": bad}), ("linear", {"decays": [0.5, bad]})):
        rule = make_quick(name)
        path = write_rule_file(
            tmp_path / "r.safetensors", rule.state_dict(), rule=name, config={**rule.config, **config}
        )
        assert "must be a finite number" in read_error(path)


# -- sizes -------------------------------------------------------------------------------------------------------------

HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "celo": ("celo", {"width": 4096}),
    "lstm": ("lstm", {"hidden": 1024}),
    "velo": ("velo", {"hidden": 1024, "bank": 4096}),
    "star": ("star", {"inner": "velo", "inner_config": {"width": 4096}}),
    "layers": ("small_fc", {"hidden_layers": 10**9}),
    "beyond int64": ("lstm", {"hidden": 10**30}),
}


@pytest.mark.parametrize("name", HUGE)
def test_configuration_is_compared_with_the_file_before_memory_is_taken(tmp_path: Path, name: str) -> None:
    """Each would be built, of up to 17 GB, to be refused for its shapes."""
    rule, config = HUGE[name]
    path = write_rule_file(tmp_path / "r.safetensors", make_quick("lstm").state_dict(), rule=rule, config=config)
    begin = time.process_time()
    assert "does not accept the configuration" in read_error(path)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_built_within_the_allowance_of_its_own_file(tmp_path: Path, name: str) -> None:
    rule = make_quick(name)
    assert load(save(rule, tmp_path / "r.safetensors")).describe() == rule.describe()


def nest(depth: int) -> Any:
    tree: Any = {}
    for _ in range(depth):
        tree = {"x": tree}
    return tree


CARDS: dict[str, Any] = {
    **{repr(card): card for card in ("text", 3, None, [1, 2], True)},
    **{f"nested {depth} deep": nest(depth) for depth in (60, 20_000)},
    "long": {"x": "a" * (MAX_CARD + 1)},
    "of many entries": {str(i): i for i in range(MAX_CARD // 8)},
}


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_cards_of_a_wrong_type_or_an_absurd_size_are_refused(tmp_path: Path, card: Any) -> None:
    path = write_rule_file(tmp_path / "r.safetensors", make_quick("linear").state_dict(), card=card)
    message = read_error(path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_card(path)


def test_card_that_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="card has"):
        save(make_quick("linear"), tmp_path / "r", {"x": "a" * MAX_CARD})
    assert not any(tmp_path.iterdir())


# -- text --------------------------------------------------------------------------------------------------------------


def test_foreign_text_is_printable_and_says_what_was_there() -> None:
    for text in CONTROLS:
        shown = make_printable(text)
        assert shown.isprintable()
        assert [c for c in text if c.isprintable()] == list(re.sub(ESCAPE, "", shown))
        assert len(re.findall(ESCAPE, shown)) == sum(not c.isprintable() for c in text)
    assert make_printable("plain, größer, 数 😀") == "plain, größer, 数 😀"
    assert make_printable("a" * 1000, 10) == "a" * 10 + " [...]"
    assert make_printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert make_printable("\ud800\x85\u2028\x7f") == "\\ud800\\x85\\u2028\\x7f"


@pytest.mark.parametrize("text", CONTROLS, ids=ascii)
def test_text_of_a_card_and_its_names_can_be_shown(tmp_path: Path, text: str) -> None:
    card = {"name": text, text: {text: [text, {"deep": text}]}, "lines": "a\nb"}
    path = write_rule_file(tmp_path / "r.safetensors", make_quick("linear").state_dict(), card=card)
    read = load_card(path)
    assert read.pop("lines") == "a\nb"
    assert json.dumps(read, ensure_ascii=False).isprintable()
    assert read["name"] == make_printable(text)
    assert read.keys() == {"name", make_printable(text)}


@pytest.mark.parametrize("text", CONTROLS, ids=ascii)
def test_errors_quote_foreign_text_printably(tmp_path: Path, text: str) -> None:
    path, weights = tmp_path / "r.safetensors", make_quick("linear").state_dict()
    heads: list[dict[str, Any]] = [
        {"format": 2, "version": text},
        {"format": text},
        {"kind": text},
        {"kind": text * 100_000},
        {"rule": text},
        {"rule": [text]},
        {"config": {text: 1}},
        {"config": text},
        {"config": {"lr": text * 100_000}},
    ]
    for head in heads:
        read_error(write_rule_file(path, weights, **head))
    read_error(write_rule_file(path, {**weights, text: torch.ones(2)}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm", {"output_scale": "0.1"}, "output_scale must be a finite number"),
        ("small_fc", {"step_mult": [1]}, "step_mult must be a finite number"),
        ("small_fc", {"hidden": 8.0}, "hidden must be a whole number"),
        ("lstm", {"log_bound": 1e30}, "the first steps of .* fail"),
        ("small_fc", {"step_mult": 1e300}, "the first steps of .* fail"),
    ],
)
def test_rule_that_cannot_step_is_refused(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    """As its constructor may take the options: it does not look at them before the first step."""
    rule = make_quick(name)
    path = write_rule_file(tmp_path / "r.safetensors", rule.state_dict(), rule=name, config={**rule.config, **options})
    assert re.search(message, read_error(path))
