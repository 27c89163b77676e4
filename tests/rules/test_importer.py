"""Foreign weights: what is imported is what the file says; whatever else a file holds is refused in one line."""

from __future__ import annotations

import io
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lopt
import lopt.core.foreign_files
from lopt.core.foreign_files import Weights, read_weights
from lopt.rules import RULES, Rule
from lopt.rules.released import IMPORTERS, build_rule, count_learned, import_rule

GOLDEN = Path(__file__).parents[1] / "cases" / "golden"
RELEASED = Path(__file__).parents[3] / "shared" / "weights"
Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def read_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix("theta/"): file[key] for key in file.files if key.startswith("theta/")}


def encode_array(shape: object, dtype: object, data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def write_flax(path: str, arrays: dict[str, np.ndarray]) -> None:
    """As flax writes: nested maps."""
    tree: Tree = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = encode_array(array.shape, array.dtype.name, array.tobytes())
    Path(path).write_bytes(msgpack.packb(tree))


# -- what is imported --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released weights are not here")
@pytest.mark.parametrize(("name", "numbers", "unused"), [("celo", 37_089, 1_286), ("celo_adam", 36_865, 1_216)])
def test_released_weights_are_all_taken_and_those_without_effect_left_out(name: str, numbers: int, unused: int) -> None:
    weights = read_weights(RELEASED / f"{name}.theta.state")
    assert count_learned(build_rule(weights, name)) == numbers - unused
    assert weights.count_taken() == numbers


@pytest.mark.parametrize(
    ("file", "name"), [("velo_h16_b8", "velo"), ("small_fc_h4_l2", "small_fc"), ("celo2", "celo2")]
)
def test_flax_and_numpy_files_of_the_same_arrays_give_the_same_rule(file: str, name: str) -> None:
    write_flax("theta.state", read_golden(file))
    ours, theirs = import_rule("theta.state", name).state_dict(), import_rule(GOLDEN / f"{file}.npz", name).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_numpy_arrays_of_any_float_order_and_byte_order_are_read(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3)
    np.savez_compressed("w.npz", c=array.astype(dtype), f=np.asfortranarray(array.astype(dtype)), s=np.array(3, dtype))
    tensors = read_weights("w.npz").tensors
    assert torch.equal(tensors["c"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tensors["f"], tensors["c"])
    assert tensors["s"].shape == ()


def step(rule: Rule) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    params = {"p": torch.randn(5, 4, generator=generator)}
    state = rule.init_state(params)
    for _ in range(3):
        g = torch.randn(5, 4, generator=generator) * torch.logspace(-3, 2, 5)[:, None]
        params, state = rule.update({"p": g}, params, state)
    return params["p"].detach()


@pytest.mark.parametrize(("name", "inputs"), [("small_fc", 39), ("mlp", 19)])
@pytest.mark.parametrize("prefix", ["", "network."])
def test_a_pytorch_mlp_steps_as_its_weights_set_by_hand(name: str, inputs: int, prefix: str) -> None:
    linears = nn.ModuleList([nn.Linear(inputs, 6), nn.Linear(6, 6), nn.Linear(6, 2)]).requires_grad_(False)
    torch.save({f"{prefix}{key}": value for key, value in linears.state_dict().items()}, "net.pth")
    by_hand = RULES[name](hidden=6, hidden_layers=2, step_mult=0.5)
    with torch.no_grad():
        for i, linear in enumerate(linears, start=1):
            getattr(by_hand, f"w{i}").copy_(linear.weight)
            getattr(by_hand, f"b{i}").copy_(linear.bias)
    imported = import_rule("net.pth", name, {"step_mult": 0.5})
    assert imported.config == by_hand.config
    assert torch.equal(step(imported), step(by_hand))


# -- what is refused ---------------------------------------------------------------------------------------------------


def check_refused(path: str, name: str, words: str, options: Tree | None = None) -> None:
    """One line, with the file's name."""
    with pytest.raises(ValueError, match=words) as refusal:
        import_rule(path, name, options)
    assert path in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 600


def change(**changes: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def apply(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        changed = arrays | {name.replace("_in", "mlp/~/linear_0/w"): value for name, value in changes.items()}
        return {name: value for name, value in changed.items() if value is not None}

    return apply


def widen(hidden: int) -> dict[str, np.ndarray]:
    shapes = {"0/w": (19, hidden), "0/b": (hidden,), "1/w": (hidden, 2), "1/b": (2,)}
    return {f"mlp/~/linear_{name}": np.ones(shape, "f4") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change(_in=None), r"expected a tensor 'mlp/~/linear_0/w', found mlp/~/linear_0/b"),
        (change(extra=np.ones(3, "f4")), "holds extra, which rule 'mlp' does not have"),
        (change(_in=np.ones((18, 32), "f4")), r"linear_0/w has shape \[18, 32\], expected \[19, any\]"),
        (change(_in=np.ones((19, 31), "f4")), r"linear_0/b has shape \[32\], expected \[31\]"),
        (change(_in=np.array(1, "f4")), r"linear_0/w has shape \[\], expected \[19, any\]"),
        (change(_in=np.ones((19, 32), "i4")), "int32, expected one of float32"),
        (change(_in=np.full((19, 32), np.nan, "f4")), "linear_0/w holds nan or inf"),
        (change(_in=np.full((19, 32), 1e300)), "linear_0/w holds nan or inf"),
        (lambda arrays: {k: v for k, v in arrays.items() if "_2" not in k}, r"widths \[19, 32, 32\].*2 outputs"),
        (lambda arrays: widen(1025), "does not accept.*hidden widths must be from 1 to 1024"),
        (lambda arrays: {}, "the content is of type dict"),
    ],
)
@pytest.mark.parametrize("kind", ["flax", "numpy"])
def test_other_weights_than_the_rule_has_are_named(kind: str, edit: Any, words: str) -> None:
    arrays = edit(read_golden("mlp_lopt"))
    if kind == "flax":
        write_flax("weights", arrays)
    else:
        with Path("weights").open("wb") as file:
            np.savez(file, **arrays)
    check_refused("weights", "mlp", words)


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("velo_h16_b8", "celo", "bank of 8 MLPs, expected one"),
        ("celo2", "celo", r"w1 has shape \[8, 8\], expected \[any, any, any\]"),
        ("celo2", "celo_adam", "'rnn_params/linear/w', found ff_mod_stack/~/b0"),
        ("velo_h16_b8", "celo2", r"expected \[any, any\]"),
        ("mlp_lopt", "small_fc", "expected a tensor 'nn/~/w0', found mlp"),
        ("mlp_lopt", "mpl", "Did you mean mlp"),
        ("mlp_lopt", "lstm", "cannot import 'lstm'.*Known: celo"),
    ],
)
def test_weights_of_another_rule_are_refused(file: str, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        import_rule(GOLDEN / f"{file}.npz", name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": 32}, "decides hidden=32"),
        ({"step_mul": 1.0}, "step_mul is unknown.*Did you mean step_mult"),
        ({"step_mult": "big"}, "step_mult must be a finite number, got 'big'"),
    ],
)
def test_options_that_the_file_decides_or_the_rule_lacks_are_refused(options: Tree, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        import_rule(GOLDEN / "mlp_lopt.npz", "mlp", options)


def test_an_importer_that_forgets_a_tensor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(weights: Weights) -> tuple[Tree, dict[str, Tensor]]:
        config, tensors = complete(weights)
        return config, {name: value for name, value in tensors.items() if name != "b1"}

    complete = IMPORTERS["mlp"]
    monkeypatch.setitem(IMPORTERS, "mlp", forget)
    with pytest.raises(ValueError, match=r"b1 of rule 'mlp' has shape \[32\], found None"):
        import_rule(GOLDEN / "mlp_lopt.npz", "mlp")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, ("exploded", "w"))


