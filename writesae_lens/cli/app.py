"""The command line, ``writesae-lens``: a map of commands; each imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from hooked_models.errors import HookedModelError, one_line, printable
from writesae_lens.errors import WriteSAEError, interruptible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Sparse autoencoders on the cache writes of recurrent language models.

    First look: writesae-lens demo. Then your own: train, report, and the experiments, each with --help.
    SAE stands for a folder that SAELens wrote, a published best.pt, or RELEASE:ID from the Hub.""",
)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"writesae-lens {version('writesae-lens')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


START, SHARE, ALL = "Start here", "Train, fetch, share", "All at once"
TESTS = "Ask one question of an SAE: writesae-lens COMMAND --sae SAE"
# The experiments in the order of the map. Their options and help come from the functions, when one is called.
EXPERIMENTS = {
    "replace": "Can its atoms take the place of native writes? KL against deletion and a random write.",
    "population": "The same for every atom: win rates, and what goes with them.",
    "partition": "Which atoms look like native writes (registers), which like mixtures (bundles)?",
    "contexts": "Where in a text is each atom most active?",
    "compare": "Several dictionaries and random controls on the same firings.",
    "formula": "Predict how an added atom shifts later logits, and measure it.",
    "sign": "Write a direction for a token: does its logit move as predicted?",
    "erase": "Take an atom out of the writes: what happens to the token that it promotes?",
    "install": "Write into the memory until the model says a chosen token.",
    "splice": "Write what the SAE reconstructs: how much worse does the model predict?",
    "amplify": "Write an atom larger than it is while the model continues a text.",
    "selectivity": "Does an atom move other tokens than its neighbours do?",
    "trace": "Who reads what an atom writes, how long after?",
}

# What a configuration raises that is JSON, but not of an SAE.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)
GOES_ON = "the same command goes on where it stopped"
# typer keeps its own copy of click, or takes click's: this is the ancestor of what bad options raise.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]


@app.command(rich_help_panel=START)
def demo(
    model: Annotated[str, typer.Option(help="A shipped model.")] = "tiny-gdn",
    out: Annotated[Path, typer.Option(help="Folder for the SAE, records, figures and report.")] = Path(
        "writesae-demo"
    ),
    cell: Annotated[str | None, typer.Option(help="LAYER:HEAD; default: the shipped model's best.")] = None,
    d_sae: Annotated[int, typer.Option(min=1, help="Atoms in the dictionary.")] = 2048,
    k: Annotated[int, typer.Option(min=1, help="Atoms active per write.")] = 4,
    training_tokens: Annotated[int, typer.Option(min=10_000, help="Writes to train on.")] = 600_000,
    seed: Seed = 0,
) -> None:
    """Train a WriteSAE on a shipped model, put it through the replacement test, write a report."""
    from writesae_lens.demo import run_demo

    with interruptible("run it again: the demo starts from the beginning"):
        result = run_demo(out, model, _cell(cell), d_sae, k, training_tokens, seed)
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(result.headline)


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=SHARE)
def train(
    saelens_flags: Annotated[
        list[str] | None,
        typer.Argument(
            help="Any of SAELens's own: --model_name, --dataset_path, --d_sae, --k, --lr, --training_tokens, "
            "--output_path, --log_to_wandb, ...",
            show_default=False,
        ),
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(help="LAYER:HEAD, * for all, commas between: 1:*; instead of --hook_name."),
    ] = None,
    site: Annotated[str, typer.Option(help="With --cells: train on each write, or each state.")] = "write",
    win_rate: Annotated[
        int, typer.Option(min=0, help="Passages for a quick replacement test at every W&B evaluation.")
    ] = 0,
    saelens_help: Annotated[bool, typer.Option("--saelens-help", help="List SAELens's flags.")] = False,
) -> None:
    """Train WriteSAEs with SAELens's runner; several cells train from one forward pass.

    For example: writesae-lens train --model_name tiny-gdn --cells "1:*" --d_sae 2048 --k 4 --lr 4e-3
    --context_size 256 --training_tokens 200000 --output_path my_saes
    """
    from writesae_lens.saelens.runner import run_training

    if site not in ("write", "state"):
        raise WriteSAEError(f"--site is write or state, got {site!r}")
    if not saelens_flags and cells is None and not saelens_help:
        raise WriteSAEError("nothing to train: give --model_name and --cells, see writesae-lens train --help")
    arguments = ["--help"] if saelens_help else saelens_flags or []
    for folder in run_training(arguments, cells, site, win_rate):  # type: ignore[arg-type]
        typer.echo(f"trained: {folder}")


