"""OLMo-Hybrid (Gated DeltaNet), Kimi Linear and Ling 3.0 (KDA), and MiniMax (lightning attention)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.conftest import COMMON, HEADS
from tests.hooked_models.model_classes.case import ModelClass
from tests.hooked_models.oracles import Layer, Maybe, Native


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


class _DeltaRule(Layer):
    """Short convolution, unit keys and reads, a rate and a gate of each head."""

    output_projection = "o_proj"

    def __init__(self, folder: Path, layer: int) -> None:
        super().__init__(folder, layer)
        self.weights["conv1d.weight"] = torch.cat([self.weights[f"{x}_conv1d.weight"] for x in "qkv"])

    def projected(self, hidden: Tensor, name: str) -> Tensor:
        return hidden @ self.weights[f"{name}_proj.weight"].T

    def short(self, hidden: Tensor, key_heads: int, d_k: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reads, keys [b, t, head, d_k] and values [b, t, head, d_v]."""
        flat = self.convolved(torch.cat([self.projected(hidden, x) for x in "qkv"], -1))
        keys = key_heads * d_k
        q, k, v = flat[..., :keys], flat[..., keys : 2 * keys], flat[..., 2 * keys :]
        q, k = (_unit(x.reshape(*x.shape[:2], key_heads, d_k)) for x in (q, k))
        q, k = (torch.stack([x[:, :, head * key_heads // heads] for head in range(heads)], 2) for x in (q, k))
        return q / d_k**0.5, k, v.reshape(*v.shape[:2], heads, -1)

    def normed(self, out: Tensor, eps: float) -> Tensor:
        return out / (out.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights["o_norm.weight"]


class OlmoHybridLayer(_DeltaRule):
    """Gated DeltaNet, with beta up to 2."""

    path = "model.layers.{}.linear_attn"

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        q, k, v = self.short(
            hidden,
            config["linear_num_key_heads"],
            config["linear_key_head_dim"],
            config["linear_num_value_heads"],
        )
        beta = torch.sigmoid(self.projected(hidden, "b")) * (2 if config["linear_allow_neg_eigval"] else 1)
        step = torch.log1p(torch.exp(self.projected(hidden, "a") + w["dt_bias"]))
        gate = self.projected(hidden, "g").reshape(v.shape)
        return Native(
            q,
            k,
            beta[..., None] * v,
            torch.exp(-torch.exp(w["A_log"]) * step),
            lambda alpha: (-(alpha * beta)[..., None] * k, k),
            lambda out: self.normed(out, 1e-5) * gate * torch.sigmoid(gate),
        )


class KimiLinearLayer(_DeltaRule):
    """KDA, whose decay and gate come through narrow layers."""

    path = "model.layers.{}.self_attn"

    def gate(self, hidden: Tensor) -> Tensor:
        return self.projected(self.projected(hidden, "g_a"), "g_b")

    def log_decay(self, hidden: Tensor) -> Tensor:
        """[b, t, head, d_k]."""
        w = self.weights
        step = torch.log1p(torch.exp(self.projected(self.projected(hidden, "f_a"), "f_b") + w["dt_bias"]))
        rate = torch.exp(w["A_log"]).flatten()
        return -rate[:, None] * step.reshape(*step.shape[:2], len(rate), -1)

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        heads, d_k = self.config["linear_num_heads"], self.config["linear_head_dim"]
        q, k, v = self.short(hidden, heads, d_k, heads)
        beta = torch.sigmoid(self.projected(hidden, "b"))[..., None]
        gate = torch.sigmoid(self.gate(hidden)).reshape(v.shape)
        return Native(
            q,
            k,
            beta * v,
            torch.exp(self.log_decay(hidden)),
            lambda alpha: (-beta * k, alpha * k),
            lambda out: self.normed(out, self.config["rms_norm_eps"]) * gate,
        )


class BailingHybridLayer(KimiLinearLayer):
    """KDA, whose decay can have a bound."""

    checkpoint_path, output_projection = "model.layers.{}.attention", "dense"

    def gate(self, hidden: Tensor) -> Tensor:
        return self.projected(hidden, "g")

    def log_decay(self, hidden: Tensor) -> Tensor:
        w, x = self.weights, self.projected(hidden, "f") + self.weights["dt_bias"]
        rate = torch.exp(w["A_log"])[:, None]
        x = x.reshape(*x.shape[:2], len(rate), -1)
        if self.config["kda_safe_gate"]:
            return self.config["kda_lower_bound"] * torch.sigmoid(rate * x)
        return -rate * torch.log1p(torch.exp(x))


class LightningLayer(Layer):
    """Lightning attention: q, k and v through SiLU, and a fixed decay of each head."""

    path = "model.layers.{}.self_attn"

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        heads, layer = config["num_attention_heads"], int(self.name.split(".")[2])
        mixed = hidden @ w["qkv_proj.weight"].T
        mixed = (mixed * torch.sigmoid(mixed)).reshape(*hidden.shape[:2], heads, 3, -1)
        q, k, v = mixed.unbind(-2)
        share = 1 - layer / (config["num_hidden_layers"] - 1 + 1e-5) + 1e-5
        slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)]).double() * share
        gate = torch.sigmoid(hidden @ w["output_gate.weight"].T)

        def head_outputs(out: Tensor) -> Tensor:
            flat = out.flatten(2)
            normed = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"]
            return (gate * normed).reshape(out.shape)

        decay = torch.exp(-slopes).expand(*hidden.shape[:2], heads)
        return Native(q, k, v, decay, lambda decay: (None, None), head_outputs)

    def returned(self, trace: Any, dtype: torch.dtype) -> Any:
        return trace.output.to(dtype), None


_LINEAR, _FULL = "linear_attention", "full_attention"
_SIZES: dict[str, Any] = COMMON | {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.08}
_SIZES |= {"rms_norm_eps": 1e-5, "layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR]}
_MLA: dict[str, Any] = {"num_key_value_heads": 4, "kv_lora_rank": 20, "v_head_dim": 10}
_MLA |= {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
_MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}


def olmo_hybrid(**changes: Any) -> Any:
    """A tiny OLMo-Hybrid: 4 heads of 16 x 24 over 2 key heads."""
    sizes: dict[str, Any] = _SIZES | HEADS | {"num_key_value_heads": 2} | changes
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**sizes))


def kimi_linear(**changes: Any) -> Any:
    """A tiny Kimi Linear: 3 heads of 16 x 16, softmax attention (MLA) in one layer, experts in two."""
    sizes: dict[str, Any] = _SIZES | _MLA | _MOE | {"linear_head_dim": 16, "linear_num_heads": 3} | changes
    return _with_expert_biases(transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**sizes)))


