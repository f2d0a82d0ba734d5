"""The mixer with hook points on its cache writes, common to all architectures.

An architecture is a subclass of `HookedMixer` that computes a `Recurrence` from a hidden state and finishes
the layer. Hooks and cached decoding are here, the hooks of one head in `head_hooks`, swapped and added writes
in `edits`.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooked_models import calls, edits, recordings
from hooked_models.caches import cached, pop_cache, refuse_unknown, store_state
from hooked_models.errors import HookedModelError
from hooked_models.head_hooks import HeadHooks, fire, fire_copy
from hooked_models.recurrence import LOG_ZERO, Recurrence, scan
from hooked_models.upstream import HeadSplit, is_listened_to


@dataclasses.dataclass(frozen=True)
class AttributeNames:
    """The names under which an architecture's recurrent component keeps what all of them have."""

    n_heads: str
    d_k: str
    d_v: str
    output_projection: str = "out_proj"
    layer_index: str = "layer_idx"


class HookedMixer(GeneralizedComponent):
    """A recurrent mixer whose per-head writes and states can be read and edited.

    ======================  =============================  ===========================================
    hook                    shape                          activation; effect of an edit
    ======================  =============================  ===========================================
    hook_in, hook_out       [batch, pos, d_model]          input and output of the layer; an edit
                                                           propagates
    hook_write.{head}       [batch, pos, d_k * d_v]        native write k v^T, row-major; the hook's
                                                           result is written instead, erase and decay
                                                           stay native, later states follow
    hook_erase.{head}       [batch, pos, d_k * d_v]        what the transition adds besides the decay,
                                                           a b^T S of the state before (absent where an
                                                           architecture erases nothing); where the hook
                                                           changes it the erase is set, at others it
                                                           stays native
    hook_state.{head}       [batch, pos, d_k * d_v]        state after the token; at a position where the
                                                           hook changes it the state is set, later states
                                                           follow
    hook_write_key          [batch, pos, head, d_k]        key factor of every write; as hook_write
    hook_write_value        [batch, pos, head, d_v]        value factor of every write; as hook_write
    hook_read               [batch, pos, head, d_k]        read vector q; the token's own output changes
    hook_decay              [batch, pos, head(, d_k)]      decay exp(g) in [0, 1]; later states follow
    hook_recurrence_out     [batch, pos, head, d_v]        S_t^T q_t before norm and gate; an edit
                                                           propagates
    hook_head_out           [batch, pos, head, d_v]        each head's output after norm and gate, what
                                                           the output projection W_O reads (softmax
                                                           attention's hook_z); an edit propagates
    ======================  =============================  ===========================================

    ``hook_erase`` and ``hook_state`` show the positions of one call without the hook's own edits at earlier
    positions of that call. So setting them to given values means the same in prefill and in decoding; a
    function of the activation (``x * 0.5``) at several positions does not, because in decoding each token
    sees the edits before it.

    A hook may return a new tensor or edit in place (not through ``.data`` or numpy, which torch cannot see).
    Hooks fire in this order: factors, read and decay; then write, erase and state head by head; then the
    outputs. They fire in prefill and in cached decoding, where ``pos`` counts the new tokens. Activations of
    the recurrence have dtype float32 at least, those of ``hook_in``, ``hook_out`` and ``hook_head_out`` the
    model's. No write or state matrix is built for a hook point that nobody
    listens to. Padding is inert: whatever a hook returns there, nothing is written, erased, set or read.

    In a hybrid, other layers can have another component in the same slot, as attention or an MLP. A mixer
    that wraps one runs it as it is, has ``hook_in`` and ``hook_out`` only, and ``is_recurrent`` is False.
    """

    architecture: str
    """The kind of recurrence, as in `Cell.architecture`."""
    attribute_names: AttributeNames
    own_arguments: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments of the wrapped component that `inputs` takes too."""
    erases = True
    """Whether the transition does more than decay."""
    decay_per_channel = False
    """Whether every key channel has a decay of its own."""
    state_is_transposed = False
    """Whether transformers caches the states as [d_v, d_k]."""
    is_recurrent = False
    """Whether the wrapped component is this architecture's recurrence; see `wraps`."""

    # Each architecture's own part.

    @abstractmethod
    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, Any]:
        """The recurrence's inputs, and the bypass: the tensors that `head_outputs` needs besides its outputs.

        ``hidden`` is 0 at padding, where ``real`` is False (None: nowhere). What enters a convolution or a
        token shift must be 0 there too (`calls.without_padding`); the recurrence's own tensors may be
        anything. Convolutions and token shifts must go through `edits.mix_neighbours`, since ``hidden``
        may end with branches, and the log decay through `fire_decay`, which fires ``hook_decay``.
        """

    @abstractmethod
    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: Any
    ) -> Float[Tensor, "batch pos head d_v"]:
        """From the recurrence's outputs to what the output projection reads: norm, gate and bypass."""

    def returned(self, output: Float[Tensor, "batch pos d_model"], bypass: Any) -> Any:
        """The return value of the wrapped component's forward."""
        return output

    def wraps(self, component: nn.Module) -> bool:
        """Whether a component is this architecture's recurrence, by default by its attributes."""
        return all(hasattr(component, name) for name in dataclasses.astuple(self.attribute_names))

    # Common to all architectures.

    @property
    def wrapped(self) -> Any:
        """The component of the Hugging Face model that the mixer stands for."""
        return self.original_component

    @property
    def n_heads(self) -> int:
        """How many cells the layer has."""
        return getattr(self.wrapped, self.attribute_names.n_heads)

    @property
    def write_shape(self) -> tuple[int, int]:
        """(d_k, d_v)."""
        names = self.attribute_names
        return getattr(self.wrapped, names.d_k), getattr(self.wrapped, names.d_v)

    @property
    def layer_index(self) -> int:
        """The layer's number in the model."""
        return getattr(self.wrapped, self.attribute_names.layer_index)

    @property
    def output_projection(self) -> nn.Module:
        """W_O, from the outputs of all heads to the layer's output."""
        return getattr(self.wrapped, self.attribute_names.output_projection)

    def head_output(self, head: int) -> Float[Tensor, "d_v d_model"]:
        """W_O of one head: how ``hook_head_out`` enters the layer's output.

        Of a plain Linear it is a part of the weight. One that is adapted (peft's LoRA) or quantised is
        applied to unit vectors, and what it makes of zero is subtracted.

        Raises:
            HookedModelError: the projection has a dropout that is on, so that it is no one matrix.
        """
        d_v = self.write_shape[1]
        projection: Any = self.output_projection
        if isinstance(projection, GeneralizedComponent):  # whose hooks are for the model's own pass
            projection = projection.original_component
        if type(projection) is nn.Linear and not projection.weight.is_meta:
            return projection.weight[:, head * d_v : (head + 1) * d_v].T
        if any(isinstance(part, nn.Dropout) and part.training and part.p for part in projection.modules()):
            raise HookedModelError(
                f"the output projection of layer {self.layer_index} drops inputs at random: call model.eval()"
            )
        weight = next(x for x in projection.parameters() if x.dtype.is_floating_point)
        units = torch.zeros(d_v, self.n_heads * d_v, dtype=weight.dtype, device=weight.device)
        units[:, head * d_v : (head + 1) * d_v].fill_diagonal_(1)
        return projection(units) - projection(torch.zeros_like(units[:1]))

    def cached_state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        """The layer's state in a cache, as a view: assigning to it sets what the next token starts from.

        Raises:
            HookedModelError: the cache holds no state of this layer yet.
        """
        state = self._state_before(cache)
        if state is None:
            raise HookedModelError(
                f"the cache holds no state of layer {self.layer_index} yet: run tokens first"
            )
        return state

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        self.is_recurrent = self.wraps(original_component)
        if not self.is_recurrent:
            self.submodules = {}
            return
        for point in ("write_key", "write_value", "read", "decay", "recurrence_out", "head_out"):
            setattr(self, f"hook_{point}", HookPoint())
            if point != "decay" or self.decay_per_channel:
                getattr(self, f"hook_{point}").hook_conversion = HeadSplit()
        for name in self.per_head_hooks:
            setattr(self, f"hook_{name}", nn.ModuleList(HookPoint() for _ in range(self.n_heads)))

    @property
    def per_head_hooks(self) -> tuple[str, ...]:
        """Short names of the hooks that every head has its own of, in the order in which they fire."""
        if not self.is_recurrent:
            return ()
        return ("write", "erase", "state") if self.erases else ("write", "state")

    def get_hooks(self) -> dict[str, HookPoint]:
        """All hook points by name. Per-head ones are looked up anew, for an SAE may have replaced one."""
        hooks = super().get_hooks()
        for name in self.per_head_hooks:
            for head, point in enumerate(getattr(self, f"hook_{name}")):
                hooks[f"hook_{name}.{head}"] = point
        return hooks

    def remove_hooks(self, hook_name: str | None = None) -> None:
        super().remove_hooks(hook_name)
        if hook_name is None:
            for point in self.get_hooks().values():
                if isinstance(point, HookPoint):
                    point.remove_hooks(dir="both")

    def forward(self, *args: Any, **options: Any) -> Any:
        """The wrapped component's forward pass, with hooks."""
        run = self.recurrent_forward if self.is_recurrent else super().forward
        return run(*args, **options)

    def recurrent_forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The forward pass of a recurrent layer."""
        cache = pop_cache(options)
        own = {name: options.pop(name) for name in self.own_arguments if name in options}
        refuse_unknown(options, type(self).__name__)
        if not hidden_states.shape[1]:
            raise HookedModelError("there are no tokens to read: give one at least")
        swapped, added = edits.swapped_writes(), edits.added_writes(self)
        # 1. The layer's input. After every hook, what it put at padding is taken out again.
        real = calls.real_tokens(attention_mask, hidden_states.shape)
        hidden = calls.without_padding(fire(self.hook_in, hidden_states), real)
        # 2. q, g, a, b, k and v of each token.
        recurrence, bypass = self.inputs(hidden, cache, real, **own)
        # 3. S_t = T_t S_{t-1} + W_t and o_t = S_t^T q_t.
        if swapped is not None:
            outputs = swapped.outputs(self, recurrence)
        else:
            recurrence = self._fire_factors(recurrence).idle_at(None if real is None else ~real)
            recordings.record(self, recurrence)
            outputs = self._recur(recurrence, cache, real)
        if added is not None and not added.linear:
            outputs = added.added_to(outputs, recurrence, real)
        outputs = fire(self.hook_recurrence_out, outputs)  # [batch, pos, head, d_v]
        outputs = calls.without_padding(outputs, real)
        # 4. Norm, gate and projection.
        heads = self.head_outputs(outputs, bypass)
        if added is not None and added.linear:
            moved = self.head_outputs(added.added_to(outputs, recurrence, real), bypass)
            heads = forward_ad.make_dual(heads, moved - heads)
        heads = fire(self.hook_head_out, heads)
        finished = self.output_projection(heads.flatten(2))
        return self.returned(calls.without_padding(fire(self.hook_out, finished), real), bypass)

    def fire_decay(self, g: Tensor) -> Tensor:
        """Fire ``hook_decay`` with exp(g), and return the log of its result."""
        if not is_listened_to(self.hook_decay):
            return g
        decay, touched = fire_copy(self.hook_decay, g.exp())
        if not (touched or decay.requires_grad):
            return g
        tiny = torch.finfo(decay.dtype).tiny
        log = decay.clamp(min=tiny).log().masked_fill(decay <= tiny, LOG_ZERO)
        return log if touched else g.detach() + (log - log.detach())

    def _fire_factors(self, recurrence: Recurrence) -> Recurrence:
        """Fire the hooks on write keys, write values and reads."""
        keys = recurrence.k
        if is_listened_to(self.hook_write_key):
            keys, touched = fire_copy(self.hook_write_key, keys)
            if touched or keys.requires_grad:  # an edited key must not move the erase
                recurrence = recurrence.with_erase_vector()
        q, v = fire(self.hook_read, recurrence.q), fire(self.hook_write_value, recurrence.v)
        return dataclasses.replace(recurrence, q=q, k=keys, v=v)

    def _recur(
        self, recurrence: Recurrence, cache: Any, real: Tensor | None
    ) -> Float[Tensor, "batch pos head d_v"]:
        """Outputs of the recurrence with the edits of the per-head hooks; the cache gets the new state."""
        state = self._state_before(cache)
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the cache is overwritten below, and gradients need the value from before
        outputs, final_state = scan(recurrence, state)
        erase = self.hook_erase if self.erases else [None] * self.n_heads
        for head, points in enumerate(zip(self.hook_write, self.hook_state, erase, strict=True)):
            hooks = HeadHooks(*points)
            if not hooks.are_listened_to:
                continue
            start = None if state is None else state[:, head : head + 1]
            change = hooks.fire(recurrence.heads(head), start, real)
            if change is not None:
                outputs[:, :, head] = outputs[:, :, head] + change[0][:, :, 0]
                here = torch.tensor([head], device=final_state.device)
                final_state = final_state.index_add(1, here, change[1])
        if cache is not None:
            new = final_state.mT if self.state_is_transposed else final_state
            store_state(cache, self.layer_index, new)
        return outputs

    def _state_before(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"] | None:
        """The state that a call's first token meets, as a view into the cache."""
        state = cached(cache, self.layer_index, "recurrent_states")
        return state.mT if state is not None and self.state_is_transposed else state


