"""Writes go through SAELens's activation store, and into its caches on disk, as factors.

`ActivationsStore` asks the model for a hook's activations, copies them into a buffer, shuffles and slices it;
a cached data set holds them flat. Neither can represent that a row of d_k * d_v numbers is an outer product,
nor that it comes with the vectors by which tokens read it: the own token's, and for SAEs that train on them
those of later tokens (`later_reads` of their config). The functions below replace methods of SAELens
(`upstream.DEPENDENCIES` lists them): for a write of a `HookedRecurrent` they work with `PackedWrites`, for
everything else they call the original, their first argument.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.recordings import record_recurrences
from hooked_models.responses import later_reads
from hooked_models.upstream import is_listened_to
from writesae_lens.saelens import checks
from writesae_lens.saes.packed import PackedWrites, Write

_logger = logging.getLogger("writesae_lens")
_Distances = tuple[int, ...]
_ASKED: Any = WeakIdKeyDictionary()  # store: distances of later reads by hook name
_CACHED: Any = WeakIdKeyDictionary()  # store: distances of the later reads in its cache's packed rows


def keep_reads(store: Any, saes: Mapping[str, Iterable[Any]]) -> None:
    """Let a store bring, with the writes of each hook, the later reads on which SAEs there train.

    Args:
        store: SAELens's; what it was asked for before does not count any more.
        saes: the SAEs' configs by hook name.
    """
    asked = {
        hook: tuple(sorted({h for c in of_one for h in _trained_on(c)})) for hook, of_one in saes.items()
    }
    held, before = _CACHED.get(store), _ASKED.get(store)
    _ASKED[store] = asked
    missing = set(asked.get(store.hook_name, ())) - set(held or ())
    if held is None or not missing or asked == before:
        return
    left = ", ".join(str(h) for h in held if h in asked[store.hook_name])
    _logger.warning(
        "%s holds no reads of tokens at distance %s, which the SAE would train on: it trains on the own "
        "read%s; cache the activations anew to train on all",
        store.cached_activations_path,
        ", ".join(map(str, sorted(missing))),
        f" and those at {left}" if left else " only",
    )


def _trained_on(sae: Any) -> _Distances:
    """Distances of the later reads in the loss of an SAE with this config; none where nothing weighs them."""
    if not getattr(sae, "read_alignment_coefficient", 0.0):
        return ()
    return tuple(getattr(sae, "later_reads", ()))


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
    if heads.get(hook_name) is not None or (live and is_listened_to(model.hook_point(hook_name))):
        return None
    return model.site(hook_name).cell


def _packed(store: Any, cells: dict[str, Cell], tokens: Tensor) -> dict[str, Tensor]:
    """Packed writes of several cells by hook name, from one forward pass up to the last cell's layer."""
    model = store.model
    asked = {name: _ASKED.get(store, {}).get(name, ()) for name in cells}
    parts = {n: model.write_factor_hook_names(c.layer) for n, c in cells.items()}
    names = [name for three in parts.values() for name in three]
    recorded = dict.fromkeys(model.mixers[c.layer] for n, c in cells.items() if asked[n])
    with (
        torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=store.autocast_lm),
        record_recurrences(recorded) as recurrences,
    ):
        _, cache = model.run_with_cache(
            tokens,
            names_filter=list(dict.fromkeys(names)),
            stop_at_layer=max(cell.layer for cell in cells.values()) + 1,
            prepend_bos=False,
            **store.model_kwargs,
        )
    positions = slice(*store.seqpos_slice)
    packed = {}
    for name, cell in cells.items():
        key, value, own = (cache[part][:, :, cell.head, None] for part in parts[name])
        reads = own
        if asked[name]:
            recurrence = recurrences[model.mixers[cell.layer]].heads(cell.head)
            reads = torch.cat([own, later_reads(recurrence, asked[name])[:, :, 0]], dim=2)
        write = Write(key[:, positions], value[:, positions], reads[:, positions], asked[name])
        packed[name] = PackedWrites(write).to(store.device, torch.float32)
    return packed


