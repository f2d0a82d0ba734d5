"""Steering against hooks written by hand on the write alone, in batches, while decoding and with beams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import HookedModelError
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages
from writesae_lens import WriteSAEError
from writesae_lens.use.additions import Chosen, additions
from writesae_lens.use.native import without_hooks
from writesae_lens.use.steering import steering

LAYER, HEAD = 1, 2
KEY, VALUE = 3, 20
# Of codes: an address, a content, and the product of another pair.
OF_CODES = {KEY: 2.0, VALUE: -1.5, (5, 25): 0.7}
OF_ATOMS = {3: 2.0, 11: -1.0}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    return read_passages(model)


@pytest.fixture(scope="module")
def saes(model):
    """A dictionary of codes, of atoms of rank 2, and SAELens's own kind, each with the features to steer."""
    return [
        (make_codes(model, layer=LAYER, head=HEAD), OF_CODES),
        (make_sae(model, layer=LAYER, head=HEAD, rank=2), OF_ATOMS),
        (make_sae(model, "flat", LAYER, HEAD), OF_ATOMS),
    ]


def changed(model, sae, features, write: Tensor) -> Tensor:
    """Writes [token, d_k, d_v] with features added at absolute sizes, from their singular vectors."""
    cell, write = model.cell(LAYER, HEAD), write.double()
    added = torch.zeros_like(write)
    if getattr(sae.cfg, "decoder", None) != "codes":
        atoms = sae.W_dec.detach().double().view(-1, cell.d_k, cell.d_v)
        return write + sum(size * atoms[feature] for feature, size in features.items())
    left, sizes, right = torch.linalg.svd(write, full_matrices=False)
    key, value = left[:, :, 0], right[:, 0]
    negative = key @ sae.sign_key.double() + value @ sae.sign_value.double() < 0
    key, value = (torch.where(negative[:, None], -x, x) for x in (key, value))
    for feature, size in features.items():
        pair = feature if isinstance(feature, tuple) else (feature,)
        codes = [
            (sae.dec_key[f] if f < sae.cfg.n_key else sae.dec_value[f - sae.cfg.n_key]).detach().double()
            for f in pair
        ]
        if len(codes) == 2:
            added += size * torch.outer(*codes)
        elif pair[0] < sae.cfg.n_key:
            added += size * torch.einsum("k,n,nv->nkv", codes[0], sizes[:, 0], value)
        else:
            added += size * torch.einsum("nk,v->nkv", key, codes[0])
    return write + added


def by_hand(model, sae, features, where=lambda position: True):
    """A hook for rows without padding and without a cache."""

    def hook(write, hook):
        cell = model.cell(LAYER, HEAD)
        edited = write.clone()
        chosen = [at for at in range(write.shape[1]) if where(at)]
        matrices = write[:, chosen].reshape(-1, cell.d_k, cell.d_v)
        new = changed(model, sae, features, matrices).view(len(write), len(chosen), write.shape[-1])
        edited[:, chosen] = new.to(write.dtype)
        return edited

    return [(model.write_hook_name(LAYER, HEAD), hook)]


@torch.no_grad()
def logits_by_hand(model, sae, features, tokens, where=lambda position: True):
    return model.run_with_hooks(tokens, fwd_hooks=by_hand(model, sae, features, where), use_cache=False)


def steered(model, sae, features, **options):
    return steering(model, sae, features, unit="absolute", **options)


