"""Sizes, memory and time of a training or of a run of the paper, before it is started (``--dry-run``)."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from sae_lens import TrainingSAEConfig

from hooked_models import HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.catalogue import EXPERIMENTS, Experiment, find_experiment
from writesae_lens.experiments.options import Count, as_list, check
from writesae_lens.experiments.passages import DEFAULT_CONTEXT
from writesae_lens.figures import new_figure
from writesae_lens.published import releases
from writesae_lens.reproduce.paper import SIZES, Paper, config
from writesae_lens.reproduce.run import (
    CONTEXT,
    OF_ALL_HEADS,
    Recipe,
    find_cells,
    flat_config,
    has_flat,
    options_of,
    schedule_of,
    texts,
    training_config,
)
from writesae_lens.reproduce.training_costs import n_trained, step_seconds, training_bytes
from writesae_lens.reproduce.units import Size, Speeds, Units, seconds
from writesae_lens.reproduce.work import Text, Work, work_of
from writesae_lens.saes.config import WriteSAETrainingConfig

# Logits that an experiment has in memory at once, and copies of them; branches of a passage that are run
# together, and tensors as wide as the model that they have at once.
_LOGITS, _COPIES, _BRANCHES, _WIDE = 2**25, 3, 2**11, 24


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is estimated: a model, its cells, what its text gives, and what a unit of work costs there.

    Args:
        tokens_of_text: tokens of the text for the experiments (None: more than they read).
        speeds: of this machine, where something is counted in its operations.
    """

    name: str
    size: Size
    width: int
    cells: list[Cell] | None
    layer: int
    d_k: int
    d_v: int
    n_cells: int
    context: int
    tokens_of_text: int | None
    units: Units
    speeds: Speeds
    device: str
    dtype: str

    @property
    def where(self) -> str:
        """The machine in words."""
        threads = torch.get_num_threads()
        what = f"{threads} CPU thread{'s' * (threads > 1)}" if self.device == "cpu" else self.device
        speed = f"{self.speeds.product / 1e9:,.0f} GFLOP/s in a dense product"
        return f"this machine ({what}, {self.dtype}, {speed})"


def estimate(
    name: str,
    model_name: str | None = None,
    training_tokens: int | None = None,
    dtype: str = "float32",
    recipe: Recipe = "recommended",
    experiments: Sequence[str] | None = None,
    device: str = "cpu",
) -> str:
    """Sizes, memory and time of a run of the paper on this machine, as a few lines of text.

    The base model is not loaded: its published sizes say what a token and an unembedded position take, and
    the machine's speed is measured. A model that is named in its place is loaded and timed. What each
    experiment runs is counted from its options (`writesae_lens.reproduce.work`), with the dictionary taken to
    fire at every position; a training step and a figure are timed. Statistics are not counted.

    Args:
        name, model_name, training_tokens, dtype, recipe, experiments, device: as for `reproduce`.

    Raises:
        WriteSAEError: there is no such configuration or experiment.
        HookedModelError: the model in the base model's place cannot be loaded.
    """
    paper = config(name)
    check(Literal["float32", "bfloat16", "float16"], dtype=dtype)
    check(Recipe, recipe=recipe)
    check(Count | None, training_tokens=training_tokens)
    names = list(EXPERIMENTS) if experiments is None else as_list("experiments", experiments)
    chosen = [find_experiment(each) for each in names]
    subject = (
        _published(paper, dtype, device) if model_name is None else _loaded(paper, model_name, dtype, device)
    )
    shipped = model_name in zoo.SHIPPED
    tokens = training_tokens or (zoo.TRAINING_TOKENS if shipped else paper.training_tokens)
    cfg = training_config(recipe)(d_k=subject.d_k, d_v=subject.d_v)
    flat = has_flat(paper) and any(each.name == "compare" for each in chosen)
    cfgs: list[TrainingSAEConfig] = [cfg, flat_config(cfg)] if flat else [cfg]
    site, batch = (
        "state" if recipe == "paper" else "write",
        schedule_of(paper, recipe)["train_batch_size_tokens"],
    )
    trained, memory = _training(subject, cfgs, site, batch, tokens)
    works = {e.name: _work(subject, e, cfg, recipe, 2 + flat) for e in chosen}
    head = "all heads" if paper.head is None else f"head {paper.head}"
    lines = [
        f"{name}: {paper.about}",
        f"base model {subject.name}: {subject.size.n_parameters / 1e6:,.1f} M parameters; cell layer "
        f"{paper.layer}, {head} of the paper, {subject.d_k} x {subject.d_v}",
        f"dictionary: {_features(cfg)}, {n_trained(cfg) / 1e6:,.2f} M parameters "
        f"(a flat SAE of as many features: {2 * cfg.d_sae * cfg.d_in / 1e6:,.0f} M)",
    ]
    return "\n".join(lines + _costs(subject, tokens, trained, memory, works))


