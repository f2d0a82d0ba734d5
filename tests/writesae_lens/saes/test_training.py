"""Between the steps of SAELens's own trainer: starts, resampling, renormalisation, metrics."""

import math
from dataclasses import fields

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from tests.writesae_lens.saes.steps import D_K, D_V, packed, step_input
from writesae_lens import (
    PAPER_SCHEDULE,
    RECOMMENDED_SCHEDULE,
    WriteSAEConfig,
    WriteSAEError,
    WriteSAETrainingConfig,
    WriteTrainingSAE,
)
from writesae_lens.saes.packed import PackedWrites, Write


def writes(n, seed=0, rank=1, dtype=torch.float32):
    """Flattened matrices of some rank; the singular values of each are far apart."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, D_K, D_V, dtype=dtype)
    for r in range(rank):
        key, value = (torch.randn(n, d, generator=rng, dtype=dtype) for d in (D_K, D_V))
        x += 0.3**r * torch.einsum("nk,nv->nkv", key, value)
    return x.flatten(1)


def leading(x):
    """Leading singular pairs of flattened matrices, by power iteration, flattened and with norm 1."""
    matrices = x.unflatten(-1, (D_K, D_V)).double()
    right = torch.ones(len(x), D_V, 1, dtype=torch.float64) + torch.arange(D_V).double()[:, None] / 7
    for _ in range(500):
        right = matrices.mT @ (matrices @ right)
        right = right / right.norm(dim=1, keepdim=True).clamp(min=1e-300)
    left = matrices @ right
    return (left / left.norm(dim=1, keepdim=True).clamp(min=1e-300) @ right.mT).flatten(1)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return WriteTrainingSAE(
        WriteSAETrainingConfig(
            **({"d_k": D_K, "d_v": D_V, "d_sae": 16, "k": 2, "init_from_writes": False} | options)
        )
    )


def forward(sae, given):
    """A forward pass at the step that ``given`` names."""
    sae.progress[1] = given.n_training_steps
    return sae.training_forward_pass(given)


def trainer(sae, batches, **options):
    """SAELens's trainer, on batches that are known."""
    config = SAETrainerConfig(
        **(
            {
                "n_checkpoints": 0,
                "checkpoint_path": None,
                "save_final_checkpoint": False,
                "total_training_samples": 32 * 100,
                "device": "cpu",
                "autocast": False,
                "lr": 1e-3,
                "lr_end": 1e-3,
                "lr_scheduler_name": "constant",
                "lr_warm_up_steps": 0,
                "adam_beta1": 0.9,
                "adam_beta2": 0.999,
                "lr_decay_steps": 0,
                "n_restart_cycles": 1,
                "train_batch_size_samples": 32,
                "dead_feature_window": 2,
                "feature_sampling_window": 1000,
                "logger": LoggingConfig(log_to_wandb=False),
            }
            | options
        )
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(batches))


def advance(run, batch):
    """One step as `fit` does it."""
    output = run.step(batch)
    run.n_training_steps += 1
    return output


def kill(sae, atoms):
    """Make some atoms silent, whatever the activation function."""
    with torch.no_grad():
        sae.b_enc[atoms] = -1e4


def fitting_share(sae, x):
    """The c at which c times the k largest projections fits a batch best, by least squares on matrices."""
    atoms = sae.W_dec.detach().double()
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    along = x.double() @ atoms.T
    chosen = along >= along.topk(sae.cfg.k, dim=1).values[:, -1:]
    rebuilt = (along.relu() * chosen) @ atoms
    return float((x.double() * rebuilt).sum() / rebuilt.square().sum())


def moments(run, name):
    parameter = dict(run.sae.named_parameters())[name]
    state = run.optimizer.state[parameter]
    return state["exp_avg"].clone(), state["exp_avg_sq"].clone()


FAMILY = {
    "factored": {},
    "tied": {"encoder": "tied"},
    "dense": {"encoder": "dense", "decoder": "dense"},
    "jumprelu": {"activation": "jumprelu", "jumprelu_init_threshold": 0.01},
    "batchtopk": {"activation": "batchtopk"},
}


