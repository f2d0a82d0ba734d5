"""A model of Qwen3.5-0.8B's published sizes with random weights: what it costs is what the real one costs."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hooked_models import HookedRecurrent

LAYERS = 24
"""Layers of the published model; every fourth has softmax attention."""
# The model's own sizes, and those of a model for tests of the benchmarks themselves.
_FULL: dict[str, Any] = {
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
}
_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


class Pair(NamedTuple):
    """One model twice, with the same weights in memory: by transformers alone, and with hooks."""

    plain: Any
    hooked: HookedRecurrent


@torch.no_grad()
def build(
    layers: int = LAYERS, small: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Pair:
    """Build the model; the same arguments give the same weights.

    Args:
        layers: four or more: transformers' cache wants a layer with attention.
        small: a model of the same kind whose sizes are small.
        device, dtype: of the weights.
    """
    torch.manual_seed(0)
    sizes = _SMALL if small else _FULL
    config = Qwen3_5TextConfig(
        **sizes,
        num_hidden_layers=layers,
        layer_types=["linear_attention" if (n + 1) % 4 else "full_attention" for n in range(layers)],
        linear_conv_kernel_dim=4,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    net: Any = Qwen3_5ForCausalLM(config).eval().requires_grad_(False)
    net.get_input_embeddings().weight.normal_(0, 0.06)  # logits then have a standard deviation of about 2
    for module in net.modules():
        if hasattr(module, "A_log"):
            _remember(module)
    net = net.to(device=device, dtype=dtype)
    net.config.architectures = [type(net).__name__]
    # A copy of the modules, whose weights are the same tensors.
    plain = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    tokenizer = _tokenizer(sizes["vocab_size"])
    hooked = HookedRecurrent.boot_transformers("a/model", hf_model=net, tokenizer=tokenizer, device=device)
    return Pair(plain, hooked)


def _remember(module: Any) -> None:
    """Decays from a few tokens to a thousand; as transformers initialises them most heads forget at once."""
    module.A_log.uniform_(1, 8).log_()
    step = module.dt_bias.uniform_(-7, -2.3).exp()
    module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word for every token: texts are not read here, but a model has a tokenizer."""
    words = WordLevel({f"word{n}": n for n in range(size)}, unk_token="word0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="word0", eos_token="word0", pad_token="word0"
    )
