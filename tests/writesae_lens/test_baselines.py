"""Other dictionaries: flat SVD, principal component, and sizes that match."""

from itertools import product

import numpy as np
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import (
    WriteSAE,
    WriteSAEConfig,
    WriteSAEError,
    WriteSAETrainingConfig,
    WriteTrainingSAE,
    baselines,
)
from writesae_lens.experiments import replacement_test

D_K, D_V, D_SAE, K = 6, 9, 40, 4


def spread(sae):
    """Every parameter somewhere else, and atoms of all norms."""
    torch.manual_seed(1)
    with torch.no_grad():
        for x in sae.parameters():
            x.copy_(torch.randn_like(x) * 0.3)
        atoms = sae.W_dec if isinstance(sae, TopKSAE) else sae.dec_matrix
        atoms.mul_(torch.rand(D_SAE, *[1] * (atoms.dim() - 1)) * 3 + 0.2)
    return sae


def flat_sae(**options):
    sae = TopKSAE(TopKSAEConfig(d_in=D_K * D_V, d_sae=D_SAE, k=K, **options))
    sae.cfg.metadata.hook_name = "blocks.1.linear_attn.hook_write.0"
    return spread(sae)


def dense_sae(**options):
    cfg = {"d_k": D_K, "d_v": D_V, "d_sae": D_SAE, "k": K, "encoder": "dense", "decoder": "dense"} | options
    return spread(WriteSAE(WriteSAEConfig(**cfg)))


@pytest.fixture
def inputs():
    torch.manual_seed(2)
    return torch.randn(200, D_K * D_V)


@torch.no_grad()
def contributions(sae, x):
    """What each atom adds to each reconstruction [input, atom, d_k, d_v], from decode alone."""
    acts = sae.encode(x)
    zero = sae.decode(torch.zeros(1, D_SAE))
    of_atoms = sae.decode(torch.eye(D_SAE)) - zero
    return acts[:, :, None, None] * of_atoms.view(D_SAE, D_K, D_V)


def check(flat, svd, x):
    with torch.no_grad():
        before, after = flat.encode(x), svd.encode(x)
    assert torch.equal(before != 0, after != 0)
    assert 0 < int((after != 0).sum(-1).max()) <= K
    whole, mine = contributions(flat, x), contributions(svd, x)
    left, values, right = np.linalg.svd(whole[before != 0].double().numpy(), full_matrices=False)
    leading = values[:, :1, None] * left[:, :, :1] * right[:, :1]
    np.testing.assert_allclose(mine[before != 0].numpy(), leading, rtol=1e-3, atol=1e-4)
    assert values[:, 1].min() > 1e-3  # the flat atoms were of higher rank
    torch.testing.assert_close(svd.b_dec, flat.b_dec)
    assert (svd.cfg.d_k, svd.cfg.d_v, svd.cfg.k, svd.cfg.d_sae) == (D_K, D_V, K, D_SAE)
    assert svd.cfg.decoder == "factored"
    assert svd.decoder_factors()[0].shape == (D_SAE, 1, D_K)


@pytest.mark.parametrize(("rescale", "b_dec"), product([False, True], [False, True]))
def test_flat_svd_of_saelens_topk_keeps_coefficients_and_selection(inputs, rescale, b_dec):
    flat = flat_sae(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=b_dec)
    before = {name: x.clone() for name, x in flat.state_dict().items()}
    svd = baselines.flat_svd(flat, D_K, D_V)
    assert all(torch.equal(x, before[name]) for name, x in flat.state_dict().items())
    check(flat, svd, inputs)
    with torch.no_grad():  # SAELens's rescaled coefficients are those of atoms of norm 1
        torch.testing.assert_close(svd.encode(inputs), flat.encode(inputs), rtol=1e-4, atol=1e-4)
    assert svd.cfg.metadata.hook_name == "blocks.1.linear_attn.hook_write.0"


@pytest.mark.parametrize("rescale", [False, True])
def test_flat_svd_of_a_dense_writesae_keeps_coefficients_and_selection(inputs, rescale):
    dense = dense_sae(rescale_acts_by_decoder_norm=rescale)
    svd = baselines.flat_svd(dense)
    check(dense, svd, inputs)
    with torch.no_grad():
        units = dense.W_dec.norm(dim=-1) if rescale else 1.0
        torch.testing.assert_close(svd.encode(inputs), dense.encode(inputs) * units, rtol=1e-4, atol=1e-4)


