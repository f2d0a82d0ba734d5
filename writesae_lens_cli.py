"""The command line ``writesae-lens``: every command with its options and help lines, and nothing heavy.

This module lies outside the package `writesae_lens`, because importing that package imports SAELens and
torch, which takes seconds: ``--help``, ``--version`` and mistyped commands are answered without them. A
command that runs imports its body from `writesae_lens.cli`. The experiments are not listed here: each is
declared once, beside its function in writesae_lens/experiments, and `experiment_questions` reads the
declarations.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from hooked_models.errors import HookedModelError, one_line, printable

START = "Start here"
SHARE = "Train, download and publish SAEs"
TEST = "Experiments on an SAE: writesae-lens COMMAND --sae SAE"
REPORT = "All results of an SAE, all results of the paper"
PANELS = (START, SHARE, TEST, REPORT)  # the groups of commands in --help, in this order

Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random choices.")]
Device = Annotated[str, typer.Option(help="Device of model and SAE: cpu, cuda, cuda:1, ...")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the sizes, memory and time that it would take; train nothing."),
]
SAE_REFERENCE = "An SAE: a folder that SAELens wrote, a published best.pt, or RELEASE:ID from the Hub."

# typer brings its own copy of click or uses the installed one: this is the common base of its usage errors.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def experiment_questions() -> dict[str, tuple[str, bool]]:
    """The question of every declared experiment by name, and whether it is about a whole model.

    First those on SAEs in the order of the paper, then those about models. They are read from the source,
    where ``@experiment("name", question="...", paper=...)`` stands above each function, unless the catalogue
    is imported already.
    """
    catalogue: Any = sys.modules.get("writesae_lens.experiments.catalogue")
    if catalogue is not None:
        every = catalogue.EXPERIMENTS | catalogue.OF_MODELS
        return {name: (experiment.question, experiment.of_model) for name, experiment in every.items()}
    package = importlib.util.find_spec("writesae_lens")  # finds a top-level package without importing it
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0], "experiments")
    declared = sorted(declaration for path in folder.glob("*.py") for declaration in _declarations(path))
    return {name: (question, of_model) for of_model, _, _, name, question in declared}


def _declarations(path: Path) -> Iterator[tuple[bool, bool, int, str, str]]:
    """Experiments that a module declares: of a model, not in the paper, number there, name, question."""
    try:
        statements = ast.parse(path.read_bytes(), filename=str(path)).body
    except SyntaxError as error:
        raise HookedModelError(f"{path}, line {error.lineno}: not valid Python ({error.msg})") from error
    for statement in statements:
        for decorator in getattr(statement, "decorator_list", ()):
            if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("experiment"):
                continue
            literals = {keyword.arg: keyword.value for keyword in decorator.keywords}
            literals |= {"name": decorator.args[0]} if decorator.args else {}
            name, question, paper, of_model = (
                node.value if isinstance(node := literals.get(key), ast.Constant) else None
                for key in ("name", "question", "paper", "of_model")
            )
            if isinstance(name, str):
                number = paper if isinstance(paper, int) else 0
                yield bool(of_model), paper is None, number, name, str(question or "")


class Commands(TyperGroup):
    """The commands of this module, and one for every declared experiment."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._questions = experiment_questions()
        for name, (question, of_model) in self._questions.items():
            if name in self.commands:
                raise HookedModelError(f"the experiment {name!r} has the name of a command: give it another")
            panel = START if of_model else TEST
            self.add_command(TyperCommand(name, help=question, rich_help_panel=panel))
        in_order = sorted(self.commands.items(), key=lambda item: PANELS.index(item[1].rich_help_panel))  # type: ignore[attr-defined]
        self.commands = dict(in_order)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to run: of an experiment, the one with the options of its function."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in self._questions:
            from writesae_lens.cli.experiments import command_of

            command = command_of(name)
        return name, command, rest


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Sparse autoencoders on the cache writes of recurrent language models.

    For a first look: writesae-lens demo. Then train an SAE, run experiments on it, and write its report.
    An SAE is named by a folder that SAELens wrote, a published best.pt, or RELEASE:ID from the Hub.""",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"writesae-lens {version('writesae-lens')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=START)
def demo(
    model: Annotated[str, typer.Option(help="One of the shipped models.")] = "tiny-gdn",
    out: Annotated[Path, typer.Option(help="Folder for the SAE, records, figures and report.")] = Path(
        "writesae-demo"
    ),
    cell: Annotated[
        str | None,
        typer.Option(
            help="Cell to train on, LAYER:HEAD; default: 1:1, 2:7 or 3:3, by model.", show_default=False
        ),
    ] = None,
    d_sae: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of codes, half of them for keys; default: the recommended recipe's.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Codes active on each write, half of them for keys; default: the recommended recipe's.",
            show_default=False,
        ),
    ] = None,
    training_tokens: Annotated[int, typer.Option(min=10_000, help="Number of writes to train on.")] = 350_000,
    seed: Seed = 0,
) -> None:
    """Train a WriteSAE on a shipped model, run the replacement test on it, write a report."""
    from writesae_lens.cli.runs import run_demo

    run_demo(model, out, cell, d_sae, k, training_tokens, seed)


@app.command(rich_help_panel=START)
def models(
    model: Annotated[
        str | None, typer.Option(help="List the cells of this model.", show_default=False)
    ] = None,
) -> None:
    """List the shipped models and the pretrained SAEs, or the cells of a model and their hook names."""
    from writesae_lens.cli import sharing

    if model is None:
        sharing.list_models()
    else:
        sharing.list_cells(model)


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=SHARE)
def train(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any flag of SAELens's runner: --model_name, --dataset_path, --d_sae, --k, --lr, "
            "--training_tokens, --output_path, --log_to_wandb, ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(
            help="Cells to train on, LAYER:HEAD with * for all and commas between, such as 1:*; in place of "
            "--hook_name.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Literal["write", "state"], typer.Option(help="With --cells: train on the writes or on the states.")
    ] = "write",
    win_rate: Annotated[
        int,
        typer.Option(
            min=0, help="Passages of a quick replacement test at every W&B evaluation; 0: no such test."
        ),
    ] = 0,
    wandb_run_per_cell: Annotated[
        bool,
        typer.Option(
            "--wandb-run-per-cell",
            help="With --log_to_wandb true: also log each cell as a W&B run of its own.",
        ),
    ] = False,
    dry_run: DryRun = False,
    saelens_help: Annotated[bool, typer.Option("--saelens-help", help="List SAELens's flags.")] = False,
) -> None:
    """Train WriteSAEs with SAELens's runner; several cells train from one forward pass.

    For example: writesae-lens train --model_name tiny-gdn --cells "1:*" --training_tokens 200000
    --output_path my_saes. Flags that are not given have the values of the recommended recipe.
    """
    if not saelens_flags and cells is None and not saelens_help:
        raise HookedModelError(
            "nothing to train: give --model_name and --cells, see writesae-lens train --help"
        )
    from writesae_lens.cli.training import estimate_run, run_training

    arguments = ["--help"] if saelens_help else saelens_flags or []
    if dry_run and not saelens_help:
        typer.echo(estimate_run(arguments, cells, site))
        return
    for folder in run_training(arguments, cells, site, win_rate, wandb_run_per_cell):
        typer.echo(f"trained: {folder}")


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=SHARE)
def sweep(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Flags of train: --model_name, --training_tokens, --context_size, --dataset_path, --d_sae, "
            "--device, --seed, ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str, typer.Option(help="Cells, LAYER:HEAD with * for all and commas between, such as 1,3:*.")
    ] = "*:*",
    site: Annotated[
        Literal["write", "state"], typer.Option(help="Train on the writes or on the states.")
    ] = "write",
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text; its last tenth is for the tests, and all of it if --dataset_path names a text "
            "to train on; default: the shipped text.",
            show_default=False,
        ),
    ] = None,
    experiments: Annotated[
        str, typer.Option(help="Experiments to run on each cell, commas between; none: '-'.")
    ] = "replace",
    max_passages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passages that each experiment reads, at most; default: as its own command.",
            show_default=False,
        ),
    ] = None,
    reports: Annotated[bool, typer.Option("--reports", help="Also write each cell's report page.")] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="This machine, or Ray: the cluster of RAY_ADDRESS, else one started for the sweep."
        ),
    ] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with a model of its own; with cuda one a GPU.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of a worker; default: the cores over the workers.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="GiB of a worker for model and training; default: what is free.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder, or an address of fsspec such as s3://bucket/sweep.")
    ] = "writesae-sweep",
    dry_run: DryRun = False,
) -> None:
    """Train an SAE on every cell of a model, run experiments on each, and write one table.

    For example: writesae-lens sweep --model_name tiny-gdn --workers 2 --out my_sweep. The same command goes
    on where a stopped run was, and tries again what failed. Then writesae-lens report --sae my_sweep makes
    one page of it.
    """
    from writesae_lens.cli.sweeping import run_sweep

    run_sweep(
        saelens_flags or [],
        cells=cells,
        site=site,
        text=text,
        experiments=[] if experiments == "-" else experiments.split(","),
        max_passages=max_passages,
        reports=reports,
        engine=engine,
        workers=workers,
        threads=threads,
        memory=memory,
        out=out,
        dry_run=dry_run,
    )


@app.command(rich_help_panel=SHARE)
def pull(
    release: Annotated[
        str, typer.Argument(help="A release that `models` lists, or a repository, OWNER/NAME.")
    ],
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="SAEs of it; default: all of a release.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit; default: the published one.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what the cache has.")] = False,
) -> None:
    """Download published SAEs into the cache, check their files, and print what they are."""
    from writesae_lens.cli import sharing

    sharing.pull(release, ids, revision, force)


@app.command(rich_help_panel=SHARE)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published best.pt, or the folder that it is in.")],
    out: Annotated[Path, typer.Argument(help="Folder for cfg.json and sae_weights.safetensors.")],
    model: Annotated[
        str | None, typer.Option(help="Base model, if the path does not name it.", show_default=False)
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer, if the checkpoint does not name it.", show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, help="Head, if the checkpoint does not name it.", show_default=False)
    ] = None,
) -> None:
    """Save a published checkpoint in SAELens's format: safetensors and cfg.json."""
    from writesae_lens.cli import sharing

    sharing.convert(checkpoint, out, model, layer, head)


