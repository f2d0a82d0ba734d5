"""The model class: booting, cells, names, bad input, SAEs as hooks, many swapped writes in one pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Edits, standing_in
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge import supported_architectures as stock_adapters
from transformers import Qwen3_5ForConditionalGeneration

import hooked_models
from hooked_models import HookedGatedDeltaNet, HookedRecurrent, adapters
from hooked_models.errors import HookedModelError

D_K, D_V, HEADS, VOCABULARY = 16, 24, 4, 200
LINEAR_LAYERS = (0, 1, 3)
SITE = "blocks.1.linear_attn.hook_write.2"


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance, f"off by {error:.2e}"


def nothing(x: Tensor, hook: Any) -> None:
    return None


# Booting.


@torch.no_grad()
def test_boots_a_folder(gdn_folder: Path, gdn_reference: Any):
    model = HookedRecurrent.boot_transformers(str(gdn_folder), device="cpu", dtype=torch.float32)
    assert isinstance(model, HookedRecurrent)
    assert isinstance(model, SAETransformerBridge)
    assert {layer: type(mixer) for layer, mixer in model.mixers.items()} == dict.fromkeys(
        LINEAR_LAYERS, HookedGatedDeltaNet
    )
    assert model.cfg.model_name == str(gdn_folder)
    tokens = model.to_tokens("w9 w150 w4 w77", prepend_bos=False)
    assert tokens.tolist() == [[9, 150, 4, 77]]
    assert_close(model(tokens), gdn_reference(tokens, use_cache=False).logits)
    assert_close(
        model("w9 w150 w4 w77", return_type="loss", prepend_bos=False),
        torch.nn.functional.cross_entropy(gdn_reference(tokens).logits[0, :-1], tokens[0, 1:]),
    )


@torch.no_grad()
def test_boots_a_loaded_model(gdn_folder: Path, gdn_reference: Any):
    """hf_model, as for TransformerBridge."""
    loaded = type(gdn_reference).from_pretrained(gdn_folder, attn_implementation="eager")
    model = HookedRecurrent.boot_transformers(str(gdn_folder), hf_model=loaded, device="cpu")
    tokens = some_tokens(1, 9)
    assert model.cells
    assert_close(model(tokens), gdn_reference(tokens, use_cache=False).logits)


@torch.no_grad()
def test_boots_a_vision_checkpoint_text_only(vision_folder: Path):
    whole = Qwen3_5ForConditionalGeneration.from_pretrained(vision_folder, attn_implementation="eager")
    model = HookedRecurrent.boot_transformers(str(vision_folder), device="cpu")
    assert not [name for name, _ in model.original_model.named_parameters() if "visual" in name]
    assert len(model.cells) == len(LINEAR_LAYERS) * HEADS
    tokens = some_tokens(2, 66)
    expected = whole(tokens, use_cache=False).logits
    assert expected.std() > 0.3
    assert_close(model(tokens), expected)


def test_cells(gdn_model: Any):
    expected = [(layer, head, D_K, D_V) for layer in LINEAR_LAYERS for head in range(HEADS)]
    assert [(c.layer, c.head, c.d_k, c.d_v) for c in gdn_model.cells] == expected
    assert {c.architecture for c in gdn_model.cells} == {"gated_delta_net"}
    assert gdn_model.cell(3, 1) == gdn_model.cells[9]
    assert gdn_model.cell(3, 1).layer == 3


def test_hook_names_and_sites(gdn_model: Any):
    assert gdn_model.write_hook_name(1, 2) == SITE
    assert gdn_model.state_hook_name(3, 0) == "blocks.3.linear_attn.hook_state.0"
    for cell in gdn_model.cells:
        for kind in ("write", "state"):
            name = getattr(gdn_model, f"{kind}_hook_name")(cell.layer, cell.head)
            assert gdn_model.hook_dict[name].name == name
            assert gdn_model.site(name) == (cell, kind)


# Bad input: one exception, one line, what to do.


def one_line(error: Any, *parts: str) -> None:
    """The message is a single line that has these parts."""
    message = str(error.value)
    assert "\n" not in message.strip()
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 4), (0, -1), (4, 0), (-1, 0)])
@pytest.mark.parametrize("ask", ["cell", "write_hook_name", "state_hook_name"])
def test_a_cell_that_does_not_exist(gdn_model: Any, ask: str, layer: int, head: int):
    with pytest.raises(HookedModelError) as error:
        getattr(gdn_model, ask)(layer, head)
    one_line(error, f"layer {layer}, head {head}", "layer 0: heads 0-3", "layer 3: heads 0-3")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blocks.1.linear_attn.hook_read", "blocks.0.linear_attn.hook_write.0"),
        ("blocks.1.linear_attn.hook_write", "blocks.0.linear_attn.hook_write.0"),
        ("hook_embed", "blocks.0.linear_attn.hook_write.0"),
        ("blocks.2.linear_attn.hook_write.1", "layer 3: heads 0-3"),
        ("blocks.1.linear_attn.hook_state.7", "layer 1: heads 0-3"),
    ],
)
def test_a_site_that_does_not_exist(gdn_model: Any, name: str, part: str):
    with pytest.raises(HookedModelError) as error:
        gdn_model.site(name)
    one_line(error, part)


def test_a_site_of_another_module_does_not_exist(gdn_model: Any):
    """The name must be the hook's, whole: no hook has this one."""
    with pytest.raises(HookedModelError):
        gdn_model.site("blocks.1.mlp.hook_write.2")


