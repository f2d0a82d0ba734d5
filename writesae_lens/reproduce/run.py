"""The paper's runs by name: train, every experiment, and a table with the paper's figures beside ours."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import Dataset, load_dataset
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    TopKTrainingSAEConfig,
)

from hooked_models import HookedGatedDeltaNet, HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens import baselines
from writesae_lens.experiments.catalogue import EXPERIMENTS as COMMANDS
from writesae_lens.demo import DEFAULT_CELLS
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import ExperimentResult
from writesae_lens.experiments.options import Count, Natural, as_list, check
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import Progress, write_whole
from writesae_lens.published import releases
from writesae_lens.saelens.history import record_training
from writesae_lens.saelens.runner import SHIPPED_TEXT, Runner, config_of_several, shipped_text
from writesae_lens.saes.config import PAPER_SCHEDULE, WriteSAETrainingConfig

TEXT = "Skylion007/openwebtext"
N_ATOMS = 2048
# Documents of a hub dataset to read: four fifths to train on, the rest to test on.
N_DOCUMENTS = 6000
# What `estimate` reckons with: dense products on one H100 at a third of its peak, by bytes of a number.
FLOPS = {4: 2e13, 2: 3e14}


@dataclasses.dataclass(frozen=True)
class Paper:
    """One run of the paper.

    Args:
        base: of `releases.BASE_MODELS`.
        layer, head: the cell; no head is all of the layer's.
        n_parameters: of the base model, for estimates.
        about: what the paper found there.
        figures: (experiment, path in its summary) to the paper's figure.
        training_tokens: 5,000 sequences of 1,024 tokens, four fifths of them, and the paper's epochs.
        batch, warm_up: inputs a step, and steps of the rising learning rate.
        decay: whether the base model decays at all; a stand-in for one that does not has its decay stopped.
    """

    base: str
    layer: int
    head: int | None
    n_parameters: float
    about: str
    figures: dict[tuple[str, str], float]
    training_tokens: int = 4000 * 1024 * 20
    batch: int = 256
    warm_up: int = 50
    decay: bool = True


WIN, CHAIN = ("replace", "win_rate"), ("replace", "strict_chain_rate")
CONFIGS = {
    "qwen3.5-0.8b-L1H4": Paper(
        "qwen0p8b", 1, 4, 0.8e9, "An early layer: the atom wins most often here.",
        {WIN: 0.939, ("replace", "median_kl_atom"): 2.07, ("replace", "median_kl_delete"): 2.82},
    ),
    "qwen3.5-0.8b-L9H4": Paper(
        "qwen0p8b", 9, 4, 0.8e9, "The paper's main cell: every experiment has its figure here.",
        {
            WIN: 0.912,
            CHAIN: 0.895,
            ("replace", "median_kl_atom"): 0.40,
            ("replace", "median_kl_delete"): 1.09,
            ("replace", "cliffs_delta"): 0.825,
            ("population", "mean_win_rate"): 0.898,
            ("population", "win_rate_register"): 0.9136,
            ("population", "win_rate_bundle"): 0.8898,
            ("partition", "n_register"): 222,
            ("partition", "n_bundle"): 94,
            ("partition", "n_dead"): 1732,
            ("partition", "delta_bic"): -296,
            ("partition", "register_median_cosine"): 0.262,
            ("formula", "median_r2"): 0.983,
            ("erase", "median_delta_logp_firing"): -0.116,
            ("sign", "agreement"): 0.846,
            ("sign", "pearson"): 0.162,
            ("install", "by_stratum.rank_100_1000.target_in_continuation"): 1.0,
            ("install", "by_stratum.rank_100_1000.native_target_in_continuation"): 0.333,
            ("install", "target_in_continuation"): 0.25,
            ("install", "native_target_in_continuation"): 0.083,
            ("splice", "increase_percent"): 0.58,
            ("compare", "writesae"): 0.9125,
            ("compare", "flat_svd"): 0.9136,
        },
    ),
    "qwen3.5-0.8b-L17H4": Paper(
        "qwen0p8b", 17, 4, 0.8e9, "A late layer.",
        {WIN: 0.923, ("replace", "median_kl_atom"): 1.82, ("replace", "median_kl_delete"): 2.58},
    ),
    "qwen3.5-0.8b-L9-all": Paper(
        "qwen0p8b", 9, None, 0.8e9, "All heads of layer 9 (the paper: 15, sd 2.6 points); means over heads.",
        {WIN: 0.8929, ("splice", "increase_percent"): 0.76},
    ),
    "qwen3.5-4b-L12H8": Paper(
        "qwen4b", 12, 8, 4e9, "The paper fails here: replacement at chance, the formula worse than a mean.",
        {
            WIN: 0.48,
            ("formula", "median_r2"): -0.05,
            ("partition", "register_median_cosine"): 0.152,
            ("amplify", "by_condition.native.newlines_per_400"): 16.8,
            ("amplify", "by_condition.5x.newlines_per_400"): 11.2,
            ("amplify", "by_condition.random.newlines_per_400"): 19.0,
        },
    ),
    "qwen3.5-27b-L32H16": Paper(
        "qwen27b", 32, 16, 27e9, "The largest model; the paper reports its partition alone.",
        {("partition", "register_median_cosine"): 0.085},
    ),
    "mamba2-370m-L24H0": Paper(
        "mamba2-370m", 24, 0, 0.37e9, "Replacement works in the paper, formula and install do not.",
        {
            WIN: 0.8808,
            ("replace", "median_kl_atom"): 0.97,
            ("replace", "median_kl_delete"): 1.62,
            ("formula", "median_r2"): -0.07,
            ("partition", "register_median_cosine"): 0.0575,
            ("compare", "writesae"): 0.8285,
            ("compare", "flat_svd"): 0.763,
        },
        training_tokens=4000 * 1024 * 50,
        batch=128,
        warm_up=100,
    ),
    "rwkv7-1.5b-L12H0": Paper(
        "rwkv7-1.5b", 12, 0, 1.5e9, "The paper's atoms do no better than deletion here.",
        {
            WIN: 0.453,
            ("partition", "register_median_cosine"): 0.18,
            ("compare", "writesae"): 0.453,
            ("compare", "flat_svd"): 0.478,
        },
    ),
    "deltanet-1.3b-L12H8": Paper(
        "deltanet-1.3b", 12, 8, 1.3e9, "No decay: at chance in the paper, though atoms align best here.",
        {WIN: 0.483, CHAIN: 0.177, ("partition", "register_median_cosine"): 0.997},
        decay=False,
    ),
    "gla-1.3b-L12H0": Paper(
        "gla-1.3b", 12, 0, 1.3e9, "Gated linear attention: decay by key channel, no erase.",
        {("partition", "register_median_cosine"): 0.11},
    ),
}  # fmt: skip
Recipe = Literal["default", "paper"]
VARIANTS = {
    "default": "Ours: SAEs on writes, formula without a fitted number, directions by the derivative; the "
    "paper's figures are of SAEs on states, the fitted gate product and the unembedding's directions.",
    "paper": "Both: SAEs on states, the fitted gate product, the unembedding's directions.",
}
# What the table shows of each experiment beside the paper's figures.
MAIN: dict[str, tuple[str, ...]] = {
    "replace": ("win_rate", "strict_chain_rate", "median_kl_atom", "median_kl_delete", "median_cosine"),
    "population": ("mean_win_rate", "n_atoms"),
    "partition": ("n_register", "n_bundle", "n_dead", "delta_bic", "register_median_cosine"),
    "formula": ("median_r2", "median_r2_by_eps.0.1", "median_r2_by_eps.1"),
    "erase": ("median_delta_logp_firing", "median_delta_logp_elsewhere", "median_delta_logp_random"),
    "sign": ("agreement", "pearson"),
    "install": ("target_in_continuation", "native_target_in_continuation", "mean_lift", "mean_control_lift"),
    "splice": ("increase_percent", "increase_percent_deleted"),
    "amplify": ("by_condition.native.newlines_per_400", "by_condition.10x.newlines_per_400"),
    "selectivity": ("own_overlap_atom", "other_overlap_atom"),
    "trace": ("ratio_to_random",),
    "contexts": ("n_atoms_active", "token_purity"),
}


def reproduce(
    name: str,
    out: str | Path,
    model_name: str | None = None,
    recipe: Recipe = "default",
    training_tokens: int | None = None,
    experiments: tuple[str, ...] = tuple(COMMANDS),
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> pd.DataFrame:
    """Train on a cell of the paper, run every experiment, and set the figures beside the paper's.

    Finished experiments in ``out`` are kept: the same call goes on after an interruption.

    Args:
        name: of `CONFIGS`.
        out: folder for the SAE, a folder an experiment, table.csv and table.md.
        model_name: another model in the base model's place; a shipped one brings its own text, and its
            default cell where it has not the paper's.
        recipe: ``paper`` trains on states with the paper's recipe and uses its formula and direction;
            ``default`` is this package's.
        training_tokens: (None: the paper's; on shipped models 600,000).
        experiments: commands of ``writesae-lens``.
        device: cpu, cuda, ...
        dtype: of the model; in bfloat16 KLs below some 1e-4 are rounding.
        seed: of everything random.

    Returns:
        a table, a row a figure: experiment, figure, cell, paper, ours, seconds (of the experiment).

    Raises:
        WriteSAEError: no such configuration or experiment, or a folder with another run in it.
        HookedModelError: the model cannot be loaded.
    """
    paper, out = config(name), Path(out)
    check(Recipe, recipe=recipe)
    check(Natural, seed=seed)
    check(Count | None, training_tokens=training_tokens)
    unknown = set(as_list("experiments", experiments)) - set(COMMANDS)
    if unknown:
        raise WriteSAEError(f"no experiment {', '.join(sorted(unknown))}: there are {', '.join(COMMANDS)}")
    source = model_name or releases.BASE_MODELS[paper.base].name
    tokens = training_tokens or (600_000 if source in zoo.SHIPPED else paper.training_tokens)
    run = {"config": name, "model": source, "recipe": recipe, "training_tokens": tokens, "dtype": dtype}
    model = HookedRecurrent.boot_transformers(source, device=device, dtype=dtype)
    if model_name is not None and not paper.decay:
        for mixer in model.mixers.values():
            if not isinstance(mixer, HookedGatedDeltaNet):
                raise WriteSAEError(
                    f"{name} has no decay: only a Gated DeltaNet, as tiny-gdn is, can stand in"
                )
            mixer.stop_decay()
    cells = find_cells(model, source, paper)
    Progress(out, run | {"seed": seed})  # refuses a folder with another run in it
    train_text, test_text = texts(source)
    dataset = Dataset.from_dict({"text": train_text})
    many = len(cells) > 1
    folders = [out / f"L{cell.layer}H{cell.head}" if many else out for cell in cells]

    def train(sae_of: Callable[[Cell], Any], kind: str, sub: str) -> list[SAE[Any]]:
        where = [folder / sub for folder in folders]
        if not all((folder / "cfg.json").exists() for folder in where):
            _train(model, source, dict(zip(cells, where, strict=True)), sae_of, kind, paper, recipe, tokens,
                   dataset, device, seed)  # fmt: skip
        return [SAE.load_from_disk(folder, device=device) for folder in where]

    make = WriteSAETrainingConfig.paper if recipe == "paper" else WriteSAETrainingConfig
    own: dict[str, Any] = {} if recipe == "paper" else {"d_sae": N_ATOMS, "k": 4}
    site = "state" if recipe == "paper" else "write"
    saes = train(lambda c: make(d_k=c.d_k, d_v=c.d_v, device=device, **own), site, "sae")
    flat = []
    if "compare" in experiments and ("compare", "flat_svd") in paper.figures:
        k = saes[0].cfg.k
        flat = train(
            lambda c: TopKTrainingSAEConfig(d_in=c.d_k * c.d_v, d_sae=N_ATOMS, k=k, device=device),
            site,
            "flat",
        )
    rows = []
    for number, (cell, sae, folder) in enumerate(zip(cells, saes, folders, strict=True)):
        for experiment in experiments:
            if many and (experiment not in ("replace", "splice") or (experiment == "splice" and number)):
                continue
            subject: Any = sae
            if experiment == "splice":
                subject = saes
            elif experiment == "compare":
                pc = baselines.principal_component(
                    model, cell.layer, cell.head, "\n\n".join(train_text[:100])
                )
                subject = {"writesae": sae, "principal_component": pc}
                if flat:
                    subject["flat_svd"] = baselines.flat_svd(flat[number], cell.d_k, cell.d_v)
            start = time.perf_counter()
            result = _run(experiment, model, subject, sae, test_text, recipe, folder / experiment, seed)
            seconds = time.perf_counter() - start
            at = f"{cell.layer}:{'*' if many and experiment == 'splice' else cell.head}"
            for figure, value in _figures(experiment, result.summary, paper):
                rows.append((experiment, figure, at, paper.figures.get((experiment, figure)), value, seconds))
    table = pd.DataFrame(rows, columns=["experiment", "figure", "cell", "paper", "ours", "seconds"])
    if many:
        means = table.groupby(["experiment", "figure"], as_index=False, sort=False).agg(
            {"paper": "first", "ours": "mean", "seconds": "sum"}
        )
        table = pd.concat([means.assign(cell="mean"), table], ignore_index=True)
    write_whole(out / "table.csv", lambda path: table.to_csv(path, index=False))
    head = f"# {name}: {source}, recipe {recipe}"
    text = "\n\n".join([head, paper.about, VARIANTS[recipe], as_markdown(table)]) + "\n"
    write_whole(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """The table for people: figures to four digits, nothing where there is none."""

    def cell(x: Any) -> str:
        if isinstance(x, str):
            return x
        return "" if x is None or pd.isna(x) else f"{x:,.4g}"

    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(x) for x in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def config(name: str) -> Paper:
    """A configuration by name.

    Raises:
        WriteSAEError: there is none; the message lists those that there are.
    """
    if name not in CONFIGS:
        raise WriteSAEError(f"no configuration {name!r}: there are {', '.join(CONFIGS)}")
    return CONFIGS[name]


def estimate(
    name: str, model_name: str | None = None, training_tokens: int | None = None, dtype: str = "float32"
) -> str:
    """Sizes, memory and time of a run, without loading the base model.

    The time is arithmetic: two operations a parameter and token forwards, for training and for what the
    experiments run, on one H100 at a third of its peak for the dtype; elsewhere it scales with the machine.
    """
    paper = config(name)
    check(Literal["float32", "bfloat16", "float16"], dtype=dtype)
    check(Count | None, training_tokens=training_tokens)
    base = releases.BASE_MODELS[paper.base]
    d_k, d_v, n_parameters, width = base.d_k, base.d_v, paper.n_parameters, 4 if dtype == "float32" else 2
    source, flops, machine = base.name, FLOPS[width], f"an H100 in {dtype}"
    tokens = training_tokens or paper.training_tokens
    n_cells = 1 if paper.head is not None else 16
    if model_name is not None and model_name not in zoo.SHIPPED:
        raise WriteSAEError(
            f"the estimate knows the base model and what ships ({', '.join(zoo.SHIPPED)}), not {model_name!r}"
        )
    if model_name is not None:  # small enough to look at
        model = HookedRecurrent.boot_transformers(model_name, device="cpu")
        cells = find_cells(model, model_name, paper)
        cell, n_cells = cells[0], len(cells)
        d_k, d_v, source, flops, machine = cell.d_k, cell.d_v, model_name, 2e10, "two CPU cores"
        n_parameters, width = sum(p.numel() for p in model.original_model.parameters()), 4
        tokens = training_tokens or 600_000
    d_sae = N_ATOMS
    n_sae = 2 * d_sae * (d_k + d_v) + d_sae
    step = 6 * d_sae * (d_k + d_v) * tokens * n_cells
    tested = sum(command.max_passages for command in COMMANDS.values()) * 256 * 12
    forward = 2 * n_parameters * (tokens + tested)
    gib = (n_parameters * width + 16 * n_sae * n_cells) / 2**30
    return (
        f"{name}: {paper.about}\n"
        f"base model {source}: {n_parameters / 1e6:,.1f} M parameters; cell layer {paper.layer}, "
        f"{'all heads' if paper.head is None else f'head {paper.head}'} of the paper, {d_k} x {d_v}\n"
        f"dictionary: {d_sae:,} rank-1 atoms, {n_sae / 1e6:,.2f} M parameters "
        f"(a flat one: {2 * d_sae * d_k * d_v / 1e6:,.0f} M)\n"
        f"training: {tokens:,} tokens; experiments: about {tested:,} tokens of forward passes\n"
        f"memory: {gib:,.2f} GiB for parameters and optimiser, and activations beside them\n"
        f"time: about {(forward + step) / flops / 60:,.1f} minutes on {machine} "
        f"({(forward + step) / 1e15:,.2f} PFLOP)"
    )


def find_cells(model: HookedRecurrent, source: str, paper: Paper) -> list[Cell]:
    """The paper's cell or cells; on a shipped model without them, its default cell or that layer's."""
    layer, head = paper.layer, paper.head
    if source in zoo.SHIPPED and not any((c.layer, c.head) == (layer, head or 0) for c in model.cells):
        layer, own = DEFAULT_CELLS[source]
        head = None if head is None else own
    if head is not None:
        return [model.cell(layer, head)]
    model.cell(layer, 0)  # an error that lists the cells, if there is no such layer
    return [cell for cell in model.cells if cell.layer == layer]


def texts(source: str) -> tuple[list[str], str]:
    """Documents to train on, and text to test on."""
    if source in zoo.SHIPPED:
        train, test = shipped_text()
        return train, "\n\n".join(test)
    stream = load_dataset(TEXT, split="train", streaming=True)
    documents = [row["text"] for row in islice(stream, N_DOCUMENTS)]
    cut = len(documents) * 4 // 5
    return documents[:cut], "\n\n".join(documents[cut:])


def _train(
    model: HookedRecurrent,
    source: str,
    folders: dict[Cell, Path],
    sae_of: Callable[[Cell], Any],
    site: str,
    paper: Paper,
    recipe: Recipe,
    tokens: int,
    dataset: Dataset,
    device: str,
    seed: int,
) -> None:
    """SAEs for the cells, from one forward pass, each into its folder."""
    name_of = model.state_hook_name if site == "state" else model.write_hook_name
    hooks = {cell: name_of(cell.layer, cell.head) for cell in folders}
    saes = {cell: sae_of(cell) for cell in folders}
    first = next(iter(folders))
    schedule: dict[str, Any] = {
        "lr": 4e-3,
        "lr_warm_up_steps": 50,
        "lr_decay_steps": tokens // 1024,
        "dead_feature_window": 100,
        "train_batch_size_tokens": 512,
    }
    if recipe == "paper":
        schedule = PAPER_SCHEDULE | {
            "train_batch_size_tokens": paper.batch,
            "lr_warm_up_steps": paper.warm_up,
        }
    cfg = LanguageModelSAERunnerConfig(
        sae=saes[first],
        model_class_name="HookedRecurrent",
        model_name=source,
        hook_name=hooks[first],
        dataset_path=SHIPPED_TEXT if source in zoo.SHIPPED else TEXT,
        context_size=256 if source in zoo.SHIPPED else 1024,
        prepend_bos=False,
        training_tokens=tokens,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        device=device,
        seed=seed,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(folders[first]),
        logger=LoggingConfig(log_to_wandb=False),
        **schedule,
    )
    given: dict[str, Any] = {"override_model": model, "override_dataset": dataset}
    if len(folders) == 1:
        runner = Runner(cfg, **given)
        record_training(runner)
        runner.run()
        return
    # SAELens's runner of several writes them into one folder, by name.
    cfg.output_path = str(folders[first].parents[1])
    names = {cell: str(folder.relative_to(cfg.output_path)) for cell, folder in folders.items()}
    of = [{names[cell]: x for cell, x in each.items()} for each in (saes, hooks)]
    several = MultiSAETrainingRunner(config_of_several(cfg, *of), **given)
    record_training(several)
    several.run()


def _run(
    experiment: str,
    model: HookedRecurrent,
    subject: Any,
    sae: SAE[Any],
    text: str,
    recipe: Recipe,
    folder: Path,
    seed: int,
) -> ExperimentResult:
    """One experiment with the defaults of its command."""
    command = COMMANDS[experiment]
    size = command.context_size or sae.cfg.metadata.context_size
    passages = as_passages(model, text, size)[-command.max_passages :]
    options: dict[str, Any] = {}
    if recipe == "paper":
        options |= {"form": "gate_product"} if experiment == "formula" else {}
        options |= {"direction": "unembedding"} if experiment in ("sign", "install") else {}
    progress = str(folder / "progress")
    result = command.function(model, subject, passages, seed=seed, progress_folder=progress, **options)
    result.save(folder)
    return result


def _figures(experiment: str, summary: dict[str, Any], paper: Paper) -> list[tuple[str, Any]]:
    """The figures of an experiment that the table shows: the paper's, then what else matters."""
    if experiment == "compare":
        return [(row["name"], row["win_rate"]) for row in summary["table"] if row["win_rate"] is not None]
    names = [figure for of, figure in paper.figures if of == experiment]
    return [(n, _at(summary, n)) for n in dict.fromkeys([*names, *MAIN[experiment]])]


def _at(summary: Any, path: str) -> Any:
    """What a summary holds at a path of names with dots between; names such as "0.1" have some themselves."""
    if not isinstance(summary, dict) or path in summary:
        return summary.get(path) if isinstance(summary, dict) else None
    name, _, rest = path.partition(".")
    return _at(summary.get(name), rest) if rest else None
