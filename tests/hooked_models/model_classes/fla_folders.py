"""The model classes of flash-linear-attention's folders: DeltaNet, GLA and Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_models.modeling.fla import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    GLAConfig,
    GLAForCausalLM,
)
from tests.conftest import COMMON
from tests.hooked_models.model_classes.case import ModelClass
from tests.hooked_models.oracles import Layer, Maybe, Native


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def of_sum_one(x: Tensor) -> Tensor:
    return x / x.abs().sum(-1, keepdim=True).clamp(min=1e-6)


class FLALayer(Layer):
    """What the three have in common."""

    path, output_projection = "model.layers.{}.attn", "o_proj"
    gate = staticmethod(silu)

    def projected(self, name: str, hidden: Tensor) -> Tensor:
        """q, k or v [batch, pos, channel], convolved where there is a convolution."""
        x = hidden @ self.weights[f"{name}_proj.weight"].T
        taps = self.weights.get(f"{name}_conv1d.weight")
        if taps is None:
            return x
        out = torch.zeros_like(x)
        for late in range(taps.shape[-1]):  # the last tap is the token's own
            earlier = torch.cat([torch.zeros_like(x[:, :late]), x], 1)[:, : x.shape[1]]
            out = out + taps[:, 0, -1 - late] * earlier
        return out

    def of_heads(self, x: Tensor, heads: int, width: int) -> Tensor:
        """[batch, pos, head, width]; head n has the vector number n // (heads / vectors)."""
        x = x.reshape(*x.shape[:2], -1, width)
        return torch.stack([x[:, :, head * x.shape[2] // heads] for head in range(heads)], 2)

    def head_outputs(self, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        names = ("o_norm.weight", "g_norm.weight", "g_norm_swish_gate.weight")
        weight = next((self.weights[name] for name in names if name in self.weights), 1.0)

        def finish(out: Tensor) -> Tensor:
            normed = rms(out, self.config["norm_eps"]) * weight
            if "g_proj.weight" not in self.weights:
                return normed
            return normed * self.gate((hidden @ self.weights["g_proj.weight"].T).reshape(out.shape))

        return finish

    def beta(self, hidden: Tensor, heads: int) -> Tensor:
        largest = 2 if self.config["allow_neg_eigval"] else 1
        if "b_proj.weight" not in self.weights:
            return torch.full((*hidden.shape[:2], heads), float(largest), dtype=torch.float64)
        return largest * sigmoid(hidden @ self.weights["b_proj.weight"].T)


class DeltaNetLayer(FLALayer):
    """DeltaNet."""

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, heads = self.config, self.config["num_heads"]
        d_k, d_v = (round(config["hidden_size"] * config[f"expand_{x}"] / heads) for x in "kv")
        activation = {
            "silu": silu,
            "relu": lambda x: x.clamp(min=0),
            "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
            "identity": lambda x: x,
        }[config["qk_activation"]]
        norm = {"l2": unit, "sum": of_sum_one}[config["qk_norm"]]
        q, k = (norm(self.of_heads(activation(self.projected(x, hidden)), heads, d_k)) for x in "qk")
        v = self.of_heads(silu(self.projected("v", hidden)), heads, d_v)
        beta = self.beta(hidden, heads)
        return Native(
            q / d_k**0.5,
            k,
            beta[..., None] * v,
            torch.ones_like(beta),
            lambda alpha: (-(alpha * beta)[..., None] * k, k),
            self.head_outputs(hidden),
        )


class GatedDeltaNetLayer(FLALayer):
    """Gated DeltaNet."""

    @property
    def gate(self) -> Callable[[Tensor], Tensor]:  # type: ignore[override]
        return sigmoid if self.config["output_gate_activation"] == "sigmoid" else silu

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        heads, d_k = config["num_v_heads"], config["head_dim"]
        d_v = round(d_k * config["expand_v"])
        q, k = (unit(self.of_heads(silu(self.projected(x, hidden)), heads, d_k)) for x in "qk")
        v = self.of_heads(silu(self.projected("v", hidden)), heads, d_v)
        beta, step = self.beta(hidden, heads), hidden @ w["a_proj.weight"].T + w["dt_bias"]
        alpha = torch.exp(-torch.exp(w["A_log"]) * torch.log1p(torch.exp(step)))
        return Native(
            q / d_k**0.5,
            k,
            beta[..., None] * v,
            alpha,
            lambda alpha: (-(alpha * beta)[..., None] * k, k),
            self.head_outputs(hidden),
        )


class GLALayer(FLALayer):
    """Gated linear attention."""

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w, heads = self.config, self.weights, self.config["num_heads"]
        d_k, d_v = (round(config["hidden_size"] * config[f"expand_{x}"] / heads) for x in "kv")
        q, k, v = (self.projected(x, hidden) for x in "qkv")
        if config["use_short_conv"]:
            q, k, v = silu(q), silu(k), silu(v)
        feature = {None: lambda x: x, "relu": lambda x: x.clamp(min=0), "sigmoid": sigmoid}
        feature |= {"sqrelu": lambda x: x.clamp(min=0) ** 2}
        q, k = (feature[config["feature_map"]](self.of_heads(x, heads, d_k)) for x in (q, k))
        gate = hidden @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
        log = -torch.log1p(torch.exp(-self.of_heads(gate, heads, d_k))) / 16
        if config["clamp_min"] is not None:
            log = log.clamp(min=config["clamp_min"])
        v, done = self.of_heads(v, heads, d_v), self.head_outputs(hidden)
        return Native(q / d_k**0.5, k, v, torch.exp(log), lambda decay: (None, None), done)


SIZES: dict[str, Any] = COMMON | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
# With a small epsilon, the norm of a head whose read almost misses its write would magnify rounding.
SIZES |= {"initializer_range": 0.1, "num_heads": 4, "norm_eps": 1e-3}
HYBRID = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}}
TRUTH = "this package's own model class, checked against a float64 reference and fla"


def delta_net(**changes: Any) -> Any:
    """3 layers of 4 heads of 16 x 24."""
    return DeltaNetForCausalLM(DeltaNetConfig(**{**SIZES, "expand_v": 1.5, **changes}))


def gla(**changes: Any) -> Any:
    """3 layers of 4 heads of 8 x 16."""
    return GLAForCausalLM(GLAConfig(**{**SIZES, **changes}))


def gated_delta_net(**changes: Any) -> Any:
    """3 layers of 4 heads of 16 x 24."""
    sizes = SIZES | {"head_dim": 16, "expand_v": 1.5}
    return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**{**sizes, **changes}))


