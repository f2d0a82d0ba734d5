"""Which cells of a model a user means: ``LAYER:HEAD``, with ``*`` for all and commas between."""

from __future__ import annotations

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
    matching = [c for c in model.cells if layer in ("*", str(c.layer)) and head in ("*", str(c.head))]
    if not matching:
        layers = ", ".join(str(n) for n in model.mixers)
        raise WriteSAEError(f"'{layer}:{head}' names no cell: this model's recurrent layers are {layers}")
    return matching
