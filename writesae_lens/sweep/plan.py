"""Which cells of a sweep are trained together, and what all of it takes (``--dry-run``).

Cells that are trained together share every forward pass of the model, up to the last of their layers. An SAE
is trained alike whichever cells share its passes (`train_cells`), so groups are free: as few as memory
allows, but as many as there are workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from sae_lens import TrainingSAEConfig

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import find_experiment
from writesae_lens.reproduce.estimates import duration
from writesae_lens.reproduce.training_costs import step_seconds, training_bytes
from writesae_lens.reproduce.units import Size, Speeds, Units
from writesae_lens.reproduce.work import Text, Work, work_of

# Of the memory that is free, what trainings may take: buffers and allocators need the rest.
_USED = 0.7


class Group(NamedTuple):
    """Cells that are trained from the same forward passes, and the bytes that this takes beside the model."""

    cells: tuple[Cell, ...]
    n_bytes: int


class Needs(NamedTuple):
    """What the training of some cells depends on, beside the cells.

    Args:
        cfg: of every cell's SAE, by its cell.
        site: write or state.
        context: tokens of a passage.
        options: of SAELens's runner, as given.
    """

    cfg: Any
    site: str
    context: int
    options: Mapping[str, Any]

    def n_bytes(self, model: HookedRecurrent, cells: Sequence[Cell]) -> int:
        """Bytes that training these cells together takes beside the model."""
        cfgs: list[TrainingSAEConfig] = [self.cfg(cell) for cell in cells]
        width = next(model.original_model.parameters()).element_size()
        return training_bytes(Size.of(model), cfgs, self.site, self.context, width, dict(self.options))


def free_bytes(device: str) -> int:
    """Bytes of memory that are free for trainings: of the GPU, or of this machine."""
    if device.startswith("cuda"):
        return int(_USED * torch.cuda.mem_get_info(device)[0])
    return int(_USED * psutil.virtual_memory().available)


def plan_groups(
    cells: Sequence[Cell], bytes_of: Callable[[Sequence[Cell]], int], n_bytes: int, workers: int
) -> list[Group]:
    """Groups of cells, in order of layer and head.

    Args:
        cells: to train on.
        bytes_of: bytes that training some cells together takes beside the model.
        n_bytes: that the training of a group may take beside the model.
        workers: which shall all have something to do.

    Raises:
        WriteSAEError: one cell alone takes more memory.
    """
    cells = sorted(cells, key=lambda cell: (cell.layer, cell.head))
    alone = max(bytes_of([cell]) for cell in cells)
    if alone > n_bytes:
        raise WriteSAEError(
            f"training one cell takes {alone / 2**30:,.2f} GiB beside the model, and {n_bytes / 2**30:,.2f} "
            "may be used: raise --memory, or lower --n_batches_in_buffer or --store_batch_size_prompts"
        )
    n_groups = min(workers, len(cells))
    while True:
        size = math.ceil(len(cells) / n_groups)
        groups = [tuple(cells[start : start + size]) for start in range(0, len(cells), size)]
        taken = [bytes_of(group) for group in groups]
        if max(taken) <= n_bytes:
            return [Group(*each) for each in zip(groups, taken)]
        n_groups = max(n_groups + 1, math.ceil(n_groups * max(taken) / n_bytes))


def describe(
    model: HookedRecurrent,
    groups: Sequence[Group],
    needs: Needs,
    tokens: int,
    batch: int,
    experiments: Mapping[str, Mapping[str, Any]],
    max_passages: int | None,
    workers: int,
) -> str:
    """The groups of a sweep, with the memory and time of each, as text.

    A pass up to the last cell's layer and a step of an SAE are timed; what the experiments run is counted
    from their options (`writesae_lens.reproduce.work`). Reports and statistics are not counted.
    """
    if not groups:
        return f"model {model.cfg.model_name}: every cell has its SAE; what has no results is tested"
    device = str(model.cfg.device)
    deepest = max(group.cells[-1].layer for group in groups)
    units, first = Units.of_model(model, deepest), needs.cfg(groups[0].cells[0])
    dtype = next(model.original_model.parameters()).dtype
    step = step_seconds(first, batch, needs.site, device, Speeds.of(device, dtype))
    lines, trained = [], 0.0
    for number, (cells, n_bytes) in enumerate(groups, 1):
        below = units.below * (cells[-1].layer + 1) / (deepest + 1)
        passes, steps = tokens * below, tokens / batch * step * len(cells)
        trained += passes + steps
        lines.append(
            f"group {number}: {_range(cells)}: {n_bytes / 2**30:,.2f} GiB beside the model, "
            f"{duration(passes + steps)} ({passes / (passes + steps):.0%} of it forward passes)"
        )
    tested = sum(
        _tested_seconds(cell.layer, units, model, first, needs.context, experiments, max_passages)
        for group in groups
        for cell in group.cells
    )
    n_cells = sum(len(group.cells) for group in groups)
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters())
    size = Size.of(model)
    return "\n".join(
        [
            f"model {model.cfg.model_name}: {size.n_parameters / 1e6:,.1f} M parameters, "
            f"{weights / 2**30:,.2f} GiB a worker; {n_cells} cells of {len(model.cells)} in {len(groups)} "
            f"group{'s' * (len(groups) > 1)}, {tokens:,} tokens each",
            *lines,
            f"training {duration(trained)}, experiments ({', '.join(experiments)}) {duration(tested)}: "
            f"{duration(trained + tested)} on one worker (this machine, {torch.get_num_threads()} threads), "
            f"{duration((trained + tested) / workers)} on {workers}",
        ]
    )


def _tested_seconds(
    layer: int,
    units: Units,
    model: HookedRecurrent,
    cfg: Any,
    context: int,
    experiments: Mapping[str, Mapping[str, Any]],
    max_passages: int | None,
) -> float:
    """Seconds of the experiments at a cell of this layer."""
    token, below = units.below + units.above, (layer + 1) / model.cfg.n_layers
    here = units._replace(below=token * below, above=token * (1 - below))
    work = Work()
    for name, options in experiments.items():
        experiment = find_experiment(name)
        passages = max_passages or experiment.max_passages
        codes = getattr(cfg, "decoder", None) == "codes"
        text = Text(passages, experiment.context_size or context, cfg.d_sae, codes)
        work = work.plus(work_of(experiment, text, options))
    return here.seconds(work)


def _range(cells: Sequence[Cell]) -> str:
    """``1:0 to 1:15 (16 cells)``."""
    first, last = cells[0], cells[-1]
    if len(cells) == 1:
        return f"{first.layer}:{first.head}"
    return f"{first.layer}:{first.head} to {last.layer}:{last.head} ({len(cells)} cells)"