@pytest.mark.parametrize("rank", [1, 3], ids=["writes", "states"])
@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
def test_resampling_starts_dead_atoms_anew_inside_the_stock_trainer(options, rank):
    """Dead atoms become leading singular pairs, their moments are zero there, the others' untouched."""
    sae = make(encoder_bias=True, resample_every=5, renormalize_every=0, **options)
    dead = torch.tensor([1, 4, 11])
    live = torch.tensor([i for i in range(16) if i not in (1, 4, 11)])
    run = trainer(sae, [])
    kill(sae, dead)
    for n in range(5):
        advance(run, writes(32, n, rank))
    assert set(run.dead_neurons.nonzero().flatten().tolist()) >= set(dead.tolist())
    all_dead = run.dead_neurons.nonzero().flatten()
    live = live[~torch.isin(live, all_dead)]
    assert len(live) > 2
    names = [n for n, p in sae.named_parameters() if p.requires_grad and len(p) == 16 and n != "b_dec"]
    before = {name: moments(run, name) for name in names}
    assert all(a[live].abs().sum() > 0 for a, _ in before.values())
    batch = writes(32, 99, rank)

    seen = {}

    def look(optimizer, args, kwargs):
        seen["atoms"] = sae.W_dec.detach().clone()
        seen["bias"] = sae.b_enc.detach().clone()
        seen["grads"] = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}

    handle = run.optimizer.register_step_pre_hook(look)
    advance(run, batch)
    handle.remove()

    truth = leading(batch).float()
    for atom in all_dead:
        away = (seen["atoms"][atom] - truth).norm(dim=1), (seen["atoms"][atom] + truth).norm(dim=1)
        assert min(x.min() for x in away) < 1e-4
        assert seen["bias"][atom] == 0
    assert sae.n_resampled == len(all_dead)
    for name in names:
        (first, second), gradient = moments(run, name), seen["grads"][name]
        old_first, old_second = before[name]
        # Adam's own update, from zero for the new atoms and from what there was for the others.
        old_first[all_dead], old_second[all_dead] = 0, 0
        torch.testing.assert_close(first, 0.9 * old_first + 0.1 * gradient, msg=name)
        torch.testing.assert_close(second, 0.999 * old_second + 0.001 * gradient**2, msg=name)


def test_resampled_encoders_read_what_the_atoms_write():
    sae = make(encoder_bias=True)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 7]] = True
    kill(sae, dead)
    others = sae.W_dec[~dead].detach().clone(), sae.W_enc.T[~dead].detach().clone()
    forward(sae, step_input(writes(32, 3), 250, dead))
    share = fitting_share(sae, writes(32, 3))  # at norm 1 they would outdo the living atoms
    torch.testing.assert_close(sae.W_enc.T[dead], share * sae.W_dec[dead])
    assert torch.equal(sae.W_dec[~dead], others[0])
    assert torch.equal(sae.W_enc.T[~dead], others[1])


@pytest.mark.parametrize(
    ("step", "every", "happens"), [(0, 5, False), (4, 5, False), (10, 5, True), (5, 0, False)]
)
def test_resampling_happens_at_its_steps_only(step, every, happens):
    sae = make(resample_every=every)
    before = sae.W_dec.detach().clone()
    dead = torch.ones(16, dtype=torch.bool)
    forward(sae, step_input(writes(32), step, dead))
    assert (sae.n_resampled > 0) == happens
    assert torch.equal(sae.W_dec, before) != happens


