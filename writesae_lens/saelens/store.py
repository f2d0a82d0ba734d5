"""Writes go through SAELens's activation store, and into its caches on disk, as factors.

`ActivationsStore` asks the model for a hook's activations, copies them into a buffer, shuffles and slices it;
a cached data set holds them flat. Neither can represent that a row of d_k * d_v numbers is an outer product.
The functions below replace methods of SAELens (`upstream.DEPENDENCIES` lists them): for a write of a
`HookedRecurrent` they work with `PackedWrites`, for everything else they call the original, their first
argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.upstream import is_listened_to
from writesae_lens.saelens import checks
from writesae_lens.saes.packed import PackedWrites, Write


def _cell(store: Any, hook_name: str, live: bool = True) -> Cell | None:
    """The cell whose native write the store reads at this hook; None if it reads anything else.

    While the store reads from the model (``live``), None also for a hook point with a hook on it: what that
    hook returns need not be an outer product.
    """
    model = store.model
    if not isinstance(model, HookedRecurrent) or ".hook_write." not in hook_name:
        return None
    model.check_hook_names([hook_name])
    heads = {store.hook_name: store.hook_head_index} | store._hook_head_indices
    if heads.get(hook_name) is not None or (live and is_listened_to(model.hook_dict[hook_name])):
        return None
    return model.site(hook_name).cell


def _packed(store: Any, cells: dict[str, Cell], tokens: Tensor) -> dict[str, Tensor]:
    """Packed writes of several cells by hook name, from one forward pass up to the last cell's layer."""
    model = store.model
    parts = {n: model.write_factor_hook_names(c.layer) for n, c in cells.items()}
    names = [name for three in parts.values() for name in three]
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=store.autocast_lm):
        _, cache = model.run_with_cache(
            tokens,
            names_filter=list(dict.fromkeys(names)),
            stop_at_layer=max(cell.layer for cell in cells.values()) + 1,
            prepend_bos=False,
            **store.model_kwargs,
        )
    positions = slice(*store.seqpos_slice)
    return {
        name: PackedWrites(Write(*(cache[part][:, positions, cell.head, None] for part in parts[name]))).to(
            store.device, torch.float32
        )
        for name, cell in cells.items()
    }


def from_config(original: Any, owner: Any, model: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse an SAE whose sides are not the cell's: exchanged sides have the same product."""
    if isinstance(model, HookedRecurrent):
        model.check_hook_names([cfg.hook_name])
        sae, head_index = getattr(cfg, "sae", cfg), getattr(cfg, "hook_head_index", None)
        checks.check_site(model, cfg.hook_name, sae, head_index)
    return original(owner, model, cfg, *args, **kwargs)


@torch.no_grad()
def get_activations(original: Any, store: Any, batch_tokens: Tensor) -> Tensor:
    cell = _cell(store, store.hook_name)
    if cell is None:
        return original(store, batch_tokens)
    checks.check_width(store.hook_name, cell, store.d_in)
    return _packed(store, {store.hook_name: cell}, batch_tokens)[store.hook_name]


@torch.no_grad()
def get_multi_hook_activations(original: Any, store: Any, batch_tokens: Tensor) -> dict[str, Tensor]:
    cells = {name: _cell(store, name) for name in store._hook_names or ()}
    if not cells or any(cell is None for cell in cells.values()):
        return original(store, batch_tokens)
    of_writes = {name: cell for name, cell in cells.items() if cell is not None}
    for name, cell in of_writes.items():
        checks.check_width(name, cell, store._hook_d_ins[name])
    return _packed(store, of_writes, batch_tokens)


def _packed_width(cell: Cell | None) -> int | None:
    """Width of a cached row [key, value, read]; None where a flat row is no wider."""
    if cell is None or 2 * cell.d_k + cell.d_v >= cell.d_k * cell.d_v:
        return None
    return 2 * cell.d_k + cell.d_v


@contextmanager
def _rows_of(store: Any, width: int) -> Iterator[None]:
    """Let SAELens's own method read rows of this width."""
    d_in, store.d_in = store.d_in, width
    try:
        yield
    finally:
        store.d_in = d_in


def _cached_width(store: Any) -> int | None:
    """Width of the packed rows in the store's cached data set; None if its rows are flat."""
    width = _packed_width(_cell(store, store.hook_name, live=False))
    if width is None or store.cached_activations_path is None:
        return None
    try:
        cached = datasets.load_from_disk(store.cached_activations_path)
    except FileNotFoundError:  # SAELens raises its own error for that
        return None
    features = cached.features if isinstance(cached, datasets.Dataset) else {}
    shape = getattr(features.get(store.hook_name), "shape", None)
    return width if shape is not None and shape[-1] == width else None


def load_cached_activation_dataset(original: Any, store: Any) -> Any:
    width = _cached_width(store)
    if width is None:
        return original(store)
    with _rows_of(store, width):
        loaded = original(store)
    store.packed_width = width
    return loaded


def _load_raw_llm_batch_from_cached(
    original: Any, store: Any, raise_on_epoch_end: bool
) -> tuple[Tensor, Tensor | None]:
    width, cell = getattr(store, "packed_width", None), _cell(store, store.hook_name, live=False)
    if width is None or cell is None:
        return original(store, raise_on_epoch_end)
    checks.check_width(store.hook_name, cell, store.d_in)
    with _rows_of(store, width):
        rows, token_ids = original(store, raise_on_epoch_end)
    return PackedWrites(Write(*rows[:, None].split([cell.d_k, cell.d_v, cell.d_k], dim=-1))), token_ids


def _create_shard(original: Any, runner: Any, buffer: tuple[Tensor, Tensor | None]) -> datasets.Dataset:
    rows, token_ids = buffer
    store, name = runner.activations_store, runner.cfg.hook_name
    width = _packed_width(_cell(store, name))
    if width is None or not isinstance(rows, PackedWrites):
        return original(runner, buffer)
    write = rows.blocks[0]
    assert write.read is not None
    length, dtype = runner.context_size, runner.features[name].dtype
    columns: dict[str, Any] = {
        name: torch.cat([write.key, write.value, write.read], dim=-1).view(-1, length, width)
    }
    features = runner.features | {name: datasets.Array2D(shape=(length, width), dtype=dtype)}
    if token_ids is not None:
        columns["token_ids"] = token_ids.view(-1, length).to(torch.int32)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


REPLACEMENTS = (
    from_config,
    get_activations,
    get_multi_hook_activations,
    load_cached_activation_dataset,
    _load_raw_llm_batch_from_cached,
    _create_shard,
)
