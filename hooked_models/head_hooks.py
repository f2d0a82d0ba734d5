"""Firing hook points: one head's write, erase and state, and what their edits do to the layer's outputs.

A write, erase or state matrix is built only where somebody listens. An edit does not rerun the layer: the
outputs change by the response of the difference (`responses`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooked_models.errors import HookedModelError
from hooked_models.recurrence import Recurrence, Trajectory
from hooked_models.responses import respond, respond_states
from hooked_models.upstream import is_listened_to

Change = tuple[Tensor, Tensor]  # of a head's outputs [B, T, 1, V] and of its final state [B, 1, K, V]


class HeadHooks(NamedTuple):
    """The hook points of one head."""

    write: nn.Module
    state: nn.Module
    erase: nn.Module | None = None
    """None where nothing is erased."""

    @property
    def are_listened_to(self) -> bool:
        return any(point is not None and is_listened_to(point) for point in self)

    def fire(self, recurrence: Recurrence, start: Tensor | None, real: Tensor | None = None) -> Change | None:
        """Fire the write, the erase and the state hook, in this order.

        Args:
            recurrence: of this head alone.
            start: its state before the first token, ``[batch, 1, d_k, d_v]`` (None: zero).
            real: ``[batch, pos]``, False at padding, where no edit counts (None: nowhere).

        Returns:
            how the hooks' edits change outputs and final state (None: not at all).
        """
        rec = recurrence.map(lambda x: x.to(recurrence.dtype))
        on_erase = self.erase is not None and is_listened_to(self.erase)
        on_state = is_listened_to(self.state)
        change: Change | None = None
        difference: Tensor | None = None  # what enters the state beside what the scan contains
        # 1. The write W_t = k_t v_t^T: a changed one enters the state as a difference.
        if is_listened_to(self.write):
            edited, touched = fire_matrices(self.write, _outer(rec.k, rec.v))
            edited = _at_tokens(edited, real)
            if touched or (edited.requires_grad and (on_erase or on_state)):
                difference = edited - _outer(rec.k, rec.v)
            elif edited.requires_grad:
                out = _UnchangedWrite.apply(edited, *(getattr(rec, f) for f in "kvqgab"))
                change = (out, rec.k.new_zeros(()).expand(len(out), 1, *edited.shape[-2:]))
        # 2. The erase a_t b_t^T S_{t-1}: `free` is the recurrence without the erases that a hook has set.
        free = rec
        if on_erase:
            free, set_instead = self._fire_erase(rec, start, difference, real)
            if set_instead is not None:
                difference = set_instead if difference is None else difference + set_instead
        if difference is not None:
            change = respond(free, difference)
        # 3. The state S_t, with the edits above: a changed one is set.
        if on_state:
            # The hook gets a copy, because it may edit in place.
            states = Trajectory(rec, start).states()
            if difference is not None:
                states = states + respond_states(free, difference)
            edited, touched = fire_matrices(self.state, states.clone())
            if touched or edited.requires_grad:
                moved = _at_tokens(edited - states, real)
                outputs, final = respond(free, moved, state_is_set=(moved != 0).flatten(-2).any(-1))
                change = (outputs, final) if change is None else (outputs + change[0], final + change[1])
        return change

    def _fire_erase(
        self, rec: Recurrence, start: Tensor | None, difference: Tensor | None, real: Tensor | None
    ) -> tuple[Recurrence, Tensor | None]:
        """Fire the erase hook: the recurrence without the erases that it set, and what enters instead.

        A set erase no longer depends on the state, so the transition there is the decay alone. The change of
        the state is the set erase minus the native erase, which the scan already contains.
        """
        a, b = rec.with_erase_vector().a, rec.b
        assert self.erase is not None
        assert a is not None
        assert b is not None
        native = erased = Trajectory(rec, start).read(b, before=True)  # S_{t-1}^T b_t, [B, T, 1, V]
        if difference is not None:
            # b_t reads the earlier edits too: their response in S_{t-1}, read one token earlier.
            ahead = dataclasses.replace(rec, q=nn.functional.pad(b[:, 1:], (0, 0, 0, 0, 0, 1)))
            response = respond(ahead, difference)[0]
            erased = native + nn.functional.pad(response[:, :-1], (0, 0, 0, 0, 1, 0))
        edited, touched = fire_matrices(self.erase, _outer(a, erased))
        if not (touched or edited.requires_grad):
            return rec, None
        edited = _at_tokens(edited, real)
        moved = edited - _outer(a, erased)
        erase_is_set = (moved != 0).flatten(-2).any(-1)
        moved = torch.where(erase_is_set[..., None, None], edited - _outer(a, native), moved)
        return rec.without_erase(erase_is_set), moved


def fire(point: nn.Module, x: Tensor) -> Tensor:
    """Fire a hook point.

    Raises:
        HookedModelError: a hook returned no tensor, or another shape, which could broadcast unseen.
    """
    edited = point(x)
    if not isinstance(edited, Tensor) or edited.shape != x.shape:
        name = getattr(point, "name", type(point).__name__)
        returned = (
            f"shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else f"a {type(edited).__name__}"
        )
        raise HookedModelError(
            f"a hook at {name} returned {returned}, expected {tuple(x.shape)}: return a tensor of that "
            "shape, or None to change nothing"
        )
    return edited


def fire_copy(point: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """Fire a hook point with a copy of a small tensor; its result, and whether a hook changed the copy."""
    shown = x.clone()
    edited = fire(point, shown)
    return edited, edited is not shown or not torch.equal(edited, x)


def fire_matrices(point: nn.Module, matrices: Tensor) -> tuple[Tensor, bool]:
    """Fire a hook point with [B, T, 1, K, V] as [B, T, K * V]; its result, and whether a hook edited it."""
    flat = matrices.flatten(-2).squeeze(2)
    version = _version(flat)
    edited = fire(point, flat)
    touched = edited is not flat or version == -1 or version != _version(flat)
    return edited.to(matrices.dtype).view_as(matrices), touched


def _version(x: Tensor) -> int:
    """How often a tensor was written to in place; -1 in inference mode, where torch does not count."""
    return -1 if x.is_inference() else x._version


def _at_tokens(matrices: Tensor, real: Tensor | None) -> Tensor:
    """[B, T, 1, K, V] with zeros at padding, where writes and erases are zero."""
    return matrices if real is None else matrices.masked_fill(~real[..., None, None, None], 0)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., None] * y[..., None, :]


class _UnchangedWrite(torch.autograd.Function):
    """The response to a write that is hooked and unedited: zero forwards, at no cost, the gradient backwards.

    The gradient with respect to the hooked write exists, although reading it changed nothing. The part of it
    that flows on into k and v is subtracted, because the scan contains it already. Where the gradient is to
    be differentiated again (``create_graph=True``), it is computed as that of the response itself, so that
    every further derivative is exact.
    """

    @staticmethod
    def forward(write: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> Tensor:
        return torch.zeros_like(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        write, k, v, q, g, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of_response(ctx.saved_tensors, grads[0])
        difference = torch.zeros_like(write, requires_grad=True)
        with torch.enable_grad():
            outputs, _ = respond(Recurrence(q, g, k, v, a, b), difference)
            (grad,) = torch.autograd.grad(outputs, difference, grads[0])
        grad_k = -torch.einsum("bthkv,bthv->bthk", grad, v)
        grad_v = -torch.einsum("bthkv,bthk->bthv", grad, k)
        return grad, grad_k, grad_v, None, None, None, None


def _gradients_of_response(saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the response to write - k v^T in all of its inputs, with a graph of their own."""
    # Views, because an input may have been computed from another one, and each has its own gradient.
    views: list[Any] = [x if x is None else x.view_as(x) for x in saved]
    write, k, v, q, g, a, b = views
    outputs, _ = respond(Recurrence(q, g, k, v, a, b), write - _outer(k, v))
    wanted = [x for x in views if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grad, create_graph=True, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in views)
