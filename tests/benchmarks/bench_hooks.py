"""What hooks cost at T = 1,024: on one layer, against a stock bridge; on a hybrid, against transformers.

The single layers have the sizes of Qwen3.5-0.8B (hidden 1,024, 16 heads of 128 x 128), Mamba-2-370M (hidden
1,024, 32 heads of 128 x 64) and RWKV-7-0.4B (hidden 1,024, 16 heads of 64 x 64). The hybrids have three
recurrent layers and one of attention, and run from tokens to logits: Granite 4 with 32 heads of 128 x 64, and
OLMo-Hybrid with 16 heads of 128 x 128. transformers runs attention as "sdpa" unless told otherwise; any
bridge of TransformerLens runs it as "eager", which is slower, so that its pattern can be hooked. Hence both.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoTokenizer,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hooked_models import HookedRecurrent, RWKV7Config, RWKV7ForCausalLM, zoo
from tests.benchmarks.timing import Row, slowdown, take_turns

LENGTH, ROUNDS = 1024, 9
COMMON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HYBRID: dict[str, Any] = COMMON | {
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}

# A stock model, and the keyword arguments with which it and the hooked one are run.
Run = tuple[Callable[..., Any], dict[str, Any]]


def gated_delta_net() -> Any:
    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            intermediate_size=3584,
            num_hidden_layers=2,  # transformers' cache wants one attention layer; the runs stop before it
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            **COMMON,
        )
    )


def mamba2() -> Any:
    return Mamba2ForCausalLM(
        Mamba2Config(
            num_hidden_layers=1, num_heads=32, head_dim=64, state_size=128, n_groups=1, expand=2, **COMMON
        )
    )


def rwkv7() -> Any:
    return RWKV7ForCausalLM(RWKV7Config(num_hidden_layers=1, head_dim=64, **COMMON))


def granite_hybrid() -> Any:
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **HYBRID,
            layer_types=["mamba", "mamba", "attention", "mamba"],
            num_local_experts=0,
            shared_intermediate_size=3584,
            mamba_n_heads=32,
            mamba_d_state=128,
        )
    )


def olmo_hybrid() -> Any:
    return OlmoHybridForCausalLM(
        OlmoHybridConfig(
            **HYBRID,
            layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
            intermediate_size=3584,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        )
    )


def rows() -> Iterator[Row]:
    for build in (gated_delta_net, mamba2, rwkv7):
        yield from _rows(build, "stock TransformerBridge", _bridge_of_one_layer)
    for build in (granite_hybrid, olmo_hybrid):
        for attention in ("sdpa", "eager"):
            whole_model = functools.partial(_whole_model, attention)
            yield from _rows(build, f"stock transformers, {attention} attention", whole_model)


def _rows(build: Callable[[], Any], against: str, run_stock: Callable[..., Run]) -> list[Row]:
    torch.manual_seed(0)
    net = build().eval()
    net.config.architectures = [type(net).__name__]
    tokenizer = AutoTokenizer.from_pretrained(zoo.model_path("tiny-gdn"))  # any will do
    stock, how = run_stock(copy.deepcopy(net), tokenizer)
    model = HookedRecurrent.boot_transformers("a/model", hf_model=net, tokenizer=tokenizer, device="cpu")
    tokens = torch.randint(0, 1000, (1, LENGTH))
    run = functools.partial(model.run_with_hooks, tokens, **how)
    write = model.write_hook_name(0, 5)
    sides = {
        "stock": lambda: stock(tokens, **how),
        "idle": lambda: model(tokens, **how),
        "read": lambda: run(fwd_hooks=[(write, lambda x, hook: None)]),
        "edit": lambda: run(fwd_hooks=[(write, lambda x, hook: x * 0.5)]),
    }
    with torch.no_grad():
        seconds = take_turns(sides, ROUNDS)
    where = build.__name__
    return [
        slowdown(f"{where}: idle hooks", seconds["idle"], seconds["stock"], against, "<= 1.05 x"),
        slowdown(f"{where}: read one head's writes", seconds["read"], seconds["stock"], against, "<= 1.15 x"),
        slowdown(f"{where}: edit one head's writes", seconds["edit"], seconds["stock"], against, "<= 1.6 x"),
    ]


def _bridge_of_one_layer(net: Any, tokenizer: Any) -> Run:
    bridge = TransformerBridge.boot_transformers("a/model", hf_model=net, tokenizer=tokenizer, device="cpu")
    return bridge, {"stop_at_layer": 1}


def _whole_model(attention: str, net: Any, _: Any) -> Run:
    net.set_attn_implementation(attention)
    return net, {"use_cache": False}
