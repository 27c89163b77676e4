"""Models to time an optimizer on: the names and shapes of their parameters, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

Shapes = dict[str, tuple[int, ...]]


def list_mlp_shapes(widths: Sequence[int]) -> Shapes:
    """Weights (out, in) and biases of an MLP."""
    shapes: Shapes = {}
    for i in range(len(widths) - 1):
        shapes[f"layers.{i}.weight"] = (widths[i + 1], widths[i])
        shapes[f"layers.{i}.bias"] = (widths[i + 1],)
    return shapes


def list_vit_shapes(
    width: int = 768, depth: int = 12, patch: int = 16, image: int = 224, classes: int = 1000
) -> Shapes:
    """A vision transformer, by default ViT-B/16 (Dosovitskiy et al. 2021, arXiv 2010.11929); names as in timm."""
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (image // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in (f"blocks.{i}" for i in range(depth)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, (out, into) in linear.items():
            shapes |= {f"{block}.{name}.weight": (out * width, into * width), f"{block}.{name}.bias": (out * width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return shapes | {"head.weight": (classes, width), "head.bias": (classes,)}


MODELS: dict[str, Shapes] = {
    "mlp": list_mlp_shapes([3072, 1536, 1536, 1536, 10]),
    "vit": list_vit_shapes(),
    "tiny": list_mlp_shapes([24, 16, 16, 5]) | {"conv.weight": (6, 3, 3, 3), "gain": ()},
}