def test_rescaling_matters_to_what_is_selected(inputs):
    with torch.no_grad():
        plain, rescaled = (
            flat_sae(rescale_acts_by_decoder_norm=r).encode(inputs) != 0 for r in (False, True)
        )
    assert not torch.equal(plain, rescaled)


@pytest.mark.parametrize(
    ("make", "sides", "message"),
    [
        (flat_sae, (), "give d_k and d_v"),
        (flat_sae, (D_K,), "give d_k and d_v"),
        (flat_sae, (D_K, D_V + 1), "rows of 54 numbers"),
        (lambda: flat_sae(normalize_activations="layer_norm"), (D_K, D_V), "scales the inputs"),
        (lambda: dense_sae(activation="jumprelu"), (), "dense, with TopK"),
        (lambda: WriteSAE(WriteSAEConfig(d_k=6, d_v=9, d_sae=8)), (), "dense, with TopK"),
        (lambda: WriteSAE(WriteSAEConfig(d_k=6, d_v=9, d_sae=8, encoder="dense")), (), "dense, with TopK"),
    ],
)
def test_flat_svd_refuses_what_is_not_flat_and_topk(make, sides, message):
    with pytest.raises(WriteSAEError, match=message):
        baselines.flat_svd(make(), *sides)


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, :120].view(3, 40)


def writes_of(model, tokens, layer=1, head=2):
    name = model.write_hook_name(layer, head)
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name].flatten(0, 1)


def test_the_principal_component_is_numpys_leading_eigenvector(model, tokens):
    sae = baselines.principal_component(model, 1, 2, tokens)
    writes = writes_of(model, tokens).double().numpy()
    values, vectors = np.linalg.eigh(writes.T @ writes)
    assert values[-1] > 1.01 * values[-2]
    assert torch.equal(sae.W_dec[0], -sae.W_dec[1])
    plus = sae.W_dec[0].detach().double().numpy()
    np.testing.assert_allclose(plus * np.sign(plus @ vectors[:, -1]), vectors[:, -1], atol=1e-4)
    cell = model.cell(1, 2)
    assert (sae.cfg.d_k, sae.cfg.d_v, sae.cfg.d_sae) == (cell.d_k, cell.d_v, 2)
    assert sae.cfg.metadata.hook_name == model.write_hook_name(1, 2)
    assert sae.cfg.metadata.model_name == model.cfg.model_name


def test_one_of_the_two_atoms_fires_at_the_size_of_the_projection(model, tokens):
    sae = baselines.principal_component(model, 1, 2, tokens)
    writes = writes_of(model, tokens)
    with torch.no_grad():
        acts = sae.encode(writes)
        projection = writes.double() @ sae.W_dec[0].double()
    assert ((acts > 0).sum(-1) == 1).all()
    torch.testing.assert_close(acts.sum(-1).double(), projection.abs(), rtol=1e-3, atol=1e-6)
    assert torch.equal(acts[:, 0] > 0, projection > 0)
    records = replacement_test(model, sae, tokens, baselines=False, verbose=False).records
    assert len(records) == tokens.numel()
    np.testing.assert_allclose(records.coefficient, projection.abs(), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(records.atom, (projection < 0).long())
    norms = writes.double().norm(dim=-1)
    np.testing.assert_allclose(records.cosine, projection.abs() / norms, rtol=1e-3, atol=1e-5)


def test_of_many_writes_a_random_choice_counts(monkeypatch):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    text = zoo.held_out_text()[:600]
    monkeypatch.setattr(baselines, "_MAX_WRITES", 30)
    first, again, other = (
        baselines.principal_component(model, 1, 2, text, context_size=20, seed=s).W_dec for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 0, "x"), "no cell at layer 2"), ((1, 9, "x"), "head 9"), ((1, 0, "x"), "the text is too short")],
)
def test_no_principal_component_of_nothing(arguments, message):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    with pytest.raises(HookedModelError, match=message):
        baselines.principal_component(model, *arguments)


