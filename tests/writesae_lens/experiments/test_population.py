"""The population test against a plain loop over the replacement test's firings."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.writesae_lens.experiments.truth import dominant_atoms, make_sae, read_passages
from writesae_lens import WriteSAEError, statistics
from writesae_lens.experiments import EXPERIMENTS, population_test, replacement_test
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import MEASURED_ON


@pytest.fixture
def population_of(gdn, passages, monkeypatch):
    """The population test of firings that are given, not measured."""

    def test(rows, **columns):
        frame = pd.DataFrame(rows, columns=["atom", "cosine", "kl_atom", "kl_delete", "kl_random"])
        frame = frame.assign(**columns)
        summary = dict.fromkeys([*MEASURED_ON, *EXPERIMENTS["replace"].own_options])
        summary |= {"text": "given", "warnings": [], "hook_name": "given"}
        tested = ExperimentResult("replace", frame, summary | {"n_atoms_never_dominant": 7})
        monkeypatch.setattr(
            "writesae_lens.experiments.population.replacement_test", lambda *args, **options: tested
        )
        return population_test(gdn, make_sae(gdn), passages)

    return test


def test_every_row_is_a_loop_over_the_replacement_tests_firings(gdn):
    how = {"skip_positions": 2, "scale": "matched_norm", "max_firings_per_atom": 6, "seed": 2}
    inputs = gdn, make_sae(gdn), read_passages(gdn, 3, 40)
    result = population_test(*inputs, min_firings=3, verbose=False, **how)
    firings = replacement_test(*inputs, verbose=False, **how).records
    expected, rare = [], 0
    for atom in range(32):
        own = [row for row in firings.to_dict("records") if row["atom"] == atom]
        if len(own) < 3:
            rare += len(own) > 0
            continue
        wins = [row["kl_atom"] < row["kl_delete"] for row in own]
        chain = [row["kl_atom"] < row["kl_delete"] < row["kl_random"] for row in own]
        medians = [np.median([row[name] for row in own]) for name in ("cosine", "kl_atom", "kl_delete")]
        recovered = np.median([1 - row["kl_atom"] / row["kl_delete"] for row in own])
        expected.append([atom, len(own), recovered, np.mean(wins), np.mean(chain), *medians])
    columns = ["atom", "n_firings", "recovered", "win_rate", "strict_chain_rate", "median_cosine"]
    columns += ["median_kl_atom", "median_kl_delete"]
    assert list(result.records) == ["atom", "side", *columns[1:], "class"]
    assert set(result.records.side) == {"atom"}
    np.testing.assert_allclose(result.records[columns].to_numpy(float), expected)
    summary = result.summary
    assert summary["mean_recovered"] == pytest.approx(np.mean([row[2] for row in expected]))
    assert summary["median_recovered"] == pytest.approx(np.median([row[2] for row in expected]))
    assert summary["mean_win_rate"] == pytest.approx(np.mean([row[3] for row in expected]))
    assert summary["n_atoms"] == len(expected)
    assert summary["n_firings"] == sum(row[1] for row in expected)
    assert summary["n_atoms_too_rare"] == rare
    assert summary["n_atoms_never_dominant"] == 32 - len(dominant_atoms(*inputs))  # skipped positions too
    assert (how | {"min_firings": 3, "kl": "patched_base"}).items() <= summary.items()
    assert f"{summary['mean_win_rate']:.1%}" in result.plot().axes[1].get_title(loc="left")
    assert f"recovers {summary['mean_recovered']:.1%}" in result.plot().axes[0].get_title(loc="left")
    for name in ("median_recovered", "mean_recovered", "mean_win_rate"):
        assert f"{summary[name]:.1%}" in result.headline


def test_statistics_of_known_atoms(population_of):
    rng = np.random.default_rng(0)
    centers = np.concatenate([rng.normal(0.1, 0.02, 30), rng.normal(0.8, 0.02, 20)])
    rates = np.where(centers > 0.5, 9, 5) + rng.integers(-1, 2, 50)  # of 10 firings
    rows = [
        (atom, centers[atom] + 0.001 * (i - 4.5), 1.0 if i < rates[atom] else 3.0, 2.0, 2.5)
        for atom in range(50)
        for i in range(10)
    ]
    rows += [(50, 0.5, 1.0, 2.0, 3.0)] * 4  # too rare
    result = population_of(rows)
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
    often = population_of(rows + [(0, centers[0], 3.0, 2.0, 2.5)] * 90)
    expected = rate.mean() - rate[0] / 50 + rate[0] * 10 / 100 / 50
    assert often.summary["mean_win_rate"] == pytest.approx(expected)


def test_a_firing_of_codes_counts_for_both_of_its_dominant_codes(population_of, tmp_path):
    rng = np.random.default_rng(0)
    kls = rng.uniform(0.1, 3, (300, 5))
    keys, values = rng.integers(0, 6, 300), rng.integers(6, 11, 300)
    rows = [(value, 0.5, *kl[:3]) for value, kl in zip(values, kls, strict=True)]
    floor = np.where(np.arange(300) % 7 == 0, 9.0, 0.0)
    later = {"kl_atom_later": kls[:, 3], "kl_delete_later": kls[:, 4], "kl_floor_later": floor[::-1]}
    result = population_of(rows, key_code=keys, kl_floor=floor, **later)
    assert list(result.records.atom) == list(range(11))
    for row in result.records.itertuples():
        assert row.side == ("key" if row.atom < 6 else "value")
        own = (keys if row.atom < 6 else values) == row.atom
        own &= floor == 0
        assert row.n_firings == own.sum()
        assert row.win_rate == pytest.approx((kls[own, 0] < kls[own, 1]).mean())
        assert row.recovered == pytest.approx(np.median(1 - kls[own, 0] / kls[own, 1]))
        both = own & (floor[::-1] == 0)
        assert row.recovered_later == pytest.approx(np.median(1 - kls[both, 3] / kls[both, 4]))
    assert result.records["class"].isna().all()
    for side, part in result.records.groupby("side"):
        assert result.summary[f"mean_recovered_{side}"] == pytest.approx(part.recovered.mean())
        assert result.summary[f"n_{side}"] == len(part)
    assert result.summary["mean_recovered_later"] == pytest.approx(result.records.recovered_later.mean())
    assert "of 11 codes" in result.headline
    result.save(tmp_path)


def test_few_or_equal_atoms_have_no_classes_and_no_correlation(population_of, tmp_path):
    result = population_of([(atom, 0.5, 1.0, 2.0, 3.0) for atom in range(2) for _ in range(5)])
    assert result.records["class"].isna().all()
    for name in ("mann_whitney_p", "pearson_p", "spearman_win_rate_cosine", "win_rate_register"):
        assert result.summary[name] is None
    assert result.summary["mean_win_rate_ci"] == [1, 1]
    assert result.summary["win_rate_by_cosine_quintile"] == [1, 1, None, None, None]
    result.save(tmp_path)  # the figure too
    assert statistics.mann_whitney([1, 1], [1, 1, 1]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_firings": 9, "max_firings_per_atom": 8}, "min_firings=9 is above"),
        ({"min_firings": 999, "max_firings_per_atom": None}, "none min_firings=999 times"),
        ({"skip_positions": 99}, "left none"),
    ],
)
def test_options_that_leave_nothing_are_refused(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        population_test(gdn, make_sae(gdn), passages, verbose=False, **options)
