"""What a forward pass is given: where its tokens are, and what is refused that no layer would honour."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.caches import repeated

SHORT, LONG = "It is a truth", "It is a truth universally acknowledged, that a single man"
LENGTH, PADDED = 12, 5
MASK = torch.tensor([[0] * PADDED + [1] * (LENGTH - PADDED), [1] * LENGTH])


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    ids = model.to_tokens(zoo.held_out_text()[:400], prepend_bos=False)
    return ids[0, : 2 * LENGTH].view(2, LENGTH)


@pytest.fixture
def places(model: Any) -> Any:
    """What hooks of one layer saw of `positions` and `attention_mask`, call by call."""
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def look(x: Tensor, hook: Any) -> None:
        assert model.positions.shape == model.attention_mask.shape == x.shape[:2]
        seen.append((model.positions.tolist(), model.attention_mask.tolist()))

    with torch.no_grad(), model.hooks(fwd_hooks=[(model.write_hook_name(1, 0), look)]):
        yield seen


def counted(padding: int, stop: int, start: int = 0) -> list[int]:
    return [-1] * padding + list(range(start, stop))


# Where the tokens are.


def test_positions_in_one_pass(model: Any, tokens: Tensor, places: Any):
    model(tokens)
    model(tokens, attention_mask=MASK)
    model(tokens, attention_mask=MASK.flip(1))
    model([SHORT, LONG], padding_side="left")
    ones = [[1] * LENGTH] * 2
    assert places[0] == ([counted(0, LENGTH)] * 2, ones)
    assert places[1] == ([counted(PADDED, LENGTH - PADDED), counted(0, LENGTH)], MASK.tolist())
    assert places[2][0] == [counted(0, LENGTH - PADDED) + [-1] * PADDED, counted(0, LENGTH)]
    lengths = [model.to_tokens(text).shape[1] for text in (SHORT, LONG)]
    assert places[3][0] == [counted(lengths[1] - lengths[0], lengths[0]), counted(0, lengths[1])]


@pytest.mark.parametrize("way", ["full mask", "no mask", "copy", "repeated"])
def test_positions_go_on_from_a_cache(model: Any, tokens: Tensor, places: Any, way: str):
    cache = model.new_cache()
    model(tokens[:, :8], attention_mask=MASK[:, :8], past_key_values=cache, use_cache=True)
    cache = {"copy": copy.deepcopy, "repeated": lambda x: repeated(x, 1)}.get(way, lambda x: x)(cache)
    for start, stop in ((8, 9), (9, 12)):
        mask = MASK[:, :stop] if way == "full mask" else None
        model(tokens[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
    rows = [[counted(0, stop, start), counted(0, stop + 5, start + 5)] for start, stop in ((3, 4), (4, 7))]
    assert [seen[0] for seen in places[1:]] == rows


@pytest.mark.parametrize("way", ["generate", "no cache", "hf_generate", "beams"])
def test_a_hook_writes_at_a_position_of_a_text_that_is_generated(model: Any, way: str):
    """Once for each text, whether it is alone, in a batch, read from a cache or read again at each step."""
    texts, position = [SHORT, LONG], model.to_tokens(LONG).shape[1] + 1
    at_it: list[list[int]] = []

    def count(x: Tensor, hook: Any) -> None:
        at_it.append((model.positions == position).sum(1).tolist())

    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), model.hooks(fwd_hooks=[(model.write_hook_name(1, 0), count)]):
        if way == "generate":
            model.generate(texts, verbose=False, **options)
        elif way == "no cache":
            model.generate(LONG, verbose=False, use_past_kv_cache=False, **options)
        else:
            model.hf_generate(LONG, num_beams=2 if way == "beams" else 1, **options)
    last = [counts[-1] for counts in at_it]
    assert last == ([0, 0, 1, 1] if way == "no cache" else [0, 0, 1, 0])


def test_positions_are_each_calls_own(model: Any, tokens: Tensor):
    """A call from a hook, another model's call, and a call in another thread leave them alone."""
    other = HookedRecurrent.boot_transformers("tiny-mamba2", device="cpu")
    seen: list[Tensor] = []

    def call_others(x: Tensor, hook: Any) -> None:
        if x.shape[1] < LENGTH:
            return
        before = model.positions
        model(tokens[:1, :3])
        with pytest.raises(HookedModelError, match="no forward pass is running"):
            _ = other.positions
        look = (other.hook_name(0, "in"), lambda x, hook: seen.append(model.positions))
        other.run_with_hooks(tokens[:, :4], fwd_hooks=[look])
        with ThreadPoolExecutor(1) as pool, pytest.raises(HookedModelError):
            pool.submit(lambda: model.positions).result()
        assert torch.equal(before, model.positions)

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(model.hook_name(1, "in"), call_others)])
    assert seen[0].shape == tokens.shape


