"""Models without hooks are refused in one short line that says why, before their weights are loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from hooked_models import HookedRecurrent
from hooked_models.architectures import adapters
from hooked_models.files.known_models import families
from tests.conftest import save_tokenizer
from tests.hooked_models.architectures import refused

LONGEST = 300

# Model type, model class, and a part of the reason.
ATTENTION = "no recurrent layers that this package knows"
CASES = {
    "llama": ("LlamaForCausalLM", ATTENTION),
    "gpt2": ("GPT2LMHeadModel", ATTENTION),
    "bert": ("BertForMaskedLM", ATTENTION),
    "t5": ("T5ForConditionalGeneration", ATTENTION),
    "mamba": ("MambaForCausalLM", "Mamba-1"),
    "falcon_mamba": ("FalconMambaForCausalLM", "Mamba-1"),
    "jamba": ("JambaForCausalLM", "Mamba-1"),
    "zamba": ("ZambaForCausalLM", "Mamba-1"),
    "lfm2": ("Lfm2ForCausalLM", "short convolutions"),
    "lfm2_moe": ("Lfm2MoeForCausalLM", "short convolutions"),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", "one number per channel"),
    "rwkv": ("RwkvForCausalLM", "RWKV-4"),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", "several residual streams"),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", "several residual streams"),
    "glm5_next": ("Glm5NextForConditionalGeneration", "several residual streams"),
    "bailing_hybrid": ("BailingMoeV2_5ForCausalLM", "that transformers has not"),
    "xlstm": ("xLSTMForCausalLM", "a normaliser and scales"),
    # Unknown to transformers: of flash-linear-attention, or of nobody.
    "rwkv6": ("RWKV6ForCausalLM", "before the token's write"),
    "hgrn2": ("HGRN2ForCausalLM", "of an unsupported kind"),
    "gated_deltaproduct": ("GatedDeltaProductForCausalLM", "several times a token"),
    "nobodys": ("NobodysForCausalLM", "model type 'nobodys', unknown to transformers"),
}


def folder_of(path: Path, **config: Any) -> Path:
    """A folder with a configuration and a tokenizer, and weights that nothing can read."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_text("these are no weights")
    save_tokenizer(path)
    return path


def short(error: pytest.ExceptionInfo[Any], source: Any) -> None:
    message = str(error.value).replace(str(source), "owner/name")
    assert len(message) <= LONGEST, message


@pytest.mark.parametrize("kind", CASES)
def test_one_line_says_why(kind: str, tmp_path: Path) -> None:
    name, reason = CASES[kind]
    folder = folder_of(tmp_path / "model", model_type=kind, architectures=[name])
    with refused(reason, families(), "docs/hooks.md") as error:
        HookedRecurrent.boot_transformers(folder, device="cpu")
    short(error, folder)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_configuration_without_a_model_class(kind: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", model_type=kind)
    with refused(CASES[kind][0], CASES[kind][1]):
        HookedRecurrent.boot_transformers(folder, device="cpu")


def test_a_loaded_model(gdn_folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    with refused("LlamaForCausalLM", ATTENTION) as error:
        HookedRecurrent.boot_transformers(
            gdn_folder, hf_model=transformers.LlamaForCausalLM(config), device="cpu"
        )
    short(error, gdn_folder)


def test_a_model_class_that_a_newer_transformers_knows(tmp_path: Path) -> None:
    known = next(iter(adapters.ADAPTERS))
    folder = folder_of(tmp_path / "model", model_type="renamed", architectures=[known])
    with refused("needs a newer transformers", "'renamed'") as error:
        HookedRecurrent.boot_transformers(folder, device="cpu")
    short(error, folder)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/nothing", "./nowhere", "x" * 90])
def test_unknown_names(name: str) -> None:
    with refused(name) as error:
        HookedRecurrent.boot_transformers(name, device="cpu")
    short(error, "owner/name")


def test_no_list_of_model_classes() -> None:
    """Kinds of recurrences are named, not the classes of the table."""
    assert re.fullmatch(r"[a-z0-9_]+(, [a-z0-9_]+)+", families())
    assert len(families()) < 120
