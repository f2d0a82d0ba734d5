"""Every member of the family against dense formulas in float64: matrices built, sums written out."""

import copy
import math

import pytest
import torch
from sae_lens import SAE

from tests.writesae_lens.saes.steps import COEFFICIENTS, D_K, D_V, packed, step_input
from writesae_lens import WriteSAE, WriteSAEError
from writesae_lens.saes.packed import PackedWrites, Write

ENCODERS = ("bilinear", "tied", "dense")
DECODERS = {
    "rank1": {"decoder": "factored", "rank": 1},
    "rank2": {"decoder": "factored", "rank": 2},
    "full": {"decoder": "dense"},
}
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "gated")
# Inputs by name: how they are made of rank-1 rows, and their scale.
INPUTS = {"writes": 1.0, "states": 1.0, "some zero": 1.0, "zero": 1.0, "huge": 1e6, "tiny": 1e-6}
DEAD = torch.arange(40) % 3 == 0
D_SAE, K = 40, 4


def inputs(kind, seed=1):
    rng = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(32, d, generator=rng, dtype=torch.float64) for d in (D_K, D_V))
    x = torch.einsum("nk,nv->nkv", key, value).flatten(1)
    if kind == "states":
        x = x + torch.randn(32, D_K * D_V, generator=rng, dtype=torch.float64)
    if kind == "some zero":
        x[::4] = 0
    return x * INPUTS[kind] * (kind != "zero")


@pytest.fixture
def member(make_sae):
    """A member with parameters off their starts, in the units of inputs of some scale."""

    def make(encoder, decoder, activation, scale=1.0, **options):
        with_bias = activation != "gated"  # see the test of Gated's decoder bias
        sae = make_sae(
            **(
                {"encoder": encoder, "activation": activation, "encoder_bias": True}
                | {"decoder_bias": with_bias, "k_aux": 6, "aux_loss_coefficient": 0.3}
                | {"write_alignment_coefficient": 0.5}
                | DECODERS[decoder]
                | options
            )
        )
        trained = {name: value for name, value in sae.state_dict().items() if name != "progress"}
        sae.load_state_dict(trained)  # one saved for inference, which does not start anew
        rescale(sae, scale)
        return sae

    return make


@torch.no_grad()
def rescale(sae, scale):
    """Bring every parameter that has the inputs' units to inputs ``scale`` times as large."""
    state = dict(sae.named_parameters())
    for name in ("b_enc", "b_dec", "activation_fn.gate_bias", "activation_fn.magnitude_bias"):
        if name in state:
            state[name] *= scale
    if "activation_fn.log_threshold" in state:
        state["activation_fn.log_threshold"] += math.log(scale)


class Jump(torch.autograd.Function):
    """JumpReLU(z) and its derivatives (Rajamanoharan et al., 2024, equations 10 and 11).

    With a rectangle kernel K and bandwidth e = bandwidth * theta, d/dtheta = -(theta / e) K((z - theta) / e).
    """

    @staticmethod
    def forward(ctx, z, log_theta, bandwidth):
        ctx.save_for_backward(z, log_theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > log_theta.exp(), z, 0)

    @staticmethod
    def backward(ctx, grad):
        z, log_theta = ctx.saved_tensors
        theta = log_theta.exp()
        e = ctx.bandwidth * theta
        by_theta = -(theta / e) * (((z - theta) / e).abs() < 0.5)
        return grad * (z > theta), (grad * by_theta * theta).sum(0), None


class Step(torch.autograd.Function):
    """The number of active atoms, Heaviside(z - theta), and its derivative -(1 / e) K((z - theta) / e)."""

    @staticmethod
    def forward(ctx, z, log_theta, bandwidth):
        ctx.save_for_backward(z, log_theta)
        ctx.bandwidth = bandwidth
        return (z > log_theta.exp()).to(z)

    @staticmethod
    def backward(ctx, grad):
        z, log_theta = ctx.saved_tensors
        theta = log_theta.exp()
        e = ctx.bandwidth * theta
        by_theta = -(1 / e) * (((z - theta) / e).abs() < 0.5)
        return None, (grad * by_theta * theta).sum(0), None