def write_pickled_numpy(path: str) -> None:
    with Path(path).open("wb") as file:
        np.savez(file, w=np.array([Bomb()], dtype=object))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: Path(path).write_bytes(pickle.dumps(Bomb())), "bare pickle.*nothing was executed"),
        (lambda path: Path(path).write_bytes(pickle.dumps(Bomb(), protocol=0)), "cannot be read as flax msgpack"),
        (lambda path: torch.save({"w": Bomb()}, path), "nothing of it was executed: it asks for io.open"),
        (lambda path: torch.save({"w": Bomb()}, path, _use_new_zipfile_serialization=False), "bare pickle"),
        (write_pickled_numpy, "w.npy: an array of object, expected one of float32"),
    ],
)
def test_code_in_a_file_is_not_run(write: Callable[[str], object], words: str) -> None:
    write("weights")
    check_refused("weights", "mlp", words)
    assert not Path("exploded").exists()


def pack_numpy(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def pack_torch(tree: object) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def pack_header(shape: tuple[int, ...], compression: int = zipfile.ZIP_STORED, version: int = 1) -> bytes:
    """An .npz of 4 bytes, whatever shape it claims."""
    array, file = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
    header = array.getvalue().replace(b"\x93NUMPY\x01", b"\x93NUMPY" + bytes([version]))
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("w.npy", header + bytes(4))
    return file.getvalue()


def pack_liar() -> bytes:
    """An .npz whose 32 MiB claim to be 1000 bytes."""
    data = pack_numpy(w=np.zeros(1 << 23, "f4"))
    size = (1 << 25) + 128
    return data.replace(struct.pack("<I", size), struct.pack("<I", 1000)).replace(struct.pack("<Q", size), bytes(8))


def nest(depth: int) -> Tree:
    tree: Tree = {"w": 1}
    for _ in range(depth):
        tree = {"w": tree}
    return tree


def share(levels: int) -> Tree:
    """Few dicts that stand for 10 ** levels tensors."""
    tree: Tree = {"w": torch.ones(1)}
    for _ in range(levels):
        tree = {str(i): tree for i in range(10)}
    return tree


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"some text\n", "cannot be read as flax msgpack"),
        (b"\x93NUMPY", "cannot be read as flax msgpack"),
        (msgpack.packb({"w": encode_array((2,), "float32", bytes(8))})[:-1], "cannot be read as flax msgpack"),
        (pack_torch({"w": torch.ones(2)})[:-30], "cannot be read as a zip archive"),
        (pack_numpy(w=np.ones(2))[:-30], "cannot be read as a zip archive"),
        (pack_torch([torch.ones(2)]), "the content is of type list, expected tensors"),
        (pack_torch({"w": 3}), "w is of type int"),
        (pack_torch({0: torch.ones(2)}), "a name is 0, expected text"),
        (pack_torch({"w": torch.ones(2, dtype=torch.int64)}), "w has dtype int64, expected one of float32"),
        (pack_torch({"w": torch.eye(2).to_sparse()}), "w is torch.sparse_coo.*expected a dense tensor"),
        (pack_torch({"w": torch.empty(2, device="meta")}), "w is .* on meta"),
        (pack_torch({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}), "two tensors are called a/b"),
        (msgpack.packb({b"w": encode_array((1,), "float32", bytes(4))}), r"a name is b'w', expected text"),
        (msgpack.packb({"w\n" * 999: encode_array((1,), "float32", bytes(4))}), "a name is.*at most 200 characters"),
        (b"\x82\xa1w\xa1x\xa1w\xa1y", "a name occurs twice"),
        (
            msgpack.packb({"w": encode_array((1,), "a\n\x1bb" + "c" * 999, bytes(4))}),
            r"an array of a \\x1bbc+ \[\.\.\.\]; expected",
        ),
        (pack_header((1,), compression=zipfile.ZIP_BZIP2), "compressed as numpy and PyTorch never do"),
        (pack_header((1,), version=9), r"version \(9, 0\) of numpy's format"),
        (msgpack.packb({"w": msgpack.ExtType(3, b"")}), "unknown extension type 3"),
        (msgpack.packb({"w": encode_array((2,), "float32", bytes(4))}), r"float32 and shape \[2\] with 4 bytes"),
        (msgpack.packb({"w": {"__msgpack_chunked_array__": True}}), "w/__msgpack_chunked_array__ is of type bool"),
    ],
)
def test_a_file_that_is_no_dict_of_tensors_is_refused(data: bytes, words: str) -> None:
    Path("weights").write_bytes(data)
    check_refused("weights", "mlp", words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (msgpack.packb({"w": encode_array((10**6, 10**6), "float32", bytes(4))}), "with 4 bytes"),
        (msgpack.packb({"w": encode_array((0, 10**15), "float32", b"")}), "with 0 bytes"),
        (pack_header((10**6, 10**6)), "with 4 bytes"),
        (pack_torch({"w": torch.zeros(1).expand(10**12)}), "more than 33554432 numbers"),
        (pack_torch(share(6)), "10000 tensors"),
        (pack_torch({"w": nest(100)}), "nested more than 16 deep"),
        (msgpack.packb(nest(100)), "nested more than 16 deep"),
        (b"\x81\xa1w" * 5000, "cannot be read as flax msgpack"),
        (b"\xdd\x00\x00\xff\xf0" * 1000 + bytes(1 << 16), "65520 exceeds max_array_len"),
        (pack_numpy(w=np.zeros(1 << 23, "f4")), "unpacks to 33554560 bytes, more than 4194304"),
        (pack_liar(), "cannot be read as a zip archive"),
    ],
    ids=range(11),
)
def test_a_small_file_does_not_make_us_allocate_much(data: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lopt.core.foreign_files, "MAX_BYTES", 1 << 22)
    Path("weights").write_bytes(data)
    tracemalloc.start()
    try:
        check_refused("weights", "mlp", words)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(data) + (8 << 20)  # torch's own imports and 10,000 tensors


