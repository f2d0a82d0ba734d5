"""DeltaNet and Gated DeltaNet of flash-linear-attention's folders with hook points on their cache writes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooked_models.architectures.own_adapters import HybridBlock
from hooked_models.mixers import AttributeNames, HookedMixer, causal_convolution
from hooked_models.recurrence import Recurrence


class FLAAdapter(ArchitectureAdapter):
    """TransformerLens's view of the models in `hooked_models.modeling.fla`, hybrids included."""

    supports_fold_ln = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.cfg.attn_implementation = "eager"
        self.weight_processing_conversions = {}
        norms = {"ln1": "attn_norm", "ln2": "mlp_norm"}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embeddings"),
            "blocks": HybridBlock(
                name="model.layers",
                submodules={
                    **{slot: RMSNormalizationBridge(name=n, config=self.cfg) for slot, n in norms.items()},
                    "attn": GeneralizedComponent(name="attn"),
                    "mlp": self._gated_mlp(),
                },
            ),
            "ln_final": RMSNormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }


class HookedDeltaNet(HookedMixer):
    __doc__ = f"""Wraps the DeltaNet layer of `hooked_models.modeling.fla`.

    Per head, with k and q normalised (q then times d_k^-1/2)::

        S_t = (I - beta_t k_t k_t^T) S_{{t-1}} + beta_t k_t v_t^T

    So the native write has key k and value beta v, and the erase reads along k. ``hook_decay`` shows ones; an
    edit of it multiplies the whole transition, as in Gated DeltaNet. In layers with softmax attention the
    same slot holds that.

    {HookedMixer.__doc__}"""

    architecture = "delta_net"
    attribute_names = AttributeNames("n_heads", "head_k_dim", "head_v_dim", output_projection="o_proj")

    def inputs(
        self, hidden: Float[Tensor, "batch pos d_model"], cache: Any, real: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Recurrence, Tensor | None]:
        layer = self.wrapped

        def convolve(x: Tensor) -> Tensor:
            return causal_convolution(x, layer.convolution, cache, self.layer_index, real)

        return layer.inputs(hidden, convolve, self.fire_decay)

    def head_outputs(
        self, outputs: Float[Tensor, "batch pos head d_v"], bypass: Tensor | None
    ) -> Float[Tensor, "batch pos head d_v"]:
        return self.wrapped.head_outputs(outputs, bypass)


class HookedFLAGatedDeltaNet(HookedDeltaNet):
    __doc__ = f"""Wraps the Gated DeltaNet layer of `hooked_models.modeling.fla`.

    The recurrence is that of `HookedGatedDeltaNet`::

        S_t = alpha_t (I - beta_t k_t k_t^T) S_{{t-1}} + beta_t k_t v_t^T

    {HookedMixer.__doc__}"""

    architecture = "gated_delta_net"
