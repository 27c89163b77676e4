"""The command line: `lopt demo | train | eval | import | list | inspect | report`. Wiring only."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
except ImportError as missing:
    sys.exit(f"lopt: the command line needs the extra 'train' ({missing}): pip install 'lopt[train]'")

import lopt
from lopt.cli.commands import manual
from lopt.cli.commands.list import KINDS, list_contents, print_contents
from lopt.cli.console import (
    ARCHIVE,
    RUNS,
    compare_all,
    judge_run,
    make_folder,
    open_rule,
    run_sweep,
    run_trainer,
    say,
    show,
)
from lopt.meta.trainer.ranks import FailedLead, LostRank


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lopt.__version__, prog_name="lopt")
def cli() -> None:
    """Learned optimizers for PyTorch: train an update rule on many small tasks, use it on any model."""


# -- train -------------------------------------------------------------------------------------------------------------


@cli.command(short_help="Meta-train a rule and judge it.", epilog=manual.TRAIN)
@click.argument("preset", required=False)
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with this run's folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run [default: runs/PRESET].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), help="Short for --set trainer.seed=N.")
@click.option("--device", help="Short for --set trainer.device=DEVICE; with --resume, go on there.")
@click.option(
    "--time-limit",
    metavar="TIME",
    help="End training after 90s, 30m or 1.5h with the best rule so far. Schedules follow the steps all the same.",
)
@click.option("--eval/--no-eval", "evaluate", default=True, help="Judge the finished rule [default: yes].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seed: int | None,
    device: str | None,
    time_limit: str | None,
    evaluate: bool,
    as_json: bool,
) -> None:
    """Meta-train a rule from PRESET (see `lopt list presets`) or a TOML file, and judge it."""
    from lopt.cli.run_folder import open_run, resume_run
    from lopt.core.names import slugify
    from lopt.meta.config.run import load_config, parse_config
    from lopt.meta.trainer.ranks import join_ranks
    from lopt.meta.trainer.stop import parse_duration

    if resume is not None and (preset or out or overrides or seed is not None):
        raise click.UsageError("--resume takes its settings from the run; give nothing else")
    if resume is None and preset is None:
        raise click.UsageError("give a PRESET or --resume RUN; `lopt list presets` shows the presets")
    seconds = parse_duration(time_limit) if time_limit else None
    given = {"seed": seed, "device": device}
    changes = [*overrides, *(f"trainer.{key}={value}" for key, value in given.items() if value is not None)]
    with join_ranks() as ranks:
        if resume is not None:
            config, trainer = resume_run(resume, ranks, device)
        else:
            config = parse_config(ranks.lead(lambda: load_config(str(preset), changes).to_dict()))
            trainer = open_run(config, out or RUNS / slugify(config.name), ranks)
        if evaluate:
            ranks.lead(lambda: make_folder(ARCHIVE))
        console = Console(stderr=as_json, quiet=not ranks.leads)
        run_trainer(trainer, console, seconds)
    if not ranks.leads:
        return
    best = trainer.best if math.isfinite(trainer.best) else None
    result: dict[str, Any] = {"rule": str(trainer.rule_path), "step": trainer.best_step, "best": best}
    if evaluate:
        result["results"] = judge_run(config, trainer, console)
    if as_json:
        click.echo(json.dumps(result))


# -- sweep -------------------------------------------------------------------------------------------------------------


@cli.command(short_help="Meta-train with several settings; keep the best rule.", epilog=manual.SWEEP)
@click.argument("preset", required=False)
@click.option("--resume", type=click.Path(path_type=Path), metavar="SWEEP", help="Go on with this sweep's folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep [default: runs/sweep-PRESET].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of all trials.")
@click.option("--vary", multiple=True, metavar="KEY=A,B,C", help="Try these values, or KEY=LOW:HIGH[:log]; repeatable.")
@click.option("--samples", type=click.IntRange(min=1), help="Draw so many trials [default: all combinations].")
@click.option("--workers", type=click.IntRange(min=1), help="Trials at a time, one thread each [default: all cores].")
@click.option("--halve-every", default=0, metavar="STEPS", help="End the worse half of the trials every STEPS steps.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sweep(
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    samples: int | None,
    workers: int | None,
    halve_every: int,
    as_json: bool,
) -> None:
    """Meta-train a rule from PRESET or a TOML file with several settings; keep the one that validates best."""
    from lopt.cli.sweep.sweep import resume_sweep, start_sweep
    from lopt.core.names import slugify
    from lopt.meta.config.run import load_config

    if resume is not None and (preset or out or overrides or vary or samples or halve_every):
        raise click.UsageError("--resume takes its settings from the sweep; give nothing else but --workers")
    if resume is not None:
        begun = resume_sweep(resume)
    elif preset is None:
        raise click.UsageError("give a PRESET or --resume SWEEP; `lopt list presets` shows the presets")
    else:
        config = load_config(preset, list(overrides))
        folder = out or RUNS / slugify(f"sweep {config.name}")
        begun = start_sweep(config, vary, folder, samples=samples, halve_every=halve_every)
    run_sweep(begun, workers or os.cpu_count() or 1, Console(stderr=as_json))
    if as_json:
        click.echo((begun.folder / "sweep.json").read_text())


# -- eval --------------------------------------------------------------------------------------------------------------


@cli.command(name="eval", short_help="Compare a rule with tuned baselines.", epilog=manual.EVAL)
@click.argument("rule")
@click.option("--task", help="Task family, see `lopt list tasks`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Option of the task; repeatable.")
@click.option("--steps", type=click.IntRange(min=1), multiple=True, help="Length of the runs; repeatable.")
@click.option("--seeds", type=click.IntRange(min=1), help="Held-out tasks [default: the card's, or 20].")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws other held-out tasks.")
@click.option("--baselines", help="Comma-separated; all seven by default.")
@click.option("--criterion", type=click.Choice(["final", "mean"]), default="final", show_default=True)
@click.option("--archive", type=click.Path(path_type=Path), default=ARCHIVE, show_default=True, help="Tuned baselines.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report [default: runs/eval-RULE-OPTIONS].")
@click.option("--json", "as_json", is_flag=True, help="Print the comparisons as JSON.")
def evaluate(
    rule: str,
    task: str | None,
    overrides: tuple[str, ...],
    steps: tuple[int, ...],
    seeds: int | None,
    seed: int,
    baselines: str | None,
    criterion: str,
    archive: Path,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare RULE with learning-rate-tuned baselines on held-out tasks; tables, pictures, one HTML page."""
    from lopt.cli.run_folder import read_command
    from lopt.core.names import slugify
    from lopt.evaluation.baselines import BASELINES, check_baseline
    from lopt.evaluation.settings import Setting, check_label, list_settings, read_card
    from lopt.meta.config.run import build, merge, parse_override
    from lopt.tasks import TASKS

    path, learned, content = open_rule(rule)
    card = read_card(content)
    if task is None and card.config is None:
        raise click.UsageError(f"{rule} has no training card that names a task; give --task")
    trained = card.config.list_families() if card.config else []
    if card.config and not (task or overrides or steps):
        settings = list_settings(card.config)
    elif len(trained) > 1 and not task:
        if overrides:
            raise click.UsageError(
                f"{rule} was trained on {len(trained)} tasks: say with --task which one --set changes"
            )
        settings = [Setting(None, source.build_task(), length) for source in trained for length in steps]
    else:
        options = {"name": task} if task or not trained else dict(trained[0].task)
        for override in overrides:
            merge(options, parse_override(override))
        family = build("task", TASKS, options)
        settings = [Setting(None, family, length) for length in steps or [family.horizon]]
    label = check_label(card.name or path.stem)
    chosen = [check_baseline(name.strip()) for name in baselines.split(",")] if baselines else BASELINES
    asked = {"steps": steps, "seeds": seeds, "seed": seed, "criterion": criterion if criterion != "final" else ""}
    words = ["eval", label, task, *overrides, baselines, *(f"{key} {value}" for key, value in asked.items() if value)]
    out = out or RUNS / slugify(" ".join(filter(None, words)))
    make_folder(out)
    make_folder(archive)
    console = Console(stderr=as_json)
    comparisons = compare_all(
        {label: learned},
        settings,
        console,
        num_seeds=seeds or (card.config.evaluation.seeds if card.config else 20),
        seed=seed,
        baselines=chosen,
        criterion=criterion,
        archive=archive,
    )
    show(comparisons, out, console, read_command())
    if as_json:
        click.echo(json.dumps([comparison.to_json() for comparison in comparisons]))


