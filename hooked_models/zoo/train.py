"""Train a small model of the zoo from scratch: `python -m hooked_models.zoo.train tiny-gdn`.

Reads the two files that `hooked_models.zoo.corpus` writes, and writes a folder that
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from hooked_models.files.whole_files import replacing
from hooked_models.modeling.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from hooked_models.zoo.corpus import SEPARATOR

END_OF_TEXT = SEPARATOR.strip()
VOCAB_SIZE = 2048
MAX_LENGTH = 2048
BLOCK = 16_384
VALIDATION_EVERY = 50
LEARNING_RATE = 4e-3
WARMUP_FRACTION = 0.03
EVALUATIONS = 20
EVALUATION_WINDOWS = 64
PROMPT = "It was a fine morning, and"


def shared_fields(vocab_size: int, end_id: int) -> dict[str, Any]:
    """The fields that the configurations of all models share."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_id)
    return {"vocab_size": vocab_size, "tie_word_embeddings": True, **tokens}


def build_tiny_gdn(vocab_size: int, end_id: int) -> PreTrainedModel:
    """Three Gated DeltaNet layers and one of full attention; key and value sizes differ."""
    config = Qwen3_5TextConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=48,
        linear_conv_kernel_dim=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        **shared_fields(vocab_size, end_id),
    )
    model: Any = Qwen3_5ForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "A_log"):
            start_with_long_memory(module.A_log, module.dt_bias)
    return model


def build_tiny_mamba2(vocab_size: int, end_id: int) -> PreTrainedModel:
    """Five Mamba-2 layers of ten heads; state and head sizes differ."""
    config = Mamba2Config(
        hidden_size=160,
        num_hidden_layers=5,
        expand=2,
        num_heads=10,
        head_dim=32,
        state_size=48,
        n_groups=1,
        conv_kernel=4,
        chunk_size=32,
        **shared_fields(vocab_size, end_id),
    )
    model: Any = Mamba2ForCausalLM(config)
    for layer in model.backbone.layers:
        start_with_long_memory(layer.mixer.A_log, layer.mixer.dt_bias)
    return model


def build_tiny_rwkv7(vocab_size: int, end_id: int) -> PreTrainedModel:
    """Four RWKV-7 layers of four heads."""
    config = RWKV7Config(
        hidden_size=128,
        num_hidden_layers=4,
        head_dim=32,
        value_dim=128,
        intermediate_size=512,
        decay_low_rank_dim=16,
        gate_low_rank_dim=32,
        a_low_rank_dim=16,
        v_low_rank_dim=16,
        fuse_norm=False,
        max_position_embeddings=MAX_LENGTH,
        **shared_fields(vocab_size, end_id),
    )
    return RWKV7ForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "tiny-gdn": build_tiny_gdn,
    "tiny-mamba2": build_tiny_mamba2,
    "tiny-rwkv7": build_tiny_rwkv7,
}
"""Model name to a builder that takes the vocabulary size and the id of `<|endoftext|>`."""


@torch.no_grad()
def start_with_long_memory(A_log: Tensor, dt_bias: Tensor) -> None:
    """Set log-decay a token, `-exp(A_log) * softplus(dt_bias)`, between -0.8 and -0.001."""
    A_log.copy_(torch.empty_like(A_log).uniform_(1, 8).log())
    dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus


