"""Few-shot classification of texts by their n-grams, on the tasks that rules are judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from utterance_cases import LANGUAGES, write_texts

from lopt.evaluation.classes.episodes import draw_episodes, draw_tasks
from lopt.evaluation.classes.nearest import classify_by_prototypes, train_prototypes
from lopt.evaluation.intents import ngrams
from lopt.tasks.data.ngrams import list_ngrams
from lopt.tasks.intents import Intents


def make(folder: Path, **options: object) -> Intents:
    small = {"ways": 3, "shots": 2, "queries": 3, "languages": ",".join(LANGUAGES), "buckets": 256, "width": 8}
    return Intents(data=write_texts(folder), **small | options)  # type: ignore[arg-type]


def say(family: Intents, count: int) -> tuple[list[list[str]], list[list[str]]]:
    """The texts of supports and queries, in words."""
    tasks, said = draw_tasks(family, count), family.utterances.texts
    parts: tuple[list[list[str]], list[list[str]]] = ([], [])
    for task in range(count):
        for part, texts in enumerate((tasks["texts"][task, :, :2], tasks["texts"][task, :, 2:])):
            language = said[tasks["languages"][task, part]]
            pairs = zip(tasks["intents"][task], texts, strict=True)
            parts[part].append([language[intent][place] for intent, row in pairs for place in row])
    return parts


def test_products_are_those_of_scikit_learns_tf_idf(tmp_path: Path) -> None:
    family = make(tmp_path)
    products = ngrams.multiply_texts(family, 4)
    said = family.utterances.texts
    everything = [text for own in said for texts in own for text in texts]
    training = [text for own in said for i in family.pools["train"] for text in own[i]]
    known = TfidfVectorizer(analyzer=list_ngrams, sublinear_tf=True).fit(training)
    # One that knows all n-grams, with the frequencies of the training texts.
    whole = TfidfVectorizer(analyzer=list_ngrams, sublinear_tf=True).fit(everything)
    never = np.log(1 + len(training)) + 1
    idf = [known.idf_[known.vocabulary_[g]] if g in known.vocabulary_ else never for g in whole.get_feature_names_out()]
    whole.idf_ = np.array(idf)
    for task, (support, queries) in enumerate(zip(*say(family, 4), strict=True)):
        s, q = whole.transform(support).toarray(), whole.transform(queries).toarray()
        np.testing.assert_allclose(products.own[task], s @ s.T, atol=1e-6)
        np.testing.assert_allclose(products.other[task], q @ s.T, atol=1e-6)


def test_centroids_and_ridge_are_those_of_vectors() -> None:
    generator = np.random.default_rng(0)
    s, q = generator.normal(size=(6, 4)), generator.normal(size=(50, 4))
    classes = np.repeat([0, 1, 2], 2)
    own, other = (torch.from_numpy(x @ s.T).float()[None] for x in (s, q))
    products = ngrams.Products(own, other, torch.from_numpy(classes))
    means = np.stack([s[classes == k].mean(0) for k in range(3)])
    cosines = q @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert ngrams.classify_by_centroids(products)[0].tolist() == cosines.argmax(1).tolist()
    right = Ridge(alpha=0.7).fit(s, np.eye(3)[classes]).predict(q)
    assert ngrams.classify_by_ridge(products, 0.7)[0].tolist() == right.argmax(1).tolist()


def test_in_one_language_words_say_all_and_across_languages_nothing(tmp_path: Path) -> None:
    right = {}
    for across in (False, True):
        family = make(tmp_path, across=across)
        answers = draw_episodes(family, 60).answers
        found = ngrams.classify_by_centroids(ngrams.multiply_texts(family, 60))
        right[across] = float((found == answers).float().mean())
    assert right[False] > 0.95
    assert right[True] == pytest.approx(1 / 3, abs=0.12)


def test_words_of_unseen_intents_are_learned_on_others(tmp_path: Path) -> None:
    """Verbs and nouns of the folder are those of other intents, too."""
    family = make(tmp_path)
    episodes = draw_episodes(family, 100)
    random, trained = (
        float(episodes.score(classify_by_prototypes(train_prototypes(family, steps), episodes)).mean())
        for steps in (1, 400)
    )
    assert random == pytest.approx(1 / 3, abs=0.12)
    assert trained > random + 0.25


def test_the_penalty_is_the_best_on_tasks_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, pools = make(tmp_path, across=False), []
    multiply = ngrams.multiply_texts

    def record(family: Intents, count: int, *, pool: str) -> ngrams.Products:
        pools.append(pool)
        return multiply(family, count, pool=pool)

    monkeypatch.setattr(ngrams, "multiply_texts", record)
    monkeypatch.setattr(ngrams, "PENALTIES", (1e12, 1e-2))
    monkeypatch.setattr(ngrams, "classify_by_ridge", lambda p, x: torch.arange(9) // 3 * (x < 1))
    assert ngrams.tune_ridge(family, 20) == 1e-2
    assert pools == ["outer_valid"]
