"""The replacement test against full edited forward passes of the same model."""

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_models import HookedRecurrent
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    column,
    encoded,
    kl_nats,
    logits_with_swapped,
    make_codes,
    make_sae,
    read_passages,
    writes,
)
from writesae_lens import WriteSAEError, baselines, measures
from writesae_lens.experiments import replacement_test
from writesae_lens.measures import CONDITIONS
from writesae_lens.report.sections import section


@pytest.mark.parametrize(
    ("options", "kind", "sae_options"),
    [
        ({}, "write", {"layer": 0, "head": 1}),
        ({"scale": "matched_norm"}, "state", {"head": 1}),
        ({"kl": "base_patched"}, "write", {"layer": 3, "head": 1, "rank": 2}),
        ({"replaces": "update"}, "write", {"layer": 3, "head": 1}),
        ({}, "flat", {}),
    ],
)
def test_every_condition_is_a_full_edited_forward_pass(model, tokens, options, kind, sae_options):
    sae = make_sae(model, kind, **sae_options)
    cell = model.site(sae.cfg.metadata.hook_name).cell
    how = {"max_firings": 9, "baselines": False, "verbose": False, "seed": 3}
    result = replacement_test(model, sae, tokens, **how, **options)
    assert len(result.records) == 9
    for n, part in result.records.groupby("passage"):
        at = column(part, "position")
        assert part.token.tolist() == tokens[n, at].tolist()
        native = writes(model, tokens[n, None], cell.layer, cell.head)[0, at]
        atoms = atoms_of(sae, model)[column(part, "atom")]
        norms = native.flatten(1).norm(dim=-1)
        size = column(part, "coefficient")
        if options.get("scale") == "matched_norm":
            size = norms / atoms.flatten(1).norm(dim=-1)
        atoms = atoms * size[:, None, None]
        np.testing.assert_allclose(part.write_norm, norms, rtol=1e-4)
        cosines = torch.cosine_similarity(native.flatten(1), atoms.flatten(1))
        np.testing.assert_allclose(part.cosine, cosines, atol=1e-4)
        for name, matrices in (("atom", atoms), ("delete", atoms * 0)):
            erase = options.get("replaces") != "update"
            patched, base = logits_with_swapped(
                model, tokens[n], at, list(matrices), cell.layer, cell.head, erase
            )
            swap = options.get("kl") == "base_patched"
            expected = kl_nats(base, patched) if swap else kl_nats(patched, base)
            np.testing.assert_allclose(part[f"kl_{name}"], expected, atol=1e-4, rtol=1e-3)


def test_every_firing_is_tested_with_the_saes_own_coefficient_and_atom(gdn, passages):
    sae = make_sae(gdn)
    records = replacement_test(gdn, sae, passages, baselines=False, verbose=False).records
    acts = encoded(gdn, sae, passages)
    assert len(records) == int((acts.amax(-1) > 0).sum())
    acts = acts[column(records, "passage"), column(records, "position")]
    np.testing.assert_array_equal(records.atom, acts.argmax(-1))
    np.testing.assert_allclose(records.coefficient, acts.amax(-1), rtol=1e-4)