def test_a_file_beyond_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lopt.core.foreign_files, "MAX_BYTES", 1000)
    Path("weights").write_bytes(bytes(1001))
    check_refused("weights", "mlp", "has 1001 bytes, more than the 1000")


# -- the command -------------------------------------------------------------------------------------------------------


def test_an_imported_rule_has_a_card_and_is_inspected_and_judged(run) -> None:  # type: ignore[no-untyped-def]
    folder = Path("private")
    folder.mkdir()
    (folder / "theta.npz").write_bytes((GOLDEN / "velo_h16_b8.npz").read_bytes())
    options = ["--set", "bugged_loss_features=false", "--licence", "MIT", "--source", "a paper"]
    result = run("import", "private/theta.npz", "--rule", "velo", "-o", "new/velo.safetensors", *options)
    assert result.status == 0, result.err
    rule = lopt.load("new/velo.safetensors")
    assert rule.config["bugged_loss_features"] is False
    assert rule.config["bank"] == 8
    assert lopt.load_card("new/velo.safetensors") == {
        "name": "velo",
        "kind": "imported",
        "licence": "MIT",
        "source": "a paper",
        "file": "theta.npz",
        "sha256": sha256((GOLDEN / "velo_h16_b8.npz").read_bytes()).hexdigest(),
    }
    first, note = result.out.splitlines()
    assert first == f"{rule.describe()}: {count_learned(rule)} meta-weights, {Path('new/velo.safetensors')}"
    assert note.startswith(f"{30 * 16 + 16 + 8 * 5} weights of theta.npz have no effect")
    told = run("inspect", "new/velo.safetensors", "--no-pictures")
    assert told.status == 0
    assert "imported" in told.out
    settings = ["--task", "quadratic", "--set", "dim=3", "--steps", "4", "--seeds", "2", "--baselines", "sgd"]
    judged = run("eval", "new/velo.safetensors", *settings)
    assert judged.status == 0
    assert "note" not in told.err + judged.err


