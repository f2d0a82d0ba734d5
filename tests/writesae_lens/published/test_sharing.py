"""What is published beside an SAE: only results that were measured on it."""

import json

import pytest

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import make_codes, make_sae
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


def lines_of(section, start):
    """The cells of the table's rows that start so."""
    return [line.strip("|").split("|") for line in section.splitlines() if line.startswith(start)]


def test_the_card_shows_what_is_recovered_before_the_papers_measures(model, saved):
    summary = json.loads((saved / "summary.json").read_text())
    lookup = {"name": "lookup", "median_recovered": 0.25, "recovered": -0.5}
    own = {"median_recovered": 0.75, "median_recovered_ci": [0.7, 0.8], "recovered": 0.9, "win_rate": 0.5}
    section = sharing._section(make_sae(model), "me/mine", "L1_H2", summary | own | {"baselines": [lookup]})
    (row,) = lines_of(section, "| at the write's own position")
    assert [cell.strip() for cell in row[1:]] == ["75.0% (70.0% to 80.0%)", "90.0%", "25.0%", "-50.0%"]
    assert section.index("75.0%") < section.index("paper's measures") < section.index("win rate (95%")
    assert "over the next" not in section  # not measured
    later = {"horizon": 8, "median_recovered_later": 0.5, "recovered_later": 0.625}
    section = sharing._section(make_sae(model), "me/mine", "L1_H2", summary | own | later | {"baselines": []})
    (row,) = lines_of(section, "| over the next 8 tokens")
    assert [cell.strip() for cell in row[1:]] == ["50.0%", "62.5%", "none", "none"]


def test_a_result_of_one_passage_has_no_intervals(model, tmp_path):
    sae, passages = make_sae(model), as_passages(model, zoo.text("test"), 20)[:1]
    replacement_test(model, sae, passages, baselines=False, verbose=False).save(tmp_path)
    summary = sharing._summary(tmp_path, sae)
    assert summary["win_rate_ci"] is None
    section = sharing._section(sae, "me/mine", "L1_H2", summary)
    assert lines_of(section, f"| {summary['win_rate']:.1%} |")
    nowhere = dict.fromkeys(["win_rate", "strict_chain_rate", "median_recovered", "recovered"])
    section = sharing._section(sae, "me/mine", "L1_H2", summary | nowhere)  # all at the floor of rounding
    assert lines_of(section, "| none | none |")


@pytest.mark.parametrize(
    "wrong",
    [
        {"win_rate": float("nan")},
        {"recovered": "most"},
        {"median_recovered_ci": [0.1, float("inf")]},
        {"win_rate_ci": 0.5},
        {"baselines": [{"recovered": 0.5}]},
    ],
)
def test_results_that_are_none_are_refused(model, saved, tmp_path, wrong):
    summary = json.loads((saved / "summary.json").read_text()) | wrong
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(WriteSAEError, match="is not what a replacement test saved"):
        sharing._summary(tmp_path, make_sae(model))


def test_the_card_counts_codes_by_side(model):
    section = sharing._section(make_codes(model), "me/mine", "L1_H2", None)
    assert "16 key codes and 16 value codes for 32 x 48 matrices, rank 1;" in section
    assert "activation topk, k 2 and 2`" in section


def test_a_bare_checkpoint_is_published_under_its_cell(model):
    sae = make_sae(model)
    assert sharing.default_id(sae) == "L1_H2"
    sae.cfg.metadata.hook_name = None
    assert sharing.default_id(sae) == "sae"
    sae.cfg.metadata.layer, sae.cfg.metadata.head = 3, 0
    assert sharing.default_id(sae) == "L3_H0"
