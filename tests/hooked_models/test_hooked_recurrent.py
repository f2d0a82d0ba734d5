"""The model class: booting, cells, names, bad input, SAEs as hooks, many swapped writes in one pass."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, Qwen3_5ForConditionalGeneration

import hooked_models
from hooked_models import HookedRecurrent, RWKV7Config, zoo
from hooked_models.errors import HookedModelError
from tests.conftest import hybrid
from tests.hooked_models.architectures import (
    Pair,
    assert_close,
    nothing,
    on,
    once_per_architecture,
    refused,
    sae_at,
    some_tokens,
)
from tests.hooked_models.oracles import Edits, at

# Booting.


def boot(source: Path | str, **options: Any) -> Any:
    return HookedRecurrent.boot_transformers(str(source), device="cpu", **options)


@once_per_architecture
@torch.no_grad()
def test_boots_a_folder(pair: Pair):
    model = boot(pair.folder, dtype=torch.float32)
    assert isinstance(model, HookedRecurrent)
    assert isinstance(model, SAETransformerBridge)
    types = [(layer, type(mixer)) for layer, mixer in model.mixers.items()]
    assert types == [(layer, pair.mixer) for layer in pair.layers]
    assert model.cfg.model_name == str(pair.folder)
    tokens = model.to_tokens("w9 w150 w4 w77", prepend_bos=False)
    assert tokens.tolist() == [[9, 150, 4, 77]]
    assert_close(model(tokens), pair.logits(tokens))
    expected = torch.nn.functional.cross_entropy(pair.logits(tokens)[0, :-1], tokens[0, 1:])
    assert_close(model("w9 w150 w4 w77", return_type="loss", prepend_bos=False), expected)


@once_per_architecture
@torch.no_grad()
def test_boots_a_loaded_model(pair: Pair):
    """hf_model, as for TransformerBridge."""
    loaded = type(pair.reference).from_pretrained(pair.folder, attn_implementation="eager")
    model = boot(pair.folder, hf_model=loaded)
    tokens = some_tokens(1, 9)
    assert model.cells
    assert_close(model(tokens), pair.logits(tokens))


@on("mamba2", "rwkv7")
@torch.no_grad()
def test_a_model_can_be_pickled(pair: Pair):
    """Unless it has attention: TransformerLens's cannot be."""
    twin, tokens = pickle.loads(pickle.dumps(pair.model)), some_tokens(1, 9)
    assert torch.equal(twin(tokens), pair.model(tokens))
    assert type(twin.new_cache()) is type(pair.model.new_cache())


@torch.no_grad()
def test_boots_a_vision_checkpoint_text_only(vision_folder: Path):
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(vision_folder, attn_implementation="eager")
    model = boot(vision_folder)
    assert not [name for name, _ in model.original_model.named_parameters() if "visual" in name]
    assert {(cell.layer, cell.head) for cell in model.cells} == set(itertools.product((0, 1, 3), range(4)))
    tokens = some_tokens(2, 66)
    expected = whole(tokens, use_cache=False).logits
    assert expected.std() > 0.3
    assert_close(model(tokens), expected)
    placed = HookedRecurrent.boot_transformers(str(vision_folder), device_map="cpu")
    assert torch.equal(placed(tokens), model(tokens))


@once_per_architecture
def test_cells(pair: Pair):
    expected = [(layer, head, pair.d_k, pair.d_v) for layer in pair.layers for head in range(pair.heads)]
    assert [(c.layer, c.head, c.d_k, c.d_v) for c in pair.model.cells] == expected
    assert {c.architecture for c in pair.model.cells} == {pair.name}
    last = pair.layers[-1]
    assert pair.model.cell(last, 1) == pair.model.cells[2 * pair.heads + 1]
    assert pair.model.cell(last, 1).layer == last


