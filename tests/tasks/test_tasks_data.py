"""The data of the tasks: real, divided, and refused when it is not what it should be."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.tasks import SPLITS, TASKS
from lopt.tasks.data.files import read_cifar10, read_mnist, read_text
from lopt.tasks.data.splits import load_digits, load_images, load_photographs, load_table, load_text, to_pixels


def draw_bytes(*shape: int, high: int = 256) -> Tensor:
    return torch.randint(high, shape, generator=make_generator(sum(shape)), dtype=torch.uint8)


def encode_idx(x: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in x.shape)
    return bytes([0, 0, 8, x.ndim]) + sizes + x.numpy().tobytes()


def write_mnist(folder: Path, *, compress: bool = False, train: int = 30) -> dict[str, Tensor]:
    """Four small files in MNIST's format."""
    written = {}
    for part, count in (("train", train), ("t10k", 8)):
        written[f"{part}-images-idx3-ubyte"] = draw_bytes(count, 4, 3)
        written[f"{part}-labels-idx1-ubyte"] = draw_bytes(count, high=10)
    for name, x in written.items():
        content = encode_idx(x)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return written


def write_cifar10(folder: Path, count: int = 4) -> dict[str, Tensor]:
    """Six small files in the format of CIFAR-10's binary version."""
    written = {}
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = draw_bytes(count, 3073)
        records[:, 0] = (i + torch.arange(count)) % 10
        (folder / name).write_bytes(records.numpy().tobytes())
        written[name] = records
    return written


def test_digits_are_real_and_their_splits_disjoint_and_stratified() -> None:
    digits = load_digits()
    assert [len(digits[s][1]) for s in SPLITS] == [1437, 120, 120, 120]
    images = torch.cat([digits[s][0] for s in SPLITS])
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    for split in SPLITS:
        shares = digits[split][1].bincount(minlength=10) / len(digits[split][1])
        assert (shares - 0.1).abs().max() < 0.02
    from sklearn import datasets

    _, classes = datasets.load_digits(return_X_y=True)
    assert torch.cat([digits[s][1] for s in SPLITS]).bincount().tolist() == torch.tensor(classes).bincount().tolist()
    assert images.unique(dim=0).shape[0] == 1797  # no image twice, so none in two splits


