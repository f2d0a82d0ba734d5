"""The model classes with Mamba-2 beside attention: Nemotron-H, Granite 4, Bamba, Falcon-H1, Zamba2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.conftest import COMMON
from tests.hooked_models.model_classes.case import ModelClass
from tests.hooked_models.oracles import Mamba2Layer

HEADS, D_K, D_V = 8, 24, 16  # 128 channels, twice the hidden size
SIZES: dict[str, Any] = COMMON | {"hidden_size": 64, "intermediate_size": 80, "initializer_range": 0.1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
MAMBA = {"mamba_n_heads": HEADS, "mamba_d_head": D_V, "mamba_d_state": D_K, "mamba_n_groups": 2}
MAMBA |= {"mamba_expand": 2, "mamba_chunk_size": 16, "rms_norm_eps": 1e-5}
LIMIT = {"time_step_limit": (0.2, 1.2)}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}


class HybridLayer(Mamba2Layer):
    """Mamba-2 of a hybrid, whose configuration has other names."""

    path = "model.layers.{}.mamba"
    names = {  # noqa: RUF012
        "num_heads": "mamba_n_heads",
        "head_dim": "mamba_d_head",
        "state_size": "mamba_d_state",
        "n_groups": "mamba_n_groups",
        "layer_norm_epsilon": "rms_norm_eps",
    }

    def __init__(self, folder: Path, layer: int) -> None:
        super().__init__(folder, layer)
        self.config |= {name: self.config[own] for name, own in self.names.items()}


class NemotronHLayer(HybridLayer):
    """Its time step has a lower limit and none above."""

    path, checkpoint_path = "model.layers.{}.mixer", "backbone.layers.{}.mixer"
    by_group = True
    names = {"num_heads": "mamba_num_heads", "head_dim": "mamba_head_dim", "state_size": "ssm_state_size"}  # noqa: RUF012

    def __init__(self, folder: Path, layer: int) -> None:
        super().__init__(folder, layer)
        self.config["time_step_limit"] = (self.config["time_step_min"], float("inf"))


class Zamba2Layer(HybridLayer):
    """As Nemotron-H's; in blocks with a transformer one level deeper."""

    by_group = True

    names = {  # noqa: RUF012
        "num_heads": "n_mamba_heads",
        "head_dim": "mamba_headdim",
        "state_size": "mamba_d_state",
        "n_groups": "mamba_ngroups",
    }

    def __init__(self, folder: Path, layer: int) -> None:
        kinds = json.loads((folder / "config.json").read_text())["layers_block_type"]
        if kinds[layer] == "hybrid":
            self.path = "model.layers.{}.mamba_decoder.mamba"
        super().__init__(folder, layer)
        self.config["time_step_limit"] = (self.config["time_step_min"], float("inf"))
        self.config["layer_norm_epsilon"] = 1e-5  # whatever the configuration has for other norms


class FalconH1Layer(HybridLayer):
    """With factors around the input projection, and a gate before, after or without a norm."""

    by_group = True

    def __init__(self, folder: Path, layer: int) -> None:
        super().__init__(folder, layer)
        inner, keys = HEADS * D_V, self.config["mamba_n_groups"] * D_K
        sizes, factors = (inner, inner, keys, keys, HEADS), self.config["ssm_multipliers"]
        factor = torch.cat([torch.full((n,), x) for n, x in zip(sizes, factors)]).double()
        self.weights["in_proj.weight"] *= factor[:, None] * self.config["ssm_in_multiplier"]
        if "in_proj.bias" in self.weights:
            self.weights["in_proj.bias"] *= factor

    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        if not self.config["mamba_rms_norm"]:
            return y * gate * torch.sigmoid(gate)
        if not self.config["mamba_norm_before_gate"]:
            return super().normed(y, gate)
        grouped = y.unflatten(-1, (self.config["n_groups"], -1))
        grouped = grouped / (grouped.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return grouped.flatten(-2) * self.weights["norm.weight"] * gate * torch.sigmoid(gate)


def nemotron_h(**changes: Any) -> Any:
    options = SIZES | {"mamba_num_heads": HEADS, "mamba_head_dim": D_V, "ssm_state_size": D_K, "n_groups": 2}
    options |= {"head_dim": 16, "chunk_size": 16, "time_step_min": 0.3, "n_routed_experts": 4}
    options |= {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48}
    kinds = ["linear_attention", "moe", "linear_attention", "full_attention", "mlp", "linear_attention"]
    options |= {"layers_block_type": kinds, "rescale_prenorm_residual": False}
    model: Any = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**{**options, **changes}))
    for layer in model.model.layers:
        if layer.block_type == "moe":
            layer.mixer.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def granite(**changes: Any) -> Any:
    options = SIZES | MAMBA | LIMIT | ROPE | {"num_hidden_layers": 4, "shared_intermediate_size": 48}
    options |= {"intermediate_size": 32, "num_local_experts": 4, "position_embedding_type": "rope"}
    options |= {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
    options |= {"embedding_multiplier": 3.0, "logits_scaling": 0.25, "residual_multiplier": 0.7}
    options |= {"attention_multiplier": 0.3}
    return transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(**{**options, **changes})
    )