@app.command(rich_help_panel=SHARE)
def push(
    sae: Annotated[str, typer.Argument(help=SAE_REFERENCE)],
    repository: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; it is created if it does not exist.")
    ],
    sae_id: Annotated[
        str | None,
        typer.Option("--id", help="Folder in the repository; default: the SAE's cell.", show_default=False),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of its replacement test, for the model card.", show_default=False),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch to publish on.")] = "main",
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is created: make it private.")
    ] = False,
) -> None:
    """Publish an SAE on the Hugging Face Hub, with a model card."""
    from writesae_lens.cli import sharing

    sharing.push(sae, repository, sae_id, results, revision, private)


@app.command(rich_help_panel=REPORT)
def report(
    context: typer.Context,
    sae: Annotated[str, typer.Option(help=f"{SAE_REFERENCE} Or the folder of a sweep.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a saved result, or of several; may be given more than once.", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to read; default: the test part of the shipped text.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the model that the SAE names.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page; default of a sweep: its own.")] = Path(
        "writesae-report"
    ),
    max_passages: Annotated[
        int, typer.Option(min=1, help="Passages to read, at most: the last ones of the text.")
    ] = 64,
    context_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a passage; default: as the SAE was trained, else 256.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Write one self-contained HTML page: overview, results, and a browser of all atoms or codes.

    The replacement test, the partition and the top contexts are run if they are not among the results given.
    The page of a sweep's folder is its atlas: all cells, coloured, plotted and tabulated by any figure.
    """
    from writesae_lens.cli.runs import write_report
    from writesae_lens.cli.subjects import Subject

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    subject = Subject([sae], None, model, text, context_size, max_passages, device)
    write_report(subject, results or [], out, seed, given)


@app.command(rich_help_panel=REPORT)
def reproduce(
    config: Annotated[
        str | None, typer.Option(help="A configuration of the paper; without it they are listed.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Another model in place of the paper's, such as tiny-gdn.", show_default=False),
    ] = None,
    recipe: Annotated[
        Literal["recommended", "paper"],
        typer.Option(help="This package's defaults, or the paper's training, formula and direction."),
    ] = "recommended",
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: reproduce-CONFIG.", show_default=False)
    ] = None,
    training_tokens: Annotated[
        int | None,
        typer.Option(
            min=10_000,
            help="Default: as many as in the paper; 350,000 on shipped models.",
            show_default=False,
        ),
    ] = None,
    experiments: Annotated[
        str | None, typer.Option(help="Experiments to run, commas between; default: all.", show_default=False)
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the model.")
    ] = "float32",
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Run a configuration of the paper: train, run every experiment, tabulate beside the paper's figures.

    An interrupted run goes on where it stopped when it is started again with the same OUT.
    """
    from writesae_lens.cli import runs

    if config is None:
        runs.list_configurations()
    elif dry_run:
        from hooked_models.files.loading import check_device

        check_device(device)
        runs.estimate(config, model, training_tokens, dtype, recipe, experiments, device)
    else:
        runs.reproduce(config, model, recipe, out, training_tokens, experiments, device, dtype, seed)


def main() -> None:
    """Run the command line; whatever is wrong with the input is one line on stderr and exit status 2."""
    try:
        # Without standalone mode typer returns the status of a command that ended early (--help ends with 0)
        # and raises for input that it refuses.
        sys.exit(app(prog_name="writesae-lens", standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        command = "writesae-lens" if error.ctx is None else error.ctx.command_path
        message = one_line(error.format_message()).removesuffix(".")
        if not message:  # no command at all: typer has printed the help
            sys.exit(2)
        message += f"; see {command} --help"
    except typer.Abort:
        message = "interrupted"
    except (HookedModelError, OSError, SafetensorError) as error:  # the last: while weights are saved
        message = one_line(error)
    typer.echo(f"writesae-lens: {printable(message)}", err=True)
    sys.exit(2)
