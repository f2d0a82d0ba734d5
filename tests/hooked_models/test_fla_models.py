"""DeltaNet, GLA and Gated DeltaNet as whole models, against float64 loops and against fla's own functions.

Where flash-linear-attention is installed (``pip install --no-deps flash-linear-attention fla-core einops``),
the loops are compared with its naive functions too, which need neither triton nor a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooked_models import HookedRecurrent
from hooked_models.modeling.fla import GatedDeltaNetForCausalLM
from hooked_models.modeling.fla.layers import GatedDeltaNetLayer
from tests.hooked_models.architectures import greedy, refused
from tests.hooked_models.model_classes import fla_folders
from tests.hooked_models.model_classes.case import Case, ModelClass, build
from tests.hooked_models.model_classes.fla_folders import rms, silu
from tests.hooked_models.oracles import loop

CLASSES = {of.name: of for of in fla_folders.MODEL_CLASSES}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    of: ModelClass = CLASSES[request.param]
    return build(of, Path(tmp_path_factory.mktemp("models") / of.name.replace(" ", "_")))


def attention(x: Tensor, w: dict[str, Tensor], spec: dict[str, Any]) -> Tensor:
    """Softmax attention with rotary positions, token by token and head by head."""
    heads, groups = spec["num_heads"], spec["num_heads"] // spec["num_kv_heads"]
    d, length = x.shape[-1] // heads, x.shape[1]
    angle = torch.arange(length)[:, None] / spec["rope_theta"] ** (torch.arange(0, d, 2).double() / d)

    def of_head(name: str, head: int) -> Tensor:
        part = slice(head * d, (head + 1) * d)
        return x @ w[f"{name}_proj.weight"][part].T + w[f"{name}_proj.bias"][part]

    def turned(y: Tensor) -> Tensor:
        left, right = y.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    outputs = []
    for head in range(heads):
        q, k = turned(of_head("q", head)), turned(of_head("k", head // groups))
        scores = (q @ k.mT / d**0.5).masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
        outputs.append(scores.softmax(-1) @ of_head("v", head // groups))
    return torch.cat(outputs, -1) @ w["o_proj.weight"].T


def reference(case: Case, tokens: Tensor) -> Tensor:
    """Logits of the whole model in float64, from the formulas and the checkpoint's tensors."""
    w = {name: x.double() for name, x in load_file(case.folder / "model.safetensors").items()}
    config: Any = case.model.original_model.config
    x = w["model.embeddings.weight"][tokens]
    for n in range(config.num_hidden_layers):
        own = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if f".layers.{n}." in k}
        normed = rms(x, config.norm_eps) * own["attn_norm.weight"]
        if n in case.of.layers:
            x = x + case.oracle(n)(normed).output
        else:
            mixer = {k.removeprefix("attn."): v for k, v in own.items()}
            x = x + attention(normed, mixer, config.attn)
        normed = rms(x, config.norm_eps) * own["mlp_norm.weight"]
        wide = silu(normed @ own["mlp.gate_proj.weight"].T) * (normed @ own["mlp.up_proj.weight"].T)
        x = x + wide @ own["mlp.down_proj.weight"].T
    x = rms(x, config.norm_eps) * w["model.norm.weight"]
    return x @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


@pytest.mark.parametrize("case", CLASSES, indirect=True, scope="module")
@torch.no_grad()
def test_a_float64_reference_gives_the_models_logits(case: Case) -> None:
    tokens = case.tokens(2, 75)
    expected = reference(case, tokens)
    assert float(expected.std()) > 0.3
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float64).eval()
    # transformers' softmax and rotary angles are in float32, whatever the model's dtype.
    tolerance = 1e-5 if case.model.has_attention else 1e-8
    torch.testing.assert_close(model(tokens).logits, expected, atol=tolerance, rtol=0)
    found = case.reference(tokens).logits
    assert float((found - expected).abs().max() / (expected.max() - expected.min())) < 1e-4


