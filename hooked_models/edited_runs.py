"""Forward passes with swapped or added writes (`edits`), many of them in one run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from hooked_models.bridge.branch_attention import options_with_branches
from hooked_models.bridge.lower_layers import LowerLayers, checkpointed, run_lower_layers
from hooked_models.caches import repeated
from hooked_models.edits import AddedWrites, SwappedWrites
from hooked_models.errors import HookedModelError
from hooked_models.unembedding import logits_of, run_to_logits, run_to_residual, token_logits

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import Cell, HookedRecurrent

# Branches that one run with swapped writes should have at most; and numbers of the residual stream, over all
# layers, through which gradients may flow without checkpoints: the graph keeps some 90 numbers for each.
BRANCHES_AT_ONCE, _GRAPH_AT_ONCE = 2**12, 2**20
# torch has one level of forward-mode differentiation, which all threads share.
_DUAL_LEVEL = threading.RLock()


def run_with_swapped_writes(
    model: HookedRecurrent,
    tokens: Tensor,
    cell: Cell,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    erase: bool,
) -> tuple[Tensor, Tensor]:
    """See `HookedRecurrent.run_with_swapped_writes`."""
    native, branches = residual_with_swapped_writes(model, tokens, cell, positions, keys, values, erase)
    with torch.set_grad_enabled(branches.requires_grad):
        return logits_of(model, native), logits_of(model, branches)


def residual_with_swapped_writes(
    model: HookedRecurrent,
    tokens: Int[Tensor, " pos"],
    cell: Cell,
    positions: Int[Tensor, " branch"],
    keys: Float[Tensor, "branch rank d_k"],
    values: Float[Tensor, "branch rank d_v"],
    erase: bool = True,
    lower: LowerLayers | None = None,
) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "branch d_model"]]:
    """The residual stream after the last layer in a run with swapped writes; nothing is unembedded.

    `hooked_models.unembedding.logits_of` gives the logits of the positions and branches that are wanted. The
    layers below the cell's are run for the native tokens alone.

    Args:
        model: the model.
        tokens: one passage.
        cell: the cell.
        positions, keys, values, erase: as for `HookedRecurrent.run_with_swapped_writes`.
        lower: what the layers below the cell's make of the passage (`run_lower_layers`), where it is known.

    Raises:
        HookedModelError: shapes or positions that do not fit, or anything is hooked.
    """
    rank = keys.shape[1] if keys.ndim > 1 else 1
    positions = _checked(tokens, cell, positions, keys, values, (rank,))
    if model.busy_hooks:
        # They would see the native tokens and the branches in one row.
        raise HookedModelError(
            f"a run with swapped writes cannot honour the hooks on {', '.join(model.busy_hooks[:3])}: remove "
            "them first (model.reset_hooks(), model.reset_saes())"
        )
    if lower is None:
        lower = run_lower_layers(model, tokens[None], cell.layer, use_cache=False)
    edit = SwappedWrites(model.mixers[cell.layer], cell.head, len(tokens), positions, keys, values, erase)
    differentiate = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    graph = (len(tokens) + len(positions)) * (len(model.blocks) - cell.layer) * model.cfg.d_model
    is_large = differentiate and graph > _GRAPH_AT_ONCE
    with torch.set_grad_enabled(differentiate), checkpointed(is_large):
        residual = run_to_residual(
            model,
            torch.cat([tokens, tokens[positions]])[None],
            edit=edit,
            lower=None if lower is None else lower.with_branches(positions),
            use_cache=False,
            **options_with_branches(model, len(tokens), positions),
        )[0]
    return residual[: len(tokens)], residual[len(tokens) :]


@torch.no_grad()
def run_with_added_writes(
    model: HookedRecurrent,
    tokens: Tensor,
    cell: Cell,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    linear: bool,
    past_key_values: Any,
) -> Tensor:
    """See `HookedRecurrent.run_with_added_writes`."""
    rows, options = _rows_with_added_writes(
        model, tokens, cell, positions, keys, values, linear, past_key_values
    )
    with _dual_level(model) if linear else contextlib.nullcontext():
        logits = run_to_logits(model, rows, **options)
        return _tangent(logits) if linear else logits


def _tangent(x: Tensor) -> Tensor:
    change = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if change is None else change


@torch.no_grad()
def token_logits_with_added_writes(
    model: HookedRecurrent,
    tokens: Int[Tensor, " pos"],
    cell: Cell,
    positions: Int[Tensor, " row"],
    keys: Float[Tensor, "row *rank d_k"],
    values: Float[Tensor, "row *rank d_v"],
    followed: Int[Tensor, " token"],
    linear: bool = False,
    past_key_values: Any = None,
    lower: LowerLayers | None = None,
) -> Float[Tensor, "row pos token"]:
    """The logits of a few tokens in a run with added writes, or their linear change; no others are made.

    Args:
        model: the model.
        tokens: one passage.
        cell: the cell.
        positions, keys, values, linear, past_key_values: as for `HookedRecurrent.run_with_added_writes`.
        followed: the tokens whose logits are wanted.
        lower: what the layers below the cell's make of the passage (`run_lower_layers`), where it is known.
    """
    rows, options = _rows_with_added_writes(
        model, tokens, cell, positions, keys, values, linear, past_key_values, lower
    )
    with _dual_level(model) if linear else contextlib.nullcontext():
        residual = run_to_residual(model, rows, **options)
        places = *residual.shape[:2], len(followed)
        logits = token_logits(model, residual[:, :, None].expand(*places, -1), followed.expand(places))
        return _tangent(logits) if linear else logits


@torch.no_grad()
def residual_with_added_writes(
    model: HookedRecurrent,
    tokens: Int[Tensor, " pos"],
    cell: Cell,
    positions: Int[Tensor, " row"],
    keys: Float[Tensor, "row *rank d_k"],
    values: Float[Tensor, "row *rank d_v"],
    past_key_values: Any = None,
    lower: LowerLayers | None = None,
    heads: Int[Tensor, " row"] | None = None,
) -> Float[Tensor, "row pos d_model"]:
    """The residual stream after the last layer in a run with added writes; nothing is unembedded.

    `hooked_models.unembedding.logits_of` gives the logits of the positions that are wanted. The arguments are
    those of `HookedRecurrent.run_with_added_writes`; ``lower``, what the layers below the cell's make of the
    tokens (`run_lower_layers`), where it is known; and ``heads``, the head of the cell's layer that each row
    writes at (None: the cell's).

    Raises:
        HookedModelError: shapes, positions or heads that do not fit.
    """
    rows, options = _rows_with_added_writes(
        model, tokens, cell, positions, keys, values, False, past_key_values, lower, heads
    )
    return run_to_residual(model, rows, **options)


def _rows_with_added_writes(
    model: HookedRecurrent,
    tokens: Tensor,
    cell: Cell,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    linear: bool,
    past_key_values: Any,
    lower: LowerLayers | None = None,
    heads: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The tokens of all rows, and the options of a forward pass of them with the edit.

    The layers below the cell's are run for one row.
    """
    rank = tuple(keys.shape[1:2]) if keys.ndim == 3 else ()
    positions = _checked(tokens, cell, positions, keys, values, rank)
    mixer, count = model.mixers[cell.layer], len(positions)
    if past_key_values is not None and (cached_rows := len(mixer.cached_state(past_key_values))) != 1:
        raise HookedModelError(
            f"past_key_values must hold one row, which all rows share; it holds {cached_rows}"
        )

    def past(rows: int, unused: int = 0) -> dict[str, Any]:
        if past_key_values is None:
            return {"use_cache": False}
        return {"use_cache": True, "past_key_values": repeated(past_key_values, rows, unused)}

    if lower is None:
        lower = run_lower_layers(model, tokens[None], cell.layer, **past(1))
    edit = AddedWrites(mixer, _heads(model, cell, positions, heads), positions, keys, values, linear)
    options = {"edit": edit, "lower": None if lower is None else lower.rows(count)}
    return tokens.expand(count, -1), options | past(count, 0 if lower is None else lower.layer)


def _heads(model: HookedRecurrent, cell: Cell, positions: Tensor, heads: Tensor | None) -> Tensor:
    """Each row's head, on the positions' device.

    Raises:
        HookedModelError: heads that the cell's layer does not have, or not one for each position.
    """
    if heads is None:
        return torch.full_like(positions, cell.head)
    count = sum(other.layer == cell.layer for other in model.cells)
    is_whole = not (heads.is_floating_point() or heads.dtype == torch.bool)
    if not is_whole or heads.shape != positions.shape or not bool(((heads >= 0) & (heads < count)).all()):
        raise HookedModelError(
            f"heads must be whole numbers in 0 .. {count - 1}, one for each of {len(positions)} rows, got "
            f"shape {tuple(heads.shape)}, {heads.dtype}"
        )
    return heads.to(positions.device)


def _checked(
    tokens: Tensor, cell: Cell, positions: Tensor, keys: Tensor, values: Tensor, rank_axis: tuple[int, ...]
) -> Tensor:
    """The positions, on the tokens' device.

    Raises:
        HookedModelError: shapes or positions that do not fit.
    """
    if tokens.ndim != 1 or positions.ndim != 1 or positions.is_floating_point():
        raise HookedModelError(
            f"tokens must be one passage [pos] and positions whole numbers [n], got shapes "
            f"{tuple(tokens.shape)} and {tuple(positions.shape)}, {positions.dtype}"
        )
    shapes = tuple(keys.shape), tuple(values.shape)
    expected = (len(positions), *rank_axis, cell.d_k), (len(positions), *rank_axis, cell.d_v)
    if shapes != expected:
        raise HookedModelError(
            f"keys and values must have shapes {expected[0]} and {expected[1]} here, got {shapes[0]} and "
            f"{shapes[1]}"
        )
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(tokens):
        raise HookedModelError(
            f"positions must lie in 0 .. {len(tokens) - 1}, the passage's tokens; got "
            f"{int(positions.min())} .. {int(positions.max())}"
        )
    return positions.to(tokens.device)


@contextlib.contextmanager
def _dual_level(model: HookedRecurrent) -> Iterator[None]:
    """Forward-mode differentiation, for one thread at a time.

    Mixtures of experts run expert by expert meanwhile: torch cannot differentiate grouped products forward.

    Raises:
        HookedModelError: it is on already: torch cannot nest it.
    """
    with _DUAL_LEVEL:
        try:
            level = forward_ad.enter_dual_level()
        except RuntimeError as error:
            raise HookedModelError(
                "a run with linear=True cannot run inside another one, or inside another forward-mode "
                "derivative: torch has no nested ones"
            ) from error
        try:
            with _experts_one_by_one(model):
                yield
        finally:
            forward_ad.exit_dual_level(level=level)


@contextlib.contextmanager
def _experts_one_by_one(model: HookedRecurrent) -> Iterator[None]:
    native: Any = model.original_model
    before = getattr(native.config, "_experts_implementation", None)
    if before in (None, "eager") or not native._can_set_experts_implementation():
        yield
        return
    native.set_experts_implementation("eager")
    try:
        yield
    finally:
        native.set_experts_implementation(before)
