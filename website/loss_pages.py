"""Writes docs/losses/: a page and a picture for each loss, from the registry and the docstrings.

    python website/loss_pages.py

A loss that is registered in `softsphere.losses.REGISTRY` gets a page without further work. Its
docstring begins with the formula, and has a paragraph "Use it …", the partial derivatives and the
source.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from curves import draw
from formulas import latex

from softsphere import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss, losses
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.paper import LABELS

REFERENCE = "../reference/losses.md#softsphere.losses"
PAGES = Path(__file__).parents[1] / "docs" / "losses"
# Where tables name a loss with its numbers alone.
TITLES = {"higher_taylor_softmax": "Taylor softmax of higher order"}
# How the paragraphs of a docstring begin that have a place of their own on the page.
LABELLED = ("Args:", "Partials", "Domain:", "Convention:", "Use it", "Raises", "Source:", ">>>")

STATISTICS = """\
With the base measure π = 1, s = Σ o_k is the sum of the outputs, q = Σ o_k² the sum of their
squares, c the output of the target and M the number of classes.
[How it works](../how_it_works.md) says why such a loss is cheap, and defines the numbers for any
base measure.
"""
CAPTION = """\
*The loss and its gradient with respect to the output c of the target, beside those of softmax.
There are ten classes, and the other nine outputs are spread evenly from −1 to 1.*
"""


def title(name: str) -> str:
    """The name of a loss as the heading of its page."""
    known = in_words(name)
    return known[0].upper() + known[1:]


def in_words(name: str) -> str:
    """The name of a loss in a sentence."""
    return LABELS.get(name, TITLES.get(name, name.replace("_", " ")))


def page(name: str) -> str:
    """The text of the page of a loss."""
    kind = losses.REGISTRY[name]
    parts = parts_of(kind)
    spherical = issubclass(kind, losses.Spherical)
    pieces = [
        f"# {title(name)}",
        drawn(parts["formula"]),
        STATISTICS.strip() if spherical else "",
        parts["text"],
        f"![{picture_in_words(name)}]({name}.svg)",
        CAPTION.strip(),
        f"## When to use it\n\n{parts['Use it']}",
        properties(kind),
        f"## How to use it\n\n{example(name, kind)}",
        numbers(kind, parts.get("Args:", "")),
        f"## Details\n\n{details(parts)}",
        f"## Source\n\n{linked(parts['Source:'].removeprefix('Source: '))}",
        f"The class is in the [reference]({REFERENCE}.{kind.__name__}). "
        "[Results](../results.md) compares the losses.",
    ]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def parts_of(kind: type[losses.Loss]) -> Mapping[str, str]:
    """The parts of a docstring: "formula", "text", and one for each label of `LABELLED`.

    Raises ValueError for a docstring without a part that each page has.
    """
    found = {"formula": "", "text": ""}
    label = "formula"
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        begun = next((x for x in LABELLED if line.startswith(x)), None)
        if begun is not None:
            label = begun
        elif not line and label != "Args:":
            label = "text"
        found[label] = f"{found.get(label, '')}{line}\n"
    found = {key: text.strip() for key, text in found.items()}
    lacking = [x for x in ("formula", "Partials", "Use it", "Source:") if not found.get(x)]
    if lacking:
        raise ValueError(f"the docstring of {kind.__name__} has no {', no '.join(lacking)}")
    return found


def drawn(text: str) -> str:
    """The formulas of the first paragraph as LaTeX. Two spaces stand between them."""
    loss, *where = (latex(x) for x in " ".join(text.split("\n")).removesuffix(".").split(",  "))
    blocks = [loss, r" \qquad ".join(where)]
    return "\n\n".join(f"$$\n{block}\n$$" for block in blocks if block)


def properties(kind: type[losses.Loss]) -> str:
    spherical, loss = issubclass(kind, losses.Spherical), kind()

    def answer(name: str) -> str:
        """Yes or no, also for an order of the Taylor polynomial where the default is none."""
        said = "yes" if getattr(loss, name) else "no"
        if getattr(loss, "order", 0) is not None:
            return said
        other = "yes" if getattr(kind(order=2), name) else "no"
        return said if other == said else f"{said}; with an `order`, {other}"

    rows = [
        ("Is it a distribution?", "yes" if kind.normalised else "no, it ranks the classes"),
        ("Does it need the D outputs?", "no, s, q and c are enough" if spherical else "yes"),
        ("Which output layers take it?", ", ".join(layers(loss))),
        ("Is it the same after a shift of all outputs?", answer("shift_invariant")),
        ("Is it the same after a positive scale of all outputs?", answer("scale_invariant")),
        ("Is it an upper bound of −log softmax?", answer("upper_bound")),
    ]
    return markdown(("question", "answer"), rows).rstrip()


def layers(loss: losses.Loss) -> list[str]:
    """The output layers that take a loss, found by making each of them."""
    clusters = torch.tensor([-1, -1, 0, 0])
    made = {
        "`LinearSphericalLoss`": lambda: LinearSphericalLoss(2, 4, loss),
        "`FactoredSphericalLoss`": lambda: FactoredSphericalLoss(2, 4, loss),
        "`ClusteredLoss` in its clusters": lambda: ClusteredLoss(2, 4, clusters, leaf=loss),
    }
    taken = []
    for name, make in made.items():
        with contextlib.suppress(TypeError):
            make()
            taken.append(name)
    return taken


def example(name: str, kind: type[losses.Loss]) -> str:
    given = ", ".join(f"{x.name}={x.default!r}" for x in fields(kind))
    chosen = f"losses.{kind.__name__}({given})" if given else f'"{name}"'
    imported = "LinearSphericalLoss, SphericalLoss" + (", losses" if given else "")
    return f"""\
```python
import torch
from softsphere import {imported}

# on logits
criterion = SphericalLoss({chosen})
loss = criterion(torch.randn(8, 10), torch.randint(10, (8,)))

# with its output layer
head = LinearSphericalLoss(64, 1000, {chosen})
loss = head(torch.randn(8, 64), torch.randint(1000, (8,)))
```"""


def numbers(kind: type[losses.Loss], args: str) -> str:
    """A list of the arguments of a loss."""
    known = {x.name: x.default for x in fields(kind)}
    lines = []
    for entry in re.split(r"\n(?=    \w)", args.removeprefix("Args:")):
        names, _, text = " ".join(entry.split()).partition(": ")
        if names:
            shown = ", ".join(f"`{x}={known[x]}`" for x in names.split(", "))
            lines.append(f"- {shown}: {text}")
    return "\n".join(lines)


def details(parts: Mapping[str, str]) -> str:
    labels = ("Partials", "Domain:", "Convention:", "Raises")
    return "\n".join(f"- {' '.join(parts[x].split())}" for x in labels if x in parts)


def linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def picture_in_words(name: str) -> str:
    return f"Two curves over the output of the target: {in_words(name)} and its gradient"


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    for name in losses.REGISTRY:
        (PAGES / f"{name}.md").write_text(page(name), "utf-8")
        draw(name, title(name), PAGES / f"{name}.svg")
    print(PAGES)