def test_patches_are_where_their_class_says() -> None:
    patches = load_images("patches")
    assert [len(patches[s][1]) for s in SPLITS] == [6380, 700, 700, 700]
    photographs = load_photographs()
    tiles = {x.numpy().tobytes(): int(y) for x, y in zip(*patches["test"], strict=True)}
    found = set()
    for photograph in range(2):
        for row in range(53):
            for column in range(80):
                tile = photographs[photograph, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                label = tiles.get(tile.contiguous().numpy().tobytes())
                if label == 4 * photograph + 2 * (row >= 26) + (column >= 40):
                    found.add(tile.contiguous().numpy().tobytes())
    assert len(found) == len(tiles)


@pytest.mark.parametrize(
    ("data", "sizes", "features"),
    [
        ("wine", [118, 20, 20, 20], 13),
        ("iris", [105, 15, 15, 15], 4),
        ("breast_cancer", [389, 60, 60, 60], 30),
        ("diabetes", [292, 50, 50, 50], 10),
    ],
)
def test_tables_are_divided_and_standardised_by_their_train_split(data: str, sizes: list[int], features: int) -> None:
    table = load_table(data)
    assert [len(table[s][1]) for s in SPLITS] == sizes
    x, y = table["train"]
    assert x.shape[1] == features
    columns = torch.cat([x, y], 1) if data == "diabetes" else x
    torch.testing.assert_close(columns.mean(0), torch.zeros(columns.shape[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(columns.std(0), torch.ones(columns.shape[1]))
    assert abs(float(table["test"][0].mean())) > 1e-4  # by those of the train split, not by its own
    if data != "diabetes":
        assert all(set(table[s][1].tolist()) == set(y.tolist()) for s in SPLITS)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_is_read_as_written_and_its_test_set_kept(tmp_path: Path, compress: bool) -> None:
    written = write_mnist(tmp_path, compress=compress)
    data = load_images(f"mnist:{tmp_path}")
    assert [len(data[s][1]) for s in SPLITS] == [26, 2, 2, 8]
    assert torch.equal(data["test"][0], written["t10k-images-idx3-ubyte"][:, None])
    assert torch.equal(data["test"][1], written["t10k-labels-idx1-ubyte"].long())
    rest = [torch.cat([data[s][i] for s in SPLITS[:3]]) for i in (0, 1)]
    found = {(x.numpy().tobytes(), int(y)) for x, y in zip(*rest, strict=True)}
    images, labels = (written[f"train-{part}-ubyte"] for part in ("images-idx3", "labels-idx1"))
    assert found == {(x.numpy().tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}


@pytest.mark.parametrize("nested", [False, True])
def test_cifar10_is_read_as_written(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    written = write_cifar10(folder)
    data = load_images(f"cifar10:{tmp_path}")
    assert [len(data[s][1]) for s in SPLITS] == [18, 1, 1, 4]
    x, y = data["test"]
    assert torch.equal(x.flatten(1), written["test_batch.bin"][:, 1:])  # red, green, blue planes in rows
    assert torch.equal(y, written["test_batch.bin"][:, 0].long())


def test_bytes_become_pixels_between_0_and_1() -> None:
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_pixels(x), torch.tensor([0.0, 0.2, 1.0]))
    assert to_pixels(torch.tensor([0.5])) == 0.5


@pytest.mark.parametrize("name", ["mlp", "conv", "autoencoder", "vae"])
def test_families_on_images_take_local_files(tmp_path: Path, name: str) -> None:
    write_cifar10(tmp_path)
    family = TASKS[name](data=f"cifar10:{tmp_path}", batch_size=2)
    batch = family.batch({}, torch.tensor([1]))
    assert batch["x"][0, 0].numel() == 3072
    assert 0.9 < batch["x"].max() <= 1
    whole = family.full_batch({}, 1, "test")
    assert whole is not None
    assert 0.9 < whole["x"].max() <= 1


def test_default_text_is_english_and_its_splits_make_up_the_whole() -> None:
    from pydoc_data.topics import topics

    codes, vocabulary = load_text("pydoc", 64)
    assert len(vocabulary) == 63
    assert vocabulary[0] == " "
    total = sum(map(len, codes.values()))
    assert total == len("\n\n".join(topics.values()))
    assert all(0.05 < len(codes[s]) / total < 0.08 for s in SPLITS[1:])
    decoded = "".join(("?" + vocabulary)[c] for c in codes["train"].tolist())
    assert decoded.count(" statement ") > 100
    assert (codes["test"] == 0).float().mean() < 0.02


def test_text_files_keep_every_character_and_rare_ones_share_a_code(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("\ufeff" + "äb\r\n" * 400 + "z").encode())
    text = read_text(path)
    assert text == "äb\n" * 400 + "z"
    codes, vocabulary = load_text(f"text:{path}", 4)
    assert sorted(vocabulary) == ["\n", "b", "ä"]
    assert sum(map(len, codes.values())) == len(text)
    assert sum(int((part == 0).sum()) for part in codes.values()) == 1


def test_data_does_not_depend_on_when_it_is_loaded() -> None:
    load_text.cache_clear()
    first = load_text("pydoc", 32)[0]
    load_text.cache_clear()
    second = load_text("pydoc", 32)[0]
    assert all(torch.equal(first[s], second[s]) for s in SPLITS)


def damage_mnist(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    write_mnist(folder)
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (IMAGES, lambda b: b[:-1], "truncated: 30 x 4 x 3 = 360 bytes expected, 359 found"),
        (IMAGES, lambda b: b + b"!", "too long.*361"),
        (IMAGES, lambda b: b[:7], "not an IDX file"),
        (IMAGES, lambda b: b"", "starts with nothing"),
        (IMAGES, lambda b: b"<html>" + b, "starts with 3c68746d, expected 00000803"),
        (IMAGES, lambda b: encode_idx(draw_bytes(0, 4, 3)), "empty"),
        (IMAGES, lambda b: encode_idx(draw_bytes(30, 5, 3)), r"\[\[5, 3\], \[4, 3\]\].*two data sets"),
        (LABELS, lambda b: encode_idx(draw_bytes(29)), "30 images and 29 labels"),
    ],
)
def test_damaged_mnist_is_refused(tmp_path: Path, name: str, change: Callable[[bytes], bytes], words: str) -> None:
    damage_mnist(tmp_path, name, change)
    with pytest.raises(ValueError, match=words):
        read_mnist(tmp_path)


def test_truncated_gzip_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / f"{IMAGES}.gz"
    for content in (path.read_bytes()[:-9], b"plain"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not gzip"):
            read_mnist(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b[:-1], "12291 bytes, expected a multiple of 3073"),
        (lambda b: b"", "0 bytes"),
        (lambda b: b"\x0a" + b[1:], "label 10, expected 0 to 9"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=words):
        read_cifar10(tmp_path)


def test_missing_files_are_named_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone.*data_batch_1\.bin"):
        load_images(f"cifar10:{tmp_path / 'gone'}")
    write_mnist(tmp_path)
    (tmp_path / IMAGES).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {IMAGES} \(or {IMAGES}\.gz\), only t10k"):
        load_images(f"mnist:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_text(f"text:{tmp_path / 'gone.txt'}", 64)


def test_bad_names_of_data_list_the_known_ones(tmp_path: Path) -> None:
    for load, words in (
        (lambda: load_images("mnist"), "digits, patches, mnist:FOLDER, cifar10:FOLDER, got 'mnist'"),
        (lambda: load_table("boston"), "wine.*boston"),
        (lambda: load_text("shakespeare", 64), "pydoc or text:FILE, got 'shakespeare'"),
        (lambda: load_text("pydoc", 257), "characters"),
    ):
        with pytest.raises(ValueError, match=words):
            load()
    write_mnist(tmp_path, train=11)
    with pytest.raises(ValueError, match="11 training images, too few"):
        load_images(f"mnist:{tmp_path}")


def test_text_that_is_too_short_or_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 959)
    with pytest.raises(ValueError, match="959 characters, too few"):
        load_text(f"text:{path}", 64)
    path.write_bytes(b"\xff\xfe" * 500)
    with pytest.raises(ValueError, match="not UTF-8"):
        load_text(f"text:{path}", 64)
