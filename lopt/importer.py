"""Released weights of learned optimizers as rules: from flax's msgpack, numpy archives and PyTorch state dicts.

Names and shapes are those of the sources (learned_optimization and its descendants); every tensor of a file must be
known, and have the shape that the others imply. Nothing is ever unpickled but tensors, by torch's restricted reader.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.names import suggest
from lopt.rules import RULES, Rule

MAX_BYTES = 1 << 30
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # inputs of Celo's family, in groups
NDARRAY = 1  # flax's extension type of an array: msgpack of (shape, dtype name, bytes)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def import_rule(path: str | os.PathLike[str], name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with the weights of a released file.

    Args:
        path: flax msgpack, a numpy `.npz` archive, or what `torch.save` wrote of a dict of tensors.
        name: one of `IMPORTERS`.
        options: of the rule's constructor that weights do not tell, such as `step_mult`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no importer of that name; the file is damaged, of another kind, or does not hold such weights; an
            option that the rule does not have.
    """
    if name not in IMPORTERS:
        raise ValueError(f"cannot import {name!r}: {suggest(name, IMPORTERS)}; only these rules have released weights")
    weights = Weights(read_tensors(Path(path)), str(path))
    config, tensors = IMPORTERS[name](weights)
    weights.check_all_taken(name)
    options = dict(options or {})
    fixed = config.keys() & options.keys()
    if fixed:
        raise ValueError(f"{path}: the file decides {', '.join(sorted(fixed))}; leave the option out")
    try:
        rule = RULES[name](**config, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: rule {name!r} does not accept {config | options}: {error}") from error
    expected = {key: list(value.shape) for key, value in rule.named_parameters() if value.requires_grad}
    found = {key: list(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise ValueError(f"{path}: {key} of rule {name!r} has shape {expected.get(key)}, found {found.get(key)}")
    rule.load_state_dict(tensors, strict=False)
    return rule


# -- files -------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as float32, named by their path in it ("a/b/c").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, too large, of an unknown kind, or holds something else than tensors.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of weights")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; weights of a rule have at most {MAX_BYTES}")
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        with zipfile.ZipFile(path) as archive:
            arrays = all(entry.endswith(".npy") for entry in archive.namelist())
        tree = _read_npz(path) if arrays else _read_torch(path)
    else:
        tree = _read_torch(path) if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" else _read_msgpack(path)
    tensors = dict(_flatten(tree, "", path))
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return {key.removeprefix("theta/"): value for key, value in tensors.items()}


def _read_npz(path: Path) -> Any:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            names = [key for key in file.files if key.startswith("theta/")] or file.files
            return {key: torch.from_numpy(file[key].copy()) for key in names}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a numpy archive of numbers: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted reader has many ways to refuse
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{path} is not a PyTorch file of tensors alone; nothing of it was executed: {reason}"
        ) from error


def _read_msgpack(path: Path) -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("reading flax weights needs msgpack: pip install 'lopt[train]'") from error

    def decode(code: int, data: bytes) -> Tensor:
        if code != NDARRAY:
            raise ValueError(f"unknown extension type {code}")
        shape, dtype, raw = msgpack.unpackb(data, raw=False)
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
        if dtype not in DTYPES:
            raise ValueError(f"an array of {dtype}, expected one of {', '.join(DTYPES)}")
        if prod(shape) * DTYPES[dtype].itemsize != len(raw):
            raise ValueError(f"an array of shape {list(shape)} and {dtype} with {len(raw)} bytes")
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape) if raw else torch.zeros(shape)

    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=decode, raw=False)
    except Exception as error:  # msgpack's errors have no common base
        raise ValueError(f"{path} is neither flax msgpack nor a numpy or PyTorch archive: {error}") from error


def _flatten(tree: Any, prefix: str, path: Path) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [(prefix, tree.detach().float())]
    if isinstance(tree, Mapping):
        return [
            item
            for key, value in tree.items()
            for item in _flatten(value, f"{prefix}/{key}" if prefix else str(key), path)
        ]
    raise ValueError(f"{path}: {prefix or 'the content'} is a {type(tree).__name__}, expected tensors in nested dicts")


