"""Tables of every cell of a shipped model, from the folder of a sweep: ``make cells MODEL=tiny-gdn``.

The sweep has trained and tested each cell's SAE (`writesae_lens.sweep.sweep`). What it does not measure is
measured here, once, and stays in the folder: which part of each stand-in's error is to blame.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.files.whole_files import write_whole
from tests.benchmarks import cells_table
from tests.benchmarks.cells_parts import parts_of_the_error
from writesae_lens import WriteSAEError
from writesae_lens.experiments import ExperimentResult, stability
from writesae_lens.experiments.origin import fingerprint
from writesae_lens.experiments.passages import Passages, as_passages
from writesae_lens.saes.whole import CONFIG
from writesae_lens.sweep.store import SWEEP, CellKey, Store, name_of

PARTS = "parts.json"


def main() -> None:
    """Print the tables of the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.all_cells", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a sweep of a shipped model with the experiment replace")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread that share the cells")
    parser.add_argument("--seeds", type=Path, nargs="*", default=[], help="sweeps of other seeds, to compare")
    options = parser.parse_args()
    print(tables(options.folder, options.workers, options.seeds), flush=True)


def tables(folder: Path, workers: int = 1, seeds: list[Path] | None = None) -> str:
    """The tables of all finished cells of a sweep; with other seeds, of the features found again there.

    Raises:
        WriteSAEError: no cell has a result of the replacement test.
    """
    cells = [(row["layer"], row["head"]) for row in Store(folder).rows() if "replace_seconds" in row]
    if not cells:
        raise WriteSAEError(f"{folder} holds no sweep with the experiment replace: run writesae-lens sweep")
    about = json.loads((folder / SWEEP).read_text("utf-8"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        parts = dict(zip(cells, pool.map(parts_of, *zip(*((folder, cell) for cell in cells)))))
    summaries = {cell: _result(folder, cell).summary for cell in cells}
    test = about["experiments"]["replace"]
    pieces = [
        f"{about['model']}, seed {about['seed']}, {about['text']}: {test['max_firings']} firings a cell, "
        f"horizon {test['horizon']}. In %, but for bits, dimensions and counts; in brackets, of how many "
        "cells a mean is, where not of all; * layer 0: an n-gram table by construction.",
        cells_table.cells_table(summaries),
        cells_table.targets_table(summaries),
        "Median recovered (own / later / both) with a part of each stand-in put right:",
        cells_table.parts_table(parts),
    ]
    if seeds:
        pieces += ["Features found again in other seeds:", _stability_table(folder, seeds, cells)]
    return "\n\n".join(pieces)


def parts_of(folder: Path, cell: CellKey) -> dict[str, Any]:
    """Which part of the error of a cell's stand-ins is to blame; it is measured unless it is noted."""
    place = folder / "results" / name_of(cell) / PARTS
    if not place.is_file():
        result = _result(folder, cell)
        model = HookedRecurrent.boot_transformers(result.summary["model"])
        sae = SAE.load_from_disk(folder / name_of(cell))
        parts = parts_of_the_error(model, sae, _passages(model, result), result)
        write_whole(place, lambda beside: beside.write_text(json.dumps(parts, indent=2), "utf-8"))
    return json.loads(place.read_text("utf-8"))


def _result(folder: Path, cell: CellKey) -> ExperimentResult:
    return ExperimentResult.load(folder / "results" / name_of(cell) / "replace")


def _passages(model: HookedRecurrent, result: ExperimentResult) -> Passages:
    """The passages of the shipped text that a test has read."""
    n, tokens = result.summary["n_passages"], result.summary["text_tokens"]
    passages = as_passages(model, zoo.text("test"), tokens // n)[-n:]
    if fingerprint(passages) != result.summary["text_hash"]:
        raise WriteSAEError(f"a test on {result.summary['text']}: only the shipped text's test part is known")
    return passages


def _stability_table(folder: Path, seeds: list[Path], cells: list[CellKey]) -> str:
    """How many features of each cell are found again in the SAEs of the other folders, and in controls."""
    summaries = {}
    for cell in cells:
        folders = {"this": folder} | {f"other {n}": other for n, other in enumerate(seeds, 1)}
        if all((path / name_of(cell) / CONFIG).is_file() for path in folders.values()):
            saes = {name: SAE.load_from_disk(path / name_of(cell)) for name, path in folders.items()}
            result = _result(folder, cell)
            model = HookedRecurrent.boot_transformers(result.summary["model"])
            compared = stability(model, saes, _passages(model, result), verbose=False)
            summaries[cell] = compared.summary
    return cells_table.stability_table(summaries)


if __name__ == "__main__":
    try:
        main()
    except HookedModelError as wrong:
        print(wrong, file=sys.stderr)
        sys.exit(2)