_KINDS: dict[str, tuple[str, Callable[..., Any], type[Layer], tuple[int, int, int], str]] = {
    "DeltaNetForCausalLM": ("DeltaNet (fla)", delta_net, DeltaNetLayer, (4, 16, 24), "delta_net"),
    "GLAForCausalLM": ("GLA (fla)", gla, GLALayer, (4, 8, 16), "gla"),
    "GatedDeltaNetForCausalLM": (
        "Gated DeltaNet (fla)", gated_delta_net, GatedDeltaNetLayer, (4, 16, 24), "gated_delta_net",
    ),
}  # fmt: skip
_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DeltaNetForCausalLM", {}),
    ("DeltaNetForCausalLM with gate", {"use_gate": True, "allow_neg_eigval": True, "conv_size": 2}),
    ("DeltaNetForCausalLM with sums", {"qk_activation": "relu", "qk_norm": "sum", "use_beta": False}),
    ("DeltaNetForCausalLM without convolution", {"qk_activation": "elu", "use_short_conv": False}),
    ("DeltaNetForCausalLM with attention", {"qk_activation": "identity", **HYBRID}),
    ("GLAForCausalLM", {}),
    (
        "GLAForCausalLM with convolution",
        {"num_kv_heads": 2, "use_short_conv": True, "feature_map": "sqrelu", "clamp_min": -0.1},
    ),
    (
        "GLAForCausalLM without gate",
        {"use_output_gate": False, "elementwise_affine": False, "feature_map": "sigmoid"},
    ),
    ("GatedDeltaNetForCausalLM", {}),
    (
        "GatedDeltaNetForCausalLM with sigmoid gate",
        {"num_heads": 2, "num_v_heads": 4, "output_gate_activation": "sigmoid", "allow_neg_eigval": True},
    ),
    (
        "GatedDeltaNetForCausalLM without gate",
        {"use_gate": False, "use_short_conv": False, "tie_word_embeddings": True, **HYBRID},
    ),
)


def _model_class(name: str, changes: dict[str, Any], seed: int) -> ModelClass:
    family, make, oracle, cells, kind = _KINDS[name.split()[0]]
    layers = (0, 2) if "attn" in changes else (0, 1, 2)
    build = lambda: make(**changes)  # noqa: E731
    return ModelClass(name, family, build, oracle, cells, layers, kind, truth=TRUTH, seed=seed)


MODEL_CLASSES = tuple(_model_class(name, changes, 20 + n) for n, (name, changes) in enumerate(_VARIANTS))
