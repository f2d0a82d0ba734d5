"""The main job on a shipped model, as a user would write it: train with SAELens, replace, report."""

from __future__ import annotations

import json
from pathlib import Path

from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig

from hooked_models import HookedRecurrent, zoo
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import ExperimentResult, replacement_test
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import write_whole
from writesae_lens.report.page import make_report
from writesae_lens.saelens.history import record_training
from writesae_lens.saelens.runner import Runner, shipped_text
from writesae_lens.saes.config import WriteSAETrainingConfig

CONTEXT_SIZE = 256
BATCH_SIZE = 512
TEST_PASSAGES = 16
DEFAULT_CELLS = {"tiny-gdn": (1, 3), "tiny-mamba2": (4, 4), "tiny-rwkv7": (3, 0)}


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
        out: folder for sae/ (SAELens format), records.csv, summary.json, PNG figures, report.html, and what
            else that page needs (partition/, contexts/).
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
    runner = Runner(
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
            checkpoint_path=None,
            output_path=str(out / "sae"),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    record_training(runner)
    runner.run()

    sae = SAE.load_from_disk(out / "sae")
    passages = as_passages(model, "\n\n".join(test_text), CONTEXT_SIZE)[:TEST_PASSAGES]
    result = replacement_test(model, sae, passages, seed=seed)
    result.save(out)
    make_report(out, model, sae, passages, [result], out / "sae", _code(hook_name, model_name), seed=seed)
    return result


def _code(hook_name: str, model_name: str) -> str:
    return f"""import writesae_lens
from hooked_models import HookedRecurrent
from sae_lens import SAE
from writesae_lens.experiments import replacement_test

model = HookedRecurrent.boot_transformers("{model_name}")
sae = SAE.load_from_disk("sae")            # trained on {hook_name}
result = replacement_test(model, sae, open("some_text.txt").read(), max_firings=2000)
result.plot().savefig("replacement.png")"""
