"""A run of the paper: train its dictionaries, run every experiment, tabulate beside the paper's figures."""

from __future__ import annotations

import dataclasses
import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import load_dataset
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAEConfig
from safetensors import SafetensorError

from hooked_models import HookedRecurrent, zoo
from hooked_models.files.whole_files import replacing
from hooked_models.hooked_recurrent import Cell
from writesae_lens import baselines
from writesae_lens.experiments.catalogue import EXPERIMENTS, Experiment, find_experiment
from writesae_lens.experiments.options import Count, Seed, as_list, check
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.passages import DEFAULT_CONTEXT, as_passages
from writesae_lens.experiments.result import ExperimentResult, Progress, write_table
from writesae_lens.locks import locked
from writesae_lens.published import releases
from writesae_lens.reproduce.paper import Paper, config
from writesae_lens.saelens.runner import train_cells
from writesae_lens.saes.config import PAPER_SCHEDULE, RECOMMENDED_SCHEDULE, WriteSAETrainingConfig

TEXT = "Skylion007/openwebtext"
# Documents of that data set to read: four fifths to train on, the rest to test on.
N_DOCUMENTS = 6000
# What SAELens raises for files of an SAE that are missing, empty or cut short.
_NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
# Tokens of a passage, with the paper's base models and others that do not ship.
CONTEXT = 1024
# What is run on all heads of a layer: the paper has no other figure of them.
OF_ALL_HEADS = ("replace", "splice")
Recipe = Literal["recommended", "paper"]
VARIANTS = {
    "recommended": "This run: codes of writes, the formula with the network's own derivative and no fitted "
    "number, installs along the derivative. The paper: SAEs on states, the fitted gate product, installs "
    "along the unembedding. The sign test follows the unembedding in both.",
    "paper": "This run and the paper: SAEs on states, the fitted gate product, the unembedding's directions.",
}
NOTE = (
    "First what stand-ins recover at their own position, over the next {horizon} tokens (_later) and both "
    "together (_both), beside untrained stand-ins at the same firings (baselines); the paper has no such "
    "figures."
)
# Options of an experiment with every recipe: the paper tests a write's own position only.
OPTIONS: dict[str, dict[str, int]] = {"replace": {"horizon": 32, "max_firings": 1024}}
# Options with which an experiment is the paper's.
PAPER_OPTIONS: dict[str, dict[str, str]] = {
    "formula": {"form": "gate_product"},
    "install": {"direction": "unembedding"},
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration of the paper, ready to run; of several cells each has a folder in ``out``.

    Args:
        model_name: the base model's, or of the model in its place.
        training_text: documents to train on.
        test_text: text for the experiments.
    """

    paper: Paper
    model: HookedRecurrent
    model_name: str
    recipe: Recipe
    training_tokens: int
    cells: list[Cell]
    out: Path
    training_text: list[str]
    test_text: str
    seed: int

    @property
    def folders(self) -> list[Path]:
        """The folder of each cell."""
        if len(self.cells) == 1:
            return [self.out]
        return [self.out / f"L{cell.layer}H{cell.head}" for cell in self.cells]


@dataclasses.dataclass(frozen=True)
class Dictionaries:
    """Trained dictionaries of each cell: WriteSAEs, and flat SAEs for `compare` if the paper has those."""

    saes: list[SAE[Any]]
    flat: list[SAE[Any]]


def reproduce(
    name: str,
    out: str | Path,
    model_name: str | None = None,
    recipe: Recipe = "recommended",
    training_tokens: int | None = None,
    experiments: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> pd.DataFrame:
    """Train on a cell of the paper, run every experiment, and set the figures beside the paper's.

    Finished experiments in ``out`` are not run again: the same call goes on after an interruption.

    Args:
        name: of `CONFIGS`.
        out: folder for the SAE, a folder for each experiment, table.csv and table.md.
        model_name: another model in the base model's place; a shipped one brings its own text, and its
            default cell where it does not have the paper's. If its recurrence is of another kind, the table
            says so.
        recipe: ``paper`` trains on states with the paper's recipe and uses its formula and direction;
            ``recommended`` is this package's: codes of writes.
        training_tokens: (None: the paper's; on shipped models 350,000).
        experiments: names of experiments (None: all).
        device: cpu, cuda, ...
        dtype: of the model; in bfloat16 KLs below about 1e-4 are rounding.
        seed: of everything random.

    Returns:
        a table, a row for each figure: experiment, figure, cell, paper, ours, seconds (of the experiment).

    Raises:
        WriteSAEError: no such configuration or experiment, or a folder with another run in it or under way.
        HookedModelError: the model cannot be loaded.
    """
    paper = config(name)
    check(Recipe, recipe=recipe)
    check(Seed, seed=seed)
    check(Count | None, training_tokens=training_tokens)
    names = list(EXPERIMENTS) if experiments is None else as_list("experiments", experiments)
    chosen = [find_experiment(each) for each in names]
    source = model_name or releases.BASE_MODELS[paper.base].name
    tokens = training_tokens or (zoo.TRAINING_TOKENS if source in zoo.SHIPPED else paper.training_tokens)
    model = HookedRecurrent.boot_transformers(source, device=device, dtype=dtype)
    cells = find_cells(model, source, paper)
    settings = {"config": name, "model": source, "recipe": recipe, "training_tokens": tokens, "dtype": dtype}
    with locked(out):
        Progress(out, settings | {"seed": seed})  # refuses a folder with another run in it
        setup = Setup(paper, model, source, recipe, tokens, cells, Path(out), *texts(source), seed)
        table = test(setup, train(setup, with_flat=any(each.name == "compare" for each in chosen)), chosen)
        title = f"# {name}: {source}, recipe {recipe}, {dtype}"
        notes = [paper.about, *_other_recurrence(paper, source, cells[0]), VARIANTS[recipe]]
        if any(each.name == "replace" for each in chosen):
            notes.append(NOTE.format(**OPTIONS["replace"]))
        page = "\n\n".join([title, *notes, as_markdown(table)]) + "\n"
        with replacing(setup.out, ("table.csv",)) as beside:
            write_table(beside / "table.csv", table)
            (beside / "table.md").write_text(page, encoding="utf-8")
    return table


def _other_recurrence(paper: Paper, source: str, cell: Cell) -> list[str]:
    """What to say of a run on another kind of recurrence than the paper's, which also warns of it."""
    base = releases.BASE_MODELS[paper.base]
    if cell.architecture == base.architecture:
        return []
    note = (
        f"{source} has another recurrence ({cell.architecture}) than the paper's {base.name} "
        f"({base.architecture}): its figures are not of the same kind of memory as the paper's beside them."
    )
    warnings.warn(note, ResultWarning, stacklevel=3)
    return [note]


def training_config(recipe: Recipe) -> Callable[..., WriteSAETrainingConfig]:
    """What makes the configuration of a recipe for a cell."""
    return WriteSAETrainingConfig.paper if recipe == "paper" else WriteSAETrainingConfig.recommended


def find_cells(model: HookedRecurrent, model_name: str, paper: Paper) -> list[Cell]:
    """The paper's cell, or all of its layer; of a shipped model without it the default cell, or its layer."""
    layer, head = paper.layer, paper.head
    if model_name in zoo.SHIPPED and not any((c.layer, c.head) == (layer, head or 0) for c in model.cells):
        layer, best = zoo.DEFAULT_CELLS[model_name]
        head = None if head is None else best
    if head is not None:
        return [model.cell(layer, head)]
    model.cell(layer, 0)  # if there is no such layer, raises an error that lists the cells
    return [cell for cell in model.cells if cell.layer == layer]


def texts(model_name: str) -> tuple[list[str], str]:
    """Documents to train on, and text to test on."""
    if model_name in zoo.SHIPPED:
        return zoo.documents("train"), zoo.text("test")
    stream = load_dataset(TEXT, split="train", streaming=True)
    documents = [row["text"] for row in islice(stream, N_DOCUMENTS)]
    cut = len(documents) * 4 // 5
    return documents[:cut], "\n\n".join(documents[cut:])


def train(setup: Setup, with_flat: bool) -> Dictionaries:
    """Train the dictionaries that are not in their folders yet, and load all.

    Args:
        with_flat: also train a flat SAE for each cell, if the paper compares with one.
    """
    make = training_config(setup.recipe)
    device = str(setup.model.cfg.device)
    saes = _train_or_load(setup, "sae", lambda cell: make(d_k=cell.d_k, d_v=cell.d_v, device=device))
    if not with_flat or not has_flat(setup.paper):
        return Dictionaries(saes, [])
    cfg: Any = saes[0].cfg
    return Dictionaries(saes, _train_or_load(setup, "flat", lambda cell: flat_config(cfg, device)))


def has_flat(paper: Paper) -> bool:
    """Whether the paper compares with a flat SAE on the cell."""
    return ("compare", "flat_svd") in paper.figures


def flat_config(cfg: Any, device: str = "cpu") -> TopKTrainingSAEConfig:
    """SAELens's own SAE of as many features, as many of them active, as one with this config."""
    return TopKTrainingSAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, k=cfg.k, device=device)


def schedule_of(paper: Paper, recipe: Recipe) -> dict[str, Any]:
    """Learning rates, batch size and the like of a recipe."""
    own = {"train_batch_size_tokens": paper.batch, "lr_warm_up_steps": paper.warm_up}
    return PAPER_SCHEDULE | own if recipe == "paper" else RECOMMENDED_SCHEDULE


def options_of(experiment: Experiment, recipe: Recipe) -> dict[str, Any]:
    """The options with which an experiment is run, where they differ from its own defaults."""
    papers = PAPER_OPTIONS.get(experiment.name, {}) if recipe == "paper" else {}
    return OPTIONS.get(experiment.name, {}) | papers


def _train_or_load(setup: Setup, name: str, sae_of: Callable[[Cell], TrainingSAEConfig]) -> list[SAE[Any]]:
    folders = [folder / name for folder in setup.folders]
    shipped, device = setup.model_name in zoo.SHIPPED, str(setup.model.cfg.device)
    saes = [_load(folder, device) for folder in folders]
    if any(sae is None for sae in saes):
        train_cells(
            setup.model,
            setup.cells,
            folders,
            setup.training_tokens,
            sae_of,
            site="state" if setup.recipe == "paper" else "write",
            text=setup.training_text,
            schedule=schedule_of(setup.paper, setup.recipe),
            seed=setup.seed,
            model_name=setup.model_name,
            dataset_path=zoo.TEXT_NAME if shipped else TEXT,
            context_size=DEFAULT_CONTEXT if shipped else CONTEXT,
            prepend_bos=False,
        )
        saes = [SAE.load_from_disk(folder, device=device) for folder in folders]
    return [sae for sae in saes if sae is not None]


def _load(folder: Path, device: str) -> SAE[Any] | None:
    """The SAE in a folder, or None if there is none, or its files are empty or cut short.

    Raises:
        WriteSAEError: another run is writing to the folder.
    """
    if not folder.is_dir():
        return None
    with locked(folder):  # removes what a killed training left
        try:
            return SAE.load_from_disk(folder, device=device)
        except _NOT_WHOLE:
            return None


def test(setup: Setup, dictionaries: Dictionaries, experiments: Sequence[Experiment]) -> pd.DataFrame:
    """Run experiments on each cell, and tabulate their figures beside the paper's."""
    paper, several = setup.paper, len(setup.cells) > 1
    rows = []
    for number, (cell, folder) in enumerate(zip(setup.cells, setup.folders, strict=True)):
        for experiment in experiments:
            subject = _subject(setup, dictionaries, experiment, number)
            if subject is None:
                continue
            start = time.perf_counter()
            result = _run(setup, experiment, subject, dictionaries.saes[number], folder / experiment.name)
            seconds = time.perf_counter() - start
            head = "*" if several and experiment.name == "splice" else cell.head
            for figure, value in _figures(result, paper):
                papers = paper.figures.get((experiment.name, figure))
                rows.append((experiment.name, figure, f"{cell.layer}:{head}", papers, value, seconds))
    table = pd.DataFrame(rows, columns=["experiment", "figure", "cell", "paper", "ours", "seconds"])
    if not several:
        return table
    means = table.groupby(["experiment", "figure"], as_index=False, sort=False).agg(
        {"paper": "first", "ours": "mean", "seconds": "sum"}
    )
    return pd.concat([means.assign(cell="mean"), table], ignore_index=True)


def _subject(setup: Setup, dictionaries: Dictionaries, experiment: Experiment, number: int) -> Any:
    """What an experiment is run on at a cell: its SAE, several, or None if it is not run there."""
    saes, cell = dictionaries.saes, setup.cells[number]
    if len(saes) > 1 and experiment.name not in OF_ALL_HEADS:
        return None
    if experiment.name == "splice":  # of all heads at once
        return saes if number == 0 else None
    if experiment.name == "compare":
        subjects = {
            "writesae": saes[number],
            "principal_component": baselines.principal_component(
                setup.model, cell.layer, cell.head, "\n\n".join(setup.training_text[:100])
            ),
        }
        if dictionaries.flat:
            subjects["flat_svd"] = baselines.flat_svd(dictionaries.flat[number], cell.d_k, cell.d_v)
        return subjects
    takes_several = "saes" in inspect.signature(experiment.function).parameters
    return [saes[number]] if takes_several else saes[number]


def _run(setup: Setup, experiment: Experiment, subject: Any, sae: SAE[Any], folder: Path) -> ExperimentResult:
    """One experiment, on as many passages and as long ones as its command reads."""
    size = experiment.context_size or sae.cfg.metadata.context_size
    text = None if setup.model_name in zoo.SHIPPED else f"{TEXT}, documents that were not trained on"
    passages = as_passages(setup.model, setup.test_text, size, name=text)[-experiment.max_passages :]
    options = options_of(experiment, setup.recipe)
    progress = str(folder / "progress")
    result = experiment.function(
        setup.model, subject, passages, seed=setup.seed, progress_folder=progress, **options
    )
    result.save(folder)
    return result


def _figures(result: ExperimentResult, paper: Paper) -> list[tuple[str, Any]]:
    """The figures of a result that the table shows: its figures of merit, and the paper's."""
    if result.name == "compare":
        rows = result.summary["table"]
        return [(row["name"], row["win_rate"]) for row in rows if row["win_rate"] is not None]
    papers = [figure for name, figure in paper.figures if name == result.name]
    return list(result.figures_of_merit(papers).items())


def as_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown: figures to four digits, empty cells where the paper has none."""

    def cell(x: Any) -> str:
        if isinstance(x, str):
            return " ".join(x.replace("\\", "\\\\").replace("|", "\\|").splitlines())
        return "" if x is None or pd.isna(x) else f"{x:,.4g}"

    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(x) for x in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
