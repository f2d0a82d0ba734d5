"""The programs in docs/recipes.md print what the page says; one whose package is not installed is skipped."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.recipes.programs import ROOT, output_of

PAGE = (ROOT / "docs/recipes.md").read_text()
PACKAGES = {"nnsight": "nnsight", "lm-eval": "lm_eval", "peft": "peft", "accelerate": "accelerate"}


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of one language in a section of the page."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (own,) = (part for part in text if part.splitlines()[0] == section)
    return re.findall(rf"^```{language}\n(.*?)^```$", own, flags=re.MULTILINE | re.DOTALL)


def test_every_section_is_tested() -> None:
    assert re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE) == list(PACKAGES)


@pytest.mark.parametrize("section", PACKAGES)
def test_a_recipe_prints_what_the_page_says(section: str, tmp_path: Path) -> None:
    """In a process of its own: nnsight changes Python's ``object``."""
    if find_spec(PACKAGES[section]) is None:
        pytest.skip(f"{section} is not installed")
    (program,), (printed,) = blocks(section, "python"), blocks(section, "text")
    assert output_of(program, tmp_path) == printed
