"""The data of the suites: sets that come with scikit-learn, matplotlib, networkx and Python itself, cut into a train
and a held-out part. Nothing is downloaded.

Texts are those of the running Python, so tasks on them differ a little between versions of it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopt.core.random import make_generator
from lopt.evaluation.suites.task import Data
from lopt.tasks.data.splits import load_digits, load_photographs, load_table, load_text

Pixels = NDArray[Any]
CHARACTERS = 96
"""Codes of text: printable ASCII, and 0 for the end of a line and anything else."""
MODULES = (
    *("argparse", "calendar", "cmd", "configparser", "difflib", "doctest", "fractions", "ftplib", "gettext"),
    *("inspect", "mailbox", "optparse", "pdb", "pickletools", "pprint", "shutil", "smtplib", "statistics", "string"),
    *("tarfile", "textwrap", "threading", "tokenize"),
)
"""Of the standard library, whose sources are a text; the last two are held out."""
CLASSES = 26
SIDE = 16
"""Height and width of letters and of patches of pictures."""
_STYLES = ("", "-Bold", "-Oblique", "-BoldOblique")
_REACH = 3  # pixels that two crops of a pair may be apart


# -- development -------------------------------------------------------------------------------------------------------


@cache
def digit_images() -> Data:
    """scikit-learn's digits: images `[n, 1, 8, 8]` in [0, 1] and classes; 1,437 train, 360 held out."""
    splits = load_digits()
    held_out = [torch.cat(tensors) for tensors in zip(*(splits[s] for s in list(splits)[1:]), strict=True)]
    (x, y), (held_x, held_y) = splits["train"], held_out
    return Data((x.view(-1, 1, 8, 8), y), (held_x.view(-1, 1, 8, 8), held_y))


def digit_vectors() -> Data:
    """The digits as vectors `[n, 64]`."""
    (x, y), (held_x, held_y) = digit_images()
    return Data((x.flatten(1), y), (held_x.flatten(1), held_y))


@cache
def noisy_digit_vectors() -> Data:
    """The digits as vectors, a fifth of the train labels drawn at random; those held out are right."""
    return mislabel(digit_vectors(), 0.2, 10, 7)


@cache
def documentation() -> Data:
    """The language reference of Python as codes of its 63 most frequent characters: one tensor `[n]`, and 64 held-out
    windows of 65.
    """
    splits, _ = load_text("pydoc", 64)
    held_out = splits["test"].long()
    return Data((splits["train"].long(),), (held_out[: 64 * 65].view(64, 65),))


@cache
def temple_patches() -> Data:
    """scikit-learn's photograph of a temple in grey patches `[n, 1, 16, 16]` in [0, 1], 8 pixels apart; the right fifth
    is held out.
    """
    return _cut(load_photographs()[0].float().mean(0) / 255, stride=8)


@cache
def temple_pixels() -> Data:
    """The photograph of the temple, every fourth pixel: places `[n, 2]` in [-1, 1] and colours `[n, 3]`; a tenth of the
    pixels is held out.
    """
    return _list_pixels(load_photographs()[0, :, ::4, ::4].float() / 255)


def cancer_table() -> Data:
    """scikit-learn's table of breast cancers, standardised: 30 features, 2 classes."""
    return _merge(load_table("breast_cancer"))


# -- held out ----------------------------------------------------------------------------------------------------------


