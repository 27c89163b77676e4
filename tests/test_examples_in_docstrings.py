"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "lopt", ROOT / "kernels" / "lopt_kernels")


def find_examples() -> dict[str, doctest.DocTest]:
    """Every docstring with a `>>>`, by the full name of what it is about; imports only the modules that have one."""
    finder, examples = doctest.DocTestFinder(), {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            if ">>>" in path.read_text():
                name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
                examples |= {test.name: test for test in finder.find(import_module(name)) if test.examples}
    return examples


EXAMPLES = find_examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_gives_what_it_shows(name: str) -> None:
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(EXAMPLES[name], out=report.append)
    assert not report, "".join(report)


BASES = [
    "lopt.meta.estimators.base.Estimator",
    "lopt.rules.base.Rule",
    "lopt.rules.building_blocks.elementwise.ElementwiseRule",
    "lopt.rules.building_blocks.tensor_rule.TensorRule",
    "lopt.tasks.base.TaskFamily",
]


@pytest.mark.parametrize("name", BASES)
def test_every_registry_has_an_example_on_its_base_class(name: str) -> None:
    assert name in EXAMPLES