class Weights:
    """The tensors of a file, taken one by one.

    Args:
        tensors: by name.
        where: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.tensors, self.where = dict(tensors), where
        self.taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor `name`; None in `shape` stands for any size.

        Raises:
            ValueError: there is none, or it has another shape.
        """
        if name not in self.tensors:
            have = ", ".join(sorted(self.tensors)[:4])
            raise ValueError(f"{self.where}: expected a tensor {name!r}, found {have}, ... Is this the right --rule?")
        value = self.tensors[name]
        if value.ndim != len(shape) or any(
            want not in (None, size) for want, size in zip(shape, value.shape, strict=True)
        ):
            want = ["any" if size is None else size for size in shape]
            raise ValueError(f"{self.where}: {name} has shape {list(value.shape)}, expected {want}")
        self.taken.add(name)
        return value

    def check_all_taken(self, rule: str) -> None:
        """Raise ValueError if the file holds tensors that nobody asked for."""
        left = sorted(self.tensors.keys() - self.taken)
        if left:
            raise ValueError(f"{self.where} holds {', '.join(left[:4])}, which rule {rule!r} does not have")


# -- rules -------------------------------------------------------------------------------------------------------------

Imported = tuple[dict[str, Any], dict[str, Tensor]]
"""Constructor configuration and meta-weights."""


def _import_grouped_mlp(weights: Weights, outputs: int) -> tuple[int, int, dict[str, Tensor]]:
    """The MLP of Celo's family, its first layer in 14 groups of inputs: hidden width, bank size, and weights.

    The source has three outputs, of which the first `outputs` have an effect.
    """
    prefix = "ff_mod_stack/~/"
    first = weights.tensors.get(prefix + "w1")
    lead = () if first is None or first.ndim == 2 else (first.shape[0],)
    hidden = weights.take(prefix + "w1", *lead, None, None).shape[-1]
    groups = [
        weights.take(f"{prefix}w0__{i}", *lead, size, hidden)
        for i, size in enumerate((1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3))
    ]
    tensors = {"w1": torch.cat(groups, -2).mT, "b1": weights.take(prefix + "b0", *lead, hidden)}
    tensors |= {"w2": weights.take(prefix + "w1", *lead, hidden, hidden).mT}
    tensors |= {"b2": weights.take(prefix + "b1", *lead, hidden)}
    tensors |= {"w3": weights.take(prefix + "w2", *lead, hidden, 3).mT[..., :outputs, :]}
    tensors |= {"b3": weights.take(prefix + "b2", *lead, 3)[..., :outputs]}
    return hidden, lead[0] if lead else 1, tensors


def _import_scheduler(weights: Weights, inputs: int, heads: Mapping[str, str]) -> tuple[int, dict[str, Tensor]]:
    """The LSTM scheduler: its width and weights. The source's first mixing layer has no effect and is left out."""
    width = weights.take("rnn_params/linear/w", inputs, None).shape[1]
    weights.take("rnn_params/linear/b", width)
    layers = {"mix": "linear_1", "skip": "linear_2", "lstm": "rnn/linear", **heads}
    sizes = {"mix": (inputs, width), "skip": (inputs, width), "lstm": (2 * width, 4 * width)}
    tensors = {}
    for ours, theirs in layers.items():
        into, out = sizes.get(ours, (width, None))
        weight = weights.take(f"rnn_params/{theirs}/w", into, out)
        tensors[f"scheduler.w_{ours}"] = weight.mT
        tensors[f"scheduler.b_{ours}"] = weights.take(f"rnn_params/{theirs}/b", weight.shape[1])
    for ours, names in {"h0": ("hidden", "0"), "c0": ("cell", "1")}.items():
        name = next(
            (f"lstm_init_state/{n}" for n in names if f"lstm_init_state/{n}" in weights), f"lstm_init_state/{names[0]}"
        )
        tensors[f"scheduler.{ours}"] = weights.take(name, 1, width)[0]
    return width, tensors


