"""Corpora: what becomes a word, and what is said when a set cannot be read."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from _data_folder import FOLDER, needs_data, write_columns
from softsphere_lab.data import corpora, text
from softsphere_lab.data import images as data
from softsphere_lab.errors import LabError

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    """Only tests that name a folder read one."""
    monkeypatch.delenv(data.VARIABLE, raising=False)


def write(folder: Path, column: str, **parts: list) -> Path:
    """A parquet file for each part in that folder, whose parent is given back."""
    for part, rows in parts.items():
        write_columns(folder / f"{part}.parquet", **{"title": ["t"] * len(rows), column: rows})
    return folder.parent


def said(words: text.Text, part: str) -> list[str]:
    """The words of a part, as words."""
    return [words.words[i] for i in getattr(words, part).tolist()]


def test_ptb_has_an_end_mark_a_sentence_and_marks_unknown_words(tmp_path):
    folder = write(
        tmp_path / "ptb",
        "sentence",
        train=["b a <unk>", "a b a"],
        validation=["a c"],
        test=["N's b", "b"],
    )
    words = text.load("ptb", folder)
    # as common ones in the order of the text, the unknown word behind them
    assert words.words == ["a", "b", "</s>", "<unk>"]
    assert words.counts.tolist() == [3, 2, 2, 1]
    assert said(words, "train") == ["b", "a", "<unk>", "</s>", "a", "b", "a", "</s>"]
    assert said(words, "valid") == ["a", "<unk>", "</s>"]
    assert said(words, "test") == ["<unk>", "b", "</s>", "b", "</s>"]
    assert words.train.dtype == words.test.dtype == torch.int64


def test_an_unknown_word_that_is_not_in_the_text_counts_one(tmp_path):
    folder = write(tmp_path / "mine", "sentence", train=["a a b"], validation=["a"], test=["c"])
    words = text.load("mine", folder)
    assert words.words[-1] == "<unk>"
    assert words.counts.tolist() == [2, 1, 1, 1]


ARTICLE = "The Cat's dog\n\n \nTHE don’t-stop, the 1980s' café\n"
# what the documented expression and the lower case make of it
PARAGRAPHS = [
    ["the", "cat's", "dog", "</s>"],
    ["the", "don’t", "-", "stop", ",", "the", "1980s", "'", "café", "</s>"],
]


def test_wikipedia_is_paragraphs_of_words_seen_three_times(tmp_path):
    folder = write(
        tmp_path / "wikipedia",
        "text",
        train=[ARTICLE, ARTICLE, "the dog\n"],
        validation=[ARTICLE],
        test=["The UNHEARD\n\nthe"],
    )
    words = text.load("wikipedia", folder)
    flat = [word for line in PARAGRAPHS for word in line]
    train = [*flat, *flat, "the", "dog", "</s>"]
    # of the words once or twice in the articles all become one, seven "the" and three dogs stay
    assert set(words.words) == {"the", "</s>", "dog", "<unk>"}
    known = [word if word in words.words else "<unk>" for word in train]
    assert said(words, "train") == known
    assert dict(zip(words.words, words.counts.tolist(), strict=True)) == Counter(known)
    assert words.counts.tolist() == sorted(words.counts.tolist(), reverse=True)
    assert said(words, "valid") == known[: len(flat)]
    assert said(words, "test") == ["the", "<unk>", "</s>", "the", "</s>"]
    lines = [[*corpora.WORD.findall(line), "</s>"] for line in corpora.paragraphs([ARTICLE])]
    assert lines == PARAGRAPHS


def test_words_that_are_all_too_rare_are_named(tmp_path):
    rows = {part: ["one two"] for part in PARTS}
    with pytest.raises(LabError, match=r"--dataset wikipedia: no word .* occurs 3 times"):
        text.load("wikipedia", write(tmp_path / "wikipedia", "text", **rows))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_words_is_named(tmp_path, part):
    rows = {name: ["one one one"] for name in PARTS} | {part: [" \n", ""]}
    folder = write(tmp_path / "wikipedia", "text", **rows)
    with pytest.raises(LabError, match=f"--dataset wikipedia: the {part} part must have words"):
        text.load("wikipedia", folder)


def test_the_generated_text_is_small_and_always_the_same():
    one, two = text.load("generated"), text.load("generated")
    assert one.fingerprint() == two.fingerprint()
    # Of the text as it was first made: another one makes other records.
    assert one.fingerprint() == {
        "train": 6001,
        "valid": 1001,
        "test": 1003,
        "words": 289,
        "sha256": "950b82796bf8",
    }
    assert {"w0", "w1", "</s>", "<unk>"} <= set(one.words)
    half = one.counts.cumsum(0) / one.counts.sum()
    assert half[len(half) // 10] > 0.5  # Zipf's: a tenth of the words is half of the text


def bits(text: text.Text, n: int) -> float:
    """Bits a word of the test part, from counts of the n-grams mixed with those of the words."""
    D, words = len(text.words), text.counts.double() / text.counts.sum()
    if n == 1:
        return float(-words[text.test].log2().mean())
    pairs = torch.zeros(D, D, dtype=torch.float64)
    before = torch.cat([torch.tensor([text.end]), text.train[:-1]])
    pairs.index_put_((before, text.train), torch.ones(len(before)).double(), accumulate=True)
    last = torch.cat([torch.tensor([text.end]), text.test[:-1]])
    # five imagined occurrences of the word before
    chance = (pairs[last, text.test] + 5 * words[text.test]) / (pairs[last].sum(1) + 5)
    return float(-chance.log2().mean())


def test_two_words_of_the_generated_text_tell_more_than_one():
    """On the test part, which the counts have not seen: entropies of the counts flatter."""
    generated = text.load("generated")
    one, two = bits(generated, 1), bits(generated, 2)
    assert one < math.log2(len(generated.words)) - 1
    assert two < one - 1


class Rows(dict):
    """A part of a set as the client of the hub gives it."""

    column_names = property(lambda self: list(self))


def test_without_a_folder_ptb_comes_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def hub(*names, **options):
        asked.append((*names, options))
        return {part: Rows(sentence=[f"a {part}"]) for part in PARTS}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    words = text.load("ptb")
    assert asked == [("ptb-text-only/ptb_text_only", {"revision": "refs/convert/parquet"})]
    assert said(words, "train") == ["a", "train", "</s>"]
    assert said(words, "valid") == said(words, "test") == ["a", "<unk>", "</s>"]


def test_without_a_folder_wikipedia_is_the_first_articles_of_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, taken = [], []

    def hub(*names, **options):
        asked.append((*names, options))
        for i in range(10**6):
            taken.append(i)
            yield {"title": "t", "text": f"Article {i}\n"}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    parts = corpora.wikipedia(None).parts
    assert [len(parts[part]) for part in PARTS] == [4200, 128, 128]
    assert (parts["train"][0], parts["train"][-1]) == ("article 0", "article 4199")
    assert (parts["validation"][0], parts["test"][0]) == ("article 4200", "article 4328")
    assert len(taken) == 4456
    options = {"split": "train", "streaming": True}
    assert asked == [("wikimedia/wikipedia", "20231101.en", options)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("name", "hub"),
    [("ptb", "ptb-text-only/ptb_text_only"), ("wikipedia", "wikimedia/wikipedia")],
)
def test_an_unreachable_hub_names_the_option_for_a_local_folder(monkeypatch, name, hub, late):
    datasets = pytest.importorskip("datasets")

    class Torn(dict):
        """Breaks off once it is read."""

        def __getitem__(self, _):
            raise ConnectionError("no route\nto host")

        __iter__ = lambda self: self[0]  # noqa: E731

    def unreachable(*_, **__):
        return Torn() if late else Torn()[0]

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LabError, match=rf"{hub} .*no route to host.*--data-dir") as caught:
        text.load(name)
    assert "\n" not in str(caught.value)
    assert f"{name}/train.parquet, {name}/validation.parquet and {name}/test" in str(caught.value)


def test_sets_that_cannot_be_had_say_what_would_do(tmp_path):
    known = "ptb, wikipedia, generated"
    with pytest.raises(LabError, match=f"--dataset must be one of {known}, .*got 'nowhere'"):
        text.load("nowhere")
    with pytest.raises(LabError, match=f"has no nowhere/train.* --dataset one of {known}"):
        text.load("nowhere", tmp_path)
    with pytest.raises(LabError, match=r"has no ptb/train\*\.parquet, .*leave it .*from the hub"):
        text.load("ptb", tmp_path)
    with pytest.raises(LabError, match="no such folder"):
        text.load("wikipedia", tmp_path / "nowhere")
    with pytest.raises(LabError, match=r"generated .*leave --data-dir out"):
        text.load("generated", tmp_path)


def test_a_folder_of_the_environment_is_read_and_does_not_disturb_the_generated_text(
    tmp_path, monkeypatch
):
    folder = write(tmp_path / "ptb", "sentence", train=["a"], validation=["a"], test=["a"])
    monkeypatch.setenv(data.VARIABLE, str(folder))
    assert len(text.load("ptb").train) == 2
    assert len(text.load("generated").train) == 6001


SPOILED = {
    "column": ("phrase", ["a"], "must have a column sentence, got title, phrase"),
    "none": ("sentence", ["a", None], "sentence must be text, got None in row 1"),
    "numbers": ("sentence", [1, 2], "sentence must be text, got 1 in row 0"),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("name", ["ptb", "mine"])
def test_a_spoiled_set_is_one_line_that_names_what_is_wrong(tmp_path, name, case):
    column, rows, words = SPOILED[case]
    folder = write(tmp_path / name, column, **dict.fromkeys(PARTS, rows))
    with pytest.raises(LabError, match=words) as caught:
        text.load(name, folder)
    assert str(caught.value).startswith(f"--data-dir {folder}: {name}/train")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    folder = write(tmp_path / "ptb", "sentence", train=["a"], validation=["a"], test=["a"])
    (tmp_path / "ptb" / "test.parquet").write_bytes(b"")
    with pytest.raises(LabError, match=r"--data-dir .*: cannot read ptb"):
        text.load("ptb", folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_without_rows_is_named(tmp_path, part):
    rows = {name: ["a"] for name in PARTS} | {part: []}
    folder = write(tmp_path / "ptb", "sentence", **rows)
    with pytest.raises(LabError, match=rf"--data-dir .*: ptb/{part} must have rows, got none"):
        text.load("ptb", folder)


@needs_data
def test_ptb_is_whole():
    words = text.load("ptb", Path(FOLDER))
    assert len(words.words) == 10_000
    assert [len(part) for part in (words.train, words.valid, words.test)] == [
        929_589,
        73_760,
        82_430,
    ]


@needs_data
@pytest.mark.slow
def test_wikipedia_is_whole():
    words = text.load("wikipedia", Path(FOLDER))
    assert len(words.words) >= 60_000
    assert words.counts.min() >= 3
    assert words.counts.double().sum() == len(words.train) > 10_000_000
