"""The partition of a dictionary against brute force, and its mixture against clusters that are known."""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, statistics
from writesae_lens.experiments import partition, partition_atoms


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 3 * 40].view(3, 40)


def make_sae(model, kind="write", **options):
    torch.manual_seed(0)
    cell = model.cell(1, 2)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 48, "k": 4} | options)))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.001)
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(1, 2)
    return sae


def cosines_by_atom(model, sae, tokens, skip=0):
    """Every dominant atom's cosines, from the hooks' own matrices and the dense decoder."""
    name = sae.cfg.metadata.hook_name
    write_name = name.replace("hook_state", "hook_write")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[name, write_name])
        acts = sae.encode(cache[name])
    found: dict[int, list[float]] = {}
    for passage in range(tokens.shape[0]):
        for position in range(skip, tokens.shape[1]):
            at = acts[passage, position]
            if at.max() > 0:
                atom = int(at.argmax())
                write = cache[write_name][passage, position].double().numpy()
                matrix = sae.W_dec[atom].detach().double().numpy()
                cosine = write @ matrix / np.linalg.norm(write) / np.linalg.norm(matrix)
                found.setdefault(atom, []).append(cosine)
    return found


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("write", {}, {}),
        ("write", {"rank": 2}, {"min_firings": 3, "skip_positions": 7}),
        ("state", {}, {"min_firings": 2}),
        ("write", {"decoder": "dense", "encoder": "dense"}, {}),
    ],
)
def test_every_atom_has_the_median_cosine_of_its_own_firings(model, tokens, kind, options, settings):
    sae = make_sae(model, kind, **options)
    result = partition_atoms(model, sae, tokens, verbose=False, **settings)
    expected = cosines_by_atom(model, sae, tokens, settings.get("skip_positions", 0))
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


def test_the_summary_follows_from_the_records(model, tokens):
    result = partition_atoms(model, make_sae(model), tokens, thresholds=(-0.1, 0.0, 0.05), verbose=False)
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


def firings_of(cosines_of_atoms):
    """Firings of atoms 0, 1, ... with the given cosines."""
    rows = [(0, i, c) for i, cosines in enumerate(cosines_of_atoms) for c in cosines]
    return pd.DataFrame(rows, columns=["position", "atom", "cosine"])


def test_known_clusters_are_found():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.1, 0.05, 120), rng.normal(0.8, 0.07, 60)])
    records, split = partition._divide(firings_of(x[:, None]), 200, 1, seed=0)
    assert list(records["class"]) == ["bundle"] * 120 + ["register"] * 60 + ["dead"] * 20
    assert split.means == pytest.approx((x[:120].mean(), x[120:].mean()), abs=1e-3)
    assert split.deviations == pytest.approx((x[:120].std(), x[120:].std()), abs=2e-3)
    assert split.weights == pytest.approx((2 / 3, 1 / 3), abs=1e-3)
    bic = {k: statistics.mixture_bic(x, k) for k in (1, 2, 3, 4)}
    assert min(bic, key=bic.__getitem__) == 2
    assert statistics.split_stability(x, 5) == 1
    # At the threshold both weighted densities are equal.
    low, high = (
        w * stats.norm.pdf(split.threshold, m, d)
        for w, m, d in zip(split.weights, split.means, split.deviations, strict=True)
    )
    assert low == pytest.approx(high, rel=1e-6)
    # One cluster: two components are not worth their parameters.
    one = rng.normal(0.4, 0.1, 300)
    assert statistics.mixture_bic(one, 2) > statistics.mixture_bic(one, 1)


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
def test_too_few_atoms_or_equal_cosines_are_all_registers(cosines):
    records, split = partition._divide(firings_of([[c] for c in cosines]), 40, 1, seed=0)
    assert split is None
    assert (records["class"][: len(cosines)] == "register").all()
    assert (records["class"][len(cosines) :] == "dead").all()
    summary = partition._summarize(records, np.array(cosines), split, (0.3,), (1, 2, 3), 3, 0)
    assert summary["n_register"] == len(cosines)
    for name in ("delta_bic", "threshold", "stability", "mixture"):
        assert summary[name] is None
    assert list(summary["bic_by_order"]) == ["1"]
    assert summary["register_median_cosine"] == np.median(cosines)