def from_config(original: Any, owner: Any, model: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse an SAE whose sides are not the cell's (exchanged ones have the same product); keep its reads."""
    if not isinstance(model, HookedRecurrent):
        return original(owner, model, cfg, *args, **kwargs)
    model.check_hook_names([cfg.hook_name])
    sae, head_index = getattr(cfg, "sae", cfg), getattr(cfg, "hook_head_index", None)
    checks.check_site(model, cfg.hook_name, sae, head_index)
    store = original(owner, model, cfg, *args, **kwargs)
    keep_reads(store, {cfg.hook_name: [sae]})
    return store


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


def _packed_width(cell: Cell, distances: Sequence[int] = ()) -> int:
    """Width of a cached row [key, value, own read, later reads]."""
    return cell.d_k + cell.d_v + (1 + len(distances)) * cell.d_k


def _is_narrower(cell: Cell | None) -> bool:
    """Whether a write and its own read take less room in a cache than the matrix."""
    return cell is not None and _packed_width(cell) < cell.d_k * cell.d_v


@contextmanager
def _rows_of(store: Any, width: int) -> Iterator[None]:
    """Let SAELens's own method read rows of this width."""
    d_in, store.d_in = store.d_in, width
    try:
        yield
    finally:
        store.d_in = d_in


def _cached_distances(store: Any, cell: Cell | None) -> _Distances | None:
    """Which later reads the packed rows of the store's cached data set have; None if its rows are flat."""
    if cell is None or not _is_narrower(cell) or store.cached_activations_path is None:
        return None
    try:
        cached = datasets.load_from_disk(store.cached_activations_path)
    except FileNotFoundError:  # SAELens raises its own error for that
        return None
    if not isinstance(cached, datasets.Dataset):
        return None
    shape, distances = getattr(cached.features.get(store.hook_name), "shape", None), _noted(cached)
    return distances if shape is not None and shape[-1] == _packed_width(cell, distances) else None


def _noted(cached: datasets.Dataset) -> _Distances:
    """The distances that `_create_shard` noted; caches of earlier versions have the own read only."""
    try:
        return tuple(json.loads(cached.info.description)["later_reads"])
    except (ValueError, KeyError, TypeError):
        return ()


def load_cached_activation_dataset(original: Any, store: Any) -> Any:
    cell = _cell(store, store.hook_name, live=False)
    distances = _cached_distances(store, cell)
    if distances is None or cell is None:
        return original(store)
    with _rows_of(store, _packed_width(cell, distances)):
        loaded = original(store)
    _CACHED[store] = distances
    return loaded


def _load_raw_llm_batch_from_cached(
    original: Any, store: Any, raise_on_epoch_end: bool
) -> tuple[Tensor, Tensor | None]:
    distances, cell = _CACHED.get(store), _cell(store, store.hook_name, live=False)
    if distances is None or cell is None:
        return original(store, raise_on_epoch_end)
    checks.check_width(store.hook_name, cell, store.d_in)
    with _rows_of(store, _packed_width(cell, distances)):
        rows, token_ids = original(store, raise_on_epoch_end)
    key, value, reads = rows[:, None].split([cell.d_k, cell.d_v, (1 + len(distances)) * cell.d_k], dim=-1)
    write = Write(key, value, reads.reshape(len(rows), -1, cell.d_k), distances)
    asked = _ASKED.get(store, {}).get(store.hook_name, ())
    kept = tuple(h for h in asked if h in distances)
    return PackedWrites(write._replace(reads=write.reads_at(kept), distances=kept)), token_ids


def _create_shard(original: Any, runner: Any, buffer: tuple[Tensor, Tensor | None]) -> datasets.Dataset:
    rows, token_ids = buffer
    store, name = runner.activations_store, runner.cfg.hook_name
    if not _is_narrower(_cell(store, name)) or not isinstance(rows, PackedWrites):
        return original(runner, buffer)
    write = rows.blocks[0]
    assert write.reads is not None
    length, dtype = runner.context_size, runner.features[name].dtype
    row = torch.cat([write.key, write.value, write.reads.flatten(-2)[:, None]], dim=-1)
    columns: dict[str, Any] = {name: row.view(-1, length, row.shape[-1])}
    features = datasets.Features(
        runner.features | {name: datasets.Array2D(shape=(length, row.shape[-1]), dtype=dtype)}
    )
    if token_ids is not None:
        columns["token_ids"] = token_ids.view(-1, length).to(torch.int32)
    noted = json.dumps({"later_reads": write.distances})
    info = datasets.DatasetInfo(description=noted, features=features)
    return datasets.Dataset.from_dict(columns, features=features, info=info)


REPLACEMENTS = (
    from_config,
    get_activations,
    get_multi_hook_activations,
    load_cached_activation_dataset,
    _load_raw_llm_batch_from_cached,
    _create_shard,
)
