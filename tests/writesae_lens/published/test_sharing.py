"""What is published beside an SAE: only results that were measured on it."""

import json

import pytest

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import make_sae
from writesae_lens import WriteSAEError
from writesae_lens.experiments import as_passages, replacement_test
from writesae_lens.published import sharing


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A replacement test of `make_sae(model)`."""
    passages = as_passages(model, zoo.text("test"), 20)[:3]
    return replacement_test(model, make_sae(model), passages, verbose=False).save(
        tmp_path_factory.mktemp("saved")
    )


def test_results_of_another_sae_on_the_same_hook_are_refused(model, saved):
    with pytest.raises(WriteSAEError, match=r"summary\.json was measured on another SAE on blocks\.1\."):
        sharing.push(make_sae(model, seed=1), "me/mine", results=saved)


def test_the_card_says_on_which_text_its_figures_were_measured(model, saved):
    summary = json.loads((saved / "summary.json").read_text()) | {"warnings": ["it rained | `hard`"]}
    section = sharing._section(make_sae(model), "me/mine", "L1_H2", summary)
    assert f"`Measured on {zoo.TEXT_NAME}, test part, tokens 0 to 60 (60 tokens, hash " in section
    assert "`it rained ? ?hard?`" in section


def test_a_bare_checkpoint_is_published_under_its_cell(model):
    sae = make_sae(model)
    assert sharing.default_id(sae) == "L1_H2"
    sae.cfg.metadata.hook_name = None
    assert sharing.default_id(sae) == "sae"
    sae.cfg.metadata.layer, sae.cfg.metadata.head = 3, 0
    assert sharing.default_id(sae) == "L3_H0"
