"""lopt.adapt: a copy of a model, adapted; against meta-training's own steps."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

import lopt
from lopt.core.random import make_generator
from lopt.meta.unroll.curves import run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, LearnedInit
from lopt.rules.files import save
from lopt.tasks.mlp import build_mlp
from lopt.tasks.sinusoid import Sinusoid

FAMILY = Sinusoid(shots=6, width=5)
SUPPORT = (torch.linspace(-1, 1, 6)[:, None], torch.linspace(-1, 1, 6)[:, None].sin())


def make_model() -> nn.Module:
    return build_mlp([1, 5, 5, 1], "relu")


def make_rule(inner: str = "sgd", config: dict[str, Any] | None = None, **options: Any) -> LearnedInit:
    params = FAMILY.init({}, make_generator(4))
    rule = LearnedInit({name: list(p.shape) for name, p in params.items()}, inner, config, **options)
    rule.set_initial(params)
    return rule


@pytest.mark.parametrize(
    ("inner", "config", "options"),
    [
        ("sgd", {"lr": 0.05}, {}),
        ("sgd", {"lr": 1.0}, {"rates": "element", "rate": 0.05, "adapt": ["2.*", "4.*"]}),
        ("rnnprop", {"hidden": 4}, {"rates": "tensor"}),
        ("small_fc", {"hidden": 4}, {}),
        ("adam", {"lr": 0.01, "schedule": "cosine"}, {}),
        ("blend", {}, {}),
    ],
)
def test_it_makes_the_steps_of_meta_training(inner: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    rule = make_rule(inner, config, **options)
    loop = InnerLoop(rule, FAMILY, 0, horizon=lambda seeds: torch.full_like(seeds, 4))
    slots = loop.start(torch.arange(3))
    with torch.no_grad():
        expected = FAMILY.spec.unflatten(loop.unroll(slots, 4, restart=False).slots.params)
    batch = loop.batch(slots)
    stacked = lopt.adapt_all(make_model(), rule, (batch["x"], batch["y"]), loss=F.mse_loss, steps=4)
    one = lopt.adapt(make_model(), rule, (batch["x"][1], batch["y"][1]), loss=F.mse_loss, steps=4)
    for name, p in expected.items():
        torch.testing.assert_close(stacked[name], p, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dict(one.named_parameters())[name].detach(), p[1], rtol=1e-4, atol=1e-6)


def test_the_figures_of_an_evaluation_are_those_of_adapt() -> None:
    rule = make_rule(config={"lr": 0.02})
    curves = run_curves(rule, FAMILY, torch.arange(4), 3)
    loop = InnerLoop(rule, FAMILY, int(lopt_seed()), pool="test")
    task = loop.start(torch.arange(4)).task
    batch, judged = FAMILY.batch(task, torch.arange(4)), FAMILY.full_batch(task, 4, "test")
    assert judged is not None
    model = make_model()
    params = lopt.adapt_all(model, rule, (batch["x"], batch["y"]), loss=F.mse_loss, steps=3)
    said = vmap(lambda p, x: functional_call(model, p, (x,)))(params, judged["x"])
    torch.testing.assert_close((said - judged["y"]).square().mean((1, 2)), curves.final, rtol=1e-4, atol=0)


def lopt_seed() -> Tensor:
    from lopt.core.random import derive_seeds

    return derive_seeds(0, "evaluation")


def test_the_model_itself_is_left_alone() -> None:
    model, rule = make_model(), make_rule(config={"lr": 0.05})
    model(SUPPORT[0]).sum().backward()
    before = {k: x.clone() for k, x in model.state_dict().items()}
    adapted = lopt.adapt(model, rule, SUPPORT, loss=F.mse_loss, steps=2)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in adapted.parameters())
    assert not any(torch.equal(x, before[k]) for k, x in adapted.state_dict().items())


def test_a_rule_without_a_start_goes_on_from_the_model() -> None:
    model = make_model()
    adapted = lopt.adapt(model, RULES["sgd"](lr=0.1), SUPPORT, loss=F.mse_loss, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(SUPPORT[0]), SUPPORT[1]).backward()
        optimizer.step()
    for p, expected in zip(adapted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


def test_models_that_vmap_does_not_take_are_adapted_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1))
    adapted = lopt.adapt(model, RULES["adam"](lr=0.01), SUPPORT, loss=F.mse_loss, steps=2)
    assert all(p.isfinite().all() for p in adapted.parameters())


def test_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    rule = LearnedInit({"1.weight": [1, 4], "1.bias": [1]}, config := "sgd", {"lr": 0.1})
    assert config == rule.inner.name
    adapted = lopt.adapt(model, rule, SUPPORT, loss=F.mse_loss, steps=1)
    assert torch.equal(adapted.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert not torch.equal(adapted.get_parameter("1.weight"), model.get_parameter("1.weight"))


def test_a_file_is_as_good_as_a_rule(tmp_path: Path) -> None:
    rule = make_rule(config={"lr": 0.05})
    path = save(rule, tmp_path / "rule.safetensors")
    a, b = (lopt.adapt(make_model(), x, SUPPORT, loss=F.mse_loss, steps=2) for x in (rule, path))
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_no_graph_is_kept_from_step_to_step() -> None:
    alive = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        gc.collect()
        alive.append(sum(isinstance(x, Tensor) for x in gc.get_objects()))
        return F.mse_loss(output, target)

    lopt.adapt(make_model(), make_rule(config={"lr": 0.01}), SUPPORT, loss=loss, steps=6)
    assert alive[2] == alive[-1]


def attempt(model: nn.Module | None = None, steps: int = 1, **config: Any) -> nn.Module:
    return lopt.adapt(model or make_model(), make_rule(config=config), SUPPORT, loss=F.mse_loss, steps=steps)


def attempt_all() -> None:
    support = (SUPPORT[0][None], SUPPORT[1][None].expand(2, -1, -1))
    lopt.adapt_all(make_model(), make_rule(), support, loss=F.mse_loss)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: attempt(build_mlp([1, 6, 5, 1], "relu")), r"'0.weight' is \[5, 1\] there and \[6, 1\]"),
        (lambda: attempt(nn.Linear(1, 1)), r"'0.weight' is .* nothing here"),
        (lambda: attempt(make_model().double()), r"float32.*float64"),
        (lambda: attempt(steps=-1), "steps must be at least 0"),
        (lambda: attempt(steps=9, lr=1e9), "diverges within 9 steps"),
        (attempt_all, "got 1 and 2"),
    ],
)
def test_refusals_are_one_line(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_more_steps_than_learned_rates_were_trained_for_are_warned_of() -> None:
    rates = make_rule(rates="element", rate=0.01, trained_steps=2)
    with pytest.warns(UserWarning, match="trained for 2 steps"):
        lopt.adapt(make_model(), rates, SUPPORT, loss=F.mse_loss, steps=3)
    plain = make_rule(config={"lr": 0.01}, trained_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lopt.adapt(make_model(), rates, SUPPORT, loss=F.mse_loss, steps=2)
        lopt.adapt(make_model(), plain, SUPPORT, loss=F.mse_loss, steps=3)
