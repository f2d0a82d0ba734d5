"""The SAE against the dense formulas of the paper."""

import copy

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from tests.writesae_lens.saes.steps import step_input
from writesae_lens import (
    WriteSAE,
    WriteSAEError,
    WriteSAETrainingConfig,
    WriteTrainingSAE,
)


def dense_parts(sae):
    """Encoder [F, K, V], unit atoms [F, K, V], biases: straight from the parameters."""
    encoder = torch.einsum("frk,frv->fkv", sae.enc_key, sae.enc_value)
    atoms = torch.einsum("frk,frv->fkv", sae.dec_key, sae.dec_value)
    if sae.cfg.rank > 1:  # further ranks are balanced before the atom is normalised
        key, value = sae.dec_key, sae.dec_value
        size = key.norm(dim=-1, keepdim=True) * value.norm(dim=-1, keepdim=True)
        unit = torch.nn.functional.normalize(key, dim=-1), torch.nn.functional.normalize(value, dim=-1)
        atoms = torch.einsum("frk,frv->fkv", unit[0] * size, unit[1])
    atoms = atoms / atoms.flatten(1).norm(dim=1)[:, None, None]
    return encoder, atoms, sae.b_enc, sae.b_dec.view(sae.cfg.d_k, sae.cfg.d_v)


def dense_encode(sae, x):
    encoder, _, b_enc, _ = dense_parts(sae)
    z = torch.einsum("nkv,fkv->nf", x.unflatten(-1, (sae.cfg.d_k, -1)), encoder) + b_enc
    top = z.topk(sae.cfg.k, dim=-1)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu()), z


def dense_losses(sae, x, dead):
    _, atoms, _, bias = dense_parts(sae)
    acts, z = dense_encode(sae, x)
    matrices = x.unflatten(-1, (sae.cfg.d_k, -1))
    residual = matrices - torch.einsum("nf,fkv->nkv", acts, atoms) - bias
    losses = {"mse_loss": residual.square().sum((1, 2)).mean()}
    if dead.any():
        pool = dead.nonzero().squeeze(-1)
        top = z[:, pool].topk(min(sae.cfg.k_aux, len(pool)), dim=-1)
        weights = torch.zeros_like(z[:, pool]).scatter(-1, top.indices, top.values)
        rebuilt = torch.einsum("nd,dkv->nkv", weights, atoms[pool])
        scale = sae.cfg.aux_loss_coefficient * min(1.0, len(pool) / sae.cfg.k_aux)
        losses["aux"] = scale * (residual.detach() - rebuilt).square().sum((1, 2)).mean()
    best = atoms[acts.argmax(-1)]
    cosine = torch.nn.functional.cosine_similarity(best.flatten(1), x, dim=1)
    fires = acts.amax(-1) > 0
    losses["alignment"] = (
        sae.cfg.write_alignment_coefficient * x.square().sum(1).mean() * (1 - cosine)[fires].mean()
    )
    return losses


