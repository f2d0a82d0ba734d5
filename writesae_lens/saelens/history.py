"""The curves of a training run, written beside the SAE while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from torch import Tensor

from writesae_lens.saelens import upstream
from writesae_lens.saes.rank1 import squared_norms
from writesae_lens.saes.training_sae import WriteTrainingSAE

FILE = "training.csv"
# A run's file has about so many rows, however long the run.
_ROWS = 400


def record_training(runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner) -> None:
    """Write losses, L0 and dead atoms to a file while a runner trains, without W&B.

    The file, training.csv, is in the folder where SAELens saves the SAE (with several SAEs: one file each).
    Its columns are step, loss, unexplained (squared error over the inputs' squared norm), l0, dead (empty
    where SAELens keeps no count), cosine (of the dominant atom, weighted by squared norms; where the SAE
    trains on alignment), and the terms of the loss. A run that resumes from a checkpoint appends to its file.

    Args:
        runner: before ``run()``; nothing happens if it has no ``output_path``.
    """
    cfg = runner.cfg
    if cfg.output_path is None:
        return
    steps = max(1, int(cfg.training_tokens) // cfg.train_batch_size_tokens)
    several = isinstance(runner, MultiSAETrainingRunner)
    for name, sae in (runner.saes if several else {"": runner.sae}).items():
        folder = Path(cfg.output_path, name)
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.resume_from_checkpoint is None:
            (folder / FILE).unlink(missing_ok=True)
        upstream.wrap_on(sae, "training_forward_pass", _recorder(sae, folder / FILE, max(1, steps // _ROWS)))


def _recorder(sae: Any, path: Path, every: int) -> Callable[..., Any]:
    count: int | None = None
    alignment = getattr(sae.cfg, "write_alignment_coefficient", 0.0)

    def recorded(train_step: Callable[..., Any], step_input: Any) -> Any:
        nonlocal count
        if count is None:
            count = _steps_before(sae, path)
        output = train_step(step_input)
        if count % every == 0:
            losses = {name: float(value.detach()) for name, value in output.losses.items()}
            dead = step_input.dead_neuron_mask
            power = max(float(_squared_norms(sae, step_input.sae_in).mean()), 1e-30)
            row = {
                "step": count,
                "loss": float(output.loss.detach()),
                "unexplained": losses["mse_loss"] / power if "mse_loss" in losses else None,
                "l0": float((output.feature_acts > 0).sum(-1).float().mean()),
                "dead": None if dead is None else float(dead.sum()),
            }
            if alignment and "write_alignment_loss" in losses:
                row["cosine"] = 1 - losses["write_alignment_loss"] / power / alignment
            pd.DataFrame([row | losses]).to_csv(path, mode="a", header=not path.exists(), index=False)
        count += 1
        return output

    return recorded


def _squared_norms(sae: Any, x: Tensor) -> Tensor:
    # Packed writes have theirs without building the matrices.
    return squared_norms(sae._rows(x)) if isinstance(sae, WriteTrainingSAE) else x.square().sum(-1)


def _steps_before(sae: Any, path: Path) -> int:
    """The step that a run starts at: not 0 if it resumes; then later rows are dropped from its file."""
    if not path.exists():
        return int(sae.progress[1]) if isinstance(sae, WriteTrainingSAE) else 0
    rows = pd.read_csv(path)
    # SAELens's own types do not count their steps.
    steps = int(sae.progress[1]) if isinstance(sae, WriteTrainingSAE) else int(rows.step.max()) + 1
    rows[rows.step < steps].to_csv(path, index=False)
    return steps
