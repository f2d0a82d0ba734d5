"""Train a recipe on every cell of a shipped model, test each, print tables: ``make cells MODEL=tiny-gdn``.

SAEs are trained on the training part of the shipped text and tested on passages of 256 tokens of its test
part or, for choices, of its validation part. Every cell's SAE and results stay in the folder: the same
command goes on where a stopped run was, and tests again only what is not there. ``--workers`` shares the
cells among processes, ``--shard`` among machines that write to one folder.
"""

from __future__ import annotations

import os

# One thread a process: processes share the cores by cells. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sae_lens import SAE

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.files.whole_files import write_whole
from hooked_models.hooked_recurrent import Cell
from tests.benchmarks import cells_table
from tests.benchmarks.cells_parts import parts_of_the_error
from writesae_lens import WriteSAEError
from writesae_lens.cli.training import parse_cells
from writesae_lens.experiments import ExperimentResult, replacement_test, stability
from writesae_lens.experiments.passages import Passages, as_passages
from writesae_lens.experiments.result import SUMMARY, Progress
from writesae_lens.locks import locked
from writesae_lens.saelens.runner import train_cells
from writesae_lens.saes.config import PAPER_SCHEDULE, WriteSAETrainingConfig
from writesae_lens.saes.whole import CONFIG

CONTEXT = 256
# Cells that are trained from one forward pass: more would hold more writes in memory at once.
GROUP = 4
PARTS = "parts.json"


def main() -> int:
    """Run as the command line asks; the exit status is 1 where a cell failed."""
    options = _options()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = HookedRecurrent.boot_transformers(options.model, device="cpu")
    cells = parse_cells(model, options.cells)
    status = 0
    if options.workers > 1 and not options.table:
        status = _in_processes(options.workers)
    elif not options.table:
        status = run(model, cells, options)
    if options.shard == (0, 1):
        print(tables(model, cells, options), flush=True)
    return status


def run(model: HookedRecurrent, cells: Sequence[Cell], options: argparse.Namespace) -> int:
    """Train and test the cells of this shard, those of one layer together; 1 where one failed."""
    number, of = options.shard
    for name, settings in _settings(options).items():  # a folder with another run in it is refused
        with locked(options.out / name, wait=60.0):
            Progress(options.out / name, settings)
    passages = as_passages(model, zoo.text(options.part), CONTEXT)[: options.passages]
    failed = 0
    for group in groups(cells)[number::of]:
        try:
            train(model, group, options)
            for cell in group:
                test(model, cell, passages, options)
        except HookedModelError as error:  # the others go on
            _say(f"layer {group[0].layer}, heads {[cell.head for cell in group]} failed: {error}")
            failed = 1
    return failed


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one layer, at most `GROUP` together."""
    layers = dict.fromkeys(cell.layer for cell in cells)
    by_layer = [[cell for cell in cells if cell.layer == layer] for layer in layers]
    return [of[start : start + GROUP] for of in by_layer for start in range(0, len(of), GROUP)]


def train(model: HookedRecurrent, group: Sequence[Cell], options: argparse.Namespace) -> None:
    """Train the SAEs that are not there yet."""
    missing = [cell for cell in group if not (_folder(cell, options) / "sae" / CONFIG).is_file()]
    if not missing:
        return
    recipe, papers = _recipe(options), options.recipe == "paper"
    start = time.process_time()
    train_cells(
        model,
        missing,
        [_folder(cell, options) / "sae" for cell in missing],
        options.training_tokens,
        lambda cell: recipe(d_k=cell.d_k, d_v=cell.d_v),
        site="state" if papers else "write",
        schedule=PAPER_SCHEDULE if papers else None,
        seed=options.seed,
    )
    seconds = (time.process_time() - start) / len(missing)
    names = ", ".join(f"{cell.layer}:{cell.head}" for cell in missing)
    _say(f"trained {names}: {seconds:.0f} CPU seconds a cell")


def test(model: HookedRecurrent, cell: Cell, passages: Passages, options: argparse.Namespace) -> None:
    """Test a cell's SAE, as far as its results are not there."""
    folder = _folder(cell, options) / options.part
    how = {"horizon": options.horizon, "max_firings": options.firings, "seed": options.seed}
    if (folder / PARTS).is_file():
        return
    sae = SAE.load_from_disk(folder.parent / "sae")
    start = time.process_time()
    if not (folder / SUMMARY).is_file():
        progress = str(folder / "progress")
        replacement_test(model, sae, passages, **how, progress_folder=progress, verbose=False).save(folder)
    result = ExperimentResult.load(folder)
    parts = parts_of_the_error(model, sae, passages, result)
    write_whole(folder / PARTS, lambda beside: beside.write_text(json.dumps(parts, indent=2), "utf-8"))
    seconds = time.process_time() - start
    _say(f"tested {cell.layer}:{cell.head}: {result.headline} ({seconds:.0f} CPU seconds)")


