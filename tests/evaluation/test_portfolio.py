"""Portfolios: scores against runs made one by one, the greedy choice and random search against all combinations."""

from __future__ import annotations

import json
from itertools import combinations
from math import comb, log
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lopt
from lopt.evaluation.portfolio.greedy import (
    LeftOut,
    choose_greedily,
    expect_random,
    find_regrets,
    halve,
    leave_out,
)
from lopt.evaluation.portfolio.matrix import FLOOR, WORST, Scores, measure_all, measure_family
from lopt.evaluation.portfolio.space import draw_settings
from lopt.meta.unroll.curves import run_curves
from lopt.optim.portfolio.setting import Setting
from lopt.tasks import TASKS


def draw(families: int, settings: int, seed: int = 0) -> Tensor:
    return torch.rand(families, settings, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_scores(means: Tensor) -> dict[str, Scores]:
    """Families whose runs, two each, end at the given means, and whose early scores say so, loudly."""
    spread = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    runs = [row[:, None] + spread for row in means]
    return {f"family {i}": Scores(final, {5: 1e3 * final, 10: 1e3 * final}) for i, final in enumerate(runs)}


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_runs_made_one_by_one() -> None:
    family = TASKS["tabular"](width=4)
    settings = [
        Setting("adam", {"lr": 0.03, "beta1": 0.8}),
        Setting("sgd", {"lr": 0.3}),
        Setting("adam", {"lr": 0.001}),
        Setting("quadratic-lstm"),
        Setting("sgd", {"lr": 1e6}),
        Setting("adam", {"lr": 0.03, "schedule": "cosine"}),
    ]
    found = measure_family(family, settings, 20, 2)
    for j, setting in enumerate(settings):
        for seed in range(2):
            curves = run_curves(setting.build(), family, torch.tensor([seed]), 20, stream="portfolio")
            first, end = float(curves.losses[0]), float(curves.final)
            expected = WORST if bool(curves.diverged) else log(end / first + FLOOR)
            assert float(found.final[j, seed]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
            if not bool(curves.diverged):
                early = log(float(curves.losses[2:4].mean()) / first + FLOOR)
                assert float(found.early[4][j, seed]) == pytest.approx(early, rel=1e-4, abs=1e-5)
    assert float(found.final[4].min()) == pytest.approx(log(10))


def test_scores_are_kept_and_only_missing_ones_measured(tmp_path: Path) -> None:
    families = {"quadratic": TASKS["quadratic"](dim=2), "lasso": TASKS["lasso"]()}
    measured: list[str] = []
    first = measure_all(families, draw_settings(3), 20, 2, tmp_path, measured.append)
    again = measure_all(families, draw_settings(3), 20, 2, tmp_path, measured.append)
    assert measured == ["quadratic", "lasso"]
    assert all(torch.equal(first[name].final, again[name].final) for name in families)
    (tmp_path / "lasso.json").write_text("{")
    measure_all(families, draw_settings(3), 20, 2, tmp_path, measured.append)
    measure_all(families, draw_settings(4), 20, 2, tmp_path, measured.append)
    assert measured[2:] == ["lasso", "quadratic", "lasso"]


def test_drawn_settings_are_in_their_ranges_and_go_on() -> None:
    settings = draw_settings(300)
    assert settings[:40] == draw_settings(40)
    assert draw_settings(40, seed=1) != settings[:40]
    for setting in settings:
        low, high = (1e-3, 10**0.5) if setting.rule in ("sgd", "momentum", "nesterov") else (1e-4, 0.1)
        assert low <= setting.options["lr"] <= high * 1.01
    assert len({setting.rule for setting in settings}) == 7
    assert len({setting.describe() for setting in settings}) > 290


# -- the choice --------------------------------------------------------------------------------------------------------


def test_regret_is_the_share_of_the_best_progress_that_is_missing() -> None:
    means = torch.tensor([[-2.0, -1.0, 0.5], [-0.5, -4.0, -1.0], [0.3, 0.2, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.5, 1.0], [0.875, 0.0, 0.75], [1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(find_regrets(make_scores(means)), expected)


def test_the_greedy_choice_adds_what_lowers_the_mean_most() -> None:
    regrets = draw(6, 7)
    chosen: list[int] = []
    for _ in range(4):
        rest = [j for j in range(7) if j not in chosen]
        chosen.append(min(rest, key=lambda j: float(regrets[:, [*chosen, j]].min(1).values.mean())))
    assert choose_greedily(regrets, 4) == chosen
    assert sorted(choose_greedily(regrets, 20)) == list(range(7))


def test_what_a_random_search_reaches_is_the_mean_over_all_of_them() -> None:
    regrets = draw(3, 6)
    found = expect_random(regrets)
    for n in range(1, 7):
        every = [regrets[:, list(some)].min(1).values for some in combinations(range(6), n)]
        assert len(every) == comb(6, n)
        torch.testing.assert_close(found[:, n - 1], torch.stack(every).mean(0))


def test_a_family_that_is_left_out_has_no_say() -> None:
    means = -4 * draw(5, 8)
    found = leave_out(make_scores(means), range(8), range(8), 3, (5, 10))
    for f in range(5):
        others = find_regrets(make_scores(means[[g for g in range(5) if g != f]]))
        order = choose_greedily(others, 3)
        own = (1 - means[f] / means[f].min()).clamp(0, 1)
        for k in range(3):
            assert float(found.portfolio[f, k]) == pytest.approx(float(own[order[: k + 1]].min()))
            # Where early scores are final ones, halving finds the best of the portfolio.
            assert float(found.halved[f, k]) == pytest.approx(float(own[order[: k + 1]].min()))


def test_candidates_may_be_more_than_random_search_draws_from() -> None:
    means = torch.tensor([[-1.0, -2.0, -4.0], [-2.0, -1.0, -4.0], [-1.0, -1.0, -3.0]], dtype=torch.float64)
    found = leave_out(make_scores(means), [0, 1, 2], [0, 1], 1, ())
    assert found.portfolio.tolist() == [[0.0], [0.0], [0.0]]
    assert found.random.shape == (3, 2)
    assert found.find_equal(1) == 3  # none of the searches: one more than there are


def test_the_equal_random_search_is_the_smallest_that_reaches_as_much() -> None:
    random = torch.tensor([[0.8, 0.6, 0.4, 0.2], [0.6, 0.4, 0.2, 0.1]], dtype=torch.float64)
    portfolio = torch.tensor([[0.5], [0.3]], dtype=torch.float64)
    found = LeftOut(["a", "b"], portfolio, portfolio, random)
    assert found.find_equal(1) == 3
    low, high = found.find_equal_interval(1)
    assert (low, high) == (3, 3)


def test_halving_drops_the_worse_half_by_what_is_seen_so_far() -> None:
    end = torch.zeros(4, 1, dtype=torch.float64)
    early = {5: torch.tensor([[-1.0], [-2.0], [-3.0], [-0.5]]), 10: torch.tensor([[-9.0], [-4.0], [-3.5], [-9.0]])}
    scores = Scores(end, {step: values.double() for step, values in early.items()})
    assert halve(scores, [0, 1, 2, 3], 0, (5, 10)) == 1  # 0 and 3 would have been the best later
    assert halve(scores, [3, 1], 0, (5,)) == 1
    assert halve(scores, [2], 0, ()) == 2
    # The first setting keeps its place while the other's loss is above 0.6 of its own.
    for ratio, expected in ((0.59, 1), (0.61, 0)):
        late = torch.tensor([[-1.0], [-1.0 + log(ratio)]], dtype=torch.float64)
        assert halve(Scores(end[:2], {5: late}), [0, 1], 0, (5,)) == expected


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_learns_a_portfolio_that_choose_takes(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from lopt.cli.program import cli

    families = ["--families", "quadratic,lasso,logistic", "--learned", "none", "--settings", "12"]
    arguments = ["portfolio", *families, "--steps", "100", "--size", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 reach what a random search reaches with" in done.output
    assert (tmp_path / "left-out.png").read_bytes().startswith(b"\x89PNG")
    mine = lopt.load_portfolio(tmp_path / "portfolio.json")
    assert len(mine.settings) == 2
    regrets = torch.tensor([mine.card["regrets"][name] for name in ("quadratic", "lasso", "logistic")])
    names = mine.card["settings"]
    assert [names[j] for j in choose_greedily(regrets, 2)] == [setting.describe() for setting in mine.settings]
    assert json.dumps(mine.card)  # all of it is data


def test_one_family_is_refused(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from lopt.cli.program import cli

    done = CliRunner().invoke(cli, ["portfolio", "--families", "quadratic", "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert "judged on another" in f"{done.output}{done.exception}"
