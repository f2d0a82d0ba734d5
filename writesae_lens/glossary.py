"""The terms that pages explain: those of the documentation's glossary."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib.resources import files
from typing import NamedTuple

# A copy of docs/glossary.md, which an installed package does not have; a test compares the two.
FILE = "glossary.md"
_ROW = re.compile(r"\| (?P<names>\*\*.+?) \| (?P<meaning>.+?) \|(?: .*)?")


class Term(NamedTuple):
    """A term with its synonyms, and what it means, as HTML."""

    names: tuple[str, ...]
    meaning: str


@cache
def terms() -> tuple[Term, ...]:
    """Every term of the glossary, in its order."""
    lines = files("writesae_lens").joinpath(FILE).read_text(encoding="utf-8").splitlines()
    rows = filter(None, map(_ROW.fullmatch, lines))
    return tuple(Term(_names(row["names"]), _html(row["meaning"])) for row in rows)


def _names(text: str) -> tuple[str, ...]:
    """A term and its synonyms: what is bold, without remarks in brackets."""
    bold = ", ".join(re.findall(r"\*\*(.+?)\*\*", text))
    return tuple(re.sub(r" \(.*?\)", "", bold).split(", "))


def _html(text: str) -> str:
    """The marks that the glossary uses (code, emphasis, formulas) as HTML."""
    pieces = re.split(r"(`.+?`|\$.+?\$)", escape(text, quote=False))
    return "".join(_MARKED.get(piece[:1], _emphasized)(piece) for piece in pieces)


def _emphasized(text: str) -> str:
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", text)


def _formula(text: str) -> str:
    """A formula of TeX without the commands that plain letters stand for."""
    text = re.sub(r"\\(?:mathrm|text)\{(.*?)\}", r"\1", text.strip("$"))
    text = text.replace(r"^\top", "ᵀ").replace(r"\cdots", "…").replace(r"\log", "log").replace(r"\times", "×")
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        text = re.sub(mark + r"(?:\{(.*?)\}|(\S))", rf"<{tag}>\1\2</{tag}>", text)
    return text


_MARKED = {"`": lambda piece: f"<code>{piece[1:-1]}</code>", "$": _formula}
