"""Steering: while the context is open, chosen features are written beside what the model itself writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import check, is_whole, shown
from writesae_lens.use.additions import Addition, Features, additions, amounts_of, parse_features
from writesae_lens.use.prompts import SAEs, saes_by_site

Positions = int | slice | Sequence[int] | None
Hooks = list[tuple[str, Callable[..., Any]]]
Unit = Literal["firing", "absolute"]


@contextmanager
def steering(
    model: HookedRecurrent,
    saes: SAEs,
    features: Mapping[Features, float],
    positions: Positions = None,
    tokens: Int[Tensor, "passage pos"] | str | None = None,
    unit: Unit = "firing",
) -> Iterator[HookedRecurrent]:
    """While open, features are written beside the model's own writes: in ``generate``, losses, caches.

    Every forward pass is steered: alone or in batches with padding (where nothing is written), token by token
    in ``generate`` and with beams (``hf_generate(num_beams=...)``), under gradients. Contexts inside each
    other add up, in any order, and nothing is left behind::

        with steering(model, sae, {12: 3.0}):
            print(model.generate("Once upon a time", max_new_tokens=40))

    What is added to the native write k v^T at every chosen position, for a feature of size s and its own
    firing size c (the median coefficient where it is active):

    - an atom A: s c A;
    - a key code u, which is an address: s c u v^T, the content at hand at the address u too;
    - a value code w, which is a content: s c k w^T, the content w too at the address at hand;
    - a pair of codes (key, value): s c c' u w^T, the content w at the address u, whatever is at hand.

    Here k is the write's key at norm 1 and v its value with the write's norm, in the signs that the SAE
    sees. They are the layer's own: what a hook on ``hook_write`` makes of the write does not count. Firing
    sizes are those of the native model, also inside of another `steering` or under other hooks.

    Args:
        model: the model.
        saes: an SAE on a cell's writes, or several of different cells.
        features: size by feature, negative ones too. Of one SAE a feature is its number, ``{12: 3.0}``, or a
            pair of codes ``{(12, 600): 3.0}``. Of several SAEs layer and head come first, as in the records
            of `read_prompt`: ``{(1, 3, 12): 3.0}``, ``{(1, 3, 12, 600): 3.0}``.
        positions: where to write (None: everywhere): a position, several, or a slice, counted from the
            start of each text without its padding; generated tokens count on. `len(prompt) - 1` is the
            prompt's last token, for a negative position has no meaning while the text still grows.
        tokens: passages or a text on which the firing sizes are measured (None: the test part of the shipped
            text, for a model that ships).
        unit: "firing": sizes are multiples of the feature's firing size c; "absolute": they are the
            coefficients themselves (c = 1; of a pair c c' = 1).

    Yields:
        the model.

    Raises:
        WriteSAEError: a feature does not exist or is active nowhere in the text, an SAE is on states, there
            are no features, sizes are not finite in float32, or positions are negative or none.
        HookedModelError: the model has not the SAE's cell, or sizes are to be measured while an SAE is
            attached to it.
    """
    check(Unit, unit=unit)
    by_site = saes_by_site(model, saes)
    chosen = parse_features(by_site, features)
    amounts = amounts_of(model, by_site, chosen, tokens, unit)
    where = checked_positions(positions)
    with model.hooks(fwd_hooks=hooks_of(model, additions(by_site, amounts), where)):
        yield model


def hooks_of(
    model: HookedRecurrent,
    added: Sequence[Addition],
    positions: Positions = None,
    weights: Float[Tensor, " row"] | None = None,
) -> Hooks:
    """The hooks that add to the writes of some cells.

    Args:
        model: the model.
        added: what to add, a cell each.
        positions: where, as in `steering`.
        weights: a factor for each row of the batch (None: 1).
    """
    return [hook for addition in added for hook in _hooks_of_cell(model, addition, positions, weights)]


def _hooks_of_cell(
    model: HookedRecurrent, added: Addition, positions: Positions, weights: Float[Tensor, " row"] | None
) -> Hooks:
    """Two hooks that note the native factors, where codes move them, and one that adds to the write."""
    layer, head = added.cell.layer, added.cell.head
    native: dict[str, Tensor] = {}

    def note(side: str) -> Callable[..., None]:
        def hook(factor: Tensor, hook: Any) -> None:
            native[side] = factor[:, :, head]

        return hook

    def add(write: Float[Tensor, "batch pos d_k_d_v"], hook: Any) -> Tensor:
        change = added.to(write.shape[:2], native.pop("key", None), native.pop("value", None))
        if weights is not None:
            change = change * weights.to(change)[:, None, None]
        if positions is not None:
            change = change.masked_fill(~among(model.positions, positions)[..., None], 0)
        return write + change.to(write.dtype)

    names = dict(zip(("key", "value"), model.write_factor_hook_names(layer)))
    notes: Hooks = [(name, note(side)) for side, name in names.items()] if added.moves else []
    return [*notes, (model.write_hook_name(layer, head), add)]


def among(at: Int[Tensor, "*shape"], positions: int | slice | Sequence[int]) -> Bool[Tensor, "*shape"]:
    """Which of the positions ``at`` are chosen."""
    if isinstance(positions, slice):
        start, step = positions.start or 0, positions.step or 1
        inside = (at >= start) & ((at - start) % step == 0)
        return inside if positions.stop is None else inside & (at < positions.stop)
    several = [positions] if is_whole(positions) else list(positions)  # type: ignore[arg-type]
    return torch.isin(at, torch.tensor(several, dtype=torch.long, device=at.device))


def checked_positions(positions: Any) -> Positions:
    """Refuse positions that are not whole numbers from 0 on, or none at all."""
    if positions is None:
        return None
    is_slice = isinstance(positions, slice)
    ends: Any = [positions.start, positions.stop, positions.step] if is_slice else positions
    if hasattr(ends, "tolist"):  # of torch and numpy
        ends = ends.tolist()
    ends = [ends] if is_whole(ends) else ends
    if not isinstance(ends, (list, tuple, range)) or not all(
        is_whole(x) or (is_slice and x is None) for x in ends
    ):
        raise WriteSAEError(
            f"positions must be whole numbers, one, several or a slice, got {shown(positions)}"
        )
    numbers = [int(x) for x in ends if x is not None]
    if any(x < 0 for x in numbers) or (is_slice and positions.step == 0):
        raise WriteSAEError(
            f"positions={positions!r:.60} must be 0 or more: they count from the start of each text, which "
            "may still grow; its last token now is len(tokens) - 1"
        )
    empty = not numbers
    if is_slice:
        empty = positions.stop is not None and positions.stop <= (positions.start or 0)
    if empty:
        raise WriteSAEError(
            f"positions={positions!r:.60} holds no position, so nothing would be written: give one at least, "
            "or None for all"
        )
    return positions if is_slice else numbers
