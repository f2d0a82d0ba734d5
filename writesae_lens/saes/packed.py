"""Flattened writes stored as their factors: 1 KiB, and 0.5 KiB a read, instead of 64 KiB (128 x 128).

SAELens's activation store copies, shuffles and slices rows of d_k * d_v numbers. `PackedWrites` has that
shape but stores key, value and the vectors with which tokens read the write. The operations that the store
uses act on these; any other operation builds the matrices first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.rank1 import Factors

aten = torch.ops.aten
_IN_PLACE = "packed writes are products of factors and cannot be changed in place: change their .dense() form"


class Write(NamedTuple):
    """One head's writes, and how they are read, where that is known.

    ``reads[..., 0, :]`` is the vector q_t with which the write's own token reads the state. The others are
    reads of later tokens, pulled back to the write (`hooked_models.recurrence.later_reads`), so that X^T r is
    what the write X contributes to that read; zero where the passage has ended. ``distances`` says how many
    tokens after the write each of these later ones is.
    """

    key: Float[Tensor, "*batch 1 d_k"]
    value: Float[Tensor, "*batch 1 d_v"]
    reads: Float[Tensor, "*batch n_reads d_k"] | None = None
    distances: tuple[int, ...] | None = None

    @property
    def sides(self) -> tuple[int, int]:
        return self.key.shape[-1], self.value.shape[-1]

    @property
    def factors(self) -> Factors:
        return Factors(self.key, self.value)

    def reads_at(self, distances: Sequence[int]) -> Float[Tensor, "*batch n_reads d_k"] | None:
        """The own token's read and those of later tokens at these distances, as far as they are here.

        Where ``distances`` of the writes is None, ``reads`` are taken as they are.
        """
        if self.reads is None or self.distances is None or self.distances == tuple(distances):
            return self.reads
        places = [0, *(1 + self.distances.index(h) for h in distances if h in self.distances)]
        return self.reads[..., places, :]


class PackedWrites(torch.Tensor):
    """Rank-1 matrices, flattened, of one or several heads side by side: ``[*batch, sum of d_k * d_v]``.

    Args:
        blocks: for each head its writes, without gradients.
    """

    blocks: tuple[Write, ...]

    @staticmethod
    def __new__(cls, *blocks: Write) -> PackedWrites:
        first = blocks[0].key
        width = sum(b.key.shape[-1] * b.value.shape[-1] for b in blocks)
        packed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*first.shape[:-2], width), dtype=first.dtype, device=first.device
        )
        packed.blocks = blocks
        return packed

    def __init__(self, *blocks: Write) -> None:
        super().__init__()

    def dense(self) -> Float[Tensor, "*batch width"]:
        """The matrices, built and flattened."""
        return torch.cat([b.factors.matrix().flatten(-2) for b in self.blocks], dim=-1)

    def numpy(self, **kwargs: Any) -> Any:
        return self.dense().numpy(**kwargs)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWrites(shape={tuple(self.shape)}, heads={len(self.blocks)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise WriteSAEError(_IN_PLACE)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*zip(func._schema.arguments, args)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in (kwargs or {})]
        if any(isinstance(x, cls) and a.alias_info is not None and a.alias_info.is_write for a, x in given):
            raise WriteSAEError(_IN_PLACE)
        handler = _HANDLERS.get(func)
        if handler is not None:
            packed = handler(*args, **(kwargs or {}))
            if packed is not None:
                return packed
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _map(x: PackedWrites, function: Callable[[Tensor], Tensor]) -> PackedWrites:
    """Apply a function that leaves the last two axes alone to every part ``[*batch, n, d]``."""

    def mapped(write: Write) -> Write:
        reads = None if write.reads is None else function(write.reads)
        return Write(function(write.key), function(write.value), reads, write.distances)

    return PackedWrites(*map(mapped, x.blocks))


def _view(x: PackedWrites, shape: list[int]) -> PackedWrites | None:
    if not shape or shape[-1] != x.shape[-1]:
        return None
    return _map(x, lambda f: f.reshape(*shape[:-1], *f.shape[-2:]))


def _slice(
    x: PackedWrites, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PackedWrites | None:
    dim %= x.ndim
    if dim < x.ndim - 1:
        here = (slice(None),) * dim + (slice(start, end, step),)
        return _map(x, lambda f: f[here])
    wanted = range(x.shape[-1])[slice(start, end, step)]
    edges, blocks = 0, []
    for block in x.blocks:
        columns = range(edges, edges := edges + block.key.shape[-1] * block.value.shape[-1])
        if columns.start in wanted and columns[-1] in wanted:
            blocks.append(block)
    packed = PackedWrites(*blocks) if blocks and step == 1 else None
    return packed if packed is not None and packed.shape[-1] == len(wanted) else None


def _index(x: PackedWrites, indices: list[Tensor | None]) -> PackedWrites | None:
    axes = sum(i.ndim if i is not None and i.dtype in (torch.bool, torch.uint8) else 1 for i in indices)
    if axes >= x.ndim:
        return None
    here = tuple(slice(None) if i is None else i for i in indices)
    return _map(x, lambda f: f[here])


def _cat(tensors: list[Any], dim: int = 0) -> PackedWrites | None:
    first = tensors[0]
    if not all(isinstance(x, PackedWrites) and x.dtype == first.dtype for x in tensors):
        return None
    if not -first.ndim <= dim < first.ndim or len({x.ndim for x in tensors}) > 1:
        return None
    dim %= first.ndim
    if dim == first.ndim - 1:
        if len({x.shape[:-1] for x in tensors}) > 1:
            return None
        return PackedWrites(*(b for x in tensors for b in x.blocks))
    if len({tuple((b.key.shape[-1], b.value.shape[-1]) for b in x.blocks) for x in tensors}) > 1:
        return None

    return PackedWrites(*(_joined(writes, dim) for writes in zip(*(x.blocks for x in tensors))))


def _joined(writes: Sequence[Write], dim: int) -> Write:
    """One head's writes along a batch axis. Reads that not all have, later ones too, are left out."""
    first = writes[0]
    kinds = {(w.distances, 0 if w.reads is None else w.reads.shape[-2]) for w in writes}
    alike = len(kinds) == 1
    reads: list[Tensor] = [w.reads if alike else w.reads[..., :1, :] for w in writes if w.reads is not None]
    return Write(
        torch.cat([w.key for w in writes], dim),
        torch.cat([w.value for w in writes], dim),
        torch.cat(reads, dim) if len(reads) == len(writes) else None,
        first.distances if alike else (),
    )


def _to(x: PackedWrites, **options: Any) -> PackedWrites | None:
    given = {n: options[n] for n in ("dtype", "device", "non_blocking") if options.get(n) is not None}
    if not given.get("dtype", x.dtype).is_floating_point:
        return None
    return _map(x, lambda f: f.to(**given, copy=True))


def _scale(left: Any, right: Any) -> PackedWrites | None:
    x, factor = (left, right) if isinstance(left, PackedWrites) else (right, left)
    if isinstance(factor, PackedWrites | complex) or (isinstance(factor, Tensor) and factor.ndim):
        return None
    scaled = PackedWrites(*(b._replace(key=b.key * factor) for b in x.blocks))
    return scaled if scaled.dtype == x.dtype else None


_HANDLERS: dict[Any, Callable[..., PackedWrites | None]] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    aten._to_copy.default: _to,
    aten.mul.Tensor: _scale,
    aten.alias.default: lambda x: _map(x, torch.Tensor.detach),
    aten.detach.default: lambda x: _map(x, torch.Tensor.detach),
    aten.clone.default: lambda x, **_: _map(x, torch.Tensor.clone),
}
