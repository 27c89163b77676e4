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


def list_resnet_shapes(depths: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> Shapes:
    """A residual network of bottlenecks, by default ResNet-50 (He et al. 2016, arXiv 1512.03385).

    Names as in torchvision.
    """
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    into = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for block in (f"layer{stage + 1}.{i}" for i in range(depth)):
            convolutions = {"1": (width, into, 1, 1), "2": (width, width, 3, 3), "3": (4 * width, width, 1, 1)}
            for name, shape in convolutions.items():
                shapes[f"{block}.conv{name}.weight"] = shape
                shapes |= {f"{block}.bn{name}.weight": shape[:1], f"{block}.bn{name}.bias": shape[:1]}
            if block.endswith(".0"):
                shapes[f"{block}.downsample.0.weight"] = (4 * width, into, 1, 1)
                shapes |= {f"{block}.downsample.1.{name}": (4 * width,) for name in ("weight", "bias")}
            into = 4 * width
    return shapes | {"fc.weight": (classes, into), "fc.bias": (classes,)}


def list_gpt2_shapes(width: int = 768, depth: int = 12, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2 (Radford et al. 2019), by default of 124 M parameters; output and input embedding are one.

    Names and matrices, which are (in, out), as in transformers.
    """
    shapes: Shapes = {"transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (context, width)}
    linear = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    for block in (f"transformer.h.{i}" for i in range(depth)):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, (into, out) in linear.items():
            shapes |= {f"{block}.{name}.weight": (into * width, out * width), f"{block}.{name}.bias": (out * width,)}
    return shapes | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


MODELS: dict[str, Shapes] = {
    "mlp": list_mlp_shapes([3072, 1536, 1536, 1536, 10]),
    "mlp-small": list_mlp_shapes([64, 128, 128, 10]),
    "gpt-small": list_gpt2_shapes(width=64, depth=2, vocabulary=65, context=64),
    "resnet50": list_resnet_shapes(),
    "vit": list_vit_shapes(),
    "gpt2": list_gpt2_shapes(),
    "gpt2-medium": list_gpt2_shapes(width=1024, depth=24),
    "tiny": list_mlp_shapes([24, 16, 16, 5]) | {"conv.weight": (6, 3, 3, 3), "gain": ()},
}