@once_per_architecture
def test_hook_names_and_sites(pair: Pair):
    model = pair.model
    for layer, name in itertools.product(pair.layers, pair.shapes):
        hook, _, head = name.partition(".")
        full = model.hook_name(layer, hook, int(head) if head else None)
        assert full == pair.point(layer, name)
        assert model.hook_dict[full].name == full
    factors = [pair.point(1, name) for name in ("write_key", "write_value", "read")]
    assert model.write_factor_hook_names(1) == tuple(factors)
    for cell, kind in itertools.product(model.cells, ("write", "state")):
        name = getattr(model, f"{kind}_hook_name")(cell.layer, cell.head)
        assert name == pair.point(cell.layer, f"{kind}.{cell.head}")
        assert model.site(name) == (cell, kind)


@once_per_architecture
@pytest.mark.parametrize(
    ("hook", "head"), [("dekay", None), ("write", None), ("wirte", 0), ("hook_decay", None)]
)
def test_a_hook_that_a_layer_lacks(pair: Pair, hook: str, head: int | None):
    of_heads, of_layer = (
        ", ".join(pair.kinds),
        ("decay", "head_out", "in", "out", "read", "recurrence_out", "write_key"),
    )
    with refused(f"layer 1 has no hook {hook!r}", *of_layer, f"head=0 to {pair.heads - 1} {of_heads}"):
        pair.model.hook_name(1, hook, head)


@once_per_architecture
def test_hooks_under_the_names_that_attention_has(pair: Pair):
    """Who types what TransformerLens has for attention heads is told this layer's hook, not another's."""
    with refused("hook 'decay' of layer 1 has all heads", "leave out head= and take [:, :, 1]"):
        pair.model.hook_name(1, "decay", 1)
    with refused("layer 1 has no hook 'z' (TransformerLens's hook_z is 'head_out' here)"):
        pair.model.hook_name(1, "z")
    with refused(f"did you mean {pair.model.hook_name(1, 'head_out')}?"):
        pair.model.check_hook_names(["blocks.1.attn.hook_z"])


# Bad input: one exception, one line, what to do.


@once_per_architecture
def test_layers_and_cells_that_do_not_exist(pair: Pair):
    model = pair.model
    softmax = [layer for layer in range(pair.n_layers) if layer not in pair.layers]
    for layer in (*softmax, -1, 9):
        with refused(f"layer {layer} is not recurrent", *pair.list_of_cells):
            model.hook_name(layer, "decay")
    no_layers = [(layer, 0) for layer in (*softmax, pair.n_layers, -1)]
    for ask in (model.cell, model.write_hook_name, model.state_hook_name):
        for layer, head in (*no_layers, (0, pair.heads), (0, -1)):
            with refused(f"layer {layer}, head {head}", *pair.list_of_cells):
                ask(layer, head)


@once_per_architecture
def test_a_site_that_does_not_exist(pair: Pair):
    """The name must be the hook's, whole, of a write or state; an erase is none."""
    for name in ("hook_embed", "blocks.1.mlp.hook_write.2", *(pair.point(1, x) for x in ("read", "write"))):
        with refused(repr(name), pair.point(0, "write.0")):
            pair.model.site(name)
    for name in (pair.point(pair.n_layers, "write.1"), pair.point(1, f"state.{pair.heads}")):
        with refused(*pair.list_of_cells):
            pair.model.site(name)


@once_per_architecture
def test_a_hook_name_that_matches_nothing(pair: Pair):
    model, tokens = pair.model, some_tokens(1, 3)
    typo, name = pair.point(1, "wirte.2"), pair.point(1, "write.2")
    for run in (
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(typo, nothing)]),
        lambda: model.run_with_hooks(tokens, bwd_hooks=[(typo, nothing)]),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(name, nothing), (typo, nothing)]),
        lambda: model.hooks(fwd_hooks=[(typo, nothing)]),
        lambda: model.run_with_cache(tokens, names_filter=typo),
        lambda: model.run_with_cache(tokens, names_filter=[name, typo]),
        lambda: model.add_sae(sae_at(typo, 8)),
    ):
        with refused(repr(typo), name):
            run()
    for name in ("wirte.2", f"write.{pair.heads}", "erase"):
        with pytest.raises((HookedModelError, AttributeError), match=name):
            pair.model.add_hook(pair.point(1, name), nothing)
    if not pair.erases:
        with refused("hook_erase.2'"):
            model.run_with_cache(tokens, names_filter=pair.point(1, "erase.2"))