def test_the_lookups_stand_in_is_the_projection_onto_the_nearest_write_of_the_text(model, tokens):
    sae = baselines.lookup(model, 1, 2, 60, tokens, seed=3)
    writes = writes_of(model, tokens).double()
    atoms = sae.W_dec.detach().double()
    unit = writes / writes.norm(dim=-1, keepdim=True)
    assert (atoms @ unit.T).amax(-1).min() > 1 - 1e-5  # each atom is the direction of a write
    assert sae.cfg.d_sae == len(atoms.round(decimals=6).unique(dim=0)) == 60
    key, value = sae.stand_in(writes_of(model, tokens))
    along, nearest = (writes @ atoms.T).max(-1)
    expected = along[:, None] * atoms[nearest]
    found = (key[:, :, None] * value[:, None]).flatten(1).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(writes.norm(dim=-1).max()))
    # A write of the text that is an atom is its own stand-in.
    own = (atoms @ unit.T).argmax(-1)
    torch.testing.assert_close(found[own], writes[own], rtol=1e-3, atol=1e-5)
    assert baselines.lookup(model, 1, 2, 1000, tokens).cfg.d_sae == tokens.numel()
    records = replacement_test(model, sae, tokens, baselines=False, verbose=False).records
    assert records.kl_atom.median() < records.kl_delete.median()


def test_the_lookup_reads_the_shipped_training_part_by_default():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    first, again, other = (baselines.lookup(model, 1, 2, 16, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.dec_key, again.dec_key)
    assert not torch.equal(first.dec_key, other.dec_key)
    with pytest.raises(WriteSAEError, match="bilinear or tied"):
        baselines.matched_d_sae(WriteSAETrainingConfig(d_k=5, d_v=7, d_sae=60), "dense", "codes")


def count(sae):
    """Parameters of encoder, thresholds and atoms; the matrix B is the same in all."""
    return sum(x.numel() for name, x in sae.named_parameters() if name != "b_dec")


FAMILY = list(product(["bilinear", "tied", "dense"], ["factored", "dense"]))
CODES = [("bilinear", "codes"), ("tied", "codes")]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("own", [*FAMILY, *CODES])
def test_matched_dictionaries_have_as_many_parameters_at_most(own, rank):
    if rank > 1 and own in CODES:
        pytest.skip("codes have rank 1")
    sizes = {"d_k": 5, "d_v": 7, "k": 1, "rank": rank}
    cfg = WriteSAETrainingConfig(d_sae=60, encoder=own[0], decoder=own[1], **sizes)
    budget = count(WriteTrainingSAE(cfg))
    for encoder, decoder in FAMILY if rank > 1 else [*FAMILY, *CODES]:
        d_sae = baselines.matched_d_sae(cfg, encoder, decoder)

        def size(d_sae, encoder=encoder, decoder=decoder):
            options = {"d_sae": d_sae, "encoder": encoder, "decoder": decoder, **sizes}
            training = count(WriteTrainingSAE(WriteSAETrainingConfig(**options)))
            assert training == count(WriteSAE(WriteSAEConfig(**options)))
            return training

        assert size(d_sae) <= budget < size(d_sae + (2 if decoder == "codes" else 1)), (encoder, decoder)
    assert baselines.matched_d_sae(cfg, *own) == 60


def test_matched_dictionaries_have_an_atom_and_count_what_the_activation_learns():
    cfg = WriteSAETrainingConfig(d_k=30, d_v=30, d_sae=1, k=1, encoder="tied")
    assert baselines.matched_d_sae(cfg, "dense", "dense") == 1
    for activation in ("jumprelu", "gated"):
        sizes = {"d_k": 5, "d_v": 7, "k": 1, "activation": activation}
        cfg = WriteSAETrainingConfig(d_sae=60, encoder="dense", decoder="dense", **sizes)
        other = WriteSAETrainingConfig(
            d_sae=baselines.matched_d_sae(cfg, "tied", "factored"), encoder="tied", **sizes
        )
        assert count(WriteTrainingSAE(other)) <= count(WriteTrainingSAE(cfg))
