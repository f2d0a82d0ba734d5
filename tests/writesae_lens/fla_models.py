"""Narrow models with the cells that the published SAEs of DeltaNet and GLA were trained on, 12:8 and 12:0."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from hooked_models import zoo
from hooked_models.modeling.fla import MODEL_CLASSES
from tests.conftest import randomise

# Of the published models, where they are not so in every model: 9 heads of 128 x 128, 1 of 256 x 512.
_CELLS: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 9, "expand_k": 36, "expand_v": 36},
    "gla": {"num_heads": 1, "expand_k": 8, "expand_v": 16},
}


def save_model(folder: Path, kind: str) -> Path:
    """A folder with such a model, which reads tiny-gdn's tokens."""
    model_class: Any = MODEL_CLASSES[kind]
    shutil.copytree(zoo.model_path("tiny-gdn"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 13, "vocab_size": 2048}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes, **_CELLS[kind], initializer_range=0.1))
    randomise(model, 0)
    model.eval().save_pretrained(folder)
    return folder
