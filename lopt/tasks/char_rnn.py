"""Recurrent next-character models of English text.

Source: a family of Metz et al. 2022, arXiv 2211.09760 (VeLO); GRU of Cho et al. 2014, arXiv 1406.1078, with the reset
after the product as in `torch.nn.GRU`; LSTM of Hochreiter & Schmidhuber 1997 with forget gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lopt.core.names import choose
from lopt.tasks.data.characters import CharacterTask
from lopt.tasks.mlp import check_network

GATES = {"vanilla": 1, "gru": 3, "lstm": 4}


class Recurrent(nn.Module):
    """An embedding, a cell from linear layers, and a linear layer to logits: the network of a `CharRNN`.

    torch's own recurrent layers cannot be batched over tasks with `vmap`, so the gates are written out; their order
    within the weights is that of `torch.nn.GRU` and `torch.nn.LSTM`.

    Args:
        cell: "vanilla", "gru" or "lstm".
        characters: number of codes.
        width: of the hidden state and of the embedding.
    """

    def __init__(self, cell: str, characters: int, width: int) -> None:
        super().__init__()
        self.cell, self.width = cell, width
        self.embedding = nn.Embedding(characters, width)
        self.inward = nn.Linear(width, GATES[cell] * width)
        self.recurrent = nn.Linear(width, GATES[cell] * width)
        self.outward = nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `[B, length]` int64 to logits of the next code at every place, `[B, length, characters]`.

        The hidden state starts at 0 with every window: nothing is carried from one mini-batch to the next.
        """
        inputs = self.inward(self.embedding(codes)).unbind(1)
        hidden = inputs[0].new_zeros(inputs[0].shape[0], self.width)
        memory = hidden
        outputs = []
        for x in inputs:
            hidden, memory = self._step(x, self.recurrent(hidden), hidden, memory)
            outputs.append(hidden)
        logits: Tensor = self.outward(torch.stack(outputs, 1))
        return logits

    def _step(self, x: Tensor, h: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The next hidden state and memory, from what the input and the hidden state say to the gates."""
        if self.cell == "vanilla":
            return (x + h).tanh(), memory
        if self.cell == "gru":
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = x.chunk(3, -1), h.chunk(3, -1)
            update = (update_x + update_h).sigmoid()
            new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
            return new + update * (hidden - new), memory
        enter, keep, new, leave = (x + h).chunk(4, -1)
        memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * memory.tanh(), memory


class CharRNN(CharacterTask):
    """A recurrent model with one layer, its state zero at a window's start; cross-entropy in nats per character.

    Mini-batches are codes x `[T, batch_size, length]` int64 and the codes y one place further on. A metric is the
    accuracy of the likeliest character. By default 10,496 parameters. Always saying the characters' frequencies has a
    loss of 3.22 on the default text.

    Args:
        cell: "vanilla", "gru" or "lstm".
        width: of the hidden state and of the embedding.
        length: characters in a window.
        characters: number of codes; rarer characters share one.
        batch_size: windows per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        data: "pydoc" or "text:FILE", read by `load_text`.
    Raises:
        ValueError: an option is out of range or unknown, or the text is too short.
        FileNotFoundError: the file of `data` is missing.
    """

    name = "char_rnn"

    def __init__(
        self,
        cell: str = "gru",
        width: int = 32,
        length: int = 16,
        characters: int = 64,
        batch_size: int = 16,
        horizon: int = 200,
        data: str = "pydoc",
    ) -> None:
        choose("cell", cell, GATES)
        check_network(width, 0)
        super().__init__(lambda: Recurrent(cell, characters, width), data, characters, length, batch_size, horizon)