def test_inputs_that_are_reconstructed_badly_are_the_ones_taken():
    """Every input but two is zero, which any SAE without biases reconstructs."""
    sae = make()
    batch = torch.zeros(32, D_K * D_V)
    batch[[5, 20]] = writes(2, 4)
    dead = torch.ones(16, dtype=torch.bool)
    before = sae.W_dec.detach().clone()
    forward(sae, step_input(batch, 250, dead))
    assert sae.n_resampled == 2
    changed = (sae.W_dec - before).abs().amax(1) > 0
    assert changed.sum() == 2
    match = (sae.W_dec[changed].double() @ leading(batch[[5, 20]]).T).abs()
    torch.testing.assert_close(match.amax(1), torch.ones(2, dtype=torch.float64))
    assert sorted(match.argmax(1).tolist()) == [0, 1]


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 4}], ids=["sparse", "dense sums"])
@pytest.mark.parametrize("seed", range(4))
def test_resampling_survives_inputs_that_are_reconstructed_exactly(options, seed):
    """An error of zero may come out below zero, by rounding; it is no chance to be drawn."""
    sae = make(encoder="tied", init_from_writes=True, **options)
    batch = 3.7 * writes(16, seed)
    forward(sae, step_input(batch))
    torch.testing.assert_close(sae.W_dec.abs(), leading(batch).float().abs(), rtol=1e-4, atol=1e-5)
    dead = torch.arange(16) >= 8
    forward(sae, step_input(batch[:8], 250, dead))
    assert torch.isfinite(sae.W_dec).all()


@pytest.mark.parametrize("activation", ["gated", "jumprelu"])
def test_an_atom_that_starts_anew_can_fire(activation):
    """Whatever had silenced it: a gate or a threshold that had drifted off is part of the old atom."""
    sae = make(activation=activation, jumprelu_init_threshold=0.01)
    batch = writes(4, 6)
    forward(sae, step_input(batch))
    dead = torch.arange(16) < 4
    with torch.no_grad():
        if activation == "gated":
            sae.activation_fn.gate_bias[dead] = -1e4
        else:
            sae.activation_fn.log_threshold[dead] = 10.0
    forward(sae, step_input(batch, 250, dead))
    assert sae.n_resampled == 4
    assert (sae.encode(batch)[:, dead] > 0).any(0).all()


def test_two_saes_with_two_optimisers_do_not_disturb_each_other():
    """Both resample in the same round, and step one after the other, in either order."""
    runs = []
    for seed in (0, 1):
        sae = make(seed, encoder_bias=True, resample_every=0, renormalize_every=0)
        run = trainer(sae, [])
        for n in range(3):
            advance(run, writes(32, 10 * seed + n))
        runs.append(run)
    saes = [run.sae for run in runs]
    masks = torch.arange(16) < 3, torch.arange(16) >= 12
    before = [moments(run, "dec_key") for run in runs]
    outputs = []
    for sae, mask in zip(saes, masks):
        sae.cfg.resample_every = 1
        outputs.append(forward(sae, step_input(writes(32, 77), 3, mask)))
    for run, output in zip(runs, outputs):
        run.optimizer.zero_grad()
        output.loss.backward()
    for run in reversed(runs):
        run.optimizer.step()
    for run, mask, (first, _) in zip(runs, masks, before):
        parameter = run.sae.dec_key
        expected = 0.9 * first
        expected[mask] = 0
        torch.testing.assert_close(moments(run, "dec_key")[0], expected + 0.1 * parameter.grad)


def test_the_first_of_two_optimisers_may_step_first():
    first, second = make(0, resample_every=1), make(1, resample_every=1)
    optimisers = [torch.optim.Adam(sae.parameters(), lr=1e-3) for sae in (first, second)]
    dead = torch.ones(16, dtype=torch.bool)
    for sae in (first, second):
        forward(sae, step_input(writes(32), 1, dead)).loss.backward()
    for optimiser in optimisers:
        optimiser.step()


