"""What is said to machines: templates, texts by language and intent, n-grams, and tasks across languages."""

from __future__ import annotations

import json
import random
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from task_cases import draw_tasks
from torch.func import vmap
from utterance_cases import INTENTS, LANGUAGES, needs_home_assistant, write_texts

from lopt.core.random import derive_seeds
from lopt.tasks import POOLS
from lopt.tasks.data import wheels
from lopt.tasks.data.ngrams import count_ngrams, list_ngrams, weigh_counts
from lopt.tasks.data.templates import Grammar, parse_template
from lopt.tasks.data.utterances import FEWEST, TEXTS, load_utterances
from lopt.tasks.intents import Intents

SEEDS = derive_seeds(0, "intents of tests", torch.arange(60))
ALL = ",".join(LANGUAGES)


def make(folder: Path, **options: object) -> Intents:
    small = {"ways": 3, "shots": 2, "queries": 3, "languages": ALL, "buckets": 64, "width": 4}
    return Intents(data=write_texts(folder), **small | options)  # type: ignore[arg-type]


# -- templates ---------------------------------------------------------------------------------------------------------

GRAMMAR = Grammar(
    {"the": "(the|my)", "lamp": "<the> lamp[s]", "round": "<round>"},
    {"colour": {"values": [{"in": "[dark ]red"}, "blue"]}, "level": {"range": {"from": 1, "to": 9, "step": 4}}},
    lambda generator: "Zork",
)


def draw(template: str, count: int = 300) -> set[str]:
    generator = random.Random(0)
    return {GRAMMAR.draw(template, generator) for _ in range(count)}


@pytest.mark.parametrize(
    ("template", "sentences"),
    [
        ("turn (on|off)  It", {"turn on it", "turn off it"}),
        ("lamp[s] [now]", {"lamp", "lamps", "lamp now", "lamps now"}),
        ("<lamp> on", {f"{a} lamp{b} on" for a, b in product(("the", "my"), ("", "s"))}),
        ("{colour:paint}", {"dark red", "red", "blue"}),
        ("to {level}", {"to 1", "to 5", "to 9"}),
        ("call {name}", {"call zork"}),
        ("(a;b;c) d", {" ".join(order) + " d" for order in permutations("abc")}),
        ("[(a|b[(c|d)])]", {"", "a", "b", "bc", "bd"}),
        (r"\[a\]", {"[a]"}),
    ],
)
def test_all_sentences_of_a_template_are_drawn_and_no_others(template: str, sentences: set[str]) -> None:
    assert draw(template) == sentences


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("turn (on|off", r"lacks a \)"),
        ("[a", r"lacks a \]"),
        ("<the", "does not close <"),
        ("<missing> a", "has no rule <missing>"),
        ("<round>", "one of them names itself"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(template, 1)


def test_a_template_is_parsed_into_letters_groups_and_names() -> None:
    kinds = [(part.kind, part.name, len(part.options)) for part in parse_template("a(b|c)<d>{e:f}")]
    assert kinds == [("text", "a", 0), ("(", "", 2), ("rule", "d", 0), ("list", "e", 0)]


@needs_home_assistant
def test_drawn_texts_are_those_that_the_templates_own_library_understands() -> None:
    hassil = pytest.importorskip("hassil", reason="the library of the templates: pip install hassil")
    path = wheels.find_folder("home_assistant_intents", "language") / "data" / "nl.json"
    content = json.loads(path.read_text("utf-8"))
    for blocks in content["intents"].values():
        for block in blocks["data"]:
            block.pop("requires_context", None)  # of the room that one is in, which a text does not say
    open_lists = {name: hassil.WildcardSlotList(name) for name in ("area", "floor", "name")}
    found = load_utterances("home-assistant", "nl,en")
    for intent in ("HassMediaNext", "HassStartTimer", "HassShoppingListAddItem", "HassSetPosition"):
        one = hassil.Intents.from_dict(content | {"intents": {intent: content["intents"][intent]}})
        for text in found.texts[0][found.intents.index(intent)][:5]:
            assert hassil.recognize(text, one, slot_lists=open_lists) is not None, text


# -- texts -------------------------------------------------------------------------------------------------------------


@needs_home_assistant
def test_six_languages_say_the_same_intents_each_in_its_words() -> None:
    found = load_utterances("home-assistant", "en,de,nl,fr,es,it")
    assert [len(found.pools[pool]) for pool in POOLS] == pytest.approx([18, 6, 9], abs=3)
    assert len(set(found.intents)) == len(found.intents) == sum(map(len, found.pools.values()))
    for own in found.texts:
        assert all(FEWEST <= len(set(texts)) == len(texts) <= TEXTS for texts in own)
    pause = found.intents.index("HassMediaPause")
    assert any("pause" in text for text in found.texts[0][pause])
    assert any("pausier" in text or "stopp" in text for text in found.texts[1][pause])
    load_utterances.cache_clear()
    assert load_utterances("home-assistant", "en,de,nl,fr,es,it") == found
    with pytest.raises(ValueError, match="no language 'xx'; it has af, ar,"):
        load_utterances("home-assistant", "en,xx")


def test_a_folder_of_texts_is_read(tmp_path: Path) -> None:
    found = load_utterances(write_texts(tmp_path), ALL)
    assert found.languages == LANGUAGES
    assert sorted(found.intents) == [f"intent{i:02}" for i in range(INTENTS)]
    assert [len(found.pools[pool]) for pool in POOLS] == [10, 4, 6]
    assert [i for numbers in found.pools.values() for i in numbers] == list(range(INTENTS))
    first = (tmp_path / "two" / f"{found.intents[3]}.txt").read_text().splitlines()
    assert list(found.texts[1][3]) == first


def test_intents_that_a_language_lacks_are_left_out(tmp_path: Path) -> None:
    data = write_texts(tmp_path)
    (tmp_path / "two" / "intent07.txt").unlink()
    (tmp_path / "one" / "intent03.txt").write_text("the same\n" * 30)
    assert not {"intent03", "intent07"} & set(load_utterances(data, ALL).intents)
    assert "intent07" in load_utterances(data, "one,three").intents


def test_what_is_wrong_with_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data must be one of home-assistant, texts:FOLDER, got 'banking77'"):
        load_utterances("banking77", "en")
    with pytest.raises(ValueError, match="languages must be different names"):
        load_utterances("home-assistant", "en,en")
    with pytest.raises(FileNotFoundError, match=r"has no files INTENT\.txt"):
        load_utterances(f"texts:{tmp_path}", "en")
    write_texts(tmp_path, texts=FEWEST - 1)
    with pytest.raises(ValueError, match="has 0 intents with 20 texts in each of one,two"):
        load_utterances(f"texts:{tmp_path}", "one,two")
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"home_assistant_intents, .* is not installed: pip install .*\[language\]"):
        load_utterances("home-assistant", "en,de,nl")