# More sources that cannot be booted are in tests/test_wrong_inputs.py.


@pytest.mark.parametrize("name", ["tiny-gnd", "gpt2", "./nowhere", "~/models/none"])
def test_an_unknown_model_name(name: str):
    with refused(name, "tiny-gdn"):
        boot(name)


def test_a_checkpoint_that_does_not_fit(gdn_folder: Path, tmp_path: Path):
    """Random numbers in a tensor's place would go unnoticed."""
    shutil.copytree(gdn_folder, tmp_path, dirs_exist_ok=True)
    name, file = "model.layers.0.linear_attn.in_proj_qkv.weight", tmp_path / "model.safetensors"
    tensors = load_file(file)
    whole = tensors.pop(name)
    cut = {name: whole[:, :-1].contiguous()}
    for tensor, words in (({}, "lacks 1 tensor"), (cut, "wrong shape for 1 tensor")):
        save_file(tensors | tensor, file, metadata={"format": "pt"})
        with refused(words, name):
            boot(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quux", "architectures": ["Quux"]}))
    with refused("quux"):
        boot(tmp_path)


# What users of the bridge know.


@once_per_architecture
@torch.no_grad()
def test_stop_at_layer(pair: Pair):
    """The residual stream that enters the layer; a negative one counts from the end."""
    tokens = some_tokens(2, 12)
    residuals = pair.residuals(tokens)
    for layer in (*range(1, pair.n_layers), -1):
        assert_close(pair.model(tokens, stop_at_layer=layer), residuals[layer])
        fired: list[str] = []
        writes = [pair.model.write_hook_name(n, 0) for n in pair.layers]
        hooks = [(name, lambda x, hook, fired=fired: fired.append(hook.name)) for name in writes]
        pair.model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=layer)
        assert fired == [x for n, x in zip(pair.layers, writes) if n < layer % pair.n_layers]


@once_per_architecture
@torch.no_grad()
def test_run_with_cache(pair: Pair):
    tokens = some_tokens(2, 12)
    residuals = pair.residuals(tokens)
    logits, cache = pair.model.run_with_cache(tokens)
    assert_close(logits, pair.logits(tokens))
    for layer in range(pair.n_layers):
        assert_close(cache[f"blocks.{layer}.hook_in"], residuals[layer])
    for cell, kind in itertools.product(pair.model.cells, pair.kinds):
        name = pair.point(cell.layer, f"{kind}.{cell.head}")
        assert cache[name].shape == (2, 12, pair.d_k * pair.d_v)
    site = pair.point(1, "write.2")
    _, one = pair.model.run_with_cache(tokens, names_filter=site)
    assert list(one) == [site]
    assert_close(one[site], cache[site], 1e-6)
    _, some = pair.model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_write.3"))
    assert sorted(some) == [pair.model.write_hook_name(layer, 3) for layer in pair.layers]

    # TransformerBridge's aliases, hook_resid_pre and the like.
    seen: list[Tensor] = []
    pair.model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x))])
    assert_close(seen[0], residuals[1])
    _, cache = pair.model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_pre")
    assert_close(cache["blocks.1.hook_resid_pre"], residuals[1])