class Oracle:
    """A member restated from its documentation, on float64 leaves of its own."""

    def __init__(self, sae):
        self.cfg = sae.cfg
        self.gain = float(sae.enc_gain) if sae.cfg.encoder == "tied" else 1.0
        self.leaves = {
            n: p.detach().double().clone().requires_grad_(p.requires_grad) for n, p in sae.named_parameters()
        }

    def built(self, side):
        if f"{side}_matrix" in self.leaves:
            return self.leaves[f"{side}_matrix"]
        return torch.einsum("frk,frv->fkv", self.leaves[f"{side}_key"], self.leaves[f"{side}_value"])

    def atoms(self):
        raw = self.built("dec")
        return raw / raw.square().sum((1, 2)).sqrt()[:, None, None]

    def scores(self, x):
        tied = self.cfg.encoder == "tied"
        encoder = self.atoms() * self.gain if tied else self.built("enc")
        return torch.einsum("nkv,fkv->nf", x.unflatten(-1, (D_K, D_V)), encoder) + self.leaves["b_enc"]

    def own(self, name):
        return self.leaves[f"activation_fn.{name}"]

    def activate(self, z):
        kept = torch.zeros_like(z)
        if self.cfg.activation == "topk":
            for n, row in enumerate(z.tolist()):
                kept[n, sorted(range(D_SAE), key=lambda i, row=row: -row[i])[:K]] = 1
            return z.relu() * kept
        if self.cfg.activation == "batchtopk":
            flat = z.detach().relu().flatten()
            kept.view(-1)[flat.argsort(descending=True)[: K * len(z)]] = 1
            return z.relu() * kept
        if self.cfg.activation == "jumprelu":
            return Jump.apply(z, self.own("log_threshold"), self.cfg.jumprelu_bandwidth)
        gate = (z + self.own("gate_bias") > 0).to(z)
        return gate * (self.own("log_gain").exp() * z + self.own("magnitude_bias")).relu()

    def decode(self, acts):
        return (torch.einsum("nf,fkv->nkv", acts, self.atoms())).flatten(1) + self.leaves["b_dec"]

    def losses(self, x, dead):
        cfg, z = self.cfg, self.scores(x)
        acts, atoms = self.activate(z), self.atoms().flatten(1)
        size = sum(float(row @ row) for row in x) / len(x)  # the batch's mean |X|^2
        residual = x - self.decode(acts)
        losses = {"mse_loss": residual.square().sum(1).mean()}
        pool = [i for i in range(D_SAE) if dead[i]]
        if pool and cfg.aux_loss_coefficient and cfg.k_aux:
            weights = torch.zeros_like(z)
            for n, row in enumerate(z.tolist()):
                weights[n, sorted(pool, key=lambda i, row=row: -row[i])[: cfg.k_aux]] = 1
            rebuilt = (weights * z) @ atoms
            losses["auxiliary_reconstruction_loss"] = (
                cfg.aux_loss_coefficient
                * min(1.0, len(pool) / cfg.k_aux)
                * (residual.detach() - rebuilt).square().sum(1).mean()
            )
        apart = [
            1 - row @ atoms[a.argmax()] / row.norm() if row.norm() > 0 else torch.ones(()).double()
            for row, a in zip(x, acts)
            if a.max() > 0
        ]
        losses["write_alignment_loss"] = (
            cfg.write_alignment_coefficient * size * (sum(apart) / len(apart) if apart else z.new_zeros(()))
        )
        if cfg.activation == "jumprelu":
            active = Step.apply(z, self.own("log_threshold"), cfg.jumprelu_bandwidth).sum(1).mean()
            losses["l0_loss"] = COEFFICIENTS["l0"] * size * (active / cfg.k - 1) ** 2
        if cfg.activation == "gated":
            codes = (z + self.own("gate_bias")).relu()
            via_gate = codes @ atoms.detach() + self.leaves["b_dec"].detach()
            losses["gate_reconstruction_loss"] = (x - via_gate).square().sum(1).mean()
            losses["l1_loss"] = COEFFICIENTS["l1"] * math.sqrt(size) * codes.sum(1).mean()
        return losses, z, acts


def gradients(loss, leaves):
    wanted = {n: p for n, p in leaves.items() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), grads)}


