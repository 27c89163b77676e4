"""Ten times the size: what lasts when networks are wider and deeper than those of the other suites."""

from __future__ import annotations

from torch import nn

from lopt.evaluation.suites import data
from lopt.evaluation.suites.generative import rebuild
from lopt.evaluation.suites.language import RotaryModel, draw_windows, predict_next, score_next
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import SuiteTask, classify, score
from lopt.evaluation.suites.vision import build_resnet

LARGE_LLAMA = SuiteTask(
    name="large_llama",
    title="LLaMA of 5 blocks of 192 channels on source code by characters",
    architecture="LLaMA",
    data_set="Python's source code",
    num_steps=300,
    batch_size=8,
    build=lambda: RotaryModel(data.CHARACTERS, 192, 5, 6),
    load=data.source_code,
    loss=predict_next,
    sample=draw_windows,
    accuracy=score_next,
)

LARGE_RESNET = SuiteTask(
    name="large_resnet",
    title="ResNet of 3 blocks, 64 to 256 channels, GroupNorm, on letters",
    architecture="residual convnet with GroupNorm",
    data_set="letters",
    num_steps=300,
    batch_size=16,
    build=lambda: build_resnet(64),
    load=data.letters,
    loss=classify,
    accuracy=score,
)

LARGE_AUTOENCODER = SuiteTask(
    name="large_autoencoder",
    title="autoencoder 256-1536-768-64-768-1536-256, GELU, on elevation maps",
    architecture="wide autoencoder, GELU",
    data_set="elevation map",
    num_steps=500,
    batch_size=64,
    build=lambda: stack_layers([256, 1536, 768, 64, 768, 1536, 256], nn.GELU),
    load=data.terrain_patches,
    loss=rebuild,
)
