"""Codes between the steps of SAELens's own trainer: starts, resampling, moments, metrics."""

import pytest
import torch

from tests.writesae_lens.saes.steps import D_K, D_V, packed, step_input
from tests.writesae_lens.saes.test_training import advance, moments, trainer, writes
from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saes import codes
from writesae_lens.saes.packed import PackedWrites, Write
from writesae_lens.saes.rank1 import Factors

N_KEY, N_VALUE = 12, 16
ENCODERS, ACTIVATIONS = ("bilinear", "tied"), ("topk", "batchtopk", "jumprelu")


def make(**options):
    torch.manual_seed(0)
    sizes = {"n_key": N_KEY, "n_value": N_VALUE, "k_key": 2, "k_value": 2, "decoder": "codes"}
    return WriteTrainingSAE(WriteSAETrainingConfig(**({"d_k": D_K, "d_v": D_V} | sizes | options)))


def sides(x, sae):
    """Unit keys and unit values by singular values, with the signs that the SAE has chosen."""
    left, _, right = torch.linalg.svd(x.view(-1, D_K, D_V).double(), full_matrices=False)
    sign = torch.where(
        left[:, :, 0] @ sae.sign_key.double() + right[:, 0] @ sae.sign_value.double() < 0, -1.0, 1.0
    )[:, None]
    return (left[:, :, 0] * sign).float(), (right[:, 0] * sign).float()


def nearest(vectors, to):
    return (vectors[:, None] - to[None]).norm(dim=-1).min(dim=1).values


