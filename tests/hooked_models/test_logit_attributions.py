"""What heads and other parts add to the residual stream and to logits, on shipped models in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, unembedding, zoo
from tests.hooked_models.architectures import assert_close, refused

TEXT, TARGET, OTHER = "It is a truth universally acknowledged", 263, 400


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def run(request: pytest.FixtureRequest) -> Any:
    """A model and the cache of one text."""
    model = HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TEXT)
    return model, logits, cache


def logits_at_fixed_norm(model: HookedRecurrent, stream: Tensor, part: Tensor) -> Tensor:
    """Logits of the stream without a part; the last norm, written out, has the scale of the whole stream."""
    norm: Any = model.ln_final.original_component
    rest, weight, bias = stream - part, norm.weight, getattr(norm, "bias", None)
    if isinstance(norm, torch.nn.LayerNorm):
        scale = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        rest = rest - rest.mean(-1, keepdim=True)
    else:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        scale = (stream.square().mean(-1, keepdim=True) + eps).sqrt()
        weight = 1 + weight if type(norm).__name__.startswith("Qwen3_5") else weight
    normed = rest / scale * weight + (0 if bias is None else bias)
    return normed @ model.original_model.get_output_embeddings().weight.T


@torch.no_grad()
def test_a_heads_attribution_is_what_the_logits_lack_without_its_part(run: Any) -> None:
    model, logits, cache = run
    stream = cache[f"blocks.{len(model.blocks) - 1}.hook_out"]
    assert_close(logits_at_fixed_norm(model, stream, torch.zeros_like(stream)), logits, 1e-5)
    stack, labels = cache.stack_head_results(return_labels=True)
    single, difference = cache.logit_attrs(stack, TARGET), cache.logit_attrs(stack, TARGET, OTHER)
    for number in (0, len(labels) // 2, len(labels) - 1):
        lost = logits - logits_at_fixed_norm(model, stream, stack[number])
        assert_close(single[number], lost[..., TARGET], 1e-5)
        assert_close(difference[number], lost[..., TARGET] - lost[..., OTHER], 1e-5)


@torch.no_grad()
def test_the_attributions_of_all_parts_sum_to_the_logit(run: Any) -> None:
    model, logits, cache = run
    nothing = torch.zeros_like(cache["hook_embed"])
    constant = logits_at_fixed_norm(model, nothing + 1, nothing + 1)[..., TARGET]  # of the norm's bias
    for parts in (cache.decompose_resid(), cache.get_full_resid_decomposition(expand_neurons=False)):
        assert_close(cache.logit_attrs(parts, TARGET).sum(0) + constant, logits[..., TARGET], 1e-5)
    last = cache.stack_head_results(incl_remainder=True, pos_slice=-1)
    attributed = cache.logit_attrs(last, TARGET, pos_slice=-1).sum(0)
    assert_close(attributed + constant[:, -1], logits[:, -1, TARGET], 1e-5)


@torch.no_grad()
def test_every_part_of_the_stream_is_in_the_full_decomposition(run: Any) -> None:
    model, _, cache = run
    for layer in (1, len(model.blocks)):
        options = {"expand_neurons": False, "return_labels": True}
        stack, labels = cache.get_full_resid_decomposition(layer, **options)
        assert len(stack) == len(set(labels))
        assert_close(stack.sum(0), cache[f"blocks.{layer - 1}.hook_out"])
        assert_close(stack[-1], torch.zeros_like(stack[-1]))  # none of these models has biases there
        projected = cache.get_full_resid_decomposition(layer, **options, project_output_onto=model.W_U[:, 5])
        assert_close(projected[0], stack @ model.W_U[:, 5])
        scaled = cache.get_full_resid_decomposition(layer, **options, apply_ln=True)[0].sum(0)
        norm = "ln_final" if layer == len(model.blocks) else None
        names = [name for name in cache.keys() if name.startswith(f"blocks.{layer}.")]  # noqa: SIM118
        normalized = f"{norm}.hook_normalized" if norm else next(n for n in names if "hook_normalized" in n)
        assert_close(scaled, cache[normalized])


@torch.no_grad()
def test_neurons_are_taken_apart_where_an_mlp_is_known() -> None:
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    _, cache = model.run_with_cache(TEXT)
    stack, labels = cache.get_full_resid_decomposition(return_labels=True)
    mlp: Any = model.original_model.model.layers[1].mlp
    gate, up = (part(cache["blocks.1.ln2.hook_out"]) for part in (mlp.gate_proj, mlp.up_proj))
    expected = (torch.nn.functional.silu(gate) * up)[..., 7, None] * mlp.down_proj.weight[:, 7]
    assert_close(stack[labels.index("L1N7")], expected)
    model = HookedRecurrent.boot_transformers("tiny-rwkv7", device="cpu")
    _, cache = model.run_with_cache(TEXT)
    with refused("expand_neurons=False"):
        cache.get_full_resid_decomposition()


def test_capped_logits_are_no_sums(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, cache = run
    assert unembedding.logit_factor(model) == 1
    monkeypatch.setattr(model.adapter, "apply_output_logits_transform", lambda x: 30 * torch.tanh(x / 30))
    with refused("caps its logits"):
        cache.logit_attrs(cache.stack_head_results(), TARGET)


def test_shapes_of_tokens_must_fit(run: Any) -> None:
    _, _, cache = run
    stack = cache.stack_head_results(pos_slice=-1)
    with refused("give as many of both"):
        cache.logit_attrs(stack, torch.tensor([1, 2]), torch.tensor([1, 2, 3]), pos_slice=-1)
    with refused("must be a layer of 0"):
        cache.stack_head_results(-7)
