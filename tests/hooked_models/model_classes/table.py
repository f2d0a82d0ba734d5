"""Every model class under test."""

from __future__ import annotations

from tests.hooked_models.model_classes import delta_rules, fla_folders, mamba2_hybrids, shipped
from tests.hooked_models.model_classes.case import ModelClass

_MODULES = (shipped, mamba2_hybrids, delta_rules, fla_folders)
MODEL_CLASSES: dict[str, ModelClass] = {of.name: of for module in _MODULES for of in module.MODEL_CLASSES}
