"""Options of the experiments, declared once.

The annotation of an argument is its whole declaration: `check` reads the accepted values from it, and
`options_of` the default, the bound and the help text (from the docstring) that the command line shows.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

from writesae_lens.errors import WriteSAEError


@dataclass(frozen=True)
class Bound:
    """The smallest and the largest value of a number; ``exclusive``: it must be above the smallest."""

    minimum: int | float
    exclusive: bool = False
    maximum: int | None = None


Count = Annotated[int, Bound(1)]
"""A whole number, 1 or more."""
Natural = Annotated[int, Bound(0)]
"""A whole number, 0 or more."""
Seed = Annotated[int, Bound(0, maximum=2**32 - 1)]
"""A seed: a whole number of 32 bits, as numpy takes it."""
Positive = Annotated[float, Bound(0, exclusive=True)]
"""A finite number above 0."""
NotNegative = Annotated[float, Bound(0)]
"""A finite number, 0 or more."""

# Arguments that every experiment has and that are no options of its own.
SHARED = ("model", "sae", "saes", "sae_or_cell", "tokens", "prompts", "context_size")
SHARED += ("train_tokens", "progress_folder", "verbose")


@dataclass(frozen=True)
class Option:
    """One argument of an experiment, as the command line needs it.

    Args:
        name: of the argument.
        annotation: its type without bounds: int, float, str, ``Literal[...]``, ``tuple[...]``, or one of
            these or None.
        default: the value that it has when it is not given.
        help: its text in the docstring.
        bound: of the number, or of each number of a tuple.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    bound: Bound | None


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The arguments of an experiment that are its own, by name; the seed is one of them."""
    helps = argument_help(function)
    return {
        name: Option(
            name,
            _without_bounds(parameter.annotation),
            parameter.default,
            helps.get(name, ""),
            _bound_in(parameter.annotation),
        )
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if name not in SHARED and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def argument_help(function: Callable[..., Any]) -> dict[str, str]:
    """The ``Args`` section of a docstring as one line of text an argument."""
    section = (inspect.getdoc(function) or "").split("\n\nArgs:\n", 1)[-1].split("\n\nReturns:")[0]
    helps = {}
    for block in re.split(r"\n(?=    \w)", "\n" + section):
        names, colon, text = block.strip().partition(":")
        if colon:
            helps |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return helps


def _without_bounds(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[0]
    if origin in (Union, types.UnionType):
        return Union[tuple(_without_bounds(a) for a in arguments)]  # noqa: UP007  (the parts are not known here)
    if origin is tuple:
        return tuple[_without_bounds(arguments[0]), ...]
    return Sequence[_without_bounds(arguments[0])] if origin is Sequence else annotation


def _bound_in(annotation: Any) -> Bound | None:
    if get_origin(annotation) is Annotated:
        return next((x for x in get_args(annotation) if isinstance(x, Bound)), None)
    if get_origin(annotation) is Literal:
        return None
    return next((bound for a in get_args(annotation) if (bound := _bound_in(a))), None)


def check(annotation: Any, **values: Any) -> None:
    """Refuse values that an annotation does not allow.

    Args:
        annotation: `Count`, `Natural`, `Positive`, `NotNegative`, another number with a `Bound`, ``Literal``,
            a ``tuple`` or ``Sequence`` of one of these, or one of these or None. Other types are not checked.
        **values: by the name that the message shall have.

    Raises:
        WriteSAEError: a value is not allowed; the message names it and what is.
    """
    for name, value in values.items():
        _check(name, value, annotation)


def _check(name: str, value: Any, annotation: Any) -> None:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if not (value is None and types.NoneType in arguments):
            _check(name, value, _alternative(value, [a for a in arguments if a is not types.NoneType]))
    elif origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            choices = " or ".join(map(str, arguments))
            raise WriteSAEError(f"{name}={shown(value)} is unknown: choose {choices}")
    elif origin in (tuple, Sequence):
        _check_each(name, value, arguments[0])
    elif origin is Annotated:
        _check_number(name, value, arguments[0], arguments[1])


def _alternative(value: Any, alternatives: list[Any]) -> Any:
    """Which of several types a value is meant to have: a sequence for what is one, else the other."""
    several = isinstance(value, (tuple, list))
    fitting = [a for a in alternatives if (get_origin(a) in (tuple, Sequence)) == several]
    return fitting[0] if len(fitting) == 1 else alternatives[0] if len(alternatives) == 1 else Any


def _check_each(name: str, value: Any, annotation: Any) -> None:
    values = as_list(name, value)
    if annotation == Positive:
        if not values or not all(is_number(x) and 0 < x < float("inf") for x in values):
            raise WriteSAEError(f"{name} must be positive numbers, one at least, got {shown(value)}")
    elif annotation is float:
        if not all(is_number(x) for x in values):
            raise WriteSAEError(f"{name} must be numbers, got {shown(value)}")
    else:
        for x in values:
            _check(name, x, annotation)


def _check_number(name: str, value: Any, kind: type, bound: Bound) -> None:
    if kind is int:
        if not (is_whole(value) and bound.minimum <= value <= (bound.maximum or value)):
            whole = "" if is_whole(value) else ", a whole number"
            most = "or more" if bound.maximum is None else f"to {bound.maximum}"
            raise WriteSAEError(f"{name}={shown(value)} makes no sense: give {bound.minimum} {most}{whole}")
    elif bound.exclusive:
        if not (is_number(value) and bound.minimum < value < float("inf")):
            raise WriteSAEError(f"{name} must be positive, a number above 0, got {shown(value)}")
    elif not (is_number(value) and bound.minimum <= value < float("inf")):
        raise WriteSAEError(f"{name}={shown(value)} makes no sense: give {bound.minimum} or more")


def as_list(name: str, value: Any) -> list[Any]:
    """The entries of a list, tuple or array.

    Raises:
        WriteSAEError: the value is anything else, a text for example.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise WriteSAEError(f"{name} must be a list or tuple, got {shown(value)}: put it into brackets")
    return list(value)


def is_whole(x: Any) -> bool:
    """Whether x is a whole number (True and False are none)."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether x is a real number (True and False are none)."""
    return isinstance(x, Real) and not isinstance(x, bool)


def shown(x: Any) -> str:
    """A value as messages show it: numbers and texts themselves, tensors by shape, others by type."""
    if isinstance(x, Tensor):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    parts = x if isinstance(x, (tuple, list)) else [x]
    plain = all(part is None or isinstance(part, (str, Real)) for part in parts)
    return f"{x!r:.60}" if plain else f"a {type(x).__name__}"
