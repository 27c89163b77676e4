"""Every op's kernel equals its reference and stays inside its tensors (conftest.py: the interpreter)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lopt_kernels
import pytest
import torch
from lopt_kernels import DIFFERENTIABLE_OPS, GROUP_OPS, OPS, Op
from lopt_kernels.elementwise.lstm import launch, sample
from lopt_kernels.elementwise.lstm_layers import LSTMWeights, reference
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

PACKAGES = Path(lopt_kernels.__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_capability = pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
GUARD = 4096  # numbers on each side of a guarded tensor; more than all padded rows hold
TOLERANCE = {
    torch.float32: 1e-5,  # order of summation
    torch.bfloat16: 2e-2,  # one rounding to 8 bits, two where the state was read
}

gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
each_op_and_dtype = pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
        for name, op in OPS.items()
        for dtype in op.state_dtypes
    ],
)


def draw_inputs(op: Op, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return op.sample(count, torch.Generator().manual_seed(count), dtype, DEVICE)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Same structure, shapes and dtypes; each row is within `tolerance` of its own norm."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    for left, right in pairs:
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        dim = -1 if left.shape[-1] > 1 else None  # a row of one number may cancel: the tensor's norm
        error = torch.linalg.vector_norm(left.double() - right.double(), dim=dim)
        assert (error <= tolerance * torch.linalg.vector_norm(right.double(), dim=dim)).all()


def guard(tree: Any, fill: float) -> tuple[Any, list[Tensor]]:
    """Copies of the tensors in the middle of larger ones full of `fill`, and those larger ones."""
    buffers = []

    def copy(tensor: Tensor) -> Tensor:
        buffers.append(tensor.new_full((tensor.numel() + 2 * GUARD,), fill))
        view = buffers[-1][GUARD : GUARD + tensor.numel()].view(tensor.shape)
        return view.copy_(tensor)

    return tree_map(copy, tree), buffers


def run_python(code: str, **env: str | None) -> str:
    """Standard output of a fresh interpreter; a variable given as None is unset."""
    path = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables: dict[str, str | None] = {**os.environ, "PYTHONPATH": path, **env}
    merged = {key: value for key, value in variables.items() if value is not None}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=merged, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- every op ---


def test_kernels_folder_is_not_a_package() -> None:
    assert not (PACKAGES / "__init__.py").exists()  # it would shadow the unrelated package `kernels`


def test_ops_are_registered_under_their_own_names() -> None:
    assert OPS
    assert all(op.name == name for name, op in OPS.items())


OPTIONS = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg"}  # of the compiler


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU refuses by itself")
@pytest.mark.parametrize("name", [*OPS, *GROUP_OPS, *(f"{name} backward" for name in DIFFERENTIABLE_OPS)])
def test_kernels_are_launched_with_arguments_that_they_have(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter ignores unknown keywords, a GPU does not."""
    from triton.runtime.interpreter import InterpretedFunction

    launched = []
    original = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.append((self.arg_names, len(args), set(kwargs)))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    generator = torch.Generator().manual_seed(0)
    if name.endswith(" backward"):
        formula = DIFFERENTIABLE_OPS[name.removesuffix(" backward")]
        inputs = formula.sample(2, 70, generator, torch.float32, DEVICE)
        tree_map(lambda x: x.requires_grad_() if isinstance(x, Tensor) else x, inputs)
        sum(x.sum() for x in tree_leaves(formula.run(*inputs))).backward()
        assert len(launched) >= 2
    else:
        op = (OPS | GROUP_OPS)[name]
        op.launch(**op.sample(70, generator, op.state_dtypes[0], DEVICE))
    assert launched
    for names, positional, keywords in launched:
        assert keywords - OPTIONS == set(names[positional:])


