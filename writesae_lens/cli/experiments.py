"""Bodies of the experiments' commands: options, help and bounds come from each experiment's declaration."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from hooked_models.errors import printable
from writesae_lens.cells import parse_cells
from writesae_lens.cli.subjects import Loaded, Subject, load, read_text, token_of, warnings_as_lines
from writesae_lens.errors import WriteSAEError, interruptible
from writesae_lens.experiments.catalogue import Experiment, find_experiment
from writesae_lens.experiments.options import Option
from writesae_lens.experiments.origin import fingerprint_sae
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import SUMMARY, Progress
from writesae_lens.experiments.stand_ins import OWN_CHARACTERS
from writesae_lens.locks import locked
from writesae_lens_cli.options import SAE_REFERENCE, Device, Seed


def command_of(name: str) -> Any:
    """The command of a declared experiment, as typer (click) runs it."""
    experiment = find_experiment(name, of_models=True)
    options = _shared_options(experiment) + [
        _own_option(option) for option in experiment.options.values() if option.name != "seed"
    ]

    def run(**given: Any) -> None:
        _run(experiment, given)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=_description(experiment))(run)
    return typer.main.get_command(app)


def _run(experiment: Experiment, given: dict[str, Any]) -> None:
    """Load what the options name, run the experiment, save its result, print its headline."""
    references, cell = given.pop("sae", None), given.pop("cell", None)
    references = [references] if isinstance(references, str) else references or []
    if len(set(references)) < len(references):
        raise WriteSAEError("one --sae is given twice: each must be another")
    if bool(references) == bool(cell) and not experiment.of_model:
        accepted = "one of --sae and --cell" if _subject_of(experiment).name == "sae_or_cell" else "--sae"
        raise WriteSAEError(f"which cell? Give {accepted}")
    if cell and given["model"] is None:
        raise WriteSAEError("--cell names no model: give --model")
    named = [given.pop(name) for name in ("model", "text", "context_size", "max_passages", "device")]
    several = _takes_several_cells(experiment)
    loaded = load(Subject(references, None if several else cell, *named))
    subject: Any = loaded.saes[0] if loaded.saes else loaded.cell
    if several:
        subject = loaded.saes or parse_cells(loaded.model, cell)
    if _subject_of(experiment).name == "saes":
        subject = loaded.saes
        annotation = _subject_of(experiment).annotation
        origins: list[Any] = [get_origin(x) for x in (annotation, *get_args(annotation))]
        if Mapping in origins:
            subject = dict(zip(references, loaded.saes, strict=True))
    out: Path = given.pop("out")
    _check_folder(out, loaded)
    progress = out / "progress"
    # typer gives an empty list for an option that is not given.
    train_text: Path | None = given.pop("train_text", None)
    options = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x != []}
    if train_text is not None:
        name = printable(train_text.name)
        options["train_tokens"] = as_passages(loaded.model, read_text(train_text)[:OWN_CHARACTERS], name=name)
    stopped = f"the same command goes on where it stopped (finished parts are in {progress})"
    with locked(out), interruptible(stopped), warnings_as_lines():
        about = () if experiment.of_model else (subject,)
        result = experiment.function(
            loaded.model, *about, loaded.passages, progress_folder=str(progress), **options
        )
        result.save(out)
        Progress.clear(progress)
    typer.echo(f"saved: {out}")
    typer.echo(result.headline)


def _check_folder(out: Path, loaded: Loaded) -> None:
    """Refuse to write over the result of another SAE: the default folder of a command is that of every SAE.

    Raises:
        WriteSAEError: the folder holds a result on other SAEs.
    """
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    known = summary.get("sae_fingerprints") if isinstance(summary, dict) else None
    if known and loaded.saes and sorted(map(fingerprint_sae, loaded.saes)) != sorted(known):
        hooks = summary.get("hook_name")
        hooks = ", ".join(map(str, hooks)) if isinstance(hooks, list) else str(hooks)
        raise WriteSAEError(
            f"{out} holds the result of another SAE, on {hooks:.120}: name another folder with --out"
        )


def _subject_of(experiment: Experiment) -> inspect.Parameter:
    """The second argument of an experiment: its ``sae``, ``saes`` or ``sae_or_cell``, or else ``tokens``."""
    return list(inspect.signature(experiment.function, eval_str=True).parameters.values())[1]


def _takes_several_cells(experiment: Experiment) -> bool:
    """Whether it takes several cells or SAEs at once, and so a text as `parse_cells` reads it."""
    subject = _subject_of(experiment)
    return subject.name == "sae_or_cell" and str in get_args(subject.annotation)


def _shared_options(experiment: Experiment) -> list[inspect.Parameter]:
    """Options of every experiment: its subject, the text, where the result goes."""
    required = inspect.Parameter.empty
    one_cell = [
        _option("sae", str | None, None, f"{SAE_REFERENCE} The experiment is run on its cell."),
        _option("cell", str | None, None, "The cell, LAYER:HEAD, in place of --sae."),
    ]
    cells = "The cell, LAYER:HEAD, in place of --sae; several with * for all and commas between, as 1:*."
    several_cells = [
        _option("sae", list[str], [], f"{SAE_REFERENCE} Give the option once for each cell's SAE."),
        _option("cell", str | None, None, cells),
    ]
    subject = {
        "sae": [_option("sae", str, required, SAE_REFERENCE)],
        "saes": [_option("sae", list[str], required, f"{SAE_REFERENCE} Give the option once for each SAE.")],
        "sae_or_cell": several_cells if _takes_several_cells(experiment) else one_cell,
        "tokens": [],
    }[_subject_of(experiment).name]
    model = _option("model", str | None, None, "Default: the model that the SAE names.")
    context = "Tokens of a passage; default: as the SAE was trained, else 256."
    if experiment.of_model:
        model = _option("model", str, required, "A model that ships, a hub id, or a folder.")
        context = "Tokens of a passage; default: 256."
    return [
        *subject,
        model,
        _option(
            "text",
            Path | None,
            None,
            "UTF-8 text to read; default: the test part of the shipped text.",
        ),
        _option("out", Path, Path(f"writesae-{experiment.name}"), "Folder for records, summary and figures."),
        _option(
            "max_passages",
            int,
            experiment.max_passages,
            "Passages to read, at most: the last ones of the text.",
            min=1,
        ),
        _option(
            "context_size",
            int | None,
            experiment.context_size,
            context,
            min=1,
        ),
        *([_train_text()] if "train_tokens" in inspect.signature(experiment.function).parameters else []),
        _option("device", Device, "cpu"),
        _option("seed", Seed, 0),
    ]


def _train_text() -> inspect.Parameter:
    """The option of experiments with untrained baselines."""
    help = "UTF-8 text that the untrained baselines are made from; default: the SAE's training text where it "
    help += "is a file or folder here, else the training part of the shipped text."
    return _option("train_text", Path | None, None, help)


def _option(
    name: str, annotation: Any, default: Any, help: str | None = None, **how: Any
) -> inspect.Parameter:
    if help is not None:
        shown = default not in (None, (), []) and default is not inspect.Parameter.empty
        annotation = Annotated[annotation, typer.Option(help=help, show_default=shown, **how)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _own_option(option: Option) -> inspect.Parameter:
    """An experiment's own argument as an option of its command."""
    annotation, how = _typer_type(option.annotation)
    default = option.default
    if get_origin(annotation) is list:
        default = (
            list(default) if isinstance(default, (tuple, list)) else [] if default is None else [default]
        )
    # typer has no open bounds: the experiment itself refuses the bound of "above 0".
    if option.bound is not None and not option.bound.exclusive:
        how["min"] = option.bound.minimum
    return _option(option.name, annotation, default, _for_terminal(option.help), **how)


