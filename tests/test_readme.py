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
MEASURED = re.compile(r"\d+\.\d+ ± \d+\.\d+|p = \d\.\d+")


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
    """The text below a heading, up to the next of its level."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    return next(part for part in parts if anchor in anchors(part))


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
        quoted = MEASURED.findall(text)
        numbers = [x.removeprefix("p = ") for x in quoted]
        below = section(page, anchor)
        assert [number for number in numbers if number not in below] == []
    assert len(MEASURED.findall(README)) >= 12


def test_costs_are_those_of_the_page_of_costs():
    """Each cost of the README's table is in a row of docs/costs.md with its size."""
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    quoted = [
        cost for row in rows for cost in re.findall(r"(\d+(?:\.\d+)?) (?:times|of the time)", row)
    ]
    assert len(quoted) == 8
    costs = set(
        re.findall(r"(?<![\d.,])\d+(?:\.\d+)?(?![\d,]|\.\d)", PAGES[ROOT / "docs" / "costs.md"])
    )
    assert [cost for cost in quoted if cost not in costs] == []
