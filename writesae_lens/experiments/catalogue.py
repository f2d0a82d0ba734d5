"""The catalogue of experiments: one declaration beside each experiment's function.

A module of this folder declares its experiment by decorators; no other file needs to know it::

    @experiment("erase", paper=5, question="...", row="a position, condition and dose")
    def erase_atom(model, sae, tokens, doses: tuple[Positive, ...] = DOSES, ...) -> ExperimentResult:
        ...

    @figure("erase")
    def plot_erase(result: ExperimentResult) -> Figure:
        ...

The command line, the report, `writesae_lens.reproduce`, the documentation and the tests iterate over
`EXPERIMENTS`; experiments about a whole model (``of_model=True``) are in `OF_MODELS`. The name is that of the
module, the command, the result and its files.

The functions of `writesae_lens.use` that give a result are declared in the same way (``of_prompt=True``), and
are in `OF_PROMPTS`: they read a prompt instead of passages, and have commands with options of their own.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Option, check, options_of
from writesae_lens.experiments.origin import ORIGIN
from writesae_lens.locks import locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from writesae_lens.experiments.result import ExperimentResult

_F = TypeVar("_F", bound=Callable[..., Any])
Draw = Callable[["ExperimentResult"], "Figure"]


@dataclass(frozen=True)
class Experiment:
    """A declared experiment.

    Args:
        name: of its module, command, result and files.
        function: the public call; it checks its options by their annotations.
        question: the question that it answers; the report's heading and the command's line in ``--help``.
        row: the trial that a row of its records describes.
        table: figures of merit that `writesae_lens.reproduce` tabulates, as paths into the summary.
        paper: number of the experiment in the paper (None: not in it); the catalogue's order.
        max_passages, context_size: default number and length of the passages that the command reads (None:
            as the SAE was trained).
        passes_on: the experiment whose options it takes as keyword arguments beside its own.
        former_names: names under which results were saved before.
        of_model: whether it is about a whole model, and so takes neither an SAE nor a cell.
        of_prompt: whether it works with features on one prompt (`writesae_lens.use`).
        own_options: its options by name, from the function's signature.
        figures: file stem to the function that draws it from a result (`figure`); the first is the main one.
    """

    name: str
    function: Callable[..., ExperimentResult]
    question: str
    row: str
    table: tuple[str, ...] = ()
    paper: int | None = None
    max_passages: int = 32
    context_size: int | None = None
    passes_on: str | None = None
    former_names: tuple[str, ...] = ()
    of_model: bool = False
    of_prompt: bool = False
    own_options: Mapping[str, Option] = field(default_factory=dict)
    figures: dict[str, Draw] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Option]:
        """Every option by name: its own, then those that it passes on."""
        if self.passes_on is None:
            return dict(self.own_options)
        return dict(self.own_options) | {
            name: option
            for name, option in EXPERIMENTS[self.passes_on].options.items()
            if name not in self.own_options and name != "max_firings"
        }


# Options that the command line gives every experiment.
_COMMAND_OPTIONS = {"cell", "text", "out", "max_passages", "device"}
EXPERIMENTS: dict[str, Experiment] = {}
"""Every declared experiment on SAEs or a cell by name, in the order of the paper."""
OF_MODELS: dict[str, Experiment] = {}
"""Every declared experiment about a whole model by name: they are no part of an SAE's report."""
OF_PROMPTS: dict[str, Experiment] = {}
"""What works with features on a prompt, by name: neither the report nor `reproduce` runs it."""


