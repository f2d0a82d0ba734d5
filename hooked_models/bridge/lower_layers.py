"""The layers below an edited one, run once and shared by all branches and rows of the edited runs.

An edit of a layer's writes changes nothing below that layer: what the lower layers make of a token is the
same in every branch and in every row. `run_lower_layers` runs them once; a call of `HookedRecurrent.forward`
that is given the result leaves them out and starts at the edited layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hooked_models import calls

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent


@dataclasses.dataclass(frozen=True)
class LowerLayers:
    """What the layers below one return for some tokens.

    Args:
        layer: the lowest layer that is still to be run.
        output: what the layer before it returns, as it returns it: the residual stream
            ``[batch, pos, d_model]``, on RWKV-7 with the first layer's values beside it. What has no entry
            for each token, as weights of attention, is None.
    """

    layer: int
    output: Any

    @property
    def n_numbers(self) -> int:
        """How many numbers they are in all."""
        parts = [self.output] if isinstance(self.output, Tensor) else self.output
        return sum(x.numel() for x in parts if isinstance(x, Tensor))

    def map(self, change: Callable[[Tensor], Tensor]) -> LowerLayers:
        """The same of other tokens, each tensor ``[batch, pos, ...]`` changed in the same way."""
        if isinstance(self.output, Tensor):
            return dataclasses.replace(self, output=change(self.output))
        parts = (change(x) if isinstance(x, Tensor) else x for x in self.output)
        return dataclasses.replace(self, output=type(self.output)(parts))

    def with_branches(self, positions: Int[Tensor, " branch"]) -> LowerLayers:
        """Those of a passage, followed by those of branches at these positions."""
        return self.map(lambda x: torch.cat([x, x[:, positions]], dim=1))

    def rows(self, count: int) -> LowerLayers:
        """Those of ``count`` equal rows, without copying them."""
        return self.map(lambda x: x.expand(count, *x.shape[1:]))

    def window(self, start: int, stop: int) -> LowerLayers:
        """Those of the tokens from ``start`` to before ``stop``."""
        return self.map(lambda x: x[:, start:stop])


class Kept:
    """What the layers below one return in the last pass, once it is there.

    Args:
        layer: the lowest layer that is not among them.
        stops: whether the pass ends there.
    """

    def __init__(self, layer: int, stops: bool) -> None:
        self.layer, self.stops, self.outer = layer, stops, calls.current()
        self.found: LowerLayers | None = None


class _Stopped(Exception):
    """Ends a pass after the block whose output is kept."""


_GIVEN: ContextVar[LowerLayers | None] = ContextVar("lower layers of the running forward pass", default=None)
_CHECKPOINTED: ContextVar[bool] = ContextVar("whether blocks are checkpointed", default=False)
_KEPT: ContextVar[Kept | None] = ContextVar("what is kept of the running forward pass", default=None)


@contextmanager
def given(lower: LowerLayers | None) -> Iterator[None]:
    """While open, in this thread, forward passes leave out the layers below ``lower.layer``; None: none."""
    token = _GIVEN.set(lower)
    try:
        yield
    finally:
        _GIVEN.reset(token)


@contextmanager
def checkpointed(is_on: bool) -> Iterator[None]:
    """While open, in this thread, blocks keep nothing for the backward pass: they run again there."""
    token = _CHECKPOINTED.set(is_on)
    try:
        yield
    finally:
        _CHECKPOINTED.reset(token)


@contextmanager
def kept(layer: int, stops: bool = False) -> Iterator[Kept]:
    """While open, in this thread, what the layers below ``layer`` return in a forward pass is kept.

    Args:
        layer: the lowest layer that is not among them; 0: nothing is kept.
        stops: whether passes end there, without a result. (TransformerLens's ``stop_at_layer`` would end
            those of other threads too.)
    """
    keep = Kept(layer, stops)
    token = _KEPT.set(keep)
    try:
        yield keep
    except _Stopped:
        pass
    finally:
        _KEPT.reset(token)


@torch.no_grad()
def run_lower_layers(
    model: HookedRecurrent, tokens: Int[Tensor, "batch pos"], layer: int, **options: Any
) -> LowerLayers | None:
    """Run the layers below one, without gradients; None where there is none, or one has hooks.

    Such hooks are meant for all rows of a run, not for one.

    Args:
        model: the model.
        tokens: passages.
        layer: the lowest layer that is not run.
        **options: as for `HookedRecurrent.forward`.
    """
    if not layer or _is_hooked_below(model, layer):
        return None
    with kept(layer, stops=True) as keep:
        model.forward(tokens, return_type=None, **options)
    return keep.found


def _is_hooked_below(model: HookedRecurrent, layer: int) -> bool:
    """Whether anything is hooked in the embedding or in a layer below this one."""
    of_layers = (f"blocks.{n}." for n in range(layer, len(model.blocks)))
    # TransformerLens 4 lists a hook point by its alias too.
    above = "ln_final.", "unembed.", "hook_unembed", *of_layers
    return any(not name.startswith(above) for name in model.busy_hooks)


def _is_inside(outer: calls.Call | None) -> bool:
    """Whether the running call was made from this one (None: from none)."""
    now = calls.current()
    return now is not None and now.outer is outer


def _by_token(output: Any) -> Any:
    """What a block returns, without what has no entry for each token, as weights of attention."""
    if isinstance(output, Tensor):
        return output
    shape = output[0].shape[:2]
    return type(output)(x if isinstance(x, Tensor) and x.shape[:2] == shape else None for x in output)


def make_blocks_skippable(model: HookedRecurrent) -> None:
    """Let every block of a model look up whether it is left out; done once, when the model is loaded."""
    for layer, block in enumerate(model.blocks):
        vars(block)["forward"] = functools.partial(_forward, block, layer)


def _forward(block: nn.Module, layer: int, *args: Any, **options: Any) -> Any:
    """The block's own forward pass, unless the running pass is given what the block would return."""
    lower, keep = _GIVEN.get(), _KEPT.get()
    if lower is not None and layer < lower.layer:
        return lower.output
    run = functools.partial(type(block).forward, block)
    if _CHECKPOINTED.get():
        # The block runs again in the backward pass, where it must see what it sees now.
        now = copy_context()
        output = checkpoint(
            lambda *x, **y: now.copy().run(run, *x, **y), *args, use_reentrant=False, **options
        )
    else:
        output = run(*args, **options)
    # A pass inside the one that is to be kept, from a hook, is not kept.
    if keep is not None and layer == keep.layer - 1 and _is_inside(keep.outer):
        keep.found = LowerLayers(keep.layer, _by_token(output))
        if keep.stops:
            raise _Stopped
    return output
