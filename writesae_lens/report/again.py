"""The lines with which a reader makes a page again, steers with a feature or takes it away."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo
from writesae_lens.experiments.origin import dtype_of
from writesae_lens.experiments.passages import DEFAULT_CONTEXT, Passages

# What the command reads where it is not told.
_MAX_PASSAGES = 64


class Again(NamedTuple):
    """How to make a page again: as a command, and in Python."""

    command: str
    python: str


def quoted(text: str) -> str:
    """A text as a literal of Python."""
    return json.dumps(text, ensure_ascii=False)


def command(name: str, options: Sequence[tuple[str, Any]]) -> str:
    """The line of ``writesae-lens NAME``; options whose value is None are left out."""
    given = [part for option, value in options if value is not None for part in (option, str(value))]
    return shlex.join(["writesae-lens", name, *given])


def loading(model: HookedRecurrent, references: Mapping[str, str | None], extra: Sequence[str] = ()) -> str:
    """Python lines that import what is needed and load the model and the SAEs.

    Args:
        model: the page's model.
        references: names of variables, and what a command calls their SAEs: a folder, a best.pt or
            RELEASE:ID; None where that is not known.
        extra: further lines of imports.
    """
    dtype = dtype_of(model)
    sources = {name: _source(reference) for name, reference in references.items()}
    imports = ["from sae_lens import SAE", "from hooked_models import HookedRecurrent", *extra]
    if dtype != "float32":
        imports.insert(0, "import torch")
    if any(source.startswith("WriteSAE.") for source in sources.values()):
        imports.append("from writesae_lens import WriteSAE")
    options = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    lines = [f"model = HookedRecurrent.boot_transformers({quoted(str(model.cfg.model_name))}{options})"]
    return "\n".join([*imports, "", *lines, *(f"{name} = {source}" for name, source in sources.items())])


def _source(reference: str | None) -> str:
    if reference is None:
        return 'SAE.load_from_disk("FOLDER")  # where this SAE is'
    path = Path(reference)
    release, colon, sae_id = reference.rpartition(":")
    if not path.exists() and colon:
        return f"SAE.from_pretrained({quoted(release)}, {quoted(sae_id)})"
    if path.is_file() or (path / "best.pt").is_file():
        return f"WriteSAE.from_checkpoint({quoted(reference)})"
    return f"SAE.load_from_disk({quoted(reference)})"


def reading(passages: Passages, sae: SAE[Any]) -> tuple[str, list[str]]:
    """A Python line that cuts the passages of a page, and the lines of imports that it needs."""
    part = next((part for part in zoo.PARTS if passages.text == zoo.part_name(part)), None)
    if passages.whole_text is None:
        return "tokens = ...  # the token ids that the page was made from", []
    source = f'zoo.text("{part}")' if part else f'open({quoted(passages.text)}, encoding="utf-8").read()'
    bos = ", prepend_bos=True" if sae.cfg.metadata.prepend_bos else ""
    chosen = f"[{passages.first}:{passages.first + len(passages)}]"
    imports = ["from hooked_models import zoo"] * bool(part)
    imports.append("from writesae_lens.experiments import as_passages")
    return f"tokens = as_passages(model, {source}, {passages.shape[1]}{bos}){chosen}", imports


def of_report(
    model: HookedRecurrent,
    saes: Sequence[SAE[Any]],
    passages: Passages,
    references: Sequence[str | None],
    out: Path,
    seed: int,
    results: Sequence[Path] = (),
) -> Again:
    """The command and the Python call of a report of one SAE, or of the page of two.

    Args:
        model, saes, passages, out, seed: as the page was made.
        references: what a command calls the SAEs; None where that is not known.
        results: folders of saved results that the page shows.
    """
    first = saes[0].cfg.metadata
    shipped = passages.text == zoo.part_name("test")
    usual = first.context_size or DEFAULT_CONTEXT
    line = command(
        "report",
        [
            *(("--sae", reference or "FOLDER") for reference in references),
            *(("--results", folder) for folder in results),
            ("--model", None if first.model_name == model.cfg.model_name else model.cfg.model_name),
            ("--text", None if shipped else "FILE" if passages.whole_text is None else passages.text),
            ("--context-size", None if passages.shape[1] == usual else passages.shape[1]),
            ("--max-passages", None if len(passages) == _MAX_PASSAGES else len(passages)),
            ("--out", out),
            ("--seed", seed or None),
        ],
    )
    cut, imports = reading(passages, saes[0])
    names = ("sae",) if len(saes) == 1 else ("one", "other")
    function = "make_report" if len(saes) == 1 else "make_side_by_side"
    about = "sae"
    if len(saes) > 1:
        keys = (quoted(reference or name) for name, reference in zip(names, references, strict=True))
        about = "{" + ", ".join(f"{key}: {name}" for key, name in zip(keys, names, strict=True)) + "}"
    cut, imports = reading(passages, saes[0])
    imports = [*imports, f"from writesae_lens.report import {function}" + ", saved_results" * bool(results)]
    lines = [loading(model, dict(zip(names, references, strict=True)), imports), cut]
    arguments = f"{quoted(str(out))}, model, {about}, tokens, seed={seed}"
    if results:
        folders = ", ".join(quoted(str(folder)) for folder in results)
        lines.append(f"results = [result for folder in ({folders},) for result in saved_results(folder)]")
        arguments += ", results=results"
    return Again(line, "\n".join([*lines, f"{function}({arguments})"]))
