"""The page of a comparison: what it holds, that it stands alone, and that a browser can use it."""

from __future__ import annotations

import importlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from _lab_results import image_end
from softsphere_lab.report import web_style
from softsphere_lab.report.results import Results
from softsphere_lab.report.summary import columns_with_differences, finding, summarise
from softsphere_lab.report.web_page import comparison_page

ROOT = Path(__file__).parents[3]
CONFIG = {"experiment": "compare", "dataset": "digits", "model": "mlp", "epochs": 3,
          "losses": ["softmax", "z_loss"], "data": {"train": 9}}  # fmt: skip
HOSTILE = "softsphere compare --out '</script><script>alert(1)</script>&\"'"
ENVIRONMENT = [
    {"command": HOSTILE, "date": "2026-11-27", "python": "3.11.7", "commit": None,
     "packages": {"softsphere": "0.1.0", "torch": "2.13.0"}, "machine": "x86_64",
     "system": "Linux", "threads": 2, "cuda": None}
]  # fmt: skip
VOID = {"meta", "br", "line", "circle", "path", "polygon", "polyline"}


class Parsed(HTMLParser):
    """The elements of a page with their attributes and their text; unbalanced ones are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for place in self.open:
            self.elements[place][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(given, "".join(text)) for name, given, text in self.elements if name == tag]


def results(diverged: bool = False) -> Results:
    ends = [
        image_end(loss, seed, error + 0.01 * seed, diverged=diverged)
        for loss, error in (("softmax", 0.1), ("z_loss", 0.05))
        for seed in (0, 1, 2)
    ]
    epochs = [
        {"loss": end["loss"], "seed": end["seed"], "setting": end["setting"], "lr": 0.01,
         "epoch": epoch, "valid_error": end["final"]["valid_error"] * 4 / epoch}
        for end in ends
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    return Results.of_lines(CONFIG, [*ends, *([] if diverged else epochs)])


def page_of(found: Results, unfinished: str = "") -> str:
    return comparison_page(found, summarise(found), ENVIRONMENT, unfinished)


def test_it_has_the_table_the_finding_and_where_it_ran():
    found = results()
    rows = summarise(found)
    page = Parsed(page_of(found, "2 of 6 final runs are finished"))
    said = [text for _, text in page.all("p")]
    assert finding(rows) in said and "2 of 6 final runs are finished" in said
    cells = [
        text for tag, _, parts in page.elements if tag in ("th", "td") for text in ["".join(parts)]
    ]
    for title, cell in columns_with_differences(rows):
        assert title in cells and all(cell(row) in cells for row in rows)
    assert HOSTILE in cells and "2.13.0" in cells and "data: train" in cells


def test_names_are_escaped_and_nothing_is_loaded():
    text = page_of(results())
    page = Parsed(text)
    assert "<script>alert" not in text
    scripts = page.all("script")
    assert [given.get("type") for given, _ in scripts] == ["application/json", None]
    loading = [(tag, key) for tag, given, _ in page.elements for key in given
               if key in ("src", "href", "srcset", "action", "data")]  # fmt: skip
    assert loading == [] and not re.search(r"https?://|@import|url\(", text)


def test_data_in_a_script_cannot_end_it():
    found = results()
    for line in (*found.epochs, *found.lines):
        line["setting"] = "</script><b>"
    scripts = Parsed(page_of(found)).all("script")
    assert json.loads(scripts[0][1])["curves"][0]["name"] == "</script><b>"


def test_hovering_and_the_table_of_numbers_say_the_means_over_the_seeds():
    page = Parsed(page_of(results()))
    data = json.loads(page.all("script")[0][1])
    assert data["epochs"] == [1, 2, 3]
    assert data["curves"][0]["means"] == pytest.approx([44, 22, 44 / 3])
    (numbers,) = [text for _, text in page.all("table") if "after each epoch" in text]
    assert "44.00" in numbers and "14.67" in numbers


def drawings(page: str, kind: str) -> list[str]:
    """The drawings of a kind, each of which a page has twice: wide and narrow."""
    found = [x for x in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if kind in x]
    assert len(found) == 2
    return found


def value_at(marks: list[tuple[str, str]], of=float, back=float):
    """Returns what the value at a place is, given places with their values on a straight axis."""
    (a, first), (b, last) = ((float(at), of(float(value))) for at, value in (marks[0], marks[-1]))
    return lambda at: back(first + (float(at) - a) / (b - a) * (last - first))


def test_the_lines_are_at_the_means_of_the_seeds_and_the_bands_at_their_ends():
    for drawing in drawings(page_of(results()), "Learning curves"):
        marks = re.findall(r'y2="([\d.]+)"/><text[^>]*>([\d.]+)</text>', drawing)
        error = value_at(marks, math.log, math.exp)  # the axis is logarithmic
        epochs = re.findall(r'<text x="([\d.]+)" y="318"[^>]*>(\d)</text>', drawing)
        epoch = value_at(epochs)
        assert len(marks) > 5 and [number for _, number in epochs] == ["1", "2", "3"]
        for place, (low, mean, high) in enumerate(((40, 44, 48), (20, 24, 28))):
            group = re.search(rf'<g data-of="{place}">.*?</g>', drawing)[0]
            band, line = (
                [(epoch(x), error(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", points)]
                for points in re.findall(r' points="(.*?)"', group)
            )
            wanted = [(x, height / x) for height in (high, low) for x in (1, 2, 3)]
            wanted = [*wanted[:3], *wanted[:2:-1]]  # there, and back
            assert band == [pytest.approx(point, rel=2e-3) for point in wanted]
            assert line == [pytest.approx((x, mean / x), rel=2e-3) for x in (1, 2, 3)]


def test_the_seeds_their_mean_and_its_interval_are_where_the_axis_says():
    for drawing in drawings(page_of(results()), "Test errors"):
        error = value_at(re.findall(r'<text x="([\d.]+)" y="108"[^>]*>([\d.]+)</text>', drawing))
        groups = re.findall(r"<g><title>(.*?):.*?</title>(.*?)</g>", drawing)
        assert [name for name, _ in groups] == ["softmax", "z_loss"]
        for (_, group), seeds in zip(groups, ((10, 11, 12), (5, 6, 7)), strict=True):
            drawn = [error(x) for x in re.findall(r'class="seed" cx="([\d.]+)"', group)]
            assert drawn == pytest.approx(seeds, abs=0.01)
            assert error(re.search(r'd="M([\d.]+) ', group)[1]) == pytest.approx(seeds[1], abs=0.01)
            ends = [error(x) for x in re.search(r'x1="([\d.]+)" x2="([\d.]+)"', group).groups()]
            half = stats.t.ppf(0.975, 2) / math.sqrt(3)  # the seeds have a deviation of one
            assert ends == pytest.approx([seeds[1] - half, seeds[1] + half], abs=0.01)


def test_it_can_be_read_without_seeing_it():
    page = Parsed(page_of(results()))
    assert page.all("html")[0][0]["lang"] == "en" and len(page.all("h1")) == 1
    assert all(given["aria-label"] for given, _ in page.all("svg") if given["role"] == "img")
    names = {given["id"] for given, _ in page.all("h2")}
    assert {given["aria-labelledby"] for given, _ in page.all("section")} == names
    assert all(given["scope"] in ("row", "col") for given, _ in page.all("th"))
    assert all(text for _, text in page.all("button") + page.all("caption"))


def test_without_a_run_that_did_not_diverge_it_says_so():
    page = Parsed(page_of(results(diverged=True)))
    said = [text for _, text in page.all("p")]
    assert "All runs diverged." in said and "No epoch was finished." in said
    assert page.all("script") == [] and page.all("svg") == []


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_words_and_curves_stand_out_from_what_is_behind_them(place):
    block = re.findall(r":root \{(.*?)\}", web_style.STYLE, re.DOTALL)[place]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    assert sum(name[0] == "c" and name[1:].isdigit() for name in colours) == web_style.COLOURS

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    # the least that WCAG 2.2 asks of text, level AA
    words = ["ink", "soft", "accent", *(f"c{i}" for i in range(web_style.COLOURS))]
    assert {name: contrast(name, "card") for name in words if contrast(name, "card") < 4.5} == {}
    assert contrast("soft", "page") >= 4.5 and contrast("warn", "warn-card") >= 4.5


@pytest.mark.slow
def test_a_browser_shows_the_numbers_of_an_epoch_at_the_widths_of_a_desktop_and_a_phone(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    browser = importlib.import_module("browser")
    if missing := browser.lacking():
        pytest.skip(f"{missing} is not installed")
    path = tmp_path / "page.html"
    path.write_text(page_of(results()), "utf-8")
    press = (
        "const chart = [...document.querySelectorAll('.chart')].find(x => x.clientWidth); "
        "chart.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'})); "
        "return document.querySelector('.tip').innerText"
    )
    with browser.browser() as chromium:
        for width, mobile in ((1280, False), (390, True)):
            chromium.resize(width, 900, mobile=mobile)
            chromium.open(path.as_uri())
            wide = chromium.run("return document.documentElement.scrollWidth")
            assert wide == width
            assert re.search(r"epoch 1\s+z_loss\s+24.00 %\s+softmax\s+44.00 %", chromium.run(press))
            chromium.run("document.querySelector('.legend button').click()")
            assert "softmax" not in chromium.run(press)
            assert chromium.errors() == []
