"""KLs over later tokens against one full edited forward pass a firing and condition."""

import numpy as np
import pytest
import torch

from hooked_models import HookedModelError
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages, writes
from writesae_lens import WriteSAEError, baselines
from writesae_lens.experiments import later, replacement_test, swaps
from writesae_lens.saes.rank1 import Factors

LENGTH, HORIZON = 56, 8
# Cells below and above the attention layer of tiny-gdn, in a first and in a late layer.
CELLS = {"tiny-gdn": [(1, 3), (3, 2)], "tiny-mamba2": [(2, 7)], "tiny-rwkv7": [(0, 1)]}
# Mamba-2 computes its norms in float32 whatever its dtype is: what KLs of 1e-7 nats differ by there.
NOISE = 2e-10


def full_passes(model, passage, cell, positions, matrices, horizon, erase=True, kl="patched_base"):
    """KL at every firing's own position, and over the next ``horizon``: a plain edited pass each."""
    name, own, after = model.write_hook_name(cell.layer, cell.head), [], []
    with torch.no_grad():
        base = model(passage[None])[0].double().log_softmax(-1)
        for at, matrix in zip(positions, matrices, strict=True):

            def swap(x, hook, at=at, matrix=matrix):
                x = x.clone()
                x[:, at] = matrix.flatten()
                return x

            def remove(x, hook, at=at):
                x = x.clone()
                x[:, at] = 0
                return x

            hooks = [(name, swap)]
            if not erase and model.mixers[cell.layer].erases:
                hooks.append((name.replace("hook_write", "hook_erase"), remove))
            patched = model.run_with_hooks(passage[None], fwd_hooks=hooks)[0].double().log_softmax(-1)
            one, other = (base, patched) if kl == "base_patched" else (patched, base)
            values = (one.exp() * (one - other)).sum(-1)
            own.append(float(values[at]))
            after.append(float(values[at + 1 : at + 1 + horizon].sum()))
    return np.array(own), np.array(after)


def test_later_kls_are_those_of_full_edited_passes(model, monkeypatch):
    """At the first and the last possible token, near and far, in one pass and in many, of rank 1 and 3."""
    passage, positions = read_passages(model, 1, LENGTH)[0], [0, 1, 17, 40, LENGTH - HORIZON - 1]
    for layer, head in CELLS[model.cfg.model_name]:
        cell = model.cell(layer, head)
        native = writes(model, passage[None], layer, head)[0, positions]
        left, values, right = torch.linalg.svd(native, full_matrices=False)
        own = Factors((left[:, :, :1] * values[:, None, :1]).mT.float(), right[:, :1].float())
        torch.manual_seed(layer)
        other = Factors(torch.randn(len(positions), 3, cell.d_k), torch.randn(len(positions), 3, cell.d_v))
        given = [swaps.zeros_like(own), swaps.with_norm(other, own.norm())]
        for erase, kl, tokens in ((True, "patched_base", 2**13), (False, "base_patched", 100)):
            monkeypatch.setattr(later, "_TOKENS_PER_PASS", tokens)
            where = (model, cell, passage, torch.tensor(positions))
            found, floor = later.later_divergences(*where, own, given, HORIZON, kl, erase)
            assert found.shape == (2, len(positions))
            for kls, swap in zip(found, given, strict=True):
                matrices = swap.matrix().double()
                _, after = full_passes(model, passage, cell, positions, matrices, HORIZON, erase, kl)
                assert (after > floor.numpy()).all()
                assert np.median(after) > 1e-5
                np.testing.assert_allclose(kls, after, rtol=1e-4, atol=NOISE)


def test_the_native_write_in_its_own_place_stays_at_the_floor(gdn):
    passage, positions = read_passages(gdn, 1, LENGTH)[0], torch.arange(0, LENGTH - HORIZON, 3)
    key, value = (
        gdn.run_with_cache(passage[None], names_filter=[name])[1][name][0, positions, 2][:, None].detach()
        for name in gdn.write_factor_hook_names(1)[:2]
    )
    native = Factors(key, value)
    (kls,), floor = later.later_divergences(
        gdn, gdn.cell(1, 2), passage, positions, native, [native], HORIZON
    )
    assert bool((kls <= floor).all())
    assert 0 < float(floor.max()) < 1e-9


