"""SAELens's runners end to end on a layer of 16 heads of 128 x 128 (as in Qwen3.5-0.8B), d_sae 2,048, k 32.

Tokens a second: forward pass, activation store, training steps, optimiser. The flat side is SAELens as it
comes, its store included. The run on 16 heads is compared with what it cannot do without: their steps, and
the forward pass. Codes are those of the recommended recipe, with the reads of six later tokens kept beside
each write; what these cost is the time to pull them back, beside the run's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.activations_store import ActivationsStore
from transformers import AutoTokenizer

from hooked_models import HookedRecurrent, zoo
from hooked_models.recurrence import Recurrence, later_reads
from tests.benchmarks.bench_hooks import gated_delta_net
from tests.benchmarks.timing import Row
from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saes.packed import PackedWrites, Write

D, D_SAE, K, BATCH, CONTEXT, HEADS = 128, 2048, 32, 256, 256, 16
OURS_TOKENS, FLAT_TOKENS, MULTI_TOKENS = 24_576, 4096, 8192


def rows() -> list[Row]:
    torch.manual_seed(0)
    net = gated_delta_net().eval()
    net.config.architectures = [type(net).__name__]
    model = HookedRecurrent.boot_transformers(
        "a/model",
        hf_model=net,
        tokenizer=AutoTokenizer.from_pretrained(zoo.model_path("tiny-gdn")),
        device="cpu",
    )
    data = Dataset.from_dict({"tokens": torch.randint(0, 1000, (128, CONTEXT)).tolist()})
    write = WriteSAETrainingConfig(d_k=D, d_v=D, d_sae=D_SAE, k=K, later_reads=())
    of_codes = WriteSAETrainingConfig.recommended(d_k=D, d_v=D)
    with TemporaryDirectory() as folder:
        ours = OURS_TOKENS / _seconds(lambda: _run(model, data, folder, write, OURS_TOKENS))
        with _stock_store():
            flat_sae = TopKTrainingSAEConfig(d_in=D * D, d_sae=D_SAE, k=K)
            flat = FLAT_TOKENS / _seconds(lambda: _run(model, data, folder, flat_sae, FLAT_TOKENS))
        several = _seconds(lambda: _run_several(model, data, folder, write))
        codes = OURS_TOKENS / _seconds(lambda: _run(model, data, folder, of_codes, OURS_TOKENS))
    steps = MULTI_TOKENS // BATCH * HEADS * _step_seconds(write)
    forward = _seconds(lambda: _forward(model, data))
    share = _seconds(lambda: _pull_back(of_codes.later_reads)) / (OURS_TOKENS / codes)
    return [
        Row(
            "runner, one of 16 heads of 128 x 128",
            "SAELens's flat TopK, same config",
            f"{ours / flat:.0f} x faster",
            ">= 15 x",
            f"{ours:,.0f} tokens/s",
            f"{flat:,.0f} tokens/s",
        ),
        Row(
            "runner, 1,024 + 1,024 codes and 6 later reads",
            "SAELens's flat TopK, 2,048 atoms",
            f"{codes / flat:.0f} x faster",
            ">= 15 x",
            f"{codes:,.0f} tokens/s",
            f"{flat:,.0f} tokens/s",
        ),
        Row(
            "the same: pulling reads of up to 32 tokens on back",
            "the whole run",
            f"{share:.1%} of it",
            "<= 10%",
            "",
            "",
        ),
        Row(
            "runner, all 16 heads at once",
            "16 x the step alone + one forward pass",
            f"{several / (steps + forward):.2f} x",
            "<= 1.5 x",
            f"{several:.1f} s",
            f"{steps:.1f} + {forward:.1f} s",
        ),
    ]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _common(folder: str, tokens: int) -> dict[str, Any]:
    return {
        "model_class_name": "HookedRecurrent",
        "context_size": CONTEXT,
        "training_tokens": tokens,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "prepend_bos": False,
        "device": "cpu",
        "output_path": str(Path(folder) / "out"),
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def _run(model: HookedRecurrent, data: Dataset, folder: str, sae: Any, tokens: int) -> None:
    config = LanguageModelSAERunnerConfig(
        sae=sae, hook_name=model.write_hook_name(0, 5), verbose=False, **_common(folder, tokens)
    )
    LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model).run()


def _run_several(model: HookedRecurrent, data: Dataset, folder: str, sae: WriteSAETrainingConfig) -> None:
    config = MultiSAETrainingRunnerConfig(
        saes={f"H{h}": sae for h in range(HEADS)},
        hook_names={f"H{h}": model.write_hook_name(0, h) for h in range(HEADS)},
        **_common(folder, MULTI_TOKENS),
    )
    MultiSAETrainingRunner(config, override_dataset=data, override_model=model).run()


@contextlib.contextmanager
def _stock_store() -> Iterator[None]:
    """SAELens's own activation store, without this package's."""
    names = ("get_activations", "get_multi_hook_activations")
    wrapped = {name: getattr(ActivationsStore, name) for name in names}
    for name, method in wrapped.items():
        setattr(ActivationsStore, name, method.__wrapped__)
    try:
        yield
    finally:
        for name, method in wrapped.items():
            setattr(ActivationsStore, name, method)


def _step_seconds(config: WriteSAETrainingConfig) -> float:
    """One step of one SAE, optimiser included, its inputs at hand."""
    sae = WriteTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)
    seconds = []
    for step in range(24):
        x = PackedWrites(Write(*(torch.randn(BATCH, 1, D) for _ in range(3))))
        step_input = TrainStepInput(x, {}, torch.zeros(D_SAE, dtype=torch.bool), step, False)
        start = time.perf_counter()
        sae.training_forward_pass(step_input).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def _pull_back(distances: tuple[int, ...]) -> None:
    """What the store adds for a head's later reads, over the passages of the run."""
    q, k, v, b = (torch.randn(4, CONTEXT, 1, D) for _ in range(4))
    g, a = -torch.rand(4, CONTEXT, 1), -torch.rand(4, CONTEXT, 1)
    for _ in range(OURS_TOKENS // (4 * CONTEXT)):
        later_reads(Recurrence(q, g, k, v, a, b), distances)


@torch.no_grad()
def _forward(model: HookedRecurrent, data: Dataset) -> None:
    tokens = torch.stack([torch.as_tensor(row) for row in data["tokens"]])[: MULTI_TOKENS // CONTEXT]
    for batch in tokens.split(4):
        model(batch, stop_at_layer=1, use_cache=False)
