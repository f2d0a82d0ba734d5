"""Every model class under test."""

from __future__ import annotations

from tests.hooked_models.model_classes import shipped
from tests.hooked_models.model_classes.case import ModelClass

MODEL_CLASSES: dict[str, ModelClass] = {of.name: of for of in (*shipped.MODEL_CLASSES,)}