@once_per_architecture
@torch.no_grad()
def test_hooks_are_gone_after_use_and_permanent_ones_survive_a_reset(pair: Pair):
    tokens = some_tokens(1, 6)
    native = pair.model(tokens)

    def double(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    names = [pair.point(layer, f"{kind}.2") for layer in (0, 1) for kind in pair.kinds]
    for name in names:
        assert not torch.equal(pair.model.run_with_hooks(tokens, fwd_hooks=[(name, double)]), native)
        assert torch.equal(pair.model(tokens), native)
    for name in names:
        pair.model.add_hook(name, double)
    assert not torch.equal(pair.model(tokens), native)
    pair.model.reset_hooks()
    assert torch.equal(pair.model(tokens), native)
    fired: list[int] = []
    pair.model.add_perma_hook(names[0], lambda x, hook: fired.append(1))
    for including_permanent in (False, True):
        pair.model.reset_hooks(including_permanent=including_permanent)
        pair.model(tokens)
        assert len(fired) == 1


# SAELens.


def rebuilt(pair: Pair, sae: TopKSAE) -> Callable[[Tensor], Tensor]:
    """The SAE's reconstruction of [batch, pos, d_k, d_v]."""
    return lambda x: pair.unflatten(sae(x.flatten(-2).float())).double()


def names_of(model: Any) -> dict[str, str]:
    return {name: hook.name for name, hook in model.hook_dict.items()}


@once_per_architecture
@torch.no_grad()
def test_a_stock_sae_stands_in_for_a_write(pair: Pair):
    """Its reconstruction is what is written, and afterwards everything is as before."""
    model, site, tokens = pair.model, pair.point(1, "write.2"), some_tokens(2, 20)
    sae = sae_at(site, pair.d_k * pair.d_v)
    native, names = model(tokens), names_of(model)
    expected, _ = pair.truth(tokens, 1, Edits(writes=at(slice(None), 2, rebuilt(pair, sae))))
    assert (expected - native).abs().max() > 0.01
    assert_close(model.run_with_saes(tokens, saes=[sae]), expected)
    assert names_of(model) == names
    assert torch.equal(model(tokens), native)

    # With its error term the SAE changes nothing.
    assert_close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), native, 1e-5)

    # Hooks still reach the site, under its own name, and a second attachment works as the first.
    fired: list[str] = []
    model.run_with_hooks(tokens, fwd_hooks=[(site, lambda x, hook: fired.append(hook.name))])
    assert fired == [site]
    model.add_hook(site, lambda x, hook: fired.append("added"))
    model(tokens)
    model.reset_hooks()
    model(tokens)
    assert fired == [site, "added"]
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert_close(logits, expected)
    acts = cache[f"{site}.hook_sae_acts_post"]
    acts = acts.to_dense() if acts.is_sparse else acts
    assert acts.shape == (2, 20, 40)
    assert ((acts != 0).sum(-1) <= 4).all()
    assert names_of(model) == names


@once_per_architecture
@torch.no_grad()
def test_saes_at_two_heads_of_a_layer_and_at_states_and_erases(pair: Pair):
    tokens, names, d_in = some_tokens(1, 20), names_of(pair.model), pair.d_k * pair.d_v
    saes = [sae_at(pair.point(1, f"write.{head}"), d_in, seed=head) for head in (0, 3)]

    def change(writes: Tensor) -> Tensor:
        for head, sae in zip((0, 3), saes):
            writes = at(slice(None), head, rebuilt(pair, sae))(writes)
        return writes

    expected, _ = pair.truth(tokens, 1, Edits(writes=change))
    assert_close(pair.model.run_with_saes(tokens, saes=saes), expected)
    assert names_of(pair.model) == names

    layer = pair.layers[-1]
    native = pair.truth(tokens, layer)[1]
    for kind in pair.kinds[1:]:
        sae = sae_at(pair.point(layer, f"{kind}.1"), d_in)
        new = rebuilt(pair, sae)(getattr(native, f"{kind}s")[:, :, 1])
        edits = pair.setting(kind, new, 1, (slice(None), slice(None)))
        expected, _ = pair.truth(tokens, layer, edits)
        assert_close(pair.model.run_with_saes(tokens, saes=[sae]), expected)
        assert names_of(pair.model) == names


@once_per_architecture
@torch.no_grad()
def test_names_are_restored_after_an_sae_anywhere(pair: Pair):
    tokens, names = some_tokens(1, 5), names_of(pair.model)
    native = pair.model(tokens)
    for name in (pair.point(1, "out"), "blocks.0.hook_out", "unembed.hook_in"):
        saes = [sae_at(name, pair.d_model)]
        assert not torch.equal(pair.model.run_with_saes(tokens, saes=saes), native)
        assert names_of(pair.model) == names
        assert torch.equal(pair.model(tokens), native)
        fired: list[str] = []
        hooks = [(name, lambda x, hook, fired=fired: fired.append(hook.name))]
        pair.model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert fired == [name]