def causal_convolution(
    hidden: Float[Tensor, "batch pos channel"],
    conv: Any,
    cache: Any,
    layer: int,
    real: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos channel"]:
    """Depthwise causal convolution over positions; reads its history from a cache and updates it.

    ``conv`` has the ``weight`` and ``bias`` of an ``nn.Conv1d``. Padding, where ``real`` is False, counts as
    zeros.
    """
    hidden = calls.without_padding(hidden, real)
    weight, taps = conv.weight.squeeze(1), conv.weight.shape[-1]  # [channel, tap], the token itself last

    def convolve(x: Tensor) -> Tensor:
        history = cached(cache, layer, "conv_states")
        if history is None:
            window = nn.functional.pad(x, (0, 0, taps, 0))
        else:
            window = torch.cat([history.mT.to(x.dtype), x], dim=1)
        if cache is not None:
            cache.update_conv_state(window[:, -taps:].mT.contiguous(), layer)
        window, length = window[:, 1:], x.shape[1]
        out = window[:, :length] * weight[:, 0]
        for tap in range(1, taps):
            out = torch.addcmul(out, window[:, tap : tap + length], weight[:, tap])
        return out

    out = edits.mix_neighbours(convolve, hidden, own_weight=weight[:, -1])
    return out if conv.bias is None else out + conv.bias
