"""Evaluation: curves, tuned baselines and their archive, comparisons, pictures and the report."""

from __future__ import annotations

import io
import json
import logging
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.random import derive_seeds
from lopt.evaluation import baselines
from lopt.evaluation.baselines import Grid, Tuning, tune_baseline
from lopt.evaluation.comparison import compare
from lopt.evaluation.report.curves import plot_curves, spread_labels
from lopt.evaluation.report.page import format_summary, print_table, render_report, write_report
from lopt.evaluation.results import Comparison, load_comparisons, save_comparisons
from lopt.evaluation.statistics import compare_paired, compute_speedup, summarize
from lopt.meta.unroll import curves
from lopt.meta.unroll.curves import Curves, run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS, ModuleTask

QUADRATIC = TASKS["quadratic"](dim=3)
MLP = TASKS["mlp"](width=3, batch_size=16)
SMALL = Tuning(Grid(low=-10, high=0), num_seeds=8, schedules=("constant",))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rules = {"<b>mine</b>": RULES["adam"](lr=0.01), "other": RULES["sgd"](lr=0.0)}
    return compare(rules, MLP, 10, 4, baselines=("sgd", "adam"), tuning=SMALL, title="MLP <script>x</script>")


# -- curves ----------------------------------------------------------------------------------------


