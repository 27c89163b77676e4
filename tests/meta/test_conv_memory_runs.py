"""The preset `conv-memory`: attention over the last gradients, learned on convnets of two widths."""

from __future__ import annotations

from pathlib import Path

from training_cases import check_resume

from lopt.meta.config.load import load_config


def test_it_resumes_bitwise(tmp_path: Path) -> None:
    small = ["horizon.low=3", "horizon.high=5", "trainer.tasks=2", "trainer.steps=4", "trainer.validation_tasks=1"]
    rare = ["trainer.validation_steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=2"]
    check_resume(load_config("conv-memory", [*small, *rare]), tmp_path, stop=3, resumes=2)


def test_held_out_widths_are_not_trained_on() -> None:
    widths = {source.task["width"] for source in load_config("conv-memory", []).list_sources()}
    assert widths == {6, 10}