# -- demo --------------------------------------------------------------------------------------------------------------


@cli.command(short_help="Train, judge and use a rule, in minutes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs") / "demo", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the preset `demo`.")
def demo(out: Path, overrides: tuple[str, ...]) -> None:
    """Watch an LSTM learn to train a network on real images, judge it, and use it: some minutes on two cores."""
    from lopt.cli.commands.dropin import train_classifier
    from lopt.cli.run_folder import CONFIG, resume_run, start_run
    from lopt.meta.config.run import load_config

    console = Console()
    if (out / CONFIG).exists():
        if overrides:
            raise click.UsageError(f"{out} holds a run already: remove the folder, give another --out or no --set")
        config, trainer = resume_run(out)
        say(console, f"going on with the run in {out} (remove the folder to start afresh)")
    else:
        config = load_config("demo", list(overrides))
        trainer = start_run(config, out)
    make_folder(ARCHIVE)
    console.print("[bold]1. Meta-training:[/] an LSTM learns to train small networks on digits")
    run_trainer(trainer, console)
    console.print("\n[bold]2. Judging:[/] the learned rule against baselines with tuned learning rates")
    judge_run(config, trainer, console)
    console.print("\n[bold]3. Using it:[/] another network (64-40-40-10 ReLU), twice the steps, one line changed")
    rule = trainer.rule_path
    for line in train_classifier(rule):
        say(console, f"   {line}")
    say(console, f'\n   opt = lopt.LearnedOptimizer(model.parameters(), rule="{rule}")')


# -- import ------------------------------------------------------------------------------------------------------------


