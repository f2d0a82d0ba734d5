"""Evaluation, and models with SAEs spliced in: `run_evals`, `run_with_saes` and their relatives."""

import copy
import math

import pytest
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from hooked_models import HookedModelError
from tests.writesae_lens.saelens.runs import (
    CELLS,
    CONTEXT,
    FACTORS,
    dataset,
    dense,
    dense_decode,
    dense_encode,
    run_with_dense,
    writes,
)


@pytest.mark.parametrize(("name", "special"), [("tiny-gdn", False), *((name, True) for name in CELLS)])
def test_run_evals_measures_what_can_be_computed_by_hand(models, runs, token_rows, name, special):
    """Every metric of get_eval_everything_config, special tokens left out (the default) or not."""
    model, sae = models[name], SAE.load_from_disk(runs(name).saved)
    hook, rows = sae.cfg.metadata.hook_name, token_rows[name]
    ends = (rows == model.tokenizer.eos_token_id).any(1)
    rows = torch.cat([rows[ends], rows[~ends][-24:]])[:16]
    assert ends.any()
    store = ActivationsStore.from_sae(model, sae, dataset=dataset(rows), context_size=CONTEXT)
    metrics, features = run_evals(
        sae,
        store,
        model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(4, n_eval_reconstruction_batches=2),
        exclude_special_tokens=special,
    )
    ids = {t for t in model.tokenizer.all_special_ids if t is not None}
    keep = torch.tensor([[not special or int(t) not in ids for t in row] for row in rows])

    first, kept = rows[:8], keep[:8]
    replace = [(hook, lambda x, hook: torch.where(kept[..., None], dense(sae, x), x))]
    ablate = [(hook, lambda x, hook: torch.zeros_like(x))]
    with torch.no_grad():
        logits = {
            "without_sae": model(first).log_softmax(-1),
            "with_sae": model.run_with_hooks(first, fwd_hooks=replace).log_softmax(-1),
            "with_ablation": model.run_with_hooks(first, fwd_hooks=ablate).log_softmax(-1),
        }
    native, expected = logits["without_sae"], {}
    for run_name, values in logits.items():
        surprise = -values[:, :-1].gather(-1, first[:, 1:, None])[..., 0]
        expected[f"ce_loss_{run_name}"] = surprise[kept[:, :-1]].mean()
        expected[f"kl_div_{run_name}"] = (native.exp() * (native - values)).sum(-1)[kept].mean()
    ce = [expected[f"ce_loss_{n}"] for n in ("with_ablation", "with_sae", "without_sae")]
    kl = [expected[f"kl_div_{n}"] for n in ("with_ablation", "with_sae")]
    expected["ce_loss_score"] = (ce[0] - ce[1]) / (ce[0] - ce[2])
    expected["kl_div_score"] = (kl[0] - kl[1]) / kl[0]

    second, kept = rows[8:12], keep[8:12]  # the store goes on from where the first metrics left it
    x = writes(model, hook, second)[kept]
    acts = dense_encode(sae, x)
    recons = dense_decode(sae, acts)
    squared = (recons - x).square().sum(-1)
    variance = (x - x.mean(0)).square().sum(-1)
    expected |= {
        "l2_norm_in": x.norm(dim=-1).mean(),
        "l2_norm_out": recons.norm(dim=-1).mean(),
        "relative_reconstruction_bias": recons.square().sum(-1).mean() / (recons * x).sum(-1).mean(),
        "l0": (acts > 0).sum(-1).float().mean(),
        "l1": acts.sum(-1).mean(),
        "mse": squared.mean(),
        "explained_variance": 1 - squared.mean() / variance.mean(),
        "explained_variance_legacy": (1 - squared / variance).mean(),
        "cossim": torch.nn.functional.cosine_similarity(x, recons).mean(),
    }
    norms = x.norm(dim=-1)
    expected["l2_ratio"] = (recons.norm(dim=-1) / torch.where(norms < 1e-4, 1.0, norms)).mean()
    found = {k: v for group, values in metrics.items() if group != "token_stats" for k, v in values.items()}
    expected.pop("kl_div_without_sae")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert math.isfinite(found[key])
        # Scores are ratios of small differences.
        rel = 2e-2 if key.endswith("score") else 2e-3
        assert found[key] == pytest.approx(float(value), rel=rel, abs=1e-6), key
    assert found["explained_variance"] > 0.1
    assert found["kl_div_with_sae"] < found["kl_div_with_ablation"]

    fires = torch.zeros(4, CONTEXT, sae.cfg.d_sae, dtype=torch.bool)
    fires[kept] = acts > 0
    density = fires.flatten(0, 1).sum(0) / kept.sum()
    torch.testing.assert_close(torch.tensor(features["feature_density"]), density)
    per_passage = fires.flatten(0, 1).sum(0) / fires.any(1).sum(0)  # 0 / 0 for atoms that never fire
    found = torch.tensor(features["consistent_activation_heuristic"])
    torch.testing.assert_close(found, per_passage, equal_nan=True)
    encoder, atoms = sae.W_enc.T.detach(), sae.W_dec.detach()
    torch.testing.assert_close(torch.tensor(features["encoder_norm"]), encoder.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(encoder, atoms)
    torch.testing.assert_close(torch.tensor(features["encoder_decoder_cosine_sim"]), cosine)
    assert features["encoder_bias"] == sae.b_enc.tolist()


def test_run_evals_leaves_the_model_as_it_was(model, run, rows):
    """A second evaluation of the same rows gives the same numbers."""
    sae = SAE.load_from_disk(run.saved)
    results = []
    for _ in range(2):
        data = dataset(rows[-16:])
        store = ActivationsStore.from_sae(model, sae, dataset=data, context_size=CONTEXT)
        evals = get_eval_everything_config(4, n_eval_reconstruction_batches=2)
        results.append(run_evals(sae, store, model, activation_scaler=ActivationScaler(), eval_config=evals))
    assert results[0][0] == results[1][0]


# Splicing into the model


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(CELLS))
def spliced(request, models, runs, token_rows, no_gradients):
    """Model, its WriteSAE, passages; and afterwards a check that the model is as if nothing had been."""
    model, name = models[request.param], request.param
    sae = SAE.load_from_disk(runs(name).saved)
    tokens = token_rows[name][-3:]
    hook = sae.cfg.metadata.hook_name
    names = {key: point.name for key, point in model.hook_dict.items()}
    native = model(tokens)
    yield model, sae, hook, tokens, native
    assert model.acts_to_saes == {}
    assert {key: point.name for key, point in model.hook_dict.items()} == names
    fired = []
    assert torch.equal(model(tokens), native)
    again = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: fired.append(hook.name))])
    zeroed = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: torch.zeros_like(x))])
    _, cache = model.run_with_cache(tokens, names_filter=[hook])
    assert fired == [hook]
    assert torch.equal(again, native)
    assert not torch.equal(zeroed, native)
    assert list(cache) == [hook]
    with pytest.raises(HookedModelError, match="hook_sae_acts_post"):
        model.run_with_hooks(tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", lambda x, hook: x)])


def test_run_with_saes_writes_the_reconstruction(spliced):
    model, sae, hook, tokens, native = spliced
    logits = model.run_with_saes(tokens, saes=[sae])
    exact = model.run_with_saes(tokens, saes=sae, use_error_term=True)
    loss = model.run_with_saes(tokens, saes=sae, return_type="loss")
    expected = run_with_dense(model, sae, hook, tokens)
    assert (expected - native).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact, native, atol=1e-4, rtol=1e-4)
    logprobs = expected.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(loss, -logprobs.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error_term", [False, True])
def test_the_cache_of_a_spliced_run_is_the_dense_computation(spliced, error_term):
    model, sae, hook, tokens, _native = spliced
    x = writes(model, hook, tokens)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error_term)
    acts = dense_encode(sae, x)
    recons = dense_decode(sae, acts)
    expected = {
        "hook_sae_input": x,
        "hook_sae_acts_post": acts,
        "hook_sae_recons": recons,
        "hook_sae_output": x if error_term else recons,
    }
    if error_term:
        expected["hook_sae_error"] = x - recons
    for name, value in expected.items():
        torch.testing.assert_close(cache[f"{hook}.{name}"], value, atol=1e-5, rtol=1e-4)
    kept = cache[f"{hook}.hook_sae_acts_pre"].topk(sae.cfg.k).values.relu()
    torch.testing.assert_close(kept, acts.topk(sae.cfg.k).values, atol=1e-5, rtol=1e-4)
    assert sum(key.startswith(f"{hook}.") for key in cache) == len(expected) + 1
    assert hook not in cache