def test_a_foreign_optimiser_in_between_keeps_its_moments():
    """Moments are cleared at the step of the optimiser that holds the atoms, no earlier, and once."""
    sae = make(resample_every=1, renormalize_every=0)
    other = torch.nn.Parameter(torch.ones(16, 1, D_K))
    foreign, own = torch.optim.Adam([other], lr=0.1), torch.optim.Adam(sae.parameters(), lr=1e-3)
    for optimiser, parameter in ((foreign, other), (own, sae.dec_key)):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
    sae.dec_key.grad = None
    dead = torch.arange(16) < 5
    forward(sae, step_input(writes(32), 1, dead))
    for _ in range(2):
        foreign.step()
    torch.testing.assert_close(foreign.state[other]["exp_avg"], torch.full((16, 1, D_K), 1 - 0.9**3))
    torch.testing.assert_close(own.state[sae.dec_key]["exp_avg"], torch.full((16, 1, D_K), 0.1))
    own.zero_grad()
    sae.dec_key.grad = torch.zeros_like(sae.dec_key)
    own.step()
    expected = torch.full((16, 1, D_K), 0.09)
    expected[:5] = 0
    torch.testing.assert_close(own.state[sae.dec_key]["exp_avg"], expected)
    sae.dec_key.grad = torch.ones_like(sae.dec_key)
    own.step()
    own.step()
    assert (own.state[sae.dec_key]["exp_avg"] > 0.1).all()


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("rank", [1, 2])
def test_renormalisation_leaves_the_function_and_puts_the_factors_at_norm_1(options, rank):
    if "decoder" in options and rank == 2:
        pytest.skip("a dense decoder has no rank")
    sae = make(renormalize_every=100, rank=rank, **options).to(dtype=torch.float64)
    x = writes(32, 8, 3, torch.float64)
    forward(sae, step_input(x))
    decoder = [p for n, p in sae.named_parameters() if n.startswith("dec_")]
    with torch.no_grad():
        for n, parameter in enumerate(decoder):
            parameter *= torch.rand(16, *[1] * (parameter.ndim - 1)).double() * 5 ** (1 - 2 * n) + 0.2
    first, held = forward(sae, step_input(x, 99)), [p.clone() for p in decoder]
    assert all(torch.equal(a, b) for a, b in zip(held, decoder))
    raw = sae.W_enc * sae.get_W_dec_norm()
    second = forward(sae, step_input(x, 100))
    assert not any(torch.equal(a, b) for a, b in zip(held, decoder))
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(second.feature_acts, first.feature_acts)
    torch.testing.assert_close(sae.W_enc, raw)
    built = decoder[0] if len(decoder) == 1 else torch.einsum("frk,frv->fkv", *decoder)
    torch.testing.assert_close(built.flatten(1).norm(dim=1), torch.ones(16, dtype=torch.float64))
    if rank == 1 and len(decoder) == 2:
        for factor in decoder:
            torch.testing.assert_close(factor.norm(dim=-1), torch.ones(16, 1, dtype=torch.float64))


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("kind", ["writes", "packed", "states"])
def test_atoms_start_as_the_leading_singular_pairs_of_the_first_inputs(options, kind):
    sae = make(init_from_writes=True, **options)
    rank = 3 if kind == "states" else 1
    first, second = writes(10, 1, rank), writes(10, 2, rank)
    for x in (first, second):
        forward(sae, step_input(packed(x) if kind == "packed" else x))
    expected = torch.cat([leading(first), leading(second)[:6]])
    torch.testing.assert_close(sae.W_dec.double(), expected, rtol=1e-3, atol=1e-4)
    sizes = torch.linalg.vecdot(sae.W_enc.T.double(), expected)
    torch.testing.assert_close(sae.W_enc.T.double(), sizes[:, None] * expected, rtol=1e-3, atol=1e-4)
    assert (sizes > 0).all()
    held = sae.W_dec.clone()
    forward(sae, step_input(writes(10, 3)))
    assert torch.equal(sae.W_dec, held)


def test_inputs_normalised_at_run_time_start_atoms_too():
    """`init_from_writes` and `resample_every` say nothing of an exception."""
    sae = make(init_from_writes=True, normalize_activations="constant_norm_rescale", aux_loss_coefficient=0.0)
    x = writes(16, 1)
    forward(sae, step_input(x))
    torch.testing.assert_close(sae.W_dec.double(), leading(x), rtol=1e-3, atol=1e-4)


