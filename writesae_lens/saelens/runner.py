"""``writesae-lens train``: SAELens's own command line, on the cells of a recurrent model.

Every flag of SAELens's parser means what it means there. What is added: the architecture and the model class
have this package's defaults, sizes come from the model, ``--cells`` names heads instead of a hook, several
cells train from one forward pass, and a shipped model brings its own text.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import wandb
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import INTERRUPTIONS, WriteSAEError
from writesae_lens.saelens.history import record_training
from writesae_lens.saelens.registration import MODEL_CLASS_NAME
from writesae_lens.saelens.win_rate import log_win_rate
from writesae_lens.saes.config import WriteSAETrainingConfig

# Flags of the command line that have other defaults here than in SAELens.
DEFAULTS = {"--architecture": "writesae", "--model_class_name": MODEL_CLASS_NAME, "--log_to_wandb": "false"}
# Options of SAELens's runner for one SAE that its runner for several does not have.
ONE_CELL_ONLY = ("use_cached_activations", "from_pretrained_path", "compile_sae")
TRAINING_SHARE = 0.8
_FLAGS_ARE_LISTED = "writesae-lens train --saelens-help lists the flags"
SHIPPED_TEXT = "hooked_models/zoo/held_out.txt"


class Runner(LanguageModelSAETrainingRunner):
    """SAELens's runner; interrupted, it saves a whole checkpoint (SAELens's leaves the weights out)."""

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        try:
            return super().run_trainer_with_interruption_handling(trainer)
        except INTERRUPTIONS:
            if self.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(str(trainer.n_training_samples))
            raise

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:  # SAELens calls this first when interrupted
            checkpoint_path.mkdir(parents=True, exist_ok=True)
        super().save_checkpoint(checkpoint_path)


def shipped_text() -> tuple[list[str], list[str]]:
    """Documents that the shipped models never saw: four fifths to train SAEs on, one to test them on."""
    documents = [d.strip() for d in zoo.held_out_text().split("<|endoftext|>")]
    cut = round(TRAINING_SHARE * len(documents))
    return documents[:cut], documents[cut:]


def parse_cells(model: HookedRecurrent, text: str) -> list[Cell]:
    """Cells from ``LAYER:HEAD``, comma-separated; ``*`` stands for every layer or head.

    Raises:
        WriteSAEError: the text is no list of cells, or names none of the model's.
        HookedModelError: one of them does not exist; the message lists the valid ones.
    """
    cells: list[Cell] = []
    for part in text.split(","):
        layer, colon, head = (piece.strip() for piece in part.partition(":"))
        if not colon or not all(piece == "*" or piece.isdecimal() for piece in (layer, head)):
            raise WriteSAEError(
                f"cells are written LAYER:HEAD, with * for all and commas between, for example 1:* or "
                f"0:2,3:1; got {text!r}"
            )
        if "*" not in (layer, head):
            cells.append(model.cell(int(layer), int(head)))
            continue
        found = [c for c in model.cells if layer in ("*", str(c.layer)) and head in ("*", str(c.head))]
        if not found:
            layers = ", ".join(str(n) for n in model.mixers)
            raise WriteSAEError(f"{part.strip()!r} names no cell: this model's recurrent layers are {layers}")
        cells += found
    return list(dict.fromkeys(cells))


def run_training(
    arguments: Sequence[str],
    cells: str | None = None,
    site: Literal["write", "state"] = "write",
    win_rate_passages: int = 0,
) -> list[Path]:
    """Train as the command line says.

    Args:
        arguments: flags of SAELens's parser.
        cells: as in `parse_cells`; None takes the cell of ``--hook_name``.
        site: what of each cell to train on.
        win_rate_passages: log the replacement test's win rate on so many passages at every evaluation.

    Returns:
        folders of the trained SAEs, in SAELens's format.

    Raises:
        WriteSAEError: flags that do not go together, or no text to train on.
    """
    given = dict(_flags(arguments))
    if cells is None and "--hook_name" not in given and "--help" not in given:
        raise WriteSAEError("nothing to train on: give --cells or --hook_name")
    if cells is not None and "--hook_name" in given:
        raise WriteSAEError("--cells and --hook_name both say what to train on: give one of them")
    if "--sae" in given:
        given["--architecture"] = given["--sae"]
    defaults = {flag: value for flag, value in DEFAULTS.items() if flag not in given}
    architecture = given.get("--architecture", DEFAULTS["--architecture"])
    # The sizes are the model's, but the parser wants them now.
    sizes = {"--d_k": "1", "--d_v": "1"} if architecture == DEFAULTS["--architecture"] else {}
    if set(sizes) & set(given):
        raise WriteSAEError("d_k and d_v are the cell's own: leave --d_k and --d_v out")
    added = [x for pair in (defaults | sizes).items() for x in pair]
    usage = io.StringIO()  # which SAELens's parser prints in full before it says what is wrong
    try:
        with contextlib.redirect_stderr(usage):
            cfg = _parse_cfg_args([*arguments, *added])
    except argparse.ArgumentError as error:
        raise WriteSAEError(f"{error}; {_FLAGS_ARE_LISTED}") from error
    except SystemExit as error:
        if not error.code:  # --help
            raise
        said = usage.getvalue().strip().rpartition("error: ")[2]
        raise WriteSAEError(f"{said}; {_FLAGS_ARE_LISTED}") from error
    if cfg.model_class_name != MODEL_CLASS_NAME:
        raise WriteSAEError(
            f"this command trains on {MODEL_CLASS_NAME}; for {cfg.model_class_name} use "
            "python -m sae_lens.llm_sae_training_runner"
        )
    if win_rate_passages and not cfg.logger.log_to_wandb:
        raise WriteSAEError("the win rate is logged to W&B: give --log_to_wandb true")
    if cfg.resume_from_checkpoint and not Path(cfg.resume_from_checkpoint).is_dir():
        raise WriteSAEError(
            f"{cfg.resume_from_checkpoint} is no checkpoint: give the folder that an interrupted run names"
        )
    if cfg.output_path:
        Path(cfg.output_path).mkdir(parents=True, exist_ok=True)  # now rather than after the training
    options = dict(cfg.model_from_pretrained_kwargs or {})
    model = HookedRecurrent.boot_transformers(cfg.model_name, device=cfg.llm_device, **options)
    if "--prepend_bos" not in given:
        cfg.prepend_bos = bool(model.cfg.default_prepend_bos)
    chosen = [model.site(cfg.hook_name).cell] if cells is None else parse_cells(model, cells)
    if cells is not None:
        name_of = model.write_hook_name if site == "write" else model.state_hook_name
        hooks = {cell: name_of(cell.layer, cell.head) for cell in chosen}
    else:
        hooks = {chosen[0]: cfg.hook_name}
    saes = {cell: _sized(cfg.sae, cell) for cell in chosen}
    overrides: dict[str, Any] = {"override_dataset": _dataset(cfg), "override_model": model}
    cfg.dataset_path = cfg.dataset_path or SHIPPED_TEXT  # what the SAE will say that it was trained on
    torch.manual_seed(cfg.seed)
    names = {cell: f"L{cell.layer}H{cell.head}" for cell in chosen}
    several = len(chosen) > 1
    runner: Any = None
    try:
        if several:
            sae_of, hook_of = ({names[c]: x for c, x in of.items()} for of in (saes, hooks))
            runner = MultiSAETrainingRunner(config_of_several(cfg, sae_of, hook_of), **overrides)
        else:
            cfg.hook_name, cfg.sae = hooks[chosen[0]], saes[chosen[0]]
            if cfg.use_cached_activations and "--cached_activations_path" not in given:
                raise WriteSAEError("say where the cache is: --cached_activations_path")
            runner = Runner(cfg, **overrides)
        record_training(runner)
        if win_rate_passages:
            log_win_rate(runner, win_rate_passages)
        runner.run()
    except INTERRUPTIONS as error:
        kept = None if runner is None else runner.cfg.checkpoint_path
        again = (
            f"; go on with the same command and --resume_from_checkpoint {_newest(Path(kept))}"
            if kept
            else ""
        )
        raise WriteSAEError(f"interrupted{again}") from error
    except HookedModelError:
        raise
    except (ValueError, wandb.Error) as error:  # SAELens's own words about data, buffers and W&B
        short = " (is the text shorter than one batch of writes?)" if "Buffer size" in str(error) else ""
        raise WriteSAEError(f"SAELens: {error}{short}") from error
    if cfg.output_path is None:
        return []
    return [Path(cfg.output_path) / name if several else Path(cfg.output_path) for name in names.values()]


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags and their values, in both forms: ``--flag value`` and ``--flag=value``."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            yield flag, value if equals else following


def _sized(sae: Any, cell: Cell) -> Any:
    """The SAE's configuration with the cell's sizes, and metadata of its own."""
    ours = isinstance(sae, WriteSAETrainingConfig)
    sizes = {"d_k": cell.d_k, "d_v": cell.d_v} if ours else {"d_in": cell.d_k * cell.d_v}
    return dataclasses.replace(sae, metadata=copy.deepcopy(sae.metadata), **sizes)


def _dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> Dataset | None:
    if cfg.dataset_path:
        return None
    if cfg.model_name not in zoo.SHIPPED:
        raise WriteSAEError(f"{cfg.model_name} ships with no text: give --dataset_path")
    return Dataset.from_dict({"text": shipped_text()[0]})


def config_of_several(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any], hooks: dict[str, str]
) -> MultiSAETrainingRunnerConfig:
    """The same settings for SAELens's runner of several SAEs."""
    asked = [name for name in ONE_CELL_ONLY if getattr(cfg, name)]
    if asked:
        raise WriteSAEError(f"{', '.join(asked)} work for one cell at a time only")
    known = {f.name for f in dataclasses.fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name in known}
    if cfg.checkpoint_path is not None:  # both configs append a run's id to it
        shared["checkpoint_path"] = str(Path(cfg.checkpoint_path).parent)
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=hooks, **shared)


def _newest(folder: Path) -> Path:
    if not folder.is_dir():
        return folder
    return max(folder.iterdir(), key=lambda p: p.stat().st_mtime, default=folder)