@pytest.mark.parametrize("random", ["gaussian", "atom"])
def test_random_matrices_have_the_atoms_norm(gdn, passages, swapped, random):
    sae = make_sae(gdn)
    records = replacement_test(gdn, sae, passages[:1], random=random, baselines=False, verbose=False).records
    (edits,) = swapped
    atom, delete, other, at_native, matched = edits.matrices.flatten(1).norm(dim=1).chunk(5)
    torch.testing.assert_close(other, atom, rtol=1e-4, atol=1e-6)
    assert (delete == 0).all()
    native = torch.tensor(records.write_norm.tolist(), dtype=torch.float64)
    torch.testing.assert_close(at_native, native, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(matched, native, rtol=1e-4, atol=1e-6)


def test_the_summary_and_the_figure_show_what_the_records_hold(gdn, passages):
    result = replacement_test(gdn, make_sae(gdn), passages, verbose=False)
    records, summary = result.records, result.summary
    wins = records.kl_atom < records.kl_delete
    assert summary["win_rate"] == pytest.approx(wins.mean())
    chain = wins & (records.kl_delete < records.kl_random)
    assert summary["strict_chain_rate"] == pytest.approx(chain.mean())
    medians = [records[f"kl_{name}"].median() for name in CONDITIONS]
    assert [summary[f"median_kl_{name}"] for name in CONDITIONS] == pytest.approx(medians)
    assert summary["kl_ratio_atom_delete_random"] == pytest.approx([m / medians[0] for m in medians])
    assert summary["n_atoms"] + summary["n_atoms_never_dominant"] == 32
    assert summary["n_firings"] == len(records)
    assert summary["median_recovered"] == pytest.approx((1 - records.kl_atom / records.kl_delete).median())
    matched = records.kl_atom_matched < records.kl_delete
    assert summary["win_rate_matched_norm"] == pytest.approx(matched.mean())
    ceiling = (records.kl_delete < records.kl_native_random).mean()
    assert summary["chain_ceiling"] == pytest.approx(ceiling)
    assert summary["chain_over_ceiling"] == pytest.approx(chain.mean() / ceiling)
    names = [row["name"] for row in summary["baselines"]]
    assert names == ["lookup", "mean_key", "mean_value", "random"]
    for row in summary["baselines"]:
        kl = records[f"kl_{row['name']}"]
        assert row["recovered"] == pytest.approx(1 - kl.sum() / records.kl_delete.sum())
        assert row["win_rate"] == pytest.approx((kl < records.kl_delete).mean())
    assert f"{summary['win_rate']:.1%}" in result.headline
    assert summary["train_text"].endswith("train part")


def whole_and_tenth(model, kind):
    """Training writes as a dictionary, and a tenth of it; of codes: their sides, four active on each.

    Untrained codes overlap, so the gain of four is well below 1.
    """
    saes = [baselines.lookup(model, LAYER, HEAD, 1024) for _ in range(2)]
    if kind == "codes":
        key, value = (side[:, 0] for side in saes[0].decoder_factors())
        options = {"encoder": "tied", "n_key": 1024, "n_value": 1024, "k_key": 4, "k_value": 4}
        saes = [make_codes(model, **options) for _ in range(2)]
        with torch.no_grad():
            for sae in saes:
                sae.dec_key.copy_(key)
                sae.dec_value.copy_(value)
                sae.sign_key.copy_(key.mean(0))
                sae.sign_value.copy_(value.mean(0))
                sae.enc_gain.fill_(0.3)
    saes[1].enc_gain.data[-1] *= 0.1  # of codes: the values'
    return saes


@pytest.fixture(scope="module", params=["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def in_float32(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.mark.parametrize("kind", ["atoms", "codes"])
def test_a_tenth_of_a_dictionary_loses_in_every_headline_measure_but_win_rates(in_float32, kind):
    """What the paper's win rate rewards, shrinking, no figure of what is recovered does."""
    passages = read_passages(in_float32, 2, 40)
    whole, tenth = whole_and_tenth(in_float32, kind)
    how = {"horizon": 16, "max_firings": 24, "baselines": False, "verbose": False}
    first, second = (replacement_test(in_float32, sae, passages, **how) for sae in (whole, tenth))
    np.testing.assert_allclose(second.records.coefficient, first.records.coefficient / 10, rtol=1e-4)
    for when in measures.WHEN:
        for name in ("median_recovered", "recovered"):
            assert second.summary[name + when] < first.summary[name + when], name + when
            assert f"{first.summary[name + when]:.1%}" in first.headline or when == "_both"
    # At matched norm both are the same stand-in.
    np.testing.assert_allclose(
        second.records.kl_atom_matched, first.records.kl_atom_matched, rtol=1e-3, atol=5e-9
    )


def test_an_sae_that_fires_rarely_says_so(gdn, passages):
    sae = make_sae(gdn, activation="jumprelu")
    with torch.no_grad():
        sae.activation_fn.log_threshold.fill_(-30.0)
        strongest = (encoded(gdn, sae, passages) * sae.get_W_dec_norm()).amax(-1)
        sae.activation_fn.log_threshold.fill_(float(strongest.quantile(0.8).log()))
        share = float((encoded(gdn, sae, passages) > 0).any(-1).double().mean())
    result = replacement_test(gdn, sae, passages, baselines=False, verbose=False)
    assert 0 < share < 0.5
    assert result.summary["coverage"] == pytest.approx(share)
    assert f"the SAE fires at {share:.1%} of the positions" in result.headline
    always = replacement_test(gdn, make_sae(gdn), passages[:1], max_firings=2, baselines=False, verbose=False)
    assert always.summary["coverage"] == 1
    assert "fires at" not in always.headline


def test_thinning_keeps_a_subset(gdn):
    sae, passages = make_sae(gdn), read_passages(gdn, 3, 40)
    how = {"baselines": False, "verbose": False}
    full = replacement_test(gdn, sae, passages, seed=5, **how).records
    few = replacement_test(gdn, sae, passages, max_firings_per_atom=2, skip_positions=10, **how).records
    assert few.groupby("atom").size().max() <= 2
    assert few.position.min() >= 10
    joined = few.merge(full, on=["passage", "position"], suffixes=("", "_full"))
    assert len(joined) == len(few)
    np.testing.assert_allclose(joined.kl_delete, joined.kl_delete_full, atol=1e-9, rtol=1e-3)
    with pytest.raises(WriteSAEError, match="skip_positions left none"):
        replacement_test(gdn, sae, passages, skip_positions=40, verbose=False)


def test_a_damaged_part_is_computed_again_and_another_dtype_is_another_model(gdn, passages, tmp_path):
    sae, how = make_sae(gdn), {"baselines": False, "verbose": False, "progress_folder": str(tmp_path)}
    whole = replacement_test(gdn, sae, passages, **how).records
    (tmp_path / "part_000001.csv").write_text("")
    again = replacement_test(gdn, sae, passages, **how).records
    pd.testing.assert_frame_equal(again, whole, check_dtype=False)
    other = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.bfloat16)
    with pytest.raises(WriteSAEError, match="other settings"):
        replacement_test(other, sae, passages, **how)


@pytest.mark.parametrize(
    ("replaces", "words"), [("write", "The native write of"), ("update", "erase and write")]
)
def test_the_report_names_what_was_replaced(gdn, passages, replaces, words):
    result = replacement_test(
        gdn, make_sae(gdn), passages[:1], replaces=replaces, baselines=False, verbose=False
    )
    assert words in " ".join(section(result)["method"])
