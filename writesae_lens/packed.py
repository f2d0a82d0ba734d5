"""Flattened writes that are stored as their factors: 1 KiB instead of 64 for a 128 x 128 write.

SAELens's activation store copies, shuffles and slices rows of d_k * d_v numbers. `PackedWrites` is a tensor
of that shape to whoever looks, but keeps key and value; the operations by which rows travel act on these,
any other one builds the matrices first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from writesae_lens.rank1 import Factors

aten = torch.ops.aten


class PackedWrites(torch.Tensor):
    """Rank-1 matrices, flattened, of one or several heads side by side: ``[*batch, sum of d_k * d_v]``.

    Args:
        blocks: for each head factors ``key [*batch, 1, d_k]``, ``value [*batch, 1, d_v]``, without gradients.
    """

    blocks: tuple[Factors, ...]

    @staticmethod
    def __new__(cls, *blocks: Factors) -> PackedWrites:
        first = blocks[0].key
        width = sum(b.key.shape[-1] * b.value.shape[-1] for b in blocks)
        packed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (*first.shape[:-2], width), dtype=first.dtype, device=first.device
        )
        packed.blocks = blocks
        return packed

    def __init__(self, *blocks: Factors) -> None:
        super().__init__()

    def dense(self) -> Float[Tensor, "*batch width"]:
        """The numbers themselves."""
        return torch.cat([b.matrix().flatten(-2) for b in self.blocks], dim=-1)

    def numpy(self, **kwargs: Any) -> Any:
        return self.dense().numpy(**kwargs)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWrites(shape={tuple(self.shape)}, heads={len(self.blocks)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            packed = handler(*args, **(kwargs or {}))
            if packed is not None:
                return packed
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _map(x: PackedWrites, function: Callable[[Tensor], Tensor]) -> PackedWrites:
    """Apply to every factor ``[*batch, 1, d]`` something that leaves the last two axes alone."""
    return PackedWrites(*(Factors(function(b.key), function(b.value)) for b in x.blocks))


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
    edges, kept = 0, []
    for block in x.blocks:
        columns = range(edges, edges := edges + block.key.shape[-1] * block.value.shape[-1])
        if columns.start in wanted and columns[-1] in wanted:
            kept.append(block)
    packed = PackedWrites(*kept) if kept and step == 1 else None
    return packed if packed is not None and packed.shape[-1] == len(wanted) else None


def _index(x: PackedWrites, indices: list[Tensor | None]) -> PackedWrites | None:
    if len(indices) >= x.ndim:
        return None
    here = tuple(slice(None) if i is None else i for i in indices)
    return _map(x, lambda f: f[here])


def _cat(tensors: list[Any], dim: int = 0) -> PackedWrites | None:
    if not all(isinstance(x, PackedWrites) for x in tensors):
        return None
    first = tensors[0]
    if dim % first.ndim == first.ndim - 1:
        return PackedWrites(*(b for x in tensors for b in x.blocks))
    widths = {tuple((b.key.shape[-1], b.value.shape[-1]) for b in x.blocks) for x in tensors}
    if len(widths) > 1:
        return None
    dim %= first.ndim
    return PackedWrites(
        *(
            Factors(*(torch.cat(factor, dim) for factor in zip(*heads)))
            for heads in zip(*(x.blocks for x in tensors))
        )
    )


def _to(x: PackedWrites, **options: Any) -> PackedWrites | None:
    kept = {n: options[n] for n in ("dtype", "device", "non_blocking") if options.get(n) is not None}
    return _map(x, lambda f: f.to(**kept, copy=True))


def _scale(x: PackedWrites, factor: Any) -> PackedWrites | None:
    if isinstance(factor, Tensor) and factor.ndim:
        return None
    return PackedWrites(*(Factors(b.key * factor, b.value) for b in x.blocks))


_HANDLERS: dict[Any, Callable[..., PackedWrites | None]] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.cat.default: _cat,
    aten._to_copy.default: _to,
    aten.mul.Tensor: _scale,
    aten.detach.default: lambda x: _map(x, torch.Tensor.detach),
    aten.clone.default: lambda x, **_: _map(x, torch.Tensor.clone),
}
