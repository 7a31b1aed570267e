"""Parquet files as columns: several of a part, and without the client of the hub."""

from __future__ import annotations

import sys

import pytest

from _data_folder import write_columns
from softsphere_lab.data import corpora, interactions
from softsphere_lab.data.columns import Columns
from softsphere_lab.errors import LabError


@pytest.fixture(autouse=True)
def no_client(monkeypatch):
    """As on a machine without a network, where `datasets` is not installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_files_of_a_part_follow_each_other(tmp_path):
    files = [tmp_path / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for i, file in enumerate(files):
        write_columns(file, text=[f"{i}a", f"{i}b"], number=[i, None])
    part = Columns.of([*map(str, files)])
    assert part.column_names == ["text", "number"] and len(part) == 4
    assert part["text"] == ["0a", "0b", "1a", "1b"] and part["number"] == [0, None, 1, None]


def test_files_of_a_part_with_other_columns_are_named(tmp_path):
    for part in corpora.PARTS:
        write_columns(tmp_path / "mine" / f"{part}.parquet", sentence=["a"])
    write_columns(tmp_path / "mine" / "train-1.parquet", phrase=["a"])
    with pytest.raises(LabError, match=r"--data-dir .*: cannot read mine \(ArrowInvalid"):
        corpora.read("mine", tmp_path)


def test_texts_and_interactions_of_a_folder_need_no_client_of_the_hub(tmp_path):
    for part in corpora.PARTS:
        write_columns(tmp_path / "ptb" / f"{part}.parquet", sentence=[f"a {part}"])
        write_columns(tmp_path / "gowalla" / f"{part}.parquet", user=[1], items=[[5, 6]])
    assert corpora.read("ptb", tmp_path).parts["test"] == ["a test"]
    assert interactions.load("gowalla", tmp_path).train.items.tolist() == [0, 1]


def test_a_folder_says_what_it_is_read_with(tmp_path, monkeypatch):
    for part in corpora.PARTS:
        write_columns(tmp_path / "ptb" / f"{part}.parquet", sentence=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        LabError, match=r"^parquet files are read with pyarrow; pip install pyarrow"
    ):
        corpora.read("ptb", tmp_path)