def _load(subject: Any) -> tuple[Any, list[Any], Any, str]:
    """Model, SAEs (or the cell) and text."""
    from hooked_models import HookedRecurrent, zoo
    from hooked_models.files.loading import check_device

    check_device(subject.device)
    saes = [_load_sae(reference, subject.device) for reference in subject.saes]
    name = subject.model or next((sae.cfg.metadata.model_name for sae in saes), None)
    if name is None:
        raise WriteSAEError(f"{subject.saes[0]} does not say which model it belongs to: give --model")
    # What is neither shipped nor a folder nor a name of the Hub is no model: the next line but one says so.
    if subject.text is None and name not in zoo.SHIPPED and ("/" in name or Path(name).exists()):
        raise WriteSAEError(f"{name} ships with no text: give --text FILE")
    content = zoo.held_out_text() if subject.text is None else _read(subject.text)
    model = HookedRecurrent.boot_transformers(name, device=subject.device)
    where = _cell(subject.cell)
    return model, saes, where and model.cell(*where), content


def _add_experiment(name: str, question: str) -> None:
    def run(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        from writesae_lens.cli import experiments as commands

        commands.make(name, _load)(arguments or [], prog_name=f"writesae-lens {name}", standalone_mode=False)

    options = {"ignore_unknown_options": True}
    app.command(name, help=question, rich_help_panel=TESTS, add_help_option=False, context_settings=options)(
        run
    )


for _name, _question in EXPERIMENTS.items():
    _add_experiment(_name, _question)


@app.command(rich_help_panel=ALL)
def report(
    sae: Annotated[str, typer.Option(help="A folder that SAELens wrote, a best.pt, or RELEASE:ID.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a saved result, or of several; give it again for more.", show_default=False
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text; default: the model's held-out text.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the model that the SAE names.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("writesae-report"),
    max_passages: Annotated[int, typer.Option(min=1, help="Passages to read: the text's last ones.")] = 64,
    context_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a passage; else the SAE's own, or 256.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Seed = 0,
) -> None:
    """Write one self-contained HTML page: overview, results, and a browser of all atoms.

    Replacement test, partition and top contexts are run where RESULTS lack them.
    """
    from writesae_lens.cli.experiments import Subject, passages_of
    from writesae_lens.report.page import make_report, saved_results

    found = [result for folder in results or [] for result in saved_results(folder)]
    subject = Subject([sae], None, model, text, context_size, max_passages, device)
    booted, (loaded,), _, content = _load(subject)
    passages = passages_of(booted, loaded, content, subject)
    folder = Path(sae) if Path(sae).is_dir() else None
    with interruptible(GOES_ON):
        page = make_report(out, booted, loaded, passages, found, folder, seed=seed)
    typer.echo(f"report: {page}")


@app.command(rich_help_panel=ALL)
def reproduce(
    config: Annotated[
        str | None, typer.Option(help="A run of the paper; without it they are listed.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model in the base model's place, tiny-gdn for one.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="default, or paper: its training, formula and direction.")
    ] = "default",
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: reproduce-CONFIG.", show_default=False)
    ] = None,
    training_tokens: Annotated[
        int | None,
        typer.Option(min=10_000, help="Default: the paper's; on shipped models 600,000.", show_default=False),
    ] = None,
    experiments: Annotated[
        str | None, typer.Option(help="Commands, commas between; default: all.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model: float32 or bfloat16.")] = "float32",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say sizes, memory and time, and do nothing.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Run one of the paper's configurations: train, every experiment, a table with the paper's figures.

    Run again with the same OUT, it goes on where it stopped.
    """
    from writesae_lens.cli import experiments as commands
    from writesae_lens.reproduce import run as paper

    if config is None:
        for name, run in paper.CONFIGS.items():
            typer.echo(f"{name:22}{run.about}")
        return
    if dry_run:
        typer.echo(paper.estimate(config, model, training_tokens, dtype))
        return
    if recipe not in ("default", "paper"):
        raise WriteSAEError(f"--recipe is default or paper, got {recipe!r}")
    chosen = tuple(commands.COMMANDS) if experiments is None else tuple(experiments.split(","))
    folder = out or Path(f"reproduce-{config}")
    with interruptible(GOES_ON):
        table = paper.reproduce(config, folder, model, recipe, training_tokens, chosen, device, dtype, seed)  # type: ignore[arg-type]
    typer.echo(paper.as_markdown(table))
    typer.echo(f"saved: {folder / 'table.md'}")


@app.command(rich_help_panel=START)
def models(
    model: Annotated[str | None, typer.Option(help="List this model's cells.")] = None,
) -> None:
    """List the shipped models and the pretrained SAEs, or a model's cells and their hook names."""
    from hooked_models import HookedRecurrent, zoo

    if model is None:
        from writesae_lens.published import hub

        for name in zoo.SHIPPED:
            typer.echo(name)
        table = hub.published_table()
        typer.echo()
        typer.echo(table.to_string(index=False))
        if "?" in set(table["size"]):
            typer.echo("The Hub was out of reach: sizes are known of what is cached only.", err=True)
        return
    booted = HookedRecurrent.boot_transformers(model, device="cpu")
    for cell in booted.cells:
        hook = booted.write_hook_name(cell.layer, cell.head)
        typer.echo(f"{cell.layer}:{cell.head}\t{cell.d_k} x {cell.d_v}\t{cell.architecture}\t{hook}")


@app.command(rich_help_panel=SHARE)
def pull(
    release: Annotated[str, typer.Argument(help="A release (see models), or a repository, owner/name.")],
    ids: Annotated[
        list[str] | None, typer.Argument(help="SAEs in it; default: all of a release.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what the cache has.")] = False,
) -> None:
    """Fetch published SAEs into the cache, check them, and say what they are."""
    from writesae_lens.published import hub, releases

    known = releases.releases().get(release)
    if known is None and "/" not in release:
        raise WriteSAEError(f"no release {release!r}: there are {', '.join(releases.releases())}")
    paths = {} if known is None else known.saes_map
    unknown = [] if known is None else [name for name in ids or [] if name not in paths]
    if unknown or not (ids or paths):
        what = (
            f"no {', '.join(unknown)} in {release}" if unknown else f"which SAE of {release}? Give its folder"
        )
        raise WriteSAEError(f"{what}{': there are ' if paths else ''}{', '.join(paths)}")
    repository = release if known is None else known.repo_id
    failed = []
    for name in ids or list(paths):
        try:
            _tell(hub.fetch_config(repository, paths.get(name, name), revision, force))
        except (HookedModelError, OSError) as error:
            typer.echo(f"writesae-lens: {name}: {printable(one_line(error))}", err=True)
            failed.append(name)
    if failed:
        raise typer.Exit(2)


@app.command(rich_help_panel=SHARE)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published best.pt, or the folder of one.")],
    out: Annotated[Path, typer.Argument(help="Folder for cfg.json and sae_weights.safetensors.")],
    model: Annotated[str | None, typer.Option(help="Base model, where the path does not tell.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Layer, where the file does not tell.")] = None,
    head: Annotated[int | None, typer.Option(min=0, help="Head, where the file does not tell.")] = None,
) -> None:
    """Turn a published checkpoint into SAELens's form: safetensors and cfg.json."""
    from writesae_lens.saes.sae import WriteSAE

    sae = WriteSAE.from_checkpoint(checkpoint, model, layer, head)
    out.mkdir(parents=True, exist_ok=True)
    sae.save_model(out)
    _tell(sae.cfg.to_dict())
    typer.echo(f"converted: {out}")


@app.command(rich_help_panel=SHARE)
def push(
    sae: Annotated[str, typer.Argument(help="A folder that SAELens wrote, a best.pt, or RELEASE:ID.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if it does not exist.")],
    sae_id: Annotated[
        str | None, typer.Option("--id", help="Its folder there; default: its cell, L9_H4.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of its replacement test, for the model card.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch.")] = "main",
    private: Annotated[bool, typer.Option("--private", help="If the repository is made now.")] = False,
) -> None:
    """Publish an SAE on the Hugging Face Hub, with a model card."""
    from writesae_lens.published.sharing import push as push_to_hub

    name = push_to_hub(_load_sae(sae, "cpu"), repository, sae_id, results, revision, private)
    typer.echo(f'published: SAE.from_pretrained("{repository}", "{name}")')


def _tell(cfg: dict[str, Any]) -> None:
    """What an SAE is, and where it is from."""
    metadata = cfg["metadata"]
    sides = [cfg.get(name, metadata.get(name)) for name in ("d_k", "d_v")]
    kind = metadata.get("sae_type") or cfg["architecture"]
    lines = [
        f"{kind}, {cfg['d_sae']:,} atoms for {sides[0]} x {sides[1]} matrices, k {cfg.get('k')}",
        f"{metadata.get('model_name') or 'unknown model'}, {metadata.get('hook_name') or 'unknown hook'}",
    ]
    source = metadata.get("provenance")
    if source:
        lines.insert(0, " ".join(source.get(part, "") for part in ("repository", "file", "revision")).strip())
        checked = "as manifest.json says" if source["sha256_checked"] else "no manifest.json vouches for it"
        lines += [metadata["orientation"], f"SHA-256 {source['sha256']}: {checked}"]
    typer.echo("\n  ".join(printable(line) for line in lines))


def _cell(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    layer, _, head = text.partition(":")
    if not (layer.isdigit() and head.isdigit()):
        raise WriteSAEError(f"a cell is written LAYER:HEAD, for example 1:0, got {text!r}")
    return int(layer), int(head)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WriteSAEError(f"could not read {path} as UTF-8 text: {error}") from error


def _load_sae(reference: str, device: str) -> Any:
    from sae_lens import SAE

    from writesae_lens import WriteSAE
    from writesae_lens.published.hub import transport_errors

    folder = Path(reference)
    release, separator, sae_id = reference.rpartition(":")
    if not folder.exists() and separator:
        try:
            with transport_errors(f"fetching {sae_id} of {release}"):
                return SAE.from_pretrained(release, sae_id, device=device)
        except (ValueError, KeyError, OSError) as error:  # SAELens's own, of what it does not know; the Hub's
            raise WriteSAEError(f"could not load {reference}: {one_line(error)}") from error
    if folder.is_file() or (folder / "best.pt").is_file():
        return WriteSAE.from_checkpoint(folder, device=device)
    missing = [n for n in ("cfg.json", "sae_weights.safetensors") if not (folder / n).is_file()]
    if missing:
        raise WriteSAEError(
            f"{folder} is no SAE folder: {' and '.join(missing)} not found in it; give the folder that "
            "SAELens wrote (in a demo's output: sae/), a best.pt, or RELEASE:ID"
        )
    try:
        return SAE.load_from_disk(folder, device=device)
    except (OSError, SafetensorError, AssertionError, *MALFORMED) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise WriteSAEError(
            f"could not load the SAE in {folder}: {type(error).__name__}: {reason}"
        ) from error


def main() -> None:
    """Entry point: whatever is wrong with the input is one line on stderr and status 2."""
    try:
        # A command that typer ends (after --help) is a status here, what it does not understand an exception.
        sys.exit(app(prog_name="writesae-lens", standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        where = "writesae-lens" if error.ctx is None else error.ctx.command_path
        message = one_line(error.format_message()).removesuffix(".")
        if not message:  # no command at all: typer has shown the map
            sys.exit(2)
        message += f"; see {where} --help"
    except typer.Abort:
        message = "interrupted"
    except (HookedModelError, OSError, SafetensorError) as error:  # the last: of weights on a full disk
        message = one_line(error)
    typer.echo(f"writesae-lens: {printable(message)}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
