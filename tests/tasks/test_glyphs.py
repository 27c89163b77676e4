"""Few-shot tasks on characters: how they are drawn, who is in which pool, and folders in Omniglot's layout."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from task_cases import draw_tasks
from torch.func import vmap
from torch.nn import functional as F

from lopt.core.random import derive_seeds
from lopt.tasks import POOLS, TASKS
from lopt.tasks.data.drawings import SCRIPTS, load_drawings
from lopt.tasks.data.fonts import FEWEST, draw_scripts

SEEDS = derive_seeds(0, "task", torch.arange(50))


def write_drawings(folder: Path, alphabets: int, characters: int = 3, drawings: int = 5) -> Path:
    """Each character is a bar of its own place and alphabet, in black on white, and in each drawing a bit lower."""
    for alphabet in range(alphabets):
        for character in range(characters):
            place = folder / f"alphabet{alphabet:02}" / f"character{character + 1:02}"
            place.mkdir(parents=True)
            for drawing in range(drawings):
                image = Image.new("1", (105, 105), 1)
                top = 10 + 5 * drawing
                ImageDraw.Draw(image).rectangle((5 + 9 * alphabet, top, 20 + 9 * alphabet, top + 20 * character), 0)
                image.save(place / f"{drawing + 1:02}.png")
    return folder


# -- fonts -------------------------------------------------------------------------------------------------------------


def test_a_letter_is_drawn_as_it_always_was() -> None:
    expected = [[8, 6, 0], [78, 134, 0], [1, 172, 58], [45, 16, 190], [55, 0, 191], [181, 144, 132], [8, 18, 0]]
    drawn = draw_scripts(["GEORGIAN LETTER"], 10)[0][0]
    np.testing.assert_allclose(drawn[1:8, 4:7].astype(int), expected, atol=3)  # FreeType's rounding, by version
    assert np.array_equal(drawn, draw_scripts(["GEORGIAN LETTER"], 10)[0][0])


def test_a_bar_has_the_ink_that_its_outline_has() -> None:
    """The regular I is a rectangle of 202 x 1493 of the em's 2048 units."""
    capitals = draw_scripts(["LATIN CAPITAL LETTER"], 28)
    ink = capitals[ord("I") - ord("A")][0].sum() / 255
    assert ink == pytest.approx(24**2 * 202 * 1493 / 2048**2, rel=0.02)


def test_letters_are_those_that_another_renderer_draws() -> None:
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 48)
    letters = "აბგდევზთიკ"
    drawn = {x[0].tobytes(): x for x in draw_scripts(["GEORGIAN LETTER"], 56)}
    near = []
    for letter in letters:
        canvas = Image.new("L", (56, 56))
        ImageDraw.Draw(canvas).text((28, 28), letter, fill=255, font=font, anchor="mm")
        ink = np.asarray(canvas.crop(canvas.getbbox()), np.float32)
        # By its shape alone: the middle of a letter is another one in Pillow.
        own = [_crop(x[0]) for x in drawn.values()]
        near.append(min(_compare(ink, image) for image in own if abs(np.subtract(ink.shape, image.shape)).max() <= 2))
    assert max(near) < 0.2


def _crop(image: np.ndarray) -> np.ndarray:
    rows, columns = image.any(1).nonzero()[0], image.any(0).nonzero()[0]
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)


def _compare(a: np.ndarray, b: np.ndarray) -> float:
    size = np.minimum(a.shape, b.shape)
    a, b = a[: size[0], : size[1]], b[: size[0], : size[1]]
    return float(np.abs(a - b).mean() / b.mean())


def test_no_letter_is_there_twice_nor_a_script_in_two_pools() -> None:
    drawings = load_drawings("dejavu", 14)
    first = [image.numpy().tobytes() for image in drawings.images[:, 0]]
    assert len(set(first)) == len(first)
    assert [i for numbers in drawings.pools.values() for i in numbers] == list(range(len(first)))
    assert {pool: len(numbers) for pool, numbers in drawings.pools.items()} == {
        "train": pytest.approx(1469, abs=10),
        "outer_valid": pytest.approx(395, abs=10),
        "test": pytest.approx(512, abs=10),
    }
    assert not set(SCRIPTS["train"]) & {*SCRIPTS["outer_valid"], *SCRIPTS["test"]}
    assert not set(SCRIPTS["outer_valid"]) & set(SCRIPTS["test"])


