"""SAELens's tools on a dictionary of codes: what they give against plain formulas, or a second way there."""

import copy
import math

import pandas as pd
import pytest
import torch
from sae_lens import SAE, ActivationsStore, TrainingSAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

from tests.writesae_lens.saelens.runs import (
    BATCH,
    CONTEXT,
    EARLY,
    HOOK,
    LATE,
    Run,
    cache_runner,
    checkpoints,
    dataset,
    make_multi_runner,
    make_runner,
    run_with_dense,
    sae_config,
    same_weights,
    writes,
)
from writesae_lens import WriteSAE, WriteSAEError, WriteTrainingSAE
from writesae_lens.saelens.runner import train_cells

N_KEY, N_VALUE, K_KEY, K_VALUE = 32, 40, 2, 3
SIZES = {"decoder": "codes", "n_key": N_KEY, "n_value": N_VALUE, "k_key": K_KEY, "k_value": K_VALUE}
CODES = ("dec_key", "dec_value", "enc_key", "enc_value")


def codes_config(**options):
    return sae_config(**(SIZES | {"later_reads": (1, 4)} | options))


def encode(sae, x):
    """Coefficients: k_key key codes of each write's unit key, k_value value codes in units of the write."""
    key, norm, value = (part[..., 0] for part in svd(x, sae))
    key, value = align(sae, key, value)
    acts = []
    for side, encoder, codes, k in (
        (key, sae.enc_key, sae.dec_key, K_KEY),
        (value, sae.enc_value, sae.dec_value, K_VALUE),
    ):
        size = codes.detach().norm(dim=-1)
        z = side @ encoder.detach().T
        top = z.topk(k, dim=-1).indices
        acts.append(torch.zeros_like(z).scatter(-1, top, z.gather(-1, top).relu()) / size)
    return torch.cat([acts[0], acts[1] * norm[..., None]], dim=-1)


def svd(x, sae):
    u, s, vh = torch.linalg.svd(x.unflatten(-1, (sae.cfg.d_k, sae.cfg.d_v)), full_matrices=False)
    return u, s, vh.mT


def align(sae, key, value):
    """The pair's common sign, as the SAE has it."""
    sign = torch.where(key @ sae.sign_key + value @ sae.sign_value < 0, -1.0, 1.0)[..., None]
    return key * sign, value * sign


def decode(sae, acts):
    key, value = acts[..., :N_KEY] @ sae.dec_key.detach(), acts[..., N_KEY:] @ sae.dec_value.detach()
    return (key[..., None] * value[..., None, :]).flatten(-2)


def rebuilt(sae, x):
    return decode(sae, encode(sae, x))


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("codes"), rows, sae=codes_config(), n_checkpoints=2)


@pytest.fixture(scope="module")
def early(run):
    return TrainingSAE.load_from_disk(checkpoints(run.runner)[EARLY])


@pytest.fixture
def sae(run):
    return SAE.load_from_disk(run.saved)


