"""Run all checks on all model classes, and write what they measured into docs/compatibility.md.

``python -m tests.hooked_models.model_classes`` takes a minute or two; with names of classes it runs those
and prints their rows only.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from tests.hooked_models.model_classes.case import ModelClass, temporary
from tests.hooked_models.model_classes.checks import CHECKS, TOLERANCE
from tests.hooked_models.model_classes.table import MODEL_CLASSES

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
BEGIN = "<!-- written by python -m tests.hooked_models.model_classes -->"
END = "<!-- end -->"


def row(of: ModelClass) -> str:
    """One line of the table: the errors of all checks, or what went wrong."""
    heads, d_k, d_v = of.cells
    with temporary(of) as case:
        errors = {name: check(case) for name, check in CHECKS.items()}
    cells = [f"{e:.0e}" if e <= TOLERANCE else f"**{e:.0e}**" for e in errors.values()]
    names = f"`{of.name.split()[0]}`" + of.name[len(of.name.split()[0]) :]
    return (
        f"| {of.family} | {names} | {of.kind} | {heads} x {d_k} x {d_v} | {' | '.join(cells)} | {of.truth} |"
    )


def table(classes: list[ModelClass]) -> str:
    """The table of these classes in Markdown."""
    columns = ["models", "class", "recurrence", "heads x d_k x d_v", *CHECKS, "compared with"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [row(of) for of in tqdm(classes, unit="class")]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    chosen = [of for name, of in MODEL_CLASSES.items() if not sys.argv[1:] or name in sys.argv[1:]]
    text = table(chosen)
    print(text)  # noqa: T201  (a command)
    if sys.argv[1:]:
        return
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    versions += f", transformer-lens {version('transformer-lens')}"
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    measured = f"\nMeasured with {versions}, float32, on the CPU.\n\n{text}\n"
    PAGE.write_text(f"{before}{BEGIN}{measured}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
