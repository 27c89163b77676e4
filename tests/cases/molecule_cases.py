"""A small file of molecules, and what tests of them need."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

GROUPS = ("O", "N", "Cl", "F", "C(=O)O", "c1ccccc1", "C#N", "OC", "C(=O)N", "S")

needs_molecules = pytest.mark.skipif(
    find_spec("rdkit") is None or find_spec("datamol") is None, reason="rdkit or datamol is not installed"
)


def write_smiles(folder: Path) -> str:
    """What the option `data` is to be for 100 chains of 1 to 10 carbon atoms with a group at the end."""
    file = folder / "molecules.smi"
    file.write_text("".join(f"{'C' * (k + 1)}{group} {i}\n" for i, group in enumerate(GROUPS) for k in range(10)))
    return f"smiles:{file}"
