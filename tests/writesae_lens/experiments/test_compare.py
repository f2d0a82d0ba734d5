"""The comparison against full edited forward passes, and its table against plain numpy."""

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    bootstrap_interval,
    cached,
    encoded,
    is_rank_1,
    kl_nats,
    logits_with_swapped,
    make_sae,
    silenced,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import compare, replacement_test
from writesae_lens.experiments.stand_ins import TITLES

CONTROLS = ("atom", "gaussian", "orthogonal", "native_marginals")
UNTRAINED = ("lookup", "mean_key", "mean_value")
OPTIONS = [{}, {"scale": "matched_norm"}, {"kl": "base_patched"}]


def make(model, kind="write", **options):
    """An SAE whose atoms have various norms (of the kinds that may have)."""
    sae = make_sae(model, kind, **options)
    if kind != "flat":
        with torch.no_grad():
            sae.dec_key.mul_(torch.rand(sae.cfg.d_sae, 1, 1) + 0.5)
    return sae


def three_saes(model):
    rescaled = make(model, "flat", seed=2, rescale_acts_by_decoder_norm=True)
    return {"ours": make(model), "on states": make(model, "state", seed=1, rank=2), "flat": rescaled}


def by_name(edits, names):
    """Positions of a run with swapped writes, and matrices by the condition that they belong to."""
    parts = edits.matrices.unflatten(0, (len(names), -1))
    return edits.positions[: parts.shape[1]], dict(zip(names, parts, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_record_is_a_full_edited_forward_pass(model, tokens, swapped, options):
    saes = three_saes(model)
    names = [*saes, *UNTRAINED, *CONTROLS, "delete"]
    result = compare(model, saes, tokens, max_firings=8, seed=2, verbose=False, **options)
    records = result.records
    assert len(records) == 8 * len(names) == result.summary["n_firings"] * len(names)
    acts = {name: encoded(model, sae, tokens) for name, sae in saes.items()}
    numbers = sorted(records.passage.unique())
    assert len(swapped) == len(numbers)
    for n, edits in zip(numbers, swapped, strict=True):
        positions, given = by_name(edits, [*names, "native_random"])
        native, here = writes(model, tokens)[n, positions], records[records.passage == n]
        assert here[here.name == "delete"].position.tolist() == positions.tolist()
        expected = {name: given[name] for name in (*UNTRAINED, *CONTROLS)}
        expected["delete"] = torch.zeros_like(native)
        for name, sae in saes.items():
            coefficients, atoms = acts[name][n, positions].max(-1)
            matrices, mine = atoms_of(sae, model)[atoms], here[here.name == name]
            assert mine.atom.tolist() == atoms.tolist()
            np.testing.assert_allclose(mine.coefficient, coefficients, rtol=1e-4)
            norms = matrices.flatten(1).norm(dim=-1)
            size = coefficients / norms if name == "flat" else coefficients  # SAELens's are of norm 1
            if options.get("scale") == "matched_norm":
                size = native.flatten(1).norm(dim=-1) / norms
            expected[name] = matrices * size[:, None, None]

        def kl(matrices, n=n, positions=positions):
            patched, base = logits_with_swapped(model, tokens[n], positions, list(matrices))
            return kl_nats(base, patched) if options.get("kl") == "base_patched" else kl_nats(patched, base)

        delete, control = kl(expected["delete"]), kl(expected["atom"])
        at_native_norm = kl(given["native_random"])
        torch.testing.assert_close(
            given["native_random"].flatten(1).norm(dim=-1), native.flatten(1).norm(dim=-1), rtol=1e-4, atol=0
        )
        for name in names:
            mine = here[here.name == name]
            np.testing.assert_allclose(mine.kl, kl(expected[name]), rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.kl_delete, delete, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.kl_random, control, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.kl_native_random, at_native_norm, rtol=1e-4, atol=1e-9)
            assert mine.token.tolist() == tokens[n, positions].tolist()
            if name != "delete":
                cosine = torch.cosine_similarity(native.flatten(1), expected[name].flatten(1))
                np.testing.assert_allclose(mine.cosine, cosine, atol=1e-5)
        norms = expected["ours"].flatten(1).norm(dim=-1)
        for name in CONTROLS:
            torch.testing.assert_close(given[name].flatten(1).norm(dim=-1), norms, rtol=1e-4, atol=0)
            assert is_rank_1(given[name], 1e-5)
    nothing = records[records.name.isin([*UNTRAINED, *CONTROLS, "delete"])]
    assert set(records.key_code) == {-1}
    assert set(nothing.atom) == {-1}
    assert nothing.coefficient.isna().all()


def test_an_atom_of_an_sae_with_rescaling_is_written_as_the_sae_decodes_it(gdn, passages, swapped):
    sae = make(gdn, "flat", k=1, rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(32, 1) * 2 + 2)
    compare(gdn, {"flat": sae}, passages[:1], random=(), baselines=False, verbose=False)
    positions, matrices = by_name(swapped[0], ["flat", "delete"])
    with torch.no_grad():
        acts = encoded(gdn, sae, passages[:1]).float()
        decoded = (sae.decode(acts)[0, positions] - sae.b_dec).double()
    torch.testing.assert_close(matrices["flat"].flatten(1), decoded, rtol=1e-4, atol=1e-6)


def measured_figures(summary):
    """Names of what is recovered, win rates and their intervals, at all positions."""
    of = ("recovered", "median_recovered", "win_rate")
    names = [f"{name}{when}{end}" for name in of for when in ("", "_later", "_both") for end in ("", "_ci")]
    return [name for name in names if name in summary]


@pytest.mark.parametrize("options", [{}, {"scale": "matched_norm"}, {"kl": "base_patched"}, {"of": "codes"}])
def test_the_first_saes_numbers_are_the_replacement_tests(model, tokens, options):
    of_codes = "of" in options
    sae = make_sae(model, decoder="codes", k=4) if of_codes else make(model)
    options = {} if of_codes else options
    how = {"skip_positions": 3, "max_firings": 11, "seed": 4, "horizon": 4, "verbose": False} | options
    ours = compare(model, {"a": sae}, tokens, random=("gaussian",), **how)
    alone = replacement_test(model, sae, tokens, random="gaussian", **how)
    of = {name: part.reset_index(drop=True) for name, part in ours.records.groupby("name")}
    assert (of["a"].key_code >= 0).all() == of_codes
    for name in ("passage", "position", "token", "atom", "key_code", "coefficient", "cosine"):
        np.testing.assert_allclose(of["a"][name], alone.records[name], rtol=1e-4, atol=1e-6)
    others = ("delete", *UNTRAINED, *(("pursuit",) if of_codes else ()))
    names = {"a": "atom", "gaussian": "random"} | {name: name for name in others}
    for name, column in names.items():
        for when in ("", "_later"):
            expected = alone.records[f"kl_{column}{when}"]
            np.testing.assert_allclose(of[name][f"kl{when}"], expected, rtol=1e-4, atol=1e-9)
    rows = {row["name"]: row for row in ours.summary["table"]}
    shown = {"a": alone.summary} | {row["name"]: row for row in alone.summary["baselines"]}
    for name, summary in shown.items():
        if name != "random":
            for figure in measured_figures(summary):
                assert rows[name][figure] == pytest.approx(summary[figure], rel=1e-3), figure
    for figure in ("strict_chain_rate", "chain_over_ceiling"):
        assert rows["a"][figure] == pytest.approx(alone.summary[figure])
    assert ours.summary["chain_ceiling"] == alone.summary["chain_ceiling"]
    assert ours.summary["n_without_horizon"] == alone.summary["n_without_horizon"] == 2 * 4


def sometimes(model, tokens, seed, share):
    """An SAE that fires at this share of the positions."""
    sae = make(model, seed=seed)
    with torch.no_grad():
        norms = sae.get_W_dec_norm()
        strongest = (encoded(model, sae, tokens) * norms).amax(-1).flatten().sort().values
        silent = round((1 - share) * len(strongest))
        sae.b_enc.sub_(strongest[silent - 1 : silent + 1].mean() / norms)
    return sae


def test_only_positions_at_which_all_fire_are_compared(gdn, passages):
    saes = {
        "all": make(gdn),
        "most": sometimes(gdn, passages, 1, 0.7),
        "some": sometimes(gdn, passages, 2, 0.8),
    }
    jumping = make(gdn, seed=3, activation="jumprelu")
    strongest = encoded(gdn, jumping, passages).amax(-1).flatten()
    with torch.no_grad():
        for name, x in jumping.activation_fn.named_parameters():
            if "threshold" in name:
                x.fill_(float(strongest.quantile(0.3).log() if "log" in name else strongest.quantile(0.3)))
    saes["jumping"] = jumping
    fires = {name: encoded(gdn, sae, passages).amax(-1) > 0 for name, sae in saes.items()}
    shared = torch.stack(list(fires.values())).all(0)
    counts = sorted(int(f.sum()) for f in fires.values())
    assert 0 < int(shared.sum()) <= counts[0] < counts[-1] == passages.numel()
    result = compare(gdn, saes, passages, random=("orthogonal",), verbose=False)
    expected = shared.nonzero().tolist()
    for name in (*saes, "orthogonal", "delete"):
        part = result.records[result.records.name == name]
        assert part[["passage", "position"]].to_numpy().tolist() == expected
    coverage = {row["name"]: row["coverage"] for row in result.summary["table"]}
    assert coverage["all"] == 1
    for name, f in fires.items():
        assert coverage[name] == pytest.approx(float(f.double().mean()))
    assert coverage["orthogonal"] is None
    assert result.summary["n_firings"] == len(expected)


def test_the_table_and_the_figure_show_what_the_records_hold(gdn, passages):
    saes = three_saes(gdn)
    result = compare(gdn, saes, passages, random=("atom", "gaussian"), verbose=False)
    table = {row["name"]: row for row in result.summary["table"]}
    assert list(table) == [*saes, *UNTRAINED, "atom", "gaussian", "delete"]
    kl = {name: part.kl.to_numpy() for name, part in result.records.groupby("name")}
    for name, row in table.items():
        assert row["median_kl"] == pytest.approx(np.median(kl[name]))
        assert row["kl_over_delete"] == pytest.approx(np.median(kl[name]) / np.median(kl["delete"]))
        if name == "delete":
            assert row["win_rate"] is row["win_rate_ci"] is row["median_cosine"] is None
        else:
            wins, ratio = kl[name] < kl["delete"], kl[name] / kl["delete"]
            assert row["win_rate"] == pytest.approx(np.mean(wins))
            assert row["recovered"] == pytest.approx(1 - kl[name].sum() / kl["delete"].sum())
            assert row["median_recovered"] == pytest.approx(np.median(1 - ratio))
            passage = result.records.passage[result.records.name == name]
            groups = [wins[passage == n] for n in passage.unique()]
            assert row["win_rate_ci"] == pytest.approx(bootstrap_interval(groups, np.mean), abs=1e-6)
            if name in saes:
                chain = wins & (kl["delete"] < kl["atom"])
                assert row["strict_chain_rate"] == pytest.approx(np.mean(chain))
            cosines = result.records.cosine[result.records.name == name]
            assert row["median_cosine"] == pytest.approx(np.median(cosines))
        if name == "ours":
            assert row["first_is_nearer"] is None
        else:
            assert row["first_is_nearer"] == pytest.approx(np.mean(kl["ours"] < kl[name]))
    assert table["delete"]["kl_over_delete"] == 1
    for name in ("ours", "flat"):
        assert f"{name} {table[name]['win_rate']:.1%}" in result.headline
        assert f"{name} {table[name]['median_recovered']:.1%}" in result.headline
    assert f"lookup {table['lookup']['median_recovered']:.1%}" in result.headline
    labels = [label.get_text() for axis in result.plot().axes for label in axis.get_yticklabels()]
    assert {TITLES.get(name, name.replace("_", " ")) for name in table} <= set(labels)


@pytest.mark.parametrize("kind", ["atom", "orthogonal", "native_marginals"])
def test_controls_are_of_their_kind_here_and_in_the_replacement_test(model, tokens, swapped, kind):
    """Norms are equal in both, and ranks 1 (see above): what is left is the direction."""
    sae = make(model)
    factors = [cached(model, tokens, name)[:, :, HEAD] for name in model.write_factor_hook_names(LAYER)[:2]]
    how = {"baselines": False, "verbose": False}
    compare(model, {"a": sae, "b": make(model, seed=1)}, tokens, random=(kind,), **how)
    replacement_test(model, sae, tokens, random=kind, **how)
    compared, replaced = (
        ["a", "b", kind, "delete", "native_random"],
        ["a", "delete", kind, "native_random", "atom_matched"],
    )
    assert len(swapped) == 4
    for edits, names in zip(swapped, (compared, compared, replaced, replaced), strict=True):
        positions, matrices = by_name(edits, names)
        own, other = matrices["a"].flatten(1), matrices[kind].flatten(1)
        torch.testing.assert_close(other.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=0)
        n = [passage.tolist() for passage in tokens].index(edits.passage)
        if kind == "atom":
            units = torch.nn.functional.normalize(atoms_of(sae, model).flatten(1), dim=-1)
            cosines, which = (torch.nn.functional.normalize(other, dim=-1) @ units.T).max(-1)
            assert float(cosines.min()) > 1 - 1e-5
            assert not bool((which == encoded(model, sae, tokens)[n, positions].argmax(-1)).any())
            assert len(set(which.tolist())) > 3
            continue
        sides = torch.linalg.svd(matrices[kind], full_matrices=False)
        for side, factor in zip((sides.U[..., 0], sides.Vh[..., 0, :]), factors, strict=True):
            native = factor[n].double()
            if kind == "orthogonal":
                cosine = torch.cosine_similarity(side, native[positions], dim=-1)
                assert float(cosine.abs().max()) < 1e-5
            else:
                check_marginals(side, native, positions)


def check_marginals(side, native, positions):
    """Up to one number, each coordinate is that coordinate of another native write of the passage."""
    for row, position in zip(side, positions.tolist(), strict=True):
        others = native[[t for t in range(len(native)) if t != position]]
        # The number is that of some write and the first coordinate; take the one that explains the most.
        scales = others[:, 0] / row[0]
        same = ((row * scales[:, None])[:, None] - others).abs() < 1e-4 * others.abs() + 1e-9
        explained = same.any(1)  # [scale, coordinate]
        assert bool(explained.all(-1).any())
        assert not bool(same[explained.all(-1)].all(-1).any())  # coordinates are drawn one by one


@pytest.mark.parametrize("kind", ["orthogonal", "native_marginals"])
def test_the_replacement_tests_random_writes_are_full_edited_forward_passes(model, tokens, swapped, kind):
    how = {"random": kind, "baselines": False, "verbose": False}
    records = replacement_test(model, make(model), tokens[:1], **how).records
    names = ["atom", "delete", "random", "native_random", "atom_matched"]
    positions, matrices = by_name(swapped[0], names)
    patched, base = logits_with_swapped(model, tokens[0], positions, list(matrices["random"]))
    np.testing.assert_allclose(records.kl_random, kl_nats(patched, base), rtol=1e-4, atol=1e-9)


def test_native_marginals_draw_from_all_of_the_passages_writes(gdn, passages):
    how = {"random": "native_marginals", "scale": "matched_norm", "max_firings": 1, "verbose": False}
    assert replacement_test(gdn, make(gdn), passages[:1], **how).records.kl_random[0] > 1e-6


def test_a_control_given_twice_counts_once(gdn, passages):
    result = compare(gdn, {"a": make(gdn)}, passages, random=("gaussian", "gaussian"), verbose=False)
    assert result.summary["n_firings"] == int((result.records.name == "a").sum())


def test_saes_that_cannot_be_compared_are_refused(gdn, passages):
    sae = make(gdn)
    for saes, options, message in (
        ({}, {}, "no SAEs to compare"),
        ({"a": sae, "b": make(gdn, head=1)}, {}, "^b belong to another"),
        ({"gaussian": sae}, {}, "gaussian are reserved names"),
        ({"a": sae, "delete": make(gdn, seed=1)}, {}, "delete are reserved names"),
        ({"lookup": sae}, {}, "lookup are reserved names"),
        ({"a": sae}, {"horizon": 20}, "no firing that is tested has horizon=20 tokens after it"),
        ({"a": sae, "b": silenced(make(gdn, seed=1))}, {}, "nothing fires"),
        ({"a": sae}, {"skip_positions": 20}, "left none"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            compare(gdn, saes, passages, verbose=False, **options)


def test_saes_that_fire_but_never_together_are_refused(gdn, passages):
    a, b = silenced(make(gdn)), silenced(make(gdn, seed=1))
    with torch.no_grad():
        # One atom each, which looks for one side and for the other: their signs are opposite.
        b.enc_key[0], b.enc_value[0] = -a.enc_key[0], a.enc_value[0]
        a.b_enc[0] = b.b_enc[0] = 0
    for sae in (a, b):
        assert bool((encoded(gdn, sae, passages) > 0).any())
    with pytest.raises(WriteSAEError, match="the SAEs fire, but at no position all of them"):
        compare(gdn, {"a": a, "b": b}, passages, verbose=False)


def test_seeds_change_the_controls_and_nothing_else(gdn, passages, tmp_path):
    saes, how = {"a": make(gdn), "b": make(gdn, seed=1)}, {"verbose": False}
    one, other = (compare(gdn, saes, passages, seed=s, **how).records for s in (1, 2))
    for name, part in one.groupby("name"):
        same = np.allclose(part.kl, other.kl[other.name == name], rtol=1e-9)
        assert same == (name in ("a", "b", "delete")), name  # the lookup and the means are drawn too
    # Names belong to the settings that finished parts depend on.
    compare(gdn, saes, passages, progress_folder=str(tmp_path), **how)
    with pytest.raises(WriteSAEError, match="other settings"):
        compare(gdn, {"b": saes["a"], "a": saes["b"]}, passages, progress_folder=str(tmp_path), **how)