def test_the_runner_leaves_codes_that_explain_text_they_never_saw(run, sae, model, rows):
    x = writes(model, HOOK, rows[-16:])
    assert isinstance(sae, WriteSAE)
    assert sae.is_codes
    assert (sae.cfg.d_sae, sae.cfg.k) == (N_KEY + N_VALUE, K_KEY + K_VALUE)
    assert same_weights(sae, run.sae)
    torch.testing.assert_close(sae.encode(x), encode(sae, x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sae(x), rebuilt(sae, x), atol=1e-4, rtol=1e-3)
    assert (sae(x) - x).square().sum() < 0.6 * x.square().sum()
    assert sae.cfg.metadata.hook_name == HOOK
    sparsity = load_file(run.saved / "sparsity.safetensors")["sparsity"]
    fired = torch.stack([(encode(sae, b) > 0).any(0) for b in run.batches[-10:]]).any(0)
    assert sparsity.shape == (N_KEY + N_VALUE,)
    assert float((sparsity[fired] > -10).float().mean()) > 0.9


def test_training_sees_the_reads_that_its_config_names(model, rows, tmp_path):
    """The own read and the later ones are in the loss; with other distances it is another training."""
    trained = [
        make_runner(tmp_path / str(n), rows, training_tokens=2 * BATCH, output_path=None, **options)
        for n, options in enumerate(
            (
                {"sae": codes_config()},
                {"sae": codes_config(later_reads=())},
                {"sae": codes_config(later_reads=(), read_alignment_coefficient=0.0)},
            )
        )
    ]
    shapes = [next(r.activations_store).blocks[0].reads.shape[-2] for r in trained]
    assert shapes == [3, 1, 1]
    saes = [runner.run() for runner in trained]
    assert not same_weights(saes[0], saes[1])
    assert not same_weights(saes[1], saes[2])


# Going on


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "batchtopk", "encoder": "tied"}, {"activation": "jumprelu"}],
    ids=["topk", "tied batchtopk", "jumprelu"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(rows, tmp_path, options):
    """At 768 tokens value codes are still started from writes, and some key codes are dead."""
    common = {"sae": codes_config(n_key=100, n_value=1024, **options), "training_tokens": 2048}
    common |= {"dead_feature_window": 4}
    full = make_runner(tmp_path / "full", rows, n_checkpoints=2, **common)
    finished = full.run()
    at = str(checkpoints(full)[768])
    assert same_weights(
        make_runner(tmp_path / "on", rows, resume_from_checkpoint=at, **common).run(), finished
    )


def test_checkpoints_load_and_training_goes_on_from_a_saved_sae(run, rows, tmp_path):
    found = checkpoints(run.runner)
    assert sorted(found) == [EARLY, LATE]
    loaded = TrainingSAE.load_from_disk(found[LATE])
    assert isinstance(loaded, WriteTrainingSAE)
    assert loaded.cfg.later_reads == (1, 4)
    options = {"training_tokens": BATCH, "output_path": None, "sae": codes_config()}
    still = make_runner(tmp_path, rows, from_pretrained_path=str(run.saved), lr=0.0, **options).run()
    assert same_weights(still, SAE.load_from_disk(run.saved))
    for changed, message in (
        ({"n_key": 40}, "n_key=32 there and 40 here"),
        (
            {"decoder": "factored"} | dict.fromkeys(("n_key", "n_value", "k_key", "k_value"), 0),
            "decoder='codes'",
        ),
    ):
        with pytest.raises(WriteSAEError, match=message):
            make_runner(
                tmp_path,
                rows,
                from_pretrained_path=str(run.saved),
                **options | {"sae": codes_config(**changed)},
            )
    with pytest.raises(WriteSAEError, match=r"is of another SAE: .*k_value=3 there and 4 here"):
        make_runner(tmp_path, rows, sae=codes_config(k_value=4), resume_from_checkpoint=str(found[EARLY]))


# Several SAEs, caches


def test_codes_beside_atoms_on_one_hook_are_those_trained_alone(early, model, rows, tmp_path):
    """Each trains on the reads that it asks for, though both get the same batches."""
    saes = {"codes": codes_config(), "atoms": sae_config(later_reads=(2,)), "other": codes_config()}
    hooks = {"codes": HOOK, "atoms": HOOK, "other": model.write_hook_name(1, 0)}
    together = make_multi_runner(tmp_path / "all", rows, hooks, saes=saes, training_tokens=EARLY).run()
    assert same_weights(together["codes"], early)
    alone = make_runner(tmp_path / "alone", rows, sae=saes["atoms"], training_tokens=EARLY).run()
    assert same_weights(together["atoms"], alone)
    assert SAE.load_from_disk(tmp_path / "all" / "saes" / "other").is_codes


def test_codes_from_cached_activations_are_the_same_bits(early, rows, tmp_path):
    """The cache holds the reads that SAEs train on by default; this one trains on some of them."""
    cache_runner(tmp_path, rows, HOOK, 2048).run()
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    trained = Run(tmp_path, rows, training_tokens=EARLY, sae=codes_config(), **cached)
    assert same_weights(trained.sae, early)


def test_the_curves_of_codes(model, tmp_path):
    quick = {"training_tokens": 1024, "schedule": {"lr": 2e-3, "train_batch_size_tokens": 128}}
    quick |= {"context_size": 32, "store_batch_size_prompts": 8, "n_batches_in_buffer": 8, "verbose": False}
    folders = train_cells(model, [(1, 2), (1, 3)], tmp_path, sae=codes_config(), **quick)
    for folder in folders:
        curve = pd.read_csv(folder / "training.csv")
        assert curve.step.tolist() == list(range(8))
        assert (curve.l0 <= K_KEY + K_VALUE).all()
        assert (curve.l0 > K_KEY).all()
        assert curve.unexplained.between(0, 2).all()
        terms = [name for name in curve if name.endswith("_loss")]
        assert "read_alignment_loss" in terms
        assert curve[terms].sum(axis=1).to_numpy() == pytest.approx(curve.loss.to_numpy(), rel=1e-5)


# Evaluated and spliced into the model


def test_run_evals_with_everything(model, sae, rows):
    """Errors, L0, losses and feature densities of the reconstruction, by hand."""
    store = ActivationsStore.from_sae(model, sae, dataset=dataset(rows[:12]), context_size=CONTEXT)
    metrics, features = run_evals(
        sae,
        store,
        model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(4, n_eval_reconstruction_batches=2),
        exclude_special_tokens=False,
    )
    first, second = rows[:8], rows[8:12]
    with torch.no_grad():
        native = model(first).log_softmax(-1)
        with_sae = run_with_dense(model, sae, HOOK, first, rebuilt).log_softmax(-1)
    kl = (native.exp() * (native - with_sae)).sum(-1).mean()
    surprise = -with_sae[:, :-1].gather(-1, first[:, 1:, None]).mean()
    x = writes(model, HOOK, second).flatten(0, 1)
    acts, recons = encode(sae, x), rebuilt(sae, x)
    squared, variance = (recons - x).square().sum(-1), (x - x.mean(0)).square().sum(-1)
    expected = {
        "kl_div_with_sae": kl,
        "ce_loss_with_sae": surprise,
        "l0": (acts > 0).sum(-1).float().mean(),
        "l1": acts.sum(-1).mean(),
        "mse": squared.mean(),
        "explained_variance": 1 - squared.mean() / variance.mean(),
        "cossim": torch.nn.functional.cosine_similarity(x, recons).mean(),
    }
    found = {k: v for group, values in metrics.items() if group != "token_stats" for k, v in values.items()}
    assert all(math.isfinite(value) for value in found.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=5e-3, abs=1e-6), name
    density = (acts > 0).float().mean(0)
    torch.testing.assert_close(torch.tensor(features["feature_density"]), density, atol=2e-2, rtol=0)
    assert len(features["encoder_decoder_cosine_sim"]) == N_KEY + N_VALUE


@torch.no_grad()
def test_a_model_runs_on_the_stand_ins(model, sae, rows):
    """The write is the stand-in; with the error term the run is native; an ablated code is missing."""
    tokens = rows[-3:]
    native, expected = model(tokens), run_with_dense(model, sae, HOOK, tokens, rebuilt)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert (expected - native).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(exact, native, atol=1e-4, rtol=1e-4)
    acts = encode(sae, writes(model, HOOK, tokens))
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_post"], acts, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_recons"], decode(sae, acts), atol=1e-4, rtol=1e-3)
    for feature in (
        int(acts[..., :N_KEY].sum((0, 1)).argmax()),
        N_KEY + int(acts[..., N_KEY:].sum((0, 1)).argmax()),
    ):
        edit = [
            (f"{HOOK}.hook_sae_acts_post", lambda a, hook, f=feature: a.index_fill(-1, torch.tensor([f]), 0))
        ]
        found = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=edit)
        without = acts.index_fill(-1, torch.tensor([feature]), 0)
        by_hand = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook, a=without: decode(sae, a))])
        assert (by_hand - expected).abs().max() > 1e-3
        torch.testing.assert_close(found, by_hand, atol=1e-3, rtol=1e-3)
    assert torch.equal(model(tokens), native)


def test_gradients_reach_codes_through_a_spliced_run(model, sae, rows):
    with model.saes(saes=[sae]):
        model(rows[-3:], return_type="loss").backward()
    for name in CODES:
        gradient = getattr(sae, name).grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    model.zero_grad()


def test_copies_other_precisions_and_folds(model, sae, rows):
    x = writes(model, HOOK, rows[-4:])
    wide = copy.deepcopy(sae).to(torch.float64)
    torch.testing.assert_close(wide(x.double()), rebuilt(wide, x.double()))
    scaled = copy.deepcopy(sae)
    with torch.no_grad():
        scaled.dec_key.mul_(torch.linspace(0.5, 2.0, N_KEY)[:, None])
        scaled.dec_value.mul_(3.0)
    torch.testing.assert_close(scaled(x), rebuilt(sae, x), atol=1e-4, rtol=1e-3)
    scaled.fold_W_dec_norm()
    torch.testing.assert_close(scaled.W_dec.norm(dim=-1), torch.ones(N_KEY + N_VALUE))
    torch.testing.assert_close(scaled.encode(x), encode(sae, x), atol=1e-4, rtol=1e-3)
