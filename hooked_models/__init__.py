"""Hook points on the per-head cache writes of recurrent language models, on TransformerLens's bridge.

>>> from hooked_models import HookedRecurrent
>>> model = HookedRecurrent.boot_transformers("tiny-gdn")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hooked_models.moved import OLD_NAMES, keep_old_names

if TYPE_CHECKING:
    from hooked_models.architectures.delta_net import HookedDeltaNet, HookedFLAGatedDeltaNet
    from hooked_models.architectures.gated_delta_net import HookedGatedDeltaNet
    from hooked_models.architectures.gla import HookedGLA
    from hooked_models.architectures.kda import HookedKDA
    from hooked_models.architectures.lightning import HookedLightningAttention
    from hooked_models.architectures.mamba2 import HookedMamba2
    from hooked_models.architectures.rwkv7 import HookedRWKV7
    from hooked_models.errors import HookedModelError
    from hooked_models.hooked_recurrent import Cell, HookedRecurrent
    from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM

__all__ = [
    "Cell",
    "HookedDeltaNet",
    "HookedFLAGatedDeltaNet",
    "HookedGLA",
    "HookedGatedDeltaNet",
    "HookedKDA",
    "HookedLightningAttention",
    "HookedMamba2",
    "HookedModelError",
    "HookedRWKV7",
    "HookedRecurrent",
    "RWKV7Config",
    "RWKV7ForCausalLM",
]
__version__ = "0.1.0"

# From 5.24 on, models pass their cache to the layers under another name, and TransformerLens still uses the
# old one: cached decoding would forget what came before, without an error.
_FIRST_WRONG_TRANSFORMERS = (5, 24)
_installed = version("transformers")
if tuple(int(part) for part in _installed.split(".")[:2]) >= _FIRST_WRONG_TRANSFORMERS:
    raise ImportError(
        f"hooked_models does not work with transformers {_installed}, where cached decoding would be wrong: "
        "pip install 'transformers>=5.20,<5.24'"
    )

keep_old_names(OLD_NAMES)

# Loaded on first use, so that the training recipe and the shipped files need no TransformerLens.
_HOMES = {
    "Cell": "hooked_recurrent",
    "HookedDeltaNet": "architectures.delta_net",
    "HookedFLAGatedDeltaNet": "architectures.delta_net",
    "HookedGLA": "architectures.gla",
    "HookedGatedDeltaNet": "architectures.gated_delta_net",
    "HookedKDA": "architectures.kda",
    "HookedLightningAttention": "architectures.lightning",
    "HookedMamba2": "architectures.mamba2",
    "HookedModelError": "errors",
    "HookedRWKV7": "architectures.rwkv7",
    "HookedRecurrent": "hooked_recurrent",
    "RWKV7Config": "modeling.rwkv7",
    "RWKV7ForCausalLM": "modeling.rwkv7",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