TYPO = "blocks.1.linear_attn.hook_wirte.2"


@pytest.mark.parametrize(
    "run",
    [
        lambda model, name: model.run_with_hooks(some_tokens(1, 3), fwd_hooks=[(name, nothing)]),
        lambda model, name: model.run_with_hooks(some_tokens(1, 3), bwd_hooks=[(name, nothing)]),
        lambda model, name: model.run_with_hooks(
            some_tokens(1, 3), fwd_hooks=[(SITE, nothing), (name, nothing)]
        ),
        lambda model, name: model.hooks(fwd_hooks=[(name, nothing)]),
        lambda model, name: model.run_with_cache(some_tokens(1, 3), names_filter=name),
        lambda model, name: model.run_with_cache(some_tokens(1, 3), names_filter=[SITE, name]),
        lambda model, name: model.add_sae(sae_at(name)),
    ],
    ids=["hooks", "backward hooks", "one of two", "context", "cache", "cache list", "sae"],
)
def test_a_hook_name_that_matches_nothing(gdn_model: Any, run: Callable[[Any, str], Any]):
    with pytest.raises(HookedModelError) as error:
        run(gdn_model, TYPO)
    one_line(error, repr(TYPO), SITE)


@pytest.mark.parametrize(
    "name", [TYPO, "blocks.1.linear_attn.hook_write.9", "blocks.2.linear_attn.hook_read"]
)
def test_a_hook_added_to_nothing_is_an_error(gdn_model: Any, name: str):
    with pytest.raises((HookedModelError, AttributeError), match=r"hook_wirte|'9'|linear_attn"):
        gdn_model.add_hook(name, nothing)


def boot_error(source: str) -> pytest.ExceptionInfo[HookedModelError]:
    with pytest.raises(HookedModelError) as error:
        HookedRecurrent.boot_transformers(source, device="cpu")
    return error


def test_a_model_without_recurrent_layers(llama_folder: Path):
    one_line(boot_error(str(llama_folder)), "no recurrent layers", "LlamaForCausalLM", "Qwen3_5ForCausalLM")


def test_a_folder_without_configuration(tmp_path: Path):
    one_line(boot_error(str(tmp_path)), str(tmp_path), "config.json", "tiny-gdn")


@pytest.mark.parametrize("name", ["tiny-gnd", "gpt2", "./nowhere", "/no/where/at/all", "~/models/none"])
def test_an_unknown_model_name(name: str):
    one_line(boot_error(name), name, "tiny-gdn")


def test_a_hub_id_out_of_reach():
    one_line(boot_error("nobody/nothing-of-this-name"), "nobody/nothing-of-this-name", "configuration")


