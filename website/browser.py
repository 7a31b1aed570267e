"""A headless Chromium that is driven through chromedriver, with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def lacking() -> str | None:
    """The program that is missing here, or None."""
    return next((x for x in ("chromium", "chromedriver") if shutil.which(x) is None), None)


class Browser:
    """A session of a browser.

    Args:
        url: of the session at chromedriver.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, address: str) -> None:
        _sent("POST", f"{self.url}/url", {"url": address})

    def run(self, script: str) -> Any:
        """Runs the body of a function in the page, and returns its value."""
        return _sent("POST", f"{self.url}/execute/sync", {"script": script, "args": []})

    def cdp(self, command: str, **params: Any) -> Any:
        """Sends a command of the DevTools protocol."""
        content = {"cmd": command, "params": params}
        return _sent("POST", f"{self.url}/goog/cdp/execute", content)

    def resize(self, width: int, height: int, *, scale: float = 1, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Makes pages think that the user prefers "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.cdp("Emulation.setEmulatedMedia", features=[feature])

    def errors(self) -> list[str]:
        """The errors that pages have logged since this was last asked."""
        return [x["message"] for x in _sent("POST", f"{self.url}/se/log", {"type": "browser"})]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        found = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts a browser with a new profile, and ends it."""
    command = ["chromedriver", "--port=0"]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen(command, **piped) as driver,
    ):
        try:
            server = f"http://127.0.0.1:{_port(driver)}"
            chrome = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": chrome,
                "goog:loggingPrefs": {"browser": "SEVERE"},
            }
            content = {"capabilities": {"alwaysMatch": wanted}}
            session = _sent("POST", f"{server}/session", content)
            url = f"{server}/session/{session['sessionId']}"
            try:
                yield Browser(url)
            finally:
                _sent("DELETE", url)
        finally:
            driver.terminate()


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if "started successfully on port" in line:
            return int(line.rsplit(" ", 1)[1].rstrip(".\n"))
    raise RuntimeError("chromedriver did not start")


def _sent(method: str, url: str, content: Any = None, tries: int = 3) -> Any:
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode()}") from error
    except urllib.error.URLError:
        if tries == 1:
            raise
        time.sleep(1)
        return _sent(method, url, content, tries - 1)