@needs_triton
@each_op_and_dtype
@pytest.mark.parametrize("excess", [0, 1])
def test_launch_stays_inside_its_tensors(op: Op, dtype: torch.dtype, excess: int) -> None:
    inputs = draw_inputs(op, op.block + excess, dtype)
    want = op.reference(**inputs)
    inputs, read = guard(inputs, torch.nan)  # a value read outside would spread as NaN
    out, written = guard(tree_map(torch.zeros_like, want), 7.0)
    before = [buffer.clone() for buffer in read]
    got = op.launch(**inputs, out=out)
    assert_close(got, want, TOLERANCE[dtype])
    assert [t.data_ptr() for t in tree_leaves(got)] == [t.data_ptr() for t in tree_leaves(out)]
    for buffer in written:
        assert torch.cat([buffer[:GUARD], buffer[-GUARD:]]).eq(7).all()
    for old, new in zip(before, read, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@needs_triton
@each_op_and_dtype
@pytest.mark.parametrize(("blocks", "extra"), [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1), (3, 7)])
def test_launch_equals_reference_around_block_boundaries(op: Op, dtype: torch.dtype, blocks: int, extra: int) -> None:
    inputs = draw_inputs(op, blocks * op.block + extra, dtype)
    assert_close(op.launch(**inputs), op.reference(**inputs), TOLERANCE[dtype])


@needs_triton
@each_op
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * inf, in the interpreter's numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, pytest.param(-torch.inf, marks=pytest.mark.slow)])
def test_nonfinite_number_stays_in_its_coordinate(op: Op, value: float) -> None:
    count, bad = op.block + 1, 3
    inputs = draw_inputs(op, count)
    clean = tree_leaves(op.launch(**inputs))
    others = torch.arange(count, device=DEVICE) != bad
    for tensor in tree_leaves(inputs):
        if tensor.shape[-1:] != (count,):  # weights
            continue
        numbers = tensor.view(-1, count)[0]
        kept, numbers[bad] = numbers[bad].item(), value
        results = zip(
            tree_leaves(op.launch(**inputs)),
            tree_leaves(op.reference(**inputs)),
            clean,
            strict=True,
        )
        for got, want, before in results:
            assert torch.equal(got[..., others], before[..., others])
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())
        numbers[bad] = kept


@needs_triton
@each_op_and_dtype
def test_launch_may_write_over_the_state_it_reads(op: Op, dtype: torch.dtype) -> None:
    inputs = draw_inputs(op, 2 * op.block + 1, dtype)
    want = op.launch(**inputs)
    got = op.launch(**inputs, out=(torch.empty_like(want[0]), inputs["state"]))
    assert_close(got, want, 0.0)


@each_op
def test_reference_leaves_its_inputs_untouched(op: Op) -> None:
    inputs = draw_inputs(op, 5)
    before = [tensor.clone() for tensor in tree_leaves(inputs)]
    op.reference(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, tree_leaves(inputs), strict=True))


@each_op_and_dtype
def test_bytes_moved_counts_every_input_and_output_once(op: Op, dtype: torch.dtype) -> None:
    inputs = draw_inputs(op, 7, dtype)
    tensors = tree_leaves(inputs) + tree_leaves(op.reference(**inputs))
    want = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert op.bytes_moved(7, state_bytes=dtype.itemsize) == want


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Op, torch.dtype, int], dict[str, str]]:
    """Every op compiled for a capability, by the first call that asks for it; Triton is not interpreted there."""
    folder = tmp_path_factory.mktemp("compiled")

    @cache
    def compile_all(capability: int) -> None:
        code = f"""
import pathlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lopt_kernels import OPS
for name, op in OPS.items():
    for dtype in op.state_dtypes:
        source = op.compile_source(dtype)
        kernel = triton.compile(
            ASTSource(source.kernel, source.signature, source.constexprs),
            target=GPUTarget("cuda", {capability}, 32),
            options=source.options,
        )
        for stage in ("ttir", "ptx"):
            path = pathlib.Path({str(folder)!r}, f"{{name}}-{{dtype}}-{capability}.{{stage}}")
            path.write_text(kernel.asm[stage])
"""
        run_python(code, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(folder / "cache"))

    def read(op: Op, dtype: torch.dtype, capability: int) -> dict[str, str]:
        compile_all(capability)
        stem = folder / f"{op.name}-{dtype}-{capability}"
        return {stage: Path(f"{stem}.{stage}").read_text() for stage in ("ttir", "ptx")}

    return read


@needs_triton
@each_op_and_dtype
@each_capability
def test_kernel_compiles_for_each_capability_without_a_gpu(
    compiled: Callable[..., dict[str, str]], op: Op, dtype: torch.dtype, capability: int
) -> None:
    ptx = compiled(op, dtype, capability)["ptx"]
    assert f".target sm_{capability}" in ptx
    assert ".visible .entry" in ptx
    assert ("mma." in ptx) == (dtype != torch.float32)  # tensor cores would round a float32 product


