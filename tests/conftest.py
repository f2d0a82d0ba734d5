"""Fixtures of all tests: tiny models in Hugging Face form, and uninitialised memory that is not a number."""

from __future__ import annotations

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.writesae_lens.published.hub import Hub

torch.set_num_threads(1)

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A hub in memory; a `hub.Client` speaks to it."""
    with Hub() as hub:
        yield hub


VOCABULARY = 200
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
HEADS |= {"linear_key_head_dim": 16, "linear_value_head_dim": 24}
HYBRID: dict[str, Any] = COMMON | ATTENTION | HEADS | {"hidden_size": 64, "intermediate_size": 96}
HYBRID |= {"num_hidden_layers": 4, "max_position_embeddings": 512}
HYBRID |= {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
HYBRID |= {"initializer_range": 0.05, "rms_norm_eps": 1e-5}


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like are full of NaN (integers: the largest), so nothing lives off them."""
    memory, set_algorithms = torch.utils.deterministic, torch.use_deterministic_algorithms
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    before, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    set_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    yield
    set_algorithms(before, warn_only=warns)
    memory.fill_uninitialized_memory = filled


# Mean (None: the initial value) and deviation of parameters, by the first pattern that their name matches;
# one number, or one for each quarter of the parameter.
SPREADS: dict[str, tuple[Any, Any]] = {
    r"forget_gate\.A_log$": (0.5, 1.2),
    r"\.([abf]|f_[ab]|g_[ab])_proj\.weight$": (0.0, 0.2),
    r"A_log$": (torch.tensor([0.02, 0.3, 2.0, 12.0]).log(), 0.3),
    r"dt_bias$": (-0.5, 1.0),
    r"norm(_f)?\.weight$": (None, 0.3),  # 1; or 0 where a model multiplies by 1 + w
    r"(norm|conv1d|proj)\.bias$": (0.0, 0.2),
    r"conv1d\.weight$": (0.0, 0.5),
    r"in_proj_(ba|b|a)\.weight$": (0.0, 0.2),
    r"lm_head\.weight$": (0.0, 0.1),
    r"(mixer|mamba)\.D$": (None, 0.5),
    r"w_lora\.lora\.2\.bias$": (-1.0, 3.0),
    r"lora\.2\.bias$": (0.0, 1.0),
    r"lora\..\.weight$": (0.0, 0.15),
    r"\.(attn|ffn)\.x_.$": (0.5, 0.4),
    r"\.attn\.(k_a|r_k)$": (None, 0.3),
    # Short in the last heads, where the ways to make it a unit vector differ.
    r"\.attn\.k_k$": (0.0, torch.tensor([1.0, 1.0, 1.0, 0.004])),
    r"model\.embeddings\.weight$": (0.0, 0.3),
    r"\.g_norm_swish_gate\.weight$": (None, 0.3),
    r"\.gk_proj\.1\.bias$": (torch.tensor([6.0, 0.0, -8.0, -40.0]), 1.0),
    r"\.(attn\.[rkv]_proj|ffn\.(key|value))\.weight$": (0.0, 0.1),
    r"\.attn\.o_proj\.weight$": (0.0, 0.16),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: no scale is 1, no bias 0, decays from weak to strong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = next((s for pattern, s in SPREADS.items() if re.search(pattern, name)), None)
            if spread is not None:
                mean, deviation = (
                    x.repeat_interleave(len(parameter) // 4) if isinstance(x, torch.Tensor) else x
                    for x in spread
                )
                noise = deviation * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter if mean is None else mean) + noise)


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
    """A tiny hybrid model, "qwen3_5", "qwen3_5_moe" or "qwen3_next", with random weights."""
    torch.manual_seed(0)
    if architecture == "qwen3_5":
        return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**{**HYBRID, **changes}))
    options = HYBRID | {"num_experts": 4, "num_experts_per_tok": 2}
    options |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32} | changes
    if architecture == "qwen3_5_moe":
        return transformers.Qwen3_5MoeForCausalLM(transformers.Qwen3_5MoeTextConfig(**options))
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**options))