# The package's names.


def test_the_package_offers_its_names_and_no_others():
    for name in hooked_models.__all__:
        assert getattr(hooked_models, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = hooked_models.no_such_thing
    assert issubclass(HookedModelError, ValueError)  # so that callers who know nothing of it can catch it


# What a review found: each of these once failed in silence or with another error.


def test_hook_lists_may_be_iterators_and_arguments_positional(gdn_model):
    tokens = torch.arange(8)[None]
    name = gdn_model.write_hook_name(1, 0)
    with torch.no_grad():
        expected = gdn_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 0)])
        native = gdn_model(tokens)
        by_zip = gdn_model.run_with_hooks(tokens, fwd_hooks=zip([name], [lambda x, hook: x * 0]))
        by_place = gdn_model.run_with_hooks(tokens, [(name, lambda x, hook: x * 0)])
        _, cache = gdn_model.run_with_cache(tokens, False, False, [name])
    assert not torch.equal(native, expected)
    assert torch.equal(by_zip, expected)
    assert torch.equal(by_place, expected)
    assert list(cache) == [name]


@pytest.mark.parametrize("value_dim", [[32, 64], 33])
def test_rwkv_7_layers_have_values_of_one_width(value_dim: Any):
    """For all mix in the first layer's."""
    with pytest.raises(ValueError, match="value_dim must be one multiple of 2 heads for all layers"):
        RWKV7Config(hidden_size=32, head_dim=16, num_hidden_layers=2, value_dim=value_dim)


@torch.no_grad()
def test_qwen3_5_with_experts_is_hooked_too(build_folder):
    changes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    reference, tokens = hybrid("qwen3_5_moe", **changes), some_tokens(2, 20)
    model = boot(build_folder("moe", reference, 3))
    assert_close(model(tokens), reference(tokens).logits)
    assert len(model.cells) == 4


# RWKV-7 as a transformers model.


@torch.no_grad()
def test_rwkv_7_generates_from_ids_embeddings_or_both(rwkv7_reference: Any):
    prompt = torch.tensor([[5, 6, 7, 8]])
    embedded = rwkv7_reference.get_input_embeddings()(prompt)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = rwkv7_reference.generate(prompt, **options)
    both = rwkv7_reference.generate(prompt, inputs_embeds=embedded, **options)
    assert torch.equal(both, expected)
    assert torch.equal(rwkv7_reference.generate(inputs_embeds=embedded, **options), expected[:, 4:])


@torch.no_grad()
def test_a_reset_cache_of_rwkv_7_has_seen_nothing(rwkv7_model: Any, rwkv7_reference: Any):
    tokens, cache = torch.tensor([[5, 6, 7, 8]]), rwkv7_model.new_cache()
    rwkv7_model(torch.tensor([[9, 10]]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(rwkv7_model(tokens, past_key_values=cache, use_cache=True), rwkv7_reference(tokens).logits)


def test_another_packages_claim_to_rwkv7_is_respected():
    """In a process of its own, for claims last as long as the process."""
    script = """
from transformers import AutoConfig, LlamaConfig
class Other(LlamaConfig):
    model_type = "rwkv7"
AutoConfig.register("rwkv7", Other)
import hooked_models.modeling.rwkv7
assert type(AutoConfig.for_model("rwkv7")) is Other
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_cache_that_does_not_fit_is_refused(pair: Pair):
    with pytest.raises(HookedModelError, match=r"DynamicCache of 0 layers does not fit.*new_cache"):
        pair.model(torch.tensor([[5, 6]]), past_key_values=DynamicCache(), use_cache=True)


def test_shipped_models_read_the_same_text_as_the_same_tokens():
    read = [boot(name).to_tokens("It is a truth").tolist() for name in zoo.SHIPPED]
    assert read[0] == read[1] == read[2]
