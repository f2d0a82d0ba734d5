"""Damaged and hostile files of every form: a sound load or one line, no code run, bounded time and memory.

``pytest -m slow tests/fuzz`` reads 3,000 mutations and prints the counts; a few of each form are read always.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from tests.fuzz import harness
from tests.fuzz.forms import all_forms
from tests.fuzz.harness import Form
from tests.fuzz.mutations import mutations

FEW = 10
# Mutations of each form, 3,000 in all: the more, the more of its reading is this package's own.
COUNTS = {
    "best.pt, zip": 450,
    "best.pt, zip, flat, half": 200,
    "best.pt, legacy": 350,
    "manifest.json": 200,
    "BlinkDL .pth": 250,
    "BlinkDL .pth, half": 150,
    "mamba_ssm folder": 250,
    "mamba_ssm folder, in parts": 100,
    "fla folder": 150,
    "fla folder, DeltaNet": 100,
    "HF folder": 300,
    "SAELens folder, bilinear_gated": 200,
    "SAELens folder, flat": 100,
    "result folder": 120,
    "progress folder": 50,
    "table": 30,
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    """Every form, after its sound example has been read once here: forked children import nothing more."""
    made = {form.name: form for form in all_forms(tmp_path_factory.mktemp("seeds"))}
    at = tmp_path_factory.mktemp("sound")
    for form in made.values():
        for name, content in form.seeds.items():
            (at / form.name / name).parent.mkdir(parents=True, exist_ok=True)
            (at / form.name / name).write_bytes(content)
        if form.name == "manifest.json":
            with pytest.raises(ValueError, match="SHA-256"):
                form.read(at / form.name)
        else:
            form.read(at / form.name)
    return made


def faults(found: list[harness.Outcome]) -> list[str]:
    return [
        f"{o.mutation.file}, {o.mutation.how}: {o.verdict}"
        for o in found
        if o.verdict not in ("loaded", "refused")
    ]


@pytest.mark.parametrize("name", COUNTS)
def test_a_few_mutations(forms, tmp_path, name):
    found = harness.run(forms[name], mutations(forms[name], FEW, seed=1), tmp_path)
    assert not faults(found)


def test_the_harness_sees_what_it_is_for(tmp_path):
    """A reader that grows, hangs, writes, runs something or raises another exception."""

    def misbehaves(at):
        what = (at / "x").read_bytes()
        if what == b"grows":
            return b"x" * (300 * 10**6)
        if what == b"hangs":
            while True:
                pass
        if what == b"writes":
            return (at.parent / "elsewhere").write_bytes(b"")
        if what == b"runs":
            import os

            return os.system("true")
        if what == b"raises":
            raise KeyError(what)
        return what

    form = Form("misbehaving", {"x": b""}, misbehaves)
    inputs = [harness.Mutation("x", "", x) for x in (b"", b"grows", b"writes", b"runs", b"raises", b"hangs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "SECONDS", 1)
        verdicts = [o.verdict for o in harness.run(form, inputs, tmp_path)]
    assert verdicts[0] == "loaded"
    said = ("grew by", "did [", "did [", "KeyError", "ran for more than 1 s")
    for verdict, start in zip(verdicts[1:], said, strict=True):
        assert verdict.startswith(start)


@pytest.mark.slow
def test_three_thousand_mutations(forms, tmp_path, capsys):
    assert sum(COUNTS.values()) == 3000
    outcomes = {
        name: harness.run(forms[name], mutations(forms[name], count, seed=0), tmp_path)
        for name, count in COUNTS.items()
    }
    with capsys.disabled():
        for name, found in outcomes.items():
            verdicts = Counter(outcome.verdict for outcome in found)
            sys.stdout.write(f"{name}: {len(found)} read, {dict(verdicts)}\n")
    assert not [f"{name}: {fault}" for name, found in outcomes.items() for fault in faults(found)]
