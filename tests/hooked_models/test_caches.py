"""Caches gone on from: copies, states set in them, gradients through them, added writes after them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.caches import CACHE_ARGUMENTS, cached, repeated

LAYER, HEAD = 1, 2
PREFIX, REST = 9, 5


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    """Four passages, [4, 14]."""
    ids = model.to_tokens(zoo.held_out_text()[:2000], prepend_bos=False, truncate=False)
    return ids[0, : 4 * (PREFIX + REST)].view(4, PREFIX + REST)


def read(model: Any, tokens: Tensor) -> Any:
    """A cache that holds these tokens."""
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def go_on(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    return model(tokens, past_key_values=cache, use_cache=True).double()


@torch.no_grad()
def without_cache(model: Any, tokens: Tensor, hooks: Any = ()) -> Tensor:
    return model.run_with_hooks(tokens, fwd_hooks=list(hooks), use_cache=False).double()


def tensors(held: Any) -> Iterator[Tensor]:
    """Every tensor that a cache holds."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors(value)
    elif hasattr(held, "layers"):
        for layer in held.layers:
            yield from tensors(vars(layer))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# Copies.


def test_repeated_rows_go_on_as_the_rows_of_a_batch_would(model: Any, tokens: Tensor):
    cache = repeated(read(model, tokens[:2, :PREFIX]), 3)
    rests = torch.stack([tokens[n % 4, PREFIX:].roll(n) for n in range(6)])
    whole = torch.cat([tokens[[0, 0, 0, 1, 1, 1], :PREFIX], rests], dim=1)
    expected = without_cache(model, whole)[:, PREFIX:]
    assert float((expected[0] - expected[3]).abs().max()) > 0.1
    close(go_on(model, rests[:, :2], cache), expected[:, :2])
    close(go_on(model, rests[:, 2:], cache), expected[:, 2:])


@pytest.mark.parametrize("count", [1, 2])
def test_going_on_from_a_copy_or_its_original_leaves_the_other_untouched(
    model: Any, tokens: Tensor, count: int
):
    cache = read(model, tokens[:2, :PREFIX])
    before = [x.clone() for x in tensors(cache)]
    assert len(before) >= 2 * len(model.mixers)
    twin = repeated(cache, count)
    twin_state = model.mixers[LAYER].cached_state(twin)
    go_on(model, tokens[2:3, PREFIX:].expand(2 * count, -1), twin)
    with torch.no_grad():
        twin_state.fill_(7.0)
    after = list(tensors(cache))
    assert len(after) == len(before)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    twin = repeated(cache, count)
    rest, expected = tokens[:2, PREFIX:], without_cache(model, tokens[:2])[:, PREFIX:]
    close(go_on(model, rest, cache), expected)
    repeats = rest.repeat_interleave(count, dim=0)
    close(go_on(model, repeats, twin), expected.repeat_interleave(count, dim=0))


def test_no_cache_stays_no_cache_and_an_empty_one_is_empty(model: Any, tokens: Tensor):
    assert repeated(None, 3) is None
    assert cached(None, 0, "recurrent_states") is None
    empty = repeated(model.new_cache(), 2)
    assert cached(empty, LAYER, "recurrent_states") is None
    close(go_on(model, tokens[:2], empty), without_cache(model, tokens[:2]))


@pytest.mark.parametrize("way", ["repeated", "run_with_added_writes"])
def test_a_cache_that_was_filled_outside_no_grad_can_be_copied(model: Any, tokens: Tensor, way: str):
    cache, rest = model.new_cache(), tokens[:1, PREFIX:]
    model(tokens[:1, :PREFIX], past_key_values=cache, use_cache=True)
    if way == "repeated":
        found = go_on(model, rest, repeated(cache, 1))
    else:
        cell = model.cell(LAYER, HEAD)
        none = torch.tensor([0]), torch.zeros(1, cell.d_k), torch.zeros(1, cell.d_v)
        found = model.run_with_added_writes(rest[0], LAYER, HEAD, *none, past_key_values=cache).double()
    close(found, without_cache(model, tokens[:1])[:, PREFIX:])


# Gradients.


