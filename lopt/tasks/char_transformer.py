"""Small causal transformers as next-character models of English text.

Source: Vaswani et al. 2017, arXiv 1706.03762, with normalisation before each part (Xiong et al. 2020, arXiv 2002.04745)
and learned positions; a family of Metz et al. 2022, arXiv 2211.09760 (VeLO).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.tasks.data.characters import CharacterTask
from lopt.tasks.mlp import check_network


class Attention(nn.Module):
    """Causal self-attention with several heads, written out so that it can be batched over tasks with `vmap`.

    Args:
        width: of the residual stream; a multiple of `heads`.
        heads: that attend side by side, `width / heads` wide each.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix every place with the places before it: `[B, length, width]` to the same shape."""
        size, length, width = x.shape
        split = self.inward(x).view(size, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, length, width / heads]
        scores = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        place = torch.arange(length, device=x.device)
        weights = torch.where(place[:, None] >= place, scores, -torch.inf).softmax(-1)
        y: Tensor = self.outward((weights @ value).transpose(1, 2).reshape(size, length, width))
        return y


class Block(nn.Module):
    """Attention and a perceptron with one hidden layer, each on a normalised copy of what it reads, and added to it.

    Args:
        width: of the residual stream.
        heads: of the attention.
        expansion: hidden units of the perceptron, in widths.
    """

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_2, self.widen = nn.LayerNorm(width), nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What the block adds to the residual stream, and the stream: `[B, length, width]` to the same shape."""
        x = x + self.attention(self.norm_1(x))
        y: Tensor = x + self.narrow(F.gelu(self.widen(self.norm_2(x))))
        return y


class Transformer(nn.Module):
    """Embeddings of characters and places, blocks, a last normalisation and a linear layer to logits.

    Embeddings of both start at N(0, 0.02^2), everything else as torch initialises it.

    Args:
        characters: number of codes.
        length: of the windows, one learned position for each place.
        width, depth, heads, expansion: of the blocks.
    """

    def __init__(self, characters: int, length: int, width: int, depth: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.embedding, self.place = (
            nn.Embedding(characters, width),
            nn.Parameter(0.02 * torch.randn(length, width, dtype=torch.float32)),
        )
        self.blocks = nn.Sequential(*(Block(width, heads, expansion) for _ in range(depth)))
        self.norm, self.outward = nn.LayerNorm(width), nn.Linear(width, characters)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `[B, length]` int64 to logits of the next code at every place, `[B, length, characters]`."""
        logits: Tensor = self.outward(self.norm(self.blocks(self.embedding(codes) + self.place)))
        return logits


class CharTransformer(CharacterTask):
    """A causal transformer, normalised before each part; cross-entropy in nats per character.

    Mini-batches are codes x `[T, batch_size, length]` int64 and the codes y one place further on. A metric is the
    accuracy of the likeliest character. By default 13,792 parameters. Always saying the characters' frequencies has a
    loss of 3.22 on the default text.

    Args:
        width: of the residual stream; a multiple of `heads`.
        depth: blocks.
        heads: of the attention.
        expansion: hidden units of a block's perceptron, in widths.
        length: characters in a window.
        characters: number of codes; rarer characters share one.
        batch_size: windows per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        data: "pydoc" or "text:FILE", read by `load_text`.
    Raises:
        ValueError: an option is out of range, or the text is too short.
        FileNotFoundError: the file of `data` is missing.
    """

    name = "char_transformer"

    def __init__(
        self,
        width: int = 32,
        depth: int = 1,
        heads: int = 2,
        expansion: int = 2,
        length: int = 32,
        characters: int = 64,
        batch_size: int = 16,
        horizon: int = 300,
        data: str = "pydoc",
    ) -> None:
        check_network(width, depth)
        if min(width, depth, heads, expansion) < 1 or width % heads:
            sizes = f"width={width}, depth={depth}, heads={heads}, expansion={expansion}"
            raise ValueError(f"sizes must be at least 1 and width a multiple of heads, got {sizes}")

        def build() -> nn.Module:
            return Transformer(characters, length, width, depth, heads, expansion)

        super().__init__(build, data, characters, length, batch_size, horizon)
