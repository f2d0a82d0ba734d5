"""RWKV-7 in pure PyTorch, with the parameter names of flash-linear-attention's checkpoints.

It needs neither triton nor a GPU: the recurrence runs on `hooked_models.recurrence`. Importing this package
registers the model type ``rwkv7`` with transformers' Auto classes, unless another package has claimed it.
"""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from hooked_models.modeling.rwkv7.config import RWKV7Config
from hooked_models.modeling.rwkv7.layers import RWKV7Cache
from hooked_models.modeling.rwkv7.model import RWKV7ForCausalLM, RWKV7Model

__all__ = ["RWKV7Cache", "RWKV7Config", "RWKV7ForCausalLM", "RWKV7Model"]

if RWKV7Config.model_type not in CONFIG_MAPPING:
    AutoConfig.register(RWKV7Config.model_type, RWKV7Config)
    AutoModel.register(RWKV7Config, RWKV7Model)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM)
