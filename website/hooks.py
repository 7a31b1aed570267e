"""Hooks of MkDocs: pages and pictures of the repository in the site, and formulas as MathML."""

from __future__ import annotations

import ast
import posixpath
import re
import sys
import textwrap
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from palette import in_dark

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Pages of the repository outside docs/, and their names in the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Sections of the navigation, and the pages that belong there if it does not name them.
SECTIONS = {"Losses": "losses/*.md", "Guides": "*.md"}
LINK = re.compile(r"(\]\(|<img [^>]*src=\")([^)\"#\s]+)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()([^)\s]+\.svg)\)")
# A paragraph that is all in italics is the caption of the picture or the table before it.
CAPTION = re.compile(r"<p><em>((?:(?!</?em>|</?p>).)*)</em></p>", re.DOTALL)
# What is between tags is text, but not in code, formulas and titles.
NOT_TEXT = re.compile(r"(<(code|pre|math|svg|script)\b.*?</\2>|<[^>]*>)", re.DOTALL)
INDEX = re.compile(
    r"(?<![\w/.])(min|max|share|counts|[A-Za-zα-ωΑ-Ωℓ∂]['²]?)"
    r"_(\{[^{}]*\}|[a-zα-ω0-9]{1,2}(?![a-zA-Z0-9_]))"
)
EXPONENT = re.compile(r"\^(\{[^{}]*\}|[a-zα-ω0-9]+)")
NO_BREAK = re.compile(r"(?:^| )(?:[±=]|&lt;|≤) (?=[\w−½])")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Puts guides and losses that the navigation does not name at the end of their sections."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    for title, pattern in SECTIONS.items():
        section = next(x[title] for x in config.nav if title in x)
        pages = (x.relative_to(config.docs_dir) for x in Path(config.docs_dir).glob(pattern))
        section += sorted(str(x) for x in pages if str(x) not in named)
        if title == "Guides" and EXAMPLES.is_dir():
            section.append({"Examples": "examples.md"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds pages and linked files from outside docs/, and dark copies of the drawn pictures."""
    for picture in [x for x in files if x.src_uri.endswith(".svg")]:
        name = _dark(picture.src_uri)
        files.append(File.generated(config, name, content=in_dark(picture.content_string)))
    if EXAMPLES.is_dir():
        files.append(File.generated(config, "examples.md", content=_examples()))
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for file in [x for x in files if x.is_documentation_page()]:
        for path in _linked(file):
            elsewhere = _in_site(path).startswith("repository/")
            if elsewhere and (ROOT / path).is_file():
                name = f"repository/{path}"
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes links of a page lead to where the site has the files of the repository."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        before, link = match.groups()
        path = _in_repository(page.file, link)
        if path is None:
            return match[0]
        return before + posixpath.relpath(_in_site(path), here or ".")

    return PICTURE.sub(_in_both_modes, LINK.sub(moved, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw without a script, and o_k into oₖ in text."""

    def drawn(match: re.Match[str]) -> str:
        latex = unescape(match[2]).strip()[2:-2]
        if match[1] == "span":
            return convert(latex)
        formulas = (convert(x, display="block") for x in latex.split(r"\qquad"))
        return f'<div class="formulas">{"".join(formulas)}</div>'

    html = CAPTION.sub(r'<p class="caption"><em>\1</em></p>', FORMULA.sub(drawn, html))
    result, end = "", 0
    for tag in NOT_TEXT.finditer(html):
        result += _indexed(html[end : tag.start()]) + tag[0]
        end = tag.end()
    return result + _indexed(html[end:])


def _examples() -> str:
    """A page of the programs in examples/: their table, what each says of itself, its code."""
    head = (EXAMPLES / "README.md").read_text(encoding="utf-8").rstrip()
    parts = [re.sub(r"\]\((\w+)\.py\)", r"](#\1py)", head)]
    for path in sorted(EXAMPLES.glob("*.py")):
        code = path.read_text(encoding="utf-8")
        first, *rest = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")
        parts.append(f"## {path.name}\n\n{first}")
        for text in rest:
            parts.append(f"```bash\n{text}\n```" if text.startswith("python ") else text)
        shown = textwrap.indent(f"```python\n{code}```", "    ")
        parts.append(f'??? example "{path.relative_to(ROOT)}"\n\n{shown}')
    return "\n\n".join(parts) + "\n"


def _indexed(text: str) -> str:
    """Text of a page with its indices and exponents set as such."""
    text = INDEX.sub(lambda match: f"{match[1]}<sub>{match[2].strip('{}')}</sub>", text)
    text = NO_BREAK.sub(lambda x: x[0].replace(" ", "\u00a0"), text)
    return EXPONENT.sub(lambda match: f"<sup>{match[1].strip('{}')}</sup>", text)


def _in_both_modes(match: re.Match[str]) -> str:
    """A drawn picture twice. The theme shows the one of its mode."""
    before, path = match.groups()
    return f"{before}{path}#only-light){before}{_dark(path)}#only-dark)"


def _dark(path: str) -> str:
    return f"{path.removesuffix('.svg')}.dark.svg"


def _linked(file: File) -> list[str]:
    """The paths in the repository of the files that a page links to."""
    found = (_in_repository(file, link) for _, link in LINK.findall(file.content_string))
    return [path for path in found if path is not None]


def _in_repository(file: File, link: str) -> str | None:
    """The path in the repository of a relative link on a page, or None for another link."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    home = {name: source for source, name in PAGES.items()}.get(file.src_uri)
    folder = posixpath.dirname(home or f"docs/{file.src_uri}")
    path = posixpath.normpath(posixpath.join(folder, link))
    return None if path.startswith("..") else path


def _in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("examples/"):
        place = posixpath.basename(path).replace(".", "")
        return "examples.md" + ("" if path.endswith(".md") else f"#{place}")
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
