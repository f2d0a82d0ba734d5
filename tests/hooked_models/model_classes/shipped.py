"""The model classes of the models that ship: Qwen3.5, Qwen3-Next, Mamba-2 and RWKV-7."""

from __future__ import annotations

from tests.conftest import hybrid, mamba2, rwkv7
from tests.hooked_models.model_classes.case import ModelClass
from tests.hooked_models.oracles import GatedDeltaNetLayer, Mamba2Layer, RWKV7Layer

_HYBRID = (GatedDeltaNetLayer, (4, 16, 24), (0, 1, 3), "gated_delta_net")
MODEL_CLASSES = (
    ModelClass("Qwen3_5ForCausalLM", "Qwen3.5", lambda: hybrid("qwen3_5"), *_HYBRID, seed=0),
    ModelClass("Qwen3_5MoeForCausalLM", "Qwen3.5 MoE", lambda: hybrid("qwen3_5_moe"), *_HYBRID, seed=1),
    ModelClass("Qwen3NextForCausalLM", "Qwen3-Next", lambda: hybrid("qwen3_next"), *_HYBRID, seed=2),
    ModelClass("Mamba2ForCausalLM", "Mamba-2", mamba2, Mamba2Layer, (8, 32, 14), (0, 1, 2), "mamba2", seed=4),
    ModelClass(
        "RWKV7ForCausalLM",
        "RWKV-7 (Goose)",
        rwkv7,
        RWKV7Layer,
        (4, 16, 24),
        (0, 1, 2),
        "rwkv7",
        truth="this package's own model class, checked against `rwkv` and fla",
        seed=5,
    ),
)