def test_every_drawing_that_is_counted_shows_something_and_no_other_does() -> None:
    drawings = load_drawings("dejavu", 14)
    assert int(drawings.counts.min()) == FEWEST
    counted = torch.arange(drawings.images.shape[1]) < drawings.counts[:, None]
    assert torch.equal((drawings.images > 0).flatten(2).any(2), counted)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_task_has_other_characters_and_other_drawings_for_support_and_queries(pool: str) -> None:
    family = TASKS["glyphs"](ways=20, shots=2, queries=2, width=2)
    tasks = family.sample_all(SEEDS, pool)
    assert all(len(set(row)) == 20 for row in tasks["characters"].tolist())
    assert all(len(set(row)) == 4 for row in tasks["drawings"].flatten(0, 1).tolist())
    assert (tasks["drawings"] < family.counts[tasks["characters"]][..., None]).all()
    assert tasks["drawings"].min() == 0
    # As many different ones as 50 draws of 20 without order give on average.
    size = len(family.pools[pool])
    assert len(tasks["characters"].unique()) == pytest.approx(size * (1 - (1 - 20 / size) ** 50), rel=0.05)


def test_class_k_is_of_the_kth_character_in_both_splits() -> None:
    family = TASKS["glyphs"](ways=3, shots=2, queries=1, width=2)
    tasks = family.sample_all(SEEDS[:4], "test")
    for split, places in (("train", [0, 1]), ("inner_valid", [2])):
        batch = family.batch(tasks, SEEDS[:4], split)
        assert batch["x"].shape == (4, 3 * len(places), 1, 14, 14)
        for task in range(4):
            for x, y, place in zip(batch["x"][task], batch["y"][task], places * 3, strict=True):
                number, drawing = tasks["characters"][task, y], tasks["drawings"][task, y, place]
                assert torch.equal(x[0], family.images[number, drawing].float() / 255)


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_losses_of_many_tasks_are_those_of_each_and_a_right_head_has_accuracy_one(network: str) -> None:
    family = TASKS["glyphs"](ways=3, network=network, width=2)
    _, params, batch = draw_tasks(family, 4)
    torch.testing.assert_close(family.losses(params, batch), vmap(family.loss)(params, batch), rtol=1e-5, atol=1e-6)
    classes = F.one_hot(batch["y"][0], 3).float().mean(0)
    told = {k: torch.zeros_like(p[0]) for k, p in params.items()} | {"head.bias": torch.tensor([9.0, 0.0, 0.0])}
    accuracy = family.metrics(told, {k: b[0] for k, b in batch.items()})["accuracy"]
    torch.testing.assert_close(accuracy, classes[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ways": 1}, "ways must be at least 2.*ways=1"),
        ({"shots": 0}, "shots=0"),
        ({"size": 3}, "size 8, got.*size=3"),
        ({"shots": 2, "queries": 3}, "take 5 drawings of a character, and dejavu has 4 of some"),
        ({"ways": 400}, "395 characters for outer_valid, fewer than ways=400"),
        ({"network": "resnet"}, "network must be one of conv, mlp"),
        ({"data": "mnist"}, "data must be one of dejavu, omniglot:FOLDER"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TASKS["glyphs"](**options)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_alphabets_is_divided_by_alphabet(tmp_path: Path) -> None:
    folder = write_drawings(tmp_path, alphabets=10, characters=4)
    drawings = load_drawings(f"omniglot:{folder}", 21)
    assert {pool: len(numbers) for pool, numbers in drawings.pools.items()} == {
        "train": 28,
        "outer_valid": 4,
        "test": 8,
    }
    assert drawings.counts.tolist() == [5] * 40
    # An alphabet is known by the column of its bars, which are of ink: bright.
    columns = drawings.images[:, 0].float().sum(1).argmax(1)
    sets = {pool: set(columns[list(numbers)].tolist()) for pool, numbers in drawings.pools.items()}
    assert sum(map(len, sets.values())) == 10
    assert drawings.images.max() == 255
    assert drawings.images.float().mean() < 40


def test_omniglots_own_division_is_kept(tmp_path: Path) -> None:
    write_drawings(tmp_path / "images_background", 4)
    write_drawings(tmp_path / "images_evaluation", 2, characters=2)
    drawings = load_drawings(f"omniglot:{tmp_path}", 14)
    assert {pool: len(numbers) for pool, numbers in drawings.pools.items()} == {"train": 9, "outer_valid": 3, "test": 4}
    family = TASKS["glyphs"](ways=3, shots=2, queries=3, data=f"omniglot:{tmp_path}", width=2)
    assert family.batch(family.sample_all(SEEDS), SEEDS)["x"].shape == (50, 6, 1, 14, 14)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; it should hold files ALPHABET/"):
        load_drawings(f"omniglot:{tmp_path / 'nowhere'}", 14)
    with pytest.raises(FileNotFoundError, match="has no files ALPHABET/CHARACTER"):
        load_drawings(f"omniglot:{tmp_path}", 14)
    folder = write_drawings(tmp_path / "few", 2)
    with pytest.raises(ValueError, match="too few alphabets for pools of their own: 1 of them are left"):
        load_drawings(f"omniglot:{folder}", 14)
    folder = write_drawings(tmp_path / "broken", 3)
    (folder / "alphabet01" / "character01" / "01.png").write_text("not found")
    with pytest.raises(ValueError, match=r"01\.png is no image that Pillow can read"):
        load_drawings(f"omniglot:{folder}", 14)
