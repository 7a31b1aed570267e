"""Formulas of docstrings as LaTeX: `q/M` becomes a fraction, `Σ_{i≤n} oⁱ` a sum over powers.

A slash divides the product before it by the product after it: products are written without spaces,
and terms are separated by spaces or signs.
"""

from __future__ import annotations

import re

__all__ = ["latex"]

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹ⁱⁿ⁻", "0123456789in-")
SIGNS = {
    "−": "-",
    "≤": r"\le ",
    "≠": r"\ne ",
    "½": r"\tfrac{1}{2}",
    "·": r"\cdot ",
    "¼": r"\tfrac{1}{4}",
}
GREEK = {
    "α": "alpha", "ε": "varepsilon", "λ": "lambda", "μ": "mu", "ξ": "xi", "π": "pi", "σ": "sigma",
    "Σ": "sum", "ℓ": "ell", "η": "eta", "ω": "omega", "∂": "partial", "∞": "infty",
}  # fmt: skip
NAMES = {"log", "min", "max", "exp", "tanh"}
OPEN, CLOSE = "([{", ")]}"
# Signs between terms, at which a fraction ends.
BETWEEN = " +−=≤≠,"
ATOM = re.compile(r"[A-Za-z]{2,}|[⁰¹²³⁴⁵⁶⁷⁸⁹ⁱⁿ⁻]+|[_^](?=\{)|[_^].|.", re.DOTALL)


def latex(text: str) -> str:
    r"""Returns the LaTeX of a formula that is written in Unicode.

    >>> print(latex("ℓ = log(M + s + q/2) − log(1 + c²)"))
    \ell = \log\left(M + s + \frac{q}{2}\right) - \log\left(1 + c^{2}\right)
    >>> print(latex("Σ_{i≤n} oⁱ/i!"))
    \sum_{i\le n} \frac{o^{i}}{i!}
    """
    parts = [term if term in BETWEEN else _term(term) for term in _terms(text)]
    return re.sub(" +", " ", "".join(SIGNS.get(part, part) for part in parts)).strip()


def _terms(text: str) -> list[str]:
    """The terms and the signs between them, outside of parentheses."""
    terms, depth = [""], 0
    for sign in text:
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and sign in BETWEEN:
            terms += [sign, ""]
        else:
            terms[-1] += sign
    return [term for term in terms if term]


def _term(term: str) -> str:
    depth = 0
    for i, sign in enumerate(term):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and sign == "/":
            above, below = _bare(term[:i]), _bare(term[i + 1 :])
            return rf"\frac{{{latex(above)}}}{{{latex(below)}}}"
    return _product(term)


def _bare(term: str) -> str:
    """A term without the parentheses around all of it."""
    depth = 0
    for i, sign in enumerate(term):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0:
            return term[1:-1] if i == len(term) - 1 and sign == ")" else term
    return term


def _product(term: str) -> str:
    result, rest = "", term
    while rest:
        if rest[0] in "([{":
            end = _closing(rest)
            inner = latex(rest[1:end])
            brackets = {"(": (r"\left(", r"\right)"), "[": ("[", "]"), "{": ("{", "}")}[rest[0]]
            result += inner.join(brackets)
            rest = rest[end + 1 :]
            continue
        atom = ATOM.match(rest)
        assert atom is not None
        result += _atom(atom[0])
        rest = rest[atom.end() :]
    return result


def _atom(atom: str) -> str:
    if atom[0] in "_^" and len(atom) == 2:
        return f"{atom[0]}{{{_atom(atom[1]).strip()}}}"
    if atom[0] in "⁰¹²³⁴⁵⁶⁷⁸⁹ⁱⁿ⁻":
        return f"^{{{atom.translate(SUPERSCRIPTS)}}}"
    if atom in GREEK:
        return rf"\{GREEK[atom]} " if atom != "Σ" else r"\sum"
    if atom in NAMES:
        return rf"\{atom}"
    if len(atom) > 1 and atom.isalpha():
        return rf"\operatorname{{{atom}}}"
    return SIGNS.get(atom, atom)


def _closing(text: str) -> int:
    depth = 0
    for i, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0:
            return i
    raise ValueError(f"the formula {text!r} has an open parenthesis")
