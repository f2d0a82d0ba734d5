"""The programs of the docs that patch, ablate, differentiate and unembed writes print what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = (
    "Patching writes",
    "Ablating every head",
    "Direct effects of heads on a logit",
    "Gradients through a write",
    "Logit lens of a write",
)


def blocks(recipe: str) -> tuple[str, str]:
    """The program under a heading of some page of the docs, and what it prints."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for part in re.split(r"^##+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            if part.splitlines()[0] == recipe:
                program, printed = re.findall(r"^```(?:python|text)\n(.*?)^```$", part, flags=re.M | re.S)
                return program, printed
    raise AssertionError(f"no page of the docs has a section {recipe!r}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_prints_what_the_page_says(recipe: str, tmp_path: Path) -> None:
    program, printed = blocks(recipe)
    (tmp_path / "recipe.py").write_text(program)
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "recipe.py"],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == printed
