"""Data sets: sizes, ranges, the held-out part, and what is said when one cannot be had."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from _data_folder import needs_data, write_columns
from softsphere_lab.data import images as data
from softsphere_lab.data.columns import Columns
from softsphere_lab.errors import LabError


def png(pixels: np.ndarray) -> dict:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(folder: Path, columns: tuple[str, str], shape: tuple[int, ...]) -> None:
    """Train and test parts of 20 and 10 pictures whose only grey is their label."""
    for part, count in (("train", 20), ("test", 10)):
        labels = [i % 10 for i in range(count)]
        pictures = [png(np.full(shape, 20 * label, dtype=np.uint8)) for label in labels]
        named = {columns[0]: pictures, columns[1]: labels}
        write_columns(folder / f"{part}-00000-of-00001.parquet", **named)


def test_digits_are_split_by_class_standardised_and_always_the_same():
    one, two = data.load("digits"), data.load("digits")
    assert [len(part) for part in (one.train, one.valid, one.test)] == [1293, 144, 360]
    assert one.shape == (1, 8, 8) and one.num_classes == 10
    torch.testing.assert_close(one.train.x.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.train.x.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    for part in ("train", "valid", "test"):
        torch.testing.assert_close(getattr(one, part).x, getattr(two, part).x, rtol=0, atol=0)
    rows = torch.cat([one.train.x, one.valid.x, one.test.x]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797


@pytest.mark.parametrize("place", ["cifar10/data", "."])
@pytest.mark.parametrize(
    ("name", "columns", "shape"),
    [
        ("mnist", ("image", "label"), (28, 28)),
        ("cifar10", ("img", "label"), (32, 32, 3)),
        ("cifar100", ("img", "fine_label"), (32, 32, 3)),
    ],
)
def test_a_local_folder_has_the_schema_of_the_hub(tmp_path, place, name, columns, shape):
    folder = tmp_path / "sets" / place.replace("cifar10", name)
    write_parquet(folder, columns, shape)
    images = data.load(name, tmp_path / "sets")
    assert images.shape == ((1, 28, 28) if len(shape) == 2 else (3, 32, 32))
    assert len(images.train) == 18 and len(images.valid) == 2 and len(images.test) == 10
    grey = images.test.x[:, 0, 0, 0]
    assert torch.equal(grey.argsort(), images.test.y.argsort())


def test_another_set_in_the_folder_is_not_taken_for_the_one_asked_for(tmp_path):
    write_parquet(tmp_path / "mnist", ("image", "label"), (28, 28))
    with pytest.raises(LabError, match="has no cifar10/train"):
        data.load("cifar10", tmp_path)


def grey(value: int, *shape: int) -> dict:
    return png(np.full(shape, value, dtype=np.uint8))


PICTURES = [grey(i, 8, 8) for i in range(10)]
SPOILED = {
    "a label too large": (
        PICTURES,
        [*range(9), 10],
        "label must be an integer from 0 to 9, got 10",
    ),
    "a negative label": (PICTURES, [*range(9), -1], "got -1 in row 9"),
    "no label": (PICTURES, [*range(9), None], "got None in row 9"),
    "words": (PICTURES, ["one"] * 10, "got 'one' in row 0"),
    "fractions": (PICTURES, [1.0] * 10, "got 1.0 in row 0"),
    "two sizes": (
        [*PICTURES[:9], grey(1, 8, 9)],
        range(10),
        r"one size, got \(8, 8\) and \(8, 9\)",
    ),
    "two kinds": ([*PICTURES[:9], grey(1, 8, 8, 3)], range(10), "one size"),
    "another kind": ([grey(1, 8, 8, 4)] * 10, range(10), "grey or RGB with 8 bits, got RGBA"),
    "no image": ([*PICTURES[:9], None], range(10), "no image in row 9"),
    "no images": ([1.5] * 10, range(10), "cannot read the images in column image"),
    "a spoiled image": (
        [*PICTURES[:9], {"bytes": b"\x89PNG\r\n", "path": None}],
        range(10),
        "cannot read the images",
    ),
    "too few": (PICTURES[:9], range(9), "at least 10 images, got 9"),
    "none": (PICTURES[:0], range(0), "at least 10 images, got 0"),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_spoiled_set_is_one_line_that_names_what_is_wrong(case, part, tmp_path):
    pictures, labels, words = SPOILED[case]
    write_columns(tmp_path / "rows.parquet", image=list(pictures), label=list(labels))
    rows = Columns.of([str(tmp_path / "rows.parquet")])
    with pytest.raises(LabError, match=words) as caught:
        data.as_split(rows, data.HUBS["mnist"], f"--data-dir sets: mnist/{part}")
    said = str(caught.value)
    assert said.startswith(f"--data-dir sets: mnist/{part}") and "\n" not in said


def test_a_spoiled_set_stops_the_command_before_a_folder_is_made(tmp_path, monkeypatch, capsys):
    from softsphere_lab.cli import app as cli

    write_parquet(tmp_path / "sets/mnist", ("image", "label"), (28, 28))
    write_parquet(tmp_path / "other/mnist", ("image", "label"), (27, 28))
    (tmp_path / "other/mnist/test-00000-of-00001.parquet").rename(
        tmp_path / "sets/mnist/test-00000-of-00001.parquet"
    )
    options = ["--dataset", "mnist", "--data-dir", str(tmp_path / "sets")]
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["softsphere", "compare", *options, *out])
    assert cli.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "sets: mnist: images must be of one size" in said[0]
    assert not (tmp_path / "run").exists()


def test_an_empty_file_is_named(tmp_path):
    write_parquet(tmp_path / "mnist", ("image", "label"), (28, 28))
    (tmp_path / "mnist/test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(LabError, match=r"--data-dir .*: cannot read mnist"):
        data.load("mnist", tmp_path)


def test_a_channel_that_never_changes_stays_finite(monkeypatch):
    x = torch.rand(40, 2, 4, 4)
    x[:, 1] = 0.3
    part = data.Split(x, torch.arange(40) % 10)
    monkeypatch.setitem(data.DATASETS, "digits", lambda _: (part, part, 10))
    images = data.load("digits")
    assert images.train.x.isfinite().all() and images.test.x.isfinite().all()
    torch.testing.assert_close(images.test.x[:, 1], torch.zeros(40, 4, 4), atol=1e-4, rtol=0)


def test_the_fingerprint_is_of_the_data_alone(monkeypatch):
    one = data.load("digits").fingerprint()
    assert one == data.load("digits").fingerprint()
    assert (one["train"], one["test"], one["shape"]) == (1437, 360, [1, 8, 8])
    train, test, classes = data.digits()
    changed = data.Split(test.x, test.y.roll(1))
    monkeypatch.setitem(data.DATASETS, "digits", lambda _: (train, changed, classes))
    assert data.load("digits").fingerprint()["sha256"] != one["sha256"]


def test_a_folder_for_digits_and_one_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(LabError, match="leave --data-dir out"):
        data.load("digits", tmp_path)
    with pytest.raises(LabError, match="no such folder"):
        data.load("mnist", tmp_path / "nowhere")


def test_wrong_columns_and_broken_files_are_named(tmp_path):
    write_parquet(tmp_path / "mnist", ("picture", "digit"), (28, 28))
    with pytest.raises(LabError, match="must have columns image and label, got picture, digit"):
        data.load("mnist", tmp_path)
    for path in (tmp_path / "mnist").iterdir():
        path.write_bytes(b"no parquet")
    with pytest.raises(LabError, match="cannot read mnist"):
        data.load("mnist", tmp_path)


def test_an_unreachable_hub_names_the_option_for_a_local_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LabError, match=r"ylecun/mnist .*no route to host.*--data-dir") as caught:
        data.load("mnist")
    assert "\n" not in str(caught.value)


@needs_data
@pytest.mark.slow
def test_mnist_is_whole():
    images = data.load("mnist")
    assert [len(part) for part in (images.train, images.valid, images.test)] == [54000, 6000, 10000]
    assert images.shape == (1, 28, 28)
    # the published counts of each digit in the test part
    assert images.test.y.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]


def test_sets_of_the_hub_alone_need_its_client(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it was not installed
    monkeypatch.delenv(data.VARIABLE, raising=False)
    assert data.load("digits").train
    write_parquet(tmp_path / "mnist", ("image", "label"), (28, 28))
    assert len(data.load("mnist", tmp_path).test) == 10
    with pytest.raises(LabError, match=r"hub are read with datasets; pip install datasets, or .*"):
        data.load("mnist")


def file_of(kind: str, **options: object) -> bytes:
    """An image whose pixels all differ, as a file."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.arange(8 * 6, dtype=np.uint8).reshape(8, 6)
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_images_are_those_that_the_client_of_the_hub_decodes(tmp_path):
    """Also photographs that say which side is up, and bytes without a dict."""
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    files = [file_of("PNG"), file_of("JPEG"), file_of("JPEG", exif=turned)]
    (tmp_path / "a.png").write_bytes(files[0])
    said = [{"bytes": content, "path": "name"} for content in files]
    said.append({"bytes": None, "path": str(tmp_path / "a.png")})
    rows = datasets.Dataset.from_dict({"image": said}).cast_column("image", datasets.Image())
    theirs = [np.asarray(picture) for picture in rows["image"][:]]
    assert [picture.shape for picture in theirs] == [(8, 6), (8, 6), (6, 8), (8, 6)]
    for ours in (said, files):
        for one, other in zip(map(data._picture, ours), theirs, strict=False):
            np.testing.assert_array_equal(np.asarray(one), other)