def test_a_broken_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_text("{oops")
    one_line(boot_error(str(tmp_path)), str(tmp_path), "JSON")


def test_a_model_type_that_nobody_knows(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quux", "architectures": ["Quux"]}))
    one_line(boot_error(str(tmp_path)), "quux")


def test_a_folder_without_weights(gdn_folder: Path, tmp_path: Path):
    shutil.copy(gdn_folder / "config.json", tmp_path)
    one_line(boot_error(str(tmp_path)), str(tmp_path), "model.safetensors")


def test_a_checkpoint_that_lacks_a_tensor(gdn_folder: Path, tmp_path: Path):
    """Random numbers in its place would go unnoticed."""
    shutil.copytree(gdn_folder, tmp_path, dirs_exist_ok=True)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.linear_attn.in_proj_qkv.weight"
    del held[name]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one_line(boot_error(str(tmp_path)), name)


def test_the_exception_is_a_value_error():
    """So that callers who know nothing of the package can catch it."""
    assert issubclass(HookedModelError, ValueError)
    assert hooked_models.HookedModelError is HookedModelError


# What users of the bridge know.


@pytest.mark.parametrize("layer", [1, 2, 3, -1])
@torch.no_grad()
def test_stop_at_layer(gdn_model: Any, gdn_reference: Any, layer: int):
    """The residual stream that enters the layer; a negative one counts from the end."""
    tokens = some_tokens(2, 12)
    hidden = gdn_reference(tokens, use_cache=False, output_hidden_states=True).hidden_states
    residual = gdn_model(tokens, stop_at_layer=layer)
    assert_close(residual, hidden[layer % 4])
    fired: list[str] = []
    hooks = [
        (gdn_model.write_hook_name(n, 0), lambda x, hook: fired.append(hook.name)) for n in LINEAR_LAYERS
    ]
    gdn_model.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=layer)
    assert fired == [gdn_model.write_hook_name(n, 0) for n in LINEAR_LAYERS if n < layer % 4]


@torch.no_grad()
def test_run_with_cache(gdn_model: Any, gdn_reference: Any):
    tokens = some_tokens(2, 12)
    hidden = gdn_reference(tokens, use_cache=False, output_hidden_states=True).hidden_states
    logits, cache = gdn_model.run_with_cache(tokens)
    assert_close(logits, gdn_reference(tokens, use_cache=False).logits)
    for layer in range(4):
        assert_close(cache[f"blocks.{layer}.hook_in"], hidden[layer])
    for cell in gdn_model.cells:
        for name in (
            gdn_model.write_hook_name(cell.layer, cell.head),
            gdn_model.state_hook_name(cell.layer, cell.head),
        ):
            assert cache[name].shape == (2, 12, D_K * D_V)
    _, one = gdn_model.run_with_cache(tokens, names_filter=SITE)
    assert list(one) == [SITE]
    assert_close(one[SITE], cache[SITE], 1e-6)
    _, some = gdn_model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_write.3"))
    assert sorted(some) == [gdn_model.write_hook_name(layer, 3) for layer in LINEAR_LAYERS]


@torch.no_grad()
def test_names_that_users_of_transformer_lens_know(gdn_model: Any, gdn_reference: Any):
    """TransformerBridge's aliases, hook_resid_pre and the like."""
    tokens = some_tokens(1, 6)
    hidden = gdn_reference(tokens, use_cache=False, output_hidden_states=True).hidden_states
    seen: list[Tensor] = []
    gdn_model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x))])
    assert_close(seen[0], hidden[1])
    _, cache = gdn_model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_pre")
    assert_close(cache["blocks.1.hook_resid_pre"], hidden[1])


@torch.no_grad()
def test_hooks_are_gone_after_use(gdn_model: Any):
    tokens = some_tokens(1, 6)
    native = gdn_model(tokens)

    def zero(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x)

    assert not torch.equal(gdn_model.run_with_hooks(tokens, fwd_hooks=[(SITE, zero)]), native)
    assert torch.equal(gdn_model(tokens), native)
    gdn_model.add_hook(SITE, zero)
    gdn_model.add_hook(gdn_model.state_hook_name(0, 1), zero)
    assert not torch.equal(gdn_model(tokens), native)
    gdn_model.reset_hooks()
    assert torch.equal(gdn_model(tokens), native)


