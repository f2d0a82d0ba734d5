"""What the arguments of public methods may be. Unknown, impossible and idle ones are refused, by name.

TransformerLens's methods take further keywords for models of other kinds (images, encoders), drop those that
they do not know, and check few values. `bound` compares a call with the method's signature, so that nothing
here repeats a list of arguments; `RULES` says what an argument of a name may be, in every method that has it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from hooked_models.errors import HookedModelError, one_line

# What other libraries raise on arguments that they do not check; the error that replaces one keeps its kind.
_KINDS = (AttributeError, KeyError, IndexError, AssertionError, NotImplementedError, RuntimeError, TypeError)
_KINDS += (OverflowError,)
_Method = TypeVar("_Method", bound=Callable[..., Any])


class Rule(NamedTuple):
    """What an argument may be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Rule:
        """The rule of an argument that may be left open."""
        return Rule(f"{self.words}, or None", lambda x: x is None or self.holds(x))


def is_whole(x: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _are_texts(x: Any) -> bool:
    parts = [x] if isinstance(x, str) else x
    return isinstance(parts, (list, tuple)) and all(isinstance(part, str) and part for part in parts)


def one_of(*choices: str | None) -> Rule:
    """The rule of an argument with a few values."""
    words = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
    return Rule(words, lambda x: isinstance(x, str | None) and x in choices)


FLAG = Rule("True or False", lambda x: isinstance(x, (bool, np.bool_)))
COUNT = Rule("a whole number of at least 1", lambda x: is_whole(x) and x >= 1)
SIDE = one_of("left", "right").or_none()

_FLAGS = """clear_contexts do_sample including_permanent incl_bwd is_permanent load_weights loss_per_token
    move_to_device output_logits remove_batch_dim reset_hooks_end reset_saes_end return_cache
    return_cache_object return_input_tokens stop_at_eos truncate use_past_kv_cache verbose
    fold_ln center_writing_weights center_unembed fold_value_biases no_processing
    disable_warnings refactor_factored_attn_matrices per_token"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_FLAGS.split(), FLAG),
    "prepend_bos": FLAG.or_none(),
    "use_error_term": FLAG.or_none(),
    "trust_remote_code": FLAG.or_none(),
    "padding_side": SIDE,
    "dir": one_of("fwd", "bwd"),
    "direction": one_of("fwd", "bwd", "both"),
    "level": Rule("a whole number", is_whole).or_none(),
    "stop_at_layer": Rule("a whole number", is_whole).or_none(),
    "max_new_tokens": COUNT,
    "max_tokens_per_yield": COUNT,
    "temperature": Rule("a number of at least 0", lambda x: is_number(x) and x >= 0),
    "top_k": COUNT.or_none(),
    "top_p": Rule("a number above 0 and of at most 1", lambda x: is_number(x) and 0 < x <= 1).or_none(),
    "freq_penalty": Rule("a number of at least 0", lambda x: is_number(x) and x >= 0),
    "repetition_penalty": Rule("a number above 0", lambda x: is_number(x) and x > 0),
    "stop_strings": Rule("a text or a list of texts, none of them empty", _are_texts).or_none(),
    "n_ctx": COUNT.or_none(),
    "n_devices": COUNT.or_none(),
    "revision": Rule("a text", lambda x: isinstance(x, str)).or_none(),
    "hf_config_overrides": Rule("a dict of fields by name", lambda x: isinstance(x, dict)).or_none(),
}
"""What an argument may be, by its name; a name means the same in every method."""


def signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """A method's signature without its object; each is read once, for a decoded token asks for several."""
    function = getattr(method, "__func__", None)
    return inspect.signature(method) if function is None else _signature_without_first(function)


@functools.lru_cache(maxsize=256)
def _signature_without_first(function: Callable[..., Any]) -> inspect.Signature:
    whole = inspect.signature(function)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def bound(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that were given and no others.

    Keywords beside the method's own, where it takes any, are in the dictionary like the others.

    Args:
        method: bound to its object, or a class method.
        args, kwargs: of the call.

    Raises:
        HookedModelError: an argument that the method does not have, one too few, or one that its rule in
            `RULES` excludes.
    """
    taker, signature = method.__name__, signature_of(method)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        names = [name for name in kwargs if name not in signature.parameters]
        if names:
            refuse_unknown_names(taker, names, signature.parameters)
        raise HookedModelError(f"{taker}: {one_line(error)}") from error
    given |= given.pop(rest, {}) if rest is not None else {}
    check(taker, given)
    return given


def like(method: Any) -> Callable[[_Method], _Method]:
    """Give a method, which checks its arguments, signature and documentation of the one that it calls."""
    return cast(Any, functools.wraps(method))


def check(taker: str, given: dict[str, Any]) -> None:
    """Refuse values that their rule in `RULES` excludes.

    Raises:
        HookedModelError: there is one; the message has its name, its value and what it may be.
    """
    for name, value in given.items():
        rule = RULES.get(name)
        if rule is not None and not rule.holds(value):
            raise wrong(taker, name, value, rule.words)
        if name == "device":
            check_device(value)


def wrong(taker: str, name: str, value: Any, words: str) -> HookedModelError:
    """The error for an argument that cannot be what it is."""
    return HookedModelError(f"{taker}: {name} is {one_line(repr(value)[:200])[:60]}, must be {words}")


def idle(taker: str, name: str, why: str) -> HookedModelError:
    """The error for an argument that would change nothing."""
    return HookedModelError(f"{taker}: {name} would have no effect: {why}")


def refuse_unknown_names(
    taker: str, names: Iterable[str], accepted: Iterable[str], hints: dict[str, str] | None = None
) -> None:
    """Refuse keywords that a method does not have.

    Args:
        taker: the method, for the message.
        names: the keywords.
        accepted: those that the method has.
        hints: what to do instead, by name.

    Raises:
        HookedModelError: one is not accepted; the message names it, and those that look like it.
    """
    known = [name for name in accepted if name not in ("self", "cls", "args", "kwargs", "multimodal_kwargs")]
    for name in names:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = (hints or {}).get(name, f"did you mean {' or '.join(close)}?" if close else "")
        raise HookedModelError(f"{taker} takes no argument {name!r}: {hint or 'it has ' + ', '.join(known)}")


@functools.cache
def _refusal_of_kind(kind: type[Exception]) -> type[HookedModelError]:
    return type("HookedModelError", (HookedModelError, kind), {"__str__": Exception.__str__})


@contextmanager
def refusals(taker: str, advice: str = "") -> Iterator[None]:
    """While open, what another library raises becomes `HookedModelError`, in one line.

    The new error is also of the kind of the old one (an ``AttributeError`` stays one), for callers that
    expect that.

    Args:
        taker: the method or property, for the message.
        advice: what to do instead.

    Raises:
        HookedModelError: another error than this is raised inside.
    """
    try:
        yield
    except HookedModelError:
        raise
    except (*_KINDS, ValueError) as error:
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), ValueError)
        error_class = HookedModelError if kind is ValueError else _refusal_of_kind(kind)
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise error_class(f"{taker}: {one_line(str(text))}{advice and f'; {advice}'}") from error


def check_device(device: Any) -> None:
    """Refuse a device that this machine does not have or this build of torch cannot use (None: any).

    Raises:
        HookedModelError: it cannot be used.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = one_line(error).partition(". ")[0]
        device = str(device) if isinstance(device, torch.device) else device
        raise HookedModelError(f"device {device!r} cannot be used ({why}): try 'cpu'") from error
