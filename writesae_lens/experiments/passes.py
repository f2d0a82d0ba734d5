"""Forward passes of a model up to one cell, or without more logits at once than memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, kept, run_lower_layers
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, output_embedding, run_to_residual
from writesae_lens.errors import WriteSAEError

# Numbers of lower layers' outputs that are kept for later passes: 128 MiB in float32.
_NUMBERS_KEPT = 2**25
# Tokens, over all rows, that one pass reads.
_TOKENS_PER_PASS = 512


def check_finite(what: str, *values: Float[Tensor, "..."]) -> None:
    """Refuse NaN and infinite numbers, from which every figure would be NaN or made up.

    Args:
        what: the values' name in the message, in the plural.
        *values: what a pass of the model, or an SAE, gave.

    Raises:
        WriteSAEError: some value is not finite.
    """
    if not all(bool(x.isfinite().all()) for x in values):
        raise WriteSAEError(
            f"the {what} are not finite (NaN or inf): either weights are broken, or the dtype overflows; "
            "load the model and the SAE again, or boot the model with dtype='float32'"
        )


def read(
    model: HookedRecurrent, tokens: Int[Tensor, "batch pos"], cache: Any
) -> Iterator[Float[Tensor, "batch cut d_model"]]:
    """The residual stream after the last layer, in cuts of positions; nothing is unembedded.

    A softmax attention builds a matrix of a cut's positions by all positions so far, which bounds the cut.

    Args:
        model: the model.
        tokens: rows that go on from the cache.
        cache: it is changed.
    """
    for part in tokens.split(max(1, _TOKENS_PER_PASS // len(tokens)), dim=1):
        yield run_to_residual(model, part, past_key_values=cache, use_cache=True)


@torch.no_grad()
def last_logits(model: HookedRecurrent, passage: Int[Tensor, " pos"]) -> Float[Tensor, " d_vocab"]:
    """Logits at the end of a passage, after a check of the residual stream at every position.

    Raises:
        WriteSAEError: the residual stream or a logit is not finite.
    """
    residual = torch.empty(0)
    for residual in read(model, passage[None], model.new_cache()):
        check_finite("logits", residual)
    logits = logits_of(model, residual[0, -1])
    check_finite("logits", logits)
    return logits


@torch.no_grad()
def cache_of(model: HookedRecurrent, tokens: Int[Tensor, "*batch pos"]) -> Any:
    """The cache after some tokens, from which several rows can go on; None after no tokens."""
    if not tokens.shape[-1]:
        return None
    cache = model.new_cache()
    for _ in read(model, tokens.reshape(-1, tokens.shape[-1]), cache):
        pass
    return cache


class LowerOfPassages:
    """What the layers below a cell make of some passages, kept from the passes that find firings there.

    Those of as many passages are kept as memory holds; the others are run again when they are needed.

    Args:
        model: the model.
        cell: the cell.
    """

    def __init__(self, model: HookedRecurrent, cell: Cell) -> None:
        self._model, self._layer = model, cell.layer
        self._found: dict[int, LowerLayers] = {}

    @contextmanager
    def kept(self, number: int) -> Iterator[None]:
        """Keep them from a pass over the passage of this number, if there is room."""
        with kept(self._layer) as keep:
            yield
        room = _NUMBERS_KEPT - sum(lower.n_numbers for lower in self._found.values())
        if keep.found is not None and keep.found.n_numbers <= room:
            self._found[number] = keep.found

    def of(self, number: int, tokens: Int[Tensor, " pos"]) -> LowerLayers | None:
        """Those of one passage; see `run_lower_layers`."""
        if number in self._found:
            return self._found[number]
        return run_lower_layers(self._model, tokens[None], self._layer, use_cache=False)


def run_to_cell(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, "*passage pos"], names: list[str]
) -> dict[str, Tensor]:
    """Activations at named hooks in a passage, or several, from a pass that stops after the cell's layer."""
    return model.run_with_cache(
        tokens.view(-1, tokens.shape[-1]),
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
        WriteSAEError: keys, values or reads are not finite.
    """
    factors = model.write_factor_hook_names(cell.layer)
    cache = run_to_cell(model, cell, tokens, [*factors, *(also or ())])
    key, value, read = (cache[name][0, :, cell.head] for name in factors)
    check_finite(f"writes and reads of layer {cell.layer} head {cell.head}", key, value, read)
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
    rows = output_embedding(model).weight[targets].float()
    return rows @ model.mixers[cell.layer].head_output(cell.head).float().T
