"""Classes of texts by their n-grams: nearest centroid and ridge regression on tf-idf, with no bucket shared.

Source: Salton & Buckley 1988, Information Processing & Management 24(5) (tf-idf).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.evaluation.classes.episodes import draw_tasks
from lopt.tasks.data.ngrams import list_ngrams
from lopt.tasks.intents import Intents

PENALTIES = tuple(10.0**k for k in range(-4, 3))
"""Of ridge regression, to choose from; texts are vectors of length 1."""

FEATURES = 2**20
"""Buckets of n-grams, so many that hardly two share one."""


class Products(NamedTuple):
    """Of the texts of T tasks.

    Attributes:
        own: of the support with itself, float32 `[T, n, n]`.
        other: of queries with the support, `[T, m, n]`.
        classes: of the support, int64 `[n]`.
    """

    own: Tensor
    other: Tensor
    classes: Tensor


def multiply_texts(family: Intents, count: int, *, seed: int = 0, pool: str = "test") -> Products:
    """Scalar products of tf-idf vectors of length 1, whose document frequencies are those of the texts for training.

    Args:
        family, count, seed, pool: of the tasks, as in `draw_tasks`.
    """
    rows = _weigh_texts(family)
    tasks = draw_tasks(family, count, seed=seed, pool=pool)
    texts, (known, asked) = tasks["texts"], tasks["languages"].T
    # Numbers of rows: all texts of a language, intent by intent.
    ends = family.numbers.flatten().cumsum(0)
    starts = (ends - family.numbers.flatten()).view_as(family.numbers)
    support = starts[known[:, None], tasks["intents"]][..., None] + texts[..., : family.shots]
    queries = starts[asked[:, None], tasks["intents"]][..., None] + texts[..., family.shots :]
    own, other = [], []
    for s, q in zip(support.flatten(1).tolist(), queries.flatten(1).tolist(), strict=True):
        vectors = rows[s]
        own.append(torch.from_numpy((vectors @ vectors.T).toarray()))
        other.append(torch.from_numpy((rows[q] @ vectors.T).toarray()))
    classes = torch.arange(family.ways).repeat_interleave(family.shots)
    return Products(torch.stack(own).float(), torch.stack(other).float(), classes)


def _weigh_texts(family: Intents) -> Any:
    """Sparse vectors of all texts, language by language and intent by intent."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    said = family.utterances.texts
    counts = HashingVectorizer(analyzer=list_ngrams, n_features=FEATURES, norm=None, alternate_sign=False)
    training = [text for own in said for i in family.pools["train"] for text in own[i]]
    weights = TfidfTransformer(sublinear_tf=True).fit(counts.transform(training))
    return weights.transform(counts.transform([text for own in said for texts in own for text in texts]))


def classify_by_centroids(products: Products) -> Tensor:
    """Gives each query the class whose mean vector has the least angle with it, `[T, m]`."""
    members = F.one_hot(products.classes).float()
    members = members / members.sum(0)
    squares = ((products.own @ members) * members).sum(1)
    return ((products.other @ members) / squares.clamp(min=1e-12).sqrt()[:, None]).argmax(2)


def classify_by_ridge(products: Products, penalty: float) -> Tensor:
    """Gives each query the class with the largest output of a ridge regression on class indicators, `[T, m]`.

    Args:
        penalty: on the squares of the weights; the intercept has none.
    """
    own, other = products.own, products.other
    targets = F.one_hot(products.classes).float()
    # Vectors are centred on the mean of the support.
    other = other - other.mean(2, keepdim=True) - own.mean(1, keepdim=True) + own.mean((1, 2), keepdim=True)
    own = own - own.mean(1, keepdim=True) - own.mean(2, keepdim=True) + own.mean((1, 2), keepdim=True)
    inverse = torch.linalg.inv(own + penalty * torch.eye(own.shape[1], dtype=own.dtype))
    found: Tensor = other @ inverse @ (targets - targets.mean(0))
    return found.argmax(2)


def tune_ridge(family: Intents, count: int = 200) -> float:
    """The best of `PENALTIES` on tasks of the intents for validation."""
    products = multiply_texts(family, count, pool="outer_valid")
    answers = torch.arange(family.ways).repeat_interleave(family.queries)
    return max(PENALTIES, key=lambda x: float((classify_by_ridge(products, x) == answers).float().mean()))