VARIANTS = [
    {},
    {"rank": 2},
    {"decoder_bias": True, "encoder_bias": True},
    {"k_aux": 5, "aux_loss_coefficient": 0.3},
    {"k": 40, "encoder_bias": True, "decoder_bias": True, "rank": 3},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("full_rank", [False, True])
def test_losses_and_gradients_equal_the_dense_ones(make_sae, writes, options, full_rank):
    sae = make_sae(**options)
    x = writes + torch.randn_like(writes) if full_rank else writes
    dead = torch.arange(40) % 3 == 0
    output = sae.training_forward_pass(step_input(x, dead=dead))
    expected = dense_losses(sae, x, dead)
    torch.testing.assert_close(output.losses["mse_loss"], expected["mse_loss"])
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], expected["aux"])
    torch.testing.assert_close(output.losses["write_alignment_loss"], expected["alignment"])
    named = {n: p for n, p in sae.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(output.loss, list(named.values()))
    theirs = torch.autograd.grad(sum(expected.values()), list(named.values()))
    for name, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    acts, z = dense_encode(sae, x)
    torch.testing.assert_close(output.feature_acts, acts)
    torch.testing.assert_close(output.hidden_pre, z)


@pytest.mark.parametrize("options", VARIANTS)
def test_encode_and_decode_equal_the_dense_formulas(make_sae, writes, options):
    sae = make_sae(**options)
    full = writes + torch.randn_like(writes)
    _, atoms, _, bias = dense_parts(sae)
    for x in (writes, full, writes.view(2, 4, 4, -1), torch.zeros(1, 54, dtype=torch.float64)):
        acts, _ = dense_encode(sae, x.reshape(-1, 54))
        torch.testing.assert_close(sae.encode(x), acts.view(*x.shape[:-1], -1))
        expected = torch.einsum("nf,fkv->nkv", acts, atoms) + bias
        torch.testing.assert_close(sae.decode(sae.encode(x)), expected.flatten(1).view_as(x))
    key, value = writes.view(32, 6, 9)[:, :, 0], writes.view(32, 6, 9)[:, 0] / writes[:, :1]
    torch.testing.assert_close(sae.encode_factors(key, value), dense_encode(sae, writes)[0])


def test_matrix_views_are_the_factors_built(make_sae):
    sae = make_sae(rank=2)
    encoder, atoms, _, _ = dense_parts(sae)
    torch.testing.assert_close(sae.W_dec, atoms.flatten(1))
    torch.testing.assert_close(sae.W_enc, encoder.flatten(1).T)
    key, value = sae.decoder_factors()
    assert key.shape == (40, 2, 6)
    torch.testing.assert_close(torch.einsum("frk,frv->fkv", key, value), atoms)
    key, value = make_sae().decoder_factors()
    torch.testing.assert_close(key.norm(dim=-1), torch.ones(40, 1, dtype=torch.float64))
    torch.testing.assert_close(value.norm(dim=-1), torch.ones(40, 1, dtype=torch.float64))


def test_inactive_atoms_have_gradients_through_decode(make_sae):
    sae = make_sae()
    acts = torch.zeros(1, 40, dtype=torch.float64, requires_grad=True)
    target = torch.randn(54, dtype=torch.float64)
    (grad,) = torch.autograd.grad((sae.decode(acts)[0] * target).sum(), acts)
    torch.testing.assert_close(grad[0], dense_parts(sae)[1].flatten(1) @ target)


def test_encode_is_differentiable_in_its_input(make_sae, writes):
    sae = make_sae()
    x = writes.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sae.encode(x).sum(), x)
    expected = (sae.encode(writes) > 0).double() @ dense_parts(sae)[0].flatten(1)
    torch.testing.assert_close(grad, expected)


def test_biases_are_learned_only_when_asked_for(make_sae):
    for learned in (False, True):
        sae = make_sae(encoder_bias=learned, decoder_bias=learned)
        assert (sae.b_enc.requires_grad, sae.b_dec.requires_grad) == (learned, learned)


def test_training_is_the_same_at_any_scale_of_the_writes(make_sae, writes):
    """Losses go with the square of the scale, coefficients with the scale: nothing has a unit of its own."""
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc.zero_()
    dead = torch.arange(40) % 3 == 0
    one, small = (sae.training_forward_pass(step_input(c * writes, dead=dead)) for c in (1.0, 1e-3))
    torch.testing.assert_close(small.feature_acts, 1e-3 * one.feature_acts)
    torch.testing.assert_close(small.loss, 1e-6 * one.loss)


def test_logging_steps_get_the_reconstruction_and_others_say_that_they_have_none(make_sae, writes):
    sae = make_sae(decoder_bias=True)
    output = sae.training_forward_pass(step_input(writes, logging=True))
    torch.testing.assert_close(output.sae_out, sae.decode(output.feature_acts))
    assert sae.training_forward_pass(step_input(writes)).sae_out.isnan().all()


def test_normalised_inputs_take_the_stock_path(make_sae, writes):
    options = {"write_alignment_coefficient": 0.0, "aux_loss_coefficient": 0.0}
    sae = make_sae(normalize_activations="constant_norm_rescale", **options)
    output = sae.training_forward_pass(step_input(writes))
    factor = 54**0.5 / writes.norm(dim=1, keepdim=True)
    acts, _ = dense_encode(sae, writes * factor)
    rebuilt = (acts @ dense_parts(sae)[1].flatten(1)) / factor
    expected = (writes - rebuilt).square().sum(1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], expected)


