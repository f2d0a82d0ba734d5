"""Filling in the HTML files of this folder, which make self-contained pages."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2

from writesae_lens.glossary import terms


def fill_in(name: str, **fields: Any) -> str:
    """The HTML of a page.

    Args:
        name: of its file in this folder, such as ``report.html``. The file may include others of the folder
            (``head.html``, ``glossary.html``), and put a script in with ``{{ source("shared.js") | safe }}``.
        **fields: what the file names in ``{{ }}``; markup in it is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name).render(source=_read, glossary=terms, **fields)


def _read(name: str) -> str:
    return files("writesae_lens.report").joinpath(name).read_text(encoding="utf-8")
