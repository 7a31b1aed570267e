"""Word similarity: files of pairs, and the rank correlation by its definition."""

from __future__ import annotations

import pytest
import torch

from _data_folder import needs_data
from softsphere_lab.data import images as data
from softsphere_lab.data import similarity, text
from softsphere_lab.data.similarity import Similarity, load_pairs, spearman
from softsphere_lab.errors import LabError

WORDS = ["the", "cat", "Dog", "<unk>", "car", "dog"]


def write(folder, file: str, content: bytes):
    (folder / "word-similarity").mkdir(exist_ok=True)
    (folder / "word-similarity" / file).write_bytes(content)
    return folder


def test_the_pairs_of_a_folder_are_those_that_it_has(tmp_path, monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    assert load_pairs(None) == load_pairs(tmp_path) == load_pairs(tmp_path / "nowhere") == {}
    content = b"# Words\n# a\tb\t1\nold\tnew\t1.58\n\nJerusalem\tIsrael\t8\n"
    write(tmp_path, "wordsim353.tsv", content)
    pairs = [("old", "new", 1.58), ("Jerusalem", "Israel", 8.0)]
    assert load_pairs(tmp_path) == {"wordsim353": pairs}
    write(tmp_path, "simlex999.txt", b"a\tb\t2\r\n")
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    assert load_pairs(None) == {"simlex999": [("a", "b", 2.0)], "wordsim353": pairs}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"old new 1.58", "two words and a score with tabs between, got 'old new 1.58'"),
        (b"old\tnew", "two words and a score"),
        (b"old\tnew\t1\t2", "two words and a score"),
        (b"old\t\t1", "two words and a score"),
        (b"old\tnew\tsome", "finite score, got 'some'"),
        (b"old\tnew\tnan", "finite score, got 'nan'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    write(tmp_path, "simlex999.txt", b"# Words\na\tb\t1\n" + line + b"\n")
    with pytest.raises(LabError, match=rf"simlex999.txt, line 3 must .*{words}") as caught:
        load_pairs(tmp_path)
    assert "\n" not in str(caught.value) and "--data-dir" in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    write(tmp_path, "simlex999.txt", b"\xff\xfe")
    with pytest.raises(LabError, match=r"cannot read .*simlex999.txt"):
        load_pairs(tmp_path)


def test_the_correlation_is_that_of_the_ranks():
    """By hand: the cosines rank 3, 1, 2, 4 and the scores 4, 1, 2, 3."""
    angles = {"a": 0.0, "b": 0.3, "c": 1.2, "d": 0.9, "e": 0.1}
    # lengths and dtype do not count
    rows = [[5.0 * torch.tensor(x).cos(), 5.0 * torch.tensor(x).sin()] for x in angles.values()]
    people = [("a", "b", 9.0), ("a", "c", 1.0), ("a", "d", 2.0), ("a", "e", 8.0)]
    # 1 − 6 Σ δ² / (n (n² − 1)) with δ = 1, 0, 0, 1
    expected = Similarity(pytest.approx(1 - 6 * 2 / (4 * 15)), 4, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        embeddings = torch.tensor(rows, dtype=dtype, requires_grad=True)
        assert spearman(list(angles), embeddings, people) == expected


def rows(*angles: float) -> torch.Tensor:
    return torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], 1).double()


def test_case_does_not_count_and_the_commoner_of_two_words_has_its_say():
    embeddings = rows(0.0, 0.1, 0.2, 0.3, 1.4, 3.0)
    people = [("CAT", "dog", 3.0), ("the", "DOG", 2.0), ("cat", "Car", 1.0), ("cat", "boat", 9.0)]
    assert spearman(WORDS, embeddings, people) == Similarity(pytest.approx(1.0), 4, 3)


def test_the_unknown_word_is_none():
    people = [("the", "cat", 1.0), ("cat", "car", 2.0), ("<unk>", "cat", 3.0), ("<UNK>", "x", 1.0)]
    assert spearman(WORDS, rows(*range(6)), people) == Similarity(None, 4, 2)


PAIRS = [("the", "cat", 1.0), ("the", "dog", 2.0), ("the", "car", 3.0)]


@pytest.mark.parametrize(
    ("embeddings", "pairs"),
    [
        (rows(*range(6)), PAIRS[:2]),
        (rows(*range(6)), []),
        (rows(*range(6)), [(one, other, 5.0) for one, other, _ in PAIRS]),
        (
            torch.tensor([[0.1, 0.7, 0.3]]).double() * torch.arange(1, 7)[:, None].double().sqrt(),
            PAIRS,
        ),
        (torch.zeros(6, 2), PAIRS),
        (torch.full((6, 2), torch.nan), PAIRS),
    ],
    ids=["two", "none", "scores alike", "parallel", "nothing", "not a number"],
)
def test_there_is_none_where_nothing_can_be_ranked(embeddings, pairs):
    assert spearman(WORDS, embeddings, pairs) == Similarity(None, len(pairs), len(pairs))


@pytest.mark.parametrize("shape", [(5, 2), (6,), (6, 2, 2)])
def test_embeddings_are_one_a_word(shape):
    with pytest.raises(ValueError, match="a row for each of 6 words"):
        spearman(WORDS, torch.zeros(shape), PAIRS)


@needs_data
def test_the_public_pairs_are_whole_and_ptb_has_most_of_their_words():
    pairs = load_pairs()
    assert {name: len(found) for name, found in pairs.items()} == {
        "simlex999": 999,
        "wordsim353": 353,
    }
    words = text.load("ptb").words
    embeddings = torch.randn(len(words), 8, generator=torch.Generator().manual_seed(0))
    for found in pairs.values():
        result = spearman(words, embeddings, found)
        assert result.covered > len(found) / 2 > similarity.FEWEST_PAIRS
        assert result.correlation is not None and abs(result.correlation) < 0.3
