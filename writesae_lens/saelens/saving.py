"""SAELens's runners, with what they save whole or absent: checkpoints and the folders of trained SAEs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from safetensors import SafetensorError, safe_open

from hooked_models.errors import one_line
from hooked_models.files.whole_files import is_temporary, replacing, whole_folder, write_whole
from writesae_lens.errors import INTERRUPTIONS, WriteSAEError
from writesae_lens.locks import locked
from writesae_lens.saelens import upstream
from writesae_lens.saes.whole import CONFIG

RUNNER_CONFIG = "runner_cfg.json"
# What SAELens reads of a checkpoint when a run resumes: of each SAE, and of the run.
_OF_AN_SAE = ("trainer_state.pt", "activation_scaler.json", "sae_weights.safetensors")
_OF_THE_RUN = "activations_store_state.safetensors"
# Seconds to wait for another run that saves into the same folder of several SAEs.
_WAIT = 60.0


class _Saves:
    """What both runners have: functions that write more files beside those of SAELens.

    Each is called with the folder of a checkpoint, or with the output folder, while that is made.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.also_save: list[Callable[[Path], None]] = []

    def _save_more(self, folder: Path) -> None:
        for save in self.also_save:
            save(folder)


class Runner(_Saves, LanguageModelSAETrainingRunner):
    """SAELens's runner for one SAE; interrupted, it saves a whole checkpoint (SAELens's has no weights)."""

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        _save_whole_checkpoints(trainer)
        try:
            return super().run_trainer_with_interruption_handling(trainer)
        except INTERRUPTIONS:
            if self.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(str(trainer.n_training_samples))
            raise

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """The files of the run in a checkpoint that is being made.

        When interrupted, SAELens calls this for a place where it makes no checkpoint: nothing is saved there.
        """
        if checkpoint_path is not None and is_temporary(checkpoint_path):
            super().save_checkpoint(checkpoint_path)
            self._save_more(checkpoint_path)

    def save_final_sae(self, sae: Any, output_path: str, log_feature_sparsity: Any = None) -> None:
        with locked(output_path), replacing(Path(output_path), (CONFIG,)) as beside:
            super().save_final_sae(sae, str(beside), log_feature_sparsity)
            self._save_more(beside)


class MultiRunner(_Saves, MultiSAETrainingRunner):
    """SAELens's runner for several SAEs."""

    def _run_with_interruption_handling(self, trainer: Any) -> Any:
        _save_whole_checkpoints(trainer)
        return super()._run_with_interruption_handling(trainer)

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            self._save_more(checkpoint_path)

    def _save_final_outputs(self, saes: Any, trainer: Any) -> None:
        folder = self.cfg.output_path
        assert folder is not None, "SAELens saves only into a folder"
        with locked(folder, _WAIT), replacing(Path(folder), (CONFIG,)) as beside:
            self.cfg.output_path = str(beside)  # SAELens saves there, and notes it in the run's settings
            try:
                super()._save_final_outputs(saes, trainer)
            finally:
                self.cfg.output_path = folder
            note_output_path(beside, folder)
            self._save_more(beside)


def note_output_path(folder: Path, output_path: str | Path) -> None:
    """Put the path where an SAE will be into the settings of its training, which were saved elsewhere."""
    path = folder / RUNNER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) | {"output_path": str(output_path)}
    write_whole(path, lambda beside: beside.write_text(json.dumps(settings), encoding="utf-8"))


def _save_whole_checkpoints(trainer: Any) -> None:
    """Let a trainer make its checkpoints under temporary names, and rename each when it is whole."""
    folder = trainer.cfg.checkpoint_path

    def whole(save: Callable[..., None], checkpoint_name: str, *args: Any, **kwargs: Any) -> None:
        if folder is None:
            save(checkpoint_name, *args, **kwargs)
            return
        path = Path(folder, checkpoint_name)
        try:
            with locked(folder), whole_folder(path) as beside:
                save(beside.name, *args, **kwargs)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors say of a full disk
            raise WriteSAEError(
                f"the checkpoint {path} could not be written; is the disk full? ({one_line(error)})"
            ) from error

    upstream.wrap_on(trainer, "save_checkpoint", whole)


def check_checkpoint(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint of which a file is missing or does not read.

    Args:
        folder: of the checkpoint.
        names: of the folders of the SAEs in it; "" for a run of one SAE.

    Raises:
        WriteSAEError: names the file.
    """
    needed = [folder / name / file for name in names for file in _OF_AN_SAE] + [folder / _OF_THE_RUN]
    others = {path for path in folder.rglob("*") if path.is_file()} - set(needed)
    for path in [*needed, *sorted(others)]:
        try:
            _read(path)
        except Exception as error:  # torch, safetensors and json have their own for each kind of damage
            raise WriteSAEError(
                f"{folder} is no whole checkpoint: {path.relative_to(folder)} is missing or damaged "
                f"({one_line(error)[:200]}); resume from another one, or train from the beginning"
            ) from error


def _read(path: Path) -> None:
    if path.suffix == ".pt":
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


def newest_checkpoint(folder: str | Path | None, names: Iterable[str]) -> Path | None:
    """The last whole checkpoint in a run's folder of checkpoints, if it has one."""
    names = list(names)
    paths = [p for p in Path(folder).iterdir() if p.is_dir()] if folder and Path(folder).is_dir() else []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            check_checkpoint(path, names)
        except WriteSAEError:
            continue
        return path
    return None