def test_atoms_start_as_writes_and_loaded_ones_are_left_alone(writes):
    sae = WriteTrainingSAE(WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=40, k=4))
    batch = writes.float()
    batch[0] = 0
    sae.training_forward_pass(step_input(batch))
    expected = torch.nn.functional.normalize(batch[1:], dim=1)
    torch.testing.assert_close(sae.W_dec[:31].abs(), expected.abs(), atol=1e-5, rtol=1e-4)
    sae.training_forward_pass(step_input(batch))  # directions that have an atom get no second one
    assert not torch.isclose(sae.W_dec[31:].abs(), expected[:9].abs(), atol=1e-3).all(1).any()
    more = (torch.randn(32, 6, 1) * torch.randn(32, 1, 9)).flatten(1)
    sae.training_forward_pass(step_input(more))
    expected = torch.nn.functional.normalize(more, dim=1)
    torch.testing.assert_close(sae.W_dec[31:].abs(), expected[:9].abs(), atol=1e-5, rtol=1e-4)

    loaded = WriteTrainingSAE(WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=40, k=4))
    loaded.load_state_dict(sae.state_dict())
    loaded.training_forward_pass(step_input(torch.randn(32, 6, 1).mul(torch.randn(32, 1, 9)).flatten(1)))
    torch.testing.assert_close(loaded.W_dec, sae.W_dec)


def test_save_load_copy_and_move(make_sae, writes, tmp_path):
    sae = make_sae(rank=2, decoder_bias=True).to(dtype=torch.float32)
    sae.cfg.metadata.hook_name = "blocks.1.linear_attn.hook_write.0"
    sae.save_inference_model(tmp_path / "inference")
    loaded = SAE.load_from_disk(tmp_path / "inference")
    assert isinstance(loaded, WriteSAE)
    assert loaded.cfg.metadata.hook_name == sae.cfg.metadata.hook_name
    x = writes.float()
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), sae.decode(sae.encode(x)))
    to_train_on = TrainingSAE.load_from_disk(tmp_path / "inference", "cpu")
    assert isinstance(to_train_on, WriteTrainingSAE)
    assert torch.equal(to_train_on.encode(x), sae.encode(x))
    held = to_train_on.W_dec.clone()
    to_train_on.training_forward_pass(step_input(x))  # its atoms do not start from inputs again
    assert torch.equal(to_train_on.W_dec, held)
    sae.save_model(tmp_path / "training")
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    assert isinstance(again, WriteTrainingSAE)
    assert again.cfg.to_dict() == sae.cfg.to_dict()
    twin = copy.deepcopy(loaded).to(dtype=torch.float64)
    assert twin.cfg.dtype == "float64"
    assert twin.encode(x).dtype == torch.float64
    assert set(again.state_dict()) == {*loaded.state_dict(), "progress"}


def test_bad_activations_are_named(make_sae, writes):
    with pytest.raises(WriteSAEError, match="6 x 9 matrices, last axis 54"):
        make_sae().encode(writes[:, :50])
    writes[3, 3] = float("inf")
    with pytest.raises(WriteSAEError, match="not finite"):
        make_sae().training_forward_pass(step_input(writes))


def test_autocast_keeps_the_factored_path_and_its_precision(writes):
    torch.manual_seed(0)
    sae = WriteTrainingSAE(WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=16, k=4))
    x = writes.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward_pass(step_input(x))
    output.loss.backward()
    assert output.sae_out.isnan().all()  # the factored path builds none
    torch.testing.assert_close(sae.W_dec, torch.nn.functional.normalize(x[:16], dim=1) * torch.sign(
        (sae.W_dec * x[:16]).sum(1, keepdim=True)), atol=1e-5, rtol=1e-4)  # fmt: skip
    torch.testing.assert_close(output.losses["mse_loss"], dense_losses(sae, x, torch.zeros(16))["mse_loss"])


def test_empty_batches(make_sae):
    sae = make_sae()
    empty = torch.zeros(0, 54, dtype=torch.float64)
    assert sae.encode(empty).shape == (0, 40)
    assert sae.decode(sae.encode(empty)).shape == (0, 54)


def test_saelens_command_line_builds_our_config_and_still_the_others():
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    arguments = ["--architecture", "writesae", "--d_k", "32", "--d_v", "48", "--d_sae", "256", "--k", "4"]
    sae = _parse_cfg_args(arguments).sae
    assert isinstance(sae, WriteSAETrainingConfig)
    assert (sae.d_in, sae.d_sae, sae.k) == (32 * 48, 256, 4)
    assert _parse_cfg_args(["--architecture", "topk", "--k", "7"]).sae.k == 7


def test_no_dead_atoms_take_part_where_k_aux_is_0(make_sae, writes):
    output = make_sae(k_aux=0).training_forward_pass(
        step_input(writes, dead=torch.ones(40, dtype=torch.bool))
    )
    assert output.losses["auxiliary_reconstruction_loss"] == 0