@needs_triton
@each_op
def test_kernel_offsets_are_64_bit_before_they_are_multiplied(compiled: Callable[..., dict[str, str]], op: Op) -> None:
    lines = compiled(op, torch.float32, 90)["ttir"].splitlines()
    products = [line for line in lines if "arith.muli" in line]
    assert products
    assert all("i64" in line for line in products)


# --- lstm ---


def draw_lstm(count: int, features: int = 2, hidden: int = 20, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(features + hidden)
    inputs = sample(count, generator, dtype, DEVICE, features, hidden)
    return inputs["x"], inputs["state"], inputs["weights"]


def stack_slots(*slots: Any) -> Any:
    """Inputs with a leading dimension from inputs without."""
    return tree_map(lambda *tensors: torch.stack(tensors), *slots)


@needs_triton
@pytest.mark.parametrize(("features", "hidden"), [(1, 1), (2, 16), (20, 20), (16, 17), (33, 33), (64, 64)])
def test_lstm_launch_equals_reference_at_every_padding(features: int, hidden: int) -> None:
    inputs = draw_lstm(5, features, hidden)
    assert_close(launch(*inputs), reference(*inputs), TOLERANCE[torch.float32])


def test_lstm_reference_equals_torch_cells_with_the_same_weights() -> None:
    inputs: Any = tree_map(Tensor.double, draw_lstm(6, features=3, hidden=4))
    x, state, w = inputs
    (h1, c1, h2, c2), zeros = (s.mT for s in state), torch.zeros_like(w.b1)
    first, second = (nn.LSTMCell(width, 4, dtype=x.dtype, device=DEVICE) for width in (3, 4))
    for cell, (w_ih, w_hh, b) in ((first, w[:3]), (second, w[3:6])):
        cell.load_state_dict({"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b, "bias_hh": zeros})
    with torch.no_grad():
        h1, c1 = first(x.mT, (h1, c1))
        h2, c2 = second(h1, (h2, c2))
    out = nn.functional.linear(h2, w.w_out, w.b_out).squeeze(-1)
    assert_close(reference(x, state, w), (out, (h1.mT, c1.mT, h2.mT, c2.mT)), 1e-12)  # float64 rounding


def test_lstm_batched_reference_equals_one_slot_at_a_time() -> None:
    slots = [draw_lstm(3, hidden=4), tree_map(lambda t: t.flip(0) + 0.1, draw_lstm(3, hidden=4))]
    x, state, weights = stack_slots(*slots)
    separate = stack_slots(*(reference(*slot) for slot in slots))
    assert_close(reference(x, state, weights), separate, 1e-6)  # order of summation
    two_leading: Any = tree_map(lambda t: t[:, None], (x, state, weights))
    assert_close(tree_map(lambda t: t[:, 0], reference(*two_leading)), separate, 1e-6)
    first = slots[0][2]
    shared = stack_slots(*(reference(slot[0], slot[1], first) for slot in slots))
    assert_close(reference(x, state, first), shared, 1e-6)


def test_lstm_low_precision_state_is_rounded_once_at_the_end() -> None:
    x, state, weights = draw_lstm(9, dtype=torch.bfloat16)
    out, new_state = reference(x, tuple(s.float() for s in state), weights)
    assert_close(reference(x, state, weights), (out, tuple(s.bfloat16() for s in new_state)), 0.0)


@pytest.mark.parametrize("per_slot", [False, True])
def test_lstm_reference_is_twice_differentiable_in_everything(per_slot: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    slots, features, hidden, count = 2, 2, 2, 2
    lead = (slots,) if per_slot else ()
    gates = 4 * hidden
    shapes = [
        (gates, features),
        (gates, hidden),
        (gates,),
        (gates, hidden),
        (gates, hidden),
        (gates,),
    ]
    weights = [draw(*lead, *shape) for shape in [*shapes, (1, hidden), (1,)]]
    state = [draw(slots, hidden, count) for _ in range(4)]

    def step(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        out, new_state = reference(x, rest[:4], LSTMWeights(*rest[4:]))
        return out, *new_state

    inputs = (draw(slots, features, count), *state, *weights)
    assert all(result.requires_grad for result in step(*inputs))  # gradcheck skips those that do not
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


Change = Callable[[Tensor, Any, LSTMWeights], tuple[Any, Any, Any]]


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, s, w: (x[None], s, w), r"x must be one flat .* got \[1, 2, 5\]"),
        (lambda x, s, w: (x[0], s, w), r"x must be one flat .* got \[5\]"),
        (lambda x, s, w: (x[:0], s, w), r"F >= 1, got \[0, 5\]"),
        (lambda x, s, w: (x.double(), s, w), "x must be torch.float32, got torch.float64"),
        (lambda x, s, w: (x.T.contiguous().T, s, w), r"x must be contiguous, got strides \(1, 2\)"),
        (lambda x, s, w: (x, (s[0].half(), *s[1:]), w), "h1 is torch.float16"),
        (lambda x, s, w: (x, (*s[:3], s[3].bfloat16()), w), "c2 must be torch.float32"),
        (
            lambda x, s, w: (x, (s[0], s[1][:, :4], *s[2:]), w),
            r"c1 must have shape \[20, 5\], got \[20, 4\]",
        ),
        (lambda x, s, w: (x, (*s[:2], s[2].mT.contiguous().mT, s[3]), w), "h2 must be contiguous"),
        (
            lambda x, s, w: (x, s, w._replace(b2=w.b2[:-1])),
            r"b2 must have shape \[80\], got \[79\]",
        ),
        (
            lambda x, s, w: (x, s, w._replace(w_out=w.w_out[None])),
            r"w_out must have .* got \[1, 1, 20\]",
        ),
        (lambda x, s, w: (x, s, w._replace(b1=w.b1.bfloat16())), "b1 must be torch.float32"),
        (lambda x, s, w: (x, s, w._replace(b1=w.b1.to("meta"))), "b1 is on meta"),
        (lambda x, s, w: (x, s, w._replace(w_hh1=w.b1.new_zeros(260, 65))), "got F=2, H=65"),
        (lambda x, s, w: (x, s, w._replace(b1=w.b1.clone().requires_grad_())), "no backward"),
    ],
)
def test_lstm_launch_names_what_it_cannot_take(change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(*change(*draw_lstm(5)))


@needs_triton
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (0, r"out must have shape \[5\], got \[4\]"),
        (3, r"new h2 must have shape \[20, 5\], got \[20, 4\]"),
    ],
)
def test_lstm_launch_names_the_output_that_does_not_fit(index: int, message: str) -> None:
    x, state, weights = draw_lstm(5)
    tensors: list[Any] = tree_leaves(reference(x, state, weights))
    tensors[index] = tensors[index][..., :4]
    with pytest.raises(ValueError, match=message):
        launch(x, state, weights, out=(tensors[0], (tensors[1], tensors[2], tensors[3], tensors[4])))


LAUNCH_AND_PRINT = """
import sys
{before}
import torch
from lopt_kernels import OPS
inputs = OPS["lstm"].sample(3, torch.Generator(), torch.float32, torch.device("cpu"))
OPS["lstm"].reference(**inputs)
try:
    OPS["lstm"].launch(**inputs)
except RuntimeError as error:
    print(error)
"""


def test_lstm_reference_works_and_launch_refuses_without_triton() -> None:
    message = run_python(LAUNCH_AND_PRINT.format(before="sys.modules['triton'] = None"))
    assert "Triton is not installed" in message


@needs_triton
def test_lstm_launch_refuses_the_cpu_outside_the_interpreter() -> None:
    message = run_python(LAUNCH_AND_PRINT.format(before=""), TRITON_INTERPRET=None)
    assert "TRITON_INTERPRET=1" in message


@gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lstm_launch_is_one_kernel_that_a_cuda_graph_replays(dtype: torch.dtype) -> None:
    x, state, weights = draw_lstm(1000, dtype=dtype)
    want = reference(x, state, weights)
    out = tree_map(torch.empty_like, want)
    launch(x, state, weights, out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, state, weights, out=out)
    tree_map(Tensor.zero_, out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if "lstm_kernel" in event.name]
    assert len(kernels) == 1
    assert_close(out, want, TOLERANCE[dtype])
