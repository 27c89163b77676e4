"""DDP, FSDP2, DTensor, ZeroRedundancyOptimizer and distributed checkpoints, in real gloo processes.

The checks are in `distributed_replicas`, `distributed_shards` and `distributed_files`, one function per property; each
runs for AdamW, as a control of the check itself, where AdamW promises the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from distributed_workers import import_checks, run_checks

CHECKS = import_checks()

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="gloo is not available")


@pytest.fixture(scope="module")
def find_problem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What went wrong in a check; the first call runs all those that are asked for, in one go."""
    asked = [
        item.callspec.params["name"]  # type: ignore[attr-defined]
        for item in request.session.items
        if item.path == request.path and not item.get_closest_marker("skip")
    ]
    problems: dict[str, str] = {}

    def find(name: str) -> str:
        if not problems:
            problems.update(run_checks(asked, tmp_path_factory.mktemp("worlds")))
        return problems[name]

    return find


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if c.slow else []) for name, c in CHECKS.items()]
)
def test_in_real_processes(name: str, find_problem: Callable[[str], str]) -> None:
    problem = find_problem(name)
    assert not problem, problem
