"""A comparison as one page for a browser, which holds all that it shows and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from softsphere_lab.records.folder import Line
from softsphere_lab.report import summary
from softsphere_lab.report.learning_curves import Curve, curves_of
from softsphere_lab.report.measures import note_on, values
from softsphere_lab.report.results import Results
from softsphere_lab.report.summary import ERROR, Row
from softsphere_lab.report.web_charts import draw_curves, draw_seeds
from softsphere_lab.report.web_style import COLOURS, SCRIPT, STYLE

__all__ = ["comparison_page"]

# The widths of the drawings for wide and for narrow windows.
WIDTHS = {"wide": 900, "narrow": 330}


def comparison_page(
    results: Results, rows: Sequence[Row], environment: Sequence[Line], unfinished: str
) -> str:
    """Returns the page of a comparison.

    environment: where each start of the command ran. unfinished: what is missing, in words.
    """
    asked = results.config
    seeds = max(row.seeds for row in rows)
    title = f"Losses compared on {asked['dataset']}"
    setting = (
        f"Network {asked['model']}, {asked['epochs']} epochs, {seeds} "
        f"seed{'' if seeds == 1 else 's'}, {environment[0]['date']}"
    )
    curves = curves_of(results.epochs, rows)
    version = environment[-1]["packages"]["softsphere"]
    warning = f'<p class="unfinished">{escape(unfinished)}</p>' if unfinished else ""
    sections = [
        _section(
            "What was found", f'{warning}<p class="found">{escape(summary.finding(rows))}</p>'
        ),
        _section("Results", _results_table(rows)),
        _section("Learning curves", _curves_figure(curves)),
        _section("Final errors", _errors_figure(results, rows)),
        _section("Configuration", _facts_table("What was asked for", _configuration(asked))),
        _section("Environment", _facts_table("Where it ran", _whereabouts(environment))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kicker">softsphere compare</p><h1>{escape(title)}</h1>'
        f"<p>{escape(setting)}</p></header>\n{''.join(sections)}"
        f"<footer>Made by softsphere {escape(version)}.</footer>\n</main>\n"
        f"{_script(curves)}</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}\n</section>\n'
    )


def _json(value: Any) -> str:
    """Returns JSON that cannot end the script element which holds it."""
    return json.dumps(value).replace("<", "\\u003c")


def _table(caption: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Returns a table whose first column has names. It scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in others)
        + "</tr>\n"
        for first, *others in lines
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
        "</table></div>"
    )


def _results_table(rows: Sequence[Row]) -> str:
    columns = summary.columns_with_differences(rows)
    header = [title for title, _ in columns]
    lines = [[cell(row) for _, cell in columns] for row in rows]
    table = _table("Means over the seeds", header, lines)
    return f'{table}<p class="note">{escape(note_on(table))}</p>'


def _curves_figure(curves: Sequence[Curve]) -> str:
    """Returns the curves with what a script needs, and all of their numbers as a table."""
    drawings = "".join(draw_curves(curves, width, kind) for kind, width in WIDTHS.items())
    if not drawings:
        return "<p>No epoch was finished.</p>"
    legend = "".join(
        f'<button type="button" aria-pressed="true" data-curve="{i}">'
        f'<i{" class=dashed" if i >= COLOURS else ""} style="color: var(--c{i % COLOURS})"></i>'
        f"{escape(curve.name)}</button>"
        for i, curve in enumerate(curves)
    )
    epochs = sorted({epoch for curve in curves for epoch in curve.means})
    lines = [
        [str(epoch), *(f"{c.means[epoch]:.2f}" if epoch in c.means else "–" for c in curves)]
        for epoch in epochs
    ]
    caption = "Mean validation error, %, after each epoch"
    numbers = _table(caption, ["epoch", *(curve.name for curve in curves)], lines)
    return (
        f'<figure class="curves">{drawings}<div class="tip" role="status" hidden></div>'
        f'<div class="legend" role="group" aria-label="Curves that are shown">{legend}</div>'
        '<figcaption class="note">Means over the seeds, with the range of the seeds behind them. '
        "Point at an epoch, or use the arrow keys, to read its numbers.</figcaption></figure>"
        f"<details><summary>Numbers of every epoch</summary>{numbers}</details>"
    )


def _script(curves: Sequence[Curve]) -> str:
    """Returns the script that shows the numbers of an epoch, and what it reads."""
    if not any(curve.means for curve in curves):
        return ""
    data = f'<script type="application/json" id="curves">{_json(_hover_data(curves))}</script>'
    return f"{data}\n<script>{SCRIPT}</script>\n"


def _hover_data(curves: Sequence[Curve]) -> Line:
    """Returns what the script shows of an epoch."""
    epochs = sorted({epoch for curve in curves for epoch in curve.means})
    return {
        "colours": COLOURS,
        "epochs": epochs,
        "curves": [
            {"name": curve.name, "means": [curve.means.get(epoch) for epoch in epochs]}
            for curve in curves
        ],
    }


def _errors_figure(results: Results, rows: Sequence[Row]) -> str:
    seeds = [list(values(results.ends[row.loss], ERROR).values()) for row in rows]
    drawings = "".join(draw_seeds(rows, seeds, width, kind) for kind, width in WIDTHS.items())
    if not drawings:
        return "<p>All runs diverged.</p>"
    caption = "Each point is the test error of a seed. The diamond is their mean, the line its 95 %"
    return f'<figure>{drawings}<figcaption class="note">{caption} interval.</figcaption></figure>'


def _facts_table(caption: str, facts: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n'
        for name, value in facts
    )
    return f'<table class="facts"><caption>{caption}</caption><tbody>{lines}</tbody></table>'


def _configuration(asked: Line) -> list[tuple[str, str]]:
    """Returns what was asked for, one number or list a line.

    >>> _configuration({"losses": ["softmax"], "epochs": 2, "data": {"train": 9}, "tune": False})
    [('losses', 'softmax'), ('epochs', '2'), ('data: train', '9'), ('tune', 'no')]
    """
    facts = []
    for key, value in asked.items():
        if key == "experiment":
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in parts:
            name = f"{key}: {part}" if part else key
            facts.append((name.replace("_", " "), _value_in_words(each)))
    return facts


def _value_in_words(value: Any) -> str:
    """Returns a value of a configuration as a person writes it.

    >>> _value_in_words({"values": [0.001, 0.01], "start": 0.01}), _value_in_words(None)
    ('0.001, 0.01; the first is 0.01', 'none')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict) and set(value) == {"values", "start"}:
        tried = _value_in_words(value["values"])
        return tried if len(value["values"]) == 1 else f"{tried}; the first is {value['start']:g}"
    if isinstance(value, list):
        return ", ".join(map(_value_in_words, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _whereabouts(environment: Sequence[Line]) -> list[tuple[str, str]]:
    """Returns the command, the versions and the machine of the first start."""
    first = environment[0]
    starts = [("starts", str(len(environment)))] if len(environment) > 1 else []
    versions = [(name, str(version)) for name, version in first["packages"].items()]
    return [
        ("command", first["command"]),
        *starts,
        ("date", first["date"]),
        ("python", first["python"]),
        *versions,
        ("commit", first["commit"] or "none"),
        ("machine", f"{first['system']}, {first['machine']}, {first['threads']} threads"),
        ("GPU", first["cuda"] or "none"),
    ]
