"""The partition of a dictionary against brute force, and its mixture against clusters that are known."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from tests.writesae_lens.experiments.truth import atoms_of, encoded, make_sae, read_passages, writes
from writesae_lens import WriteSAEError, statistics
from writesae_lens.experiments import partition_atoms
from writesae_lens.experiments.firings import Firings


@pytest.fixture(scope="module")
def passages(gdn):
    return read_passages(gdn, 3, 40)


def cosines_by_atom(model, sae, tokens, skip=0):
    """Every dominant atom's cosines, from the hooks' own matrices and the dense decoder."""
    acts, native = encoded(model, sae, tokens), writes(model, tokens).flatten(2)
    cosines: dict[int, list[float]] = {}
    for passage, position in np.ndindex(*tokens.shape):
        at = acts[passage, position]
        if position >= skip and at.max() > 0:
            atom = int(at.argmax())
            write, matrix = native[passage, position].numpy(), atoms_of(sae, model)[atom].flatten().numpy()
            cosine = write @ matrix / np.linalg.norm(write) / np.linalg.norm(matrix)
            cosines.setdefault(atom, []).append(cosine)
    return cosines


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("write", {}, {}),
        ("write", {"rank": 2}, {"min_firings": 3, "skip_positions": 7}),
        ("state", {}, {"min_firings": 2}),
        ("write", {"decoder": "dense", "encoder": "dense"}, {}),
    ],
)
def test_every_atom_has_the_median_cosine_of_its_own_firings(gdn, passages, kind, options, settings):
    sae = make_sae(gdn, kind, d_sae=48, k=4, **options)
    result = partition_atoms(gdn, sae, passages, verbose=False, **settings)
    expected = cosines_by_atom(gdn, sae, passages, settings.get("skip_positions", 0))
    records, least = result.records, settings.get("min_firings", 1)
    assert list(records.atom) == list(range(48))
    for row in records.to_dict("records"):
        cosines = expected.get(row["atom"], [])
        assert row["n_firings"] == len(cosines)
        if cosines:
            assert row["median_cosine"] == pytest.approx(np.median(cosines), abs=1e-4)
        else:
            assert np.isnan(row["median_cosine"])
        wanted = {"dead"} if not cosines else {"rare"} if len(cosines) < least else {"register", "bundle"}
        assert row["class"] in wanted
        assert np.isnan(row["posterior"]) == (row["class"] in ("dead", "rare"))
    summary = result.summary
    assert sum(summary[f"n_{name}"] for name in ("register", "bundle", "rare", "dead")) == 48
    assert summary["n_dead"] == 48 - len(expected)
    assert summary["n_firings"] == sum(map(len, expected.values()))


def test_the_summary_follows_from_the_records(gdn, passages):
    sae = make_sae(gdn, d_sae=48, k=4)
    result = partition_atoms(gdn, sae, passages, thresholds=(-0.1, 0.0, 0.05), verbose=False)
    records, summary = result.records, result.summary
    alive = records[records["class"] != "dead"]
    x = alive.median_cosine.to_numpy()
    registers = x[(alive["class"] == "register").to_numpy()]
    bundles = x[(alive["class"] == "bundle").to_numpy()]
    assert bundles.max() < summary["threshold"] <= registers.min()
    assert summary["register_median_cosine"] == pytest.approx(np.median(registers))
    expected = {"-0.1": (x >= -0.1).sum(), "0": (x >= 0).sum(), "0.05": (x >= 0.05).sum()}
    assert summary["n_register_by_threshold"] == expected
    # The likelihoods of one and two components by hand; 2 and 5 parameters.
    one = stats.norm.logpdf(x, x.mean(), x.std()).sum()
    parts = zip(*(summary["mixture"][name] for name in ("weights", "means", "deviations")), strict=True)
    densities = np.array([w * stats.norm.pdf(x, m, d) for w, m, d in parts])
    two = np.log(densities.sum(0)).sum()
    bic = {"1": 2 * np.log(len(x)) - 2 * one, "2": 5 * np.log(len(x)) - 2 * two}
    for order, value in bic.items():
        assert summary["bic_by_order"][order] == pytest.approx(value, abs=0.1)
    assert summary["delta_bic"] == pytest.approx(bic["2"] - bic["1"], abs=0.1)
    np.testing.assert_allclose(alive.posterior, densities[1] / densities.sum(0), atol=1e-6)
    assert result.plot().axes[0].get_title(loc="left").startswith(f"{summary['n_register']} registers")


@pytest.fixture
def partition_of(gdn, passages, monkeypatch):
    """The partition of a dictionary whose atoms 0, 1, ... fire once each with the given cosines."""

    def divide(cosines, d_sae):
        cosines = torch.as_tensor(cosines)
        atom, nothing = torch.arange(len(cosines)), torch.zeros(len(cosines), 1)
        firings = Firings(atom, atom, cosines, nothing, nothing)
        module = "writesae_lens.experiments.partition"
        monkeypatch.setattr(f"{module}.find_firings", lambda *args: firings)
        monkeypatch.setattr(f"{module}.atom_cosines", lambda sae, firings, cell: firings.coefficient)
        return partition_atoms(gdn, make_sae(gdn, d_sae=d_sae), passages[:1], verbose=False)

    return divide


def test_known_clusters_are_found(partition_of):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.1, 0.05, 120), rng.normal(0.8, 0.07, 60)])
    result = partition_of(x, 200)
    mixture, threshold = result.summary["mixture"], result.summary["threshold"]
    assert list(result.records["class"]) == ["bundle"] * 120 + ["register"] * 60 + ["dead"] * 20
    assert mixture["means"] == pytest.approx([x[:120].mean(), x[120:].mean()], abs=1e-3)
    assert mixture["deviations"] == pytest.approx([x[:120].std(), x[120:].std()], abs=2e-3)
    assert mixture["weights"] == pytest.approx([2 / 3, 1 / 3], abs=1e-3)
    bic = result.summary["bic_by_order"]
    assert list(bic) == ["1", "2", "3", "4"]
    assert min(bic, key=bic.__getitem__) == "2"
    assert result.summary["stability"] == 1
    # At the threshold both weighted densities are equal.
    low, high = (
        w * stats.norm.pdf(threshold, m, d)
        for w, m, d in zip(mixture["weights"], mixture["means"], mixture["deviations"], strict=True)
    )
    assert low == pytest.approx(high, rel=1e-6)
    assert result.summary["two_classes"]
    assert result.headline.startswith("60 registers, 120 bundles, 20 dead, delta BIC -")
    # One cluster: two components are not worth their parameters.
    one = partition_of(rng.normal(0.4, 0.1, 300), 300)
    assert one.summary["delta_bic"] > 0
    assert not one.summary["two_classes"]
    assert one.headline.startswith("no evidence for two classes of atoms (delta BIC ")


def test_a_small_delta_bic_is_no_evidence_for_two_classes(partition_of, monkeypatch):
    bic = {1: 100.0, 2: 91.0, 3: 120.0, 4: 140.0}  # two components are better by 9
    monkeypatch.setattr(statistics, "mixture_bic", lambda values, order, seed: bic[order])
    result = partition_of(np.linspace(0.1, 0.9, 50), 60)
    assert (result.summary["delta_bic"], result.summary["two_classes"]) == (-9.0, False)
    assert "no evidence for two classes of atoms (delta BIC -9.0, above -10)" in result.headline
    bic[2] = 90.0
    assert partition_of(np.linspace(0.1, 0.9, 50), 60).summary["two_classes"]


def test_a_wide_upper_component_does_not_take_the_smallest_cosines():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(0.3, 0.02, 150), rng.normal(0.6, 0.25, 150), [-0.6]])
    split = statistics.split_in_two(x)
    assert split.posterior[-1] > 0.9  # what the plain posterior would make of it
    assert not split.upper[-1]
    np.testing.assert_array_equal(split.upper, x >= split.threshold)
    # Mirrored: a narrow upper component does not lose the largest ones.
    mirrored = statistics.split_in_two(-x)
    assert mirrored.upper[-1]
    assert mirrored.posterior[-1] < 0.1


def test_a_component_that_always_outweighs_leaves_no_threshold():
    assert statistics._rise(np.array([0.01, 0.99]), np.array([0.4, 0.5]), np.array([0.2, 0.3])) is None
    rise = statistics._rise(np.array([0.5, 0.5]), np.array([0.2, 0.6]), np.array([0.1, 0.1]))
    assert rise == pytest.approx(0.4)


def test_stability_is_the_mean_rand_index_over_pairs_of_seeds():
    x = np.random.default_rng(2).uniform(-0.2, 0.9, 40)
    states = np.random.SeedSequence(3).generate_state(6)
    labels = [statistics.split_in_two(x, int(s), starts=1).upper for s in states]
    expected = np.mean([adjusted_rand_score(a, b) for a, b in combinations(labels, 2)])
    assert statistics.split_stability(x, 6, seed=3) == pytest.approx(expected)
    assert statistics.split_stability(x, 1) is None


@pytest.mark.parametrize("cosines", [[0.1, 0.5, 0.9], [0.4] * 30])
def test_too_few_atoms_or_equal_cosines_are_all_registers(partition_of, cosines, tmp_path):
    result = partition_of(np.array(cosines), 40)
    assert (result.records["class"][: len(cosines)] == "register").all()
    assert (result.records["class"][len(cosines) :] == "dead").all()
    assert result.summary["n_register"] == len(cosines)
    for name in ("delta_bic", "threshold", "stability", "mixture"):
        assert result.summary[name] is None
    assert not result.summary["two_classes"]
    assert list(result.summary["bic_by_order"]) == ["1"]
    assert result.summary["register_median_cosine"] == np.median(cosines)
    result.save(tmp_path)  # the figure too


def test_orders_with_fewer_than_two_atoms_a_component_are_left_out(gdn, passages):
    few = partition_atoms(gdn, make_sae(gdn, d_sae=6, k=4), passages, orders=(2, 3, 4), verbose=False)
    alive = few.summary["n_register"] + few.summary["n_bundle"]
    assert list(few.summary["bic_by_order"]) == [str(k) for k in (2, 3, 4) if 2 * k <= alive]


def test_a_passage_without_firings_is_resumed_too(gdn, passages, tmp_path):
    sae, passages = make_sae(gdn), passages[:, :4]
    strongest = encoded(gdn, sae, passages).amax((1, 2))  # of each passage
    with torch.no_grad():
        # All of one passage are too small now.
        sae.b_enc.fill_(-float(strongest.sort().values[:2].mean()))
    sparse = partition_atoms(gdn, sae, passages, verbose=False, progress_folder=str(tmp_path))
    lengths = [len(pd.read_csv(path, comment="#")) for path in tmp_path.glob("part_*.csv")]
    assert sorted(lengths)[0] == 0 < sparse.summary["n_firings"] == sum(lengths)
    # The settings that only divide the atoms may change.
    again = partition_atoms(gdn, sae, passages, verbose=False, progress_folder=str(tmp_path), n_seeds=2)
    pd.testing.assert_frame_equal(again.records, sparse.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"skip_positions": 99}, "left none"), ({"min_firings": 9999}, "none min_firings=9999 times")],
)
def test_options_that_leave_nothing_are_refused(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        partition_atoms(gdn, make_sae(gdn), passages, verbose=False, **options)
