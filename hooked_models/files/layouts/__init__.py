"""Checkpoints that are not in Hugging Face's form: those of mamba_ssm, flash-linear-attention and BlinkDL.

Each reader takes tensors by name (and the contents of ``config.json``, where there is one), checks every name
and shape, and returns the class, configuration and weights of a transformers model.
"""

from hooked_models.files.layouts.blinkdl import from_blinkdl, to_blinkdl
from hooked_models.files.layouts.checkpoint import (
    Checkpoint,
    Tensors,
    check_activation,
    listed,
    not_finite,
    read_tensors,
)
from hooked_models.files.layouts.fla import FLA_TYPES, from_fla
from hooked_models.files.layouts.mamba_ssm import from_mamba_ssm

__all__ = [
    "FLA_TYPES",
    "Checkpoint",
    "Tensors",
    "check_activation",
    "from_blinkdl",
    "from_fla",
    "from_mamba_ssm",
    "listed",
    "not_finite",
    "read_tensors",
    "to_blinkdl",
]
