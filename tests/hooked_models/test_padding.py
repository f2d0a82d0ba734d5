"""Padding is inert: a row of a padded batch gives what it gives alone, whatever is done to the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.edits import AddedWrites

SHORT, LONG = "It is a truth", "It is a truth universally acknowledged, that a single man in possession of a"
LAYER, HEAD = 1, 2
PREFILL, CHUNKS = 9, (1, 3, 1)


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    """Two rows, [2, 14]; the first is padded."""
    return model.to_tokens(LONG, prepend_bos=False)[0, : 2 * 7].repeat(2, 1)


MASK = torch.tensor([[0] * 5 + [1] * 9, [1] * 14])


def sites(model: Any, layer: int, hook: str) -> list[str]:
    """The names of a hook in a layer: one, or those of two heads; none where there is none."""
    mixer = model.mixers[layer]
    if hook in ("write", "erase", "state"):
        heads = (0, HEAD) if hook in mixer.per_head_hooks else ()
        return [model.hook_name(layer, hook, head) for head in heads]
    if hook.startswith("ffn"):
        slots = dict(model.blocks[layer].named_children())
        return [f"blocks.{layer}.ffn.hook_in"] if "ffn" in slots else []
    if hook == "projection":
        found = (n for n in model.hook_dict if n.startswith(f"blocks.{layer}.") and "_proj.hook_out" in n)
        return [n for n in found if "o_proj" not in n and "out_proj" not in n and ".attn.q_proj" not in n][:2]
    return [model.hook_name(layer, hook)]


def spoilt(model: Any, where: int | None = None) -> Any:
    """A hook that changes every token, or that of one position, and puts no number at padding."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        rest = (1,) * (x.ndim - 2)
        here = model.attention_mask.bool() if where is None else model.positions == where
        changed = torch.where(here.view(*here.shape, *rest), 0.9 * x + 0.01, x)
        return changed.masked_fill(model.attention_mask.view(*here.shape, *rest) == 0, float("nan"))

    return edit


HOOKS = ("in", "out", "write_key", "write_value", "read", "decay", "recurrence_out", "head_out")
HOOKS += ("write", "erase", "state", "projection", "ffn_in")


