"""The built documentation site: its links, its addresses and what it loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
# The attributes by which a page loads something while it is shown.
LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


def built(folder: Path) -> Path:
    """Builds the site into a folder, in which a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# A point of a path, and a curve of a drawing by Matplotlib, which is as wide as no other line.
POINT = r"[ML] (-?[\d.]+) (-?[\d.]+)"
CURVE = re.compile(r'<path d="([^"]*)"[^>]*stroke: (#\w+); (?:[^"]*; )?stroke-width: 2\.2[^>]*/>')


def curves_in(
    svg: str, across: tuple[float, float], up: tuple[tuple[float, float], ...]
) -> list[dict[str, list[tuple[float, float]]]]:
    """The curves of each axes of a drawing, by colour, as points in the units of the axes.

    across, up: the ends of the horizontal axis, and those of the vertical axis of each axes.
    """
    found = []
    for text, ends in zip(re.split(r'id="axes_\d"', svg)[1:], up, strict=True):
        text = text.partition('id="legend_1"')[0]
        frame = points(re.search(r'<path d="([^"]*)"', text)[1])
        (left, bottom), (right, top) = frame[0], frame[2]

        def in_units(x: float, y: float, box=(left, bottom, right, top), ends=ends):
            left, bottom, right, top = box
            part, height = (x - left) / (right - left), (y - bottom) / (top - bottom)
            return (
                across[0] + part * (across[1] - across[0]),
                ends[0] + height * (ends[1] - ends[0]),
            )

        found.append(
            {colour: [in_units(*x) for x in points(path)] for path, colour in CURVE.findall(text)}
        )
    return found


def points(path: str) -> list[tuple[float, float]]:
    """The points of a path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(POINT, path)]


class Page(HTMLParser):
    """What a page has: the names of its places, its links, what it loads, its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.without_alt: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADED.get(tag) in given and given.get("rel") != "canonical":
            self.loaded.append(given[LOADED[tag]])
        if tag == "img" and not given.get("alt"):
            self.without_alt.append(given.get("src", ""))


def pages(site: Path) -> dict[Path, Page]:
    """The pages of a site by their files."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def broken(all_pages: dict[Path, Page]) -> Iterator[str]:
    """The links within the site that lead nowhere."""
    for page in all_pages.values():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            place = unquote(parts.fragment)
            known = all_pages[path].ids if path in all_pages else {place}
            if not path.is_file() or (place and place not in known):
                yield f"{page.path.name}: {link}"
