"""Training WriteSAEs on the cells of a model with SAELens's runners: the one place that configures them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import sae_lens
import torch
import wandb
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.registry import get_sae_training_class

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.files.whole_files import is_temporary
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import INTERRUPTIONS, WriteSAEError
from writesae_lens.experiments.options import check
from writesae_lens.locks import LOCK, locked
from writesae_lens.saelens.history import log_each_to_wandb
from writesae_lens.saelens.registration import MODEL_CLASS_NAME
from writesae_lens.saelens.saving import MultiRunner, Runner, check_checkpoint, newest_checkpoint
from writesae_lens.saelens.win_rate import log_win_rate
from writesae_lens.saes.config import RECOMMENDED_SCHEDULE, WriteSAETrainingConfig

# What `train_cells` sets in SAELens's runner config unless told otherwise.
RUNNER_DEFAULTS: dict[str, Any] = {
    "context_size": 256,
    "store_batch_size_prompts": 16,
    "n_batches_in_buffer": 32,
    "checkpoint_path": None,
}
# Options of SAELens's runner for one SAE that its runner for several does not have.
ONE_CELL_ONLY = ("use_cached_activations", "from_pretrained_path", "compile_sae")


def train_cells(
    model: HookedRecurrent | str,
    cells: Sequence[Cell | tuple[int, int] | str],
    output_path: str | Path | Sequence[str | Path],
    training_tokens: int,
    sae: TrainingSAEConfig | Callable[[Cell], TrainingSAEConfig] | None = None,
    site: Literal["write", "state"] = "write",
    text: Dataset | Sequence[str] | None = None,
    schedule: Mapping[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    resume_from_checkpoint: str | Path | None = None,
    win_rate_passages: int = 0,
    wandb_run_per_cell: bool = False,
    **options: Any,
) -> list[Path]:
    """Train an SAE on each of some cells; several cells share each forward pass of the model.

    Args:
        model: the model, or its name for `HookedRecurrent.boot_transformers`.
        cells: cells of ``model.cells``, (layer, head) pairs, or hook names (which have their own site).
        output_path: the folder for the SAE; of several SAEs each has a folder in it (``L1H3``). A sequence
            names the folder of each cell.
        training_tokens: how many writes each SAE is trained on; the text is repeated as often as needed.
        sae: config of the SAEs, or a function that gives the config for a cell. None:
            `WriteSAETrainingConfig.recommended`.
        site: train on each token's write, or on the state after it.
        text: documents, as strings or as a `datasets.Dataset`. None: what ``dataset_path`` names (an option
            below), or a shipped model's own text.
        schedule: learning rate, batch size and the like, as in SAELens's runner config. None:
            `RECOMMENDED_SCHEDULE`.
        device: of the SAEs (None: the model's).
        seed: of everything random in the training.
        resume_from_checkpoint: go on from this checkpoint of an interrupted run.
        win_rate_passages: log the replacement test's win rate on so many passages at each W&B evaluation.
        wandb_run_per_cell: beside the W&B run of the training, which has all cells, log each cell's
            training.csv as a run of its own, at the end.
        **options: any other field of ``LanguageModelSAERunnerConfig``. Unless given: passages of 256 tokens,
            no checkpoints, no W&B, and a BOS token before each passage if the model's tokenizer adds one.

    Returns:
        the folders of the trained SAEs, in SAELens's format, with training.csv (`record_training`).

    Raises:
        WriteSAEError: no text; options for one SAE only, with several; SAELens refuses a setting; Ctrl-C in
            a run with checkpoints: the message names the checkpoint to resume from.
        HookedModelError: the model has no such cell or hook.
    """
    if isinstance(model, str):
        options = {"model_name": model} | options
        kwargs = options.get("model_from_pretrained_kwargs") or {}
        model = HookedRecurrent.boot_transformers(model, device=options.get("llm_device", device), **kwargs)
    check(Literal["write", "state"], site=site)
    hooks = [_hook_name(model, cell, site) for cell in cells]
    chosen = [model.site(hook).cell for hook in hooks]
    folders = _folders(output_path, chosen)
    saes = [_sae_config(sae, cell) for cell in chosen]
    recipe = dict(RECOMMENDED_SCHEDULE if schedule is None else schedule)
    if schedule is None and "lr" in options:  # the last learning rate follows the first, by SAELens's rule
        del recipe["lr_end"]
    cfg = LanguageModelSAERunnerConfig(
        **{
            "sae": saes[0],
            "model_name": model.cfg.model_name,
            "model_class_name": MODEL_CLASS_NAME,
            "hook_name": hooks[0],
            "prepend_bos": bool(model.cfg.default_prepend_bos),
            "training_tokens": training_tokens,
            "device": device or str(model.cfg.device),
            "seed": seed,
            "resume_from_checkpoint": None if resume_from_checkpoint is None else str(resume_from_checkpoint),
            "output_path": str(folders[0]),
            "logger": LoggingConfig(log_to_wandb=False),
        }
        | RUNNER_DEFAULTS
        | recipe
        | options
    )
    if (win_rate_passages or wandb_run_per_cell) and not cfg.logger.log_to_wandb:
        what = "the win rate is" if win_rate_passages else "runs of single cells are"
        raise WriteSAEError(
            f"{what} logged to W&B: give --log_to_wandb true, in Python logger=LoggingConfig(...)"
        )
    overrides = {"override_model": model, "override_dataset": _dataset(cfg, text)}

    def make_runner() -> Runner | MultiRunner:
        torch.manual_seed(seed)  # SAELens's runners do not use the seed of their config
        if len(chosen) == 1:
            return Runner(cfg, **overrides)
        of_several = _config_of_several(cfg, saes, hooks, folders)
        return MultiRunner(of_several, **overrides, override_saes=_as_alone(of_several.saes, seed))

    _run(make_runner, folders, win_rate_passages)
    if wandb_run_per_cell:
        log_each_to_wandb(folders, cfg.logger)
    return folders


def sized(sae: Any, cell: Cell) -> Any:
    """An SAE's configuration with the sizes of a cell, and metadata of its own."""
    ours = isinstance(sae, WriteSAETrainingConfig)
    sizes = {"d_k": cell.d_k, "d_v": cell.d_v} if ours else {"d_in": cell.d_k * cell.d_v}
    return dataclasses.replace(sae, metadata=copy.deepcopy(sae.metadata), **sizes)


def _hook_name(model: HookedRecurrent, cell: Cell | tuple[int, int] | str, site: str) -> str:
    if isinstance(cell, str):
        return cell
    layer, head = (cell.layer, cell.head) if isinstance(cell, Cell) else cell
    model.cell(layer, head)  # raises an error that lists the cells
    return model.write_hook_name(layer, head) if site == "write" else model.state_hook_name(layer, head)


def _folders(output_path: str | Path | Sequence[str | Path], cells: Sequence[Cell]) -> list[Path]:
    if not isinstance(output_path, (str, Path)):
        folders = [Path(folder) for folder in output_path]
    elif len(cells) == 1:
        folders = [Path(output_path)]
    else:
        folders = [Path(output_path, f"L{cell.layer}H{cell.head}") for cell in cells]
    if not cells or len(set(folders)) != len(cells):
        raise WriteSAEError(
            f"{len(cells)} cells to train on and {len(set(folders))} folders: give one cell or more, "
            "each of them once, and a folder for all or one for each"
        )
    return folders


def _sae_config(
    sae: TrainingSAEConfig | Callable[[Cell], TrainingSAEConfig] | None, cell: Cell
) -> TrainingSAEConfig:
    if sae is None:
        return WriteSAETrainingConfig.recommended(d_k=cell.d_k, d_v=cell.d_v)
    return copy.deepcopy(sae) if isinstance(sae, TrainingSAEConfig) else sae(cell)


def _dataset(cfg: LanguageModelSAERunnerConfig[Any], text: Dataset | Sequence[str] | None) -> Dataset | None:
    """The text as a data set, or None for SAELens to load ``dataset_path``; a shipped model has its own."""
    if text is None and not cfg.dataset_path:
        if cfg.model_name not in zoo.SHIPPED:
            raise WriteSAEError(
                f"{cfg.model_name} ships with no text: give --dataset_path, in Python text=..."
            )
        text, cfg.dataset_path = zoo.shipped_text()[0], zoo.TEXT_NAME
    if text is None or isinstance(text, Dataset):
        return text
    return Dataset.from_dict({"text": [text] if isinstance(text, str) else list(text)})


def _config_of_several(
    cfg: LanguageModelSAERunnerConfig[Any], saes: Sequence[Any], hooks: Sequence[str], folders: Sequence[Path]
) -> MultiSAETrainingRunnerConfig:
    """The same settings for SAELens's runner of several SAEs, which saves each by its name in one folder."""
    unsupported = [name for name in ONE_CELL_ONLY if getattr(cfg, name)]
    if unsupported:
        raise WriteSAEError(f"{', '.join(unsupported)} work for one cell at a time only")
    fields = {f.name for f in dataclasses.fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    shared: dict[str, Any] = {
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name in fields
    }
    if cfg.checkpoint_path is not None:  # both configs append the run's id to it
        shared["checkpoint_path"] = str(Path(cfg.checkpoint_path).parent)
    shared["output_path"] = common = os.path.commonpath([folder.parent for folder in folders])
    names = [folder.relative_to(common).as_posix() for folder in folders]
    return MultiSAETrainingRunnerConfig(
        saes=dict(zip(names, saes, strict=True)),
        hook_names=dict(zip(names, hooks, strict=True)),
        **shared,
    )


def _as_alone(cfgs: Mapping[str, TrainingSAEConfig], seed: int) -> dict[str, TrainingSAE[Any]]:
    """New SAEs, each with the parameters that it has when it is trained alone.

    SAELens's runners draw parameters first and shuffles later, one shuffle for all SAEs. So an SAE is
    trained alike whichever others share its forward passes, if all have the same sizes.
    """
    made = {}
    for name, cfg in cfgs.items():
        torch.manual_seed(seed)
        made[name] = get_sae_training_class(cfg.architecture())[0](cfg)
    return made


def _run(
    make_runner: Callable[[], Runner | MultiRunner], folders: Sequence[Path], win_rate_passages: int
) -> None:
    """Run a training; interruptions and SAELens's errors become messages that name the next step."""
    runner: Any = None
    try:
        with ExitStack() as stack:
            for folder in sorted(folders):
                stack.enter_context(locked(folder))
            with _without_override_warnings():
                runner = make_runner()
            _prepare_checkpoints(runner.cfg, _names_in_checkpoints(runner))
            if win_rate_passages:
                log_win_rate(runner, win_rate_passages)
            runner.run()
    except INTERRUPTIONS as error:
        folder = runner and runner.cfg.checkpoint_path
        checkpoint = folder and newest_checkpoint(folder, _names_in_checkpoints(runner))
        if checkpoint is None:
            raise
        raise WriteSAEError(
            f"interrupted; go on with the same command and --resume_from_checkpoint {checkpoint}"
        ) from error
    except HookedModelError:
        raise
    except (ValueError, wandb.Error) as error:  # about data, buffers and W&B
        raise WriteSAEError(f"SAELens: {error}") from error


@contextmanager
def _without_override_warnings() -> Iterator[None]:
    """Silence SAELens's warning that an object overrides its config, which names the same model and text."""

    def is_other(record: logging.LogRecord) -> bool:
        # The runner of one SAE words it in the first way, that of several in the second.
        said = record.getMessage()
        return "will override the one specified" not in said and "override_" not in said

    sae_lens.logger.addFilter(is_other)
    try:
        yield
    finally:
        sae_lens.logger.removeFilter(is_other)


def _names_in_checkpoints(runner: Runner | MultiRunner) -> list[str]:
    return list(runner.saes) if isinstance(runner, MultiRunner) else [""]


def _prepare_checkpoints(cfg: Any, names: Sequence[str]) -> None:
    """Check the one to resume from; remove what killed runs left beside those of this folder."""
    if cfg.resume_from_checkpoint:
        check_checkpoint(Path(cfg.resume_from_checkpoint), names)
    if cfg.checkpoint_path is None:
        return
    for run in Path(cfg.checkpoint_path).parent.glob("*/"):  # a folder for each run
        # A run that still writes there has the lock; others may be of somebody else.
        with suppress(WriteSAEError, OSError):
            if any(is_temporary(path) or path.name == LOCK for path in run.iterdir()):
                with locked(run):
                    pass
                run.rmdir()  # if it is empty
