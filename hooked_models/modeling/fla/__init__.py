"""DeltaNet, GLA and Gated DeltaNet in pure PyTorch, with flash-linear-attention's parameter names.

They need neither triton nor a GPU: the recurrence runs on `hooked_models.recurrence`. Importing this package
registers the model types with transformers' Auto classes, unless another package has claimed them.
"""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from hooked_models.modeling.fla.config import DeltaNetConfig, FLAConfig, GatedDeltaNetConfig, GLAConfig
from hooked_models.modeling.fla.model import (
    DeltaNetForCausalLM,
    FLAForCausalLM,
    GatedDeltaNetForCausalLM,
    GLAForCausalLM,
)

__all__ = [
    "MODEL_CLASSES",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "FLAConfig",
    "FLAForCausalLM",
    "GLAConfig",
    "GLAForCausalLM",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
]

MODEL_CLASSES: dict[str, type[FLAForCausalLM]] = {
    str(getattr(model_class.config_class, "model_type", "")): model_class
    for model_class in (DeltaNetForCausalLM, GLAForCausalLM, GatedDeltaNetForCausalLM)
}
"""By the model type in their config.json."""

for _model_type, _model_class in MODEL_CLASSES.items():
    if _model_type not in CONFIG_MAPPING:
        AutoConfig.register(_model_type, _model_class.config_class)
        AutoModel.register(_model_class.config_class, _model_class.inner)
        AutoModelForCausalLM.register(_model_class.config_class, _model_class)
