"""What runs here also runs where text is not UTF-8 by default, as on Windows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "benchmarks", "website")
# The position of the encoding among the arguments of each function or method that has one.
ENCODING = {"read_text": 0, "write_text": 1, "open": 3, "TemporaryFile": 2, "NamedTemporaryFile": 2}
TEMPORARY = ("TemporaryFile", "NamedTemporaryFile")


def without_encoding(source: str) -> list[int]:
    """The lines of a source that read or write text in the encoding of the system.

    >>> without_encoding("path.read_text()\\nopen(name)\\nopen(name, 'rb')\\nos.open(name, 0)")
    [1, 2]
    """
    return [node.lineno for node in ast.walk(ast.parse(source)) if _reads_text_as_it_is(node)]


def _reads_text_as_it_is(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if method else getattr(node.func, "id", "")
    if name not in ENCODING or (method and name == "open"):
        return False
    words = {word.arg: word.value for word in node.keywords}
    default = ast.Constant("w+b" if name in TEMPORARY else "r")
    place = 1 if name == "open" else 0
    mode = words.get("mode", node.args[place] if len(node.args) > place else default)
    binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
    if not name.endswith("_text") and binary:
        return False
    return "encoding" not in words and len(node.args) <= ENCODING[name]


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_is_read_and_written_as_utf_8(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = {path.name: without_encoding(path.read_text("utf-8")) for path in sources}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_no_file_of_the_tree_has_a_name_that_windows_refuses():
    for path in ROOT.glob("[!.]*/**/*"):
        assert not set(path.name) & set('<>:"|?*\\'), path