def close(ours, theirs, tolerance, what):
    """Within a share of the largest number of the tensor."""
    limit = tolerance * float(theirs.detach().abs().max()) + 1e-300
    away = float((ours.detach().double() - theirs.detach()).abs().max())
    assert away <= limit, f"{what}: off by {away:.3g}, allowed {limit:.3g}"


def check(sae, x, tolerance, dead=DEAD, given=None, taking_part=None):
    """Scores, coefficients, reconstruction, every loss and every gradient equal the oracle's.

    ``given``: the same inputs in another form; ``taking_part``: the dead atoms in the loss, if not all.
    """
    oracle = Oracle(sae)
    output = sae.training_forward_pass(
        step_input((x if given is None else given).to(sae.dtype), dead=dead, logging=True)
    )
    losses, z, acts = oracle.losses(x, dead if taking_part is None else taking_part)
    close(output.hidden_pre, z, tolerance, "scores")
    close(output.feature_acts, acts, tolerance, "coefficients")
    close(output.sae_out, oracle.decode(acts), tolerance, "reconstruction")
    assert set(losses) <= set(output.losses)
    whole = max(float(v.detach()) for v in losses.values())
    for name, value in output.losses.items():
        expected = losses.get(name, torch.zeros((), dtype=torch.float64)).detach()
        # A loss far below the others is a difference of numbers of their size.
        allowed = tolerance * max(abs(float(expected)), 0.1 * whole) + 1e-300
        assert abs(float(value.detach()) - float(expected)) <= allowed, (name, value, expected)
    close(output.loss, sum(losses.values()), tolerance, "loss")
    ours = gradients(output.loss, dict(sae.named_parameters()))
    theirs = gradients(sum(losses.values()), oracle.leaves)
    assert set(ours) == set(theirs)
    for name in ours:
        close(ours[name], theirs[name], tolerance, f"gradient of {name}")
    with torch.no_grad():
        close(sae.encode(x.to(sae.dtype)), acts, tolerance, "encode")
        close(sae.decode(acts.to(sae.dtype)), oracle.decode(acts), tolerance, "decode")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_member_equals_the_dense_formulas(member, encoder, decoder, activation):
    """In float64, on writes, states, zeros, and inputs of norm 1e6 and 1e-6."""
    for kind, scale in INPUTS.items():
        check(member(encoder, decoder, activation, scale), inputs(kind), 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("encoder", "decoder"), [("bilinear", "rank1"), ("tied", "rank2"), ("dense", "full")]
)
def test_float32_is_within_its_rounding_of_the_formulas(member, encoder, decoder, activation):
    for kind, scale in INPUTS.items():
        sae = member(encoder, decoder, activation, scale).to(dtype=torch.float32)
        check(sae, inputs(kind).float().double(), 1e-5)