def estimate_training(
    model: HookedRecurrent,
    cells: Sequence[Cell],
    cfgs: Sequence[TrainingSAEConfig],
    site: str,
    tokens: int,
    batch: int,
    context: int,
    options: Mapping[str, Any],
) -> str:
    """Sizes, memory and time of a training on some cells, as a few lines of text.

    The model's pass up to the last of the cells, and a step of each kind of SAE, are timed.

    Args:
        model: the model.
        cells: that are trained on from one forward pass.
        cfgs: the config of each cell's SAE.
        site: ``write`` or ``state``.
        tokens: inputs that each SAE is trained on.
        batch: inputs of a step.
        context: tokens of a passage.
        options: of SAELens's runner.
    """
    last = max(cells, key=lambda cell: cell.layer)
    subject = dataclasses.replace(
        _timed(model, str(model.cfg.model_name), [last]), n_cells=1, context=context
    )
    trained, memory = _training(subject, list(cfgs), site, batch, tokens, options)
    first: Any = cfgs[0]
    what = _features(first) if isinstance(first, WriteSAETrainingConfig) else f"{first.d_sae:,} atoms"
    lines = [
        f"model {subject.name}: {subject.size.n_parameters / 1e6:,.1f} M parameters; {len(cells)} "
        f"cell{'s' * (len(cells) > 1)}, up to layer {last.layer}",
        f"dictionary: {what}, {n_trained(first) / 1e6:,.2f} M parameters each",
    ]
    return "\n".join(lines + _costs(subject, tokens, trained, memory, {}))


def _published(paper: Paper, dtype: str, device: str) -> _Subject:
    """The paper's base model, by its published sizes."""
    base, size, of = releases.BASE_MODELS[paper.base], SIZES[paper.base], getattr(torch, dtype)
    speeds, width = Speeds.of(device, of), of.itemsize
    units = Units.of_size(size, paper.layer, speeds, width)
    n_cells = 1 if paper.head is not None else 16
    sides = base.d_k, base.d_v, n_cells
    return _Subject(
        base.name, size, width, None, paper.layer, *sides, CONTEXT, None, units, speeds, device, dtype
    )


def _loaded(paper: Paper, model_name: str, dtype: str, device: str) -> _Subject:
    """A model in the base model's place, timed."""
    model = HookedRecurrent.boot_transformers(model_name, device=device, dtype=dtype)
    subject = _timed(model, model_name, find_cells(model, model_name, paper))
    if model_name not in zoo.SHIPPED:
        return subject
    text = model.to_tokens(texts(model_name)[1], prepend_bos=False, truncate=False)
    return dataclasses.replace(subject, context=DEFAULT_CONTEXT, tokens_of_text=text.numel())


def _timed(model: HookedRecurrent, name: str, cells: list[Cell]) -> _Subject:
    device, of = str(model.cfg.device), next(model.original_model.parameters()).dtype
    cell, dtype = cells[0], str(of).removeprefix("torch.")
    units = Units.of_model(model, cell.layer)
    facts = Size.of(model), of.itemsize, cells, cell.layer, cell.d_k, cell.d_v, len(cells)
    return _Subject(name, *facts, CONTEXT, None, units, Speeds.of(device, of), device, dtype)


