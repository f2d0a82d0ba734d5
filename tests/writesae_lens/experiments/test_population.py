"""The population test against a plain loop over the replacement test's firings."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, statistics
from writesae_lens.experiments import population, population_test, replacement_test
from writesae_lens.experiments.result import ExperimentResult


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 3 * 40].view(3, 40)


@pytest.fixture(scope="module")
def sae(model):
    return make_sae(model)


def make_sae(model, d_sae=24):
    torch.manual_seed(0)
    cell = model.cell(1, 2)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=d_sae, k=4))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.001)
    sae.cfg.metadata.hook_name = model.write_hook_name(1, 2)
    return sae


def population_of(monkeypatch, inputs, rows):
    """The population test of firings that are given, not measured."""
    frame = pd.DataFrame(rows, columns=["atom", "cosine", "kl_atom", "kl_delete", "kl_random"])
    told = ExperimentResult("replacement", frame, {"n_atoms_never_dominant": 7, "scale": "coefficient"})
    monkeypatch.setattr(population, "replacement_test", lambda *a, **k: told)
    return population_test(*inputs)


def test_every_row_is_a_loop_over_the_replacement_tests_firings(model, sae, tokens):
    options = {"skip_positions": 2, "scale": "matched_norm"}
    result = population_test(
        model, sae, tokens, max_firings_per_atom=6, min_firings=3, seed=2, verbose=False, **options
    )
    firings = replacement_test(
        model, sae, tokens, max_firings_per_atom=6, seed=2, verbose=False, **options
    ).records
    expected, rare = [], 0
    for atom in range(24):
        own = [row for row in firings.to_dict("records") if row["atom"] == atom]
        if len(own) < 3:
            rare += len(own) > 0
            continue
        wins = [row["kl_atom"] < row["kl_delete"] for row in own]
        chain = [row["kl_atom"] < row["kl_delete"] < row["kl_random"] for row in own]
        medians = [np.median([row[name] for row in own]) for name in ("cosine", "kl_atom", "kl_delete")]
        expected.append([atom, len(own), np.mean(wins), np.mean(chain), *medians])
    columns = ["atom", "n_firings", "win_rate", "strict_chain_rate", "median_cosine", "median_kl_atom"]
    columns.append("median_kl_delete")
    assert list(result.records) == [*columns, "class"]
    np.testing.assert_allclose(result.records[columns].to_numpy(float), expected)
    summary = result.summary
    assert summary["mean_win_rate"] == pytest.approx(np.mean([row[2] for row in expected]))
    assert summary["n_atoms"] == len(expected)
    assert summary["n_firings"] == sum(row[1] for row in expected)
    assert summary["n_atoms_too_rare"] == rare
    assert summary["n_atoms_never_dominant"] == 24 - len(expected) - rare
    shown = {
        "experiment": "population",
        "max_firings_per_atom": 6,
        "min_firings": 3,
        "seed": 2,
        "kl": "patched_base",
    }
    assert shown.items() <= summary.items()
    assert summary["skip_positions"] == 2
    assert summary["model"] == "tiny-gdn"


def test_statistics_of_known_atoms(model, sae, tokens, monkeypatch):
    rng = np.random.default_rng(0)
    centers = np.concatenate([rng.normal(0.1, 0.02, 30), rng.normal(0.8, 0.02, 20)])
    rates = np.where(centers > 0.5, 9, 5) + rng.integers(-1, 2, 50)  # of 10 firings
    rows = [
        (atom, centers[atom] + 0.001 * (i - 4.5), 1.0 if i < rates[atom] else 3.0, 2.0, 2.5)
        for atom in range(50)
        for i in range(10)
    ]
    rows += [(50, 0.5, 1.0, 2.0, 3.0)] * 4  # too rare
    result = population_of(monkeypatch, (model, sae, tokens), rows)
    records, summary = result.records, result.summary
    rate = rates / 10
    np.testing.assert_allclose(records.win_rate, rate)
    np.testing.assert_allclose(records.median_cosine, centers)
    assert list(records["class"]) == ["bundle"] * 30 + ["register"] * 20
    assert summary["n_atoms_too_rare"] == 1
    assert summary["n_atoms_never_dominant"] == 7
    assert (summary["n_register"], summary["n_bundle"]) == (20, 30)
    assert summary["win_rate_register"] == pytest.approx(rate[30:].mean())
    assert summary["win_rate_bundle"] == pytest.approx(rate[:30].mean())
    # Mann-Whitney's U by counting pairs, its p with the tie-corrected normal approximation.
    u = (np.sign(rate[30:, None] - rate[None, :30]) + 1).sum() / 2
    _, ties = np.unique(rate, return_counts=True)
    sigma = np.sqrt(20 * 30 / 12 * (51 - (ties**3 - ties).sum() / (50 * 49)))
    assert summary["mann_whitney_p"] == pytest.approx(2 * stats.norm.sf((u - 300 - 0.5) / sigma))
    assert summary["pearson_win_rate_cosine"] == pytest.approx(np.corrcoef(rate, centers)[0, 1])
    ranks = stats.rankdata(rate), stats.rankdata(centers)
    assert summary["spearman_win_rate_cosine"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for method in ("pearson", "spearman"):
        r = summary[f"{method}_win_rate_cosine"]
        p = 2 * stats.t.sf(r * np.sqrt(48 / (1 - r**2)), 48)
        assert summary[f"{method}_p"] == pytest.approx(p)
    fifths = np.argsort(centers).reshape(5, 10)
    assert summary["win_rate_by_cosine_quintile"] == pytest.approx(list(rate[fifths].mean(1)))
    assert summary["cosine_by_quintile"] == pytest.approx(list(centers[fifths].mean(1)))
    low, high = summary["mean_win_rate_ci"]
    assert (high - low) / 2 == pytest.approx(1.96 * rate.std() / np.sqrt(50), rel=0.1)
    assert low < rate.mean() < high
    # Every atom counts once, however often it fires.
    often = population_of(monkeypatch, (model, sae, tokens), rows + [(0, centers[0], 3.0, 2.0, 2.5)] * 90)
    expected = rate.mean() - rate[0] / 50 + rate[0] * 10 / 100 / 50
    assert often.summary["mean_win_rate"] == pytest.approx(expected)


def test_few_or_equal_atoms_have_no_classes_and_no_correlation(model, sae, tokens, monkeypatch, tmp_path):
    rows = [(atom, 0.5, 1.0, 2.0, 3.0) for atom in range(2) for _ in range(5)]
    result = population_of(monkeypatch, (model, sae, tokens), rows)
    assert result.records["class"].isna().all()
    for name in ("mann_whitney_p", "pearson_p", "spearman_win_rate_cosine", "win_rate_register"):
        assert result.summary[name] is None
    assert result.summary["mean_win_rate_ci"] == [1, 1]
    assert result.summary["win_rate_by_cosine_quintile"] == [1, 1, None, None, None]
    result.save(tmp_path)
    assert statistics.mann_whitney([1, 1], [1, 1, 1]) == 1


def test_a_single_passage_is_saved_and_drawn(model, sae, tokens, tmp_path):
    result = population_test(model, sae, tokens[:1], min_firings=2, verbose=False)
    result.save(tmp_path)
    read = pd.read_csv(tmp_path / "records.csv")
    pd.testing.assert_frame_equal(read, result.records, check_dtype=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary
    assert (tmp_path / "population.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result.summary['mean_win_rate']:.1%}" in result.plot().axes[0].get_title(loc="left")


def test_same_seed_same_result_and_an_interrupted_run_resumes(model, sae, tokens, tmp_path, monkeypatch):
    whole = population_test(model, sae, tokens, seed=5, verbose=False)
    again = population_test(model, sae, tokens, seed=5, verbose=False)
    pd.testing.assert_frame_equal(again.records, whole.records)
    assert again.summary == whole.summary
    run, calls = HookedRecurrent.run_with_swapped_writes, []

    def stops(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", stops)
    with pytest.raises(KeyboardInterrupt):
        population_test(model, sae, tokens, seed=5, verbose=False, progress_folder=str(tmp_path))
    resumed = population_test(model, sae, tokens, seed=5, verbose=False, progress_folder=str(tmp_path))
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.records, whole.records)


def test_bad_input_is_answered_in_one_line(model, sae, tokens):
    silent = make_sae(model)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    cases = [
        (sae, {"min_firings": 0}, "min_firings=0 makes no sense"),
        (sae, {"min_firings": 9, "max_firings_per_atom": 8}, "min_firings=9 is above"),
        (sae, {"min_firings": 999, "max_firings_per_atom": None}, "none min_firings=999 times"),
        (sae, {"skip_positions": 99}, "left none"),
        (silent, {}, "no atom fires"),
    ]
    for dictionary, options, message in cases:
        with pytest.raises(WriteSAEError, match=message) as caught:
            population_test(model, dictionary, tokens, verbose=False, **options)
        assert "\n" not in str(caught.value)
