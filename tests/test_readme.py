"""The README is short, its examples run, its links work, and its numbers are the records'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = {
    path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
LINKS = [
    (path, link)
    for path, text in PAGES.items()
    for link in re.findall(r"\]\(([^)]+)\)", text)
    if "://" not in link
]
MEASURED = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")
# The costs that the README quotes: the layer's section of docs/costs.md, the row, the column, and
# the words of the README around the number.
QUOTED = [
    (
        "clusteredloss",
        "`F.linear`, `F.cross_entropy` and SGD",
        "m = 512, D = 74,655, d = 128",
        "{} times faster than softmax at m = 512, D = 74,655, d = 128",
    ),
    (
        "clusteredloss",
        "`F.linear`, `F.cross_entropy` and SGD",
        "m = 512, D = 1,000,000, d = 128",
        "and {} times faster at a million classes",
    ),
    (
        "clusteredloss",
        "sampled softmax with 1,024 negatives and sparse SGD",
        "m = 512, D = 74,655, d = 128",
        "takes {} of the time of `ClusteredLoss` at m = 512, D = 74,655, d = 128",
    ),
    (
        "linearsphericalloss",
        "m = 2,048, D = 100,000, d = 512",
        "the same, compiled",
        "{} times faster than compiled softmax at m = 2,048, D = 100,000, d = 512",
    ),
    (
        "factoredsphericalloss",
        "`F.linear`, `F.cross_entropy` and SGD",
        "m = 200, D = 793,471, d = 512",
        "{} times faster than softmax at m = 200, D = 793,471, d = 512",
    ),
    (
        "factoredsphericalloss",
        "sampled softmax with 1,024 negatives and sparse SGD",
        "m = 200, D = 793,471, d = 512",
        "and {} of the time of `FactoredSphericalLoss` at m = 200, D = 793,471, d = 512",
    ),
    (
        "two-processes",
        "`LinearSphericalLoss`, Gram engine",
        "m = 512, D = 1,000,000, d = 128",
        "at a million classes is {} times (linear)",
    ),
    (
        "two-processes",
        "`FactoredSphericalLoss`",
        "m = 512, D = 1,000,000, d = 128",
        "to {} times (factored) faster than vocabulary-parallel softmax",
    ),
    (
        "losses-on-logits",
        "`TaylorSoftmaxLoss()`",
        "time",
        "`TaylorSoftmaxLoss` takes {} of the time of `F.cross_entropy` at 4,096 × 50,257",
    ),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_it_is_made_to_be_read():
    assert len(EXAMPLES) == 3
    assert len(README.splitlines()) <= 120


def anchors(text: str) -> set[str]:
    """The names that a page gives its headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def section(page: str, anchor: str) -> str:
    """The text below a heading, up to the next of its level. anchor: the first word will do."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    return next(
        part
        for part in parts
        if any(x == anchor or x.startswith(f"{anchor}-") for x in anchors(part))
    )


def cell(part: str, row: str, column: str) -> str:
    """What a table of some text has in a row and a column."""
    table = [
        [x.strip() for x in line.strip("|").split("|")]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    head = next(line for line in table if column in line)
    return next(line for line in table if line[0] == row)[head.index(column)]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{p.name}-{link}" for p, link in LINKS])
def test_links_lead_somewhere(page, link):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.read_text())


def test_results_are_those_of_the_sections_that_they_link_to():
    page = PAGES[ROOT / "docs" / "results.md"]
    lines = re.findall(
        r"^- \[[^]]+\]\(docs/results\.md#([^)]+)\)((?:.|\n)*?)(?=^- |\n\n)", README, re.M
    )
    assert len(lines) >= 6
    for anchor, text in lines:
        known = set(MEASURED.findall(section(page, anchor)))
        assert [number for number in MEASURED.findall(text) if number not in known] == []
    assert sum(len(MEASURED.findall(text)) for _, text in lines) >= 25


def test_costs_are_those_of_the_page_of_costs():
    """Each cost of the README's table is that of its layer and size in docs/costs.md."""
    page = PAGES[ROOT / "docs" / "costs.md"]
    for anchor, row, column, words in QUOTED:
        assert words.format(cell(section(page, anchor), row, column)) in README
    (flat,) = re.findall(r"A step at D = 10,000,000 takes (\S+) times that at D = 10,000,", page)
    assert f"ten million classes cost {flat} times what ten thousand do" in README
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    found = [x for row in rows for x in re.findall(r"\d+(?:\.\d+)? (?:times|of the time)", row)]
    assert len(found) == len(QUOTED) + 1