def _import_celo(weights: Weights) -> Imported:
    hidden, bank, mlp = _import_grouped_mlp(weights, outputs=2)
    if bank != 1:
        raise ValueError(f"{weights.where} mixes a bank of {bank} MLPs; Celo has one. Is this VeLO?")
    width, scheduler = _import_scheduler(weights, 18, {"step": "step_size"})
    for name in ("w", "b"):  # a softmax over a bank of one
        weights.take(f"rnn_params/rnn_to_controls/{name}", *((width, 1) if name == "w" else (1,)))
    return {"hidden": hidden, "width": width}, {k: v[0] for k, v in mlp.items()} | scheduler


def _import_celo_adam(weights: Weights) -> Imported:
    width, scheduler = _import_scheduler(weights, 18, {"step": "step_size"})
    return {"width": width}, scheduler


def _import_celo2(weights: Weights) -> Imported:
    hidden, _, mlp = _import_grouped_mlp(weights, outputs=1)
    return {"hidden": hidden}, mlp


def _import_velo(weights: Weights) -> Imported:
    hidden, bank, mlp = _import_grouped_mlp(weights, outputs=2)
    width, scheduler = _import_scheduler(weights, 30, {"step": "step_size", "control": "rnn_to_controls"})
    return {"hidden": hidden, "width": width, "bank": bank}, mlp | scheduler


def _import_layers(weights: Weights, inputs: int, weight: str, bias: str) -> Imported:
    """Layers by number, stored (in, out), or a PyTorch state dict of Linear layers in their order."""
    if weight.format(0) in weights:
        layers: list[tuple[Tensor, Tensor]] = []
        while weight.format(len(layers)) in weights:
            fan_in = layers[-1][0].shape[1] if layers else inputs
            w = weights.take(weight.format(len(layers)), fan_in, None)
            layers.append((w, weights.take(bias.format(len(layers)), w.shape[1])))
    else:
        layers = _import_linears(weights, inputs)
    if len(layers) < 2 or layers[-1][0].shape[1] != 2:
        raise ValueError(f"{weights.where}: expected at least two layers, the last with 2 outputs")
    hidden = {w.shape[1] for w, _ in layers[:-1]}
    if len(hidden) != 1:
        raise ValueError(f"{weights.where}: hidden layers of different widths {sorted(hidden)}")
    tensors: dict[str, Tensor] = {}
    for i, (w, b) in enumerate(layers, start=1):
        tensors |= {f"w{i}": w.mT, f"b{i}": b}
    return {"hidden": hidden.pop(), "hidden_layers": len(layers) - 1}, tensors


def _import_linears(weights: Weights, inputs: int) -> list[tuple[Tensor, Tensor]]:
    names = [name for name in weights.tensors if re.search(r"(^|\.)weight$", name)]
    layers: list[tuple[Tensor, Tensor]] = []
    for name in names or ["weight"]:
        fan_in = layers[-1][0].shape[1] if layers else inputs
        w = weights.take(name, None, fan_in)
        layers.append((w.mT, weights.take(name.removesuffix("weight") + "bias", w.shape[0])))
    return layers


def _import_small_fc(weights: Weights) -> Imported:
    config, tensors = _import_layers(weights, 39, "nn/~/w{}", "nn/~/b{}")
    sizes = {"momentum": ("momentum_decays", 3), "second": ("rms_decays", 1), "factored": ("adafactor_decays", 3)}
    for ours, (theirs, size) in sizes.items():  # ports keep the initial decays and have no offsets
        tensors[f"{ours}_offsets"] = weights.take(theirs, size) if theirs in weights else torch.zeros(size)
    return config, tensors


def _import_mlp(weights: Weights) -> Imported:
    return _import_layers(weights, 19, "mlp/~/linear_{}/w", "mlp/~/linear_{}/b")


IMPORTERS: dict[str, Callable[[Weights], Imported]] = {
    "small_fc": _import_small_fc,
    "mlp": _import_mlp,
    "velo": _import_velo,
    "celo": _import_celo,
    "celo_adam": _import_celo_adam,
    "celo2": _import_celo2,
    "celo2_base": _import_celo2,
}