def test_jumprelu_thresholds_start_in_units_of_the_inputs():
    sae = make(activation="jumprelu", jumprelu_init_threshold=0.25)
    x = 40 * writes(32, 1)
    forward(sae, step_input(x))
    size = math.sqrt(sum(float((row * row).sum()) for row in x.double()) / len(x))
    torch.testing.assert_close(sae.activation_fn.log_threshold.exp(), torch.full((16,), 0.25 * size))
    forward(sae, step_input(1000 * x))
    torch.testing.assert_close(sae.activation_fn.log_threshold.exp(), torch.full((16,), 0.25 * size))


def test_the_papers_recipe_and_its_schedule():
    """Section "Training": k = 32 of 2,048, biases, squared error and dead-atom loss alone, at random."""
    config = WriteSAETrainingConfig.paper(d_k=16, d_v=24)
    assert (config.d_in, config.d_sae, config.k, config.rank) == (384, 2048, 32, 1)
    assert (config.encoder, config.decoder, config.activation) == ("bilinear", "factored", "topk")
    assert (config.encoder_bias, config.decoder_bias, config.init_from_writes) == (True, True, False)
    assert (config.aux_loss_coefficient, config.k_aux) == (1e-2, 256)
    assert config.write_alignment_coefficient == 0
    assert (config.renormalize_every, config.resample_every) == (100, 250)
    assert WriteSAETrainingConfig.paper(d_k=16, d_v=24, d_sae=64, k=4).k == 4
    runner = LanguageModelSAERunnerConfig(
        sae=config,
        model_class_name="HookedRecurrent",
        model_name="tiny-gdn",
        hook_name="blocks.1.linear_attn.hook_write.2",
        dataset_path="held-out text",
        training_tokens=256 * 100,
        device="cpu",
        **PAPER_SCHEDULE,
    )
    assert (runner.lr, runner.lr_end, runner.lr_scheduler_name) == (3e-4, 3e-5, "cosineannealing")
    assert (runner.lr_warm_up_steps, runner.train_batch_size_tokens) == (50, 256)
    assert runner.dead_feature_window == 100


def test_the_named_recipes_and_a_schedule_for_any_length():
    config = WriteSAETrainingConfig.recommended(d_k=16, d_v=24)
    assert (config.decoder, config.n_key, config.n_value) == ("codes", 1024, 1024)
    assert (config.k_key, config.k_value) == (16, 16)
    smaller = WriteSAETrainingConfig.recommended(d_k=16, d_v=24, d_sae=64, k=8)
    assert (smaller.n_key, smaller.n_value, smaller.k_key, smaller.k_value) == (32, 32, 4, 4)
    atoms = WriteSAETrainingConfig.atoms(d_k=16, d_v=24)
    defaults = WriteSAETrainingConfig(d_k=16, d_v=24, d_sae=2048, k=4, later_reads=())
    assert atoms.to_dict() == defaults.to_dict()
    for steps in (1, 2, 50, 1000):
        options = LanguageModelSAERunnerConfig(
            sae=config,
            hook_name="blocks.1.linear_attn.hook_write.2",
            training_tokens=256 * steps,
            device="cpu",
            **RECOMMENDED_SCHEDULE,
        ).to_sae_trainer_config()
        rates_of = {f.name: getattr(options, f.name) for f in fields(options) if f.name.startswith("lr")}
        run = trainer(make(), [], total_training_samples=32 * steps, **rates_of)
        rates = []
        for _ in range(steps):
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.optimizer.step()
            run.lr_scheduler.step()
        assert rates[0] == 4e-3
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(4e-5)


