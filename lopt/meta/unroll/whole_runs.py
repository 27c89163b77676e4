"""Whole runs of tasks that end at different times, each up to its own horizon."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window, join_windows, put_slots, select_slots
from lopt.meta.unroll.starts import begin_tasks


def run_to_end(loop: InnerLoop, slots: Slots) -> Window:
    """Steps of every slot up to its own horizon; slots that are there rest.

    Returns:
        A window whose K is the longest way of a slot; where a slot rests, it is not `active` and its losses are 0.
    """
    weights = loop.find_weights(slots)
    slots = begin_tasks(loop, slots, weights)
    running, index = slots, torch.arange(len(slots.ids), device=slots.ids.device)
    strides = []

    def spread(values: Tensor) -> Tensor:
        """The values of the slots that are running, `[n, T]`, and 0."""
        return values.new_zeros(len(values), len(slots.ids)).index_copy(1, index, values)

    while len(index):
        running, stride = loop.advance(running, weights, max(1, int((running.horizon - running.step).min())))
        strides.append(Window._make([*map(spread, stride[:-1]), running]))
        slots = put_slots(slots, index, running)
        # Those that are not there yet go on by themselves, so that nobody pays for slots that rest.
        unfinished = (running.step < running.horizon).nonzero()[:, 0]
        running, index = select_slots(running, unfinished), index[unfinished]
        loop = replace(loop, stride=None)  # another size each time
        weights = None if weights is None else {key: w[unfinished] for key, w in weights.items()}
    # What belongs to the task, and not to the step, is there for resting slots, too.
    window = join_windows(strides, slots)
    first_loss, episode = (x.expand_as(window.steps) for x in (slots.first_loss, slots.episode))
    return window._replace(first_loss=first_loss, episode=episode)