def read_train_and_validation(path: Path) -> tuple[str, str]:
    """The training text without every 50th block of 16 kB, and the validation text: those blocks."""
    text = path.read_text(encoding="utf-8")
    blocks = [text[start : start + BLOCK] for start in range(0, len(text), BLOCK)]
    validation = blocks[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    del blocks[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return "".join(blocks), "".join(validation)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<|endoftext|>` as first, last and padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(SEPARATOR), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of documents, one `<|endoftext|>` between two."""
    documents = tokenizer.backend_tokenizer.encode_batch(text.split(SEPARATOR))
    ids = [np.array([*document.ids, tokenizer.eos_token_id]) for document in documents]
    return torch.from_numpy(np.concatenate(ids)[:-1])


@torch.no_grad()
def text_loss(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    context: int = 512,
    max_windows: int | None = None,
    batch_size: int = 16,
) -> dict[str, float]:
    """`nats_per_token`, `bits_per_byte` and `tokens` of text such as `held_out.txt`.

    The text is scored in consecutive windows of `context` tokens, each after a fresh
    `<|endoftext|>`: all of them, or `max_windows` from its head. A last, partial window is left
    out.
    """
    windows = encode(tokenizer, text)
    windows = windows[: len(windows) // context * context].view(-1, context)[:max_windows]
    inputs = F.pad(windows[:, :-1], (1, 0), value=tokenizer.bos_token_id)
    training = model.training
    model.eval()
    nats = 0.0
    for ids, targets in zip(inputs.split(batch_size), windows.split(batch_size), strict=True):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
        targets = targets.to(model.device).flatten()
        nats += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    model.train(training)
    n_bytes = len(tokenizer.decode(windows.flatten(), skip_special_tokens=True).encode())
    return {
        "nats_per_token": nats / windows.numel(),
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "tokens": windows.numel(),
    }


def training_windows(
    stream: Tensor, context: int, batch_size: int, end_id: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless sequence of batches: random windows of the token stream, and the next token of each token.

    Half the windows start with `<|endoftext|>`, so that the model learns to see it before any text.
    """
    device = stream.device
    generator = torch.Generator(device).manual_seed(seed)
    offsets = torch.arange(context + 1, device=device)
    shape = (batch_size, 1)
    while True:
        starts = torch.randint(len(stream) - context, shape, generator=generator, device=device)
        windows = stream[starts + offsets]
        marked = torch.rand(batch_size, generator=generator, device=device) < 0.5
        windows[:, 0] = torch.where(marked, end_id, windows[:, 0])
        yield windows[:, :-1], windows[:, 1:]


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=model.device.type == "cuda")


def learning_rate(fraction: float) -> float:
    """The learning rate at a fraction of the run: a linear warm-up, then a cosine down to 2%."""
    cosine = 0.51 + 0.49 * math.cos(math.pi * fraction)
    return LEARNING_RATE * min(1.0, fraction / WARMUP_FRACTION) * cosine


def train(
    model: Any,
    tokenizer: Any,
    texts: dict[str, str],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train the model in place on `texts["train"]`, and return the figures of the run.

    The model ends with the weights that had the lowest loss on `texts["validation"]`. The loss on
    `texts["held_out"]` is printed and decides nothing.
    """
    stream = encode(tokenizer, texts["train"]).to(args.device)
    batches = training_windows(stream, args.context, args.batch_size, tokenizer.eos_token_id, args.seed)
    optimizer = make_optimizer(model)
    best = {"validation_loss": math.inf, "best_step": 0}
    best_weights: dict[str, Tensor] = {}
    step, fraction, evaluations = 0, 0.0, 0
    started = time.monotonic()
    bar = tqdm(total=args.steps, unit="step")
    model.train()
    forward = torch.compile(model.forward) if args.compile else model.forward
    while fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction)
        inputs, targets = next(batches)
        with torch.autocast(args.device.type, torch.bfloat16):
            logits = forward(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        seconds = time.monotonic() - started
        fraction = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if fraction * EVALUATIONS >= evaluations + 1:
            evaluations = int(fraction * EVALUATIONS)
            head = {"context": args.context, "max_windows": EVALUATION_WINDOWS}
            validation, held_out = (
                text_loss(model, tokenizer, texts[name], **head)["nats_per_token"]
                for name in ("validation", "held_out")
            )
            tqdm.write(
                f"step {step}: loss {loss.item():.3f}, validation {validation:.3f}, held-out {held_out:.3f}"
            )
            if validation < best["validation_loss"]:
                best = {"validation_loss": validation, "best_step": step}
                best_weights = {name: x.clone() for name, x in model.state_dict().items()}
    bar.close()
    model.load_state_dict(best_weights)
    return {
        "steps": step,
        "tokens_seen": step * args.batch_size * args.context,
        "tokens_in_training_text": len(stream),
        "wall_seconds": round(time.monotonic() - started, 1),
        **best,
    }


def samples(model: Any, tokenizer: Any) -> dict[str, str]:
    """Two continuations of a fixed prompt by 60 tokens: greedy, and at temperature 0.7."""
    ids = tokenizer(tokenizer.bos_token + PROMPT, return_tensors="pt").input_ids
    texts = {}
    for name, options in {
        "greedy": {"do_sample": False},
        "temperature_0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    }.items():
        torch.manual_seed(0)
        output = model.generate(ids, max_new_tokens=60, **options)
        texts[name] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description="Train a small model of the zoo from scratch.")
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="spend two minutes on torch.compile first")
    return parser.parse_args()


def main() -> None:
    """Train, export in bfloat16, reload the export and measure it in float32."""
    args = parse_arguments()
    train_text, validation_text = read_train_and_validation(args.data / "train.txt")
    held_out_text = (args.data / "held_out.txt").read_text(encoding="utf-8")
    texts = {"train": train_text, "validation": validation_text, "held_out": held_out_text}

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer: Any = train_tokenizer(train_text)
    model: Any = ARCHITECTURES[args.name](len(tokenizer), tokenizer.eos_token_id).to(args.device)
    metrics = train(model, tokenizer, texts, args)

    with replacing(args.out, ("config.json",)) as beside:
        model.to(torch.bfloat16).save_pretrained(beside)
        tokenizer.save_pretrained(beside)

        tokenizer = AutoTokenizer.from_pretrained(beside)
        model = AutoModelForCausalLM.from_pretrained(beside, dtype=torch.float32)
        cuda = args.device.type == "cuda"
        report = {
            "model": args.name,
            "parameters": model.num_parameters(),
            "held_out": text_loss(model, tokenizer, held_out_text, context=args.context),
            **metrics,
            "batch_size": args.batch_size,
            "context": args.context,
            "seed": args.seed,
            "device": torch.cuda.get_device_name(args.device) if cuda else "cpu",
            "samples": samples(model, tokenizer),
        }
        text = json.dumps(report, indent=2)
        (beside / "metrics.json").write_text(text + "\n", encoding="utf-8")
    tqdm.write(text)


if __name__ == "__main__":
    main()