def experiment(name: str, **declaration: Any) -> Callable[[_F], _F]:
    """Declare a function as the experiment ``name``; the other arguments are those of `Experiment`.

    The declared function checks its options before it does anything, each by its annotation
    (`writesae_lens.experiments.options`).

    Raises:
        WriteSAEError: there is another experiment of that name, or the function lacks what all have.
    """

    def declare(function: _F) -> _F:
        signature = inspect.signature(function, eval_str=True)
        own = options_of(function)
        annotations = {
            n: p.annotation for n, p in signature.parameters.items() if n in own or n == "context_size"
        }

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = _bound(function.__name__, signature, args, kwargs)
            for argument, annotation in annotations.items():
                check(annotation, **{argument: given.arguments[argument]})
            # Several differentiate, whatever the caller has switched off.
            folder = given.arguments.get("progress_folder")
            with torch.inference_mode(False), torch.enable_grad(), locked(folder):
                return function(*given.args, **given.kwargs)

        _check_declaration(name, signature, own, declaration)
        if name in EXPERIMENTS | OF_MODELS | OF_PROMPTS:
            raise WriteSAEError(
                f"there is an experiment {name!r} already: declare this one under another name"
            )
        entry = Experiment(name, checked, own_options=own, **declaration)
        (OF_MODELS if entry.of_model else OF_PROMPTS if entry.of_prompt else EXPERIMENTS)[name] = entry
        in_order = sorted(EXPERIMENTS.values(), key=lambda e: (e.paper is None, e.paper, e.name))
        EXPERIMENTS.update({e.name: EXPERIMENTS.pop(e.name) for e in in_order})
        return checked  # type: ignore[return-value]

    return declare


def _bound(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call, defaults too; a call that does not fit is answered by the function's name."""
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((n for n in kwargs if n not in signature.parameters), None)
        close = difflib.get_close_matches(unknown or "", signature.parameters, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise TypeError(f"{name} {error}{hint}") from None
    given.apply_defaults()
    return given


def _check_declaration(
    name: str, signature: inspect.Signature, own: Mapping[str, Option], declaration: Mapping[str, Any]
) -> None:
    """Refuse a declaration that the command line, the report or a run would fail on later."""
    arguments = signature.parameters
    wanted = ("model",) if declaration.get("of_prompt") else ("model", "seed", "progress_folder", "verbose")
    lacks = [n for n in wanted if n not in arguments]
    of_cell = not (declaration.get("of_model") or declaration.get("of_prompt"))
    has_subject = not of_cell or {"sae", "saes", "sae_or_cell"} & set(arguments)
    if lacks or not has_subject:
        what = ", ".join(lacks) or "sae, saes or sae_or_cell"
        raise WriteSAEError(f"the experiment {name!r} lacks an argument that every experiment has: {what}")
    if taken := _COMMAND_OPTIONS & set(own):
        raise WriteSAEError(
            f"the experiment {name!r} has an argument {min(taken)!r}, which is an option of every command: "
            "give it another name"
        )
    if taken := set(ORIGIN) & set(own):
        raise WriteSAEError(
            f"the experiment {name!r} has an argument {min(taken)!r}, which is an entry of every result: "
            "give it another name"
        )
    if not all(isinstance(declaration.get(text), str) for text in ("question", "row")):
        raise WriteSAEError(f"the experiment {name!r} lacks question or row: give both as texts")
    for option in own:
        default = arguments[option].default
        if default is not inspect.Parameter.empty:
            check(arguments[option].annotation, **{option: default})


def figure(name: str, stem: str | None = None) -> Callable[[_F], _F]:
    """Declare a function that draws a figure from a result of the experiment ``name``.

    Args:
        name: of the experiment, declared above it.
        stem: of the figure's file (None: the experiment's name).
    """

    def declare(draw: _F) -> _F:
        find_experiment(name, of_models=True).figures[stem or name] = draw
        return draw

    return declare


def find_experiment(name: str, of_models: bool = False) -> Experiment:
    """The experiment of a name, or of a former name.

    Args:
        name: the name.
        of_models: whether it may be one about a whole model, or one that works with features on a prompt.

    Raises:
        WriteSAEError: there is none; the message lists those that there are.
    """
    every = EXPERIMENTS | OF_MODELS | OF_PROMPTS if of_models else EXPERIMENTS
    for entry in every.values():
        if name == entry.name or name in entry.former_names:
            return entry
    wrong = f"no experiment is called {name!r}"
    if name in OF_MODELS | OF_PROMPTS:
        wrong = f"{name} is about a {'whole model' if name in OF_MODELS else 'prompt'}"
    raise WriteSAEError(f"{wrong}: there are {', '.join(every)}")
