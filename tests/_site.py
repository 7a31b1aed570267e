"""The built documentation site: its links, its addresses and what it loads."""

from __future__ import annotations

import os
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
