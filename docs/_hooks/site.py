"""Pages made from the repository: changelog, tutorials, help texts, catalogue of experiments; and links."""

from __future__ import annotations

import functools
import json
import logging
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks.site")
ROOT = Path(__file__).parents[2]

# Files of the repository that are pages of the site as they are.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "hooked_models/zoo/README.md": "shipped_models.md",
    "tutorials/README.md": "tutorials/index.md",
}
COMMAND_LINE = "command_line.md"
TUTORIALS = "tutorials/"  # stands in the navigation for those that there are
# Comments in pages that are replaced by what the catalogue of experiments holds.
TABLE, REFERENCE = "<!-- catalogue -->", "<!-- catalogue: reference -->"

HELP = """
import json
from typer.main import get_command
from typer.testing import CliRunner
from writesae_lens_cli import app

names = list(get_command(app).commands)
run = CliRunner().invoke
texts = {n: run(app, [*n.split(), "--help"], prog_name="writesae-lens").output for n in ["", *names]}
print(json.dumps(texts))
"""


CATALOGUE = """
import json
from writesae_lens.experiments import EXPERIMENTS, OF_MODELS

fields = [
    [e.name, e.function.__module__, e.function.__name__, e.question, e.row, list(e.table)]
    for e in (EXPERIMENTS | OF_MODELS).values()
]
print(json.dumps(fields))
"""


def on_startup(**_: Any) -> None:
    """``--quiet`` drops warnings before ``--strict`` counts them: let it be quiet about the rest only."""
    logger = logging.getLogger("mkdocs")
    logger.setLevel(min(logger.level, logging.WARNING))


def on_config(config: Any) -> Any:
    notebooks = sorted(path.name for path in (ROOT / "tutorials").glob("*.ipynb"))
    pages = ["index.md"] * (ROOT / "tutorials/README.md").is_file() + notebooks
    config.nav = [
        {title: [TUTORIALS + page for page in pages] if where == TUTORIALS else where}
        for entry in config.nav
        for title, where in entry.items()
        if where != TUTORIALS or pages
    ]
    if pages:
        config.watch.append(str(ROOT / "tutorials"))
    return config


@event_priority(100)  # before the plugin that knows notebooks
def on_files(files: Any, config: Any) -> Any:
    for path, uri in PAGES.items():
        if (ROOT / path).is_file():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        uri = f"{TUTORIALS}{path.name}"
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, COMMAND_LINE, content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that are right in the repository are made right in the site."""

    if TABLE in markdown or REFERENCE in markdown:
        markdown = markdown.replace(TABLE, _catalogue_table()).replace(REFERENCE, _catalogue_reference())

    def relinked(match: re.Match[str]) -> str:
        uri, anchor = _place_of(match[1], match[2] or "", page.file.src_uri)
        return match[0] if uri is None else f"]({_relative(uri, page.file.src_uri)}{anchor})"

    return re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", relinked, markdown)


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """The same for notebooks, which become HTML at once; and what they would load from elsewhere goes."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def relinked(match: re.Match[str]) -> str:
        uri, anchor = _place_of(match[1], match[2] or "", page.file.src_uri)
        found = uri and files.get_file_from_path(uri)
        if not found:
            log.warning("%s links to %s, which is no page of the site", page.file.src_uri, match[1])
            return match[0]
        return f'href="{_relative(found.url, page.file.url)}{anchor}"'

    html = re.sub(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*)?"', relinked, html)
    html = re.sub(r'<script src="(?:https?://[^"]*)?">\s*</script>', "", html)
    return re.sub(r"<script[^>]*>[^<]*(?:MathJax|https?://[^<]*mermaid).*?</script>", "", html, flags=re.S)


def _source_of(uri: str) -> str:
    """Where in the repository a page comes from."""
    outside = {page: path for path, page in PAGES.items()}
    return outside.get(uri) or (uri if uri.startswith(TUTORIALS) else f"docs/{uri}")


def _place_of(link: str, anchor: str, of: str) -> tuple[str | None, str]:
    """The page, and the place in it, that a link in the repository points at; None: it is no page."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(_source_of(of)), link))
    if target == "README.md":
        return "index.md", ""
    if target.startswith("docs/"):
        return target.removeprefix("docs/"), anchor
    return PAGES.get(target) or (target if target.startswith(TUTORIALS) else None), anchor


def _relative(target: str, of: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(of) or ".")


def _printed_json(code: str) -> Any:
    """What a Python program of this repository prints as JSON on its last line."""
    plain = os.environ | {"TERMINAL_WIDTH": "98", "COLUMNS": "98", "TERM": "dumb", "NO_COLOR": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True)
    if ran.returncode:
        raise PluginError(f"could not run writesae-lens:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def _command_line() -> str:
    """The ``--help`` of every command."""
    lines = ["# Command line", "", "The output of `writesae-lens COMMAND --help`."]
    for name, text in _printed_json(HELP).items():
        shown = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        lines += ["", f"## `{f'writesae-lens {name}'.strip()}`", "", "```text", shown, "```"]
    return "\n".join(lines) + "\n"


@functools.cache
def _catalogue() -> list[Any]:
    return _printed_json(CATALOGUE)


def _catalogue_table() -> str:
    lines = [
        ["question", "call", "command", "a row of `records`", "figures of merit in `summary`"],
        ["---"] * 5,
    ]
    for name, _, function, question, row, table in _catalogue():
        figures = ", ".join(f"`{figure}`" for figure in table)
        lines.append([question, f"`{function}`", f"`{name}`", row, figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _catalogue_reference() -> str:
    return "\n\n".join(f"::: {module}.{function}" for _, module, function, *_ in _catalogue())