@torch.no_grad()
def test_permanent_hooks_survive_a_reset(gdn_model: Any):
    tokens, fired = some_tokens(1, 6), []
    gdn_model.add_perma_hook(SITE, lambda x, hook: fired.append(1))
    try:
        gdn_model.reset_hooks()
        gdn_model(tokens)
        assert len(fired) == 1
    finally:
        gdn_model.reset_hooks(including_permanent=True)
    gdn_model(tokens)
    assert len(fired) == 1


# SAELens.


def sae_at(name: str, d_in: int = D_K * D_V, seed: int = 0) -> TopKSAE:
    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=40, k=4, device="cpu", dtype="float32"))
    sae.cfg.metadata.hook_name = name
    with torch.no_grad():
        for x in sae.parameters():
            x.copy_(0.1 * torch.randn_like(x))
    return sae


def names_of(model: Any) -> dict[str, str]:
    return {name: hook.name for name, hook in model.hook_dict.items()}


@torch.no_grad()
def test_a_stock_sae_stands_in_for_a_write(gdn_model: Any, gdn_reference: Any, gdn_folder: Path):
    """Its reconstruction is what is written, and afterwards everything is as before."""
    sae, tokens = sae_at(SITE), some_tokens(2, 20)
    native, names = gdn_model(tokens), names_of(gdn_model)

    def change(writes: Tensor) -> Tensor:
        writes = writes.clone()
        rebuilt = sae(writes[:, :, 2].flatten(-2).float())
        writes[:, :, 2] = rebuilt.view(2, 20, D_K, D_V).double()
        return writes

    with standing_in(gdn_reference, gdn_folder, 1, Edits(writes=change)):
        expected = gdn_reference(tokens, use_cache=False).logits
    assert (expected - native).abs().max() > 0.01
    assert_close(gdn_model.run_with_saes(tokens, saes=[sae]), expected)
    assert names_of(gdn_model) == names
    assert torch.equal(gdn_model(tokens), native)

    # With its error term the SAE changes nothing.
    assert_close(gdn_model.run_with_saes(tokens, saes=[sae], use_error_term=True), native, 1e-5)

    # Hooks still reach the site, under its own name, and a second attachment works as the first.
    fired: list[str] = []
    gdn_model.run_with_hooks(tokens, fwd_hooks=[(SITE, lambda x, hook: fired.append(hook.name))])
    assert fired == [SITE]
    gdn_model.add_hook(SITE, lambda x, hook: fired.append("added"))
    gdn_model(tokens)
    gdn_model.reset_hooks()
    gdn_model(tokens)
    assert fired == [SITE, "added"]
    logits, cache = gdn_model.run_with_cache_with_saes(tokens, saes=[sae])
    assert_close(logits, expected)
    acts = cache[f"{SITE}.hook_sae_acts_post"]
    acts = acts.to_dense() if acts.is_sparse else acts
    assert acts.shape == (2, 20, 40)
    assert ((acts != 0).sum(-1) <= 4).all()
    assert names_of(gdn_model) == names


@torch.no_grad()
def test_saes_at_two_heads_of_a_layer_and_at_a_state(gdn_model: Any, gdn_reference: Any, gdn_folder: Path):
    tokens, names = some_tokens(1, 20), names_of(gdn_model)
    saes = [sae_at(f"blocks.1.linear_attn.hook_write.{head}", seed=head) for head in (0, 3)]

    def change(writes: Tensor) -> Tensor:
        writes = writes.clone()
        for head, sae in zip((0, 3), saes):
            rebuilt = sae(writes[:, :, head].flatten(-2).float())
            writes[:, :, head] = rebuilt.view(1, 20, D_K, D_V).double()
        return writes

    with standing_in(gdn_reference, gdn_folder, 1, Edits(writes=change)):
        expected = gdn_reference(tokens, use_cache=False).logits
    assert_close(gdn_model.run_with_saes(tokens, saes=saes), expected)
    assert names_of(gdn_model) == names

    on_states = sae_at("blocks.3.linear_attn.hook_state.1")
    with standing_in(gdn_reference, gdn_folder, 3) as traces:
        gdn_reference(tokens, use_cache=False)
    states = torch.zeros(1, 20, HEADS, D_K, D_V, dtype=torch.float64)
    rebuilt = on_states(traces[0].states[:, :, 1].flatten(-2).float())
    states[:, :, 1] = rebuilt.view(1, 20, D_K, D_V).double()
    mask = torch.zeros(1, 20, HEADS, dtype=torch.bool)
    mask[:, :, 1] = True
    with standing_in(gdn_reference, gdn_folder, 3, Edits(states=(states, mask))):
        expected = gdn_reference(tokens, use_cache=False).logits
    assert_close(gdn_model.run_with_saes(tokens, saes=[on_states]), expected)
    assert names_of(gdn_model) == names


