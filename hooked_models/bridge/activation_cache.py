"""The cache that ``run_with_cache`` returns: TransformerLens's, for layers that are no attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from hooked_models import unembedding
from hooked_models.bridge import arguments
from hooked_models.bridge.arguments import bound, refusals, wrong
from hooked_models.errors import HookedModelError

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

_ADVICE = (
    "it is not cached, or this layer has none of it: see cache.keys(); a recurrent layer has the hooks that "
    "model.hook_name(layer, 'write', head) and its like name"
)
_NO_MIDDLE = (
    "this layer has no hook between its mixer and an MLP: cache.decompose_resid().cumsum(0) has the stream "
    "after each of its components"
)
_MODES = ("all", "mlp", "attn")
# The norms before a layer's mixer and before its MLP, by their names in the architectures' blocks.
_NORMS = {False: ("ln1", "norm", "attn_norm"), True: ("ln2", "ffn_norm")}


class RecurrentActivationCache(ActivationCache):
    """TransformerLens's cache, whose methods know what recurrent layers add to the residual stream.

    `decompose_resid` takes a recurrent layer's output for ``attn_out``, `stack_head_results` the heads of
    recurrent layers for those of attention. Methods that need what the model has not (a known MLP, a stream
    between mixer and MLP) raise `HookedModelError`, in one line.
    """

    def __getitem__(self, key: Any) -> Tensor:
        with refusals("cache", _ADVICE if "resid_mid" not in str(key) else _NO_MIDDLE):
            return super().__getitem__(key)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos d_model"] | tuple[Tensor, list[str]]:
        """What each layer adds to the residual stream; with the embedding, its sum is the stream.

        Args:
            layer: components before this layer (None or -1: all).
            mlp_input: also what the layer's own mixer adds.
            mode: "attn" for mixers and attention, "mlp" for MLPs, "all" for both.
            apply_ln: divide by the scale of the norm that reads the stream there.
            pos_slice: positions, as of TransformerLens's ``Slice``.
            incl_embeds: with the embedding first.
            return_labels: also names such as "embed", "0_attn_out", "0_mlp_out".

        Raises:
            HookedModelError: there is no such layer or mode, or an output is not in the cache.
        """
        layer = self._layer("decompose_resid", layer, mlp_input)
        if mode not in _MODES:
            raise wrong("decompose_resid", "mode", mode, ", ".join(map(repr, _MODES)))
        parts: dict[str, str] = {}
        for number in range(layer + bool(mlp_input)):
            for kind, name in _outputs(self.model, number).items():
                if mode in ("all", kind) and (number < layer or kind == "attn"):
                    parts[f"{number}_{kind}_out"] = name
        if not parts and not incl_embeds:
            raise HookedModelError(
                f"decompose_resid: there is no component of mode {mode!r} before layer {layer}"
            )
        with refusals("decompose_resid", _ADVICE):
            cut = _slice(pos_slice)
            outputs = [self[name] for name in parts.values()]
            if incl_embeds:
                outputs.insert(0, self._embedded(is_read=layer + bool(mlp_input) > 0))
            stack = torch.stack([cut.apply(x, dim=-2) for x in outputs])
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, pos_slice=cut, mlp_input=mlp_input)
        return (stack, ["embed"] * incl_embeds + list(parts)) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Float[Tensor, "component *batch_and_pos d_model"] | tuple[Tensor, list[str]]:
        """What each head of the recurrent layers adds to the residual stream: its ``hook_head_out`` by W_O.

        A hybrid's layers of softmax attention are not taken apart: they are in the remainder.

        Args:
            layer: heads of layers before this one (None or -1: all).
            return_labels: also names such as "L0H3".
            incl_remainder: last of all, what the stream has besides.
            pos_slice: positions, as of TransformerLens's ``Slice``.
            apply_ln: divide by the scale of the norm that reads the stream there.

        Raises:
            HookedModelError: there is no such layer, ``hook_head_out`` is not in the cache, or a layer scales
                or norms what its heads return.
        """
        layer, cut = self._layer("stack_head_results", layer), _slice(pos_slice)
        with refusals("stack_head_results", _ADVICE):
            results = self._head_results(layer, cut)
            stack = torch.cat([*results.values(), cut.apply(self["hook_embed"], dim=-2)[None][:0]])
            labels = [f"L{n}H{head}" for n, heads in results.items() for head in range(len(heads))]
            if incl_remainder:
                stack = torch.cat([stack, (self._stream(layer, cut) - stack.sum(0))[None]])
                labels.append("remainder")
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, pos_slice=cut)
        return (stack, labels) if return_labels else stack

    def compute_head_results(self) -> None:
        """Refused: the heads' results are not kept in the cache, `stack_head_results` gives them."""
        raise HookedModelError("compute_head_results: say cache.stack_head_results(return_labels=True)")

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "component ..."] | tuple[Tensor, list[str]]:
        """Everything that the residual stream is the sum of: heads, neurons or MLPs, embedding and biases.

        The heads of recurrent layers come first, then each layer of softmax attention as a whole, then the
        neurons of the MLPs (or each MLP as a whole), "embed" and "bias", which is all that is left.

        Args:
            layer: components before this layer (None or -1: all).
            mlp_input: also what the layer's own mixer adds.
            expand_neurons: a component for each neuron, instead of one for each MLP.
            apply_ln: divide by the scale of the norm that reads the stream there.
            pos_slice: positions, as of TransformerLens's ``Slice``.
            return_labels: also the components' names.
            project_output_onto: ``[d_model]`` or ``[d_model, n]``, by which each component is multiplied.

        Raises:
            HookedModelError: there is no such layer, an activation is not in the cache, a layer scales or
                norms what its parts return, or the neurons of an MLP are not known.
        """
        taker, cut = "get_full_resid_decomposition", _slice(pos_slice)
        layer = self._layer(taker, layer, mlp_input)
        with refusals(taker, _ADVICE):
            whole, names = self.decompose_resid(layer, mlp_input, pos_slice=cut, return_labels=True)
            by_name = {str(name): part for name, part in zip(names, whole, strict=True)}
            heads = self._head_results(layer + bool(mlp_input), cut)
            found = {f"L{n}H{h}": x for n, part in heads.items() for h, x in enumerate(part)}
            found |= {
                name: x
                for name, x in by_name.items()
                if name.endswith("_attn_out") and int(name.partition("_")[0]) not in heads
            }
            of_mlps = {name: x for name, x in by_name.items() if name.endswith("_mlp_out")}
            found |= self._neurons(layer, cut, of_mlps) if expand_neurons and of_mlps else of_mlps
            found["embed"] = by_name["embed"]
            stack = torch.stack(list(found.values()))
            stack = torch.cat([stack, (whole.sum(0) - stack.sum(0))[None]])
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, pos_slice=cut, mlp_input=mlp_input)
            if project_output_onto is not None:
                stack = stack @ project_output_onto
        return (stack, [*found, "bias"]) if return_labels else stack

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch_and_pos d_model"],
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component ..."]:
        """What each part of the last residual stream adds to the logit of a token, at the norm's fixed scale.

        The weights of the last norm and a factor by which the model scales its logits count, so that nothing
        need be folded: with the norm's own bias and the unembedding's, the attributions of all components
        sum to the logit.

        Args:
            residual_stack: components, of `stack_head_results` or `decompose_resid` without ``apply_ln``.
            tokens: one token (id or text), or ids ``[batch]`` or ``[batch, pos]``.
            incorrect_tokens: tokens whose logits are subtracted (None: none).
            pos_slice, batch_slice: of the stack, as of TransformerLens's ``Slice``.
            has_batch_dim: whether the stack has an axis of rows.

        Raises:
            HookedModelError: shapes differ, ``ln_final.hook_scale`` is not in the cache, or the model caps
                its logits, so that they are no sums.
        """
        with refusals("logit_attrs", _ADVICE):
            directions = self.model.tokens_to_residual_directions(tokens)
            if incorrect_tokens is not None:
                others = self.model.tokens_to_residual_directions(incorrect_tokens)
                if others.shape != directions.shape:
                    raise HookedModelError(
                        f"logit_attrs: tokens and incorrect_tokens have shapes {list(directions.shape[:-1])} "
                        f"and {list(others.shape[:-1])}: give as many of both"
                    )
                directions = directions - others
            scaled = self.apply_ln_to_stack(
                residual_stack, -1, False, _slice(pos_slice), _slice(batch_slice), has_batch_dim
            )
            weight = unembedding.last_norm_weight(self._bridge) * unembedding.logit_factor(self._bridge)
            return (scaled * (directions * weight.to(directions))).sum(dim=-1)

    @property
    def _bridge(self) -> HookedRecurrent:
        """The model, whose class TransformerLens does not know."""
        return cast("HookedRecurrent", self.model)

    def _layer(self, taker: str, layer: int | None, mlp_input: bool = False) -> int:
        """The number of a layer that components come before; None and -1 are the end of the stream."""
        count = len(self.model.blocks)
        layer = count if layer is None or layer == -1 else layer
        if not arguments.is_whole(layer) or not 0 <= layer <= count or (mlp_input and layer == count):
            raise wrong(taker, "layer", layer, f"a layer of 0 to {count}")
        return layer

    def _stream(self, layer: int, cut: Slice) -> Float[Tensor, "*batch_and_pos d_model"]:
        """The residual stream that a layer reads, or the last one."""
        name = f"blocks.{layer - 1}.hook_out" if layer else "blocks.0.hook_in"
        return cut.apply(self[name], dim=-2)

    def _head_results(
        self, layer: int, cut: Slice
    ) -> dict[int, Float[Tensor, "head *batch_and_pos d_model"]]:
        """What the heads of each recurrent layer before this one add to the residual stream."""
        found, model = {}, self._bridge
        for number, mixer in model.mixers.items():
            if number >= layer:
                continue
            if _outputs(model, number)["attn"] != model.hook_name(number, "out"):
                raise HookedModelError(_scales(model, number))
            heads = cut.apply(self[model.hook_name(number, "head_out")], dim=-3)
            weights = torch.stack([mixer.head_output(head) for head in range(mixer.n_heads)])
            found[number] = torch.einsum("...hv,hvm->h...m", heads, weights.to(heads))
        return found

    def _neurons(self, layer: int, cut: Slice, of_mlps: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each neuron adds to the residual stream, by its name.

        Raises:
            HookedModelError: TransformerLens cannot take an MLP apart, or what it makes is no part of it.
        """
        unknown = HookedModelError(
            "get_full_resid_decomposition: the neurons of these MLPs are not known: say expand_neurons=False"
        )
        try:
            stack, labels = super().stack_neuron_results(layer, return_labels=True, pos_slice=cut)
        except (AttributeError, KeyError, RuntimeError, TypeError, HookedModelError) as error:
            raise unknown from error
        whole = torch.stack(list(of_mlps.values())).sum(0)
        biases = [getattr(self.model.blocks[n].mlp, "b_out", None) for n in range(layer)]
        missing = whole - stack.sum(0) - sum(b for b in biases if b is not None)
        if len(of_mlps) != layer or bool(missing.abs().max() > 1e-3 * whole.abs().max()):
            raise unknown
        return {str(label): part for label, part in zip(labels, stack, strict=True)}

    def _get_cached_ln_scale(
        self, layer: int | None, mlp_input: bool, pos_slice: Slice, batch_slice: Slice | None = None
    ) -> Tensor:
        """TransformerLens's, where a block's norms have other names than ln1 and ln2."""
        if layer is None or layer == len(self.model.blocks):
            return super()._get_cached_ln_scale(layer, mlp_input, pos_slice, batch_slice)
        names = (f"blocks.{layer}.{slot}.hook_scale" for slot in _NORMS[mlp_input])
        name = next((name for name in names if name in self.cache_dict), None)
        if name is None:
            which = "MLP" if mlp_input else "mixer"
            raise HookedModelError(
                f"apply_ln: the scale of the norm before the {which} of layer {layer} is no hook here, or is "
                "not cached: leave apply_ln out"
            )
        scale = pos_slice.apply(self[name], dim=-2)
        return scale if batch_slice is None or not self.has_batch_dim else batch_slice.apply(scale)

    def _embedded(self, is_read: bool) -> Float[Tensor, "*batch_and_pos d_model"]:
        """The stream's start: the embedding or, in an RWKV-7 whose first layer has read it, its norm."""
        if not is_read or not hasattr(self.model.blocks[0], "pre_norm"):
            return self["hook_embed"]
        added = [self[name] for name in _outputs(self.model, 0).values()]
        return self["blocks.0.hook_out"] - torch.stack(added).sum(0)


def _outputs(model: Any, layer: int) -> dict[str, str]:
    """The hooks on what a layer adds to the stream: of its mixer or attention ("attn"), and of its MLP.

    Raises:
        HookedModelError: the layer adds something else than its parts return, or several parts at once.
    """
    block = model.blocks[layer]
    found: dict[str, str] = {}
    for slot, part in block.named_children():
        if isinstance(getattr(part, "hook_out", None), HookPoint) and not isinstance(part, HookPoint):
            kind = "mlp" if slot in ("mlp", "ffn") else "attn"
            if _is_norm(slot):
                continue
            if kind in found or not getattr(block, "adds_its_parts", True):
                raise HookedModelError(_scales(model, layer))
            # OLMo-Hybrid norms it first in some layers, where this alias names the norm.
            alias = block.hook_aliases.get(f"hook_{kind}_out")
            is_here = isinstance(alias, str) and hasattr(block, alias.partition(".")[0])
            found[kind] = f"blocks.{layer}.{alias if is_here else f'{slot}.hook_out'}"
    return dict(sorted(found.items()))  # "attn" before "mlp", as TransformerLens has them


def _scales(model: Any, layer: int) -> str:
    return (
        f"decompose_resid: layer {layer} of this {model.cfg.architecture} scales, sums or norms what its "
        "parts return before the residual stream gets it: read hook_resid_pre and hook_resid_post instead"
    )


def _slice(positions: Any) -> Slice:
    return positions if isinstance(positions, Slice) else Slice(positions)


def _is_norm(slot: str) -> bool:
    return "norm" in slot or slot.startswith("ln")


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: RecurrentActivationCache, *args: Any, **kwargs: Any) -> Any:
        bound(method.__get__(self), args, kwargs)
        with refusals(method.__name__, _ADVICE):
            return method(self, *args, **kwargs)

    return call


for _name, _method in inspect.getmembers(ActivationCache, inspect.isfunction):
    if not _name.startswith("_") and _name not in vars(RecurrentActivationCache):
        setattr(RecurrentActivationCache, _name, _refusing(_method))
