"""Bodies of the commands ``export`` and ``label``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import typer

from hooked_models.files.json_files import read_json
from hooked_models.files.whole_files import write_whole
from writesae_lens.cli.subjects import Subject, each_in, load, load_sae, warnings_as_lines
from writesae_lens.errors import WriteSAEError, interruptible
from writesae_lens.locks import locked
from writesae_lens.saes.whole import CONFIG
from writesae_lens.use.exporting import export_features
from writesae_lens.use.labels import KEY, add_labels, labels_of


def run_export(subject: Subject, out: Path, **options: Any) -> None:
    """Export the features of the SAEs; print the files, and how many features are active."""
    loaded = load(subject._replace(saes=_each_in(subject.saes)))
    with interruptible("nothing is written: run it again"), warnings_as_lines():
        path = export_features(loaded.model, loaded.saes, loaded.passages, out, **options)
    typer.echo(f"export: {path}")
    if options["neuronpedia"] is not None:
        typer.echo(f"Neuronpedia: {path.parent / 'neuronpedia'}")
    with path.open(encoding="utf-8") as file:
        columns = ("n_active", "n_measured", "label")
        table = pd.DataFrame(
            [[line[name] for name in columns] for line in map(json.loads, file)], columns=columns
        )
    typer.echo(
        f"{len(table):,} features: {(table.n_active > 0).sum():,} active in {loaded.passages.numel():,} "
        f"tokens, {(table.n_measured > 0).sum():,} with measured effects, {(table.label != '').sum():,} with "
        "a label"
    )


def run_label(references: list[str], labels: Path) -> None:
    """Put labels into the cfg.json of SAEs' folders, and print how many features have one."""
    references = _each_in(references)
    folders = [Path(reference) for reference in references]
    for folder in folders:
        if not (folder / CONFIG).is_file():
            raise WriteSAEError(
                f"{folder} is no SAE folder: labels are kept in the {CONFIG} that SAELens wrote "
                "(writesae-lens convert makes one of a published SAE)"
            )
    saes = [load_sae(reference, "cpu") for reference in references]
    add_labels(saes, labels)
    for folder, sae in zip(folders, saes, strict=True):
        with locked(folder):
            cfg = read_json(folder / CONFIG)
            cfg["metadata"][KEY] = sae.cfg.metadata[KEY]
            content = json.dumps(cfg)
            write_whole(
                folder / CONFIG, lambda beside, text=content: beside.write_text(text, encoding="utf-8")
            )
    count, every = sum(len(labels_of(sae)) for sae in saes), sum(sae.cfg.d_sae for sae in saes)
    typer.echo(f"{count:,} of {every:,} features have a label")


def _each_in(references: list[str]) -> list[str]:
    """The SAEs that are named, where a folder of several stands for all of them."""
    every = [one for reference in references for one in each_in(reference)]
    if len(set(every)) < len(every):
        raise WriteSAEError("one --sae is given twice: each must be another")
    return every