def test_records_with_a_horizon_are_full_edited_passes(model):
    """Of atoms: the own position and the later ones, of the dictionary and of the lookup."""
    passages, cell = read_passages(model, 2, 40), model.cell(1, 2)
    sae = make_sae(model)
    result = replacement_test(model, sae, passages, horizon=HORIZON, max_firings=8, verbose=False, seed=4)
    records = result.records
    assert records.position.max() < 40 - HORIZON
    lookup = baselines.lookup(model, 1, 2, 32, seed=4)
    atoms = sae.W_dec.detach().double()
    for n, part in records.groupby("passage"):
        at = part.position.tolist()
        native = writes(model, passages[n, None], 1, 2)[0, at]
        key, value = lookup.stand_in(native.flatten(1).float())
        matrices = {
            "delete": native * 0,
            "atom": (atoms[part.atom.tolist()] * torch.tensor(part.coefficient.tolist())[:, None]),
            "lookup": key[:, :, None] * value[:, None],
        }
        for name, matrix in matrices.items():
            own, after = full_passes(model, passages[n], cell, at, matrix.double(), HORIZON)
            np.testing.assert_allclose(part[f"kl_{name}"], own, rtol=1e-4, atol=NOISE)
            np.testing.assert_allclose(part[f"kl_{name}_later"], after, rtol=1e-4, atol=NOISE)
    both = records.kl_delete + records.kl_delete_later
    assert result.summary["own_share"] == pytest.approx((records.kl_delete / both).median())
    left = 1 - (records.kl_atom + records.kl_atom_later) / both
    assert result.summary["median_recovered_both"] == pytest.approx(left.median())
    after = 1 - records.kl_lookup_later.sum() / records.kl_delete_later.sum()
    (of_lookup,) = [row for row in result.summary["baselines"] if row["name"] == "lookup"]
    assert of_lookup["recovered_later"] == pytest.approx(after)


def test_records_of_codes_are_full_edited_passes(model):
    passages, cell, sae = read_passages(model, 1, 40), model.cell(1, 2), make_codes(model)
    result = replacement_test(
        model, sae, passages, horizon=HORIZON, max_firings=5, baselines=False, verbose=False
    )
    records, at = result.records, result.records.position.tolist()
    native = writes(model, passages, 1, 2)[0, at]
    with torch.no_grad():
        acts = sae.encode(native.flatten(1).float())
    matrices = []
    for row, own in zip(records.itertuples(), acts, strict=True):
        key = sum(own[i] * sae.dec_key[i] for i in range(16))
        value = sum(own[16 + j] * sae.dec_value[j] for j in range(16))
        matrices.append((key[:, None] * value[None]).detach().double())
        assert (row.key_code, row.atom) == (int(own[:16].argmax()), 16 + int(own[16:].argmax()))
        assert row.coefficient == pytest.approx(float(matrices[-1].norm()), rel=1e-4)
    own, after = full_passes(model, passages[0], cell, at, matrices, HORIZON)
    np.testing.assert_allclose(records.kl_atom, own, rtol=1e-4, atol=NOISE)
    np.testing.assert_allclose(records.kl_atom_later, after, rtol=1e-4, atol=NOISE)


def test_firings_without_enough_tokens_after_them_are_counted(gdn):
    passages, sae, how = read_passages(gdn, 2, 20), make_sae(gdn), {"baselines": False, "verbose": False}
    every = replacement_test(gdn, sae, passages, **how)
    some = replacement_test(gdn, sae, passages, horizon=7, **how)
    assert every.summary["n_without_horizon"] == 0
    assert every.summary["recovered_later"] is every.summary["own_share"] is None
    assert some.summary["n_without_horizon"] == (every.records.position > 12).sum()
    assert len(some.records) == (every.records.position <= 12).sum()
    for horizon, message in ((20, "have no position with 20 tokens after it"), (19, "horizon=19 left none")):
        with pytest.raises((WriteSAEError, HookedModelError), match=message):
            replacement_test(gdn, sae, passages, horizon=horizon, skip_positions=1, **how)
