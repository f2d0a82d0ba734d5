"""Which cells of a model a user means: ``LAYER:HEAD``, with ``*`` for all and commas between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError


def parse_cells(model: HookedRecurrent, text: str) -> list[Cell]:
    """Cells from ``LAYER:HEAD``, comma-separated; ``*`` stands for every layer or head.

    Layers with the same heads may share them: ``1,3:*`` is ``1:*,3:*``.

    Raises:
        WriteSAEError: the text is no list of cells, or names none of the model's.
        HookedModelError: one of them does not exist; the message lists the valid ones.
    """
    cells: list[Cell] = []
    layers: list[str] = []
    for part in text.split(","):
        layer, colon, head = (piece.strip() for piece in part.partition(":"))
        layers.append(layer)
        if not colon and layer.isdecimal():  # its heads follow
            continue
        if not all(piece == "*" or piece.isdecimal() for piece in (layer, head)):
            break
        for each in layers:
            cells += _matching(model, each, head)
        layers = []
    if layers:
        raise WriteSAEError(
            "cells are written LAYER:HEAD, with * for all and commas between, for example 1:* or 0:2,3:1 or "
            f"1,3:*; got {text!r}"
        )
    return list(dict.fromkeys(cells))


def _matching(model: HookedRecurrent, layer: str, head: str) -> list[Cell]:
    if "*" not in (layer, head):
        return [model.cell(int(layer), int(head))]
    wanted = [None if piece == "*" else int(piece) for piece in (layer, head)]
    matching = [c for c in model.cells if wanted[0] in (None, c.layer) and wanted[1] in (None, c.head)]
    if not matching:
        layers = ", ".join(str(n) for n in model.mixers)
        raise WriteSAEError(f"'{layer}:{head}' names no cell: this model's recurrent layers are {layers}")
    return matching


def listed_cells(model: HookedRecurrent, cells: Sequence[Any]) -> list[Cell]:
    """Cells from a list of them or of (layer, head) pairs.

    Raises:
        WriteSAEError: the list is empty, holds something else, or a cell twice.
        HookedModelError: one of them does not exist; the message lists the valid ones.
    """
    pairs = [(cell.layer, cell.head) if isinstance(cell, Cell) else cell for cell in cells]
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and [type(n) for n in pair] == [int, int]):
            raise WriteSAEError(f"cells are (layer, head) pairs, or one text as '0:2,3:1'; got {pair!r:.60}")
    chosen = [model.cell(*pair) for pair in pairs]
    if not chosen:
        raise WriteSAEError("no cells to sweep: give (layer, head) pairs, or '*:*' for all")
    if twice := [cell for cell, n in Counter(chosen).items() if n > 1]:
        raise WriteSAEError(f"cells names {twice[0].layer}:{twice[0].head} more than once")
    return chosen
