"""Meta-training on molecules: the preset runs, resumes, and learns which inputs say something."""

from __future__ import annotations

from pathlib import Path

import pytest
from molecule_cases import needs_molecules, write_smiles
from training_cases import check_resume

from lopt.meta.config.load import load_config


@needs_molecules
def test_a_run_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "cache"))
    sizes = ["task.shots=4", "task.queries=5", "trainer.steps=4", "trainer.tasks=2", "trainer.validate_every=2"]
    few = ["trainer.validation_tasks=3", "trainer.checkpoint_every=2", "estimator.num_steps=3"]
    config = load_config("molecule-anil", [*sizes, *few, f"task.data={write_smiles(tmp_path)}"])
    check_resume(config, tmp_path, stop=3, resumes=2)