def torch_losses(task_seed: int, num_steps: int) -> list[float]:
    """Adam(0.01) by hand on the task that `run_curves` gives to a seed."""
    loop = InnerLoop(RULES["sgd"](), MLP, int(derive_seeds(0, "evaluation")))
    slots = loop.start(torch.tensor([task_seed]))
    params = {k: nn.Parameter(v[0].clone()) for k, v in MLP.spec.unflatten(slots.params).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    losses = []
    for step in range(num_steps + 1):
        batch = loop.batch(slots._replace(step=torch.tensor([step])))
        loss = F.cross_entropy(functional_call(MLP.module, params, (batch["x"][0],)), batch["y"][0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_curves_of_adam_equal_a_plain_torch_loop_on_the_same_parameters_and_batches() -> None:
    curves = run_curves(RULES["adam"](lr=0.01), MLP, torch.tensor([5, 2]), 15)
    for column, seed in enumerate((5, 2)):
        expected = torch.tensor(torch_losses(seed, 15))
        torch.testing.assert_close(curves.losses[:, column], expected, rtol=1e-4, atol=0)


def test_curves_do_not_depend_on_chunks_nor_on_the_other_seeds() -> None:
    rule, seeds = RULES["momentum"](lr=0.1), torch.tensor([3, 0, 3, 7])
    whole = run_curves(rule, MLP, seeds, 8)
    chunked = run_curves(rule, MLP, seeds, 8, chunk=3)
    alone = run_curves(rule, MLP, torch.tensor([7]), 8)
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(alone.losses[:, 0], whole.losses[:, 3], rtol=1e-4, atol=0)
    assert torch.equal(whole.losses[:, 0], whole.losses[:, 2])
    assert not torch.allclose(whole.losses[0, 0], whole.losses[0, 1])


def test_final_loss_is_that_of_the_whole_train_split_and_accuracy_of_the_test_split() -> None:
    curves = run_curves(RULES["sgd"](lr=0.0), MLP, torch.tensor([4]), 2)
    loop = InnerLoop(RULES["sgd"](), MLP, int(derive_seeds(0, "evaluation")))
    params = {k: v[0] for k, v in MLP.spec.unflatten(loop.start(torch.tensor([4])).params).items()}
    (x, y), (x_test, y_test) = MLP.data["train"], MLP.data["test"]
    expected = F.cross_entropy(functional_call(MLP.module, params, (x,)), y)
    torch.testing.assert_close(curves.final[0], expected, rtol=1e-5, atol=0)
    hits = functional_call(MLP.module, params, (x_test,)).argmax(-1) == y_test
    assert float(curves.metrics["accuracy"][0]) == pytest.approx(float(hits.float().mean()))


def test_whole_splits_are_evaluated_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> tuple[Curves, int]:
        family, calls = TASKS["mlp"](width=3, batch_size=16), []
        measure = family.metrics
        monkeypatch.setattr(family, "metrics", lambda *args: calls.append(args) or measure(*args))
        return run_curves(RULES["sgd"](), family, torch.arange(5), 2, chunk=5), len(calls)

    whole, once = evaluate()
    monkeypatch.setattr(curves, "CHUNK_ELEMENTS", 2 * 120 * 65)  # the images and classes of two runs
    grouped, calls = evaluate()
    assert (once, calls) == (1, 3)
    torch.testing.assert_close(grouped.final, whole.final, rtol=1e-6, atol=0)  # sums in another order
    assert torch.equal(grouped.metrics["accuracy"], whole.metrics["accuracy"])


def test_schedules_run_over_the_evaluated_steps_and_not_the_familys_horizon() -> None:
    rule = RULES["sgd"](lr=0.02, schedule="cosine")
    seeds = torch.arange(2)
    assert QUADRATIC.horizon == 100
    curves = run_curves(rule, QUADRATIC, seeds, 10)
    same = run_curves(rule, TASKS["quadratic"](dim=3, horizon=10), seeds, 10)
    assert torch.equal(curves.losses, same.losses)
    steps = (curves.losses[:-1] - curves.losses[1:]).abs().mean(1)
    assert steps[-1] < 0.05 * steps[0]


def test_tuning_tasks_are_not_the_reported_ones() -> None:
    rule, seeds = RULES["sgd"](), torch.arange(20)
    reported = run_curves(rule, QUADRATIC, seeds, 1).losses[0]
    tuning = run_curves(rule, QUADRATIC, seeds, 1, stream=baselines.STREAM).losses[0]
    other = run_curves(rule, QUADRATIC, seeds, 1, seed=1).losses[0]
    assert not torch.isin(reported, tuning).any()
    assert not torch.isin(reported, other).any()


def test_diverged_runs_stay_visible_and_are_counted() -> None:
    rates = torch.tensor([0.01, 1e4, 0.4])  # converges, overflows, grows without overflowing
    weights = {"lr": rates, "weight_decay": torch.zeros(3)}
    curves = run_curves(RULES["sgd"](), QUADRATIC, torch.zeros(3, dtype=torch.int64), 30, meta_weights=weights)
    assert curves.diverged.tolist() == [False, True, True]
    assert not curves.final[1].isfinite()
    assert curves.final[2].isfinite()
    result = compare({"wild": RULES["sgd"](lr=1e4)}, QUADRATIC, 30, 3, baselines=("sgd",), tuning=SMALL)
    run = result.subject.runs["final"]
    assert (run.diverged, run.final) == (3, [None] * 3)
    assert run.median[0] is not None
    assert run.median[-1] is None
    assert {loss.against for loss in result.list_losses()} == {"sgd", "adam, lr 0.001"}
    json.loads(save_comparisons([result]), parse_constant=pytest.fail)
    plot_curves([result])
    assert "wild diverges on 3 of 3 held-out tasks" in render_report([result])


# -- tuning ----------------------------------------------------------------------------------------


def test_population_of_learning_rates_equals_single_runs() -> None:
    tuning = Tuning(Grid(low=-10, high=-6), num_seeds=3, schedules=("cosine",))
    tuned = tune_baseline("nesterov", "cosine", QUADRATIC, 12, tuning)
    for trial in tuned.trials:
        rule = RULES["nesterov"](lr=trial.lr, schedule="cosine")
        single = run_curves(rule, QUADRATIC, torch.arange(3), 12, stream=baselines.STREAM)
        assert trial.final == pytest.approx(float(single.final.mean()), rel=1e-4)
        assert trial.mean == pytest.approx(float(single.mean.mean()), rel=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-26, -20), (6, 12)], ids=["too small", "too large"])
def test_grid_grows_until_the_best_learning_rate_is_inside(low: int, high: int) -> None:
    tuning = Tuning(Grid(low=low, high=high), num_seeds=4, schedules=("constant",))
    tuned = tune_baseline("sgd", "constant", QUADRATIC, 20, tuning)
    lrs = [trial.lr for trial in tuned.trials]
    assert lrs == sorted(lrs)
    assert len(lrs) > high - low + 1
    for criterion in ("final", "mean"):
        assert lrs[0] < tuned.best[criterion] < lrs[-1]
        assert tuned.lowest(criterion) == min(v for t in tuned.trials if (v := getattr(t, criterion)) is not None)


def test_default_grid_spans_five_decades_by_square_roots_of_two() -> None:
    grid = Grid()
    assert grid.decades >= 5
    assert grid.value(1) / grid.value(0) == pytest.approx(2**0.5)


def test_learning_rate_that_is_best_on_few_tasks_and_fails_on_more_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pretend(name, schedule, family, num_steps, tuning, exponents, num_seeds):  # type: ignore[no-untyped-def]
        """The larger the better, but the largest of a stable kind is -3 and that shows on many tasks only."""
        loss = {k: 1.0 - 0.1 * (k + 10) if k < -1 else 9.0 for k in exponents}
        bad = {k for k in exponents if k > -3 and num_seeds == 64}
        return [
            baselines.Trial(k, 2.0**k, num_seeds, *([None] * 2 if k in bad else [loss[k]] * 2), int(k in bad))
            for k in exponents
        ]

    monkeypatch.setattr(baselines, "_try_rates", pretend)
    tuned = tune_baseline("sgd", "constant", QUADRATIC, 5, Tuning(Grid(low=-10, high=0), num_seeds=64))
    assert tuned.best == {"final": 2.0**-3, "mean": 2.0**-3}
    assert next(t.num_seeds for t in tuned.trials if t.lr == 2.0**-3) == 64


class Counter:
    """Counts the searches."""

    def __init__(self) -> None:
        self.searches: list[str] = []

    def __call__(self, text: str) -> None:
        self.searches.append(text)


def test_archived_tuning_is_used_and_a_changed_setting_is_not_served_by_it(tmp_path: Path) -> None:
    count = Counter()

    def tune(family=QUADRATIC, steps: int = 6, tuning: Tuning = SMALL, name: str = "sgd"):  # type: ignore[no-untyped-def]
        return tune_baseline(name, "constant", family, steps, tuning, tmp_path, count)

    first = tune()
    assert tune() == first
    assert len(count.searches) == 1
    changes = (
        {"steps": 7},
        {"name": "momentum"},
        {"family": TASKS["quadratic"](dim=3, distribution="uniform")},
        {"tuning": Tuning(Grid(low=-11, high=0), num_seeds=8)},
        {"tuning": Tuning(SMALL.grid, num_seeds=9)},
        {"tuning": Tuning(SMALL.grid, num_seeds=8, seed=1)},
    )
    for i, change in enumerate(changes, 2):
        tune(**change)
        assert len(count.searches) == i
    assert len(list(tmp_path.iterdir())) == 1 + len(changes)


def test_archive_tells_apart_modules_that_describe_themselves_alike(tmp_path: Path) -> None:
    x, count = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), Counter()

    def tune(data: tuple[Tensor, Tensor], build: type[nn.Module] = nn.Identity) -> None:
        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(2, 1), build())

        family = ModuleTask(make, F.mse_loss, data, batch_size=4)
        tune_baseline("sgd", "constant", family, 3, SMALL, tmp_path, count)

    tune((x, x[:, :1]))
    tune((x, x[:, :1]))
    assert len(count.searches) == 1
    tune((x, x[:, 1:]))
    assert len(count.searches) == 2
    tune((x, x[:, :1]), nn.Tanh)
    assert len(count.searches) == 3


