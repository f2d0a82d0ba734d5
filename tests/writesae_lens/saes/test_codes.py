"""Codes against their documentation restated: plain loops over writes and codes, in float64."""

import copy
import math

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from tests.writesae_lens.saes.steps import COEFFICIENTS, D_K, D_V, packed, step_input
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saes.packed import PackedWrites, Write

N_KEY, N_VALUE, K_KEY, K_VALUE = 20, 24, 3, 2
D_SAE, N_ROWS, N_READS = N_KEY + N_VALUE, 32, 3
ENCODERS, ACTIVATIONS = ("bilinear", "tied"), ("topk", "batchtopk", "jumprelu")
DEAD = torch.arange(D_SAE) % 3 == 0


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def writes(seed=1, n=N_ROWS):
    return (randn(n, D_K, 1, seed=seed) * randn(n, 1, D_V, seed=seed + 100)).flatten(1)


def states(seed=1):
    return writes(seed) + 0.3 * randn(N_ROWS, D_K * D_V, seed=seed + 200)


def make(**options):
    """Codes in training, every parameter off its start, and all of them started."""
    torch.manual_seed(0)
    sizes = {"n_key": N_KEY, "n_value": N_VALUE, "k_key": K_KEY, "k_value": K_VALUE}
    cfg = WriteSAETrainingConfig(d_k=D_K, d_v=D_V, decoder="codes", **(sizes | {"k_aux": 4} | options))
    sae = WriteTrainingSAE(cfg).to(dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name in ("key", "value"):
            mean = torch.randn_like(getattr(sae, f"mean_{name}"))
            getattr(sae, f"mean_{name}").copy_(mean / mean.norm())
        if sae.cfg.encoder == "tied":
            sae.enc_gain.copy_(torch.tensor([0.7, 0.6]))
        if sae.cfg.activation == "batchtopk":
            for side in sae.activation_fn.sides:
                side.log_threshold.fill_(math.log(0.4))
        sae.progress.copy_(torch.tensor([N_KEY, 0, N_VALUE]))
    return sae


class Oracle:
    """Codes as their documentation has them, on leaves of its own."""

    def __init__(self, sae):
        self.cfg, self.sae = sae.cfg, sae
        parameters = {n: (p.detach().clone(), p.requires_grad) for n, p in sae.named_parameters()}
        self.leaves = {n: p.requires_grad_(learnt) for n, (p, learnt) in parameters.items()}

    def split(self, x):
        """Unit keys, unit values and norms; of states those of the leading singular pair."""
        left, size, right = torch.linalg.svd(x.view(-1, D_K, D_V), full_matrices=False)
        keys, values = left[:, :, 0].clone(), right[:, 0].clone()
        for n in range(len(x)):
            side = keys[n] @ self.sae.sign_key + values[n] @ self.sae.sign_value
            sign = 0 if size[n, 0] == 0 else -1 if side < 0 else 1
            keys[n], values[n] = sign * keys[n], sign * values[n]
        return keys, values, size[:, 0]

    def codes(self, side):
        raw = self.leaves[f"dec_{side}"]
        return raw / raw.square().sum(1).sqrt()[:, None]

    def scores(self, side, targets):
        """Of codes of norm 1."""
        if self.cfg.encoder == "tied":
            encoder = self.codes(side) * self.sae.enc_gain[("key", "value").index(side)]
        else:
            encoder = self.leaves[f"enc_{side}"]
        first = slice(0, N_KEY) if side == "key" else slice(N_KEY, None)
        norms = self.leaves[f"dec_{side}"].detach().square().sum(1).sqrt()
        return targets @ encoder.T + norms * self.leaves["b_enc"][first]

    def activate(self, side, z):
        k = K_KEY if side == "key" else K_VALUE
        if self.cfg.activation == "topk":
            kept = torch.zeros_like(z)
            for n, row in enumerate(z.tolist()):
                kept[n, sorted(range(len(row)), key=lambda i, row=row: -row[i])[:k]] = 1
            return z.relu() * kept
        if self.cfg.activation == "batchtopk" and self.sae.training:
            kept = torch.zeros_like(z)
            kept.view(-1)[z.detach().relu().flatten().argsort(descending=True)[: k * len(z)]] = 1
            return z.relu() * kept
        return z * (z > self.leaves[f"activation_fn.{side}.log_threshold"].detach().exp())

    def sides(self, x):
        """For each side: targets, codes, scores, coefficients, sums of codes; all of unit key and value."""
        keys, values, norms = self.split(x)
        found = {}
        for side, targets in (("key", keys), ("value", values)):
            z = self.scores(side, targets)
            acts = self.activate(side, z)
            found[side] = targets, self.codes(side), z, acts, acts @ self.codes(side)
        return found, norms

    def encode(self, x):
        found, norms = self.sides(x)
        rows = []
        for n in range(len(x)):
            a = found["key"][3][n] / self.leaves["dec_key"].norm(dim=1)
            b = norms[n] * found["value"][3][n] / self.leaves["dec_value"].norm(dim=1)
            rows.append(torch.cat([a, b]) * (norms[n] > 1e-300))
        return torch.stack(rows).detach()

    def decode(self, acts):
        rows = []
        for row in acts:
            key, value = torch.zeros(D_K).double(), torch.zeros(D_V).double()
            for i in range(N_KEY):
                key = key + row[i] * self.leaves["dec_key"][i]
            for j in range(N_VALUE):
                value = value + row[N_KEY + j] * self.leaves["dec_value"][j]
            rows.append(torch.outer(key, value).flatten())
        return torch.stack(rows)

    def losses(self, x, dead, reads):
        cfg, (found, norms) = self.cfg, self.sides(x)
        size = norms.square().mean()
        losses = {"mse_loss": 0.0, "auxiliary_reconstruction_loss": 0.0, "read_alignment_loss": 0.0}
        first = 0
        for targets, codes, z, _, coded in found.values():
            losses["mse_loss"] += size * (targets - coded).square().sum(1).mean()
            pool = [i for i in range(len(codes)) if dead[first + i]]
            for n in range(len(x)):
                best = sorted(pool, key=lambda i, n=n, z=z: -float(z[n, i].detach()))[: cfg.k_aux]
                left = (targets[n] - coded[n]).detach() - sum(z[n, i] * codes[i] for i in best)
                share = cfg.aux_loss_coefficient * min(1, len(pool) / cfg.k_aux) / len(x)
                losses["auxiliary_reconstruction_loss"] += size * share * left.square().sum()
            first += len(codes)
        for n in range(len(x)):
            key, value = found["key"][4][n], found["value"][4][n]
            native = torch.outer(found["key"][0][n], found["value"][0][n])
            missed = sum(((torch.outer(key, value) - native).T @ r).square().sum() for r in reads[n])
            power = sum((native.T @ r).square().sum() for r in reads[n])
            if power > 0:
                e = missed / power
                losses["read_alignment_loss"] += cfg.read_alignment_coefficient * size * e / (1 + e) / len(x)
        if cfg.activation == "jumprelu":
            losses["l0_loss"] = 0.0
            for side, k in (("key", K_KEY), ("value", K_VALUE)):
                l0 = (found[side][3] > 0).sum(1).double().mean()
                losses["l0_loss"] += COEFFICIENTS["l0"] * size * (l0 / k - 1) ** 2
        return losses


def reads_of(n=N_ROWS):
    reads = randn(n, N_READS, D_K, seed=7)
    reads[3, 1:] = 0  # the passage ends
    reads[4] = 0  # nobody reads it
    return reads


def with_reads(x):
    return PackedWrites(packed(x).blocks[0]._replace(reads=reads_of(len(x))))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_coefficients_and_stand_ins_are_those_of_the_formulas(encoder, activation, bias):
    sae = make(encoder=encoder, activation=activation, encoder_bias=bias)
    oracle = Oracle(sae)
    for x in (writes(), states(), 1e5 * writes(), torch.cat([writes(), torch.zeros(2, D_K * D_V)])):
        with torch.no_grad():
            expected = oracle.encode(x)
            torch.testing.assert_close(sae.encode(x), expected)
            rebuilt = oracle.decode(expected)
            torch.testing.assert_close(sae.decode(expected), rebuilt)
            torch.testing.assert_close(sae(x), rebuilt)
            key, value = sae.stand_in(x.view(2, -1, D_K * D_V))
            torch.testing.assert_close((key[..., None] * value[..., None, :]).view(x.shape), rebuilt)
    x = writes()
    block = packed(x).blocks[0]
    expected = oracle.encode(x)
    for c in (1.0, -1.0, 3.0):
        key, value = c * block.key, block.value / c
        torch.testing.assert_close(sae.encode(PackedWrites(Write(key, value))), expected)
        torch.testing.assert_close(sae.encode_factors(key[:, 0], value[:, 0]), expected)
    assert (sae.key_codes, sae.value_codes) == (range(N_KEY), range(N_KEY, D_SAE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_losses_and_gradients_are_those_of_the_formulas(encoder, activation):
    sae = make(encoder=encoder, activation=activation, aux_loss_coefficient=0.3, encoder_bias=True)
    oracle, x = Oracle(sae), writes()
    with torch.no_grad():
        held = oracle.encode(x)
    output = sae.training_forward_pass(step_input(with_reads(x), dead=DEAD, logging=True))
    expected = oracle.losses(x, DEAD, reads_of())
    assert set(output.losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, msg=lambda m, n=name: f"{n}: {m}")
    norms = torch.cat([oracle.leaves[f"dec_{side}"].norm(dim=1) for side in ("key", "value")]).detach()
    torch.testing.assert_close(output.feature_acts, held * norms)
    torch.testing.assert_close(output.sae_out, oracle.decode(held).detach())
    if activation == "jumprelu":
        return  # the thresholds' straight-through estimates are no derivatives of the formulas
    names = [n for n, p in sae.named_parameters() if p.requires_grad]
    ours = torch.autograd.grad(output.loss, [dict(sae.named_parameters())[n] for n in names])
    theirs = torch.autograd.grad(sum(expected.values()), [oracle.leaves[n] for n in names])
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_few_active_codes_of_many_have_the_same_gradients():
    """The backward pass that looks at nonzero entries alone."""
    sae = make(n_key=600, n_value=700, k_key=2, k_value=2, init_from_writes=False)
    x = writes()
    grads = []
    for dense in (False, True):
        key, value, norm = Oracle(sae).split(x)
        if dense:
            loss = 0.0
            for target, code, encoder in (
                (key, sae.dec_key, sae.enc_key),
                (value, sae.dec_value, sae.enc_value),
            ):
                z = target @ encoder.T
                acts = torch.zeros_like(z).scatter(-1, z.topk(2).indices, z.topk(2).values.relu())
                loss = loss + (target - acts @ (code / code.norm(dim=1)[:, None])).square().sum(1).mean()
            loss = loss * norm.square().mean()
        else:
            sae.progress.copy_(torch.tensor([600, 0, 700]))
            loss = sae.training_forward_pass(step_input(packed(x))).losses["mse_loss"]
        parameters = (sae.dec_key, sae.dec_value, sae.enc_key, sae.enc_value)
        grads.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_down_the_gradient_lowers_the_loss_by_as_much_as_it_says():
    sae, x = make(read_alignment_coefficient=3.0), writes()
    parameters = [p for p in sae.parameters() if p.requires_grad]
    grads = torch.autograd.grad(sae.training_forward_pass(step_input(with_reads(x))).loss, parameters)

    def loss(step):
        moved = copy.deepcopy(sae)
        with torch.no_grad():
            for p, g in zip([p for p in moved.parameters() if p.requires_grad], grads, strict=True):
                p -= step * g
        return float(moved.training_forward_pass(step_input(with_reads(x))).loss.detach())

    slope = (loss(-1e-7) - loss(1e-7)) / 2e-7
    assert slope == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-4)


def test_the_errors_of_both_sides_are_the_stand_ins_where_they_are_small():
    """mse_loss in shares of |X|^2 against |X - X^|^2 / |X|^2, for codes that are nearly right."""
    x = writes(n=8)
    sae = make(n_key=8, n_value=8, k_key=1, k_value=1)
    oracle = Oracle(sae)
    key, value, norm = oracle.split(x)
    with torch.no_grad():
        for name, target in (("key", key), ("value", value)):
            code = target + 1e-3 * randn(*target.shape, seed=5)
            getattr(sae, f"dec_{name}").copy_(code / code.norm(dim=1, keepdim=True))
            getattr(sae, f"enc_{name}").copy_(target)
        sae.progress.copy_(torch.tensor([8, 0, 8]))
    output = sae.training_forward_pass(step_input(packed(x), logging=True))
    relative = ((output.sae_out - x).square().sum(1) / norm.square()).mean()
    share = output.losses["mse_loss"].detach() / norm.square().mean()
    assert float(share) == pytest.approx(float(relative), rel=0.01)


def test_a_write_that_nobody_reads_has_no_read_term_and_without_reads_there_is_none():
    sae, x = make(), writes()
    silent = PackedWrites(packed(x).blocks[0]._replace(reads=torch.zeros(N_ROWS, 2, D_K).double()))
    assert sae.training_forward_pass(step_input(silent)).losses["read_alignment_loss"] == 0
    for given in (x, packed(x)):
        assert "read_alignment_loss" not in sae.training_forward_pass(step_input(given)).losses


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_larger_write_has_larger_value_coefficients_and_the_same_key(activation, inference, tmp_path):
    sae, x = make(activation=activation, encoder_bias=True), writes()
    if inference:
        sae.save_inference_model(tmp_path)
        sae = SAE.load_from_disk(tmp_path, dtype="float64")
    with torch.no_grad():
        one, larger = sae.encode(x), sae.encode(1e4 * x)
    torch.testing.assert_close(larger[:, :N_KEY], one[:, :N_KEY])
    torch.testing.assert_close(larger[:, N_KEY:], 1e4 * one[:, N_KEY:])


def test_topk_keeps_so_many_of_each_side():
    sae = make(k_key=5, k_value=1)
    with torch.no_grad():
        sae.enc_key.abs_()
        acts = sae.encode(states())
    assert int((acts[:, :N_KEY] > 0).sum(1).max()) <= 5
    assert bool(((acts[:, N_KEY:] > 0).sum(1) == 1).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_folds_change_no_function(encoder, activation):
    given = {"normalize_activations": "expected_average_only_in", "encoder_bias": True}
    sae, x = make(encoder=encoder, activation=activation, **given), states()
    with torch.no_grad():
        acts, out, norms = sae.encode(x), sae(x), sae.W_dec.norm(dim=1)
        torch.testing.assert_close(sae.get_W_dec_norm(), norms)
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae.encode(x), acts * norms)
        torch.testing.assert_close(sae(x), out)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())
        acts = sae.encode(x)
        sae.fold_activation_norm_scaling_factor(7.3)
        torch.testing.assert_close(sae.encode(x / 7.3), acts)
        torch.testing.assert_close(sae(x / 7.3) * 7.3, out)
    assert sae.cfg.normalize_activations == "none"


def test_matrix_views_are_the_codes_beside_the_cells_means():
    sae, x = make(encoder_bias=True), writes()
    mean_key, mean_value = sae.mean_key, sae.mean_value
    rows = [torch.outer(u, mean_value).flatten() for u in sae.dec_key]
    rows += [torch.outer(mean_key, w).flatten() for w in sae.dec_value]
    torch.testing.assert_close(sae.W_dec, torch.stack(rows), check_stride=False)
    key, value = sae.decoder_factors()
    assert (key.shape, value.shape) == ((D_SAE, 1, D_K), (D_SAE, 1, D_V))
    torch.testing.assert_close((key.mT @ value).flatten(1), torch.stack(rows))
    # W_enc gives a key code's score on k mean_value^T, and a value code's on mean_key v^T.
    unit_key, unit_value, _ = Oracle(sae).split(x)
    on_keys = (unit_key[:, :, None] * mean_value).flatten(1) @ sae.W_enc
    on_values = (mean_key[:, None] * unit_value[:, None]).flatten(1) @ sae.W_enc
    norms, bias = sae.get_W_dec_norm(), sae.b_enc
    hidden = {}
    sae.hook_sae_acts_pre.register_forward_hook(lambda m, args, out: hidden.update(seen=out))
    sae.encode(x / x.norm(dim=1, keepdim=True))
    assert norms.shape == bias.shape
    torch.testing.assert_close(hidden["seen"][:, :N_KEY], (on_keys + bias)[:, :N_KEY])
    torch.testing.assert_close(hidden["seen"][:, N_KEY:], (on_values + bias)[:, N_KEY:])


def test_gradients_reach_the_input_and_are_right_for_writes():
    """Of a write, against central differences in directions of any rank."""
    sae, x, direction = make(), writes(n=6), randn(6, D_K * D_V, seed=3)
    given = x.clone().requires_grad_()
    weights = randn(6, D_SAE, seed=4)
    (grad,) = torch.autograd.grad((sae.encode(given) * weights).sum(), given)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(given), sae.encode(x))
        ends = [float((sae.encode(x + s * direction) * weights).sum()) for s in (1e-4, -1e-4)]
    assert float((grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_inactive_codes_have_gradients_through_decode():
    sae = make()
    acts = torch.zeros(1, D_SAE, dtype=torch.float64)
    acts[0, 2], acts[0, N_KEY + 1] = 0.5, 2.0
    acts.requires_grad_()
    target = randn(D_K * D_V, seed=9).view(D_K, D_V)
    (grad,) = torch.autograd.grad((sae.decode(acts)[0].view(D_K, D_V) * target).sum(), acts)
    expected = [u @ target @ (2.0 * sae.dec_value[1]) for u in sae.dec_key]
    expected += [0.5 * sae.dec_key[2] @ target @ w for w in sae.dec_value]
    torch.testing.assert_close(grad[0], torch.stack(expected))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_codes_encode_as_in_training_and_can_be_trained_on(encoder, activation, tmp_path):
    sae, x = make(encoder=encoder, activation=activation).to(dtype=torch.float32), writes().float()
    sae.save_inference_model(tmp_path / "inference")
    loaded = SAE.load_from_disk(tmp_path / "inference")
    assert isinstance(loaded, WriteSAE)
    sizes = ("n_key", "n_value", "k_key", "k_value", "d_sae", "k", "decoder")
    assert [getattr(loaded.cfg, n) for n in sizes] == [*(N_KEY, N_VALUE, K_KEY, K_VALUE), D_SAE, 5, "codes"]
    if activation == "batchtopk":
        sae.eval()
        expected = Oracle(copy.deepcopy(sae).double()).encode(x.double())
        torch.testing.assert_close(loaded.encode(x).double(), expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(loaded.encode(x), sae.encode(x))
    again = TrainingSAE.load_from_disk(tmp_path / "inference", "cpu")
    assert again.progress.tolist() == [N_KEY, 0, N_VALUE]
    held = again.dec_key.clone()
    again.training_forward_pass(step_input(x))  # its codes do not start from inputs again
    assert torch.equal(again.dec_key, held)
    sae.progress[1] = 7
    sae.save_model(tmp_path / "training")
    resumed = TrainingSAE.load_from_disk(tmp_path / "training")
    assert resumed.cfg.to_dict() == sae.cfg.to_dict()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("in_training", [False, True])
def test_hooks_on_scores_and_coefficients_decide(in_training):
    """What a hook returns is what is decoded, in the units that SAELens's hooks see."""
    sae, x = make(), writes()
    sae.fold_W_dec_norm()
    acts = sae.encode(x).detach()
    run = (
        (lambda: sae.training_forward_pass(step_input(packed(x), logging=True)).feature_acts)
        if in_training
        else (lambda: sae.encode(x))
    )
    sae.hook_sae_acts_pre.add_hook(lambda hidden, hook: 2 * hidden)
    torch.testing.assert_close(run().detach(), 2 * acts)
    sae.reset_hooks()
    sae.hook_sae_acts_post.add_hook(lambda given, hook: 3 * given)
    torch.testing.assert_close(run().detach(), 3 * acts)
    if in_training:
        loss = sae.training_forward_pass(step_input(packed(x))).losses["mse_loss"]
        found, norms = Oracle(sae).sides(x)
        errors = sum((targets - 3 * coded).square().sum(1) for targets, *_, coded in found.values())
        torch.testing.assert_close(loss, norms.square().mean() * errors.mean())


def test_half_precision_codes_nearly_as_well():
    sae, x = make(), states()
    expected = sae(x).detach()
    sae.to(dtype=torch.bfloat16)
    out = sae(x.bfloat16()).detach().double()
    error = (out - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) < 0.1


def test_empty_batches_and_zero_writes():
    sae = make(encoder_bias=True)
    assert sae.encode(torch.zeros(0, D_K * D_V).double()).shape == (0, D_SAE)
    assert sae.decode(torch.zeros(0, D_SAE).double()).shape == (0, D_K * D_V)
    assert not sae.encode(torch.zeros(3, D_K * D_V).double()).any()
    output = sae.training_forward_pass(step_input(torch.zeros(3, D_K * D_V).double()))
    assert float(output.loss.detach()) == 0
    sae.stand_in_of(torch.zeros(2, 3, D_SAE).double())


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"decoder": "dense"}], ids=str)
def test_the_stand_in_of_atoms_is_the_dominant_one(make_sae, options):
    """Its leading singular pair, by NumPy-like singular values, where it is not of rank 1."""
    sae = make_sae(**options)
    x = writes()
    acts = sae.encode(x).detach()
    key, value = sae.stand_in(x)
    for n in range(N_ROWS):
        atom = sae.W_dec[int(acts[n].argmax())].detach().view(D_K, D_V)
        left, size, right = torch.linalg.svd(atom)
        best = acts[n].max() * size[0] * torch.outer(left[:, 0], right[0])
        torch.testing.assert_close(torch.outer(key[n], value[n]).detach(), best, atol=1e-6, rtol=1e-5)
    nothing = sae.stand_in_of(torch.zeros(2, 3, sae.cfg.d_sae).double())
    assert (nothing.key.shape, nothing.value.shape) == ((2, 3, 1, D_K), (2, 3, 1, D_V))
    assert not nothing.key.any()
    assert not nothing.value.any()


