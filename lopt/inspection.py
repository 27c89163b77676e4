"""What a rule is, in figures."""

from __future__ import annotations

from typing import Any

import torch

from lopt.checkpoint import fingerprint
from lopt.rules import Rule


def inspect_rule(rule: Rule) -> dict[str, Any]:
    """Name, configuration, fingerprint, number of meta-weights, and the state it keeps per parameter.

    Returns:
        `state_bytes_per_parameter` is measured on a float32 matrix of 64 x 64.
    """
    state = rule.init_state({"w": torch.zeros(64, 64)})
    tensors = state.accumulators["w"]
    held = sum(a.numel() * a.element_size() for a in tensors.values())
    return {
        "rule": rule.name,
        "config": rule.config,
        "fingerprint": fingerprint(rule),
        "meta_weights": sum(p.numel() for p in rule.parameters()),
        "state": ", ".join(f"{key} {list(a.shape)}" for key, a in tensors.items()),
        "state_bytes_per_parameter": round(held / 64**2, 2),
        "elementwise": rule.elementwise,
    }
