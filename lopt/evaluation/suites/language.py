"""Text by characters: GPT and GRU on documentation, LSTM and a transformer with rotary places on source code, word
vectors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.evaluation.suites import data
from lopt.evaluation.suites.task import Batch, Data, SuiteTask

LENGTH = 64
"""Characters of context."""


def draw_windows(train: Batch, count: int, generator: Generator, _: float) -> Batch:
    """Windows `[count, LENGTH + 1]` from anywhere in a text."""
    (text,) = train
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return (text[starts + torch.arange(LENGTH + 1)],)


def predict_next(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of the next character, for windows of text."""
    (window,) = batch
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def score_next(model: nn.Module, batch: Batch) -> Tensor:
    """Share of characters that are guessed."""
    (window,) = batch
    right: Tensor = (model(window[:, :-1]).argmax(-1) == window[:, 1:]).float().mean()
    return right


class RecurrentModel(nn.Module):
    """A recurrent language model: a table, torch's GRU or LSTM, a dense layer."""

    def __init__(
        self, kind: type[nn.GRU] | type[nn.LSTM], characters: int, width: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, width)
        self.recurrent = kind(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, length, characters]` of codes `[B, length]`."""
        logits: Tensor = self.head(self.recurrent(self.table(x))[0])
        return logits


class GPTBlock(nn.Module):
    """Causal attention and a GELU perceptron, each on a normalised copy, with biases and dropout as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, length, width]` to the same shape."""
        split = self.inward(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.outward(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class GPT(nn.Module):
    """GPT-2 in small (Radford et al. 2019): learned places, weights of std 0.02, the table used again as the head."""

    def __init__(self, characters: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, length, characters]` of codes `[B, length]`."""
        h = self.table(x) + self.places(torch.arange(x.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits


class RotaryBlock(nn.Module):
    """The block of LLaMA (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, rotary places, a SwiGLU perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, side = heads, width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.inward = nn.Linear(width, 3 * width, bias=False)
        self.outward = nn.Linear(width, width, bias=False)
        self.gate, self.widen = (nn.Linear(width, 8 * width // 3, bias=False) for _ in range(2))
        self.narrow = nn.Linear(8 * width // 3, width, bias=False)
        angles = torch.arange(LENGTH)[:, None] * 1000 ** (-torch.arange(0, side, 2) / side)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, length, width]` to the same shape."""
        split = self.inward(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = F.scaled_dot_product_attention(self._turn(query), self._turn(key), value, is_causal=True)
        x = x + self.outward(mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        y: Tensor = x + self.narrow(F.silu(self.gate(h)) * self.widen(h))
        return y

    def _turn(self, x: Tensor) -> Tensor:
        turns = self.get_buffer("turns")
        (cos, sin), (a, b) = turns[:, : x.shape[-2]], x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class RotaryModel(nn.Module):
    """LLaMA in small."""

    def __init__(self, characters: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, width)
        self.blocks = nn.Sequential(*(RotaryBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, length, characters]` of codes `[B, length]`."""
        logits: Tensor = self.head(self.norm(self.blocks(self.table(x))))
        return logits


# -- word vectors ------------------------------------------------------------------------------------------------------

WORDS = 2000
NEGATIVES = 8


@cache
def load_pairs() -> Data:
    """Neighbouring words of Python's language reference, at most three apart: codes of the 1,999 most frequent words,
    `[n]` each; a twentieth of the text, its end, is held out.
    """
    from collections import Counter
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).lower().split()
    ranked = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    codes = {word: code for code, (word, _) in enumerate(ranked[: WORDS - 1], 1)}
    text = torch.tensor([codes.get(word, 0) for word in words])
    border = 19 * len(text) // 20

    def pair(part: Tensor) -> Batch:
        first = torch.cat([part[:-apart] for apart in (1, 2, 3)])
        second = torch.cat([part[apart:] for apart in (1, 2, 3)])
        known = (first > 0) & (second > 0)
        return first[known], second[known]

    first, second = pair(text[border:])
    others = torch.randint(1, WORDS, (len(first), NEGATIVES), generator=torch.Generator().manual_seed(0))
    return Data(pair(text[:border]), (first[:4096], second[:4096], others[:4096]))


def draw_pairs(train: Batch, count: int, generator: Generator, _: float) -> Batch:
    """Words, one of their neighbours, and others that are drawn evenly."""
    first, second = train
    rows = torch.randint(len(first), (count,), generator=generator)
    return first[rows], second[rows], torch.randint(1, WORDS, (count, NEGATIVES), generator=generator)


class WordVectors(nn.Module):
    """Skip-gram with two tables (Mikolov et al. 2013, arXiv 1310.4546)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(WORDS, width), nn.Embedding(WORDS, width)
        nn.init.uniform_(self.words.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, first: Tensor, others: Tensor) -> Tensor:
        """Logits `[B, n]` that words `[B]` are neighbours of `[B, n]`."""
        return torch.einsum("bw,bnw->bn", self.words(first), self.contexts(others))


def tell_neighbours(model: nn.Module, batch: Batch) -> Tensor:
    """Negative sampling: cross-entropy of neighbours against drawn words, summed over both."""
    first, second, others = batch
    logits = model(first, torch.cat([second[:, None], others], 1))
    return F.softplus(-logits[:, 0]).mean() + F.softplus(logits[:, 1:]).sum(1).mean()


# -- development -------------------------------------------------------------------------------------------------------

DOCS_GPT = SuiteTask(
    name="docs_gpt",
    title="GPT-2 of 2 blocks of 64 channels, dropout, tied head, on documentation by characters",
    architecture="GPT-2",
    data_set="Python's documentation",
    num_steps=300,
    batch_size=16,
    build=lambda: GPT(64, 64, 2, 4),
    load=data.documentation,
    loss=predict_next,
    sample=draw_windows,
    accuracy=score_next,
)

DOCS_GRU = SuiteTask(
    name="docs_gru",
    title="GRU of 96 units on documentation by characters",
    architecture="GRU",
    data_set="Python's documentation",
    num_steps=300,
    batch_size=16,
    build=lambda: RecurrentModel(nn.GRU, 64, 32, 96, 1),
    load=data.documentation,
    loss=predict_next,
    sample=draw_windows,
    accuracy=score_next,
)

WORD_VECTORS = SuiteTask(
    name="word_vectors",
    title="skip-gram vectors of 2,000 words of documentation, 48 wide",
    architecture="skip-gram word vectors",
    data_set="Python's documentation",
    num_steps=1000,
    batch_size=128,
    build=WordVectors,
    load=load_pairs,
    loss=tell_neighbours,
    sample=draw_pairs,
)

# -- held out ----------------------------------------------------------------------------------------------------------

CODE_LSTM = SuiteTask(
    name="code_lstm",
    title="LSTM of 2 layers of 80 units on source code by characters",
    architecture="LSTM",
    data_set="Python's source code",
    num_steps=300,
    batch_size=16,
    build=lambda: RecurrentModel(nn.LSTM, data.CHARACTERS, 32, 80, 2),
    load=data.source_code,
    loss=predict_next,
    sample=draw_windows,
    accuracy=score_next,
)

CODE_LLAMA = SuiteTask(
    name="code_llama",
    title="LLaMA of 2 blocks of 72 channels (RMSNorm, rotary, SwiGLU) on source code by characters",
    architecture="LLaMA",
    data_set="Python's source code",
    num_steps=300,
    batch_size=12,
    build=lambda: RotaryModel(data.CHARACTERS, 72, 2, 4),
    load=data.source_code,
    loss=predict_next,
    sample=draw_windows,
    accuracy=score_next,
)