@torch.no_grad()
def run(model: Any, hooks: Any, tokens: Tensor, mask: Tensor | None, decode: bool) -> Tensor:
    """Logits with hooks, read at once, or in pieces into a cache."""
    if not decode:
        return model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
    cache, parts, n_padded = (
        {"past_key_values": model.new_cache(), "use_cache": True},
        [],
        14 - tokens.shape[1],
    )
    start = 0
    for length in (PREFILL - n_padded, *CHUNKS):
        stop = start + length
        given = None if mask is None else mask[:, :stop]
        with model.hooks(fwd_hooks=hooks):
            parts.append(model(tokens[:, start:stop], attention_mask=given, **cache))
        start = stop
    return torch.cat(parts, 1)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decoding"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_row_with_hooks_gives_what_it_gives_alone(model: Any, tokens: Tensor, hook: str, decode: bool):
    names = sites(model, LAYER, hook)
    if not names:
        pytest.skip(f"no hook {hook} there")
    hooks = [(name, spoilt(model)) for name in names]
    batch = run(model, hooks, tokens, MASK, decode)
    alone = run(model, hooks, tokens[:1, 5:], None, decode)
    native = run(model, [], tokens[:1, 5:], None, decode)
    assert float((alone - native).abs().max()) > 1e-5
    torch.testing.assert_close(batch[:1, 5:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch[1:], run(model, hooks, tokens[1:], None, decode), rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_hook_of_the_model_at_once(model: Any, tokens: Tensor):
    hooks = [
        (name, spoilt(model))
        for layer in model.mixers
        for hook in ("write", "write_key", "decay", "state", "recurrence_out")
        for name in sites(model, layer, hook)
    ]
    alone = run(model, hooks, tokens[:1, 5:], None, decode=False)
    assert alone.isfinite().all()
    torch.testing.assert_close(run(model, hooks, tokens, MASK, False)[:1, 5:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_lists_of_texts(model: Any, side: str):
    write = model.write_hook_name(LAYER, HEAD)
    hooks = [(write, spoilt(model, where=2)), (model.hook_name(0, "in"), spoilt(model))]
    alone = model.run_with_hooks(SHORT, fwd_hooks=hooks)
    n = alone.shape[1]
    with model.hooks(fwd_hooks=hooks):
        batch = model([SHORT, LONG], padding_side=side)
    found = batch[:1, -n:] if side == "left" else batch[:1, :n]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert float((alone - model(SHORT)).abs().max()) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["write", "state"])
def test_the_bias_of_an_sae_is_not_written_at_padding(model: Any, kind: str):
    name = model.hook_name(LAYER, kind, HEAD)
    d_in = model.cell(LAYER, HEAD).d_k * model.cell(LAYER, HEAD).d_v
    sae: SAE[Any] = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = name
    sae.b_dec.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    sae.W_dec.data.mul_(0.1)
    alone = model.run_with_saes(SHORT, saes=[sae])
    batch = model.run_with_saes([SHORT, LONG], saes=[sae])
    assert float((alone - model(SHORT)).abs().max()) > 1e-3
    torch.testing.assert_close(batch[:1, -alone.shape[1] :], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["generate", "no cache", "hf_generate"])
def test_generated_texts_are_those_of_each_prompt_alone(model: Any, way: str):
    write, out = model.write_hook_name(LAYER, HEAD), model.hook_name(0, "out")
    with torch.no_grad():
        seen = model.run_with_cache(LONG, names_filter=[write, out])[1]
    vectors = {name: 5 * x[0].abs().max(0).values for name, x in seen.items()}
    hooks = [(name, lambda x, hook, name=name: x + vectors[name]) for name in (write, out)]

    def generated(texts: str | list[str]) -> Any:
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        with model.hooks(fwd_hooks=hooks):
            if way == "hf_generate":
                return model.hf_generate(texts, **options)
            return model.generate(texts, use_past_kv_cache=way == "generate", verbose=False, **options)

    texts = [SHORT, LONG]
    alone = [generated(text) for text in texts]
    pad = model.tokenizer.pad_token
    assert [text.replace(pad, "") for text in generated(texts)] == [text.replace(pad, "") for text in alone]
    assert alone[0] != model.generate(SHORT, max_new_tokens=4, do_sample=False, verbose=False)


@torch.no_grad()
def test_a_write_added_at_padding_is_not_there(model: Any, tokens: Tensor):
    cell, mixer = model.cell(LAYER, HEAD), model.mixers[LAYER]
    rng = torch.Generator().manual_seed(3)
    factors = [torch.randn(2, d, generator=rng, dtype=torch.float64) for d in (cell.d_k, cell.d_v)]
    native = model(tokens, attention_mask=MASK)
    for positions, row in ((torch.tensor([3, 8]), 1), (torch.tensor([8, 3]), None)):
        edit = AddedWrites(mixer, torch.full((2,), HEAD), positions, *factors, linear=False)
        moved = (model(tokens, attention_mask=MASK, edit=edit) - native).abs().amax((1, 2))
        assert (moved[0] == 0) == (row == 1)
        assert moved[1] > 1e-4


@torch.no_grad()
def test_a_text_list_read_into_a_cache_goes_on_without_a_mask(model: Any, tokens: Tensor):
    """What was padding stays padding: the cache knows it."""
    more = tokens[:, :4]
    cache = model.new_cache()
    model([SHORT, LONG], past_key_values=cache, use_cache=True, prepend_bos=False)
    found = torch.cat(
        [model(more[:, a:b], past_key_values=cache, use_cache=True) for a, b in ((0, 1), (1, 4))], 1
    )
    for row, text in enumerate((SHORT, LONG)):
        whole = torch.cat([model.to_tokens(text, prepend_bos=False), more[:1]], 1)
        torch.testing.assert_close(found[row], model(whole)[0, -4:], rtol=0, atol=1e-5)


def test_gradients_do_not_come_from_padding(model: Any, tokens: Tensor):
    """The gradient at a hooked write is that of the row alone, and zero at padding."""
    write = model.write_hook_name(LAYER, HEAD)

    def gradient(tokens: Tensor, mask: Tensor | None, row: int) -> Tensor:
        kept: list[Tensor] = []
        with model.hooks(fwd_hooks=[(write, lambda x, hook: kept.append(x))]):
            logits = model(tokens, attention_mask=mask)
        return torch.autograd.grad(logits[row, -3:, :50].square().sum(), kept[0])[0][row]

    batch, alone = gradient(tokens, MASK, 0), gradient(tokens[:1, 5:], None, 0)
    assert (batch[:5] == 0).all()
    torch.testing.assert_close(batch[5:], alone, rtol=1e-4, atol=1e-6)
