"""The names of TransformerLens 3 that sae-lens 6.54 imports, put back into TransformerLens 4.

A pytest plugin for ``make test-transformer-lens-4``: sae-lens does not import beside TransformerLens 4,
which has moved some of its names and removed HookedTransformer. Nothing that the tests of hooks run needs the
removed classes, so empty ones stand for them.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # as tests/conftest.py, which is imported after this

import transformer_lens
from torch import nn
from transformer_lens import HookedRootModule, utilities


class HookedTransformer(HookedRootModule):
    """Stands for the class that TransformerLens 4 has removed."""


def put_back(name: str, **contents: Any) -> None:
    """Make a module of TransformerLens 3, with the names that sae-lens takes from it."""
    module = ModuleType(f"transformer_lens.{name}")
    module.__path__ = []
    vars(module).update(contents)
    sys.modules[module.__name__] = module


put_back(
    "HookedTransformer",
    HookedTransformer=HookedTransformer,
    HookedRootModule=HookedRootModule,
    Loss=Any,
    Output=Any,
)
put_back("components")
put_back("components.mlps")
put_back("components.mlps.can_be_used_as_mlp", CanBeUsedAsMLP=type("CanBeUsedAsMLP", (nn.Module,), {}))
vars(transformer_lens)["HookedTransformer"] = HookedTransformer
vars(transformer_lens)["utils"] = sys.modules["transformer_lens.utils"] = utilities
