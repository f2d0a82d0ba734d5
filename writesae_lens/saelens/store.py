"""Writes travel through SAELens's activation store, and lie in its caches, as factors.

`ActivationsStore` asks the model for a hook's activations, copies them into a buffer, shuffles and slices it;
a cached data set holds them flat. Neither has a place to say that a row of d_k * d_v numbers is an outer
product. The methods below are wrapped: for a write of a `HookedRecurrent` they work with `PackedWrites`, for
everything else they are SAELens's own. tests/writesae_lens/test_saelens_store.py fails when they move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.mixers import is_listened_to
from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.config import WriteSAETrainingConfig
from writesae_lens.saes.packed import PackedWrites, Write


def keep_writes_packed() -> None:
    """Wrap SAELens's methods; a second call changes nothing."""
    for owner, name, wrapper in (
        (ActivationsStore, "from_config", _from_config),
        (ActivationsStore, "get_activations", _get_activations),
        (ActivationsStore, "get_multi_hook_activations", _get_multi_hook_activations),
        (ActivationsStore, "load_cached_activation_dataset", _load_cached_activation_dataset),
        (ActivationsStore, "_load_raw_llm_batch_from_cached", _load_raw_llm_batch_from_cached),
        (CacheActivationsRunner, "_create_shard", _create_shard),
    ):
        original = getattr(owner, name)
        if not getattr(original, "keeps_writes_packed", False):
            of_class = isinstance(vars(owner)[name], classmethod)
            wrapped = _method(wrapper, original.__func__ if of_class else original)
            setattr(owner, name, classmethod(wrapped) if of_class else wrapped)


def _method(wrapper: Callable[..., Any], original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.keeps_writes_packed = True  # type: ignore[attr-defined]
    return method


def _cell(store: Any, hook_name: str, live: bool = True) -> Cell | None:
    """The cell whose native write the store reads at this hook; None if it reads anything else.

    A hook that someone listens to may change what is written (``live``: not so in a cached data set).
    """
    model = store.model
    if not isinstance(model, HookedRecurrent) or ".hook_write." not in hook_name:
        return None
    model._check_hook_names([hook_name])
    heads = {store.hook_name: store.hook_head_index} | store._hook_head_indices
    if heads.get(hook_name) is not None or (live and is_listened_to(model.hook_dict[hook_name])):
        return None
    return model.site(hook_name).cell


def _packed(store: Any, cells: dict[str, Cell], tokens: Tensor) -> dict[str, Tensor]:
    """Writes of some cells, packed, from one forward pass up to the last one's layer."""
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
    here = slice(*store.seqpos_slice)
    out: dict[str, Tensor] = {}
    for name, cell in cells.items():
        write = Write(*(cache[n][:, here, cell.head, None] for n in parts[name]))
        out[name] = PackedWrites(write).to(store.device, torch.float32)
    return out


def _check_width(name: str, cell: Cell, d_in: int, sides: tuple[int, int] | None = None) -> None:
    if d_in != cell.d_k * cell.d_v or sides not in (None, (cell.d_k, cell.d_v)):
        shape = "" if sides is None else f" {sides[0]} x {sides[1]},"
        raise WriteSAEError(
            f"the SAE takes {d_in} numbers,{shape} but {name} gives {cell.d_k} x {cell.d_v} = "
            f"{cell.d_k * cell.d_v}: set d_k={cell.d_k}, d_v={cell.d_v}"
        )


def _from_config(original: Any, owner: Any, model: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a WriteSAE of other sides than its cell's: no flat state tells itself from its transpose."""
    sae, name = getattr(cfg, "sae", None), cfg.hook_name
    is_matrix = ".hook_write." in name or ".hook_state." in name
    if isinstance(model, HookedRecurrent) and isinstance(sae, WriteSAETrainingConfig) and is_matrix:
        model._check_hook_names([name])
        _check_width(name, model.site(name).cell, sae.d_in, (sae.d_k, sae.d_v))
    return original(owner, model, cfg, *args, **kwargs)


@torch.no_grad()
def _get_activations(original: Any, store: Any, batch_tokens: Tensor) -> Tensor:
    cell = _cell(store, store.hook_name)
    if cell is None:
        return original(store, batch_tokens)
    _check_width(store.hook_name, cell, store.d_in)
    return _packed(store, {store.hook_name: cell}, batch_tokens)[store.hook_name]


@torch.no_grad()
def _get_multi_hook_activations(original: Any, store: Any, batch_tokens: Tensor) -> dict[str, Tensor]:
    cells = {name: _cell(store, name) for name in store._hook_names or ()}
    if not cells or any(cell is None for cell in cells.values()):
        return original(store, batch_tokens)
    known = {name: cell for name, cell in cells.items() if cell is not None}
    for name, cell in known.items():
        _check_width(name, cell, store._hook_d_ins[name])
    return _packed(store, known, batch_tokens)


# In a cached data set a write is a row [key, value, read].


def _packed_width(cell: Cell | None) -> int | None:
    """Numbers of a packed row, where that is fewer than the flat one has."""
    if cell is None or 2 * cell.d_k + cell.d_v >= cell.d_k * cell.d_v:
        return None
    return 2 * cell.d_k + cell.d_v


@contextmanager
def _rows_of(store: Any, width: int) -> Iterator[None]:
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
    except FileNotFoundError:  # SAELens has its own words for that
        return None
    features = cached.features if isinstance(cached, datasets.Dataset) else {}
    shape = getattr(features.get(store.hook_name), "shape", None)
    return width if shape is not None and shape[-1] == width else None


def _load_cached_activation_dataset(original: Any, store: Any) -> Any:
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
    _check_width(store.hook_name, cell, store.d_in)
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