@pytest.mark.parametrize(
    "name", ["blocks.1.linear_attn.hook_out", "blocks.0.mlp.hook_out", "blocks.2.hook_out"]
)
@torch.no_grad()
def test_names_are_restored_after_an_sae_anywhere(gdn_model: Any, name: str):
    tokens, names = some_tokens(1, 5), names_of(gdn_model)
    native = gdn_model(tokens)
    assert not torch.equal(gdn_model.run_with_saes(tokens, saes=[sae_at(name, 64)]), native)
    assert names_of(gdn_model) == names
    assert torch.equal(gdn_model(tokens), native)
    fired: list[str] = []
    gdn_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: fired.append(hook.name))])
    assert fired == [name]


# Many swapped writes in one pass.


@pytest.fixture(params=["gdn", "qwen3_next"])
def trio(request: pytest.FixtureRequest) -> tuple[Any, Any, Path]:
    return tuple(request.getfixturevalue(f"{request.param}_{x}") for x in ("model", "reference", "folder"))


def one_pass_each(
    reference: Any, folder: Path, tokens: Tensor, layer: int, head: int, positions: list[int], writes: Tensor
) -> Tensor:
    """The stock model with the loop for a layer: a row a branch, its write edited, its position read."""
    rows = range(len(positions))

    def change(native: Tensor) -> Tensor:
        native = native.clone()
        native[rows, positions, head] = writes.double()
        return native

    with torch.no_grad(), standing_in(reference, folder, layer, Edits(writes=change)):
        logits = reference(tokens.expand(len(positions), -1), use_cache=False).logits
    return logits[rows, positions]


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_swapped_writes_equal_one_edited_pass_each(
    trio: tuple[Any, Any, Path], rank: int, layer: int, head: int
):
    """At the first and last token, next to a chunk's edge, unordered, and several at one position."""
    model, reference, folder = trio
    tokens = some_tokens(70)
    positions = [40, 0, 69, 63, 64, 40, 1, 40, 2, 65]
    keys = random(len(positions), rank, D_K) / 4
    values = random(len(positions), rank, D_V, seed=2) / 4
    writes = torch.einsum("jrk,jrv->jkv", keys, values)
    assert rank or not writes.any()
    native, swapped = model.run_with_swapped_writes(
        tokens, layer, head, torch.tensor(positions), keys, values
    )
    plain = reference(tokens[None], use_cache=False).logits[0].detach()
    assert_close(native, plain, 1e-4)
    expected = one_pass_each(reference, folder, tokens, layer, head, positions, writes)
    assert (expected - plain[positions]).abs().amax(-1).min() > 1e-3
    # The loop is float64 where the model is float32: both passes of the model itself agree closer.
    assert_close(swapped, expected, 1e-4)
    hooked = []
    for position, write in zip(positions, writes):

        def edit(x: Tensor, hook: Any, position: int = position, write: Tensor = write) -> None:
            x[:, position] = write.flatten()

        with torch.no_grad():
            name = model.write_hook_name(layer, head)
            whole = model.run_with_hooks(tokens[None], fwd_hooks=[(name, edit)])
        hooked.append(whole[0, position])
    assert_close(swapped, torch.stack(hooked), 1e-5)