def _typer_type(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """The type that typer has for an option's, and what else it must be told."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (tuple, Sequence):
        if get_origin(arguments[0]) is Literal:  # typer has no such lists: the experiment refuses
            return list[str], {"metavar": "|".join(map(str, get_args(arguments[0])))}
        element, how = _typer_type(arguments[0])
        return list[element], how
    if get_origin(annotation) in (Union, types.UnionType):
        alternatives = [a for a in arguments if a is not types.NoneType]
        several = [a for a in alternatives if get_origin(a) in (tuple, Sequence)]
        if several:  # a number or several: an option that can be given more than once
            return _typer_type(several[0])
        if set(alternatives) == {int, str}:  # a token's id or its text
            how = {"parser": token_of, "metavar": "ID|TEXT"}
            return str | None if types.NoneType in arguments else str, how
    return annotation, {}


def _description(experiment: Experiment) -> str:
    """The part of a docstring before ``Args``, its lines joined, for a terminal."""
    text = (inspect.getdoc(experiment.function) or "").split("\n\nArgs:", 1)[0]
    return re.sub(r"\n(?!\n|- |    )(?<!\n\n)[ ]*", " ", _escaped(text))


def _for_terminal(help: str) -> str:
    text = _escaped(help).replace("(None:", "(default:")
    return text[:1].upper() + text[1:]


def _escaped(text: str) -> str:
    """Text of a docstring without its backticks, and with brackets that the terminal shows."""
    return text.replace("`", "").replace("[", r"\[")
