"""Forward passes of a model up to one cell, or without more logits at once than memory holds."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError

LOGITS_PER_PASS = 2**27
"""Logits that one pass may return: bounds memory on models with large vocabularies."""


@torch.no_grad()
def cache_of(model: HookedRecurrent, tokens: Int[Tensor, " pos"]) -> Any:
    """The cache after some tokens, from which several rows can go on; None after no tokens."""
    if not len(tokens):
        return None
    cache = model.new_cache()
    for part in tokens.split(max(1, LOGITS_PER_PASS // model.cfg.d_vocab)):
        model(part[None], past_key_values=cache, use_cache=True)
    return cache


def run_to_cell(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], names: list[str]
) -> dict[str, Tensor]:
    """Activations at the named hooks in one passage, from a pass that stops after the cell's layer."""
    return model.run_with_cache(
        tokens[None],
        names_filter=names,
        stop_at_layer=cell.layer + 1,
        return_cache_object=False,
        use_cache=False,
    )[1]


@torch.no_grad()
def native_factors(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], also: list[str] | None = None
) -> tuple[Float[Tensor, "pos d_k"], Float[Tensor, "pos d_v"], Float[Tensor, "pos d_k"], dict[str, Tensor]]:
    """Keys and values of a cell's native writes in one passage, its read vectors, and further activations.

    Args:
        also: names of the further hooks.

    Raises:
        WriteSAEError: keys or values are not finite.
    """
    factors = model.write_factor_hook_names(cell.layer)
    cache = run_to_cell(model, cell, tokens, [*factors, *(also or ())])
    key, value, read = (cache[name][0, :, cell.head] for name in factors)
    if not bool(torch.isfinite(key).all() and torch.isfinite(value).all()):
        raise WriteSAEError(
            f"the writes of layer {cell.layer} head {cell.head} are not finite: try another dtype"
        )
    return key, value, read, cache


def native_writes(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, "pos d_k"], Float[Tensor, "pos d_v"]]:
    """Keys and values of a cell's native writes in one passage.

    Raises:
        WriteSAEError: they are not finite.
    """
    return native_factors(model, cell, tokens)[:2]


@torch.no_grad()
def unembedding_directions(
    model: HookedRecurrent, cell: Cell, targets: Int[Tensor, " target"]
) -> Float[Tensor, "target d_v"]:
    """W_O[head] W_U[target]: the tokens' unembedding directions, in the basis of the head's output."""
    native: Any = model.original_model
    rows = native.get_output_embeddings().weight[targets].float()
    return rows @ model.mixers[cell.layer].head_output(cell.head).float().T
