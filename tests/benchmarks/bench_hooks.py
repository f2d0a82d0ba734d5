"""What hooks on one Gated DeltaNet layer cost, against a stock bridge that runs the layer natively.

The layer has the sizes of Qwen3.5-0.8B: hidden 1,024, 16 heads of 128 x 128, MLP 3,584; T = 1,024.
"""

import tempfile
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from hooked_models import HookedRecurrent
from tests.benchmarks.timing import Row, slowdown, take_turns

LENGTH, ROUNDS = 1024, 9


def rows() -> list[Row]:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=2,  # transformers' cache wants one attention layer; the runs stop before it
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen3_5ForCausalLM(config).save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), bos_token="<e>", eos_token="<e>", pad_token="<e>"
        ).save_pretrained(folder)
        stock = TransformerBridge.boot_transformers(folder, device="cpu")
        model = HookedRecurrent.boot_transformers(folder, device="cpu")
    tokens = torch.randint(0, 1000, (1, LENGTH))
    write = model.write_hook_name(0, 5)

    def hooked(edit: Callable[..., object]) -> Callable[[], object]:
        return lambda: model.run_with_hooks(tokens, fwd_hooks=[(write, edit)], stop_at_layer=1)

    sides = {
        "stock": lambda: stock(tokens, stop_at_layer=1),
        "idle": lambda: model(tokens, stop_at_layer=1),
        "read": hooked(lambda x, hook: None),
        "edit": hooked(lambda x, hook: x * 0.5),
    }
    with torch.no_grad():
        seconds = take_turns(sides, ROUNDS)
    against = "stock TransformerBridge"
    return [
        slowdown("idle hooks", seconds["idle"], seconds["stock"], against, "<= 1.05 x"),
        slowdown("read one head's writes", seconds["read"], seconds["stock"], against, "<= 1.15 x"),
        slowdown("edit one head's writes", seconds["edit"], seconds["stock"], against, "<= 1.6 x"),
    ]
