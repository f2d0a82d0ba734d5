"""The main job on a shipped model, as a user would write it: train with SAELens, replace, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent, zoo
from writesae_lens.config import WriteSAETrainingConfig
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import ExperimentResult, replacement_test
from writesae_lens.experiments.inputs import as_passages
from writesae_lens.experiments.result import write_whole
from writesae_lens.figures import plot_training
from writesae_lens.report import write_report
from writesae_lens.train import shipped_text
from writesae_lens.training_sae import WriteTrainingSAE

CONTEXT_SIZE = 256
BATCH_SIZE = 512
TEST_PASSAGES = 16
DEFAULT_CELLS = {"tiny-gdn": (1, 3), "tiny-mamba2": (4, 4), "tiny-rwkv7": (3, 0)}
_RECORD_EVERY = 10


def run_demo(
    out: str | Path,
    model_name: str = "tiny-gdn",
    cell: tuple[int, int] | None = None,
    d_sae: int = 2048,
    k: int = 4,
    training_tokens: int = 600_000,
    seed: int = 0,
) -> ExperimentResult:
    """Train a WriteSAE on a shipped model's held-out text, put it through the replacement test, report.

    Args:
        out: folder for sae/ (SAELens format), records.csv, summary.json, PNG figures and report.html.
        model_name: a shipped model.
        cell: (layer, head); None is the model's default.
        d_sae, k: size of the dictionary, and atoms active per write.
        training_tokens: writes to train on; the text is read again as often as it takes.
        seed: of everything random.

    Raises:
        WriteSAEError: the model does not ship, or has no such cell.
    """
    if model_name not in zoo.SHIPPED:
        raise WriteSAEError(
            f"the demo runs on shipped models ({', '.join(zoo.SHIPPED)}), got {model_name!r}; for others "
            "use the Python interface"
        )
    out = Path(out)
    model = HookedRecurrent.boot_transformers(model_name, device="cpu")
    where = model.cell(*(cell or DEFAULT_CELLS[model_name]))
    training_text, test_text = shipped_text()
    text_folder = out / "text"
    text_folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": d}) + "\n" for d in training_text)
    write_whole(text_folder / "train.jsonl", lambda p: p.write_text(rows, encoding="utf-8"))

    hook_name = model.write_hook_name(where.layer, where.head)
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=WriteSAETrainingConfig(d_k=where.d_k, d_v=where.d_v, d_sae=d_sae, k=k),
            model_class_name="HookedRecurrent",
            model_name=model_name,
            hook_name=hook_name,
            dataset_path=str(text_folder),
            context_size=CONTEXT_SIZE,
            prepend_bos=False,
            training_tokens=training_tokens,
            train_batch_size_tokens=BATCH_SIZE,
            store_batch_size_prompts=16,
            n_batches_in_buffer=32,
            lr=4e-3,
            lr_warm_up_steps=50,
            lr_decay_steps=training_tokens // BATCH_SIZE // 2,
            dead_feature_window=100,
            device="cpu",
            seed=seed,
            n_checkpoints=0,
            output_path=str(out / "sae"),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    history: list[dict[str, float]] = []
    sae_in_training = runner.sae
    assert isinstance(sae_in_training, WriteTrainingSAE)
    steps = training_tokens // BATCH_SIZE
    # SAELens's own switch for torch.compile replaces the method in the same way.
    sae_in_training.training_forward_pass = _recording(  # type: ignore[method-assign]
        sae_in_training.training_forward_pass, history, steps, sae_in_training.cfg.write_alignment_coefficient
    )
    runner.run()

    sae = SAE.load_from_disk(out / "sae")
    passages = as_passages(model, "\n\n".join(test_text), CONTEXT_SIZE)[:TEST_PASSAGES]
    result = replacement_test(model, sae, passages, seed=seed)
    result.save(out)
    curves = pd.DataFrame(history)
    last = history[-1]
    write_report(
        out / "report.html",
        model,
        result,
        passages,
        training={
            "text": [
                f"A dictionary of {d_sae:,} rank-1 atoms for the {where.d_k} x {where.d_v} writes of layer "
                f"{where.layer}, head {where.head} of {model_name}, {k} of them active at a time, trained "
                f"on {training_tokens:,} writes with SAELens's own runner. At the end {last['l0']:.1f} "
                f"atoms fired per write, {last['dead']:.0f} were dead, and the dominant atom had a mean "
                f"cosine of {last['cosine']:.2f} to the write.",
                "Training read the first four fifths of a text that the model itself never saw; the "
                "replacement test below read the rest.",
            ],
            "figures": {"training curves": plot_training(curves)},
        },
        code=_code(hook_name, model_name),
    )
    return result


def _recording(
    step: Callable[..., Any], history: list[dict[str, float]], steps: int, alignment: float
) -> Callable[..., Any]:
    """The training step, keeping losses, L0 and dead atoms now and then, and telling them now and again."""
    tell = max(_RECORD_EVERY, steps // 10 // _RECORD_EVERY * _RECORD_EVERY)
    count = 0

    def recorded(step_input: Any) -> Any:
        nonlocal count
        output = step(step_input)
        if count % _RECORD_EVERY == 0 or count == steps - 1:
            power = max(float(step_input.sae_in.square().sum(-1).mean()), 1e-30)
            now = {
                "step": count,
                "loss": float(output.loss.detach()),
                "unexplained": float(output.losses["mse_loss"]) / power,
                "cosine": 1 - float(output.losses["write_alignment_loss"]) / power / alignment,
                "l0": float((output.feature_acts > 0).sum(-1).float().mean()),
                "dead": float(step_input.dead_neuron_mask.sum()),
            }
            history.append(now)
            if count % tell == 0:
                tqdm.write(
                    f"step {count:>5}/{steps}  loss {now['loss']:.4f}  unexplained {now['unexplained']:.1%}  "
                    f"cosine {now['cosine']:.2f}  L0 {now['l0']:.1f}  dead {now['dead']:.0f}",
                    file=sys.stderr,
                )
        count += 1
        return output

    return recorded


def _code(hook_name: str, model_name: str) -> str:
    return f"""import writesae_lens
from hooked_models import HookedRecurrent
from sae_lens import SAE
from writesae_lens.experiments import replacement_test

model = HookedRecurrent.boot_transformers("{model_name}")
sae = SAE.load_from_disk("sae")            # trained on {hook_name}
result = replacement_test(model, sae, open("some_text.txt").read(), max_firings=2000)
result.plot().savefig("replacement.png")"""
