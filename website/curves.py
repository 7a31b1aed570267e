"""Draws a loss and its gradient against the output of the target, computed by the package."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from palette import ACCENT, BACKGROUND, GRID, MUTED, TEXT
from torch import Tensor

from softsphere import SphericalLoss

CLASSES = 10
OUTPUTS = torch.linspace(-6, 6, 241, dtype=torch.float64)
# The ends of the axes: the output, and the loss and the gradient.
ACROSS, UP = (-6, 6), ((-0.4, 10.4), (-2.15, 2.15))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "softsphere",
    "font.size": 12,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": MUTED,
    "axes.facecolor": BACKGROUND,
    "figure.facecolor": BACKGROUND,
    "savefig.facecolor": BACKGROUND,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
}


def curve(name: str) -> tuple[Tensor, Tensor]:
    """The loss over `OUTPUTS` of the target, and its gradient with respect to that output."""
    c = OUTPUTS.clone().requires_grad_()
    others = torch.linspace(-1, 1, CLASSES - 1, dtype=c.dtype).expand(len(c), -1)
    logits = torch.cat([c.unsqueeze(1), others], 1)
    loss = SphericalLoss(name, reduction="none")(logits, torch.zeros(len(c), dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss.sum(), c)
    return loss.detach(), gradient


def draw(name: str, label: str, path: Path) -> None:
    """Writes the picture of a loss beside softmax."""
    both = [("softmax", "Softmax", MUTED, (4, 2.5))] if name != "softmax" else []
    both.append((name, label, ACCENT, None))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        for loss, words, colour, dashes in both:
            style = {"color": colour, "linewidth": 2.2, "dashes": dashes or (None, None)}
            for axes, values in zip((left, right), curve(loss), strict=True):
                axes.plot(OUTPUTS.tolist(), values.tolist(), label=words, **style)
        left.set(title="Loss ℓ", ylim=UP[0], yticks=range(0, 11, 2))
        right.set(title="Gradient ∂ℓ/∂c", ylim=UP[1])
        for axes in (left, right):
            axes.grid()
            axes.set(xlabel="output c of the target", xlim=ACROSS)
            axes.title.set_fontsize(12)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        buffer = io.StringIO()
        told = {"Description": description(name), "Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", metadata=told)
    path.write_text(cleaned(buffer.getvalue()), "utf-8")


def description(name: str) -> str:
    """Some points of both curves in words, which the picture keeps and a test compares."""
    some = slice(None, None, len(OUTPUTS) // 6)
    told = [" ".join(f"{x:.3f}" for x in values[some].tolist()) for values in curve(name)]
    outputs = " ".join(f"{x:.3f}" for x in OUTPUTS[some].tolist())
    return f"outputs {outputs} loss {told[0]} gradient {told[1]}"


def cleaned(svg: str) -> str:
    """An SVG file of Matplotlib with the fonts of the system, and without trailing spaces."""
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    return re.sub(r" +$", "", svg, flags=re.MULTILINE)
