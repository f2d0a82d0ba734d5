"""The curves of a training run, saved with its SAE and its checkpoints, and what it reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig, MultiSAETrainingRunner
from torch import Tensor

from writesae_lens.experiments.result import read_table, write_table
from writesae_lens.saelens import upstream
from writesae_lens.saelens.saving import MultiRunner, Runner
from writesae_lens.saes.rank1 import squared_norms
from writesae_lens.saes.training_sae import WriteTrainingSAE

FILE = "training.csv"
# A run's file has about so many rows, however long the run; the last ones say what it reached.
_ROWS, _LAST = 400, 20


def record_training(runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner) -> None:
    """Keep losses, L0 and dead atoms while a runner trains, and save them with the SAE, without W&B.

    The file, training.csv, is in the folder where SAELens saves the SAE (with several SAEs: one file each),
    and in every checkpoint, from where a run that resumes goes on. Its columns are step, loss, unexplained
    (squared error over the inputs' squared norm; of codes the sum of both sides' shares, which is that to
    first order), l0, dead (empty where SAELens keeps no count), cosine (of the dominant atom, weighted by
    squared norms; where the SAE trains on alignment), and the terms of the loss.

    Every run of SAELens's runners on a `HookedRecurrent` is recorded (`saelens.starting`).

    Args:
        runner: before ``run()``; nothing happens if it has no ``output_path``.
    """
    cfg = runner.cfg
    if cfg.output_path is None:
        return
    steps = max(1, int(cfg.training_tokens) // cfg.train_batch_size_tokens)
    several = isinstance(runner, MultiSAETrainingRunner)
    curves = {}
    for name, sae in (runner.saes if several else {"": runner.sae}).items():
        earlier = _earlier_rows(cfg.resume_from_checkpoint, cfg.output_path, name)
        curves[name] = _Curves(sae, earlier, max(1, steps // _ROWS))
        upstream.wrap_on(sae, "training_forward_pass", curves[name].record)

    def save(folder: Path) -> None:
        for name, curve in curves.items():
            write_table(folder / name / FILE, curve.table())

    if isinstance(runner, (Runner, MultiRunner)):
        runner.also_save.append(save)
    else:
        _save_after_saelens(runner, save)


def reached(folder: Path) -> str:
    """What a training reached, in a line of text: means of the last rows of its training.csv.

    Args:
        folder: of the SAE.
    """
    rows = read_table(folder / FILE)
    end = rows.tail(_LAST).mean(numeric_only=True).dropna()
    shown = {
        "loss": "loss {:.3g}",
        "unexplained": "{:.1%} of |X|² unexplained",
        "l0": "{:.1f} features a write",
    }
    parts = [text.format(end[name]) for name, text in shown.items() if name in end]
    if "dead" in end:
        parts.append(f"{rows.dead.iloc[-1]:.0f} dead features")
    return ", ".join(parts)


def log_each_to_wandb(folders: Sequence[Path], logger: LoggingConfig) -> None:
    """Log the training.csv of each of several SAEs as a W&B run of its own, in one group.

    Args:
        folders: of the SAEs; each run has the name of its folder (``L1H3``).
        logger: SAELens's, whose project, entity and run name (as the group) are used.
    """
    for folder in folders:
        run = wandb.init(
            project=logger.wandb_project, entity=logger.wandb_entity, group=logger.run_name, name=folder.name
        )
        for row in read_table(folder / FILE).to_dict("records"):
            run.log({k: v for k, v in row.items() if k != "step" and v == v}, step=int(row["step"]))
        run.finish()


def _save_after_saelens(runner: Any, save: Callable[[Path], None]) -> None:
    """For SAELens's own runners: save into each checkpoint and the output folder when SAELens has."""
    several = isinstance(runner, MultiSAETrainingRunner)

    def checkpoint(original: Callable[..., None], checkpoint_path: Path | None) -> None:
        original(checkpoint_path)
        if checkpoint_path is not None:
            save(checkpoint_path)

    def final(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        save(Path(runner.cfg.output_path))

    upstream.wrap_on(runner, "_save_runner_checkpoint_files" if several else "save_checkpoint", checkpoint)
    upstream.wrap_on(runner, "_save_final_outputs" if several else "save_final_sae", final)


def _earlier_rows(checkpoint: str | None, output_path: str, name: str) -> pd.DataFrame:
    """The rows up to the checkpoint that a run resumes from; earlier versions kept them beside the SAE."""
    if checkpoint is not None:
        for path in (Path(checkpoint, name, FILE), Path(output_path, name, FILE)):
            if path.is_file():
                return read_table(path)
    return pd.DataFrame()


class _Curves:
    """The rows of an SAE's training, from the first step or going on from those of an interrupted run.

    Args:
        sae: in training.
        earlier: rows of the interrupted run.
        every: steps from one row to the next.
    """

    def __init__(self, sae: Any, earlier: pd.DataFrame, every: int) -> None:
        self._sae, self._earlier, self._every = sae, earlier, every
        self._rows: list[dict[str, Any]] = []
        self._count: int | None = None
        self._alignment = getattr(sae.cfg, "write_alignment_coefficient", 0.0)

    def table(self) -> pd.DataFrame:
        """All rows so far."""
        parts = [part for part in (self._earlier, pd.DataFrame(self._rows)) if len(part)]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"step": []})

    def record(self, train_step: Callable[..., Any], step_input: Any) -> Any:
        """A training step, with its row."""
        if self._count is None:
            self._count = self._steps_before()
        output = train_step(step_input)
        if self._count % self._every == 0:
            self._rows.append(self._row(self._count, step_input, output))
        self._count += 1
        return output

    def _row(self, step: int, step_input: Any, output: Any) -> dict[str, Any]:
        losses = {name: float(value.detach()) for name, value in output.losses.items()}
        dead = step_input.dead_neuron_mask
        power = float(mean_squared_norm(self._sae, step_input.sae_in))
        row = {
            "step": step,
            "loss": float(output.loss.detach()),
            "unexplained": losses["mse_loss"] / power if "mse_loss" in losses else None,
            "l0": float((output.feature_acts > 0).sum(-1).float().mean()),
            "dead": None if dead is None else float(dead.sum()),
        }
        if self._alignment and "write_alignment_loss" in losses:
            row["cosine"] = 1 - losses["write_alignment_loss"] / power / self._alignment
        return row | losses

    def _steps_before(self) -> int:
        """The step that a run starts at: not 0 if it resumes; then later rows are dropped."""
        # SAELens's own types do not count their steps.
        ours = isinstance(self._sae, WriteTrainingSAE)
        if not len(self._earlier):
            return int(self._sae.progress[1]) if ours else 0
        steps = int(self._sae.progress[1]) if ours else max(self._earlier["step"].astype(int)) + 1
        self._earlier = self._earlier.loc[self._earlier["step"] < steps]
        return steps


def mean_squared_norm(sae: Any, x: Tensor) -> Tensor:
    """Mean squared norm of an SAE's inputs, at least a number above 0, to divide a squared error by."""
    # Packed writes have theirs without building the matrices.
    ours = isinstance(sae, WriteTrainingSAE)
    norms = squared_norms(sae._rows(x)) if ours else x.square().sum(-1)
    return norms.mean().clamp(min=1e-30)