def mamba2(**changes: Any) -> Any:
    """A tiny Mamba-2 with random weights: 3 layers, 8 heads of 32 x 14 in 2 groups, limited time steps."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = COMMON | {"hidden_size": 28, "expand": 4, "num_hidden_layers": 3, "num_heads": 8}
    sizes |= {"head_dim": 14, "state_size": 32, "n_groups": 2, "chunk_size": 32}
    sizes |= {"time_step_limit": (0.2, 1.2)}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**sizes, **changes}))


def rwkv7(**changes: Any) -> Any:
    """A tiny RWKV-7 with random weights: 3 layers, 4 heads of 16 x 24."""
    from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM

    torch.manual_seed(0)
    sizes = COMMON | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    sizes |= {"value_dim": 96, "decay_low_rank_dim": 12, "a_low_rank_dim": 10, "v_low_rank_dim": 8}
    sizes |= {"gate_low_rank_dim": 14, "fuse_norm": False}
    return RWKV7ForCausalLM(RWKV7Config(**{**sizes, **changes}))


def fixtures(name: str, make: Callable[[], Any], seed: int) -> Iterator[Any]:
    """Session fixtures of a tiny model: NAME_folder, NAME_model and NAME_reference."""

    def folder(build_folder: Build) -> Path:
        return build_folder(name, make(), seed)

    def model(request: pytest.FixtureRequest) -> Any:
        """The folder as a `HookedRecurrent`. Shared: leave no hook behind."""
        from hooked_models import HookedRecurrent

        return HookedRecurrent.boot_transformers(str(request.getfixturevalue(f"{name}_folder")), device="cpu")

    def reference(request: pytest.FixtureRequest) -> Any:
        """The folder as transformers loads it (RWKV-7: as the package's own model class does)."""
        held = request.getfixturevalue(f"{name}_folder")
        return AutoModelForCausalLM.from_pretrained(held, attn_implementation="eager").eval()

    for function in (folder, model, reference):
        yield pytest.fixture(scope="session", name=f"{name}_{function.__name__}")(function)


# Qwen3.5: 4 layers (linear, linear, full, linear), 4 heads of 16 x 24 over 2 key heads.
gdn_folder, gdn_model, gdn_reference = fixtures("gdn", lambda: hybrid("qwen3_5"), 0)
# Qwen3-Next: the same sizes, its interleaved projections, a mixture of experts.
qwen3_next_folder, qwen3_next_model, qwen3_next_reference = fixtures(
    "qwen3_next", lambda: hybrid("qwen3_next"), 1
)
mamba2_folder, mamba2_model, mamba2_reference = fixtures("mamba2", mamba2, 4)
rwkv7_folder, rwkv7_model, rwkv7_reference = fixtures("rwkv7", rwkv7, 5)
# The other values of every switch that these two architectures have.
PLAIN = {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "residual_in_fp32": False}
PLAIN |= {"time_step_limit": (0.0, float("inf")), "tie_word_embeddings": True, "num_hidden_layers": 2}
FUSED = {"fuse_norm": True, "norm_first": False, "value_dim": 32, "num_hidden_layers": 2}
FUSED |= {"tie_word_embeddings": True}
mamba2_plain_folder, mamba2_plain_model, mamba2_plain_reference = fixtures(
    "mamba2_plain", lambda: mamba2(**PLAIN), 6
)
rwkv7_fused_folder, rwkv7_fused_model, rwkv7_fused_reference = fixtures(
    "rwkv7_fused", lambda: rwkv7(**FUSED), 7
)


@pytest.fixture(scope="session")
def llama_folder(build_folder: Build) -> Path:
    """A model without recurrent layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)
    return build_folder("llama", transformers.LlamaForCausalLM(config), 2)


@pytest.fixture(scope="session")
def vision_folder(build_folder: Build) -> Path:
    """Qwen3.5 as it is published: with a vision tower."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": HYBRID["hidden_size"], "num_position_embeddings": 16}
    specials = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3_5Config(
        text_config=HYBRID,
        vision_config=vision,
        **{name: VOCABULARY - 1 - n for n, name in enumerate(specials)},
    )
    return build_folder("qwen3_5_vision", transformers.Qwen3_5ForConditionalGeneration(config), 3)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of an architecture that only the tests define: see `tests.toy_architecture`."""
    from tests.toy_architecture import toy_in

    with toy_in(tmp_path_factory.mktemp("models") / "toy") as folder:
        yield folder