def bailing_hybrid(**changes: Any) -> Any:
    """A tiny Ling 3.0: 4 heads of 16 x 16, softmax attention (MLA) in one layer, experts in two."""
    sizes: dict[str, Any] = _SIZES | _MLA | _MOE | {"head_dim": 16} | changes
    return _with_expert_biases(
        transformers.BailingHybridForCausalLM(transformers.BailingHybridConfig(**sizes))
    )


def minimax(**changes: Any) -> Any:
    """A tiny MiniMax: 4 heads of 16 x 16, softmax attention in every second layer, experts in all.

    Decays of a last layer are 1 but for 1e-6, so that one is softmax attention, as in published models.
    """
    sizes: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "head_dim": 16, "block_size": 16}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [_LINEAR, _FULL] * 2} | changes
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**sizes))


def _with_expert_biases(model: Any) -> Any:
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape))
    return model


_OLMO = (OlmoHybridLayer, (4, 16, 24), (0, 1, 3), "gated_delta_net")
_KIMI = (KimiLinearLayer, (3, 16, 16), (0, 1, 3), "kda")
_BAILING = (BailingHybridLayer, (4, 16, 16), (0, 1, 3), "kda")
_MINIMAX = (LightningLayer, (4, 16, 16), (0, 2), "lightning")
_ROPE: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
_FACTORS = {"linear_attn_alpha_factor": 0.5, "linear_attn_beta_factor": 1.5, "full_attn_alpha_factor": 1.2}
_FACTORS |= {"full_attn_beta_factor": 0.8, "mlp_alpha_factor": 2, "mlp_beta_factor": 2.5}

MODEL_CLASSES = (
    ModelClass("OlmoHybridForCausalLM", "OLMo-Hybrid", olmo_hybrid, *_OLMO, seed=20),
    ModelClass(
        "OlmoHybridForCausalLM with beta up to 1 and rotary positions",
        "OLMo-Hybrid",
        lambda: olmo_hybrid(linear_allow_neg_eigval=False, rope_parameters=_ROPE),
        *_OLMO,
        seed=21,
    ),
    ModelClass("KimiLinearForCausalLM", "Kimi Linear", kimi_linear, *_KIMI, seed=22),
    ModelClass("BailingHybridForCausalLM", "Ling 3.0", bailing_hybrid, *_BAILING, seed=23),
    ModelClass(
        "BailingHybridForCausalLM without bound of the decay",
        "Ling 3.0",
        lambda: bailing_hybrid(kda_safe_gate=False),
        *_BAILING,
        seed=24,
    ),
    ModelClass("MiniMaxForCausalLM", "MiniMax-Text-01, MiniMax-M1", minimax, *_MINIMAX, seed=25),
    ModelClass(
        "MiniMaxForCausalLM with factors of the residual stream",
        "MiniMax-Text-01, MiniMax-M1",
        lambda: minimax(**_FACTORS),
        *_MINIMAX,
        seed=26,
    ),
)