def unexplained(sae, x):
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("kind", ["writes", "states"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_codes_start_as_the_sides_of_the_first_inputs(encoder, kind):
    sae, batch = make(encoder=encoder), writes(32, 3, 1 if kind == "writes" else 3)
    batch[0] = 0
    sae.training_forward_pass(step_input(batch))
    keys, values = sides(batch[1:], sae)
    torch.testing.assert_close(sae.dec_key.detach(), keys[:N_KEY], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.dec_value.detach(), values[:N_VALUE], atol=1e-4, rtol=1e-4)
    norms = batch[1:].view(-1, D_K, D_V).double().svd().S[:, 0].float()
    for mean, of in ((sae.mean_key, keys), (sae.mean_value, values * norms[:, None])):
        torch.testing.assert_close(mean, of.mean(0) / of.mean(0).norm(), atol=1e-4, rtol=1e-4)
    assert sae.progress.tolist() == [N_KEY, 1, N_VALUE]
    if encoder == "bilinear":  # each encoder is its code, at one size a side, at which the sums fit
        for name, of in (("key", keys), ("value", values)):
            code, encoders = getattr(sae, f"dec_{name}").detach(), getattr(sae, f"enc_{name}").detach()
            share = encoders.norm(dim=1)
            torch.testing.assert_close(encoders, share[:, None] * code)
            along = of @ code.T
            coded = along.topk(2).values.relu()
            indices = along.topk(2).indices
            rebuilt = torch.stack([(a[:, None] * code[i]).sum(0) for a, i in zip(coded, indices)])
            best = (coded * along.topk(2).values).sum() / rebuilt.square().sum()
            torch.testing.assert_close(share, best.clamp(max=1.0).expand_as(share), atol=1e-4, rtol=1e-4)


def test_most_keys_keep_the_sign_that_they_came_with():
    batch = packed(writes(64, 5))
    key = batch.blocks[0].key + 1.0  # a mean that is far from zero
    for sign in (1, -1):
        sae = make()
        sae.training_forward_pass(step_input(PackedWrites(Write(sign * key, batch.blocks[0].value))))
        assert float(sign * sae.mean_key.sum()) > 0


def test_directions_that_have_a_code_get_no_second_one_and_later_batches_start_the_rest():
    sae, batch = make(), writes(8, 3)
    for _ in range(2):
        sae.training_forward_pass(step_input(batch))
    assert sae.progress.tolist() == [8, 2, 8]
    more = writes(32, 4)
    sae.training_forward_pass(step_input(more))
    keys, values = sides(more, sae)
    torch.testing.assert_close(sae.dec_key[8:].detach(), keys[: N_KEY - 8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.dec_value[8:].detach(), values[: N_VALUE - 8], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_dead_codes_start_anew_a_side_inside_the_stock_trainer(encoder, activation):
    """They become sides of inputs, their moments are zero there, the others' untouched."""
    sae = make(
        encoder=encoder, activation=activation, encoder_bias=True, resample_every=5, renormalize_every=0
    )
    run = trainer(sae, [])
    advance(run, writes(32, 0))
    killed = torch.tensor([1, 4, N_KEY + 2, N_KEY + 9])
    with torch.no_grad():
        sae.b_enc[killed] = -1e4
    for n in range(1, 5):
        advance(run, writes(32, n))
    dead = run.dead_neurons.nonzero().flatten()
    assert set(dead.tolist()) >= set(killed.tolist())
    names = [n for n, p in sae.named_parameters() if p.requires_grad and n != "b_dec"]
    before = {name: moments(run, name) for name in names}
    batch, seen = writes(32, 99), {}

    def look(optimizer, args, kwargs):
        seen["codes"] = sae.dec_key.detach().clone(), sae.dec_value.detach().clone()
        seen["grads"] = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}

    handle = run.optimizer.register_step_pre_hook(look)
    advance(run, batch)
    handle.remove()
    of = {"key": dead[dead < N_KEY], "value": dead[dead >= N_KEY] - N_KEY}
    for name, found, truth in zip(("key", "value"), seen["codes"], sides(batch, sae)):
        assert float(nearest(found[of[name]], truth).max()) < 1e-4
    assert sae.n_resampled == len(dead)
    for name in names:
        side = "key" if "key" in name else "value"
        rows = dead if name == "b_enc" else of[side]
        (first, second), gradient = moments(run, name), seen["grads"][name]
        old_first, old_second = before[name]
        old_first[rows], old_second[rows] = 0, 0
        torch.testing.assert_close(first, 0.9 * old_first + 0.1 * gradient, msg=name)
        torch.testing.assert_close(second, 0.999 * old_second + 0.001 * gradient**2, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_stock_trainer_lowers_the_error(encoder, activation):
    sae = make(encoder=encoder, activation=activation, later_reads=(1,))
    rng = torch.Generator().manual_seed(8)
    centres = [torch.randn(6, d, generator=rng) for d in (D_K, D_V)]

    def batch():
        key, value = (c[torch.randint(6, (32,), generator=rng)][:, None] for c in centres)
        return PackedWrites(Write(key + 0.1 * torch.randn(32, 1, D_K, generator=rng), value))

    held_out = batch().dense()
    run = trainer(sae, [], lr=4e-3, lr_end=4e-3)
    advance(run, batch())
    before = unexplained(sae, held_out)
    for _ in range(60):
        advance(run, batch())
    assert unexplained(sae, held_out) < (0.15 if encoder == "bilinear" else 0.9 * before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gain_of_a_tied_encoder_follows_the_batches(activation):
    """Every ten steps it has least squared error for the codes that are active, on each side."""
    sae, x = make(encoder="tied", activation=activation, encoder_bias=True), writes(32, 2)
    sae.training_forward_pass(step_input(x))
    with torch.no_grad():
        sae.enc_gain.copy_(torch.tensor([0.1, 0.2]))
        sae.activation_fn.key.fold(3.0)
        sae.b_enc += 0.001
        sae.progress[1] = 9
        before = sae.encode(x)
    sae.training_forward_pass(step_input(x))
    with torch.no_grad():
        after = sae.encode(x)
    norms = x.view(-1, D_K, D_V).double().svd().S[:, 0].float()[:, None]
    targets, gain = sides(x, sae), torch.tensor([0.1, 0.2])
    for n, (name, side) in enumerate((("key", slice(N_KEY)), ("value", slice(N_KEY, None)))):
        acts = before[:, side] / (norms if n else 1)
        coded = acts @ getattr(sae, f"dec_{name}").detach()
        best = float((coded * targets[n]).sum() / coded.square().sum())
        change = min(best * float(gain[n]), 1.0) / float(gain[n])
        assert change != pytest.approx(1, rel=0.1)
        torch.testing.assert_close(after[:, side], change * before[:, side], rtol=1e-3, atol=1e-5)


def test_renormalisation_leaves_the_function_and_puts_codes_at_norm_1():
    sae, x = make(renormalize_every=7, init_from_writes=False), writes(32, 2)
    with torch.no_grad():
        sae.dec_key *= 2
        sae.dec_value *= 3
        sae.progress.copy_(torch.tensor([N_KEY, 7, N_VALUE]))
        before = sae(x)
        sae._before_step(sae._rows(x), None)
        torch.testing.assert_close(sae(x), before)
        for side in (sae.dec_key, sae.dec_value):
            torch.testing.assert_close(side.norm(dim=1), torch.ones(len(side)))


def test_metrics_of_logging_steps():
    sae, x = make(), writes(32, 2)
    dead = torch.arange(N_KEY + N_VALUE) % 5 == 0
    output = sae.training_forward_pass(step_input(x, dead=dead, logging=True))
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(output.sae_out, x, dim=1).mean()
    assert output.metrics["write_cosine"] == pytest.approx(float(cosine), rel=1e-4)
    assert output.metrics["dead_atoms"] == int(dead.sum())
    assert output.metrics["alive_atoms"] == int((~dead).sum())
    assert sae.training_forward_pass(step_input(x)).sae_out.isnan().all()
    assert sae.log_histograms()["weights/encoder_norms"].shape == (N_KEY + N_VALUE,)


def test_writes_keep_the_models_own_signs_where_key_and_value_tell_them():
    """Keys whose mean is near zero, with values that follow the key's sign: the mean key cannot tell."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    axis, own = normal(D_K), torch.where(normal(512, 1) < 0, -1.0, 1.0)
    key = own * axis + 0.1 * normal(512, D_K)
    value = own * normal(D_V) + 0.1 * normal(512, D_V)
    value[:, 0] += 1.0  # native signs: this channel is mostly positive
    directions = codes.sign_directions(Factors(key[:, None], value[:, None]))
    x = torch.cat([torch.nn.functional.normalize(side.double(), dim=1) for side in (key, value)], dim=1)
    moments = sum(torch.outer(row, row) for row in x) / 512
    ridge = moments.trace() / 512 * torch.eye(D_K + D_V).double()
    truth = torch.linalg.solve(moments + ridge, x.mean(0))
    torch.testing.assert_close(torch.cat(directions).double(), truth, rtol=1e-3, atol=1e-4)
    unit = codes.split(Factors(key[:, None], value[:, None]), *directions)
    assert float(((unit.key * key).sum(1) > 0).double().mean()) > 0.95
    turned = codes.split(Factors(-key[:, None], -value[:, None]), *directions)
    torch.testing.assert_close(turned.key, unit.key)
    torch.testing.assert_close(turned.value, unit.value)
