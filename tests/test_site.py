"""The documentation site says something of every public name, and its links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re

import numpy as np
import pytest
import torch

from _site import ROOT, broken, built, curves_in, pages
from softsphere import losses
from softsphere_lab.experiments.registry import REPRODUCTIONS

REFERENCE = ROOT / "docs" / "reference"
MODULES = (
    "softsphere",
    "softsphere.functional",
    "softsphere.losses",
    "softsphere.engines",
    "softsphere.clusters",
    "softsphere.optim",
    "softsphere.matrix",
    "softsphere.integrations.transformers",
    *(
        f"softsphere.integrations.{name}"
        for name in ("skorch", "torchtitan")
        if importlib.util.find_spec(name)
    ),
)


def classes_and_functions(*modules: str):
    """The names that modules export with their objects, without modules and plain values."""
    for module in modules:
        imported = importlib.import_module(module)
        for name in imported.__all__:
            found = getattr(imported, name)
            if inspect.isclass(found) or inspect.isfunction(found):
                yield name, found


PUBLIC = dict(classes_and_functions(*MODULES))
# The layers share more of softsphere.parallel with each other than users need.
SAID = PUBLIC | dict(classes_and_functions("softsphere.parallel"))


def taught_names() -> set[str]:
    """The classes and functions that a page, the README or an example imports."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    programs = [
        text
        for page in pages
        for text in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    programs += [path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")]
    return {
        alias.name
        for program in programs
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.ImportFrom) and re.match(r"softsphere(\.|$)", node.module or "")
        for alias in node.names
        if importlib.util.find_spec(f"softsphere.{alias.name}") is None
    }


def own_members(kind: type):
    """The public methods and properties that a class of the package defines or inherits in it."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "softsphere":
            for name, member in vars(base).items():
                if not name.startswith("_") and (
                    callable(member) or isinstance(member, property | classmethod | staticmethod)
                ):
                    yield name, member


@pytest.fixture
def website(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "website"))
    return importlib.import_module


@pytest.mark.parametrize("name", SAID)
def test_a_public_name_has_a_docstring(name):
    assert inspect.getdoc(SAID[name])


@pytest.mark.parametrize("name", [x for x in SAID if inspect.isclass(SAID[x])])
def test_what_a_public_class_has_has_a_docstring(name):
    # extra_repr and what PyTorch calls by itself are documented there.
    theirs = set(dir(torch.nn.Module)) | set(dir(torch.Tensor)) | {"count", "index"}
    lacking = [
        member
        for member, found in own_members(SAID[name])
        if member not in theirs and not inspect.getdoc(found)
    ]
    assert lacking == []


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_a_loss_has_the_page_that_its_docstring_makes(name, website):
    page = (ROOT / "docs" / "losses" / f"{name}.md").read_text()
    assert page == website("loss_pages").page(name)


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_the_picture_of_a_loss_has_the_curves_of_the_package(name, website):
    picture = (ROOT / "docs" / "losses" / f"{name}.svg").read_text()
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", picture, re.DOTALL)[1]
    computed = website("curves").description(name)
    assert re.findall("[a-z]+", drawn) == re.findall("[a-z]+", computed)
    numbers = [[float(x) for x in re.findall(r"-?[\d.]+", text)] for text in (drawn, computed)]
    assert len(numbers[0]) == 21
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_the_lines_of_a_picture_are_the_curves_of_the_package(name, website):
    """Every point that was computed is where the line is drawn, to less than a pixel."""
    curves, palette = website("curves"), website("palette")
    picture = (ROOT / "docs" / "losses" / f"{name}.svg").read_text()
    drawn = curves_in(picture, curves.ACROSS, curves.UP)
    shown = {palette.ACCENT: name} | ({palette.MUTED: "softmax"} if name != "softmax" else {})
    assert [set(axes) for axes in drawn] == [set(shown)] * 2
    for colour, loss in shown.items():
        for axes, (low, high), values in zip(drawn, curves.UP, curves.curve(loss), strict=True):
            x, y = zip(*axes[colour], strict=True)
            seen = (values > low) & (values < high)
            there = np.interp(curves.OUTPUTS[seen].numpy(), x, y)
            # an axes is 143 pixels high
            np.testing.assert_allclose(there, values[seen].numpy(), rtol=0, atol=(high - low) / 143)


def test_the_page_of_a_loss_names_the_layers_that_take_it(website):
    layers = website("loss_pages").layers
    assert [len(layers(losses.get(x))) for x in ("taylor_softmax", "z_loss", "softmax")] == [
        3,
        2,
        2,
    ]


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_a_loss_is_in_the_table(name):
    assert f"losses/{name}.md" in (ROOT / "docs" / "losses.md").read_text()


def test_formulas_of_docstrings_become_latex(website):
    formulas = website("formulas")
    assert doctest.testmod(formulas).failed == 0
    with pytest.raises(ValueError, match="open parenthesis"):
        formulas.latex("log(1 + c")


def test_the_curves_of_a_loss_are_those_of_softmax_for_softmax(website):
    curves = website("curves")
    loss, gradient = curves.curve("softmax")
    others = torch.linspace(-1, 1, curves.CLASSES - 1, dtype=loss.dtype).exp().sum()
    p = curves.OUTPUTS.exp() / (curves.OUTPUTS.exp() + others)
    torch.testing.assert_close(loss, -p.log())
    torch.testing.assert_close(gradient, p - 1)


def test_every_experiment_is_on_its_page():
    page = (ROOT / "docs" / "reproduce.md").read_text()
    named = re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE)
    assert named == list(REPRODUCTIONS)


def test_a_drawn_picture_has_no_colour_without_a_dark_one(website):
    palette = website("palette")
    for picture in sorted((ROOT / "docs").rglob("*.svg")):
        if picture.name != "favicon.svg":
            colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", picture.read_text()))
            assert colours <= set(palette.DARK), picture.name


@pytest.fixture
def site(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("MkDocs Material is not installed; `make docs` installs it")
    return built(tmp_path / "site")


def test_the_built_site_has_no_faults(site):
    """One test, since building the site is most of its time."""
    found = pages(site)
    assert len(found) > 25
    faults = {
        "links that lead nowhere": list(broken(found)),
        "loaded from another server": [
            link for page in found.values() for link in page.loaded if "//" in link
        ],
        "pictures without words": [src for page in found.values() for src in page.without_alt],
        "public names that are not in the reference": sorted(
            (set(PUBLIC) | taught_names()) - named_in(found)
        ),
        "formulas that are not drawn": [path.name for path in found if not_drawn(path)],
    }
    assert {what: where for what, where in faults.items() if where} == {}
    assert (site / "how_it_works.html").read_text().count("<math") > 20


def named_in(found):
    """The names that the pages of the reference have places for."""
    reference = [page for path, page in found.items() if path.parent.name == "reference"]
    return {place.rpartition(".")[2] for page in reference for place in page.ids}


def not_drawn(path):
    """Whether a page has LaTeX, or a command that was not known, in place of a formula."""
    text = path.read_text()
    return "arithmatex" in text or re.search(r"<m[a-z]+>\\\w+", text) is not None


@pytest.mark.slow
def test_a_browser_shows_every_page(site, website):
    """Loads each page at two widths, follows a link, and searches; errors and requests count."""
    lacking = website("browser").lacking()
    if lacking is not None:
        pytest.skip(f"{lacking} is not installed")
    assert website("in_a_browser").faults(site) == []