@pytest.mark.parametrize("case", ["DeltaNetForCausalLM with attention", "GLAForCausalLM"], indirect=True)
@torch.no_grad()
def test_the_models_own_generate_and_padding(case: Case) -> None:
    """transformers' ``generate`` of the unhooked model: a padded row gets what it gets alone."""
    tokens = case.tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = case.reference.generate(tokens, attention_mask=mask, **options)[:, 9:]
    for row, start in ((0, 0), (1, 4)):
        alone = case.reference.generate(tokens[row : row + 1, start:], **options)
        assert torch.equal(found[row], alone[0, 9 - start :])
        assert torch.equal(alone, greedy(case.model, tokens[row : row + 1, start:], 6))
    cache = case.reference.model.new_cache()
    with refused("cannot be rolled back"):
        cache.crop(1)


@pytest.mark.parametrize("case", ["GatedDeltaNetForCausalLM without gate"], indirect=True)
def test_training_with_checkpointed_blocks(case: Case) -> None:
    model: Any = GatedDeltaNetForCausalLM.from_pretrained(case.folder)
    tokens = case.tokens(2, 12)
    grads = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(tokens, labels=tokens).loss
        grads.append(torch.autograd.grad(loss, model.model.layers[0].attn.q_proj.weight)[0])
    torch.testing.assert_close(*grads)


def test_start_values() -> None:
    """Decays of a new Gated DeltaNet go from weak to strong, and a step lies between 0.001 and 0.1."""
    torch.manual_seed(0)
    model = fla_folders.gated_delta_net(hidden_size=256, num_heads=64, head_dim=4)
    for layer in (m for m in model.modules() if isinstance(m, GatedDeltaNetLayer)):
        rate = layer.A_log.detach().exp()
        step = torch.nn.functional.softplus(layer.dt_bias.detach())
        assert 0 < float(rate.min()) < 2 < 12 < float(rate.max()) < 16
        assert 0.00099 < float(step.min()) < 0.003 < 0.05 < float(step.max()) < 0.101
    assert abs(float(model.lm_head.weight.detach().std()) - 0.1) < 0.01


@torch.no_grad()
def test_a_hybrids_hooks_and_cells(tmp_path: Path) -> None:
    case = build(CLASSES["DeltaNetForCausalLM with attention"], tmp_path)
    assert sorted(case.model.mixers) == [0, 2]
    assert case.model.has_attention
    with refused("layer 1"):
        case.model.hook_name(1, "write_key")
    tokens = case.tokens(1, 12)
    _, cache = case.model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_out"])
    assert cache["blocks.1.attn.hook_out"].shape == (1, 12, 64)
    again = HookedRecurrent.boot_transformers(case.folder, device="cpu", dtype="float64")
    torch.testing.assert_close(again(tokens), case.model(tokens).double(), atol=1e-3, rtol=0)


NAIVE = {
    "delta_rule": "delta_rule_recurrence",
    "gla": "naive_recurrent_gla",
    "gated_delta_rule": "naive_recurrent_gated_delta_rule",
}


@pytest.mark.parametrize("kind", NAIVE)
def test_flas_naive_functions_give_what_the_loop_gives(kind: str) -> None:
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flash-linear-attention is not installed (see the docstring of this file)")
    path = Path(spec.submodule_search_locations[0]) / "ops" / kind / "naive.py"
    naive = importlib.util.spec_from_file_location(f"naive_{kind}", path)
    assert naive is not None
    assert naive.loader is not None
    module = importlib.util.module_from_spec(naive)
    naive.loader.exec_module(module)
    function = getattr(module, NAIVE[kind])
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 20, 3, 8), torch.randn(2, 20, 3, 8), torch.randn(2, 20, 3, 6)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, g = torch.rand(2, 20, 3) * 2, -torch.rand(2, 20, 3) * 3
    given: dict[str, Tensor] = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    if kind == "gla":
        given["gk"] = g = -torch.rand(2, 20, 3, 8) * 3
        run = loop(q / 8**0.5, g, k, v)
    else:
        g = g if kind == "gated_delta_rule" else torch.zeros_like(g)
        run = loop(q / 8**0.5, g, k, beta[..., None] * v, -g.exp() * beta, k)
    taken = {name: given[name] for name in inspect.signature(function).parameters if name in given}
    if kind == "delta_rule":  # which has its heads before its positions
        taken = {name: x.transpose(1, 2) for name, x in taken.items()}
    out, state = function(**taken, output_final_state=True)
    out = out.transpose(1, 2) if kind == "delta_rule" else out
    torch.testing.assert_close(out.double(), run.outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), run.final_state, atol=1e-5, rtol=1e-5)
