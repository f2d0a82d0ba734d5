"""The docstrings of this project, read as the Markdown that mkdocstrings takes them for.

They are written for ``help()``: two arguments may share a line, what follows ``Returns:`` is prose, formulas
stand after ``::``, hooks in a table of plain text, and a class may append its base's text to its own.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring when its object is loaded."""

    def on_class_instance(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        """``__doc__ = f"..."`` in a class body; another class's text in it becomes a mention of that."""
        if cls.docstring is None and isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__doc__":
                    text = inspect.cleandoc(_text_of(statement.value))
                    cls.docstring = griffe.Docstring(text, parent=cls, lineno=statement.lineno)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with its formulas fenced, its tables in Markdown, an argument a line, and no HTML."""
    lines: list[str] = []
    section, rest = "", text.split("\n")
    while rest:
        line = rest.pop(0)
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            section = line
        elif line and not line.startswith(" "):
            section = ""
        if re.match(r"\s*=+  =", line):
            table = [line]
            while rest and rest[0].strip():
                table.append(rest.pop(0))
            lines += _table(table)
        elif line.endswith("::") or (line == "" and not section and rest and rest[0].startswith("    ")):
            formula = []
            while rest and (not rest[0].strip() or rest[0].startswith("    ")):
                formula.append(rest.pop(0)[4:])
            formula = "\n".join(formula).strip("\n").split("\n")
            if len(formula) == 1:  # nothing that its spaces align
                formula = [re.sub(" {4,}", "   ", formula[0])]
            lines += [_escaped(line.removesuffix(":")), "", "```text", *formula, "```", ""]
        elif section == "Args:" and (several := re.match(r"    (\w+(?:, \w+)+): ", line)):
            shared = [line[several.end() :]]
            while rest and rest[0].startswith("        "):
                shared.append(rest.pop(0).strip())
            told = _escaped(" ".join(shared))
            lines += [f"    {name}: {told}" for name in several[1].split(", ")]
        elif section == "Returns:" and line.startswith("    ") and lines[-1] == section:
            lines.append(f"    : {_escaped(line.strip())}")  # or what comes before a colon counts as a type
        else:
            lines.append(_escaped(line))
    return "\n".join(lines)


def _text_of(value: ast.expr) -> str:
    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
    return "".join(
        str(part.value)
        if isinstance(part, ast.Constant)
        else f"The hooks are those of `{ast.unparse(part.value).removesuffix('.__doc__')}`."
        for part in parts
        if isinstance(part, (ast.Constant, ast.FormattedValue))
    )


def _escaped(line: str) -> str:
    """What stands between angle brackets outside of code is no HTML."""
    return re.sub(r"(`+.+?`+)|<(?=[A-Za-z/])", lambda match: match[1] or "&lt;", line)


def _table(lines: list[str]) -> list[str]:
    """A table whose columns are marked by rows of ``=``."""
    columns = [match.start() for match in re.finditer("=+", lines[0])]
    rows: list[list[str]] = []
    for line in lines[1:]:
        if line.strip().startswith("="):
            continue
        cells = [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
        if cells[0]:
            rows.append(cells)
        else:  # the row above goes on
            rows[-1] = [f"{x} {y}".strip() for x, y in zip(rows[-1], cells, strict=True)]
    code = re.compile(r"hook_\S+(, hook_\S+)*|\[.*\]")
    shown = [[f"`{cell}`" if code.fullmatch(cell) else _escaped(cell) for cell in row] for row in rows]
    shown.insert(1, ["---"] * len(columns))
    return ["", *(f"| {' | '.join(row)} |" for row in shown), ""]
