"""A script: compiles every kernel that the steps of some rules launch, as a GPU would, and prints what each takes.

    python kernel_launches.py CAPABILITY RULE...

prints a line `kernel, registers, spilled bytes, shared bytes` for each kernel and specialisation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from lopt_kernels.feature_mlp import moments, rows, scaled_move
from lopt_kernels.launching import clock, op, parameters
from lopt_kernels.launching.figures import compile_figures
from lopt_kernels.launching.op import CompileSource
from torch import nn

import lopt.optim.backend
import lopt.optim.learned_optimizer
import lopt.optim.triton_backend.dispatch
from lopt import LearnedOptimizer
from lopt.rules import RULES

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
NAMES |= {torch.int64: "i64", torch.int8: "i8", torch.bool: "i1"}
SCHEDULER = ("width", "bank")  # of a quick rule; networks are compiled in the sizes that are in use
SHAPES = [(), (5,), (3, 304), (4, 3, 2, 2)]  # a vector, rows that are kept, and strides


class Compiler:
    """In place of `triton.JITFunction.run`: tensors are on the CPU, so kernels are compiled and not run."""

    def __init__(self, capability: int) -> None:
        self.capability, self.seen = capability, set[str]()

    def compile(self, kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {key: value for key, value in keywords.items() if key in kernel.arg_names}
        options = {key: value for key, value in keywords.items() if key not in kernel.arg_names}
        signature: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for parameter in kernel.params:
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = name_type(value)
        key = f"{kernel.__name__} {signature} {constants} {options}"
        if key not in self.seen:
            self.seen.add(key)
            found = compile_figures(CompileSource(kernel, signature, constants, options), self.capability)
            print(kernel.__name__, found.registers, found.spilled, found.shared, flush=True)  # noqa: T201


def name_type(value: Any) -> Any:
    """Triton's name of an argument's type; of a tuple, those of its elements."""
    if isinstance(value, tuple):
        return tuple(name_type(each) for each in value)
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def step(name: str, dtype: torch.dtype, scaled: bool, **options: Any) -> None:
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    rule = RULES[name](**{key: value for key, value in RULES[name].quick_config.items() if key in SCHEDULER})
    optimizer = LearnedOptimizer(params, rule, backend="triton", num_steps=20, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    if scaled:
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(1), torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step(loss=0.5)


def main() -> None:
    compiler = Compiler(int(sys.argv[1]))

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        compiler.compile(self, args, keywords)

    triton.JITFunction.run = run
    for module in (op, parameters, clock, moments, rows, scaled_move):
        module.check_triton = lambda *_: None  # type: ignore[attr-defined]
    for module in (lopt.optim.triton_backend.dispatch, lopt.optim.backend):
        module.find_missing = lambda *_, **__: None  # type: ignore[attr-defined]
    lopt.optim.learned_optimizer.is_skipped_on_host = lambda _: False
    for name in sys.argv[2:]:
        step(name, torch.float32, scaled=False)
        step(name, torch.bfloat16, scaled=False, stochastic_rounding=True, nonfinite="sanitize")
        step(name, torch.float16, scaled=True, capturable=True)
        torch.set_float32_matmul_precision("high")
        step(name, torch.float32, scaled=False)
        torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    main()
