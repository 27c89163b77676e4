"""The JSON schema of presets says what the configuration itself accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lopt.core.documents import parse_toml, read_toml
from lopt.meta.config.json_schema import describe_presets, read_descriptions
from lopt.meta.config.load import PRESETS
from lopt.meta.config.trainer import TrainerConfig
from lopt.rules import RULES

jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = describe_presets()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_preset_fits(validator: Any, path: Path) -> None:
    assert [error.message for error in validator.iter_errors(read_toml(path))] == []


FITTING = """
rule = { name = "lstm", hidden = 8 }
task = { name = "mlp", width = { low = 8, high = 64, log = true }, depth = { choose = [1, 2] } }
estimator = { name = "pes", num_steps = 20 }
horizon = { low = 20, high = 200, name = "log_uniform" }
loggers = [{ name = "wandb", project = "mine" }]
[[source]]
estimator = { num_steps = 10 }
transforms = [{ name = "random_scaling", level = "tensor" }]
[trainer]
learning_rate = 1
learning_rates = { "w*" = 0.1 }
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("hidden", "hiden"),
        ('"lstm"', '"lsmt"'),
        ("hidden = 8", "hidden = 8.5"),
        ("hidden = 8", "hidden = true"),
        ("[trainer]", "[trainr]"),
        ("learning_rate = 1", 'learning_rate = "1"'),
        ('"w*" = 0.1', '"w*" = "x"'),
        ("low = 8, high = 64", "low = 8"),
        ("project", "projekt"),
        ('level = "tensor"', "level = 3"),
        ("num_steps = 10", "num_stps = 10"),
        ('rule = { name = "lstm", hidden = 8 }', ""),
        ('name = "pes", ', ""),
        (', name = "log_uniform"', ""),
    ],
)
def test_what_a_user_mistypes_does_not_fit(validator: Any, old: str, new: str) -> None:
    assert old in FITTING
    errors = list(validator.iter_errors(parse_toml(FITTING.replace(old, new, 1))))
    assert bool(errors) == (old != "" and "log_uniform" not in old)  # without a name low and high are of some horizon


def test_descriptions_are_those_of_the_docstrings() -> None:
    texts = read_descriptions(TrainerConfig)
    assert set(TrainerConfig.__dataclass_fields__) - set(texts) <= {"warmup", "final_learning_rate"}  # told elsewhere
    assert texts["steps"] == "outer steps."
    assert texts["validation_tasks"] == texts["validation_steps"] == "held-out tasks of each family, and their length."
    schema = describe_presets()
    clip = schema["properties"]["trainer"]["properties"]["clip"]
    assert clip == {"description": "largest global norm of the meta-gradient.", "type": "number"}
    named = {entry["properties"]["name"]["const"] for entry in schema["properties"]["rule"]["anyOf"]}
    assert named == set(RULES)


def test_the_command_prints_it(run: Any) -> None:
    assert json.loads(run("schema").out) == json.loads(json.dumps(describe_presets()))
