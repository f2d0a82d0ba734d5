"""The experiments as commands: options and help come from the functions' own signatures and docstrings.

The command line imports this module when one of them is called, for it imports them all.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer

from hooked_models.hooked_recurrent import Cell
from writesae_lens import experiments
from writesae_lens.errors import WriteSAEError, interruptible
from writesae_lens.experiments.inputs import find_passages
from writesae_lens.experiments.result import ExperimentResult, Progress

# Arguments of the functions that options of all commands stand for.
_SHARED = {
    "model",
    "sae",
    "sae_or_cell",
    "saes",
    "tokens",
    "prompts",
    "context_size",
    "progress_folder",
    "seed",
}
_SHARED |= {"verbose", "options"}


class Command(NamedTuple):
    """An experiment on the command line."""

    function: Callable[..., ExperimentResult]
    max_passages: int = 32
    context_size: int | None = None


COMMANDS = {
    "replace": Command(experiments.replacement_test),
    "population": Command(experiments.population_test, max_passages=64),
    "partition": Command(experiments.partition_atoms, max_passages=64),
    "formula": Command(experiments.logit_formula_test, max_passages=16, context_size=64),
    "erase": Command(experiments.erase_atom, max_passages=64),
    "sign": Command(experiments.sign_test),
    "install": Command(experiments.install_tokens, max_passages=16, context_size=64),
    "splice": Command(experiments.splice_test),
    "amplify": Command(experiments.amplify, max_passages=16, context_size=64),
    "selectivity": Command(experiments.selectivity),
    "trace": Command(experiments.reader_trace, max_passages=16, context_size=64),
    "contexts": Command(experiments.top_contexts, max_passages=64),
    "compare": Command(experiments.compare),
}


class Subject(NamedTuple):
    """What a command is about, as the user names it."""

    saes: list[str]
    cell: str | None
    model: str | None
    text: Path | None
    context_size: int | None
    max_passages: int
    device: str


Load = Callable[[Subject], tuple[Any, list[Any], Cell | None, Any]]


def make(name: str, load: Load) -> typer.Typer:
    """An experiment as a command line of its own.

    Args:
        name: of the command.
        load: model, SAEs (or the cell) and text of a subject.
    """
    command = COMMANDS[name]
    own = _own_parameters(command.function)
    takes = inspect.signature(command.function).parameters

    def run(**given: Any) -> None:
        out: Path = given.pop("out")
        seed, saes = given.pop("seed"), given.pop("sae")
        named = [saes] if isinstance(saes, str) else list(saes or [])
        if len(set(named)) < len(named):
            raise WriteSAEError("one --sae is given twice: each must be another")
        where = given.pop("cell", None)
        if bool(named) == bool(where):
            both = "one of --sae and --cell" if "sae_or_cell" in takes else "--sae"
            raise WriteSAEError(f"which cell? Give {both}")
        if where and given["model"] is None:
            raise WriteSAEError("--cell names no model: give --model")
        subject = Subject(
            named, where, *(given.pop(n) for n in ("model", "text", "context_size", "max_passages", "device"))
        )
        model, loaded, cell, content = load(subject)
        passages = passages_of(model, loaded[0] if loaded else cell, content, subject)
        if "saes" not in takes:
            about: Any = loaded[0] if loaded else cell
        else:
            about = dict(zip(named, loaded, strict=True)) if name == "compare" else loaded
        options = {key: _plain(value) for key, value in given.items() if value != []}  # []: not given
        unfinished = out / "progress"
        with interruptible(f"the same command goes on where it stopped (what is done is in {unfinished})"):
            result = command.function(
                model, about, passages, seed=seed, progress_folder=str(unfinished), **options
            )
        result.save(out)
        Progress.clear(unfinished)
        typer.echo(f"saved: {out}")
        typer.echo(result.headline)

    run.__signature__ = inspect.Signature([*_shared_parameters(name, command, takes), *own])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=_description(command.function))(run)
    return app


def passages_of(model: Any, about: Any, text: str, subject: Subject) -> Any:
    """The last passages of a text, as the user wants them and the SAE was trained."""
    return find_passages(model, about, text, subject.context_size)[-subject.max_passages :]


def _shared_parameters(name: str, command: Command, takes: Any) -> list[inspect.Parameter]:
    def option(key: str, kind: Any, default: Any, help: str, **how: Any) -> inspect.Parameter:
        flag = typer.Option(help=help, show_default=how.pop("show_default", True), **how)
        return inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, flag]
        )

    sae_help = "An SAE: a folder that SAELens wrote, a best.pt, or RELEASE:ID from the Hub (see models)"
    hidden = {"show_default": False}
    if "saes" in takes:
        several = option(
            "sae", list[str], inspect.Parameter.empty, f"{sae_help}; give it again for each one."
        )
        shared = [several]
    elif "sae_or_cell" in takes:
        shared = [
            option("sae", str | None, None, f"{sae_help}; only its cell counts.", **hidden),
            option("cell", str | None, None, "LAYER:HEAD, in place of --sae.", **hidden),
        ]
    else:
        shared = [option("sae", str, inspect.Parameter.empty, f"{sae_help}.")]
    return [
        *shared,
        option("text", Path | None, None, "UTF-8 text; default: the model's held-out text.", **hidden),
        option("model", str | None, None, "Default: the model that the SAE names.", **hidden),
        option("out", Path, Path(f"writesae-{name}"), "Folder for records, summary and figures."),
        option(
            "max_passages",
            int,
            command.max_passages,
            "Passages to read, at most: the text's last ones.",
            min=1,
        ),
        option(
            "context_size",
            int | None,
            command.context_size,
            "Tokens of a passage; else the SAE's own, or 256.",
            min=1,
        ),
        option("device", str, "cpu", "cpu, cuda, ..."),
        option("seed", int, 0, "Seed of everything random.", min=0, max=2**32 - 1),
    ]


def _own_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Options for the arguments that are the experiment's own."""
    signature, helps = inspect.signature(function, eval_str=True), _argument_help(function)
    parameters = dict(signature.parameters)
    if "options" in parameters:  # passed on to the replacement test
        inner = inspect.signature(experiments.replacement_test, eval_str=True).parameters
        parameters |= {n: p for n, p in inner.items() if n not in parameters and n not in ("max_firings",)}
        helps = _argument_help(experiments.replacement_test) | helps
    found = []
    for name, parameter in parameters.items():
        if name in _SHARED or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        kind, default, how = _option_of(parameter.annotation, parameter.default)
        info = typer.Option(help=helps.get(name), **how)
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
            )
        )
    return found


