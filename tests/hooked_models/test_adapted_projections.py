"""A model with peft's LoRA: W_O of one head has its part, and what would leave the part out is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hooked_models import HookedRecurrent
from hooked_models.unembedding import output_embedding, run_to_logits
from tests.hooked_models.architectures import assert_close, random, refused, some_tokens
from tests.hooked_models.model_classes.case import build
from tests.hooked_models.model_classes.table import MODEL_CLASSES


def adapted(folder: Path, targets: list[str], **options: Any) -> Any:
    """A folder's model with random LoRA matrices, as peft wraps it."""
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return get_peft_model(base.eval(), LoraConfig(target_modules=targets, init_lora_weights=False, **options))


def boot(folder: Path, model: Any) -> HookedRecurrent:
    return HookedRecurrent.boot_transformers(folder, hf_model=model, device="cpu")


@pytest.mark.parametrize(
    ("name", "projection"),
    [("gdn", "out_proj"), ("rwkv7", "o_proj")],
    ids=["a layer's own module", "a TransformerLens component"],
)
@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=["lora", "dora"])
@torch.no_grad()
def test_the_output_matrix_of_a_head_has_its_adapter(
    name: str, projection: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """A change of one head's output changes the layer's output by its product with the matrix."""
    folder, tokens = request.getfixturevalue(f"{name}_folder"), some_tokens(2, 9)
    peft_model = adapted(folder, [projection], **options).eval()
    model = boot(folder, peft_model.get_base_model())
    assert_close(model(tokens), peft_model(tokens).logits)
    cell, plain = model.cells[-1], request.getfixturevalue(f"{name}_model")
    names = [model.hook_name(cell.layer, hook) for hook in ("head_out", "out")]
    change, outputs = random(2, 9, cell.d_v), []

    def moved(heads: torch.Tensor, hook: Any) -> torch.Tensor:
        heads = heads.clone()
        heads[:, :, cell.head] += change
        return heads

    for edits in ([], [(names[0], moved)]):
        with model.hooks(fwd_hooks=[*edits, (names[1], lambda x, hook: outputs.append(x))]):
            model(tokens)
    w_o = model.mixers[cell.layer].head_output(cell.head)
    assert len(outputs) == 2  # the matrix is made without firing the projection's hooks
    assert_close(change @ w_o, outputs[1] - outputs[0], 2e-5)
    assert float((w_o - plain.mixers[cell.layer].head_output(cell.head)).abs().max()) > 0.01


def test_a_random_projection_is_refused(gdn_folder: Path) -> None:
    peft_model = adapted(gdn_folder, ["out_proj"], lora_dropout=0.5).train()
    mixer = boot(gdn_folder, peft_model.get_base_model()).mixers[0]
    with refused("layer 0", "model.eval()"):
        mixer.head_output(1)
    peft_model.eval()
    assert mixer.head_output(1).shape == (24, 64)


@torch.no_grad()
def test_an_adapted_unembedding_is_refused_where_its_weight_is_read(gdn_folder: Path) -> None:
    peft_model = adapted(gdn_folder, ["lm_head"]).eval()
    model, tokens = boot(gdn_folder, peft_model.get_base_model()), some_tokens(1, 9)
    assert_close(model(tokens), peft_model(tokens).logits)
    for run in (lambda: run_to_logits(model, tokens), lambda: output_embedding(model)):
        with refused("lora", "merge_and_unload()"):
            run()


def test_the_wrapper_of_peft_is_refused(gdn_folder: Path) -> None:
    with refused("PeftModel", "get_base_model()"):
        boot(gdn_folder, adapted(gdn_folder, ["out_proj"]))


@torch.no_grad()
def test_adapters_of_a_fused_projection_are_computed(tmp_path: Path) -> None:
    """Granite's MLP has gate and input in one projection, which TransformerLens takes apart."""
    case, tokens = build(MODEL_CLASSES["GraniteMoeHybridForCausalLM"], tmp_path), some_tokens(2, 9)
    peft_model = adapted(tmp_path, ["input_linear"]).eval()
    expected = peft_model(tokens, use_cache=False).logits
    assert_close(boot(tmp_path, peft_model.get_base_model())(tokens, use_cache=False), expected)
    assert float((expected - case.logits(tokens)).abs().max()) > 0.01