def test_features_are_edited_while_spliced(spliced):
    """Ablating one feature takes coefficient times atom from the write; the error term keeps the rest."""
    model, sae, hook, tokens, native = spliced
    acts = dense_encode(sae, writes(model, hook, tokens))
    feature = int(acts.sum((0, 1)).argmax())
    atom = sae.W_dec[feature].detach()

    def ablate(acts, hook):
        acts[..., feature] = 0
        return acts

    ablating = [(f"{hook}.hook_sae_acts_post", ablate)]
    with model.saes(saes=[sae], use_error_term=True):
        logits = model.run_with_hooks(tokens, fwd_hooks=ablating)
        again = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=ablating)
    change = -acts[..., feature, None] * atom
    expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: x + change)])
    without = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: dense(sae, x) + change)])
    assert (expected - native).abs().max() > 1e-4
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, without, atol=1e-4, rtol=1e-4)


def test_steering_with_a_row_of_w_dec(spliced):
    """Adding c * W_dec[f] to the write is raising f's coefficient by c under the error term."""
    model, sae, hook, tokens, native = spliced
    feature, size = 3, 0.7
    key, value = sae.decoder_factors()
    atom = torch.outer(key[feature, 0], value[feature, 0]).flatten().detach()
    torch.testing.assert_close(sae.W_dec[feature].detach(), atom)

    def raise_coefficient(acts, hook):
        acts[..., feature] += size
        return acts

    steered = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: x + size * sae.W_dec[feature])])
    with model.saes(saes=[sae], use_error_term=True):
        raised = model.run_with_hooks(tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", raise_coefficient)])
    assert (steered - native).abs().max() > 1e-3
    torch.testing.assert_close(raised, steered, atol=1e-4, rtol=1e-4)


def test_added_saes_stay_until_reset(spliced):
    model, sae, hook, tokens, native = spliced
    expected = run_with_dense(model, sae, hook, tokens)
    other = copy.deepcopy(sae)
    other.dec_value.neg_()
    opposite = run_with_dense(model, other, hook, tokens)
    model.add_sae(sae)
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    inner = model.run_with_saes(tokens, saes=[other])
    torch.testing.assert_close(inner, opposite, atol=1e-4, rtol=1e-4)
    assert model.acts_to_saes == {hook: sae}
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert f"{hook}.hook_sae_acts_post" in model.hook_dict
    model.reset_saes(hook)
    assert torch.equal(model(tokens), native)
    model.add_sae(sae, use_error_term=True)
    torch.testing.assert_close(model(tokens), native, atol=1e-4, rtol=1e-4)
    model.reset_saes()


def test_saes_at_several_heads_at_once(spliced):
    model, sae, hook, tokens, _native = spliced
    layer, head = model.site(hook).cell.layer, model.site(hook).cell.head
    second = copy.deepcopy(sae)
    second.cfg.metadata.hook_name = model.write_hook_name(layer, head + 1)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae, second])
    hooks = [(s.cfg.metadata.hook_name, lambda x, hook, s=s: dense(s, x)) for s in (sae, second)]
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for s in (sae, second):
        assert cache[f"{s.cfg.metadata.hook_name}.hook_sae_acts_post"].shape == (3, CONTEXT, 64)