def test_positions_end_with_the_pass(model: Any, tokens: Tensor):
    def fail(x: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    model(tokens)
    model(tokens, stop_at_layer=1)
    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(tokens, fwd_hooks=[(model.hook_name(1, "in"), fail)])
    with pytest.raises(HookedModelError, match="no token"):
        model(tokens, attention_mask=torch.zeros(2, LENGTH))
    for name in ("positions", "attention_mask"):
        with pytest.raises(HookedModelError, match="no forward pass is running"):
            getattr(model, name)


# What is taken.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.uint8])
def test_masks_of_any_dtype(model: Any, tokens: Tensor, dtype: torch.dtype):
    expected = model(tokens, attention_mask=MASK)
    torch.testing.assert_close(model(tokens, attention_mask=MASK.to(dtype)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_right_padding_without_a_cache_leaves_the_tokens_before_it(model: Any, tokens: Tensor):
    found = model(tokens, attention_mask=MASK.flip(1))
    torch.testing.assert_close(found[0, :-PADDED], model(tokens)[0, :-PADDED], rtol=0, atol=1e-4)


@torch.no_grad()
def test_caches_of_other_makers_and_rearranged_rows(model: Any, tokens: Tensor):
    expected = model(tokens, attention_mask=MASK)
    config, stateful = model.original_model.config, type(model.new_cache()) is DynamicCache
    makers: list[Callable[[], Any]] = [model.new_cache]
    if stateful:
        makers += [lambda: DynamicCache(config=config), lambda: StaticCache(config=config, max_cache_len=64)]
    for make in makers:
        cache = make()
        model(tokens[:, :8], attention_mask=MASK[:, :8], past_key_values=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        given = {"past_key_values": cache, "use_cache": True}
        found = model(tokens.flip(0)[:, 8:], attention_mask=MASK.flip(0), **given)
        torch.testing.assert_close(found.flip(0), expected[:, 8:], rtol=0, atol=1e-4)
        cache.reset()
        found = model(tokens, attention_mask=MASK, **given)
        torch.testing.assert_close(found[0, PADDED:], expected[0, PADDED:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_cache_that_is_asked_for_is_returned(model: Any, tokens: Tensor):
    logits, cache = model(tokens[:, :7], return_type="logits_and_cache")
    rest = model(tokens[:, 7:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(torch.cat([logits, rest], 1), model(tokens), rtol=0, atol=1e-4)


# What is refused.

GAP = torch.tensor([[1, 1, 0, 1] * 3] * 2)
WRONG: dict[str, tuple[str, Callable[[Tensor], dict[str, Any]]]] = {
    "a column too many": ("shape", lambda t: {"attention_mask": torch.ones(2, LENGTH + 1)}),
    "a column too few": ("shape", lambda t: {"attention_mask": torch.ones(2, LENGTH - 1)}),
    "one row for two": ("shape", lambda t: {"attention_mask": torch.ones(1, LENGTH)}),
    "one axis": ("shape", lambda t: {"attention_mask": torch.ones(LENGTH)}),
    "four axes": ("shape", lambda t: {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}),
    "a list": ("tensor", lambda t: {"attention_mask": MASK.tolist()}),
    "additive": ("1 at tokens", lambda t: {"attention_mask": (1.0 - MASK) * -1e9}),
    "not a number": ("1 at tokens", lambda t: {"attention_mask": MASK * float("nan")}),
    "a gap": ("padding between", lambda t: {"attention_mask": GAP}),
    "a row of padding": ("no token", lambda t: {"attention_mask": MASK * torch.tensor([[0], [1]])}),
    "nothing but padding": ("no token", lambda t: {"attention_mask": 0 * MASK}),
    "packed positions": ("position_ids", lambda t: {"position_ids": (torch.arange(LENGTH) % 6)[None]}),
    "positions of one token": ("position_ids", lambda t: {"position_ids": torch.zeros(2, 1).long()}),
    "hidden states": ("output_hidden_states", lambda t: {"output_hidden_states": True}),
    "boundaries": ("cu_seq_lens_q", lambda t: {"cu_seq_lens_q": torch.tensor([0, 6, 12])}),
    "numbers of documents": ("seq_idx", lambda t: {"seq_idx": torch.zeros(2, LENGTH)}),
    "lengths of documents": ("max_length_k", lambda t: {"max_length_k": 6}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_not_be_honoured_is_refused(model: Any, tokens: Tensor, case: str):
    word, options = WRONG[case]
    with pytest.raises(HookedModelError, match=word):
        model(tokens, **options(tokens))
    if word != "output_hidden_states":  # which transformers returns
        with pytest.raises(HookedModelError, match=word):
            model.original_model(tokens, **options(tokens))


NO_TOKENS: dict[str, Any] = {
    "no rows": torch.zeros(0, 5).long(),
    "no columns": torch.zeros(2, 0).long(),
    "no texts": [],
    "numbers": [1, 2, 3],
    "an empty text": "",
    "an empty text beside another": ["", SHORT],
    "floats": torch.ones(1, 3),
    "truth values": torch.ones(1, 3).bool(),
    "negative": -torch.ones(1, 3).long(),
    "outside the vocabulary": torch.full((1, 3), 10**6),
    "three axes": torch.ones(1, 3, 2).long(),
}


@pytest.mark.parametrize("case", NO_TOKENS)
def test_tokens_that_are_none_are_refused(model: Any, case: str):
    with pytest.raises(HookedModelError):
        model(NO_TOKENS[case])


@torch.no_grad()
def test_caches_that_would_not_be_honoured_are_refused(model: Any, tokens: Tensor):
    def filled(stop: int = 6, **options: Any) -> Any:
        cache = model.new_cache()
        model(tokens[:, :stop], past_key_values=cache, use_cache=True, **options)
        return cache

    def refused(word: str, cache: Any, given: Tensor = tokens[:, 6:], **options: Any) -> None:
        with pytest.raises(HookedModelError, match=word):
            model(given, past_key_values=cache, use_cache=True, **options)

    refused("rows", filled(), tokens[:1, 6:])
    refused("does not fit", DynamicCache())
    refused("does not fit", "a cache")
    refused("ended in an error", filled(stop_at_layer=2))
    refused("padding after", model.new_cache(), tokens, attention_mask=MASK.flip(1))
    refused("padding after", model.new_cache(), [SHORT, LONG], padding_side="right")
    later = torch.cat([torch.ones(2, 6), MASK[:, 2:8]], 1)
    refused("padding between", filled(), attention_mask=later)
    refused("shape", filled(), attention_mask=torch.ones(2, LENGTH + 1))
    if model.has_attention:
        refused("shape", filled(), attention_mask=torch.ones(2, 6))
        cropped = filled()
        cropped.layers[2].crop(-2)
        refused("cropped", cropped)
    cache = filled()
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    refused("rolled back", cache)
    good = filled()
    refused("shape", good, attention_mask=torch.ones(2, 3))  # a refusal leaves the cache as it was
    found = model(tokens[:, 6:], past_key_values=good, use_cache=True)
    torch.testing.assert_close(found, model(tokens)[:, 6:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_call_that_fails_leaves_a_cache_that_is_refused(model: Any, tokens: Tensor):
    cache = model.new_cache()

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("in a hook")

    with pytest.raises(RuntimeError, match="in a hook"), model.hooks([(model.hook_name(1, "in"), fail)]):
        model(tokens[:, :6], past_key_values=cache, use_cache=True)
    with pytest.raises(HookedModelError, match="ended in an error"):
        model(tokens[:, 6:], past_key_values=cache, use_cache=True)
    cache.reset()
    found = model(tokens, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def test_generate_makes_the_logits_that_somebody_reads(model: Any, tokens: Tensor):
    """Those of the last token; of all where a hook sees them, and in a pass that a hook makes."""
    how = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    shapes, nested = [], []
    plain = model.generate(tokens, **how)
    handle = model.original_model.register_forward_hook(lambda m, a, out: shapes.append(out.logits.shape[1]))
    model.generate(tokens, **how)
    handle.remove()
    assert shapes == [1, 1]

    def read(x: Tensor, hook: Any) -> None:
        if not nested:
            nested.append(None)
            nested[0] = model(tokens).shape[1]

    seen: list[int] = []
    hooks = [(model.hook_name(1, "in"), read)]
    with model.hooks(hooks):
        assert torch.equal(model.generate(tokens, **how), plain)
    assert nested == [LENGTH]
    with model.hooks([("unembed.hook_out", lambda x, hook: seen.append(x.shape[1]))]):
        assert torch.equal(model.generate(tokens, **how), plain)
    assert seen == [LENGTH, 1]


@torch.no_grad()
def test_a_criterion_that_calls_the_model_while_it_generates_gets_all_logits(model: Any, tokens: Tensor):
    read = []

    def criterion(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        read.append(model(ids).shape[1] - ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    how = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "verbose": False}
    model.generate(tokens, stopping_criteria=[criterion], **how)
    assert read == [0, 0]


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]):
    docs = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.split() == ["True"]
