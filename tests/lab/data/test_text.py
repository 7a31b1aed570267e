"""Texts as numbers: cuts of the vocabulary, parts of the text, n-grams and windows."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softsphere_lab.data import corpora, text
from softsphere_lab.errors import LabError

PARTS = ("train", "validation", "test")


def said(words: text.Text, part: str) -> list[str]:
    """The words of a part, as words."""
    return [words.words[i] for i in getattr(words, part).tolist()]


def naive(words: text.Text, D: int) -> tuple[Counter, list[list[str]]]:
    """A cut by its definition on strings: the counts, and the parts."""
    counts = dict(zip(words.words, words.counts.tolist(), strict=True))
    ranked = sorted((w for w in counts if w != "<unk>"), key=lambda w: -counts[w])
    kept = set(ranked[: D - 1])
    merged: Counter = Counter()
    for word, count in counts.items():
        merged[word if word in kept else "<unk>"] += count
    parts = [
        [word if word in kept else "<unk>" for word in said(words, part)]
        for part in ("train", "valid", "test")
    ]
    return merged, parts


WORDS = st.sampled_from(["<unk>", *"abcdefgh"])
LINES = st.lists(st.lists(WORDS, max_size=6).map(" ".join), min_size=1, max_size=8)


@given(lines=st.tuples(LINES, LINES, LINES), share=st.floats(0, 1))
def test_a_cut_is_that_of_the_definition(lines, share):
    corpus = corpora.Corpus(dict(zip(PARTS, lines, strict=True)))
    words = text.text_of(corpus)
    D = 2 + round(share * (len(words.words) - 2))
    cut = words.cut(D)
    counts, parts = naive(words, D)
    assert len(cut.words) == len(set(cut.words)) == D
    assert dict(zip(cut.words, cut.counts.tolist(), strict=True)) == counts
    assert cut.counts.tolist() == sorted(counts.values(), reverse=True)
    assert [said(cut, part) for part in ("train", "valid", "test")] == parts
    assert float(cut.counts.sum()) == float(words.counts.sum()) == len(words.train)
    assert cut.cut(D).fingerprint() == cut.fingerprint()


def small() -> text.Text:
    lines = ["c b b a a a", "b a"]
    return text.text_of(corpora.Corpus(dict.fromkeys(PARTS, lines)))


def test_the_unknown_word_of_a_cut_lands_where_its_count_is():
    words = small()
    assert words.words == ["a", "b", "</s>", "c", "<unk>"]
    assert words.counts.tolist() == [4, 3, 2, 1, 0]
    assert words.cut(4).words == ["a", "b", "</s>", "<unk>"]
    assert words.cut(3).words == ["a", "b", "<unk>"]  # three as of "b", and behind it
    assert words.cut(2).words == ["<unk>", "a"]
    assert words.cut(2).train.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 0]


def test_the_end_of_a_sentence_that_was_cut_is_the_unknown_word():
    words = small()
    assert words.words[words.end] == "</s>"
    assert words.cut(4).words[words.cut(4).end] == "</s>"
    assert words.cut(3).words[words.cut(3).end] == "<unk>"


@pytest.mark.parametrize("D", [-1, 0, 1, 6])
def test_cuts_that_cannot_be_are_refused(D):
    with pytest.raises(LabError, match=f"a text of 5 words .*, got {D}$"):
        small().cut(D)


def test_the_first_words_to_train_on_are_counted_and_leave_all_else_as_it_was():
    words = small()
    first = words.first(3)
    assert said(first, "train") == ["c", "b", "b"]
    assert first.words == words.words
    # words that are not there count one, so that they are possible
    counted = Counter(said(first, "train"))
    assert first.counts.tolist() == [max(1, counted[word]) for word in words.words]
    assert first.counts.dtype == words.counts.dtype
    for name in ("valid", "test"):
        assert torch.equal(getattr(first, name), getattr(words, name))
    assert len(words.first(10).train) == len(words.train) == 10
    for tokens in (0, -3, 11):
        with pytest.raises(LabError, match=f"of 10 words .*, got {tokens}$"):
            words.first(tokens)


def test_a_cut_of_the_first_words_counts_the_words_that_are_trained_on():
    cut = small().first(3).cut(3)
    assert cut.words == ["b", "a", "<unk>"]
    # "c" is unknown; that it stands in for words that do not occur adds nothing to its count
    assert dict(zip(cut.words, cut.counts.tolist(), strict=True)) == {"b": 2, "a": 1, "<unk>": 1}
    assert cut.counts.dtype == small().counts.dtype
    assert float(small().cut(4).counts.sum()) == len(small().train)


def test_held_out_words_can_be_fewer_and_the_rest_is_as_it_was():
    whole = text.load("generated")
    some = whole.held(100)
    assert torch.equal(some.valid, whole.valid[:100]) and torch.equal(some.test, whole.test[:100])
    assert torch.equal(some.train, whole.train) and some.words == whole.words
    assert len(whole.held(10**9).test) == len(whole.test)


def test_the_fingerprint_is_of_the_words_and_of_every_part():
    words = small()
    one = words.fingerprint()
    assert (one["train"], one["valid"], one["test"], one["words"]) == (10, 10, 10, 5)
    assert re.fullmatch("[0-9a-f]{12}", one["sha256"])
    seen = {one["sha256"]}
    changes = {"words": [*words.words[:-1], "z"]}
    changes |= {part: getattr(words, part).roll(1) for part in ("train", "valid", "test")}
    for name, value in changes.items():
        other = text.replace(words, **{name: value}).fingerprint()
        assert {**other, "sha256": ""} == {**one, "sha256": ""}
        seen.add(other["sha256"])
    assert len(seen) == 5


def test_n_grams_begin_with_the_end_of_a_sentence():
    x, y = text.ngrams(torch.tensor([5, 6, 7]), 3, end=0)
    assert x.tolist() == [[0, 0], [0, 5], [5, 6]]
    assert y.tolist() == [5, 6, 7]


def test_windows_lie_side_by_side_and_a_rest_is_left_out():
    x, y = text.windows(torch.tensor([5, 6, 7, 8, 9]), 2, end=0)
    assert x.tolist() == [[0, 5], [6, 7]]
    assert y.tolist() == [[5, 6], [7, 8]]
