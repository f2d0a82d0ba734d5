"""Logits in float32 from a model in half precision, and the KL that its rounding gives."""

import copy

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.unembedding import logits_of, rounding_kl, run_to_logits, run_to_residual

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def half(name):
    return HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def exact(name):
    """The same model, its weights rounded to bfloat16, in float64."""
    model = HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.bfloat16)
    model.original_model.double()
    return model


@pytest.fixture(scope="module")
def tokens(half):
    return half.to_tokens(zoo.held_out_text()[:400], prepend_bos=False, truncate=False)[:, :24]


def last_residual(model, tokens):
    """The residual stream after the last layer, by a plain hook of torch."""
    seen = []
    handle = model.ln_final.register_forward_pre_hook(lambda norm, given: seen.append(given[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def unembedded(model, residual):
    """Norm and unembedding in float64, of the weights as they are."""
    norm = copy.deepcopy(model.ln_final.original_component).double()
    weight = model.original_model.get_output_embeddings().weight.double()
    x = residual.double()
    if isinstance(norm, torch.nn.LayerNorm):
        return norm(x) @ weight.T
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    scale = 1 + norm.weight if "Qwen" in type(norm).__name__ else norm.weight
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale) @ weight.T


def test_logits_are_those_of_the_rounded_residual_stream_in_float64(half, tokens, monkeypatch):
    monkeypatch.setattr("hooked_models.unembedding._WEIGHTS_AT_ONCE", 2**14)  # many cuts
    with torch.no_grad():
        found, own = run_to_logits(half, tokens), half(tokens).float()
    expected = unembedded(half, last_residual(half, tokens)).detach()
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 5e-5
    assert float((own - expected).abs().max()) > 5e-3  # what the model itself rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_32_bits_on_it_is_the_model_itself(name, tokens, dtype):
    model = HookedRecurrent.boot_transformers(name, device="cpu", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(run_to_logits(model, tokens), model(tokens))
    assert torch.equal(rounding_kl(model, torch.randn(3, model.cfg.d_model), 1), torch.zeros(3))


def test_decoding_goes_on_in_the_cache(half, tokens):
    with torch.no_grad():
        whole, cache = run_to_logits(half, tokens), half.new_cache()
        first = run_to_logits(half, tokens[:, :20], past_key_values=cache, use_cache=True)
        rest = run_to_logits(half, tokens[:, 20:], past_key_values=cache, use_cache=True)
    assert float((torch.cat([first, rest], dim=1) - whole).abs().max()) < 0.3  # rounded in another order


def test_a_hook_on_the_unembedding_or_the_last_norm_keeps_its_effect(half, tokens):
    for hook in ("unembed.hook_out", "ln_final.hook_out"):
        with torch.no_grad(), half.hooks(fwd_hooks=[(hook, lambda x, hook: x * 0)]):
            assert not run_to_logits(half, tokens).any()


def test_swapped_and_added_writes_have_logits_in_float32(half, exact, tokens):
    cell, at = half.cell(1, 2), torch.tensor([3, 9])
    key, value = torch.randn(2, 1, cell.d_k), torch.randn(2, 1, cell.d_v)
    errors = {}
    for model in (half, exact):
        native, branches = model.run_with_swapped_writes(tokens[0], 1, 2, at, key, value)
        added = model.run_with_added_writes(tokens[0], 1, 2, at, key[:, 0], value[:, 0])
        errors[model] = native, branches, added
    for found, expected in zip(errors[half], errors[exact], strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).abs().mean()) < 0.05


def test_gradients_go_through_and_the_derivative_is_that_of_the_exact_model(half, exact, tokens):
    cell, at = half.cell(1, 2), torch.tensor([5])
    key = torch.randn(1, 1, cell.d_k)
    slopes = []
    for model in (half, exact):
        value = torch.zeros(1, 1, cell.d_v, requires_grad=True)
        _, logits = model.run_with_swapped_writes(tokens[0], 1, 2, at, key, value)
        slopes.append(torch.autograd.grad(logits[0, 7], value)[0].flatten().double())
    assert float(torch.nn.functional.cosine_similarity(*slopes, dim=0)) > 0.98


def test_the_floor_is_the_mean_kl_of_roundings_that_are_drawn(half, tokens):
    """Against draws: n relative errors of half a unit in the last place, in each of two runs."""
    residual = last_residual(half, tokens)[0]
    found = rounding_kl(half, residual[:24], 1)
    residual = residual.double()
    keeps_float32 = half.original_model.config.model_type == "mamba2"
    n_roundings = 1 if keeps_float32 else len(half.blocks) - 1
    generator, half_unit, kls = torch.Generator().manual_seed(0), 2.0**-8, []
    for _ in range(40):
        runs = []
        for _ in range(2):
            draw = torch.rand(n_roundings, *residual.shape, generator=generator, dtype=torch.float64)
            runs.append(unembedded(half, residual * (1 + half_unit * (2 * draw - 1).sum(0))))
        p, q = (x.log_softmax(-1) for x in runs)
        kls.append((p.exp() * (p - q)).sum(-1))
    drawn = torch.stack(kls).mean(0)
    assert float((found / drawn).log().abs().median()) < 0.3


def test_a_deletion_below_the_floor_says_nothing_about_the_exact_one(half, exact, tokens):
    """The error of bfloat16's KLs is of the size of the floor, not orders above or below it."""
    cell, at = half.cell(1, 2), torch.arange(24)
    nothing = torch.zeros(24, 1, cell.d_k), torch.zeros(24, 1, cell.d_v)
    kls = []
    for model in (half, exact):
        native, branches = model.run_with_swapped_writes(tokens[0], 1, 2, at, *nothing)
        p, q = (x.double().log_softmax(-1) for x in (branches, native))
        kls.append((p.exp() * (p - q)).sum(-1))
    floor = rounding_kl(half, last_residual(half, tokens)[0, at], 1).double()
    error = (kls[0].sqrt() - kls[1].sqrt()).abs().square()  # of the shift of the logits, so to say
    assert 0.02 < float((error / floor).median()) < 5


def test_logits_of_takes_any_batch(half):
    residual = torch.randn(2, 3, half.cfg.d_model).bfloat16()
    expected = unembedded(half, residual)
    torch.testing.assert_close(logits_of(half, residual).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(half, residual[0, 0]).double(), expected[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", ["unembed.hook_out", "unembed.hook_in", "ln_final.hook_in"])
def test_a_run_past_the_last_hooks_is_refused(half, tokens, point):
    """Hooks and SAEs on the last norm and the unembedding would see nothing of it."""
    sae = StandardSAE(StandardSAEConfig(d_in=half.cfg.d_model, d_sae=8, dtype="bfloat16"))
    sae.cfg.metadata.hook_name = "unembed.hook_in"
    refused = pytest.raises(HookedModelError, match=rf"past the hooks on {point}\b.*: remove them first")
    with half.hooks(fwd_hooks=[(point, lambda x, hook: x)]), refused:
        run_to_residual(half, tokens)
    half.add_sae(sae)
    try:
        with pytest.raises(HookedModelError, match=r"past the hooks on unembed\.hook_in"):
            run_to_residual(half, tokens)
        with torch.no_grad():
            assert torch.equal(run_to_logits(half, tokens), half(tokens))
    finally:
        half.reset_saes()


def test_nothing_is_trained_that_a_saved_model_does_not_have(name):
    """As the bias of zeros that TransformerLens gives the unembedding."""
    model = HookedRecurrent.boot_transformers(name, device="cpu")
    model(model.to_tokens("It is a truth"), return_type="loss").backward()
    net = model.original_model
    trained = {n.replace("_original_component.", "") for n, x in net.named_parameters() if x.grad is not None}
    assert trained
    assert trained <= type(net)(net.config).state_dict().keys()