def bamba(**changes: Any) -> Any:
    options = SIZES | MAMBA | LIMIT | ROPE | {"num_hidden_layers": 3, "attn_layer_indices": [1]}
    return transformers.BambaForCausalLM(transformers.BambaConfig(**{**options, **changes}))


def falcon_h1(**changes: Any) -> Any:
    options = SIZES | MAMBA | LIMIT | ROPE | {"num_hidden_layers": 3, "mamba_d_ssm": HEADS * D_V}
    options |= {"ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6, "lm_head_multiplier": 1.7}
    options |= {"ssm_multipliers": [0.8, 1.2, 0.7, 1.4, 0.9], "mlp_multipliers": [0.9, 1.1]}
    options |= {"key_multiplier": 0.8, "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.7}
    options |= {"embedding_multiplier": 2.5}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**{**options, **changes}))


def zamba2(**changes: Any) -> Any:
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"]
    options = SIZES | {"layers_block_type": kinds, "num_hidden_layers": len(kinds), "n_mamba_heads": HEADS}
    options |= {"mamba_d_state": D_K, "mamba_ngroups": 2, "mamba_expand": 2, "chunk_size": 16}
    options |= {"time_step_min": 0.3, "adapter_rank": 4, "num_mem_blocks": 2, "rms_norm_eps": 1e-4}
    return transformers.Zamba2ForCausalLM(transformers.Zamba2Config(**{**options, **changes}))


def _of(
    name: str, family: str, build: Callable[..., Any], oracle: type[Mamba2Layer], layers: tuple[int, ...]
) -> Callable[..., ModelClass]:
    """Makes the model class, or a variant of it with another configuration."""
    plain = ModelClass(name, family, build, oracle, (HEADS, D_K, D_V), layers, "mamba2")

    def variant(suffix: str, seed: int, **changes: Any) -> ModelClass:
        fields: dict[str, Any] = {"layers": changes.pop("layers", layers), "seed": seed}
        return dataclasses.replace(
            plain, name=f"{name} {suffix}".strip(), build=lambda: build(**changes), **fields
        )

    return variant


_nemotron_h = _of("NemotronHForCausalLM", "Nemotron-H", nemotron_h, NemotronHLayer, (0, 2, 5))
_granite = _of("GraniteMoeHybridForCausalLM", "Granite 4", granite, HybridLayer, (0, 2, 3))
_bamba = _of("BambaForCausalLM", "Bamba", bamba, HybridLayer, (0, 2))
_falcon_h1 = _of("FalconH1ForCausalLM", "Falcon-H1", falcon_h1, FalconH1Layer, (0, 1, 2))
_zamba2 = _of("Zamba2ForCausalLM", "Zamba2", zamba2, Zamba2Layer, (0, 1, 2, 3, 4))
_BIASES = {"mamba_conv_bias": False, "mamba_proj_bias": True, "mamba_n_groups": 1}
_UNLIMITED = {"time_step_limit": (0.0, float("inf"))}
_ONLY_MAMBA = ["linear_attention"] * 3

MODEL_CLASSES = (
    _nemotron_h("", 10),
    _nemotron_h("with biases and latent experts", 11, use_bias=True, use_conv_bias=False, moe_latent_size=24),
    _nemotron_h(
        "without attention",
        12,
        n_groups=1,
        layers=(0, 2),
        layers_block_type=["linear_attention", "mlp", "linear_attention"],
    ),
    _granite("", 13),
    _granite("dense, without positions", 14, num_local_experts=0, position_embedding_type="nope", **_BIASES),
    _granite(
        "without attention",
        15,
        layers=(0, 1, 2),
        layer_types=_ONLY_MAMBA,
        num_hidden_layers=3,
        position_embedding_type=None,
        **_UNLIMITED,
    ),
    _bamba("", 16),
    _bamba("with biases", 17, **_BIASES, **_UNLIMITED),
    _bamba("without attention", 18, layers=(0, 1, 2), attn_layer_indices=None),
    _falcon_h1("", 19, mamba_rms_norm=True, mamba_norm_before_gate=True),
    _falcon_h1("with the gate before the norm", 20, mamba_rms_norm=True, mamba_norm_before_gate=False),
    _falcon_h1("without norm", 21, mamba_rms_norm=False, **_BIASES, projectors_bias=True, **_UNLIMITED),
    _zamba2("", 22, use_mem_rope=True, use_shared_attention_adapter=True, num_key_value_heads=4),
    _zamba2("with biases, without positions", 23, add_bias_linear=True, num_mem_blocks=1, mamba_ngroups=1),
)
