"""Every model class under test."""

from __future__ import annotations

from tests.hooked_models.model_classes import delta_rules, mamba2_hybrids, shipped
from tests.hooked_models.model_classes.case import ModelClass

_MODULES = (shipped, mamba2_hybrids, delta_rules)
MODEL_CLASSES: dict[str, ModelClass] = {of.name: of for module in _MODULES for of in module.MODEL_CLASSES}