def _option_of(annotation: Any, default: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A type that typer knows, a default, and more about the option."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        words: Any = enum.Enum("Words", {word: word for word in arguments}, type=str)
        return words, words(default), {}
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        several = [a for a in inner if get_origin(a) in (tuple, Sequence)]
        if several:
            return _option_of(several[0], default)
        kinds = [a for a in inner if a in (int, float, str)]
        # A token may be an id or a text: what is all digits is an id.
        how = {"parser": _token, "metavar": "ID|TEXT"} if set(kinds) == {int, str} else {}
        return (kinds[0] if not how else str) | None, default, how | {"show_default": False}
    if get_origin(annotation) in (tuple, Sequence):
        kind, _, how = _option_of(arguments[0], None)
        kind = next((a for a in get_args(kind) if a is not type(None)), kind)
        values = default if isinstance(default, (tuple, list)) else () if default is None else (default,)
        return list[kind], list(values), how | {"show_default": bool(values)}
    return annotation, default, {}


def _plain(value: Any) -> Any:
    """What the function takes for what typer gives."""
    if isinstance(value, list):
        return tuple(_plain(x) for x in value)
    return value.value if isinstance(value, enum.Enum) else value


def _token(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _description(function: Callable[..., Any]) -> str:
    """What comes before Args in a docstring, its lines joined, for a terminal."""
    text = (inspect.getdoc(function) or "").split("\n\nArgs:", 1)[0].replace("`", "").replace("[", r"\[")
    return re.sub(r"\n(?!\n|- |    )(?<!\n\n)[ ]*", " ", text)


def _argument_help(function: Callable[..., Any]) -> dict[str, str]:
    """The Args section of a docstring, by argument."""
    text = (inspect.getdoc(function) or "").split("\n\nArgs:\n", 1)[-1].split("\n\nReturns:")[0]
    found = {}
    for block in re.split(r"\n(?=    \w)", "\n" + text):
        names, colon, help = block.strip().partition(":")
        if colon:
            line = " ".join(help.split()).replace("``", "")
            found |= {
                name.strip(): (line[:1].upper() + line[1:]).replace("[", r"\[").replace("(None:", "(default:")
                for name in names.split(",")
            }
    return found
