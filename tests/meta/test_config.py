"""Configurations: what is refused and in which words, what is completed, and what is built."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

from lopt.evaluation.settings import choose_settings, read_card
from lopt.meta.config.load import list_presets, load_config, parse_config
from lopt.meta.config.overrides import apply_changes, parse_override
from lopt.meta.config.run import RunConfig
from lopt.meta.config.settings import list_settings
from lopt.meta.trainer.meta_weights import freeze_weights

RAW: dict[str, Any] = {
    "name": "tiny",
    "task": {"name": "quadratic", "dim": 3},
    "rule": {"name": "lstm", "hidden": 3},
    "estimator": {"name": "truncated", "num_steps": 3},
}


def build_all(config: RunConfig) -> None:
    config.build_rule()
    for source in config.list_sources():
        source.transform(source.build_task())
        source.build_horizon()
        config.build_estimator(source)


def build_estimator(raw: dict[str, Any]) -> Any:
    config = parse_config(raw)
    return config.build_estimator(config.list_sources()[0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rule.output_scale=abc", "rule.output_scale must be a finite number, got 'abc'"),
        ("rule.output_scale=inf", "rule.output_scale must be a finite number, got inf"),
        ("rule.hidden=true", "rule.hidden must be a whole number, got True"),
        ("rule.name=[1]", r"rule.name must be a string, got \[1\]"),
        ("rule.name=lstn", "rule.name: 'lstn' is unknown. Did you mean lstm"),
        ("rule.hiden=3", "rule.hiden is unknown to 'lstm'. Did you mean hidden"),
        ("rule=3", "rule must be a table"),
        ("task.dim=2.5", "task.dim must be a whole number, got 2.5"),
        ("task.dim=99999999999999999999", "task.dim must be a whole number"),
        ("estimator.num_steps=2.5", "estimator.num_steps must be a whole number"),
        ("estimator.normalize=maybe", "estimator.normalize must be true or false, got 'maybe'"),
        ("estimator.normalize=1", "estimator.normalize must be true or false, got 1"),
        ("estimator.task_chunk=1.5", "estimator.task_chunk must be a whole number"),
        ("estimator.teacher=adam", "estimator.teacher is unknown"),
        ("horizon.steps=2.5", "horizon.steps must be a whole number"),
        ("horizon={name='curriculum', stages=[5, 6.5]}", r"horizon.stages\[1\] must be a whole number, got 6.5"),
        ("horizon={name='curriculum', stages=5}", "horizon.stages must be a list, got 5"),
        ("random_scaling=nan", "random_scaling must be a finite number, got nan"),
        ("random_scaling=-1", "random_scaling must be finite and not negative, got -1"),
        ("trainer.learning_rate=inf", "trainer.learning_rate must be a finite number, got inf"),
        ("trainer.steps=true", "trainer.steps must be a whole number, got True"),
        ("trainer.steps=many", "trainer.steps must be a whole number, got 'many'"),
        ("trainer.stepz=3", "trainer.stepz is unknown. Did you mean steps"),
        ("trainre.steps=3", "trainre is unknown. Did you mean trainer"),
        ("trainer.average=1", "trainer.average must be from 0 to below 1, got 1"),
        ("trainer.patience=-1", "trainer.patience must not be negative, got -1"),
        ("trainer.train_only=w1", "trainer.train_only must be a list, got 'w1'"),
        ("trainer.warm_start=3", "trainer.warm_start must be a string, got 3"),
        ("imitation.steps=-1", "imitation.steps must not be negative, got -1"),
        ("imitation.follow=7", "imitation.follow must be from 0 to 1, got 7"),
        ("imitation.weight=nan", "imitation.weight must be a finite number, got nan"),
        ("imitation.weight=-1", "imitation.weight must be finite and not negative, got -1"),
        ("imitation={teacher='adam', options={lr='x'}}", "imitation.teacher.lr must be a finite number, got 'x'"),
        ("evaluation.seeds=0", "evaluation.seeds must be at least 1, got 0"),
        ("evaluation.steps=[]", r"evaluation.steps must be one or more numbers of at least 1, got \[\]"),
        ("evaluation.steps=[5, 0]", r"evaluation.steps must be one or more numbers of at least 1, got \[5, 0\]"),
        ("evaluation.steps=abc", "evaluation.steps must be a list, got 'abc'"),
        ("evaluation.variants=[3]", r"evaluation.variants\[0\] must be a table"),
        ("trainer.steps=3\ntrainer.tasks=5", "an override looks like"),
    ],
)
def test_bad_settings_are_refused_by_name(override: str, words: str) -> None:
    def build() -> None:
        raw = deepcopy(RAW)
        apply_changes(raw, [parse_override(override)])
        build_all(parse_config(raw))

    with pytest.raises(ValueError, match=words) as caught:
        build()
    assert not re.search("<|generator|object at|Error", str(caught.value))


DIGITS = {"name": "mlp", "width": 20, "depth": 1, "activation": "sigmoid", "batch_size": 128}


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        # A changed name is another entry, to which the options of the one before do not belong.
        (["rule.name=velo"], "rule", {"name": "velo"}),
        (["rule=velo"], "rule", {"name": "velo"}),
        (["rule={name='velo', width=4}"], "rule", {"name": "velo", "width": 4}),
        (["rule={name='rnnprop'}"], "rule", {"name": "rnnprop"}),
        (["rule=rnnprop"], "rule", {"name": "rnnprop"}),
        (["rule.name=rnnprop"], "rule", {"name": "rnnprop", "hidden": 20}),
        (["task.name=conv"], "task", {"name": "conv"}),
        (["estimator=pes"], "estimator", {"name": "pes"}),
        (["estimator.name=pes", "estimator.sigma=0.1"], "estimator", {"name": "pes", "sigma": 0.1}),
        (["horizon.name=log_uniform"], "horizon", {"name": "log_uniform"}),
        (["horizon.name=constant"], "horizon", {"name": "constant", "steps": 100}),
        (["horizon={steps=7}"], "horizon", {"name": "constant", "steps": 7}),
        # Nothing that was typed is lost, in whatever order.
        (["rule.width=4", "rule.name=velo"], "rule", {"name": "velo", "width": 4}),
        (["rule.width=4", "rule=velo", "rule.width=5"], "rule", {"name": "velo", "width": 5}),
        (["rule=celo", "rule.name=velo"], "rule", {"name": "velo"}),
        (["rule.name=velo", "rule=celo"], "rule", {"name": "celo"}),
        # An option of the task by its own name.
        (["width=40"], "task", DIGITS | {"width": 40}),
        (["task.width=40"], "task", DIGITS | {"width": 40}),
        (["cell='gru'", "task=char_rnn"], "task", {"name": "char_rnn", "cell": "gru"}),
        (["task.width={choose=[8, 16]}"], "task", DIGITS | {"width": {"choose": [8, 16]}}),
    ],
)
def test_overrides_mean_what_their_grammar_says(overrides: list[str], section: str, expected: dict[str, Any]) -> None:
    assert getattr(load_config("digits-lstm", overrides), section) == expected


@pytest.mark.parametrize("overrides", [["width=40"], ["task.width=40"], ["task.name=conv"], ["width=40", "depth=2"]])
def test_overrides_of_a_task_mean_the_same_where_it_is_trained_on_and_judged(overrides: list[str]) -> None:
    trained = load_config("digits-lstm", overrides).list_sources()[0].build_task()
    card = read_card({"config": load_config("digits-lstm").to_dict()})
    (setting,) = choose_settings(card, overrides=overrides, steps=[5])
    assert setting.family.describe() == trained.describe()


def test_a_change_of_the_teacher_drops_its_options() -> None:
    raw = {"imitation": {"teacher": "adam", "options": {"lr": 1.0}, "weight": 2.0}}
    apply_changes(raw, [parse_override("imitation.teacher=lstm")])
    assert raw == {"imitation": {"teacher": "lstm", "weight": 2.0}}


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("mixture", ["task.width=3"], r"task.width has no effect: every \[\[source\]\] has 'task' of its own"),
        ("mixture", ["width=3"], "task.width has no effect"),
        ("mixture", ["task.nonsense=7"], "task.nonsense has no effect"),
        ("mixture", ["source=[{task={name='conv'}, tasks=2}]", "trainer.tasks=3"], "trainer.tasks has no effect"),
        ("mixture", ["source=[{task={name='conv'}, weight=2}]"], "source.weight has no effect: there is one source"),
        ("digits-lstm", ["trainer.capture=true"], "trainer.capture .*has no effect on the CPU"),
        ("digits-lstm", ["trainer.capture=true", "trainer.device=cuda"], "trainer.capture has no effect: .*evolution"),
        ("digits-lstm", ["estimator=full"], "horizon.* has no effect: the estimator runs every task for its num_steps"),
        ("digits-lstm", ["imitation.weight=3"], "imitation.weight has no effect: no teacher"),
        ("digits-lstm", ["estimator=pes", "trainer.memory_mib=9"], "trainer.memory_mib has no effect"),
        ("digits-lstm", ["estimator.task_chunk=1", "trainer.memory_mib=9"], "trainer.memory_mib has no effect"),
        ("digits-lstm", ["trainer.merge=pcgrad"], "trainer.merge has no effect: there is one source"),
        ("digits-lstm", ["estimator.objective=log", "estimator.normalize=true"], "normalize has no effect on obj"),
        ("digits-lstm", ["widht=3"], "widht is unknown: neither a setting of a run nor an option of task 'mlp'. Did"),
        ("digits-lstm", ["rule.name.x=3"], "rule.name.x: rule.name is no table"),
    ],
)
def test_settings_without_effect_are_refused(preset: str, overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config(preset, overrides)


def test_judging_refuses_settings_that_are_no_options_of_a_task() -> None:
    card = read_card({"config": load_config("digits-lstm").to_dict()})
    for override in ("trainer.steps=3", "name=x", "horizon=3"):
        with pytest.raises(ValueError, match="judging reads the options of a task alone"):
            choose_settings(card, overrides=[override], steps=[5])


@pytest.mark.parametrize("missing", RAW)
def test_a_missing_section_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        parse_config({key: value for key, value in RAW.items() if key != missing})


@pytest.mark.parametrize("raw", [None, [], 3, "x"])
def test_what_is_no_configuration_is_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match="must be a table"):
        parse_config(raw)


def test_whole_numbers_pass_as_floats_and_lists_as_tuples() -> None:
    config = load_config("demo", ["trainer.clip=2"])
    assert type(config.trainer.clip) is float
    rule = parse_config(RAW | {"rule": {"name": "linear", "lr": 1, "decays": [0, 0.5]}}).build_rule()
    assert rule.config == {"decays": [0.0, 0.5], "second_decay": 0.99, "lr": 1.0}


@pytest.mark.parametrize("horizon", [{}, {"steps": 50}])
def test_a_horizon_without_a_name_is_constant(horizon: dict[str, int]) -> None:
    config = parse_config(RAW | {"horizon": horizon})
    assert config.horizon == {"name": "constant"} | horizon
    build_all(config)


def test_plain_data_and_back_is_the_same_configuration() -> None:
    config = load_config("digits-lstm", ["estimator.task_chunk=2", "imitation.teacher=adam"])
    assert parse_config(config.to_dict()) == config
    build_all(config)


def test_the_teacher_and_its_settings_reach_the_estimator() -> None:
    imitation = {"teacher": "adam", "options": {"lr": 1}, "weight": 2, "follow": 0.25}
    estimator = build_estimator(RAW | {"imitation": imitation})
    assert (estimator.teacher.config["lr"], estimator.imitation, estimator.follow) == (1.0, 2.0, 0.25)


@pytest.mark.parametrize(
    "card",
    [3, {"results": "good"}, {"results": [{"setting": "x"}]}, {"config": 3}, {"config": {}}, {"name": ["x"]}],
)
def test_a_card_that_lopt_did_not_write_is_refused(card: Any) -> None:
    with pytest.raises(ValueError, match=r"card\b"):
        read_card(card)


def test_a_card_may_say_more_and_less_than_lopt_reads() -> None:
    assert read_card({}).name == ""
    card = read_card({"name": "mine", "licence": 3, "config": RAW})
    assert card.config is not None
    assert (card.name, card.config.task) == ("mine", RAW["task"])


def test_options_that_json_cannot_hold_are_no_options() -> None:
    with pytest.raises(ValueError, match=r"task.data is unknown to 'module'. Known: batch_size"):
        parse_config(RAW | {"task": {"name": "module", "data": "x"}}).list_sources()[0].build_task()
    with pytest.raises(ValueError, match=r"task: module: .*build"):
        parse_config(RAW | {"task": {"name": "module"}}).list_sources()[0].build_task()


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_can_be_built_and_judged(preset: str) -> None:
    config = load_config(preset)
    try:
        build_all(config)
    except ImportError as error:  # its data come with a package that is not installed
        pytest.skip(str(error))
    assert config.description
    assert list_settings(config)
    freeze_weights(config.build_rule(), config.trainer.train_only)
