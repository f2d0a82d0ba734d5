"""The mixer with hook points on its cache writes, common to all architectures.

An architecture subclasses `HookedMixer` and says how to get a `Recurrence` from a hidden state and how to
finish the layer; hooks, cached decoding and branches (one swapped write per position) are here.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooked_models.caches import cached, refuse_unknown, the_cache
from hooked_models.errors import HookedModelError
from hooked_models.recurrence import (
    LOG_ZERO,
    Recurrence,
    Trajectory,
    scan,
)
from hooked_models.responses import respond, respond_states


class _HeadSplit(BaseTensorConversion):
    """Leaves tensors alone; tells TransformerLens that the position axis of the hook is -3."""

    splits_attention_heads = True

    def handle_conversion(self, input_value: Any, *_: Any) -> Any:
        return input_value

    def revert(self, input_value: Any, *_: Any) -> Any:
        return input_value


def is_listened_to(point: nn.Module) -> bool:
    """Whether anything (a hook, or an SAE in the hook point's place) wants the activation."""
    if not isinstance(point, HookPoint):
        return True
    return bool(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
    )


@dataclasses.dataclass(frozen=True)
class Branches:
    """A forward pass whose sequence is the native tokens followed by branch tokens.

    A branch token stands at ``positions[j]`` and sees the native tokens before it and itself, nothing
    else: it is the last token of a passage of its own. At the mixer that holds a `Swap`, each
    branch writes something else than the native token did.
    """

    n_native: int
    positions: Int[Tensor, " branch"]

    def slots(self) -> tuple[int, Tensor]:
        """How many branches share the busiest position, and each branch's number at its position."""
        order = torch.argsort(self.positions, stable=True)
        counts = torch.bincount(self.positions, minlength=1)
        first = (counts.cumsum(0) - counts)[self.positions[order]]
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device) - first
        return max(1, int(counts.max())), slot


@dataclasses.dataclass(frozen=True)
class Swap:
    """What the branches write at one head: the sum over ``rank`` of key value^T.

    ``erase`` says whether their own erase still happens there.
    """

    head: int
    keys: Float[Tensor, "branch rank d_k"]
    values: Float[Tensor, "branch rank d_v"]
    erase: bool


@dataclasses.dataclass(frozen=True)
class Added:
    """What each row of a batch writes at one head beside its native writes: key value^T at one position.

    ``linear`` says that the rest of the model shall see it as a derivative (forward-mode), not as a change.
    """

    head: int
    positions: Int[Tensor, " row"]
    keys: Float[Tensor, "row d_k"]
    values: Float[Tensor, "row d_v"]
    linear: bool


class BranchAware(GeneralizedComponent):
    """A component that mixes tokens, and so must know which of them are branches."""

    _branches: Branches | None = None


