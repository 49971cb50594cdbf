"""Equations in the plain text of docstrings, `loss = Σ_v t_v · (lse(z) − z_v)`, as MathML."""

import re
from html import escape

TOKEN = re.compile(
    r"(?P<sum>[Σ∏])"
    r"|(?P<power>[²³⁰¹⁴-⁹]+)"
    r"|(?P<name>[^\W\d_Σ∏½][^\W_²³¹]*\u0304?(?:_(?=[^\W\d_]{3})[^\W_²³¹]+)*'*)"
    r"|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<space>\s+)"
    r"|(?P<code>`[^`]+`)"
    r"|(?P<operator>->|<=|>=|\S)"
)
SUBSCRIPT = re.compile(r"_(\{[^}]*\}|\w{1,2}(?!\w))")
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
OPERATORS = {"->": "→", "<=": "≤", ">=": "≥", "·": "⋅"}
MARK = "\u0304"  # The bar over s̄.


def of_text(text: str) -> str:
    """Returns the MathML of an equation in plain text."""
    return f'<math display="block"><mrow>{_row(text)}</mrow></math>'


def _row(text: str) -> str:
    position, parts = 0, []
    while position < len(text):
        found = TOKEN.match(text, position)
        assert found
        position, kind, token = found.end(), str(found.lastgroup), found.group()
        if kind == "space" and not _between_words(text, found.start(), position):
            continue  # Browsers know the space around operators.
        if kind == "power":
            parts[-1] = f"<msup><mrow>{parts[-1]}</mrow><mn>{token.translate(POWERS)}</mn></msup>"
            continue
        part = _part(kind, token)
        under = SUBSCRIPT.match(text, position) if kind in ("sum", "name") else None
        if under:
            position = under.end()
            low = f"<mrow>{_row(under[1].strip('{}'))}</mrow>"
            tag = "munder" if kind == "sum" else "msub"
            part = f"<{tag}>{part}{low}</{tag}>"
        parts.append(part)
    return "".join(parts)


def _between_words(text: str, start: int, end: int) -> bool:
    return bool(re.match(r"[\w`'})]", text[start - 1 : start]) and re.match(r"[\w`]", text[end:]))


def _part(kind: str, token: str) -> str:
    if kind == "sum":
        return '<mo largeop="true" movablelimits="false">' + {"Σ": "∑", "∏": "∏"}[token] + "</mo>"
    if kind == "number":
        return f"<mn>{token}</mn>"
    if kind == "space":
        return f'<mspace width="{0.25 * min(len(token), 8)}em"/>'
    if kind == "code":
        return f"<mtext>{escape(token.strip('`'))}</mtext>"
    if kind == "operator":
        stretchy = ' stretchy="false"' if token in "()[]|‖√" else ""
        return f"<mo{stretchy}>{escape(OPERATORS.get(token, token))}</mo>"
    primes = len(token) - len(token.rstrip("'"))
    name = token.rstrip("'")
    single = len(name.replace(MARK, "")) == 1
    element = f"<mi>{name}</mi>" if single else f"<mtext>{escape(name)}</mtext>"
    return f"<msup>{element}<mo>{'′' * primes}</mo></msup>" if primes else element


def is_equation(paragraph: list[str]) -> bool:
    """Returns whether lines of a docstring are an equation: signs, and no sentence's end."""
    text = " ".join(paragraph).strip()
    return bool(re.search(r" = |->| − ", text)) and text[-1:] not in (".", ":", "")
