"""Which parameters a learned rule gets and which AdamW gets.

Rules such as Celo2 are meant for the matrices inside a network; vectors, embeddings and the layers at its two ends are
better left to AdamW (as with Muon, Jordan et al. 2024).

    optimizer = lopt.LearnedOptimizer(lopt.group_parameters(model, adamw=["head.*"]), "celo2.safetensors")
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lopt.optim.options import ADAMW
from lopt.optim.parameter_names import strip_wrappers

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def group_parameters(model: nn.Module, adamw: str | Sequence[str] = (), **options: Any) -> list[dict[str, Any]]:
    """The named parameters of `model` in two groups: the rule's, and AdamW's with the option `rule="adamw"`.

    AdamW gets parameters with fewer than two dimensions (biases, norms, scalars), those of embedding modules, and those
    whose name matches a pattern. A parameter that two modules share counts as an embedding if one of them is one.
    Frozen parameters are left out.

    Args:
        adamw: a pattern, or more, of names for AdamW, as in file names: "head.*", "*.patch_embed.*". Names are meant as
            the model has them, or as they are where it is wrapped (`torch.compile`, DDP, FSDP).
        options: of the group that the rule gets.
    Returns:
        One or two groups for `LearnedOptimizer`, in the order of the model's parameters.
    Raises:
        ValueError: a pattern matches no parameter, or nothing can be trained.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("the model has no parameters that require gradients")
    # A pattern without effect is a mistake in a name, which would be noticed only in the results.
    patterns = [adamw] if isinstance(adamw, str) else adamw
    plain = dict(zip(named, strip_wrappers(tuple(named)), strict=True))
    chosen = {
        pattern: {name for name in named if fnmatchcase(name, pattern) or fnmatchcase(plain[name], pattern)}
        for pattern in patterns
    }
    for pattern, names in chosen.items():
        if not names:
            raise ValueError(f"no parameter matches {pattern!r}; the first are {', '.join(list(named)[:4])}")
    embedded = {id(p) for module in model.modules() if isinstance(module, EMBEDDINGS) for p in module.parameters()}
    # Two lists rather than a flag for each: torch's optimizers have options by group.
    learned: list[tuple[str, nn.Parameter]] = []
    for_adamw: list[tuple[str, nn.Parameter]] = []
    for name, p in named.items():
        routed = p.ndim < 2 or id(p) in embedded or any(name in names for names in chosen.values())
        (for_adamw if routed else learned).append((name, p))
    groups: list[dict[str, Any]] = [{"params": learned, **options}] if learned else []
    return groups + ([{"params": for_adamw, "rule": ADAMW}] if for_adamw else [])