@pytest.mark.parametrize("activation", ["jumprelu", "gated"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_few_active_atoms_give_the_same_gradients_as_many(member, decoder, activation):
    """An atom just below its JumpReLU threshold is silent, and still pulls at the threshold."""
    for kind in ("writes", "states"):
        sae, x = member("bilinear", decoder, activation), inputs(kind)
        with torch.no_grad():
            threshold = Oracle(sae).scores(x).topk(5).values[:, -1].max() * 1.001
            if activation == "jumprelu":
                sae.activation_fn.log_threshold.fill_(threshold.log())
            else:
                sae.activation_fn.gate_bias.fill_(-threshold)
        active = (Oracle(sae).losses(x, DEAD)[2] > 0).sum(1)
        assert 0 < active.max() <= D_SAE // 8
        check(sae, x, 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_packed_writes_give_what_flat_ones_give(member, encoder, activation):
    for kind in ("writes", "some zero", "huge", "tiny"):
        sae, x = member(encoder, "rank1", activation, INPUTS[kind]), inputs(kind)
        check(sae, x, 1e-9, given=packed(x))
        with torch.no_grad():
            close(sae.encode(packed(x)), sae.encode(x), 1e-9, "encode")
            close(sae(packed(x)), sae(x), 1e-9, "forward")
            shaped = packed(x).view(4, 8, D_K * D_V)
            close(sae.encode(shaped), sae.encode(x).view(4, 8, -1), 1e-9, "encode of three axes")


@pytest.mark.parametrize("sides", [[(D_V, D_K)], [(6, 6), (6, 3)]], ids=["turned", "two heads"])
def test_packed_rows_of_other_sides_are_refused_or_read_as_the_numbers_that_they_are(member, sides):
    rng = torch.Generator().manual_seed(0)
    rows = PackedWrites(
        *(Write(*(torch.randn(8, 1, d, generator=rng, dtype=torch.float64) for d in pair)) for pair in sides)
    )
    sae = member("bilinear", "rank1", "topk")
    try:
        ours = sae.encode(rows)
    except WriteSAEError:
        return
    close(ours, Oracle(sae).activate(Oracle(sae).scores(rows.dense())), 1e-9, "encode")


def test_the_dead_atom_loss_without_dead_atoms(member):
    for dead in (torch.zeros(D_SAE, dtype=torch.bool), torch.arange(D_SAE) < 2):
        check(member("bilinear", "rank1", "topk"), inputs("writes"), 1e-9, dead)


def test_of_very_many_dead_atoms_the_strongest_take_part(member):
    """Four times k_aux of them, by their largest score in the batch."""
    sae, x = member("bilinear", "rank1", "topk", k_aux=2), inputs("writes")
    best = Oracle(sae).scores(x).detach().amax(0).masked_fill(~DEAD, -math.inf)
    strongest = torch.zeros(D_SAE, dtype=torch.bool)
    strongest[best.argsort(descending=True)[: 4 * 2]] = True
    assert strongest.sum() < DEAD.sum()
    check(sae, x, 1e-9, taking_part=strongest)


def test_the_gates_reconstruction_has_the_decoder_bias(member):
    """As in the paper: |x - x^_frozen(gate codes)|^2, where x^ adds the bias (Gated SAEs, equation 7)."""
    for kind in ("writes", "states"):
        check(member("bilinear", "rank1", "gated", decoder_bias=True), inputs(kind), 1e-9)


def test_the_gates_reconstruction_does_not_pull_at_the_decoder(member):
    sae = member("bilinear", "rank1", "gated", write_alignment_coefficient=0.0)
    loss = sae.training_forward_pass(step_input(inputs("writes"), dead=DEAD)).losses[
        "gate_reconstruction_loss"
    ]
    grads = gradients(loss, dict(sae.named_parameters()))
    assert grads["dec_key"].abs().max() == grads["dec_value"].abs().max() == 0
    assert grads["enc_key"].abs().max() > 0
    assert grads["activation_fn.gate_bias"].abs().max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_saved_member_encodes_as_in_training(member, tmp_path, encoder, decoder, activation):
    sae = member(encoder, decoder, activation).to(dtype=torch.float32)
    x = inputs("writes").float()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, WriteSAE)
    names = ("encoder", "decoder", "rank", "activation", "k", "d_k", "d_v", "d_in")
    assert [getattr(loaded.cfg, n) for n in names] == [getattr(sae.cfg, n) for n in names]
    z = Oracle(sae).scores(x.double())
    if activation == "batchtopk":
        theta = sae.activation_fn.log_threshold.detach().double().exp()
        expected = torch.where(z > theta, z, 0)
        # A trained threshold holds for each row by itself, whatever else is in the batch.
        close(loaded.encode(x[:1]), expected[:1], 1e-5, "one row")
    else:
        expected = Oracle(sae).activate(z)
        assert torch.equal(loaded.encode(x), sae.encode(x))
    close(loaded.encode(x), expected, 1e-5, "encode")
    close(loaded(x), Oracle(sae).decode(expected), 1e-5, "forward")
    close(loaded.W_dec, Oracle(sae).atoms().flatten(1), 1e-6, "W_dec")


def test_batchtopk_follows_the_mean_of_the_smallest_score_that_passed(make_sae, tmp_path):
    """The first batch's value, then 99 parts of the old to 1 of the new; evaluation leaves it alone."""
    sae = make_sae(activation="batchtopk")
    mean = None
    for n in range(5):
        x = (1 + n) * inputs("writes", seed=n)
        z = Oracle(sae).scores(x).detach()
        least = sorted(v for v in z.flatten().tolist() if v > 0)[-K * len(x)]
        mean = least if mean is None else 0.99 * mean + 0.01 * least
        sae.training_forward_pass(step_input(x, logging=n % 2 == 0))
        held = sae.activation_fn.log_threshold.exp()
        torch.testing.assert_close(held, torch.full_like(held, mean))
    with torch.no_grad():
        sae.encode(1e3 * x)
    sae.eval()
    sae.encode(1e3 * x)
    torch.testing.assert_close(sae.activation_fn.log_threshold.exp(), torch.full_like(held, mean))
    sae.training_forward_pass(step_input(torch.zeros_like(x)))
    torch.testing.assert_close(sae.activation_fn.log_threshold.exp(), torch.full_like(held, mean))
    assert not sae.activation_fn.log_threshold.requires_grad


def test_batchtopk_keeps_k_a_row_over_the_whole_batch(make_sae):
    """Rows share their atoms: small rows get few, large ones many."""
    sae, x = make_sae(activation="batchtopk"), inputs("writes")
    x[:16] *= 1e-3
    acts = sae.encode(x)
    assert (acts > 0).sum() == K * len(x)
    assert (acts[:16] > 0).sum() == 0
    for shape in ((4, 8, -1), (2, 2, 8, -1)):
        assert torch.equal(sae.encode(x.view(*shape)).view(32, -1), acts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inference", [False, True])
def test_folding_a_scale_changes_no_function(member, tmp_path, activation, inference):
    """SAE(s X) / s before the fold is SAE(X) after it; coefficients stay, as the atoms take the scale."""
    scale = 7.3
    sae = member("bilinear", "rank1", activation, normalize_activations="expected_average_only_in")
    x = inputs("states")
    if activation == "batchtopk":
        sae.training_forward_pass(step_input(scale * x))
    if inference:
        sae.save_inference_model(tmp_path)
        sae = SAE.load_from_disk(tmp_path, dtype="float64")
    with torch.no_grad():
        acts, out = sae.encode(scale * x), sae(scale * x) / scale
        sae.fold_activation_norm_scaling_factor(scale)
        assert (acts > 0).any()
        close(sae.encode(x), acts, 1e-9, "coefficients")
        close(sae(x), out, 1e-9, "reconstruction")
    assert sae.cfg.normalize_activations == "none"


@pytest.mark.parametrize("scale", [1e6, 1e-6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_go_with_the_square_of_the_scale(make_sae, activation, scale):
    """From the very start: whatever has the inputs' units takes them from the inputs."""
    losses = []
    for c in (1.0, scale):
        sae = make_sae(activation=activation)
        with torch.no_grad():
            sae.b_enc.zero_()
            if activation == "gated":
                sae.activation_fn.gate_bias.zero_()
                sae.activation_fn.magnitude_bias.zero_()
        losses.append(sae.training_forward_pass(step_input(c * inputs("writes"), dead=DEAD)).losses)
    assert set(losses[0]) == set(losses[1])
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name] / scale**2, value, msg=name, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_norms_of_atoms_are_units_of_their_coefficients(member, encoder, decoder, activation):
    """Atoms c times as large: coefficients 1/c, the same choice of atoms, the same reconstruction."""
    sae, x = member(encoder, decoder, activation), inputs("states")
    larger = copy.deepcopy(sae)
    c = torch.linspace(0.3, 3, D_SAE, dtype=torch.float64)
    with torch.no_grad():
        side = larger.dec_matrix if decoder == "full" else larger.dec_key
        side *= c[:, None, None]
        larger.b_enc /= c
        close(larger.W_dec, c[:, None] * sae.W_dec, 1e-9, "W_dec")
        close(larger.W_enc, sae.W_enc / c, 1e-9, "W_enc")
        close(larger.encode(x) * c, sae.encode(x), 1e-9, "coefficients")
        close(larger(x), sae(x), 1e-9, "reconstruction")
        mse = [s.training_forward_pass(step_input(x)).losses["mse_loss"] for s in (sae, larger)]
        close(mse[1], mse[0], 1e-9, "mse")
        larger.fold_W_dec_norm()
        close(larger.W_dec, sae.W_dec, 1e-9, "folded W_dec")
        close(larger.encode(x), sae.encode(x), 1e-9, "folded coefficients")