@pytest.mark.parametrize("form", ["writes", "packed", "states"])
def test_metrics_of_logging_steps(form):
    sae = make(resample_every=0)
    x = writes(32, 2, 3 if form == "states" else 1)
    dead = torch.arange(16) % 5 == 0
    given = packed(x) if form == "packed" else x
    assert not forward(sae, step_input(given, 0, dead)).metrics
    output = forward(sae, step_input(given, 0, dead, logging=True))
    cosines = []
    for row, acts in zip(x, output.feature_acts):
        if acts.max() > 0:
            atom = sae.W_dec[acts.argmax()].detach()
            cosines.append(float((row @ atom) / (row.norm() * atom.norm())))
    assert output.metrics["write_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert (output.metrics["alive_atoms"], output.metrics["dead_atoms"]) == (12, 4)
    assert output.metrics["resampled_atoms"] == 0
    sae.cfg.resample_every = 1
    for n in (1, 2):
        output = forward(sae, step_input(given, n, dead, logging=True))
        assert output.metrics["resampled_atoms"] == 4 * n
    nobody = forward(sae, step_input(given, 0, None, logging=True)).metrics
    assert (nobody["alive_atoms"], nobody["dead_atoms"]) == (16, 0)


def test_metrics_where_nothing_fires():
    output = forward(make(), step_input(torch.zeros(8, D_K * D_V), logging=True))
    assert output.metrics["write_cosine"] == 0
    assert all(math.isfinite(float(value)) for value in output.metrics.values())


def test_metrics_reach_what_saelens_logs():
    sae = make()
    run = trainer(sae, [])
    output = forward(sae, step_input(writes(32), logging=True))
    log = run.build_train_step_log_dict(output, 32)
    assert {"metrics/write_cosine", "metrics/alive_atoms", "metrics/resampled_atoms"} <= set(log)
    reconstruction = output.feature_acts @ sae.W_dec
    left = (writes(32) - reconstruction).square().sum(1).mean()
    assert log["losses/mse_loss"] == pytest.approx(float(left), rel=1e-4)
    assert all(math.isfinite(value) for value in log.values())


@pytest.mark.parametrize("options", FAMILY.values(), ids=FAMILY)
def test_the_stock_trainer_lowers_the_error(options):
    """With starts, resampling and renormalisation on, through `fit`."""
    fixed = writes(20, 5)
    rng = torch.Generator().manual_seed(3)
    batches = [fixed[torch.randint(20, (32,), generator=rng)] for _ in range(100)]
    sae = make(resample_every=20, renormalize_every=10, d_sae=16, **options)
    with torch.no_grad():
        before = (sae(fixed) - fixed).square().sum(1).mean()
    trained = trainer(sae, batches, lr=1e-2, lr_end=1e-2).fit()
    with torch.no_grad():
        after = (trained(fixed) - fixed).square().sum(1).mean()
    assert after < 0.5 * min(before, fixed.square().sum(1).mean())


BASE = {"d_k": D_K, "d_v": D_V, "d_sae": 16, "k": 2}


@pytest.mark.parametrize("config", [WriteSAEConfig, WriteSAETrainingConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "1 <= k <= d_sae"),
        ({"k": 17}, "k=17 features cannot be active out of d_sae=16"),
        ({"rank": 0}, "must be positive"),
        ({"d_k": -1}, "must be positive"),
        ({"d_sae": 0}, "must be positive"),
        ({"encoder": "linear"}, "encoder='linear' is unknown: choose bilinear, tied, dense"),
        ({"decoder": "tied"}, "decoder='tied' is unknown: choose factored, dense"),
        ({"activation": "relu"}, "activation='relu' is unknown: choose topk, batchtopk, jumprelu, gated"),
        ({"normalize_activations": "covariance_whitening"}, "no longer rank 1"),
        ({"apply_b_dec_to_input": True}, "leave apply_b_dec_to_input False"),
    ],
)
def test_members_that_do_not_exist_are_refused(config, options, message):
    with pytest.raises(WriteSAEError, match=message):
        config(**(BASE | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_loss_coefficient": -1.0}, "aux_loss_coefficient must not be negative"),
        ({"k_aux": -1}, "k_aux must not be negative"),
        ({"write_alignment_coefficient": -0.1}, "write_alignment_coefficient must not"),
        ({"renormalize_every": -1}, "renormalize_every must not"),
        ({"resample_every": -5}, "resample_every must not"),
        ({"l0_coefficient": -1.0}, "l0_coefficient must not"),
        ({"l1_coefficient": -1.0}, "l1_coefficient must not"),
        ({"jumprelu_bandwidth": 0.0}, "jumprelu_bandwidth must not"),
        ({"jumprelu_init_threshold": 0.0}, "jumprelu_init_threshold must not"),
        ({"l0_warm_up_steps": -1}, "l0_warm_up_steps must not"),
        ({"l1_warm_up_steps": -1}, "l1_warm_up_steps must not"),
        ({"write_alignment_coefficient": float("nan")}, "write_alignment_coefficient must"),
        ({"activation": "gated", "normalize_activations": "layer_norm"}, "gate's own reconstruction"),
        ({"normalize_activations": "layer_norm"}, "set aux_loss_coefficient=0"),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(WriteSAEError, match=message):
        WriteSAETrainingConfig(**(BASE | options))


def test_d_in_is_derived_whatever_is_given():
    for config in (WriteSAEConfig, WriteSAETrainingConfig):
        assert config(**BASE, d_in=512).d_in == D_K * D_V


# Read alignment


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 2}, {"decoder": "dense"}, {"k": 1, "encoder": "tied"}, {"activation": "gated"}],
    ids=str,
)
@pytest.mark.parametrize("n_reads", [1, 3])
def test_read_alignment_equals_its_formula(options, n_reads):
    """Loop by loop: what each strong atom gets wrong of X^T r, at its share, weighted by a softmax."""
    torch.manual_seed(0)
    sae = make(read_alignment_coefficient=3.0, dominant_share=0.4, **options).to(dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    sae.fold_W_dec_norm()
    key, value = (torch.randn(7, 1, d, dtype=torch.float64) for d in (D_K, D_V))
    reads = torch.randn(7, n_reads, D_K, dtype=torch.float64)
    reads[2, 1:] = 0  # the passage ends
    output = sae.training_forward_pass(step_input(PackedWrites(Write(key, value, reads))))
    x = key.mT @ value
    flat = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    atoms, encoder = flat.view(-1, D_K, D_V), sae.W_enc.T.reshape(-1, D_K, D_V)
    total, power = 0.0, x.square().sum((1, 2))
    share = 1.0 if options.get("encoder") == "tied" else 0.4  # a projection has its own size
    for n in range(7):
        score = torch.stack([(x[n] * e).sum() for e in encoder])
        size = score.relu()
        if options.get("activation") == "gated":
            gate = sae.activation_fn
            size = (gate.log_gain.exp() * score + gate.magnitude_bias).relu()
        strongest = score.argsort(descending=True)[:4]
        weight = (size[strongest] / share / (0.1 * power[n].sqrt())).softmax(0)
        read_out = sum((x[n].T @ r).square().sum() for r in reads[n])
        for w, atom in zip(weight, strongest, strict=True):
            away = size[atom] / share * atoms[atom] - x[n]
            missed = sum((away.T @ r).square().sum() for r in reads[n]) / read_out
            total = total + w * missed / (1 + missed)
    expected = 3.0 * power.mean() * total / 7
    torch.testing.assert_close(output.losses["read_alignment_loss"], expected)
    parameters = [p for p in sae.parameters() if p.requires_grad]
    ours = torch.autograd.grad(output.losses["read_alignment_loss"], parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a.sum(), zero.to(b) if b is None else b.sum())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_inputs_without_read_vectors_train_without_read_alignment():
    key, value = torch.randn(7, 1, D_K), torch.randn(7, 1, D_V)
    packed = PackedWrites(Write(key, value))
    for x in (packed, packed.dense()):
        assert "read_alignment_loss" not in make().training_forward_pass(step_input(x)).losses


def test_the_logged_cosine_does_not_depend_on_the_norms_of_atoms():
    sae, x = make(), writes(32, 8, 3, torch.float32)
    given = step_input(x, logging=True)
    cosine = sae.training_forward_pass(given).metrics["write_cosine"]
    with torch.no_grad():
        sae.dec_key *= 3
    assert sae.training_forward_pass(given).metrics["write_cosine"] == pytest.approx(cosine, rel=1e-4)