@torch.no_grad()
def test_equals_hooks_by_hand(model, tokens, saes):
    for sae, features in saes:
        with steered(model, sae, features):
            found = model(tokens)
        expected = logits_by_hand(model, sae, features, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - model(tokens)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_equals_the_row_alone(model, tokens, saes, side):
    lengths, width = (20, 13), 20
    for sae, features in saes:
        batch, mask = torch.full((2, width), 7), torch.zeros(2, width, dtype=torch.long)
        places = []
        for row, length in enumerate(lengths):
            at = slice(0, length) if side == "right" else slice(width - length, width)
            batch[row, at], mask[row, at] = tokens[row, :length], 1
            places.append(at)
        with steered(model, sae, features, positions=slice(2, 9)):
            found = model(batch, attention_mask=mask)
        for row, (length, at) in enumerate(zip(lengths, places, strict=True)):
            text = tokens[row : row + 1, :length]
            expected = logits_by_hand(model, sae, features, text, lambda p: 2 <= p < 9)[0]
            torch.testing.assert_close(found[row, at], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cached_decoding_equals_full_passes(model, tokens, saes):
    for sae, features in saes[:2]:
        for where, positions in ((lambda p: True, None), (lambda p: p in (4, 21, 22), [4, 21, 22])):
            with steered(model, sae, features, positions=positions):
                found = model.generate(
                    tokens[:1], max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False
                )
            sequence = tokens[:1]
            for _ in range(4):
                logits = logits_by_hand(model, sae, features, sequence, where)
                sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
            assert found.tolist() == sequence.tolist()


@torch.no_grad()
def test_a_cache_goes_on_with_absolute_positions(model, tokens, saes):
    sae, features = saes[0]
    cache, rows = model.new_cache(), []
    with steered(model, sae, features, positions=slice(9, None, 3)):
        for part in tokens.split([7, 1, 12], dim=1):
            rows.append(model(part, past_key_values=cache, use_cache=True))
    expected = logits_by_hand(model, sae, features, tokens, lambda p: p >= 9 and (p - 9) % 3 == 0)
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_beams(model, prompt, sae, features, positions, where):
    """The reference is a beam search written out, each beam scored by a full pass with the hook by hand."""
    n_beams, n_new = 3, 4
    with steered(model, sae, features, positions=positions):
        found = model.hf_generate(
            prompt, max_new_tokens=n_new, min_new_tokens=n_new, num_beams=n_beams, do_sample=False
        )
    beams = [(0.0, prompt[0].tolist())]
    for _ in range(n_new):
        grown = []
        for score, ids in beams:
            logits = logits_by_hand(model, sae, features, torch.tensor([ids]), where)[0, -1]
            scores = logits.log_softmax(-1)
            scores[model.original_model.generation_config.eos_token_id] = -math.inf
            best = scores.topk(n_beams)
            grown += [(score + float(s), [*ids, int(t)]) for s, t in zip(best.values, best.indices)]
        beams = sorted(grown, reverse=True)[:n_beams]
    assert found[0].tolist() == beams[0][1]


def test_beams_equal_beams_of_full_passes(model, tokens, saes):
    for sae, features in saes[:2]:
        check_beams(model, tokens[:1, :12], sae, features, None, lambda p: True)
        check_beams(model, tokens[:1, :12], sae, features, [13], lambda p: p == 13)


@torch.no_grad()
def test_a_hybrid_with_attention_is_steered_in_decoding_and_beams(gdn_model):
    sae = make_codes(gdn_model, layer=LAYER, head=HEAD)
    prompt = torch.arange(20, 32)[None]
    how = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for positions, where in ((None, lambda p: True), (slice(11, 14), lambda p: 11 <= p < 14)):
        with steered(gdn_model, sae, OF_CODES, positions=positions):
            found = gdn_model.generate(prompt, **how)
        sequence = prompt
        for _ in range(4):
            logits = logits_by_hand(gdn_model, sae, OF_CODES, sequence, where)
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        assert found.tolist() == sequence.tolist()
        check_beams(gdn_model, prompt, sae, OF_CODES, positions, where)


@torch.no_grad()
def test_nested_contexts_add_up_and_nothing_is_left(model, tokens, saes):
    native = model(tokens)
    (sae, features), (atoms, of_atoms) = saes[0], saes[1]
    one, other = {KEY: 2.0}, {VALUE: -1.5, (5, 25): 0.7}
    with steered(model, sae, features):
        together = model(tokens)
    for first, second in ((one, other), (other, one)):
        with steered(model, sae, first), steered(model, sae, second):
            torch.testing.assert_close(model(tokens), together, rtol=1e-5, atol=1e-5)
    with steered(model, atoms, of_atoms), steered(model, sae, features):
        both = model(tokens)
    with steered(model, sae, features), steered(model, atoms, of_atoms):
        torch.testing.assert_close(model(tokens), both, rtol=1e-5, atol=1e-5)
        model.run_with_cache(tokens)  # which adds and removes hooks of its own
        torch.testing.assert_close(model(tokens), both, rtol=1e-5, atol=1e-5)
    with pytest.raises(ZeroDivisionError), steered(model, sae, features):
        1 / 0  # noqa: B018
    assert torch.equal(model(tokens), native)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@torch.no_grad()
def test_several_cells_at_once(model, tokens):
    last = max(model.mixers)
    saes = [make_codes(model, layer=LAYER, head=HEAD), make_sae(model, layer=last, head=0, seed=3)]
    with steered(model, saes, {(LAYER, HEAD, KEY): 2.0, (LAYER, HEAD, 5, 25): 1.0, (last, 0, 4): 3.0}):
        together = model(tokens)
    with steered(model, saes[0], {KEY: 2.0, (5, 25): 1.0}), steered(model, saes[1], {4: 3.0}):
        torch.testing.assert_close(model(tokens), together, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_what_is_added(model, tokens, saes):
    """The loss's derivative along the size is the slope of steered losses."""
    sae, _ = saes[0]

    def loss(size):
        with steered(model, sae, {KEY: size, VALUE: size}), torch.no_grad():
            return float(model(tokens, return_type="loss"))

    slope = (loss(1.05) - loss(0.95)) / 0.1
    name = model.write_hook_name(LAYER, HEAD)
    seen = {}

    def watch(write, hook):
        seen["write"] = write
        write.retain_grad()

    with steered(model, sae, {KEY: 1.0, VALUE: 1.0}), model.hooks(fwd_hooks=[(name, watch)]):
        model(tokens, return_type="loss").backward()
    cell = model.cell(LAYER, HEAD)
    native = model.run_with_cache(tokens, names_filter=[name])[1][name].detach()
    matrices = native.view(-1, cell.d_k, cell.d_v)
    moved = changed(model, sae, {KEY: 1.0, VALUE: 1.0}, matrices).view_as(native)
    along = float((seen["write"].grad.double() * (moved - native)).sum())
    model.zero_grad()
    assert along == pytest.approx(slope, rel=2e-2, abs=1e-6)


@torch.no_grad()
def test_sizes_are_multiples_of_the_median_coefficient(model, tokens, saes):
    """By default, of the test part of the shipped text; here of the passages that are given."""
    for sae, _ in saes:
        name = sae.cfg.metadata.hook_name
        acts = sae.encode(model.run_with_cache(tokens, names_filter=[name])[1][name]).flatten(0, 1)
        active = [f for f in range(sae.cfg.d_sae) if (acts[:, f] > 0).any()]
        medians = {f: float(torch.quantile(acts[acts[:, f] > 0, f].double(), 0.5)) for f in active}
        feature = active[-1]
        with steering(model, sae, {feature: 2.0}, tokens=tokens):
            found = model(tokens)
        with steered(model, sae, {feature: 2.0 * medians[feature]}):
            torch.testing.assert_close(found, model(tokens), rtol=1e-4, atol=1e-5)
        never = next(f for f in range(sae.cfg.d_sae) if f not in active)
        with pytest.raises(WriteSAEError, match=f"feature {never} .* active nowhere"):
            steering(model, sae, {never: 1.0}, tokens=tokens).__enter__()


@torch.no_grad()
def test_sizes_are_of_the_native_model_whatever_is_hooked(model, tokens, saes):
    """Contexts whose sizes are measured add up in any order; the text differs, so that none is known."""
    atoms = saes[1][0]
    last = max(model.mixers)
    upper = make_sae(model, layer=last, head=0, seed=3)
    name = upper.cfg.metadata.hook_name
    for number, order in enumerate(((0, 1), (1, 0))):
        text = tokens.roll(number, dims=0)
        acts = upper.encode(model.run_with_cache(text, names_filter=[name])[1][name]).flatten(0, 1)
        feature = int((acts > 0).sum(0).argmax())
        median = float(torch.quantile(acts[acts[:, feature] > 0, feature].double(), 0.5))
        lower = steered(model, atoms, {3: 40.0})
        higher = steering(model, upper, {feature: 2.0}, tokens=text)
        first, second = ((lower, higher)[n] for n in order)
        with first, second:
            found = model(tokens)
        with steered(model, atoms, {3: 40.0}), steered(model, upper, {feature: 2.0 * median}):
            torch.testing.assert_close(found, model(tokens), rtol=1e-5, atol=1e-5)
    moved = acts[:, feature]
    with steered(model, atoms, {3: 40.0}):
        acts = upper.encode(model.run_with_cache(tokens, names_filter=[name])[1][name]).flatten(0, 1)
    assert not torch.allclose(moved, acts[:, feature], rtol=1e-2)  # the outer context would have moved them
    assert not model.busy_hooks


@torch.no_grad()
def test_hooks_that_were_off_are_back_in_their_order(gdn):
    calls = []
    for n in range(2):
        gdn.add_hook("hook_embed", lambda x, hook, n=n: calls.append(n))
    tokens = torch.arange(6)[None]
    with without_hooks(gdn):
        gdn.run_with_cache(tokens)
        assert not gdn.busy_hooks
    with pytest.raises(ZeroDivisionError), without_hooks(gdn):
        1 / 0  # noqa: B018
    assert calls == []
    gdn(tokens)
    assert calls == [0, 1]
    gdn.reset_hooks()
    assert not gdn.busy_hooks
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    gdn.add_sae(sae)
    with pytest.raises(HookedModelError, match="an SAE is attached"):
        steering(gdn, sae, {3: 1.0}, tokens=torch.arange(40)[None]).__enter__()
    gdn.reset_saes()


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({}, {}, "features must be a dict .* got an empty dict"),
        ([3], {}, "features must be a dict"),
        ({99: 1.0}, {}, "code 99 does not exist"),
        ({-1: 1.0}, {}, "code -1 does not exist"),
        ({"3": 1.0}, {}, "a feature is a number or a pair"),
        ({3: math.nan}, {}, "size of feature 3"),
        ({3: "big"}, {}, "size of feature 3"),
        ({3: 1e308}, {}, "size of feature 3 must be a number within float32"),
        ({3: 10**400}, {}, "size of feature 3 must be a number within float32"),
        ({(20, 3): 1.0}, {}, "key codes 0 to 15 and value codes 16 to 31"),
        ({(0, 0, 3): 1.0}, {}, "is of the cell 0:0, but the SAEs are of 1:2"),
        ({3: 1.0, (1, 2, 3): 1.0}, {}, "named twice"),
        ({3: 1.0}, {"positions": -1}, "must be 0 or more"),
        ({3: 1.0}, {"positions": slice(-3, None)}, "must be 0 or more"),
        ({3: 1.0}, {"positions": 1.5}, "whole numbers"),
        ({3: 1.0}, {"positions": []}, "holds no position"),
        ({3: 1.0}, {"positions": slice(5, 2)}, "holds no position"),
        ({3: 1.0}, {"positions": slice(None, 0)}, "holds no position"),
        ({3: 1.0}, {"unit": "norm"}, "unit='norm' is unknown"),
        ({3: 1.0}, {"unit": "firing", "tokens": "Hi"}, "give more text or tokens as passages"),
    ],
)
def test_wrong_input_is_one_line(gdn, features, options, message, without_type_checks):
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    with pytest.raises(WriteSAEError, match=message) as caught:
        steering(gdn, sae, features, **({"unit": "absolute"} | options)).__enter__()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_firing_sizes_that_make_sizes_overflow_are_refused(gdn):
    sae, site = make_codes(gdn, layer=LAYER, head=HEAD), gdn.site(gdn.write_hook_name(LAYER, HEAD))
    for features in ((3,), (20,), (5, 25)):
        with pytest.raises(WriteSAEError, match="1:2 add is not finite"):
            additions({site: sae}, {Chosen(site, features): 1e40})


def test_states_and_ambiguous_features_are_refused(gdn):
    with pytest.raises(WriteSAEError, match="is on states"):
        steered(gdn, make_sae(gdn, "state", LAYER, HEAD), {3: 1.0}).__enter__()
    saes = [make_sae(gdn, layer=LAYER, head=HEAD), make_sae(gdn, layer=LAYER, head=0)]
    with pytest.raises(WriteSAEError, match=r"which SAE has feature 3.* LAYER:HEAD:FEATURE"):
        steered(gdn, saes, {3: 1.0}).__enter__()
