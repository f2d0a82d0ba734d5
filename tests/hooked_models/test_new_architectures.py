"""New architectures and hybrids: one mixer and one row, other components in its slot, attention beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5

from hooked_models import HookedModelError, HookedRecurrent
from tests.conftest import hybrid, mamba2, randomise
from tests.hooked_models.architectures import assert_close, random, some_tokens
from tests.hooked_models.model_classes import delta_rules
from tests.toy_architecture import HookedToy


@torch.no_grad()
def test_a_new_architecture_is_one_mixer_and_one_row(toy_folder: Path):
    """It boots, hooks, decodes, and takes swapped and added writes, all as its twin tiny-gdn."""
    toy = HookedRecurrent.boot_transformers(toy_folder, device="cpu")
    twin = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    assert {type(mixer) for mixer in toy.mixers.values()} == {HookedToy}
    assert {cell.architecture for cell in toy.cells} == {"toy"}
    sizes = [[(c.layer, c.head, c.d_k, c.d_v) for c in model.cells] for model in (toy, twin)]
    assert sizes[0] == sizes[1]
    cell, tokens = toy.cells[-1], some_tokens(1, 20)
    site = toy.write_hook_name(cell.layer, cell.head)
    keys, values, positions = random(3, cell.d_k), random(3, cell.d_v), torch.tensor([2, 9, 9])
    place = tokens[0], cell.layer, cell.head, positions
    for run in (
        lambda model: model(tokens),
        lambda model: model.run_with_cache(tokens, names_filter=site)[1][site],
        lambda model: model.run_with_hooks(tokens, fwd_hooks=[(site, lambda x, hook: x / 2)]),
        lambda model: model.run_with_swapped_writes(*place, keys[:, None], values[:, None])[1],
        lambda model: model.run_with_added_writes(*place, keys, values),
        lambda model: model.run_with_added_writes(*place, keys, values, linear=True),
        lambda model: model.generate(tokens, max_new_tokens=4, do_sample=False, return_type="tokens"),
    ):
        assert torch.equal(run(toy), run(twin))


@pytest.mark.parametrize(
    "build",
    [
        lambda **changes: hybrid("qwen3_5", **changes),
        lambda **changes: hybrid("qwen3_next", **changes),
        delta_rules.olmo_hybrid,
        delta_rules.kimi_linear,
        delta_rules.bailing_hybrid,
    ],
    ids=["qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid"],
)
@torch.no_grad()
def test_the_convolutions_activation_is_the_configurations(build: Any, build_folder: Any):
    """transformers applies ``hidden_act`` to queries, keys and values, too."""
    torch.manual_seed(0)
    folder = build_folder("gelu", build(hidden_act="gelu"), 0)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model, tokens = HookedRecurrent.boot_transformers(folder, device="cpu"), some_tokens(2, 12)
    expected, cache = reference(tokens, use_cache=False).logits, model.new_cache()
    parts = [model(x, past_key_values=cache, use_cache=True) for x in tokens.split([8, 1, 3], 1)]
    for found in (model(tokens, use_cache=False), torch.cat(parts, 1)):
        assert_close(found / expected.std(), expected / expected.std())


# Hybrids.


class Feedforward(nn.Module):
    """A component that takes a mixer's place, and some of its arguments, in one layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attention_mask is None or attention_mask.ndim == 2
        return self.up(hidden_states).relu()


@pytest.mark.parametrize(
    ("build", "slot"), [(lambda: hybrid("qwen3_5"), "linear_attn"), (mamba2, "mixer")], ids=["gdn", "mamba2"]
)
@torch.no_grad()
def test_another_component_in_the_slot_runs_as_it_is(build: Any, slot: str, gdn_folder: Path):
    """It has no cells and no hooks of a recurrence."""
    reference = build()
    layers = reference.model.layers if slot == "linear_attn" else reference.backbone.layers
    setattr(layers[1], slot, Feedforward(reference.config.hidden_size))
    randomise(reference.eval(), 8)
    tokens = some_tokens(2, 12)
    expected = reference(tokens, use_cache=False).logits
    model = HookedRecurrent.boot_transformers(gdn_folder, hf_model=reference, device="cpu")
    assert_close(model(tokens, use_cache=False), expected)
    assert 1 not in {*model.mixers, *(cell.layer for cell in model.cells)}
    mixer = getattr(model.blocks[1], slot)
    assert not mixer.is_recurrent
    assert set(mixer.get_hooks()) == {"hook_in", "hook_out"}
    with pytest.raises(HookedModelError, match="layer 1 is not recurrent; this model has layer 0: heads"):
        model.hook_name(1, "decay")
    edit = [(f"blocks.1.{slot}.hook_out", lambda x, hook: 2 * x)]
    assert not torch.equal(model.run_with_hooks(tokens, fwd_hooks=edit, use_cache=False), expected)


class ParallelLayer(modeling_qwen3_5.Qwen3_5DecoderLayer):
    """A layer with a recurrence and softmax attention side by side."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.linear_attn = modeling_qwen3_5.Qwen3_5GatedDeltaNet(config, layer_idx)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **arguments)
        hidden_states = hidden_states + attended + self.linear_attn(hidden_states=normed)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@torch.no_grad()
def test_branches_do_not_attend_to_each_other_where_every_layer_also_has_attention(gdn_folder: Path):
    reference = hybrid("qwen3_5", layer_types=["full_attention"] * 2, num_hidden_layers=2)
    for n in range(2):
        reference.model.layers[n] = ParallelLayer(reference.config, n)
    randomise(reference.eval(), 9)
    model = HookedRecurrent.boot_transformers(gdn_folder, hf_model=reference, device="cpu")
    assert len(model.mixers) == len(model.blocks)
    assert model.has_attention
    tokens, positions = some_tokens(12), torch.tensor([4, 0, 4, 11])
    keys, values = random(4, 1, 16), random(4, 1, 24, seed=2)
    native, swapped = model.run_with_swapped_writes(tokens, 0, 1, positions, keys, values)
    assert_close(native, model(tokens[None], use_cache=False)[0])

    def edit(x: Tensor, hook: Any) -> None:
        x[range(4), positions] = torch.einsum("jrk,jrv->jkv", keys, values).flatten(1)

    rows = tokens.expand(4, -1)
    hooked = model.run_with_hooks(rows, fwd_hooks=[(model.write_hook_name(0, 1), edit)], use_cache=False)
    assert_close(swapped, hooked[range(4), positions])
    assert (swapped - native[positions]).abs().max() > 1e-2
