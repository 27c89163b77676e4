"""`lopt.rules.average` and `lopt average`."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lopt
from lopt.cli.program import cli
from lopt.rules import RULES, Rule
from lopt.rules.average import average_cards, average_rules


def make_rules(name: str, count: int) -> list[Rule]:
    """Rules of equal options whose meta-weights differ."""
    generator = torch.Generator().manual_seed(0)
    rules = [RULES[name](**RULES[name].quick_config) for _ in range(count)]
    with torch.no_grad():
        for rule in rules:
            for weight in rule.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return rules


@pytest.mark.parametrize("name", ["base", "lstm"])
def test_meta_weights_are_means_and_what_is_not_learned_stays(name: str) -> None:
    rules = make_rules(name, 3)
    averaged = average_rules(rules)
    assert averaged.config == rules[0].config
    for key, value in averaged.named_parameters():
        expected = sum(dict(rule.named_parameters())[key].detach().numpy().astype(float) for rule in rules) / 3
        torch.testing.assert_close(value.detach().double(), torch.as_tensor(expected), rtol=1e-6, atol=1e-7)
    for key, buffer in averaged.named_buffers():
        assert torch.equal(buffer, dict(rules[0].named_buffers())[key])


def test_starts_of_one_model_can_be_averaged() -> None:
    start = lopt.load("sinusoid-curvature")
    moved = deepcopy(start)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(2)
    for (key, value), before in zip(average_rules([start, moved]).named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(value, before + 1, msg=key)


def test_rules_that_do_not_correspond_are_refused() -> None:
    (base,) = make_rules("base", 1)
    with pytest.raises(ValueError, match="two rules or more, got 1"):
        average_rules([base])
    for other in (*make_rules("lstm", 1), RULES["base"](**{**RULES["base"].quick_config, "every": 9})):
        with pytest.raises(ValueError, match="only rules with equal options can be averaged, got base"):
            average_rules([base, other])
    (other,) = make_rules("base", 1)
    other.get_buffer("controller.hidden").add_(1)
    with pytest.raises(ValueError, match="hidden differs, and is not learned"):
        average_rules([base, other])


def test_card_says_what_all_do_and_what_each_one_does() -> None:
    cards = [{"name": "a", "tasks": "t0", "seed": 0, "longest_run": 9, "heldout_runs": 2}]
    cards.append({"name": "a", "tasks": "t1", "seed": 1, "longest_run": 12})
    own = [{"seed": 0, "heldout_runs": 2}, {"seed": 1}]
    assert average_cards(cards) == {"name": "a", "tasks": "t0", "longest_run": 12, "averaged": own}


def test_command_writes_what_the_optimizer_takes_and_overwrites_nothing(tmp_path: Path) -> None:
    rules = make_rules("base", 2)
    files = [str(lopt.save(rule, tmp_path / f"{i}.safetensors", {"seed": i})) for i, rule in enumerate(rules)]
    out = tmp_path / "new" / "mean.safetensors"
    done = CliRunner().invoke(cli, ["average", *files, "-o", str(out)])
    assert (done.exit_code, done.output) == (0, f"{out}\n")
    assert lopt.load_card(out)["averaged"] == [{"seed": 0}, {"seed": 1}]
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = lopt.LearnedOptimizer([weight], lopt.load(out), num_steps=10)
    weight.sum().backward()
    optimizer.step()
    assert weight.isfinite().all()
    assert (weight != 1).all()
    before = out.read_bytes()
    again = CliRunner().invoke(cli, ["average", *files, "-o", str(out)])
    assert isinstance(again.exception, FileExistsError)
    assert "--force" in str(again.exception)
    assert out.read_bytes() == before
    wrong = CliRunner().invoke(cli, ["average", *files, "-o", str(tmp_path / "mean.txt")])
    assert wrong.exit_code == 2
    assert "*.safetensors" in wrong.output