def test_an_existing_file_is_only_overwritten_by_force(run) -> None:  # type: ignore[no-untyped-def]
    Path("mine.safetensors").write_text("mine")
    arguments = ["import", str(GOLDEN / "mlp_lopt.npz"), "--rule", "mlp", "-o", "mine.safetensors"]
    result = run(*arguments)
    assert result.status == 2
    assert "mine.safetensors exists already" in result.err
    assert Path("mine.safetensors").read_text() == "mine"
    forced = run(*arguments, "--force", "--name", "lolv2")
    assert forced.status == 0
    assert len(forced.out.splitlines()) == 1  # nothing was left out
    assert lopt.load_card("mine.safetensors")["name"] == "lolv2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.npz", "--rule", "mlp"], "no file gone.npz"),
        (["folder", "--rule", "mlp"], "folder is a folder"),
        (["bomb", "--rule", "mlp"], "bomb is a bare pickle"),
        (["cut.npz", "--rule", "mlp"], "cut.npz cannot be read as a zip archive"),
        (["good.npz", "--rule", "small_fc"], "expected a tensor"),
        (["good.npz", "--rule", "adam"], "cannot import 'adam'"),
        (["good.npz", "--rule", "mlp", "--set", "hidden=32"], "good.npz decides hidden=32"),
        (["good.npz", "--rule", "mlp", "--set", "step_mult"], "override looks like"),
        (["good.npz", "--rule", "mlp", "--name", "adam"], "'adam'.*baseline is called so"),
        (["good.npz", "--rule", "mlp", "-o", "new/out"], r"a rule file is called \*.safetensors, got new/out"),
        (["good.npz"], "--rule"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(run, arguments: list[str], words: str) -> None:  # type: ignore[no-untyped-def]
    Path("folder").mkdir()
    Path("bomb").write_bytes(pickle.dumps(Bomb()))
    good = (GOLDEN / "mlp_lopt.npz").read_bytes()
    Path("good.npz").write_bytes(good)
    Path("cut.npz").write_bytes(good[:-9])
    before = sorted(Path().rglob("*"))
    result = run("import", "-o", "new/rule.safetensors", *arguments)
    assert result.status == 2
    assert re.search(words, result.err.strip().splitlines()[-1]), result.err
    assert "Traceback" not in result.err
    assert sorted(Path().rglob("*")) == before