@pytest.mark.parametrize(
    ("calls", "repeats"), [((REST,), False), ((3, 2), False), ((1,) * REST, False), ((REST,), True)]
)
def test_gradients_through_a_cached_continuation_are_those_of_the_uncached_pass(
    model: Any, tokens: Tensor, calls: tuple[int, ...], repeats: bool
):
    """In one call, where gradients come back through the cache between calls, and from a repeated cache."""
    cell, name, rng = model.cell(LAYER, HEAD), model.write_hook_name(LAYER, HEAD), torch.Generator()
    weight = torch.randn(2, REST, model.cfg.d_vocab, generator=rng.manual_seed(1), dtype=torch.float64)
    prefix = tokens[:1].expand(2, -1) if repeats else tokens[:2]
    whole = torch.cat([prefix[:, :PREFIX], tokens[1:3, PREFIX:]], dim=1)
    cache = repeated(read(model, whole[:1, :PREFIX]), 2) if repeats else read(model, whole[:, :PREFIX])
    added = torch.zeros(2, REST, cell.d_k * cell.d_v, dtype=torch.float64, requires_grad=True)

    def gradient(start: int, lengths: tuple[int, ...], **cached: Any) -> Tensor:
        """Of weighted later logits, by what joins the writes after the prefix; calls begin at ``start``."""
        logits, now = [], start
        for length in lengths:
            later = torch.nn.functional.pad(added, (0, 0, PREFIX, 0))[:, now : now + length]
            hook = (name, lambda write, hook, later=later: write + later.to(write.dtype))
            with model.hooks(fwd_hooks=[hook]):
                logits.append(model(whole[:, now : now + length], **cached))
            now += length
        loss = (torch.cat(logits, dim=1)[:, -REST:].double() * weight).sum()
        return torch.autograd.grad(loss, added)[0]

    expected = gradient(0, (PREFIX + REST,), use_cache=False)
    found = gradient(PREFIX, calls, past_key_values=cache, use_cache=True)
    scale = float(expected.abs().max())
    assert scale > 1e-2
    close(found, expected, 1e-4 * scale)


# The state in a cache.


