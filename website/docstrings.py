"""An extension of Griffe: docstrings of the package in the form that the reference needs."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> (?:.+\n?)*(?:\n>>> (?:.+\n?)*)*", re.MULTILINE)
# Sentences that begin a paragraph, though they follow on the next line.
LABEL = re.compile(
    r"(?<=[^\n])\n(?=(?:Raises|Returns|Source:|Partials|Domain:|Convention:|Shapes:|Use it) ?)"
)
# A name in code, which becomes a link if the reference has it.
NAME = re.compile(r"`((?:softsphere\.)?[A-Za-z]\w*(?:\.\w+)*)(\([^`]*\))?`")
# Methods that a class has wrapped, as in log_prob = eager(…)(OutputLayer.log_prob).
WRAPPED = re.compile(r"\(\w+\.(\w+)\)$")


class Docstrings(griffe.Extension):
    """Fences doctests, separates the last sentences, links names and finds wrapped methods."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = LABEL.sub("\n\n", obj.docstring.value)
            obj.docstring.value = fenced(NAME.sub(_reference, text))

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        for name, member in list(cls.members.items()):
            value = str(getattr(member, "value", None) or "")
            found = WRAPPED.search(value)
            if member.is_attribute and found is not None and found[1] == name:
                cls.del_member(name)  # it is then inherited, with its signature and docstring


def _reference(match: re.Match[str]) -> str:
    name, call = match[1], match[2] or ""
    path = name if name.startswith("softsphere.") else f"softsphere.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}{call}</code></autoref>'


def fenced(text: str) -> str:
    """Returns a docstring whose examples are fenced as code."""
    return EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text).rstrip()