def test_swapping_in_the_native_write_changes_nothing(trio: tuple[Any, Any, Path]):
    model, reference, _ = trio
    tokens, positions = some_tokens(66), torch.arange(66)
    names = [f"blocks.1.linear_attn.hook_write_{x}" for x in ("key", "value")]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None], names_filter=names)
    keys, values = (cache[name][0, :, 2:3] for name in names)
    native, swapped = model.run_with_swapped_writes(tokens, 1, 2, positions, keys, values)
    assert_close(swapped, native, 1e-5)
    assert_close(native, reference(tokens[None], use_cache=False).logits[0])


def test_a_passage_of_one_token_and_branches_of_none(gdn_model: Any, gdn_reference: Any, gdn_folder: Path):
    tokens, keys, values = some_tokens(1), random(2, 1, D_K), random(2, 1, D_V)
    native, swapped = gdn_model.run_with_swapped_writes(tokens, 0, 1, torch.tensor([0, 0]), keys, values)
    writes = torch.einsum("jrk,jrv->jkv", keys, values)
    assert_close(swapped, one_pass_each(gdn_reference, gdn_folder, tokens, 0, 1, [0, 0], writes))
    native, swapped = gdn_model.run_with_swapped_writes(
        some_tokens(5), 0, 1, torch.zeros(0, dtype=torch.long), keys[:0], values[:0]
    )
    assert swapped.shape == (0, VOCABULARY)
    assert_close(native, gdn_reference(some_tokens(1, 5), use_cache=False).logits[0])


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.linear_attn.hook_write.2",
        "blocks.3.linear_attn.hook_state.0",
        "blocks.0.linear_attn.hook_decay",
        "blocks.0.linear_attn.hook_write_key",
    ],
)
def test_swapped_writes_refuse_hooks_in_their_way(gdn_model: Any, name: str):
    tokens, keys, values = some_tokens(9), random(1, 1, D_K), random(1, 1, D_V)
    before = gdn_model(tokens)
    with pytest.raises(HookedModelError) as error, gdn_model.hooks(fwd_hooks=[(name, nothing)]):
        gdn_model.run_with_swapped_writes(tokens, 1, 2, torch.tensor([4]), keys, values)
    one_line(error, name, "reset_hooks")
    assert torch.equal(gdn_model(tokens), before)  # the model is as it was


def test_swapped_writes_refuse_an_attached_sae(gdn_model: Any):
    keys, values = random(1, 1, D_K), random(1, 1, D_V)
    with pytest.raises(HookedModelError, match="reset_saes"), gdn_model.saes([sae_at(SITE)]):
        gdn_model.run_with_swapped_writes(some_tokens(9), 1, 2, torch.tensor([4]), keys, values)


def test_swapped_writes_need_a_cell(gdn_model: Any):
    keys, values = random(1, 1, D_K), random(1, 1, D_V)
    with pytest.raises(HookedModelError, match="layer 3: heads 0-3"):
        gdn_model.run_with_swapped_writes(some_tokens(9), 2, 0, torch.tensor([4]), keys, values)


@pytest.mark.parametrize("position", [-1, 9])
def test_swapped_writes_outside_the_passage(gdn_model: Any, position: int):
    keys, values = random(1, 1, D_K), random(1, 1, D_V)
    with pytest.raises((HookedModelError, IndexError)) as error:
        gdn_model.run_with_swapped_writes(some_tokens(9), 1, 2, torch.tensor([position]), keys, values)
    assert str(position) in str(error.value)


# What the adapters rest on in TransformerLens.


def test_transformer_lens_still_has_what_the_adapters_override():
    """If this fails the hooked layers are no longer built: see hooked_models/adapters.py."""
    assert callable(ArchitectureAdapterFactory.register_adapter)
    for name, adapter in adapters.ADAPTERS.items():
        assert name in ArchitectureAdapterFactory._adapters
        ours, stock = adapter.__bases__
        assert "_build_linear_attn_bridge" in dir(stock)
        assert "_build_linear_attn_bridge" in vars(ours)