def test_sizes_of_codes_are_derived():
    cfg = WriteSAETrainingConfig(d_k=4, d_v=5, d_sae=31, k=5, decoder="codes")
    assert (cfg.n_key, cfg.n_value, cfg.k_key, cfg.k_value) == (15, 16, 2, 3)
    cfg = WriteSAEConfig(d_k=4, d_v=5, d_sae=7, k=9, decoder="codes", n_key=10, n_value=6, k_key=1, k_value=2)
    assert (cfg.d_sae, cfg.k, cfg.d_in) == (16, 3, 20)
    assert type(cfg).from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()
    recipe = WriteSAETrainingConfig.recommended(d_k=4, d_v=5)
    assert (recipe.decoder, recipe.n_key, recipe.n_value, recipe.d_sae) == ("codes", 1024, 1024, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_key": 8}, "got n_key=8 and n_value=0"),
        (
            {"n_key": 8, "n_value": 4, "k_key": 2, "k_value": 6},
            "k_value=6 codes cannot be active out of n_value=4",
        ),
        ({"encoder": "dense"}, "no encoder='dense'"),
        ({"rank": 2}, "no rank=2"),
        ({"activation": "gated"}, "no activation='gated'"),
        ({"normalize_activations": "layer_norm"}, "no normalize_activations='layer_norm'"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "no normalize_activations='constant_norm_rescale'",
        ),
        ({"decoder_bias": True}, "no decoder_bias=True"),
        ({"n_key": 2.0, "n_value": 2}, "n_key must be a whole number"),
        ({"decoder": "factored", "n_key": 8, "n_value": 8}, "n_key=8 and n_value=8 are sizes of codes"),
        ({"later_reads": (0,)}, "later_reads=\\(0,\\)"),
        ({"later_reads": (2, 2)}, "different whole numbers"),
        ({"later_reads": 4.0}, "different whole numbers"),
    ],
)
def test_what_codes_cannot_be_is_refused(options, message):
    with pytest.raises(WriteSAEError, match=message):
        WriteSAETrainingConfig(**({"d_k": 4, "d_v": 5, "d_sae": 32, "decoder": "codes"} | options))