def test_few_atoms_of_a_model_go_through_the_same_call(model, tokens, tmp_path):
    result = partition_atoms(model, make_sae(model, d_sae=3, k=1), tokens[:1], verbose=False)
    assert result.summary["delta_bic"] is None
    assert result.summary["n_register"] + result.summary["n_dead"] == 3
    result.save(tmp_path)  # the figure too
    # Orders with fewer than two atoms a component are left out.
    few = partition_atoms(model, make_sae(model, d_sae=6), tokens, orders=(2, 3, 4), verbose=False)
    alive = few.summary["n_register"] + few.summary["n_bundle"]
    assert list(few.summary["bic_by_order"]) == [str(k) for k in (2, 3, 4) if 2 * k <= alive]


def test_an_interrupted_run_resumes_to_the_same_result(model, tokens, tmp_path, monkeypatch):
    sae = make_sae(model)
    whole = partition_atoms(model, sae, tokens, verbose=False, seed=4)
    find, calls = partition.find_firings, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find(*args)

    monkeypatch.setattr(partition, "find_firings", stops)
    folder = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        partition_atoms(model, sae, tokens, verbose=False, progress_folder=folder, seed=4)
    resumed = partition_atoms(model, sae, tokens, verbose=False, progress_folder=folder, seed=4)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.records, whole.records)
    assert resumed.summary == whole.summary
    # The settings that only divide the atoms may change.
    again = partition_atoms(model, sae, tokens, verbose=False, progress_folder=folder, min_firings=2)
    assert len(calls) == 4
    assert again.summary["n_rare"] > 0
    with pytest.raises(WriteSAEError, match="other settings"):
        partition_atoms(model, sae, tokens[:2], verbose=False, progress_folder=folder)


def test_a_passage_without_firings_is_resumed_too(model, tokens, tmp_path):
    sae = make_sae(model)
    with torch.no_grad():
        sae.b_enc.zero_()
        name = sae.cfg.metadata.hook_name
        _, cache = model.run_with_cache(tokens[:, :4], names_filter=[name])
        strongest = sae.encode(cache[name]).amax((1, 2))  # of each passage
        sae.b_enc.fill_(-float(strongest.sort().values[:2].mean()))  # all of one passage are too small now
    sparse = partition_atoms(model, sae, tokens[:, :4], verbose=False, progress_folder=str(tmp_path))
    lengths = [len(pd.read_csv(path)) for path in tmp_path.glob("part_*.csv")]
    assert sorted(lengths)[0] == 0 < sparse.summary["n_firings"] == sum(lengths)
    again = partition_atoms(model, sae, tokens[:, :4], verbose=False, progress_folder=str(tmp_path))
    pd.testing.assert_frame_equal(again.records, sparse.records)


def test_saving_writes_records_summary_and_figure(model, tokens, tmp_path):
    result = partition_atoms(model, make_sae(model), tokens, verbose=False)
    result.save(tmp_path)
    read = pd.read_csv(tmp_path / "records.csv")
    pd.testing.assert_frame_equal(read, result.records, check_dtype=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    title = result.plot().axes[0].get_title(loc="left")
    assert title.startswith(f"{result.summary['n_register']} registers")


def test_bad_input_is_answered_in_one_line(model, tokens):
    sae, silent = make_sae(model), make_sae(model)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    cases = [
        (sae, {"min_firings": 0}, "min_firings=0 makes no sense"),
        (sae, {"orders": (0, 2)}, "orders=0 makes no sense"),
        (sae, {"n_seeds": 0}, "n_seeds=0 makes no sense"),
        (sae, {"seed": -1}, "seed=-1 makes no sense"),
        (sae, {"skip_positions": 99}, "left none"),
        (sae, {"min_firings": 9999}, "none min_firings=9999 times"),
        (silent, {}, "no atom fires"),
    ]
    for dictionary, options, message in cases:
        with pytest.raises(WriteSAEError, match=message) as caught:
            partition_atoms(model, dictionary, tokens, verbose=False, **options)
        assert "\n" not in str(caught.value)
