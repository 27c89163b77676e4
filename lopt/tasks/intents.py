"""Few-shot classification of what is said to a machine: intents that were not there in training.

Sources: Finn et al. 2017, arXiv 1703.03400 (MAML); Bao et al. 2020, arXiv 1908.06039 (few-shot classification of
texts). Differs from the sources: texts are bags of hashed n-grams, and queries are in another language by default.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn

from lopt.core.names import choose
from lopt.core.random import draw_uniform, fold_in
from lopt.tasks.base import POOLS, SPLITS, Batch, Task
from lopt.tasks.data.ngrams import count_ngrams, weigh_counts
from lopt.tasks.data.utterances import FEWEST, TEXTS, load_utterances
from lopt.tasks.few_shot import FewShotClasses

Self = TypeVar("Self", bound="Intents")


class Intents(FewShotClasses):
    """Say what someone wants, learned from a few texts of each intent in another language; cross-entropy.

    A task is its "intents" `[ways]` int64, of which the first is class 0 and so on, the "languages" `[2]` int64 of its
    support and of its queries, and which "texts" `[ways, shots + queries]` int64 it is about. The train split is the
    first `shots` of each, at every step; all others are the rest. Mini-batches are x `[T, n, buckets]` float32, vectors
    of length 1, and classes y `[T, n]` int64, class by class. A metric is the accuracy. Pools have different intents,
    in the same languages. By default 32,853 parameters: a linear embedding, "features", normalised over a text, and a
    layer "head".

    Args:
        ways: classes of a task.
        shots: texts of each that are learned from.
        queries: other texts of each that a task is judged on.
        languages: separated by commas.
        across: whether queries are in another language than the support.
        buckets: of hashed n-grams.
        width: of the embedding.
        data: "home-assistant" or "texts:FOLDER", read by `load_utterances`.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range, or the data have too few intents or languages.
        FileNotFoundError: a file of `data` is missing.
        ImportError: the package that brings the data is missing.
    """

    name = "intents"
    pool_key = "intents"

    def __init__(
        self,
        ways: int = 5,
        shots: int = 5,
        queries: int = 5,
        languages: str = "en,de,nl,fr,es,it",
        across: bool = True,
        buckets: int = 2048,
        width: int = 16,
        data: str = "home-assistant",
        horizon: int = 10,
    ) -> None:
        if ways < 2 or min(shots, queries) < 1 or shots + queries > FEWEST or min(buckets, width) < 2:
            raise ValueError(
                f"ways, buckets and width must be at least 2, shots and queries 1 and at most {FEWEST} together, got "
                f"ways={ways}, shots={shots}, queries={queries}, buckets={buckets}, width={width}"
            )
        self.ways, self.shots, self.queries, self.horizon = ways, shots, queries, horizon
        self.across, self.buckets, self.width = across, buckets, width
        self.utterances = load_utterances(data, languages)
        self.pools = self.utterances.pools
        few = next((pool for pool, numbers in self.pools.items() if len(numbers) < ways), None)
        if few is not None:
            raise ValueError(f"{data} has {len(self.pools[few])} intents for {few}, fewer than ways={ways}")
        if across and len(self.utterances.languages) < 2:
            raise ValueError(f"across=True takes two languages at least, got {languages!r}; or set across=False")
        texts = self.utterances.texts
        self.numbers = torch.tensor([[len(found) for found in own] for own in texts], dtype=torch.int64)
        self.counts = torch.zeros(*self.numbers.shape, TEXTS, buckets, dtype=torch.uint8)
        for i, own in enumerate(texts):
            for j, found in enumerate(own):
                self.counts[i, j, : len(found)] = count_ngrams(found, buckets)
        self.module = self.build_network()

    def build_network(self, ways: int | None = None) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["features"] = nn.Linear(self.buckets, self.width, bias=False)
        layers["norm"] = nn.LayerNorm(self.width, elementwise_affine=False)
        layers["head"] = nn.Linear(self.width, ways or self.ways)
        return nn.Sequential(layers)

    def pick_examples(self, classes: Tensor, shares: Tensor) -> Tensor:
        ends = self.numbers[:, classes].cumsum(0)  # of languages
        place = (shares * ends[-1]).long()
        language = (place >= ends).sum(0)
        text = place - (ends - self.numbers[:, classes]).gather(0, language[None])[0]
        return weigh_counts(self.counts[language, classes, text])

    def to(self: Self, device: torch.device | str) -> Self:
        self.counts = self.counts.to(device)
        return super().to(device)

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        intents, languages = self.pools[choose("pool", pool, POOLS)], len(self.utterances.languages)
        order = draw_uniform(fold_in(seeds, 0), len(intents)).argsort(1)[:, : self.ways] + intents.start
        spoken = draw_uniform(fold_in(seeds, 1), languages).argsort(1)[:, : 1 + self.across].expand(-1, 2)
        # A text is not asked for that is learned from, in the same language: the two parts are of one order.
        places = draw_uniform(fold_in(seeds, 2), self.ways * TEXTS).view(-1, self.ways, TEXTS)
        texts = [
            (places + (torch.arange(TEXTS) >= self.numbers[spoken[:, i, None], order][..., None])).argsort(2)
            for i in range(2)
        ]
        known, asked = texts[0][..., : self.shots], texts[1][..., self.shots : self.shots + self.queries]
        return {"intents": order, "languages": spoken.contiguous(), "texts": torch.cat([known, asked], 2)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        support = choose("split", split, SPLITS) == "train"
        part = slice(self.shots) if support else slice(self.shots, None)
        language, texts = tasks["languages"][:, 0 if support else 1], tasks["texts"][..., part]
        counts = self.counts[language[:, None, None], tasks["intents"][..., None], texts]
        y = self.number_classes(len(counts), texts.shape[-1], counts.device)
        return {"x": weigh_counts(counts).flatten(1, 2), "y": y}
