"""The cache that ``run_with_cache`` returns: TransformerLens's, for layers that are no attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice

from hooked_models.bridge import arguments
from hooked_models.bridge.arguments import bound, refusals, wrong
from hooked_models.errors import HookedModelError

_ADVICE = (
    "it is not cached, or this layer has none of it: see cache.keys(); a recurrent layer has the hooks that "
    "model.hook_name(layer, 'write', head) and its like name"
)
_MODES = ("all", "mlp", "attn")


class RecurrentActivationCache(ActivationCache):
    """TransformerLens's cache, whose methods know what recurrent layers add to the residual stream.

    `decompose_resid` takes a recurrent layer's output for ``attn_out``. Methods that need what the model has
    not (attention heads, a known MLP) raise `HookedModelError`, in one line.
    """

    def __getitem__(self, key: Any) -> Tensor:
        with refusals("cache", _ADVICE):
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
        count = len(self.model.blocks)
        layer = count if layer is None or layer == -1 else layer
        if not arguments.is_whole(layer) or not 0 <= layer <= count or (mlp_input and layer == count):
            raise wrong("decompose_resid", "layer", layer, f"a layer of 0 to {count}")
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
            cut = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
            outputs = [self[name] for name in parts.values()]
            if incl_embeds:
                outputs.insert(0, self._embedded(is_read=layer + bool(mlp_input) > 0))
            stack = torch.stack([cut.apply(x, dim=-2) for x in outputs])
            if apply_ln:
                stack = self.apply_ln_to_stack(stack, layer, pos_slice=cut, mlp_input=mlp_input)
        return (stack, ["embed"] * incl_embeds + list(parts)) if return_labels else stack

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
                raise HookedModelError(
                    f"decompose_resid: layer {layer} of this {model.cfg.architecture} scales, sums or norms "
                    "what its parts return before the residual stream gets it: read hook_resid_pre and "
                    "hook_resid_post instead"
                )
            # OLMo-Hybrid norms it first in some layers, where this alias names the norm.
            alias = block.hook_aliases.get(f"hook_{kind}_out")
            is_here = isinstance(alias, str) and hasattr(block, alias.partition(".")[0])
            found[kind] = f"blocks.{layer}.{alias if is_here else f'{slot}.hook_out'}"
    return found


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
