"""Fixtures of all tests: tiny models in Hugging Face form, and uninitialised memory that is not a number."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

VOCABULARY = 200
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
HYBRID: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": len(LAYER_TYPES),
    "layer_types": LAYER_TYPES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like are full of NaN (integers: the largest), so nothing lives off them."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


def randomise(model: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: no scale is 1, no bias 0, decays from weak to strong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: nn.Parameter) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                rates = torch.tensor([0.02, 0.3, 2.0, 12.0]).repeat(len(parameter) // 4)
                parameter.copy_(rates.log() + 0.3 * normal(parameter))
            elif name.endswith("dt_bias"):
                parameter.copy_(normal(parameter) - 0.5)
            elif name.endswith("linear_attn.norm.weight"):
                parameter.copy_(1 + 0.3 * normal(parameter))
            elif name.endswith("norm.weight"):  # Qwen's other norms multiply by 1 + w
                parameter.copy_(0.3 * normal(parameter))
            elif name.endswith("conv1d.weight"):
                parameter.copy_(0.5 * normal(parameter))
            elif name.endswith(("in_proj_ba.weight", "in_proj_b.weight", "in_proj_a.weight")):
                parameter.copy_(0.2 * normal(parameter))
            elif name.endswith("lm_head.weight"):
                parameter.copy_(0.1 * normal(parameter))


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer: four special tokens, and token n is the word "wn"."""
    specials = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    words = [*specials.values(), *(f"w{n}" for n in range(len(specials), VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=specials["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)


Build = Callable[[str, Any, int], Path]


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build_folder(name, model, seed) -> a folder in Hugging Face form with the randomised model."""

    def build(name: str, model: Any, seed: int) -> Path:
        folder = tmp_path_factory.mktemp("models") / name
        randomise(model, seed)
        model.eval().save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return build


def hybrid(architecture: str, **changes: Any) -> Any:
    """A tiny hybrid model, "qwen3_5" or "qwen3_next", with random weights."""
    torch.manual_seed(0)
    if architecture == "qwen3_5":
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**HYBRID, **changes}))
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**{**HYBRID, **experts, **changes}))


@pytest.fixture(scope="session")
def gdn_folder(build_folder: Build) -> Path:
    """Qwen3.5: 4 layers (linear, linear, full, linear), 4 heads of 16 x 24 over 2 key heads."""
    return build_folder("qwen3_5", hybrid("qwen3_5"), 0)


@pytest.fixture(scope="session")
def qwen3_next_folder(build_folder: Build) -> Path:
    """Qwen3-Next: the same sizes, its interleaved projections, a mixture of experts."""
    return build_folder("qwen3_next", hybrid("qwen3_next"), 1)


@pytest.fixture(scope="session")
def llama_folder(build_folder: Build) -> Path:
    """A model without recurrent layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return build_folder("llama", LlamaForCausalLM(config), 2)


@pytest.fixture(scope="session")
def vision_folder(build_folder: Build) -> Path:
    """Qwen3.5 as it is published: with a vision tower."""
    torch.manual_seed(0)
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": HYBRID["hidden_size"],
        "num_position_embeddings": 16,
    }
    specials = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3_5Config(
        text_config=HYBRID,
        vision_config=vision,
        **{name: VOCABULARY - 1 - n for n, name in enumerate(specials)},
    )
    return build_folder("qwen3_5_vision", Qwen3_5ForConditionalGeneration(config), 3)


@pytest.fixture(scope="session")
def gdn_model(gdn_folder: Path) -> Any:
    """The Qwen3.5 folder as a `HookedRecurrent`. Shared: leave no hook behind."""
    from hooked_models import HookedRecurrent

    return HookedRecurrent.boot_transformers(str(gdn_folder), device="cpu")


@pytest.fixture(scope="session")
def gdn_reference(gdn_folder: Path) -> Any:
    """The Qwen3.5 folder as transformers loads it."""
    return Qwen3_5ForCausalLM.from_pretrained(gdn_folder, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def qwen3_next_model(qwen3_next_folder: Path) -> Any:
    """The Qwen3-Next folder as a `HookedRecurrent`. Shared: leave no hook behind."""
    from hooked_models import HookedRecurrent

    return HookedRecurrent.boot_transformers(str(qwen3_next_folder), device="cpu")


@pytest.fixture(scope="session")
def qwen3_next_reference(qwen3_next_folder: Path) -> Any:
    """The Qwen3-Next folder as transformers loads it."""
    return Qwen3NextForCausalLM.from_pretrained(qwen3_next_folder, attn_implementation="eager").eval()
