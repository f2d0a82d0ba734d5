"""Mamba-2 in hybrids: what Falcon-H1's layers, Granite's adapter and Zamba2's blocks have of their own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import supported_architectures as stock
from transformer_lens.model_bridge.generalized_components import SSMBlockBridge

from hooked_models.architectures.mamba2 import HookedMamba2


class HookedFalconH1Mamba2(HookedMamba2):
    __doc__ = f"""Wraps transformers' ``FalconH1Mixer``, which stands beside softmax attention in every block.

    Falcon-H1 multiplies the input of its projection by ``ssm_in_multiplier`` and the results by a factor
    each for gate, x, B, C and dt. Its gated norm is optional: published models have the gate alone.

    {HookedMamba2.__doc__}"""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        if not original_component.mamba_rms_norm:
            del self.submodules["inner_norm"]  # a placeholder, whose hooks would never fire

    def projected(
        self, hidden: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos gate_and_channel_and_head"]:
        layer = self.wrapped
        return layer.in_proj(hidden * layer.ssm_in_multiplier) * layer.mup_vector

    def gated(
        self, outputs: Float[Tensor, "batch pos inner"], gate: Float[Tensor, "batch pos inner"]
    ) -> Float[Tensor, "batch pos inner"]:
        if self.wrapped.mamba_rms_norm:
            # Before transformers 5.21 the norm takes the axis of positions away where there is one position.
            return self.wrapped.norm(outputs.flatten(0, 1), gate.flatten(0, 1)).view_as(outputs)
        return outputs * torch.nn.functional.silu(gate)


class Half(nn.Module):
    """The first or second half of a projection's outputs, computed with the projection's own weights.

    Args:
        projection: stays where it is in the Hugging Face model, and is no part of this module.
        number: 0 or 1.
    """

    def __init__(self, projection: Any, number: int) -> None:
        super().__init__()
        self._projection = (projection,)  # in a tuple, where nn.Module does not see it
        self.number = number

    @property
    def weight(self) -> Float[Tensor, "half d_model"]:
        return self._projection[0].weight.chunk(2)[self.number]

    bias = None

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch half"]:
        projection = self._projection[0]
        if type(projection) is nn.Linear:
            return nn.functional.linear(x, self.weight)
        return projection(x).chunk(2, -1)[self.number]  # adapted, as by peft's LoRA, or quantised


def _halves(mlp: Any) -> tuple[Half, Half]:
    return Half(mlp.input_linear, 0), Half(mlp.input_linear, 1)


class GraniteMoeHybridAdapter(stock.GraniteMoeHybridArchitectureAdapter):
    """TransformerLens's adapter, mended in two places.

    It expects rotary positions of a model whose configuration names none. And it cuts the MLP's first
    projection into two new ones: what is trained in a copied or converted model is then not saved, and a LoRA
    on the projection not computed.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.components["blocks"].submodules["shared_mlp"].split_gate_up_matrix = _halves
        if getattr(cfg, "position_embedding_type", None) != "rope":
            self.cfg.positional_embedding_type = "none"
            self.components.pop("rotary_emb", None)


class Zamba2Block(SSMBlockBridge):
    """A block of Zamba2: a Mamba-2 layer, or a shared transformer block followed by one.

    The second kind keeps its Mamba-2 layer one level deeper. Norm and mixer have the same hook names in both.
    """

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        if hasattr(original_component, "mamba_decoder"):
            for component in self.submodules.values():
                component.name = f"mamba_decoder.{component.name}"


class Zamba2Adapter(stock.Zamba2ArchitectureAdapter):
    """TransformerLens's adapter, which sees no Mamba-2 layer in the blocks with a transformer."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        blocks = self.components["blocks"]
        self.components["blocks"] = Zamba2Block(name="model.layers", submodules=blocks.submodules)
