"""Loads every page of the built site in headless Chromium, and says what is wrong with it.

    python website/in_a_browser.py [FOLDER]

Each page is loaded at the widths of a desktop and of a phone. A page must not be wider than the
window, load nothing from another server, show all of its pictures and log no error. On the first
page the dark mode is switched on, a link is followed, and the search is used.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import Browser, browser

SIZES = ((1280, 900, False), (390, 844, True))
REQUESTS = "return performance.getEntriesByType('resource').map(x => x.name)"
WIDTH = "return document.documentElement.scrollWidth"
UNSEEN = """
return [...document.images].filter(x => x.offsetParent && !x.naturalWidth).map(x => x.src)
"""
SCHEME = "return document.body.dataset.mdColorScheme"
SWITCH = "[...document.querySelectorAll('label[for^=__palette]')].find(x => !x.hidden).click()"
FOLLOW = "document.querySelector('article a[href=\"which_one.html\"]')?.click()"
SEARCH = """
const input = document.querySelector('.md-search__input');
input.focus(); input.value = 'FactoredSGD'; input.dispatchEvent(new Event('keyup'));
"""
FOUND = "return document.querySelectorAll('.md-search-result__link').length"


def faults(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder; an empty list if nothing is."""
    with _served(folder) as server, browser() as chromium:
        return [*_of_pages(chromium, server, folder), *_of_use(chromium, server)]


def _of_pages(chromium: Browser, server: str, folder: Path) -> Iterator[str]:
    pages = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html"))
    for width, height, mobile in SIZES:
        chromium.resize(width, height, mobile=mobile)
        for page in pages:
            chromium.open(f"{server}/{page}")
            if (broad := chromium.run(WIDTH)) > width:
                yield f"{page} is {broad} wide in a window of {width}"
            yield from (f"{page} loads {x}" for x in chromium.run(REQUESTS) if server not in x)
            yield from (f"{page} does not show {x}" for x in chromium.run(UNSEEN))
            yield from (f"{page} logs {x}" for x in chromium.errors())


def _of_use(chromium: Browser, server: str) -> Iterator[str]:
    width, height, mobile = SIZES[0]
    chromium.resize(width, height, mobile=mobile)
    chromium.prefer("light")
    chromium.open(f"{server}/index.html")
    if chromium.run(SCHEME) != "default":
        yield "the first page is not light where light pages are preferred"
    chromium.run(SWITCH)
    if not _soon(lambda: chromium.run(SCHEME) == "slate"):
        yield "the dark mode cannot be switched on"
    chromium.run(FOLLOW)
    if not _soon(lambda: chromium.run("return location.pathname") == "/which_one.html"):
        yield "the link to which_one.html was not followed"
    chromium.run(SEARCH)
    if not _soon(lambda: chromium.run(FOUND) > 0):
        yield "the search finds nothing for FactoredSGD"


def _soon(happened: Callable[[], bool], tries: int = 50) -> bool:
    for _ in range(tries):
        if happened():
            return True
        time.sleep(0.2)
    return False


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Does not write a line for each request."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("site"))
    found = faults(parser.parse_args().folder)
    print("\n".join(found) or "no faults")
    raise SystemExit(bool(found))
