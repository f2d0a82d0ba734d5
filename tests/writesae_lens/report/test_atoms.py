"""The atoms' profiles and columns against plain loops."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.writesae_lens.report.conftest import HEAD, LAYER, N_ATOMS
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.report.atoms import Profiles, profiles
from writesae_lens.report.columns import COLUMNS, table_of_atoms


def test_tokens_signs_and_neighbours_are_those_of_plain_loops(model, sae, passages):
    cell = model.cell(LAYER, HEAD)
    profile = profiles(model, sae, cell, passages, n_tokens=5, n_near=3, verbose=False)
    name = f"blocks.{LAYER}.linear_attn.hook_read"
    with torch.no_grad():
        reads = (
            model.run_with_cache(passages, names_filter=[name])[1][name][:, :, HEAD].flatten(0, 1).double()
        )
    native = model.original_model
    output = native.model.layers[LAYER].linear_attn.out_proj.weight.double()
    output = output[:, HEAD * cell.d_v : (HEAD + 1) * cell.d_v]
    unembedding = native.get_output_embeddings().weight.double()
    matrices = sae.W_dec.detach().double().view(-1, cell.d_k, cell.d_v)
    flat = matrices.flatten(1) / matrices.flatten(1).norm(dim=1, keepdim=True)
    for atom in range(0, N_ATOMS, 173):
        left, _, right = torch.linalg.svd(matrices[atom])
        key, value = left[:, 0], right[0]
        share = float((reads @ key > 0).double().mean())
        if share < 0.5:
            key, value, share = -key, -value, 1 - share
        if abs(share - 0.5) > 1e-3:
            torch.testing.assert_close(profile.key[atom].double(), key, atol=1e-4, rtol=0)
            logits = unembedding @ (output @ value)
            torch.testing.assert_close(
                profile.logits[atom, :5].double(), logits.topk(5).values, atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                logits[profile.tokens[atom]], profile.logits[atom].double(), atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                profile.logits[atom, 5:].double(), logits.topk(5, largest=False).values, atol=1e-4, rtol=0
            )
        assert float(profile.read_share[atom]) == pytest.approx(share, abs=2e-3)
        cosines = flat @ flat[atom]
        cosines[atom] = 0
        best = cosines.abs().topk(3).values
        torch.testing.assert_close(profile.cosines[atom].abs().double(), best, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            cosines[profile.neighbours[atom]], profile.cosines[atom].double(), atol=1e-5, rtol=0
        )
    torch.testing.assert_close(profile.rank1_share, torch.ones(N_ATOMS), atol=1e-4, rtol=0)


def test_a_dense_dictionary_is_shown_by_its_leading_pairs(model, passages):
    cell = model.cell(LAYER, HEAD)
    torch.manual_seed(0)
    sae = WriteSAE(
        WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=12, k=2, encoder="dense", decoder="dense")
    )
    profile = profiles(model, sae, cell, passages[:2], n_near=20, verbose=False)
    matrices = sae.W_dec.detach().view(-1, cell.d_k, cell.d_v)
    sizes = torch.linalg.svdvals(matrices).square()
    torch.testing.assert_close(profile.rank1_share, sizes[:, 0] / sizes.sum(1), atol=1e-4, rtol=0)
    assert profile.neighbours.shape == (12, 11)


def test_columns_are_loops_over_the_records():
    partition = pd.DataFrame(
        {"atom": [0, 1, 2], "class": ["register", "bundle", "dead"], "n_firings": [3, 1, 0]}
    ).assign(median_cosine=[0.9, 0.2, np.nan])
    replacement = pd.DataFrame({"atom": [0, 0, 1], "kl_atom": [1.0, 3.0, 2.0], "kl_delete": [2.0, 2.0, 1.0]})
    contexts = pd.DataFrame(
        {"atom": [0, 0, 0, 2], "coefficient": [4.0, 5.0, 1.0, 7.0], "text": ["a", "b", "b", None]}
    )
    nothing = torch.zeros(3, 0)
    cosines = torch.tensor([[-0.5, 0.2], [0.1, 0.1], [0.3, -0.4]])
    profile = Profiles(*[nothing] * 7, cosines)
    table = table_of_atoms(partition, replacement, contexts, profile)
    assert list(table) == [column.key for column in COLUMNS]
    assert table.atom.tolist() == [0, 1, 2]
    assert table["class"].tolist() == ["register", "bundle", "dead"]
    assert table.n_firings.tolist() == [3, 1, 0]
    assert table.median_cosine.tolist()[:2] == [0.9, 0.2]
    assert table.nearest.tolist() == pytest.approx([0.5, 0.1, 0.4])
    alone = table_of_atoms(partition, replacement, contexts, profile._replace(cosines=nothing))
    assert alone.nearest.isna().all()
    assert table.win_rate.tolist()[:2] == [0.5, 0.0]
    assert table.recovered.tolist()[:2] == [0.0, -1.0]
    assert table.kl_atom.tolist()[:2] == [2.0, 2.0]
    assert table.coefficient.tolist()[::2] == [5.0, 7.0]
    assert table.token.tolist()[0] == "b"
    assert table.n_tested.tolist() == [2, 1, 0]
    assert table.loc[[1, 2], "token"].isna().all()
    floored = replacement.assign(kl_floor=[2.0, 0.1, 5.0])  # of a model in half precision
    table = table_of_atoms(partition, floored, contexts, profile)
    assert table.win_rate.tolist()[0] == 0.0
    assert table.win_rate.isna().tolist() == table.recovered.isna().tolist() == [False, True, True]
    # A firing of codes counts for its key code too.
    sides = partition.assign(side=["key", "value", "value"])
    codes = replacement.assign(atom=[1, 2, 1], key_code=0)
    table = table_of_atoms(sides, codes, contexts, profile)
    assert list(table)[:3] == ["atom", "side", "class"]
    assert table.n_tested.tolist() == [3, 2, 1]
    assert table.win_rate.tolist() == [pytest.approx(1 / 3), 0.5, 0.0]


def test_codes_have_the_neighbours_of_their_side_and_the_tokens_that_read_them(model, passages):
    cell = model.cell(LAYER, HEAD)
    torch.manual_seed(0)
    sizes = {"n_key": 10, "n_value": 14, "k_key": 2, "k_value": 2}
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, decoder="codes", **sizes))
    profile = profiles(model, sae, cell, passages[:6], n_tokens=5, n_near=3, verbose=False)
    name = f"blocks.{LAYER}.linear_attn.hook_read"
    with torch.no_grad():
        reads = model.run_with_cache(passages[:6], names_filter=[name])[1][name][:, :, HEAD].flatten(0, 1)
    tokens = passages[:6].flatten()
    often = [t for t in tokens.unique().tolist() if int((tokens == t).sum()) >= 3]
    for first, codes in ((0, sae.dec_key.detach()), (10, sae.dec_value.detach())):
        units = torch.nn.functional.normalize(codes, dim=-1)
        cosines = (units @ units.T).fill_diagonal_(0)
        near, found = cosines.abs().topk(3), slice(first, first + len(codes))
        torch.testing.assert_close(profile.cosines[found].abs(), near.values, atol=1e-5, rtol=0)
        assert set(profile.neighbours[found].flatten().tolist()) <= set(range(first, first + len(codes)))
        picked = cosines.gather(1, profile.neighbours[found] - first)
        torch.testing.assert_close(picked, profile.cosines[found], atol=1e-5, rtol=0)
    for code in range(10):
        unit = torch.nn.functional.normalize(sae.dec_key.detach()[code], dim=-1)
        along = (reads @ unit).square() / reads.square().sum(-1)
        shares = {t: float(along[tokens == t].mean()) for t in often}
        best = sorted(shares.values(), reverse=True)[:5]
        assert profile.logits[code, :5].tolist() == pytest.approx(best, rel=1e-4)
        assert [shares[t] for t in profile.tokens[code, :5].tolist()] == pytest.approx(best, rel=1e-4)
