"""The curves of a training run, kept beside the SAE as they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from torch import Tensor

from writesae_lens.saes.rank1 import squared_norms
from writesae_lens.saes.training_sae import WriteTrainingSAE

FILE = "training.csv"
# Rows of a run's file, about.
_ROWS = 400


def record_training(runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner) -> None:
    """Write a row now and then while a runner trains: its losses, L0 and dead atoms, without W&B.

    The file, training.csv, is in the folder where SAELens saves the SAE (of several: each in its own). Its
    columns are step, loss, unexplained (squared error over the inputs' squared norm), l0, dead (None where
    SAELens keeps no count), cosine (of the dominant atom, weighted by squared norms; where the SAE trains on
    alignment), and the terms of the loss. A run that resumes from a checkpoint goes on in its file.

    Args:
        runner: before ``run()``; nothing happens if it has no ``output_path``.
    """
    cfg = runner.cfg
    if cfg.output_path is None:
        return
    steps = max(1, int(cfg.training_tokens) // cfg.train_batch_size_tokens)
    folder = Path(cfg.output_path)
    if isinstance(runner, MultiSAETrainingRunner):
        saes = {folder / name: sae for name, sae in runner.saes.items()}
    else:
        saes = {folder: runner.sae}
    for where, sae in saes.items():
        where.mkdir(parents=True, exist_ok=True)
        path = where / FILE
        if cfg.resume_from_checkpoint is None:
            path.unlink(missing_ok=True)
        # SAELens's own switch for torch.compile replaces the method in the same way.
        sae.training_forward_pass = _recording(sae, path, max(1, steps // _ROWS))  # type: ignore[method-assign]


def _recording(sae: Any, path: Path, every: int) -> Callable[..., Any]:
    train_step, count = sae.training_forward_pass, None
    alignment = getattr(sae.cfg, "write_alignment_coefficient", 0.0)

    def recorded(step_input: Any) -> Any:
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
            new = not path.exists()
            pd.DataFrame([row | losses]).to_csv(path, mode="a", header=new, index=False)
        count += 1
        return output

    return recorded


def _squared_norms(sae: Any, x: Tensor) -> Tensor:
    # Writes come as factors, whose matrices need not be built for this.
    return squared_norms(sae._rows(x)) if isinstance(sae, WriteTrainingSAE) else x.square().sum(-1)


def _steps_before(sae: Any, path: Path) -> int:
    """Steps that a resumed run has made; rows that the file has of later ones are dropped."""
    if not path.exists():
        return int(sae.progress[1]) if isinstance(sae, WriteTrainingSAE) else 0
    rows = pd.read_csv(path)
    # SAELens's own types do not know their step.
    steps = int(sae.progress[1]) if isinstance(sae, WriteTrainingSAE) else int(rows.step.max()) + 1
    rows[rows.step < steps].to_csv(path, index=False)
    return steps