def tables(model: HookedRecurrent, cells: Sequence[Cell], options: argparse.Namespace) -> str:
    """The tables of all cells whose results are there, and which ones are not."""
    summaries, parts, missing = {}, {}, []
    for cell in cells:
        folder, name = _folder(cell, options) / options.part, (cell.layer, cell.head)
        if not (folder / PARTS).is_file():
            missing.append(f"{cell.layer}:{cell.head}")
            continue
        summaries[name] = ExperimentResult.load(folder).summary
        parts[name] = json.loads((folder / PARTS).read_text("utf-8"))
    if not summaries:
        raise WriteSAEError(f"{options.out} holds no result of the {options.part} part: run without --table")
    about = (
        f"{options.model}, recipe {options.recipe}, seed {options.seed}, {options.part} part: "
        f"{options.firings} firings a cell, horizon {options.horizon}. In %, but for bits, dimensions and "
        "counts; in brackets, of how many cells a mean is, where not of all; * layer 0: an n-gram table by "
        "construction."
    )
    pieces = [
        about,
        cells_table.cells_table(summaries),
        cells_table.targets_table(summaries),
        "Median recovered (own / later / both) with a part of each stand-in put right:",
        cells_table.parts_table(parts),
    ]
    if missing:
        pieces.insert(1, f"Not there yet: {', '.join(missing)}.")
    if options.seeds:
        pieces += ["Features found again in other seeds:", _stability_table(model, cells, options)]
    return "\n\n".join(pieces)


def _stability_table(model: HookedRecurrent, cells: Sequence[Cell], options: argparse.Namespace) -> str:
    """How many features of each cell are found again in the SAEs of the other folders, and in controls."""
    passages = as_passages(model, zoo.text(options.part), CONTEXT)[: options.passages]
    summaries = {}
    for cell in cells:
        folder = _folder(cell, options)
        saes = {"this": folder / "sae"} | {
            f"other {n + 1}": other / folder.name / "sae" for n, other in enumerate(options.seeds)
        }
        if all((path / CONFIG).is_file() for path in saes.values()):
            loaded = {name: SAE.load_from_disk(path) for name, path in saes.items()}
            result = stability(model, loaded, passages, seed=options.seed, verbose=False)
            summaries[cell.layer, cell.head] = result.summary
    return cells_table.stability_table(summaries)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.all_cells", description=__doc__)
    parser.add_argument("--model", choices=zoo.SHIPPED, default="tiny-gdn")
    parser.add_argument("--out", type=Path, required=True, help="folder of SAEs and results")
    parser.add_argument("--recipe", choices=("recommended", "atoms", "paper"), default="recommended")
    parser.add_argument("--part", choices=zoo.PARTS[1:], default="test", help="of the text, to test on")
    parser.add_argument("--cells", default="*:*", help="LAYER:HEAD, with * for all and commas between")
    parser.add_argument("--training-tokens", type=int, default=zoo.TRAINING_TOKENS)
    parser.add_argument("--firings", type=int, default=512, help="to test, of each cell")
    parser.add_argument("--passages", type=int, help="of the part, from its start; all where not given")
    parser.add_argument("--horizon", type=int, default=32, help="tokens after a firing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cells")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="I/N: the I-th of N parts of the cells")
    parser.add_argument(
        "--seeds", type=Path, nargs="*", default=[], help="folders of other seeds, to compare"
    )
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    options = parser.parse_args()
    if options.workers > 1 and options.shard != (0, 1):
        parser.error("--workers and --shard both share out the cells: give one of them")
    return options


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"a shard is written I/N, with 1 <= I <= N; got {text!r}")
    return int(number) - 1, int(of)


def _in_processes(workers: int) -> int:
    """Run the same command in several processes, a part of the cells each."""
    command = [sys.executable, "-m", "tests.benchmarks.all_cells", *sys.argv[1:], "--workers", "1"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end with this one
    running = [subprocess.Popen([*command, "--shard", f"{n + 1}/{workers}"]) for n in range(workers)]
    try:
        return max(process.wait() for process in running)
    finally:
        for process in running:
            process.terminate()


def _settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the files of the folder depend on, by the folder that notes it: the training, and the test."""
    recipe = _recipe(options)(d_k=32, d_v=32).to_dict()
    names = ("model", "recipe", "training_tokens", "seed")
    training = {name: getattr(options, name) for name in names} | {"config": recipe}
    del recipe["metadata"]
    return {
        "settings": training,
        f"settings_{options.part}": {
            name: getattr(options, name) for name in ("firings", "horizon", "passages")
        },
    }


def _recipe(options: argparse.Namespace) -> Callable[..., WriteSAETrainingConfig]:
    return getattr(WriteSAETrainingConfig, options.recipe)


def _folder(cell: Cell, options: argparse.Namespace) -> Path:
    return options.out / f"L{cell.layer}H{cell.head}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HookedModelError as wrong:
        _say(str(wrong))
        sys.exit(2)