# -- n-grams -----------------------------------------------------------------------------------------------------------


def test_ngrams_are_words_and_groups_of_letters_within_their_borders() -> None:
    assert list_ngrams("on it") == ["=<on>", "<on", "on>", "<on>", "=<it>", "<it", "it>", "<it>"]


def test_texts_are_unit_vectors_of_logarithms_of_counts() -> None:
    counts = count_ngrams(["on on", "off"], 10_000)
    assert counts.dtype == torch.uint8
    assert sorted(counts[0][counts[0] > 0].tolist()) == [2, 2, 2, 2]
    x = weigh_counts(counts)
    np.testing.assert_allclose(x.norm(dim=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weigh_counts(torch.tensor([[3, 0, 1]])), [[2 / 5**0.5, 0, 1 / 5**0.5]], rtol=1e-6)
    few = count_ngrams(["on on"], 3)
    assert int(few.sum()) == 8


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("across", [True, False])
def test_queries_are_other_texts_of_the_same_intents_and_in_another_language_if_asked(
    across: bool, tmp_path: Path
) -> None:
    family = make(tmp_path, across=across)
    tasks = family.sample_all(SEEDS, "test")
    assert ((tasks["languages"][:, 0] != tasks["languages"][:, 1]) == across).all()
    assert set(tasks["languages"].flatten().tolist()) == {0, 1, 2}
    assert all(len(set(row)) == 3 for row in tasks["intents"].tolist())
    assert across or all(len(set(row)) == 5 for row in tasks["texts"].flatten(0, 1).tolist())
    assert int(tasks["texts"].max()) < 24
    for split, part, texts in (("train", 0, slice(2)), ("inner_valid", 1, slice(2, None))):
        batch = family.batch(tasks, SEEDS, split)
        for task in (0, 7):
            language, places = tasks["languages"][task, part], tasks["texts"][task, :, texts]
            said = [
                family.utterances.texts[language][intent][place]
                for intent, row in zip(tasks["intents"][task], places, strict=True)
                for place in row
            ]
            torch.testing.assert_close(batch["x"][task], weigh_counts(count_ngrams(said, 64)))
            assert batch["y"][task].tolist() == [k for k in range(3) for _ in range(places.shape[1])]


def test_examples_of_a_class_are_its_texts_in_all_languages(tmp_path: Path) -> None:
    family = make(tmp_path)
    shares = (torch.arange(72) + 0.5) / 72  # three languages of 24 texts
    x = family.pick_examples(torch.full((72,), 4), shares)
    assert torch.equal(x, weigh_counts(family.counts[:, 4, :24]).flatten(0, 1))


def test_losses_of_many_tasks_are_those_of_each(tmp_path: Path) -> None:
    family = make(tmp_path)
    _, params, batch = draw_tasks(family, 4)
    torch.testing.assert_close(family.losses(params, batch), vmap(family.loss)(params, batch), rtol=1e-5, atol=1e-6)
    told = {k: torch.zeros_like(p[0]) for k, p in params.items()} | {"head.bias": torch.tensor([9.0, 0.0, 0.0])}
    accuracy = family.metrics(told, {k: b[0] for k, b in batch.items()})["accuracy"]
    assert float(accuracy) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ways": 1}, "ways, buckets and width must be at least 2.*ways=1"),
        ({"shots": 15, "queries": 6}, "at most 20 together.*shots=15, queries=6"),
        ({"ways": 5}, "4 intents for outer_valid, fewer than ways=5"),
        ({"languages": "one"}, "across=True takes two languages"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **options)