@pytest.mark.parametrize("damage", ["truncate", "foreign", "choice"])
def test_damaged_archive_is_reported_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    tuned = tune_baseline("sgd", "constant", QUADRATIC, 5, SMALL, tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    if damage == "truncate":
        path.write_text(text[: len(text) // 2])
    elif damage == "foreign":
        path.write_text(text.replace(tuned.fingerprint, "0" * 64))
    else:
        path.write_text(json.dumps(json.loads(text) | {"best": {"final": 123.0, "mean": 123.0}}))
    with caplog.at_level(logging.WARNING):
        assert tune_baseline("sgd", "constant", QUADRATIC, 5, SMALL, tmp_path) == tuned
    assert str(path) in caplog.text
    assert path.read_text() == text


def test_unknown_baseline_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown baseline 'lion'\. Known: adam, adamw"):
        tune_baseline("lion", "constant", QUADRATIC, 5)


# -- statistics ------------------------------------------------------------------------------------


def test_speedup_is_the_ratio_of_steps_to_the_worse_end() -> None:
    steps = torch.arange(1001) / 1000
    slow, fast = torch.exp(-2 * steps), torch.exp(-6 * steps)
    assert compute_speedup(fast, slow) == pytest.approx(3, rel=0.15)  # smoothing over 50 steps counts in both
    assert compute_speedup(slow, fast) == pytest.approx(1 / 3, rel=0.15)
    assert compute_speedup(slow, slow) == 1
    assert compute_speedup(slow, slow / 0) is None


def test_paired_ratio_has_no_spread_where_every_seed_has_the_same_ratio() -> None:
    theirs = [0.1, 1.0, 30.0, 2.0, 5.0]
    ratio = compare_paired([0.5 * v for v in theirs], theirs)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio.wins == 1
    wide = compare_paired(theirs[::-1], theirs)
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < 1 < wide.high
    assert compare_paired([None, 1.0], [1.0, 1.0]).value is None


def test_summary_of_runs_that_are_not_finite_keeps_only_the_median() -> None:
    summary = summarize([3.0, None, 1.0])
    assert (summary.mean, summary.stderr, summary.median) == (None, None, 3.0)
    assert summarize([1.0, 3.0]).stderr == pytest.approx(1.0)


# -- comparison ------------------------------------------------------------------------------------


def test_every_optimizer_starts_from_the_same_losses(comparison: Comparison) -> None:
    firsts = [entry.runs[c].first for entry in comparison.entries for c in ("final", "mean")]
    assert len(set(firsts[0])) == comparison.num_seeds
    assert all(first == firsts[0] for first in firsts)


def test_default_adam_is_always_there_and_untuned(comparison: Comparison) -> None:
    default = comparison.entries[-1]
    assert (default.kind, default.runs["final"].lr) == ("default", 1e-3)
    alone = compare({"r": RULES["sgd"]()}, QUADRATIC, 2, 2, baselines=())
    assert [entry.kind for entry in alone.entries] == ["learned", "default"]
    assert "no tuned baseline" in render_report([alone])


def test_losses_are_listed_where_a_baseline_is_better(comparison: Comparison) -> None:
    entries = {entry.label: entry for entry in comparison.entries}
    listed = {(loss.figure, loss.against) for loss in comparison.list_losses()}
    for figure in ("final", "mean", "test_error"):
        for label in ("sgd", "adam", "adam, lr 0.001"):
            means = [entries[name].summarize(figure) for name in (comparison.subject.label, label)]
            worse = means[0].mean > means[1].mean  # type: ignore[union-attr, operator]
            assert ((figure, label) in listed) == worse
    assert ("final", "adam") in listed  # lr 0.01 is too small for ten steps
    bar = comparison.find_bar("final")
    assert bar is not None
    assert bar.label in ("sgd", "adam")


def test_json_has_no_nan_and_comes_back_equal(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(save_comparisons([comparison]))
    json.loads(path.read_bytes(), parse_constant=pytest.fail)
    assert load_comparisons(path) == [comparison]


@pytest.mark.parametrize("content", ["", "[]", '{"comparisons": [{"format": 99}]}', '{"comparisons": [{"format": 1}]}'])
def test_foreign_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not the JSON of|expected a comparison of format 1, found 99|damaged"):
        load_comparisons(path)


def test_labels_used_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"used twice: \['adam'\]"):
        compare({"adam": RULES["adam"]()}, QUADRATIC, 2, 2)


# -- what people see -------------------------------------------------------------------------------


def test_report_is_one_file_and_escapes_names(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new", [comparison, comparison], command="lopt eval <x> & more")
    assert sorted(paths) == ["curves-1.png", "curves-2.png", "evaluation.json", "report.html"]
    html = paths["report.html"].read_text()
    assert "<script" not in html
    assert "<b>mine</b>" not in html
    assert "&lt;b&gt;mine&lt;/b&gt;" in html
    assert "lopt eval &lt;x&gt; &amp; more" in html
    targets = re.findall(r'(?:src|href|srcset|action|data)="([^"]*)"', html)
    assert len(targets) >= 4
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", html)
    for entry in comparison.entries:
        assert format_summary(entry.summarize("final")) in html


def test_report_lists_where_the_rule_is_worse(comparison: Comparison) -> None:
    html = render_report([comparison])
    assert html.count("<td>final loss</td>") == sum(loss.figure == "final" for loss in comparison.list_losses())


def test_table_in_the_terminal_has_every_optimizer_and_the_verdict(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    print_table(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("<b>mine</b>", "SGD", "Adam", "Adam, lr 0.001", "other", "test accuracy"):
        assert name in text
    assert "of the best tuned baseline" in text
    assert "Worse in final loss" in text


def test_pictures_leave_matplotlib_as_it_was(comparison: Comparison) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 23.0
    before = dict(matplotlib.rcParams)
    light, dark = plot_curves([comparison]), plot_curves([comparison, comparison], dark=True)
    assert dict(matplotlib.rcParams) == before
    assert light.startswith(b"\x89PNG")
    assert dark.startswith(b"\x89PNG")
    matplotlib.rcdefaults()
    assert plot_curves([comparison]) == light


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [0.0, 1.0, 50.0, 99.0, 100.0], [100.0] * 9, list(range(30)), []])
def test_labels_are_spread_within_the_axes(wanted: list[float]) -> None:
    places = spread_labels(wanted, 10.0, 100.0)
    gap = min(10.0, 100.0 / max(len(wanted) - 1, 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    if wanted == [5.0, 5.0, 5.0]:
        assert places == pytest.approx([0, 10, 20])
