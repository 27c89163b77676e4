"""`python -m bench COMMAND`: speed of the programs of this project, as tables and JSON."""

from __future__ import annotations

import click

from bench.compile import compile_kernels
from bench.estimators import estimators
from bench.families import families
from bench.gpu import gpu
from bench.kernels import kernels
from bench.levels import levels
from bench.meta import meta
from bench.overhead import overhead
from bench.scaling import scaling
from bench.soak import soak
from bench.step import step
from bench.tune import tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure lopt. Every figure is the median of repeats after a warm-up, with its spread."""


for command in (compile_kernels, estimators, families, gpu, kernels, levels, meta, overhead, scaling, soak, step, tune):
    cli.add_command(command)

if __name__ == "__main__":
    cli(prog_name="python -m bench")
