"""An architecture that only the tests define, in this one place: Gated DeltaNet under another name.

As any architecture it has a mixer and a row; its model class stands for one of another package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformer_lens.model_bridge.supported_architectures import Qwen3_5ArchitectureAdapter
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hooked_models import HookedGatedDeltaNet, zoo
from hooked_models.architectures import adapters


class HookedToy(HookedGatedDeltaNet):
    """The mixer."""

    architecture = "toy"


ROW = adapters.Row(Qwen3_5ArchitectureAdapter, {"linear_attn": HookedToy})


class ToyConfig(Qwen3_5TextConfig):
    model_type = "toy"


class ToyForCausalLM(Qwen3_5ForCausalLM):
    config_class = ToyConfig


@contextmanager
def toy_in(folder: Path) -> Iterator[Path]:
    """A folder with a toy model, tiny-gdn's weights; while open, the package hooks its model class."""
    shutil.copytree(zoo.model_path("tiny-gdn"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "toy", "architectures": ["ToyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(adapters.ADAPTERS, "ToyForCausalLM", ROW)
        yield folder
