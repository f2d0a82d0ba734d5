"""Rank-1 writes in several cells at once: their two sides, and the norms that they are given."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.passes import check_finite, run_to_cell, unembedding_directions

Sides = dict[Cell, tuple[Float[Tensor, "row written d_k"], Float[Tensor, "row written d_v"]]]
"""Key side and value side of what is added in each cell; their norms do not count."""
Sizes = dict[Cell, Float[Tensor, "row written"]]
"""The Frobenius norm of what is added in each cell."""
Matrices = dict[Cell, Float[Tensor, "row written d_k d_v"]]


def of_norm(sides: Sides, sizes: Sizes) -> Matrices:
    """The rank-1 matrices with these sides and norms."""
    matrices = {}
    for cell, (keys, values) in sides.items():
        key, value = nn.functional.normalize(keys, dim=-1), nn.functional.normalize(values, dim=-1)
        matrices[cell] = (key * sizes[cell][..., None])[..., None] * value[..., None, :]
    return matrices


@torch.no_grad()
def native_sides(
    model: HookedRecurrent, cells: list[Cell], prompts: Int[Tensor, "prompt pos"], positions: int
) -> Sides:
    """Keys and values of the cells' native writes at the last positions of some prompts.

    Raises:
        WriteSAEError: they are not finite.
    """
    names = {layer: model.write_factor_hook_names(layer)[:2] for layer in {cell.layer for cell in cells}}
    top = max(cells, key=lambda cell: cell.layer)
    wanted = [name for pair in names.values() for name in pair]
    passes = [run_to_cell(model, top, prompt, wanted) for prompt in prompts]
    sides: Sides = {}
    for cell in cells:
        key, value = (
            torch.stack([found[name][0, -positions:, cell.head] for found in passes]).float()
            for name in names[cell.layer]
        )
        check_finite(f"writes of layer {cell.layer} head {cell.head}", key, value)
        sides[cell] = key, value
    return sides


def norms_of(sides: Sides) -> Sizes:
    """The norms of the rank-1 matrices with these sides."""
    return {cell: keys.norm(dim=-1) * values.norm(dim=-1) for cell, (keys, values) in sides.items()}


def random_sides(
    cells: list[Cell], shape: tuple[int, int], rng: torch.Generator, device: torch.device
) -> Sides:
    """Gaussian sides: directions that are drawn evenly."""
    return {
        cell: (
            torch.randn(*shape, cell.d_k, generator=rng).to(device),
            torch.randn(*shape, cell.d_v, generator=rng).to(device),
        )
        for cell in cells
    }


def unembedding_sides(model: HookedRecurrent, native: Sides, targets: Int[Tensor, " row"]) -> Sides:
    """The native keys, and the targets' rows of the unembedding as each head's output sees them.

    Args:
        model: the model.
        native: of the native writes, row by row.
        targets: of each row.
    """
    sides: Sides = {}
    for cell, (keys, _) in native.items():
        values = unembedding_directions(model, cell, targets)
        sides[cell] = keys, values[:, None].expand(-1, keys.shape[1], -1)
    return sides