@pytest.mark.parametrize("length", [1, PREFIX])
def test_the_cached_state_is_that_after_the_last_token(model: Any, tokens: Tensor, length: int):
    cache = read(model, tokens[:2, :length])
    for layer, mixer in model.mixers.items():
        names = [model.state_hook_name(layer, head) for head in range(mixer.n_heads)]
        with torch.no_grad():
            _, seen = model.run_with_cache(tokens[:2, :length], names_filter=names)
        state = mixer.cached_state(cache)
        assert state.shape == (2, mixer.n_heads, *mixer.write_shape)
        for head, name in enumerate(names):
            expected = seen[name][:, -1].view(2, *mixer.write_shape).double()
            assert float(expected.abs().max()) > 0
            close(state[:, head].double(), expected, 1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_what_is_assigned_to_the_cached_state_is_what_the_next_token_meets(model: Any, tokens: Tensor):
    rng = torch.Generator().manual_seed(2)
    last = max(model.mixers)
    native = without_cache(model, tokens[:2])[:, PREFIX:]
    for layer, mixer in model.mixers.items():
        cache = read(model, tokens[:2, :PREFIX])
        state = mixer.cached_state(cache)
        new = torch.randn(2, *mixer.write_shape, generator=rng, dtype=torch.float64) * state.std() * 3
        state[1, HEAD] = new[1].to(state)
        assert torch.equal(mixer.cached_state(cache)[1, HEAD], new[1].to(state))
        found = go_on(model, tokens[:2, PREFIX:], cache)

        # A set state also changes what its own token outputs; that is over when a cached state is set.
        name = model.state_hook_name(layer, HEAD)
        out = model.hook_name(layer, "recurrence_out")
        _, kept = model.run_with_cache(tokens[:2], names_filter=[out])

        def set_state(states: Tensor, hook: Any, new: Tensor = new) -> Tensor:
            states = states.clone()
            states[1, PREFIX - 1] = new[1].flatten()
            return states

        def restore(outputs: Tensor, hook: Any, native: Tensor = kept[out]) -> Tensor:
            outputs = outputs.clone()
            outputs[:, PREFIX - 1] = native[:, PREFIX - 1]
            return outputs

        hooks = [(name, set_state), (out, restore)]
        if layer == last and "rwkv" not in model.cfg.model_name:
            hooks.pop()  # nothing after the last layer mixes tokens but RWKV-7's token shift
        expected = without_cache(model, tokens[:2], hooks)[:, PREFIX:]
        assert float((expected[1] - native[1]).abs().max()) > 1e-2
        close(found, expected)
        close(found[0], native[0])


def test_an_empty_cache_has_no_state(model: Any):
    for cache in (model.new_cache(), None):
        with pytest.raises(HookedModelError, match=f"no state of layer {LAYER} yet: run tokens first"):
            model.mixers[LAYER].cached_state(cache)


# Added writes after a cache.


@pytest.mark.parametrize("linear", [False, True])
def test_added_writes_after_a_cache_are_those_of_the_uncached_run(model: Any, tokens: Tensor, linear: bool):
    cell, rng = model.cell(LAYER, HEAD), torch.Generator().manual_seed(3)
    keys = torch.randn(3, cell.d_k, generator=rng, dtype=torch.float64)
    values = torch.randn(3, cell.d_v, generator=rng, dtype=torch.float64)
    positions = torch.tensor([0, 2, REST - 1])
    cache = read(model, tokens[:1, :PREFIX])
    before = [x.clone() for x in tensors(cache)]
    run = model.run_with_added_writes
    found = run(
        tokens[0, PREFIX:], LAYER, HEAD, positions, keys, values, linear=linear, past_key_values=cache
    ).double()
    expected = run(tokens[0], LAYER, HEAD, positions + PREFIX, keys, values, linear=linear).double()
    assert float((expected[0, PREFIX] - expected[1, PREFIX]).abs().max()) > 1e-2
    close(found, expected[:, PREFIX:])
    if not linear:
        for row, position in enumerate(positions.tolist()):

            def add(write: Tensor, hook: Any, row: int = row, position: int = position) -> Tensor:
                write = write.clone()
                write[:, PREFIX + position] += (keys[row, :, None] * values[row]).flatten()
                return write

            hooked = without_cache(model, tokens[:1], [(model.write_hook_name(LAYER, HEAD), add)])
            close(found[row], hooked[0, PREFIX:])
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(cache), strict=True))


# The names that caches are passed under.


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_a_model_and_a_layer_take_their_cache_under_every_name(model: Any, tokens: Tensor, name: str):
    expected = without_cache(model, tokens[:1])[:, PREFIX:]
    cache = read(model, tokens[:1, :PREFIX])
    with torch.no_grad():
        found = model(tokens[:1, PREFIX:], use_cache=True, **{name: cache})
    close(found.double(), expected)
    hidden = torch.randn(1, PREFIX, model.cfg.d_model, dtype=torch.float64)

    def mix(part: Tensor, **cache: Any) -> Tensor:
        out = model.mixers[0](part, **cache)
        return out[0] if isinstance(out, tuple) else out  # RWKV-7's first layer gives its values on

    with torch.no_grad():
        cache = model.new_cache()
        parts = [mix(part, **{name: cache}) for part in hidden.split(4, dim=1)]
        close(torch.cat(parts, dim=1), mix(hidden))


@pytest.mark.parametrize("name", ["state_cache", "past_states", "cu_seq_lens_q", "atention_mask"])
def test_an_argument_that_nothing_takes_is_refused(model: Any, tokens: Tensor, name: str):
    with pytest.raises(HookedModelError, match=f"takes no argument '{name}'"):
        model(tokens, **{name: torch.zeros(1)})
    with pytest.raises(HookedModelError, match=f"takes no argument '{name}'"):
        model.mixers[LAYER](torch.zeros(1, 2, model.cfg.d_model), **{name: torch.zeros(1)})


def test_two_different_caches_are_refused(model: Any, tokens: Tensor):
    with pytest.raises(HookedModelError, match="past_key_values and cache are two different caches"):
        model(tokens, past_key_values=model.new_cache(), cache=model.new_cache())