def _training(
    subject: _Subject,
    cfgs: list[TrainingSAEConfig],
    site: str,
    batch: int,
    tokens: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, float], int]:
    """Seconds of the model and of the SAEs, and bytes, of training SAEs of each config on every cell.

    SAEs of another config than the first are trained in a run of their own where the cells are the paper's.
    """
    runs = 1 if options is not None else len(cfgs)
    timed: dict[tuple[Any, ...], float] = {}
    steps = 0.0
    for cfg in cfgs:
        kind = (type(cfg), cfg.d_in, cfg.d_sae, getattr(cfg, "d_k", None))
        if kind not in timed:
            timed[kind] = step_seconds(cfg, batch, site, subject.device, subject.speeds)
        steps += timed[kind] * subject.n_cells
    parts = {"model": runs * tokens * subject.units.below, "SAEs": tokens / batch * steps}
    at_once = [cfgs] if options is not None else [[cfg] * subject.n_cells for cfg in cfgs]
    given = dict(options or {})
    memory = (training_bytes(subject.size, x, site, subject.context, subject.width, given) for x in at_once)
    return parts, max(memory)


def _work(
    subject: _Subject, experiment: Experiment, cfg: WriteSAETrainingConfig, recipe: Recipe, compared: int
) -> Work:
    """What `reproduce` runs of an experiment, on all cells of the configuration."""
    several = subject.n_cells > 1
    if several and experiment.name not in OF_ALL_HEADS:
        return Work()
    length, passages = experiment.context_size or subject.context, experiment.max_passages
    if subject.tokens_of_text is not None:
        passages = min(passages, subject.tokens_of_text // length)
    codes = cfg.decoder == "codes"
    text = Text(passages, length, cfg.d_sae, codes, compared if experiment.name == "compare" else 1)
    work = work_of(experiment, text, options_of(experiment, recipe))
    times = subject.n_cells if experiment.name != "splice" else 1
    return Work(*(times * count for count in work))


def _costs(
    subject: _Subject, tokens: int, training: dict[str, float], memory: int, works: dict[str, Work]
) -> list[str]:
    """The lines about tokens, memory and time."""
    every = Work().plus(*works.values())
    model = subject.size.n_parameters * subject.width
    parts = {"training": memory}
    text = f"training: {tokens:,} tokens"
    if works:
        rows = _COPIES * min(_LOGITS, _BRANCHES * subject.size.d_vocab) * 4
        parts["experiments"] = rows + _BRANCHES * subject.size.d_model * _WIDE * subject.width
        text += (
            f"; experiments: about {every.tokens:,.0f} tokens of forward passes, {every.unembedded:,.0f} "
            "positions with logits"
        )
    spent = {name: subject.units.seconds(work) for name, work in works.items()}
    if works:
        drawn = _figure_seconds()
        spent = {name: x + drawn * len(EXPERIMENTS[name].figures) for name, x in spent.items() if x}
    trained = sum(training.values())
    lines = [
        text,
        f"memory: at most {(model + max(parts.values())) / 2**30:,.2f} GiB: {model / 2**30:,.2f} the model, "
        + "beside it "
        + " or ".join(f"{x / 2**30:,.2f} in {name}" for name, x in parts.items()),
    ]
    whole = f"time: about {duration(trained + sum(spent.values()))} on {subject.where}: "
    whole += f"training {duration(trained)} of it, " if works else ""
    whole += f"{training['model'] / max(trained, 1e-9):.0%} of the training in the model's forward pass"
    if works:
        longest = sorted(spent, key=lambda name: -spent[name])
        each = ", ".join(f"{name} {duration(spent[name])}" for name in longest)
        whole += f", experiments {duration(sum(spent.values()))} ({each})"
    return [*lines, whole]


@functools.cache
def _figure_seconds() -> float:
    """Seconds of drawing a figure and saving it, as every experiment does with each of its own."""

    def draw() -> None:
        figure, axes = new_figure(10.0, 4.0, 2)
        for axis in axes:
            axis.plot(range(100))
        figure.savefig(io.BytesIO(), format="png", dpi=150)

    draw()  # the first one loads fonts
    return seconds(draw)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def _features(cfg: WriteSAETrainingConfig) -> str:
    if cfg.decoder != "codes":
        return f"{cfg.d_sae:,} rank-1 atoms, {cfg.k} active"
    return f"{cfg.n_key:,} key codes and {cfg.n_value:,} value codes, {cfg.k_key} and {cfg.k_value} active"
