r"""Formulas become MathML when the site is built: browsers typeset it themselves, nothing is loaded to do so.

In Markdown ``$k v^\top$`` stands in a line and ``$$...$$`` in a paragraph of its own, as on GitHub and in
Jupyter. Pages have them marked by pymdownx.arithmatex; notebooks, HTML by nbconvert, have them as they were.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.formulas")

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
# A dollar of a formula touches it on the inside; what is between <code> or <pre> tags is left alone.
IN_NOTEBOOK = re.compile(
    r"<(code|pre)\b.*?</\1>|\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\w)", re.S
)
NOTEBOOK_TEXT = re.compile(
    r'(<div class="jp-RenderedHTMLCommon jp-RenderedMarkdown[^>]*>)(.*?)(</div>)', re.S
)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri

    def marked(match: re.Match[str]) -> str:
        return mathml(match[2], "block" if match[1] == "div" else "inline", source)

    def in_notebook(match: re.Match[str]) -> str:
        if match[2]:
            return mathml(match[2], "block", source)
        return mathml(match[3], "inline", source) if match[3] else match[0]

    if source.endswith(".ipynb"):
        return NOTEBOOK_TEXT.sub(lambda m: m[1] + IN_NOTEBOOK.sub(in_notebook, m[2]) + m[3], content)
    return MARKED.sub(marked, content)


def mathml(latex: str, display: str, source: str) -> str:
    """A formula as it stands in HTML, typeset; a command that the converter does not know is a warning."""
    made = convert(html.unescape(latex).strip(), display=display)
    if unknown := re.findall(r"\\[a-zA-Z]+", made):
        log.warning("%s: the formula %s has %s, unknown to latex2mathml", source, latex, ", ".join(unknown))
    return made
