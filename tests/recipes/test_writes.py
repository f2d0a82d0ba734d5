"""The programs of the docs that patch, ablate, differentiate and unembed writes print what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipes.programs import ROOT, output_of

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
    assert output_of(program, tmp_path, "-W", "error::UserWarning") == printed