@cli.command(name="import", short_help="Make a rule file of released weights.", epilog=manual.IMPORT)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rule", required=True, help="What the weights are of: small_fc, mlp, velo, celo, celo2, ...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="OUT.safetensors.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Option of the rule; repeatable.")
@click.option("--name", help="What tables and pictures call it [default: the rule's name].")
@click.option("--licence", default="not stated", show_default=True, help="Of the weights.")
@click.option("--source", help="Where the weights are from, such as a paper or an address.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def import_(
    file: Path,
    rule: str,
    out: Path,
    overrides: tuple[str, ...],
    name: str | None,
    licence: str,
    source: str | None,
    force: bool,
) -> None:
    """Make a rule file of FILE, the released weights of a learned optimizer."""
    from lopt.core.foreign_files import read_weights
    from lopt.evaluation.settings import check_label
    from lopt.meta.config.run import merge, parse_override
    from lopt.rules.released import build_rule, count_learned

    if out.suffix != ".safetensors":
        raise click.UsageError(f"-o: a rule file is called *.safetensors, got {out}")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already: choose another -o, or overwrite it with --force")
    options: dict[str, Any] = {}
    for override in overrides:
        merge(options, parse_override(override))
    weights = read_weights(file)
    learned = build_rule(weights, rule, options)
    card = {"name": check_label(name or rule), "kind": "imported", "licence": licence}
    card |= {"source": source} if source else {}
    card |= {"file": file.name, "sha256": weights.checksum}
    make_folder(out.parent)
    kept, found = count_learned(learned), weights.count_taken()
    click.echo(f"{learned.describe()}: {kept} meta-weights, {lopt.save(learned, out, card)}")
    if found > kept:
        click.echo(f"{found - kept} weights of {file.name} have no effect and were left out")


# -- list, inspect, report ---------------------------------------------------------------------------------------------


@cli.command(name="list", short_help="List rules, presets, tasks and estimators.")
@click.argument("what", type=click.Choice(KINDS), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(what: str | None, as_json: bool) -> None:
    """List shipped rules, presets, and what rules, tasks and estimators there are."""
    contents = list_contents(what)
    if as_json:
        click.echo(json.dumps(contents))
    else:
        print_contents(contents, Console())


@cli.command(short_help="Show what a rule is and does, and how it was trained.")
@click.argument("rule")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pictures [default: runs/inspect-RULE].")
@click.option("--pictures/--no-pictures", default=None, help="Draw them [default: yes; with --json only for --out].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(rule: str, out: Path | None, pictures: bool | None, as_json: bool) -> None:
    """Show what RULE is (configuration, size, state, training card) and draw what it does."""
    from lopt.core.names import slugify
    from lopt.evaluation.behaviour.facts import find_horizon, inspect_rule, print_facts
    from lopt.evaluation.behaviour.pictures import probe_rule, write_portrait

    path, learned, card = open_rule(rule)
    label = card.get("name") or path.stem
    folder = out or RUNS / slugify(f"inspect {label}")
    draws = pictures or (pictures is None and (out is not None or not as_json))
    if draws:
        make_folder(folder)
    facts, console = inspect_rule(learned), Console(stderr=as_json)
    if as_json:
        click.echo(json.dumps({**facts, "card": card}))
    else:
        print_facts(facts, card, console)
    if draws:
        with console.status("probing and drawing"):
            written = write_portrait(folder, probe_rule(learned, label, find_horizon(card)))
        for name, picture in written.items():
            say(console, f"{name:>16}  {picture}")


@cli.command(short_help="Say how healthy a run is; write its page again.")
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Say how healthy the meta-training in RUN is, and write the HTML page of its evaluation again from its data.

    Findings are on dead tasks, exploding or noisy meta-gradients, stalled validation and too short windows, each with
    its figures and, where something is wrong, what to try.
    """
    from lopt.cli.diagnosis import examine_run
    from lopt.cli.run_folder import CONFIG
    from lopt.evaluation.results import load_evaluation

    path, console, trained = run / "evaluation.json", Console(), (run / CONFIG).is_file()
    if not trained and not path.is_file():
        raise FileNotFoundError(
            f"{run} holds neither a run ({CONFIG}) nor an evaluation ({path.name}); make one with `lopt train` or "
            "`lopt eval`"
        )
    if trained:
        for finding in examine_run(run):
            say(console, f"{'SICK' if finding.sick else ' ok '}  {finding.what}")
            if finding.advice:
                say(console, f"      -> {finding.advice}")
    if path.is_file():
        comparisons, command = load_evaluation(path)
        show(comparisons, run, console, command)


def main() -> None:
    """Run the command line; bad input ends in one line and exit status 2, not in a traceback."""
    try:
        cli(standalone_mode=True)
    except FailedLead as error:  # each host has a log of its own
        click.echo(f"lopt: error: {error} (on rank 0)", err=True)
        sys.exit(2)
    except LostRank as error:
        click.echo(f"lopt: error: {error}; the run can go on from its last checkpoint", err=True)
        sys.exit(1)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        click.echo(f"lopt: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
