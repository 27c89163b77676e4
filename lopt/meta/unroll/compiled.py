"""Steps of populations through torch's inductor: batches go in, and rule, base learner and its gradient are one graph.

`torch.compile` reads Python and does not follow `torch.autograd.grad`. Here a step is made once, and what it did to
tensors, the backward pass and all, is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from lopt.core.tensors import Params
from lopt.meta.unroll.draws import Batches
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots

OPTIONS: dict[str, Any] = {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}
"""Joined tensors are written part by part: otherwise every element looks up which part it is from."""

HOST_OPTIONS: dict[str, Any] = {"cpp_wrapper": True}
"""On a CPU all is in one file, which takes a C++ compiler half the time and calls itself without Python."""


class CompiledStride:
    """A `lopt.meta.unroll.inner_loop.Stride`; equal to plain steps up to rounding.

    Steps of slots of other shapes, another rule or another family are compiled when they come, which takes some ten
    seconds each. What is compiled is kept.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Scan] = {}

    def __call__(self, loop: InnerLoop, slots: Slots, weights: Params, count: int) -> tuple[Slots, Tensor]:
        """`count` steps: the slots after them and the losses `[count, T]`."""
        weights = {
            name: weights[name] if name in weights else w.detach().expand(len(slots.ids), *w.shape)
            for name, w in loop.rule.named_parameters()  # the frozen ones, too, which may change between windows
        }
        losses: list[Tensor] = []
        while len(losses) < count:
            # It takes several turns where batches of so many steps are too large to be drawn at once.
            batches = loop.batches(slots, count - len(losses))
            kinds = tuple((x.shape, x.dtype, x.device) for x in tree_leaves((slots, weights, batches[0])))
            # All that compiled code holds for constant: shapes, settings of the step, and the number of threads.
            measured = (loop.meta_split, loop.meta_metric, loop.precision)
            settings = (loop.rule, loop.family, loop.seed, *measured, loop.hide_end)
            key = (*settings, torch.get_num_threads(), kinds)
            if key not in self._known:

                def step(slots: Slots, weights: Params, batches: Batches) -> tuple[Slots, Tensor]:
                    return loop.step(slots, weights, batches)[:2]

                self._known[key] = Scan(step, slots, weights, batches[0])
            slots, made = self._known[key](slots, weights, batches)
            losses += made
        return slots, torch.stack(losses)


class Scan:
    """A compiled loop `carry, result = step(carry, constants, input)` on nested tensors, without derivatives.

    Args:
        step: pure; returns the carry in the structure that it has, and one tensor. It must not ask for tensors' values,
            and all else that it reads is constant from now on.
        examples: a carry, constants and an input; those of calls have the same structure, shapes, dtypes and devices.
    Raises:
        ValueError: the step asks for values of tensors, or this machine cannot compile it.
    """

    def __init__(self, step: Callable[..., tuple[Any, Tensor]], *examples: Any) -> None:
        leaves, structure = tree_flatten(examples)
        carry_structure = tree_structure(examples[0])
        # Copies, as the same tensor may be there twice, and the compiled code takes these strides for granted.
        leaves = [x.detach().clone(memory_format=torch.contiguous_format) for x in leaves]
        self._moving: list[int] = []  # leaves of the carry that a step changes

        def run(*leaves: Tensor) -> list[Tensor]:
            carry, result = step(*tree_unflatten(leaves, structure))
            after, structure_after = tree_flatten(carry)
            # Tensors are put back by their place: in another structure they would be mixed up unnoticed.
            if structure_after != carry_structure:
                raise TypeError(f"the carry changes from {carry_structure} to {structure_after}")
            self._moving = [i for i, x in enumerate(after) if x is not leaves[i]]
            return [*(after[i] for i in self._moving), result]

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own parts
            try:
                with _RefuseNumpy():
                    graph = make_fx(run)(*leaves)
            except RuntimeError as error:
                raise ValueError(
                    f"the steps of meta-training cannot be compiled: rule or task asks for values of tensors "
                    f"({_find_reason(error)}); set compile = false"
                ) from error
            try:
                self._graph = _compile(graph, leaves)
            except Exception as error:
                raise ValueError(
                    f"the steps of meta-training cannot be compiled on this machine ({_find_reason(error)}); "
                    "install a C++ compiler and Python's headers, such as g++ and python3-dev, or set compile = false"
                ) from error

    @torch.no_grad()
    def __call__(self, carry: Any, constants: Any, inputs: Iterable[Any]) -> tuple[Any, list[Tensor]]:
        """The carry after all inputs, and the results."""
        # Compiled code takes strides for granted: those of the examples, which were contiguous.
        now, structure = tree_flatten(carry)
        now = [x.contiguous() for x in now]
        fixed = [x.contiguous() for x in tree_leaves(constants)]
        results = []
        for each in inputs:
            *moved, result = self._graph(*now, *fixed, *(x.contiguous() for x in tree_leaves(each)))
            for i, x in zip(self._moving, moved, strict=True):
                now[i] = x.contiguous()  # it may be part of a larger tensor
            results.append(result)
        return tree_unflatten(now, structure), results


class _RefuseNumpy(TorchFunctionMode):
    """Makes an error of arrays that share a tensor's memory: what is computed from them would be kept as constants.

    `Tensor.item` and what else asks for a tensor's values makes one by itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy or func is Tensor.__array__:
            raise RuntimeError("Tensor.numpy outside of an operation made by torch.library.custom_op")
        return func(*args, **(kwargs or {}))


def _compile(graph: GraphModule, leaves: list[Any]) -> Callable[..., Any]:
    """The graph in compiled form, from torch's cache where an earlier process left it."""
    from torch._inductor import list_options, standalone_compile  # seconds, for those who compile only

    host = all(x.device.type == "cpu" for x in leaves)
    wanted = OPTIONS | (_list_host_options() if host else {})
    options = {key: value for key, value in wanted.items() if key in list_options()}
    # Only graphs with shapes of their own go to the cache.
    return standalone_compile(graph, leaves, dynamic_shapes="from_example_inputs", options={"config_patches": options})


def _list_host_options() -> dict[str, Any]:
    options = HOST_OPTIONS | {"cpp.threads": torch.get_num_threads()}
    # That the compiler knows the processor's vectors is taken for granted, instead of compiling ten programs, for as
    # many seconds, to see. Where torch uses none, the option would make it write code for vectors that there are not.
    return options if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else options | {"cpp.vec_isa_ok": True}


def _find_reason(error: Exception) -> str:
    """The line of an error's message that says most, and what kind of error it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "error:" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {told}"