class HookedMixer(BranchAware):
    """A recurrent mixer whose per-head writes and states can be read and edited.

    ======================  =============================  ===========================================
    hook                    shape                          meaning; what an edit does
    ======================  =============================  ===========================================
    hook_in, hook_out       [batch, pos, d_model]          input and output of the layer; propagates
    hook_write.{head}       [batch, pos, d_k * d_v]        native write k v^T, row-major; what a hook
                                                           returns is written, erase and decay stay
                                                           native, later states follow
    hook_erase.{head}       [batch, pos, d_k * d_v]        what the transition adds besides the decay,
                                                           a b^T S of the state before; a position that a
                                                           hook changes has its erase set, at others it
                                                           stays native (not where nothing is erased)
    hook_state.{head}       [batch, pos, d_k * d_v]        state after the token; a position that a hook
                                                           changes has its state set, later ones follow
    hook_write_key          [batch, pos, head, d_k]        key factor of every write; as hook_write
    hook_write_value        [batch, pos, head, d_v]        value factor of every write; as hook_write
    hook_read               [batch, pos, head, d_k]        read vector; changes this token's output only
    hook_decay              [batch, pos, head(, d_k)]      decay exp(g) in [0, 1]; later states follow
    hook_recurrence_out     [batch, pos, head, d_v]        S_t^T q_t before norm and gate; propagates
    ======================  =============================  ===========================================

    ``hook_erase`` and ``hook_state`` show a call's positions as they are without the hook's own edits in that
    call. So setting them means the same in prefill and in decoding; a function of the value (``x * 0.5``)
    at several positions does not, for in decoding each token already sees the edits before it.

    A hook may return a new tensor or edit in place (not through ``.data`` or numpy, which torch cannot see).
    They fire in this order: factors, read and decay, then per head write, erase and state, then outputs; in
    prefill and in cached decoding, where ``pos`` counts the new tokens. Activations of the recurrence come
    in float32 at least. No write or state matrix is built for a hook point that nobody listens to. In a
    left-padded batch the padding writes zeros.
    """

    architecture: str
    erases = True
    """Whether the transition does more than decay."""
    decay_per_channel = False
    """Whether every key channel has a decay of its own."""
    state_is_transposed = False
    """Whether the library caches states as [d_v, d_k]."""

    def __init__(self, name: str, config: Any = None, optional: bool = False, **kwargs: Any) -> None:
        super().__init__(name, config=config, optional=optional, **kwargs)
        for point in ("write_key", "write_value", "read", "decay", "recurrence_out"):
            setattr(self, f"hook_{point}", HookPoint())
            if point != "decay" or self.decay_per_channel:
                getattr(self, f"hook_{point}").hook_conversion = _HeadSplit()
        self._swap: Swap | None = None
        self._added: Added | None = None

    # What an architecture says.

    @property
    @abstractmethod
    def n_heads(self) -> int:
        """Cells of this layer."""

    @property
    @abstractmethod
    def write_shape(self) -> tuple[int, int]:
        """(d_k, d_v)."""

    @property
    @abstractmethod
    def layer_index(self) -> int:
        """The model layer."""

    @abstractmethod
    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, mask: Tensor | None
    ) -> tuple[Recurrence, Any]:
        """The recurrence's inputs, and whatever `finish` wants to have kept.

        ``mask``, [batch, pos, 1] and 0 at padding, has been applied to ``hidden``. Under branches ``hidden``
        ends with the branch tokens, and local mixing (convolution, token shift) must show each of
        them the native history of its position.
        """

    @abstractmethod
    def finish(
        self, outputs: Float[Tensor, "batch pos head d_v"], kept: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        """From the recurrence's outputs to the layer's output."""

    @property
    @abstractmethod
    def output_weight(self) -> Float[Tensor, "d_model head_d_v"]:
        """Weight of the projection that ends the layer."""

    # What all share.

    def head_output(self, head: int) -> Float[Tensor, "d_v d_model"]:
        """W_O of one head: how its outputs, after norm and gate, enter the residual stream."""
        d_v = self.write_shape[1]
        return self.output_weight[:, head * d_v : (head + 1) * d_v].T

    def cached_state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        """The layer's state in a cache, as a view: what is assigned to it is what the next token meets.

        Raises:
            HookedModelError: the cache holds no state of this layer yet.
        """
        state = cached(cache, self.layer_index, "recurrent_states")
        if state is None:
            raise HookedModelError(
                f"the cache holds no state of layer {self.layer_index} yet: run tokens first"
            )
        return state.mT if self.state_is_transposed else state

    @property
    def _per_head(self) -> tuple[str, ...]:
        return ("hook_write", "hook_erase", "hook_state") if self.erases else ("hook_write", "hook_state")

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        for name in self._per_head:
            setattr(self, name, nn.ModuleList(HookPoint() for _ in range(self.n_heads)))

    def get_hooks(self) -> dict[str, HookPoint]:
        """All hook points by name; the per-head ones are read live, for an SAE may stand in their place."""
        hooks = super().get_hooks()
        for name in self._per_head:
            for head, point in enumerate(getattr(self, name, ())):
                hooks[f"{name}.{head}"] = point
        return hooks

    def remove_hooks(self, hook_name: str | None = None) -> None:
        super().remove_hooks(hook_name)
        if hook_name is None:
            for point in self.get_hooks().values():
                if isinstance(point, HookPoint):
                    point.remove_hooks(dir="both")

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        cache = the_cache(options)
        refuse_unknown(options, type(self).__name__)
        if not hidden_states.shape[1]:
            raise HookedModelError("there are no tokens to read: give one at least")
        hidden = _call(self.hook_in, hidden_states)
        if self._branches is not None:
            return self.hook_out(self._forward_branches(hidden, self._branches))
        mask = None
        if attention_mask is not None and attention_mask.ndim == 2:
            mask = attention_mask[:, -hidden.shape[1] :, None].to(hidden.dtype)
            hidden = hidden * mask
        recurrence, kept = self.inputs(hidden, cache, mask)
        keys = recurrence.k
        if is_listened_to(self.hook_write_key):
            keys, touched = _show(self.hook_write_key, keys)
            if touched or keys.requires_grad:  # an edited key must not move the erase
                recurrence = recurrence.with_erase_vector()
        recurrence = dataclasses.replace(
            recurrence,
            q=_call(self.hook_read, recurrence.q),
            k=keys,
            v=_call(self.hook_write_value, recurrence.v),
        )
        state = cached(cache, self.layer_index, "recurrent_states")
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the cache is overwritten below, and gradients want what was read
        if state is not None and self.state_is_transposed:
            state = state.mT
        outputs, final_state = scan(recurrence, state)
        for head in range(self.n_heads):
            if any(is_listened_to(getattr(self, name)[head]) for name in self._per_head):
                start = None if state is None else state[:, head : head + 1]
                change = self._head_change(head, recurrence.heads(head), start)
                if change is not None:
                    outputs[:, :, head] = outputs[:, :, head] + change[0][:, :, 0]
                    final_state = final_state.index_add(
                        1, torch.tensor([head], device=final_state.device), change[1]
                    )
        if cache is not None:
            kept_state = final_state.mT if self.state_is_transposed else final_state
            cache.update_recurrent_state(kept_state, self.layer_index)
        added = self._added
        if added is not None and not added.linear:
            outputs = self._with_added(added, recurrence, outputs)
        outputs = _call(self.hook_recurrence_out, outputs)
        finished = self.finish(outputs, kept)
        if added is not None and added.linear:
            moved = self.finish(self._with_added(added, recurrence, outputs), kept)
            finished = forward_ad.make_dual(finished, moved - finished)
        return _call(self.hook_out, finished)

    def _with_added(self, added: Added, recurrence: Recurrence, outputs: Tensor) -> Tensor:
        rec = recurrence.heads(added.head).with_erase_vector()
        here = torch.arange(outputs.shape[1], device=outputs.device) == added.positions[:, None]
        # The state is linear in the writes, so what one adds is a recurrence with no other write.
        keys = here[:, :, None, None] * added.keys[:, None, None].to(rec.k)
        values = added.values[:, None, None].to(rec.v).expand_as(rec.v)
        change, _ = scan(dataclasses.replace(rec, k=keys, v=values), None)
        moved = outputs.clone()
        moved[:, :, added.head] += change[:, :, 0]
        return moved

    def fire_decay(self, g: Tensor) -> Tensor:
        """Show exp(g) to ``hook_decay`` and return the log of what comes back."""
        if not is_listened_to(self.hook_decay):
            return g
        decay, touched = _show(self.hook_decay, g.exp())
        if not (touched or decay.requires_grad):
            return g
        tiny = torch.finfo(decay.dtype).tiny
        log = decay.clamp(min=tiny).log().masked_fill(decay <= tiny, LOG_ZERO)
        return log if touched else g.detach() + (log - log.detach())

    def _head_change(
        self, head: int, recurrence: Recurrence, start: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Fire one head's write, erase and state hooks; the change of outputs and final state they make."""
        rec = recurrence.map(lambda x: x.to(recurrence.dtype))
        on_erase = self.erases and is_listened_to(self.hook_erase[head])
        on_state = is_listened_to(self.hook_state[head])
        change: tuple[Tensor, Tensor] | None = None
        difference: Tensor | None = None  # what enters the state beside what the scan accounts for
        if is_listened_to(self.hook_write[head]):
            edited, touched = _fire(self.hook_write[head], _outer(rec.k, rec.v))
            if touched or (edited.requires_grad and (on_erase or on_state)):
                difference = edited - _outer(rec.k, rec.v)
            elif edited.requires_grad:
                out = _UnchangedWrite.apply(edited, *(getattr(rec, f) for f in "kvqgab"))
                change = (out, rec.k.new_zeros(()).expand(len(out), 1, *self.write_shape))
        after = rec  # with the erases that are set left out
        if on_erase:
            after, moved = self._fire_erase(head, rec, start, difference)
            if moved is not None:
                difference = moved if difference is None else difference + moved
        if difference is not None:
            change = respond(after, difference)
        if on_state:
            # Kept apart from what the hook sees, for a hook may edit in place.
            states = Trajectory(rec, start).states()
            if difference is not None:
                states = states + respond_states(after, difference)
            edited, touched = _fire(self.hook_state[head], states.clone())
            if touched or edited.requires_grad:
                moved = edited - states
                state_is_set = (moved != 0).flatten(-2).any(-1)
                outputs, final = respond(after, moved, state_is_set)
                change = (outputs, final) if change is None else (outputs + change[0], final + change[1])
        return change

    def _fire_erase(
        self, head: int, rec: Recurrence, start: Tensor | None, difference: Tensor | None
    ) -> tuple[Recurrence, Tensor | None]:
        """Fire one head's erase hook: the recurrence without the erases that it set, and what enters instead.

        A set erase no longer depends on the state, so there the transition is the decay alone, and
        what the scan erased natively is given back.
        """
        a, b = rec.with_erase_vector().a, rec.b
        assert a is not None
        assert b is not None
        native = erased = Trajectory(rec, start).read(b, before=True)
        if difference is not None:
            # What b_t reads of the edits in S_{t-1}: the responses, read one token earlier.
            ahead = dataclasses.replace(rec, q=nn.functional.pad(b[:, 1:], (0, 0, 0, 0, 0, 1)))
            later = respond(ahead, difference)[0]
            erased = native + nn.functional.pad(later[:, :-1], (0, 0, 0, 0, 1, 0))
        edited, touched = _fire(self.hook_erase[head], _outer(a, erased))
        if not (touched or edited.requires_grad):
            return rec, None
        moved = edited - _outer(a, erased)
        erase_is_set = (moved != 0).flatten(-2).any(-1)
        moved = torch.where(erase_is_set[..., None, None], edited - _outer(a, native), moved)
        return rec.without_erase(erase_is_set), moved

    def _forward_branches(self, hidden: Tensor, branches: Branches) -> Tensor:
        recurrence, kept = self.inputs(hidden, None, None)
        length = branches.n_native
        native, branch = recurrence.positions(slice(length)), recurrence.positions(slice(length, None))
        if self._swap is not None and not self._swap.erase:
            own = torch.arange(self.n_heads, device=hidden.device) == self._swap.head
            branch = branch.without_erase(own.expand(*branch.k.shape[:3]))
        trajectory = Trajectory(native)
        # A branch reads S_t = T_t S_{t-1} + W_t with its own T and W but the native S_{t-1}.
        n_slots, slot = branches.slots()
        pulled = branch.pull_back(branch.q)
        reads = pulled.new_zeros(n_slots, *native.q.shape)
        reads[slot, :, branches.positions] = pulled.transpose(0, 1)
        carried = torch.stack([trajectory.read(r, before=True) for r in reads])
        carried = carried[slot, :, branches.positions].transpose(0, 1)
        written = branch.v * (branch.k * branch.q).sum(-1, keepdim=True)
        if self._swap is not None:
            swap = self._swap
            read = torch.einsum("bjk,jrk->bjr", branch.q[:, :, swap.head], swap.keys.to(branch.q))
            written = written.clone()
            written[:, :, swap.head] = torch.einsum("bjr,jrv->bjv", read, swap.values.to(branch.v))
        return self.finish(torch.cat([trajectory.read(native.q), carried + written], dim=1), kept)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., None] * y[..., None, :]


def _version(x: Tensor) -> int:
    """How often ``x`` was written to in place; tensors of inference mode do not count that."""
    return -1 if x.is_inference() else x._version


def _call(point: nn.Module, x: Tensor) -> Tensor:
    """Fire a hook point.

    Raises:
        HookedModelError: a hook returned no tensor, or another shape, which could broadcast unseen.
    """
    edited = point(x)
    if not isinstance(edited, Tensor) or edited.shape != x.shape:
        name = getattr(point, "name", type(point).__name__)
        found = f"shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else f"a {type(edited).__name__}"
        raise HookedModelError(
            f"a hook at {name} returned {found}, expected {tuple(x.shape)}: return a tensor of that shape, "
            "or None to change nothing"
        )
    return edited


def _show(point: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """Show a copy of a small tensor to a hook point; what came back, and whether it differs."""
    shown = x.clone()
    edited = _call(point, shown)
    return edited, edited is not shown or not torch.equal(edited, x)


def _fire(point: nn.Module, matrices: Tensor) -> tuple[Tensor, bool]:
    """Show [B, T, 1, K, V] to a hook point as [B, T, K * V]; what came back, and whether it differs."""
    flat = matrices.flatten(-2).squeeze(2)
    version = _version(flat)
    edited = _call(point, flat)
    touched = edited is not flat or version == -1 or version != _version(flat)
    return edited.to(matrices.dtype).view_as(matrices), touched


class _UnchangedWrite(torch.autograd.Function):
    """The response to an unedited write: zero forwards, at no cost, with the right gradient backwards.

    Gradients with respect to the hooked write exist although reading it changed nothing; what flows
    on from it into k and v is taken back, for the scan already accounts for it.
    """

    @staticmethod
    def forward(ctx: Any, write: Tensor, k: Tensor, v: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(k, v, *inputs)
        return torch.zeros_like(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        k, v, q, g, a, b = ctx.saved_tensors
        difference = (k[..., None] * v[..., None, :]).zero_().requires_grad_()
        with torch.enable_grad():
            outputs, _ = respond(Recurrence(q, g, k, v, a, b), difference)
            (grad,) = torch.autograd.grad(outputs, difference, grads[0])
        grad_k = -torch.einsum("bthkv,bthv->bthk", grad, v)
        grad_v = -torch.einsum("bthkv,bthk->bthv", grad, k)
        return grad, grad_k, grad_v, None, None, None, None


def causal_convolution(
    mixed: Float[Tensor, "batch pos channel"],
    conv: nn.Conv1d,
    cache: Any,
    layer: int,
    branches: Branches | None,
) -> Float[Tensor, "batch pos channel"]:
    """Depthwise causal convolution over positions; reads its history from a cache and updates it."""
    weight, taps = conv.weight.squeeze(1), conv.weight.shape[-1]
    native = mixed if branches is None else mixed[:, : branches.n_native]
    held = cached(cache, layer, "conv_states")
    if held is None:
        window = nn.functional.pad(native, (0, 0, taps, 0))
    else:
        window = torch.cat([held.mT.to(native.dtype), native], dim=1)
    if cache is not None:
        cache.update_conv_state(window[:, -taps:].mT.contiguous(), layer)
    window = window[:, 1:]
    length = native.shape[1]
    out = window[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        out = torch.addcmul(out, window[:, tap : tap + length], weight[:, tap])
    if branches is not None:
        # A branch differs from its position's native token in the last tap only.
        at = branches.positions
        own = mixed[:, branches.n_native :] - native[:, at]
        out = torch.cat([out, torch.addcmul(out[:, at], own, weight[:, -1])], dim=1)
    return out if conv.bias is None else out + conv.bias