def test_other_bridges_keep_their_own_adapters(gdn_folder: Path):
    """Neither importing the package nor booting a model replaces anything of TransformerLens."""
    known = ArchitectureAdapterFactory._adapters
    expected = {
        "Qwen3_5ForCausalLM": stock_adapters.Qwen3_5ArchitectureAdapter,
        "Qwen3_5MoeForCausalLM": stock_adapters.Qwen3_5MoeArchitectureAdapter,
        "Qwen3NextForCausalLM": stock_adapters.Qwen3NextArchitectureAdapter,
    }
    assert {name: known[name] for name in adapters.ADAPTERS} == expected
    before = dict(known)
    with adapters.registered():
        assert known["Qwen3_5ForCausalLM"] is adapters.HookedQwen3_5Adapter
    assert known == before
    with pytest.raises(ZeroDivisionError), adapters.registered():
        _ = 1 / 0
    assert known == before
    HookedRecurrent.boot_transformers(str(gdn_folder), device="cpu")
    assert known == before
    bridge = TransformerBridge.boot_transformers(str(gdn_folder), device="cpu")
    assert not [x for x in bridge.modules() if isinstance(x, HookedGatedDeltaNet)]


@pytest.mark.parametrize("name", hooked_models.__all__)
def test_the_package_offers_its_names(name: str):
    assert getattr(hooked_models, name).__name__ == name


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = hooked_models.no_such_thing


# What a review found: each of these once failed in silence or with another error.


def test_hooks_anywhere_are_refused_by_a_run_with_swapped_writes(gdn_model):
    tokens = torch.arange(8)
    arguments = (tokens, 1, 0, torch.tensor([3]), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    cell = gdn_model.cell(1, 0)
    arguments = (*arguments[:4], torch.zeros(1, 1, cell.d_k), torch.zeros(1, 1, cell.d_v))
    for name in ("blocks.2.hook_in", "blocks.1.linear_attn.hook_out", "unembed.hook_in"):
        hooked = gdn_model.hooks(fwd_hooks=[(name, lambda x, hook: x)])
        with hooked, pytest.raises(HookedModelError, match=name):
            gdn_model.run_with_swapped_writes(*arguments)
    gdn_model.run_with_swapped_writes(*arguments)


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


def test_a_dtype_may_be_given_by_name(gdn_folder):
    model = HookedRecurrent.boot_transformers(str(gdn_folder), device="cpu", dtype="bfloat16")
    assert next(model.original_model.parameters()).dtype == torch.bfloat16
    with pytest.raises(HookedModelError, match="dtype 'float12' is unknown"):
        HookedRecurrent.boot_transformers(str(gdn_folder), device="cpu", dtype="float12")


def test_a_tensor_of_the_wrong_shape_is_named(gdn_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(gdn_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("linear_attn.out_proj.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HookedModelError, match=r"wrong shape for 1 tensor.*out_proj"):
        HookedRecurrent.boot_transformers(str(folder), device="cpu")
    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(HookedModelError, match="could not load"):
        HookedRecurrent.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("point", ["hook_read", "hook_decay", "hook_write_value", "hook_recurrence_out"])
def test_a_hook_that_returns_another_shape_is_named(gdn_model, point):
    name = f"blocks.1.linear_attn.{point}"
    with pytest.raises(HookedModelError, match=f"{point} returned shape"):
        gdn_model.run_with_hooks(torch.arange(8)[None], fwd_hooks=[(name, lambda x, hook: x[:, :1])])


def test_qwen3_5_with_experts_is_hooked_too(build_folder):
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=10,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    reference = Qwen3_5MoeForCausalLM(config).eval()
    folder = build_folder("moe", reference, 3)
    model = HookedRecurrent.boot_transformers(str(folder), device="cpu")
    tokens = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    assert len(model.cells) == 4


def test_a_vision_checkpoint_takes_a_device_map(vision_folder):
    tokens = torch.arange(8)[None]
    placed = HookedRecurrent.boot_transformers(str(vision_folder), device_map="cpu")
    plain = HookedRecurrent.boot_transformers(str(vision_folder), device="cpu")
    with torch.no_grad():
        assert torch.equal(placed(tokens), plain(tokens))
