"""Substances with measured properties: what is read of tables, and how tasks are drawn of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from molecule_cases import needs_molecules

from lopt.core.random import derive_seeds, make_generator
from lopt.tasks import substance
from lopt.tasks.data import substances
from lopt.tasks.data.substances import PROPERTIES, Substances, load_substances, scale_values
from lopt.tasks.substance import Substance, embed

COUNT, INPUTS = 400, 20
SEEDS = derive_seeds(0, "substances", torch.arange(200))


def fake(known: np.ndarray) -> Substances:
    """Substances of drawn numbers, of which some properties are known, bool `[COUNT, properties]`."""
    rng = np.random.default_rng(0)
    values = np.where(known, rng.standard_normal(known.shape), np.nan)
    return Substances(rng.standard_normal((COUNT, INPUTS)), rng.random((COUNT, 30)) < 0.5, values)


@pytest.fixture
def one_property(monkeypatch: pytest.MonkeyPatch) -> Substance:
    """Only the third is known, of all substances."""
    known = np.zeros((COUNT, len(PROPERTIES)), bool)
    known[:, 2] = True
    monkeypatch.setattr(substance, "load_substances", lambda: fake(known))
    return Substance(shots=4, queries=6, noise=0.0)


@pytest.fixture
def all_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substance, "load_substances", lambda: fake(np.ones((COUNT, len(PROPERTIES)), bool)))


def write_table(file: Path, rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(rows) + "\n"
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


@needs_molecules
def test_tables_are_joined_by_number_without_what_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dodecane; methanol, which is of freesolv; sodium acetate; 2-chlorooctane with and without stereochemistry.
    names = {"112-40-3": "C" * 12, "67-56-1": "CO", "127-09-3": "CC(=O)[O-].[Na+]", "628-61-5": "CCCCCC[C@H](C)Cl"}
    lines = [f"1\t{number}\tformula\t1.0\t{smiles}\tthe rest\tof it" for number, smiles in names.items()]
    for size in ("large", "small"):
        write_table(tmp_path / f"Identifiers/chemical identifiers pubchem {size}.tsv", lines)
    write_table(tmp_path / "a.csv.gz", ["CAS,a", "112-40-3,1.5", "67-56-1,2", "628-61-5,3", "127-09-3,4", "1-1-1,5"])
    write_table(
        tmp_path / "b.tsv",
        ["CAS\tName\tb", "112403\tdodecane\t-7", "67561\tmethanol\t8", "628615\tx\t", "127093\ty\t9"],
    )
    monkeypatch.setattr(substances, "PROPERTIES", {"a": ("a.csv.gz", "a"), "b": ("b.tsv", "b")})
    monkeypatch.setattr(substances, "find_folder", lambda *args: tmp_path)
    monkeypatch.setattr(substances, "scale_values", lambda table: table)
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "cache"))
    found = load_substances.__wrapped__()
    assert found.values.tolist() == [[1.5, -7.0]]  # dodecane alone has both, and is judged nowhere
    assert found.descriptors.shape[0] == found.fingerprints.shape[0] == 1


@needs_molecules
def test_molecules_are_told_without_stereochemistry() -> None:
    assert substances._flatten("CCCCCC[C@H](C)Cl") == substances._flatten("ClC(C)CCCCCC") != ""
    assert [substances._flatten(x) for x in ("C", "[Na+].[Cl-]", "O=C=O.O", "C[Si](C)(C)C", "C" * 41)] == [""] * 5


def test_values_are_scaled_where_they_are_known() -> None:
    table = np.exp(np.random.default_rng(0).standard_normal((300, len(PROPERTIES))))
    table[::3, 0] = np.nan
    table[0, 1] = 1e9
    found = scale_values(table)
    assert np.isnan(found[::3, 0]).all()
    np.testing.assert_allclose(np.nanmean(found, 0), 0, atol=1e-9)
    np.testing.assert_allclose(np.nanstd(found, 0), 1, rtol=1e-9)
    assert found[0, 1] < 10  # bounded before, where it would be the only one to count
    ordered = list(PROPERTIES).index("Pc")
    logarithm = np.log(table[:, ordered]).clip(*np.quantile(np.log(table[:, ordered]), substances.ENDS))
    np.testing.assert_allclose(found[:, ordered], (logarithm - logarithm.mean()) / logarithm.std(), rtol=1e-9)


def test_labels_are_a_property_of_molecules_of_the_pool(one_property: Substance) -> None:
    for pool, numbers in one_property.pools.items():
        tasks = one_property.sample_all(SEEDS, pool)
        assert set(tasks["molecules"].flatten().tolist()) <= set(numbers)
        assert all(len(set(row)) == 10 for row in tasks["molecules"].tolist())
        values = one_property.values[tasks["molecules"], 2]
        weight = (tasks["labels"] * values).sum(1, keepdim=True) / values.square().sum(1, keepdim=True)
        torch.testing.assert_close(tasks["labels"], weight * values)
        # Of one property alone, with either sign; a sum has it more than once.
        assert 0.4 < float(((weight.abs() - 1).abs() < 1e-5).float().mean()) < 0.6


def test_half_of_the_tasks_are_of_molecules_that_are_alike(one_property: Substance) -> None:
    # All descriptors are the same: where molecules are alike, they are along it.
    one_property.inputs = one_property.inputs[:, :1].expand(-1, INPUTS)
    one_property.drawn_from = one_property.inputs.double()
    spread = one_property.inputs[one_property.sample_all(SEEDS)["molecules"], 0].std(1)
    assert 0.2 < float((spread < 0.5).float().mean()) < 0.6
    assert 0.4 < float((spread > 0.7).float().mean()) < 0.8


def test_tasks_are_drawn_on_the_cpu_wherever_the_inputs_are(one_property: Substance) -> None:
    expected = one_property.sample_all(SEEDS)
    one_property.to("meta")
    found = one_property.sample_all(SEEDS)
    assert one_property.inputs.device.type == "meta"
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_sums_are_of_properties_that_all_molecules_have(monkeypatch: pytest.MonkeyPatch) -> None:
    known = np.zeros((COUNT, len(PROPERTIES)), bool)
    known[: COUNT // 2, 0] = known[COUNT // 2 :, 1] = True  # none has both
    monkeypatch.setattr(substance, "load_substances", lambda: fake(known))
    family = Substance(shots=4, queries=6, noise=0.0)
    tasks = family.sample_all(SEEDS)
    by_property = family.known[tasks["molecules"]]
    assert (by_property[..., 0].all(1) | by_property[..., 1].all(1)).all()
    alone = family.values[tasks["molecules"]].sum(2)
    weight = (tasks["labels"] * alone).sum(1, keepdim=True) / alone.square().sum(1, keepdim=True)
    torch.testing.assert_close(tasks["labels"], weight * alone)


@pytest.mark.usefixtures("all_properties")
def test_half_of_the_tasks_are_sums() -> None:
    family = Substance(shots=4, queries=6, noise=0.0)
    tasks = family.sample_all(SEEDS)
    by_property = family.values[tasks["molecules"]].abs()
    alone = (by_property - tasks["labels"].abs()[..., None]).abs().amax(1).amin(1) < 1e-5
    assert 0.4 < float(alone.float().mean()) < 0.65  # some sums are of the same property twice


@pytest.mark.usefixtures("all_properties")
def test_unseen_properties_are_for_the_other_pools_alone() -> None:
    family = Substance(shots=4, queries=6, unseen=["logP", "RI"])
    names = {pool: {list(PROPERTIES)[i] for i in found.tolist()} for pool, found in family.properties.items()}
    assert names["outer_valid"] == names["test"] == {"logP", "RI"}
    assert names["train"] == set(PROPERTIES) - {"logP", "RI"}


def test_labels_are_standardised_by_those_that_are_known(one_property: Substance) -> None:
    tasks = one_property.sample_all(SEEDS[:5])
    known, asked = (one_property.batch(tasks, SEEDS[:5], split) for split in ("train", "inner_valid"))
    labels = tasks["labels"].double().numpy()
    mean, std = labels[:, :4].mean(1, keepdims=True), labels[:, :4].std(1, ddof=1, keepdims=True)
    told = torch.cat([known["y"], asked["y"]], 1)
    np.testing.assert_allclose(told, (labels - mean) / (std + 0.1), rtol=1e-4, atol=1e-5)
    assert torch.equal(asked["x"], one_property.inputs[tasks["molecules"][:, 4:]])


def test_a_layer_and_a_linear_head(one_property: Substance) -> None:
    params = one_property.init({}, make_generator(0))
    assert {k: list(p.shape) for k, p in params.items()} == {
        "hidden.weight": [128, INPUTS],
        "hidden.bias": [128],
        "features.weight": [64, 128],
        "features.bias": [64],
        "head.weight": [64],
        "head.bias": [],
    }
    x = one_property.inputs[:3]
    w = {k: p.double().numpy() for k, p in params.items()}
    before = x.double().numpy() @ w["hidden.weight"].T + w["hidden.bias"]
    hidden = before / (1 + np.exp(-before))
    features = (hidden @ w["features.weight"].T + w["features.bias"]) / 8
    np.testing.assert_allclose(embed(params, x), features, rtol=1e-4, atol=1e-6)
    params["head.weight"] += 1
    params["head.bias"] += 0.5
    np.testing.assert_allclose(one_property.predict(params, x), features.sum(1) + 0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("all_properties")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": 1}, "shots must be at least 2.*shots=1"),
        ({"unseen": ["density"]}, "unseen must be one of .*logP.*density"),
        ({"queries": 300}, "has no property with shots \\+ queries = 316"),
        ({"unseen": list(PROPERTIES)}, "the pool train has no property"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Substance(**options)  # type: ignore[arg-type]
