"""What SAELens finds by name once this package is imported."""

import pytest
from sae_lens import SAE
from sae_lens.load_model import load_model
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class, get_sae_training_class

from writesae_lens import WriteSAE, WriteSAEError, WriteTrainingSAE
from writesae_lens.saelens.registration import register


def test_registration_is_complete_repeatable_and_refuses_a_rival(monkeypatch):
    assert get_sae_class("writesae")[0] is WriteSAE
    assert get_sae_training_class("writesae")[0] is WriteTrainingSAE
    register()
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "writesae", (SAE, object))
    with pytest.raises(WriteSAEError, match="another package"):
        register()


def test_other_model_classes_are_left_to_saelens():
    with pytest.raises(ValueError, match="Unknown model class"):
        load_model("NoSuchModel", "x")