@cache
def letters() -> Data:
    """Capital letters in the fonts that come with matplotlib, shifted, turned and sheared: images `[n, 1, 16, 16]` in
    [0, 1] and 26 classes. Three of the fonts are held out.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in _STYLES]
    names += ["DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10"]
    held_out = ["DejaVuSerif-Italic", "STIXGeneralItalic", "cmtt10"]
    random = np.random.default_rng(0)

    def draw(name: str, repeats: int) -> tuple[list[Pixels], list[int]]:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 40)
        images, classes = [], []
        for letter in range(CLASSES):
            canvas = Image.new("L", (64, 64))
            ImageDraw.Draw(canvas).text((32, 32), chr(ord("A") + letter), fill=255, font=font, anchor="mm")
            for _ in range(repeats):
                turn, shear = random.uniform(-0.25, 0.25), random.uniform(-0.3, 0.3)
                a, b, c, d = np.cos(turn), np.sin(turn) + shear, -np.sin(turn), np.cos(turn)
                x, y = 32 - a * 32 - b * 32 + random.uniform(-5, 5), 32 - c * 32 - d * 32 + random.uniform(-5, 5)
                moved = canvas.transform((64, 64), Image.Transform.AFFINE, (a, b, x, c, d, y))
                images.append(np.asarray(moved.resize((SIDE, SIDE), Image.Resampling.BOX)))
                classes.append(letter)
        return images, classes

    def stack(fonts: list[str], repeats: int) -> tuple[Tensor, Tensor]:
        drawn = [draw(name, repeats) for name in fonts]
        pixels = np.stack([image for images, _ in drawn for image in images])
        x = torch.tensor(pixels, dtype=torch.float32)[:, None] / 255
        return x, torch.tensor([letter for _, classes in drawn for letter in classes])

    return Data(stack(names, 14), stack(held_out, 8))


def letter_vectors() -> Data:
    """The letters as vectors `[n, 256]`."""
    (x, y), (held_x, held_y) = letters()
    return Data((x.flatten(1), y), (held_x.flatten(1), held_y))


@cache
def noisy_letter_vectors() -> Data:
    """The letters as vectors, three tenths of the train labels drawn at random; those held out are right."""
    return mislabel(letter_vectors(), 0.3, CLASSES, 8)


@cache
def source_code() -> Data:
    """Sources of Python's standard library as codes (`CHARACTERS`): one tensor `[n]`, and 64 held-out windows of 65 of
    modules that are not in it.
    """
    texts = []
    for name in MODULES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ImportError(f"this Python comes without the source of {name}, which a task of the suites reads")
        codes = np.frombuffer(Path(spec.origin).read_bytes(), np.uint8).astype(np.int64) - 31
        texts.append(torch.from_numpy(np.where((codes > 0) & (codes < CHARACTERS), codes, 0)))
    held_out = torch.cat(texts[-2:])
    return Data((torch.cat(texts[:-2]),), (held_out[: 64 * 65 * 5].view(64, -1)[:, :65],))


@cache
def terrain_patches() -> Data:
    """matplotlib's elevation map of the Jacksboro fault in patches `[n, 1, 16, 16]`, each less its mean, in units of
    100 m, 8 pixels apart; the right fifth is held out.
    """
    map_ = open_sample("jacksboro_fault_dem.npz", lambda path: _load_array(path, "elevation"))
    patches = _cut(torch.from_numpy(map_.astype(np.float32)) / 100, stride=8)
    return Data(*((x - x.mean((2, 3), keepdim=True),) for (x,) in patches))


@cache
def brain_scan() -> Data:
    """matplotlib's scan of a head: the left of the image `[1, 256, 160]` in [0, 1], and 256 pairs of crops
    `[256, 1, 16, 16]` of its right, which is held out.
    """
    raw = open_sample("s1045.ima.gz", lambda path: np.frombuffer(gzip.decompress(path.read_bytes()), ">u2"))
    image = torch.from_numpy(raw.astype(np.float32)).view(1, 256, 256)
    image = image / image.max()
    return Data((image[:, :, :160],), crop_pairs((image[:, :, 160:],), 256, make_generator(9), 0.0))


def crop_pairs(train: tuple[Tensor, ...], count: int, generator: torch.Generator, _: float) -> tuple[Tensor, Tensor]:
    """Two crops `[count, 1, 16, 16]` of nearly the same place each, one of them mirrored or not and brightened."""
    (image,) = train
    room = torch.tensor(image.shape[1:])[:, None] - SIDE - 2 * _REACH
    corners = _REACH + (torch.rand(2, count, generator=generator) * room).long()
    moves = torch.randint(-_REACH, _REACH + 1, (2, count), generator=generator)
    reach = torch.arange(SIDE)

    def cut(corner: Tensor) -> Tensor:
        rows, columns = (corner[:, :, None] + reach).unbind(0)
        crops: Tensor = image[0][rows[:, :, None], columns[:, None, :]][:, None]
        return crops

    gain = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    second = cut(corners + moves) * gain
    flipped = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return cut(corners), torch.where(flipped, second.flip(-1), second)


@cache
def flower_pixels() -> Data:
    """The middle of scikit-learn's photograph of a flower: places `[n, 2]` in [-1, 1] and colours `[n, 3]`; a tenth of
    the pixels is held out.
    """
    return _list_pixels(load_photographs()[1, :, 100:356:3, 200:456:3].float() / 255)


def diabetes_table() -> Data:
    """scikit-learn's table of diabetes, standardised: 10 features and one target `[n, 1]`."""
    return _merge(load_table("diabetes"))


# -- spoiling and cutting ----------------------------------------------------------------------------------------------


def mislabel(given: Data, share: float, classes: int, seed: int) -> Data:
    """Inputs with classes, a share of the train labels drawn anew from all classes; those held out stay right."""
    (x, y), held_out = given
    generator = make_generator(seed)
    wrong = torch.rand(len(y), generator=generator) < share
    drawn = torch.randint(classes, y.shape, generator=generator)
    return Data((x, torch.where(wrong, drawn, y)), held_out)


def _merge(splits: dict[str, tuple[Tensor, Tensor]]) -> Data:
    """The train split, and the three small ones as one."""
    train, *others = splits.values()
    x, y = (torch.cat(tensors) for tensors in zip(*others, strict=True))
    return Data(train, (x, y))


def _cut(picture: Tensor, stride: int) -> Data:
    """A grey picture `[height, width]` in square patches; the right fifth is held out."""
    border = 4 * picture.shape[1] // 5

    def patches(part: Tensor) -> tuple[Tensor]:
        return (part.unfold(0, SIDE, stride).unfold(1, SIDE, stride).reshape(-1, 1, SIDE, SIDE).contiguous(),)

    return Data(patches(picture[:, :border]), (patches(picture[:, border:])[0][:512],))


def _list_pixels(picture: Tensor) -> Data:
    """A picture `[3, height, width]` as places and colours, a tenth held out."""
    _, height, width = picture.shape
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)
    colours = picture.permute(1, 2, 0).reshape(-1, 3)
    order = torch.randperm(len(places), generator=make_generator(3))
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]
    return Data((places[train], colours[train]), (places[held_out], colours[held_out]))


def open_sample(name: str, read: Callable[[Path], Pixels]) -> Pixels:
    """A file among the sample data of matplotlib."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this matplotlib comes without its sample data")
    return read(path)


def _load_array(path: Path, name: str) -> Pixels:
    with np.load(path, allow_pickle=False) as content:
        found: Pixels = content[name]
    return found
