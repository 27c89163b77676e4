"""Settings, portfolio files, and the choice for a model by its first steps: against torch.optim run by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lopt
from lopt.optim.portfolio.choosing import plan_rounds
from lopt.optim.portfolio.files import Portfolio, save_portfolio
from lopt.optim.portfolio.setting import Setting

RATES = (50.0, 0.02, 1.0, 0.05)
X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float32)


class Problem:
    """A linear model on mini-batches of 8 rows, the same ones for the same step."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1))
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(0.3)
        self.asked: list[int] = []

    def loss(self, step: int) -> Tensor:
        self.asked.append(step)
        rows = torch.arange(8) + 8 * (step % 8)
        return (self.model(X[rows]) - Y[rows]).square().mean()


def train_by_torch(rate: float, steps: int) -> tuple[Problem, list[float]]:
    problem, losses = Problem(), []
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return problem, losses


def build(rates: tuple[float, ...] = RATES) -> Portfolio:
    return Portfolio([Setting("sgd", {"lr": rate}) for rate in rates])


def test_the_best_by_torch_is_chosen_and_its_training_goes_on() -> None:
    problem = Problem()
    choice = lopt.choose(problem.model, problem.loss, 100, portfolio=build(), first_steps=6)
    by_torch = {rate: train_by_torch(rate, 12) for rate in RATES}
    left = sorted(RATES, key=lambda rate: sum(by_torch[rate][1][3:6]))[:2]
    best = min(left, key=lambda rate: sum(by_torch[rate][1][6:12]))
    assert best != left[0]  # the second round decides
    assert choice.setting.options["lr"] == best
    assert choice.steps == 12
    assert choice.losses[choice.setting.describe()] == pytest.approx(by_torch[best][1], rel=1e-5)
    # Parameters and running statistics are those of the chosen setting after its steps, and no gradient is left.
    for name, value in by_torch[best][0].model.state_dict().items():
        torch.testing.assert_close(problem.model.state_dict()[name], value)
    assert all(p.grad is None for p in problem.model.parameters())
    # Two of four went on; what the others made is told.
    assert sorted(map(len, choice.losses.values())) == [6, 6, 12, 12]
    assert choice.extra_steps == 24
    assert len(problem.asked) == 36
    choice.optimizer.zero_grad()
    problem.loss(12).backward()  # type: ignore[no-untyped-call]
    choice.optimizer.step()
    longer = train_by_torch(best, 13)[0]
    for p, q in zip(problem.model.parameters(), longer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_equal_settings_keep_the_order_of_the_portfolio() -> None:
    problem = Problem()
    twins = Portfolio([Setting("momentum", {"lr": 0.01, "momentum": 0.0}), Setting("sgd", {"lr": 0.01})])
    assert lopt.choose(problem.model, problem.loss, 50, portfolio=twins).setting.rule == "momentum"


@pytest.mark.parametrize(("factor", "expected"), [(0.59, "sgd"), (0.61, "momentum")])
def test_the_first_setting_keeps_its_place_unless_another_is_clearly_better(factor: float, expected: str) -> None:
    problem, calls = Problem(), []

    def loss(step: int) -> Tensor:
        calls.append(step)
        # Constant losses; the second trial is told `factor` of the first one's.
        return 0 * problem.loss(step) + (1.0 if len(calls) <= 5 else factor)

    twins = Portfolio([Setting("momentum", {"lr": 0.01}), Setting("sgd", {"lr": 0.01})])
    assert lopt.choose(problem.model, loss, 50, portfolio=twins).setting.rule == expected


def test_a_single_setting_costs_nothing_and_moves_nothing() -> None:
    problem = Problem()
    before = {name: x.clone() for name, x in problem.model.state_dict().items()}
    choice = lopt.choose(problem.model, problem.loss, 50, portfolio=build(), size=1)
    assert (choice.steps, choice.extra_steps, problem.asked) == (0, 0, [])
    assert all(torch.equal(x, before[name]) for name, x in problem.model.state_dict().items())


def test_a_setting_that_diverges_is_dropped_however_low_it_was_before() -> None:
    problem = Problem()

    def loss(step: int) -> Tensor:
        value = problem.loss(step)
        moved = float(next(problem.model.parameters()).detach().sub(0.3).abs().max())
        return value * float("nan") if moved > 1 else value

    assert lopt.choose(problem.model, loss, 60, portfolio=build((50.0, 1e-4))).setting.options["lr"] == 1e-4


def test_where_nothing_is_finite_the_model_is_as_it_was() -> None:
    problem = Problem()
    before = {name: x.clone() for name, x in problem.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"no setting keeps its losses finite for 6 steps.*sgd\(lr=0.02\)") as error:
        lopt.choose(problem.model, lambda step: problem.loss(step) * float("nan"), 60, portfolio=build((0.02, 0.1)))
    assert "\n" not in str(error.value)
    assert all(torch.equal(x, before[name]) for name, x in problem.model.state_dict().items())


def test_wrong_use_is_refused_in_a_line() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match=r"4 settings take rounds of 5, 10 steps, and the run has 8"):
        lopt.choose(problem.model, problem.loss, 8, portfolio=build())
    with pytest.raises(TypeError, match=r"loss\(step\) must return"):
        lopt.choose(problem.model, lambda step: problem.loss(step).detach(), 50, portfolio=build())
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        lopt.choose(problem.model, problem.loss, 50, portfolio=build(), size=0)
    for wrong, message in (((0, None), "num_steps"), ((10, 0), "first_steps")):
        with pytest.raises(ValueError, match=message):
            plan_rounds(4, *wrong)


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(4, 1000, [100, 200]), (1, 10, []), (2, 20, [5]), (3, 20, [5, 10]), (8, 400, [40, 80, 160])],
)
def test_rounds_double_until_one_setting_is_left(count: int, steps: int, expected: list[int]) -> None:
    assert plan_rounds(count, steps) == expected


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_shipped_portfolio_chooses_for_a_model() -> None:
    shipped = lopt.load_portfolio()
    assert len(shipped.settings) == 4
    assert {"command", "families", "regrets", "left_out", "licence"} <= set(shipped.card)
    problem = Problem()
    choice = lopt.choose(problem.model, problem.loss, 100)
    assert choice.setting in shipped.settings
    assert choice.losses[choice.setting.describe()][-1] < choice.losses[choice.setting.describe()][0]


def test_a_portfolio_comes_back_from_its_file(tmp_path: Path) -> None:
    mine = Portfolio([Setting("adam", {"lr": 0.01, "schedule": "cosine"}), Setting("lopt-base")], {"command": "x"})
    assert lopt.load_portfolio(save_portfolio(mine, tmp_path / "p.json")) == mine


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 2, "settings": []}, "not a portfolio of format 1, found 2"),
        ({"format": 1, "settings": []}, "has 1 to 100 settings, got 0"),
        ({"format": 1}, "settings must be a list"),
        ({"format": 1, "settings": [{"rule": "adamm"}]}, "no rule 'adamm'.*adam"),
        ({"format": 1, "settings": [{"rule": "adam", "options": {"rate": 1.0}}]}, "'adam' has no option 'rate'"),
        ({"format": 1, "settings": [{"rule": "adam", "options": {"lr": "x"}}]}, "adam.lr must be a finite number"),
        ({"format": 1, "settings": [{"rule": "lopt-base", "options": {"lr": 1.0}}]}, "shipped rule and takes no"),
    ],
)
def test_files_that_are_no_portfolios_are_refused(content: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        lopt.load_portfolio(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
