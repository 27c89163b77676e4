"""The program `python -m bench COMMAND`: speed and quality of this project, as tables and JSON. Wiring only."""

from __future__ import annotations

import click

from bench.gpu.compile import compile_kernels
from bench.gpu.gpu import gpu
from bench.gpu.kernels import kernels
from bench.gpu.tune import tune
from bench.quality.control import control
from bench.quality.estimators import estimators
from bench.quality.families import families
from bench.quality.glyphs import glyphs
from bench.quality.intents import intents
from bench.quality.levels import levels
from bench.quality.molecules import molecules
from bench.quality.recommend import recommend
from bench.quality.robustness import robustness
from bench.quality.streams import streams
from bench.quality.suite import suite
from bench.quality.widths import widths
from bench.speed.meta import meta
from bench.speed.outer import outer
from bench.speed.overhead import overhead
from bench.speed.scaling import scaling
from bench.speed.soak import soak
from bench.speed.step import step


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure lopt. Every figure is the median of repeats after a warm-up, with its spread."""


COMMANDS = (
    compile_kernels,
    control,
    estimators,
    families,
    glyphs,
    gpu,
    intents,
    kernels,
    levels,
    meta,
    molecules,
    outer,
    overhead,
    recommend,
    robustness,
    scaling,
    soak,
    step,
    streams,
    suite,
    tune,
    widths,
)
for command in COMMANDS:
    cli.add_command(command)