def test_generation_with_an_sae_is_that_of_whole_forward_passes(spliced):
    model, sae, hook, tokens, _native = spliced
    prompt = tokens[:1, :8]
    expected = prompt
    for _ in range(6):
        best = run_with_dense(model, sae, hook, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    seen = []
    with model.saes(saes=[sae]):
        with model.hooks(fwd_hooks=[(f"{hook}.hook_sae_acts_post", lambda x, hook: seen.append(x.shape[1]))]):
            generated = model.generate(prompt, return_type="tokens", **options)
        uncached = model.generate(prompt, return_type="tokens", use_past_kv_cache=False, **options)
    assert generated.tolist() == expected.tolist()
    assert uncached.tolist() == expected.tolist()
    assert len(seen) == 6  # one pass a token


def test_errors_while_spliced_leave_nothing_behind(spliced):
    model, sae, hook, tokens, _native = spliced

    def fails(x, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f"{hook}.hook_sae_acts_post", fails)])
    lost = copy.deepcopy(sae)
    lost.cfg.metadata.hook_name = hook.replace("write", "wrote")
    for call in (
        lambda: model.run_with_saes(tokens, saes=[sae, lost]),
        lambda: model.run_with_saes(tokens, saes=lost),
        lambda: model.run_with_cache_with_saes(tokens, saes=[lost]),
        lambda: model.add_sae(lost),
    ):
        with pytest.raises(HookedModelError, match="wrote"):
            call()
    inner = f"{hook}.hook_sae_nothing"
    for call in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(inner, lambda x, hook: x)]),
        lambda: model.run_with_cache(tokens, names_filter=[inner]),
        lambda: model.add_hook(inner, lambda x, hook: x),
    ):
        with model.saes(saes=[sae]), pytest.raises(HookedModelError, match="hook_sae_nothing"):
            call()


@torch.enable_grad()
def test_gradients_reach_features_through_a_spliced_run(spliced):
    """d loss / d coefficient, from autograd, against central differences of plain edited forward passes."""
    model, sae, hook, tokens, _native = spliced
    acts = dense_encode(sae, writes(model, hook, tokens))
    gradients = {}
    with model.saes(saes=[sae], use_error_term=True):
        bwd = [(f"{hook}.hook_sae_acts_post", lambda g, hook: gradients.update(acts=g))]
        with model.hooks(bwd_hooks=bwd):
            model(tokens, return_type="loss").backward()
    active = gradients["acts"] * (acts > 0)
    passage, position, feature = (int(i) for i in (active.abs() == active.abs().max()).nonzero()[0])
    found = active[passage, position, feature]
    model.zero_grad()

    @torch.no_grad()
    def loss(change):
        def edit(x, hook):
            x = x.clone()
            x[passage, position] += change * sae.W_dec[feature].detach()
            return x

        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, edit)]).double().log_softmax(-1)
        return -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean()

    step = 0.2 * float(acts[passage, position, feature])
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert abs(slope) > 1e-6
    assert float(found) == pytest.approx(float(slope), rel=0.1, abs=1e-6)
    with model.saes(saes=[sae]):
        model(tokens, return_type="loss").backward()
    assert all(getattr(sae, name).grad.abs().sum() > 0 for name in FACTORS)
    assert all(torch.isfinite(getattr(sae, name).grad).all() for name in FACTORS)
    model.zero_grad()
