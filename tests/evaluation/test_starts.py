"""What `lopt inspect` says of a learned start: sizes, rates and ways against numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.evaluation.behaviour.starts import describe_start
from lopt.rules import LearnedInit
from lopt.rules.files import save
from lopt.tasks import Batch, Task, TaskFamily


class Slope(TaskFamily):
    """A gradient that is the same everywhere: +-1 in `w` by task, 3 in `b`, 0 in `c`."""

    name = "slope"

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        assert pool == "test"
        return {"side": 1.0 - 2.0 * (torch.arange(len(seeds)) % 2)}

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return {"side": torch.tensor(1.0)}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"w": torch.zeros(2, 2), "b": torch.zeros(2), "c": torch.zeros(1)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return {"side": tasks["side"]}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return batch["side"] * params["w"].sum() + 3 * params["b"].sum() + 0 * params["c"].sum()


def make_rule(rates: str, **options: Any) -> LearnedInit:
    rule = LearnedInit({"w": [2, 2], "b": [2], "c": [1]}, "sgd", {"lr": 0.1}, rates=rates, **options)
    rule.set_initial({"w": torch.full((2, 2), -2.0), "b": torch.tensor([3.0, 4.0]), "c": torch.zeros(1)})
    return rule


def test_sizes_rates_and_ways_are_those_of_a_known_rule() -> None:
    rule = make_rule("element", adapt=["w", "b"])
    with torch.no_grad():
        rule.get_parameter("rates.w").copy_(torch.tensor([[1.0, -1.0], [2.0, 0.5]]))
    found = describe_start(rule, Slope(), 5)
    assert [one["shape"] for one in found.values()] == [[2, 2], [2], [1]]
    assert found["w"]["size"] == 2
    assert found["b"]["size"] == pytest.approx(12.5**0.5)
    w = found["w"]
    assert (w["rate"], w["lowest"], w["highest"], w["negative"], w["mixed"]) == (0.625, -1, 2, 0.25, None)
    assert w["moves"] == pytest.approx(0.5 * (6.25 / 4) ** 0.5 / 2)  # both ways, whatever the sign
    assert found["b"]["moves"] == pytest.approx(1.5 / 12.5**0.5)
    assert found["c"] == dict.fromkeys(found["c"], None) | {"shape": [1], "size": 0.0}  # it starts at 0 and stays


def test_matrices_tell_what_an_element_takes_from_others() -> None:
    rule = make_rule("matrix")
    with torch.no_grad():
        rule.get_parameter("rates.w.0").copy_(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        rule.get_parameter("rates.w.1").copy_(torch.tensor([[1.0, 0.0], [1.0, -1.0]]))
    w = describe_start(rule)["w"]
    product = torch.kron(rule.get_parameter("rates.w.0"), rule.get_parameter("rates.w.1")).detach()
    own = product.detach().diagonal()
    assert (w["rate"], w["lowest"], w["highest"]) == (own.mean(), own.min(), own.max())
    assert w["negative"] == 0.5
    assert w["mixed"] == pytest.approx(1 - float(own.square().sum() / product.square().sum()))
    assert w["moves"] is None


def test_low_rank_tells_what_an_element_takes_from_those_of_all_tensors() -> None:
    rule, generator = make_rule("low_rank", rank=2, adapt=["w", "b"]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.normal_(generator=generator)
    factor, read, write = (
        torch.cat([rule.get_parameter(f"rates.{k}.{part}").detach().reshape(rows, -1) for k in ("w", "b")], 1)
        for part, rows in (("factor", 1), ("read", 2), ("write", 2))
    )
    matrix = (torch.diag(factor[0]) + write.T @ read)[:4]
    w, own = describe_start(rule)["w"], matrix.diagonal()
    assert (w["rate"], w["lowest"]) == (pytest.approx(float(own.mean())), pytest.approx(float(own.min())))
    assert w["mixed"] == pytest.approx(1 - float(own.square().sum() / matrix.square().sum()))
    assert describe_start(rule)["c"]["mixed"] is None


def test_a_start_without_rates_has_none_and_one_that_diverges_no_ways() -> None:
    rule = make_rule("none")
    assert describe_start(rule)["w"]["rate"] is None
    with torch.no_grad():
        rule.inner.lr.fill_(torch.inf)
    assert describe_start(rule, Slope(), 1)["w"]["moves"] is None


def test_command_tells_of_a_start_and_draws_what_goes_on_from_it(run: Callable[..., Any], tmp_path: Path) -> None:
    path = save(make_rule("element", rate=0.5), tmp_path / "rule.safetensors")
    text = run("inspect", str(path), "--out", str(tmp_path / "pictures")).out
    assert "where it starts" in text
    assert "0.5 to 0.5" in text
    assert "shapes=" not in text
    assert (tmp_path / "pictures" / "gradient.png").stat().st_size > 1000
    told = json.loads(run("inspect", str(path), "--json").out)
    assert told["start"]["w"]["rate"] == 0.5
