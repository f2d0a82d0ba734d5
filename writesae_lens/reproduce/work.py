"""What an experiment makes a model do, counted from its options before it is run.

Two things decide what an experiment costs: the tokens that it sends through the layers up to the cell's and
through those above it, and the positions that it unembeds and whose distributions it compares, each of which
is as wide as the vocabulary. `work_of` counts them for a declared experiment; `writesae_lens.reproduce.units`
has what one of each costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from writesae_lens.experiments.catalogue import Experiment

# What `replacement_test` and `compare` write beside the untrained stand-ins: atom, delete, random, and the
# last two at the native norm, which are not followed over later tokens.
_CONDITIONS, _OWN_ONLY = 5, 2
# Tokens whose logits every run checks first.
_CHECKED = 32
# Untrained stand-ins are made from as many training writes, or twice the features (`stand_ins.untrained`).
_LEAST_WRITES = 2048
# `later_divergences`: firings within so many tokens share a pass, and a pass has so many tokens in its rows.
_SPAN, _TOKENS_PER_PASS = 16, 2**11
# Prompts that are decoded in one batch.
_PROMPTS_PER_BATCH = 16
# Of a text's positions, those that `max_firings_per_atom=30` leaves in 64 passages on the shipped models.
_SHARE_OF_POPULATION = 0.6

Number = int | float
"""A count; an expected one need not be whole."""


class Work(NamedTuple):
    """Counts of what a model is to do; the products of a count and a number, and sums, are work too.

    Args:
        below: tokens through the layers up to and with the cell's.
        above: tokens through the layers above it; a derivative, forward or backward, counts as one more.
        unembedded: positions whose logits are computed.
        compared: positions at which distributions over the vocabulary are compared.
        calls: forward passes, each of which reads all weights and starts every operation once.
    """

    below: Number = 0
    above: Number = 0
    unembedded: Number = 0
    compared: Number = 0
    calls: Number = 0

    def plus(self, *others: Work) -> Work:
        """The sum of this work and others."""
        return Work(*map(sum, zip(self, *others, strict=True)))

    @property
    def tokens(self) -> Number:
        """Tokens of forward passes, of which a token that is run above the cell alone is one too."""
        return max(self.below, self.above)


class Text(NamedTuple):
    """What an experiment reads, and with which dictionaries.

    Args:
        passages, length: number and tokens of the passages.
        features: of each dictionary.
        codes: whether these are key and value codes.
        dictionaries: how many there are at a cell.
    """

    passages: int
    length: int
    features: int
    codes: bool = True
    dictionaries: int = 1

    @property
    def positions(self) -> int:
        return self.passages * self.length


def work_of(experiment: Experiment, text: Text, options: Mapping[str, Any] | None = None) -> Work:
    """The work of one experiment at one cell.

    A dictionary is taken to fire at every position. An experiment that is not counted here is taken to read
    its passages once, with all their logits.

    Args:
        experiment: of the catalogue.
        text: what it reads.
        options: those that differ from the experiment's defaults.
    """
    defaults = {name: option.default for name, option in experiment.options.items()}
    count = _COUNTS.get(experiment.name, _read_all)
    checked = _native(1, min(_CHECKED, text.length))
    return count(text, defaults | dict(options or {})).plus(checked)


def _reading(text: Text, times: int = 1) -> Work:
    """Passages up to the cell, where the dictionary encodes its writes."""
    return Work(below=text.positions * times, calls=text.passages * times)


def _native(passages: int, length: Number) -> Work:
    """Passages through all layers, without logits."""
    return Work(below=passages * length, above=passages * length, calls=passages)


def _rows(rows: Number, length: Number = 1, times: Number = 1) -> Work:
    """Rows of tokens through the layers above the cell; ``times`` counts derivatives."""
    return Work(above=rows * length * times)


def _logits(unembedded: Number, compared: Number = 0) -> Work:
    return Work(unembedded=unembedded, compared=compared)


def _swapped(text: Text, firings: Number, conditions: int) -> Work:
    """Branches of one token for each firing and condition, beside the native passages, with their KLs.

    What the lower layers make of the passages is taken to be there, from the pass that found the firings.
    """
    passages = int(min(text.passages, firings))
    branches = firings * conditions
    native = Work(above=passages * text.length, calls=passages)
    return native.plus(_rows(branches), _logits(branches + firings, branches))


def _later(text: Text, firings: Number, conditions: int, horizon: int) -> Work:
    """Rows of the tokens after each firing, which follow one cached prefix, with their KLs."""
    if not horizon:
        return Work()
    together = max(1.0, _SPAN * firings / text.positions)
    window = horizon + 1 + _SPAN * (1 - 1 / together)
    rows = firings * conditions
    passes = max(firings / together, rows * window / _TOKENS_PER_PASS)
    later = rows * horizon
    prefixes = Work(above=int(min(text.passages, firings)) * text.length, calls=firings / together)
    native = Work(calls=passes).plus(_logits(passes * window))
    return prefixes.plus(native, _rows(rows + passes, window), _logits(later, later))


def _untrained(text: Text, options: Mapping[str, Any]) -> tuple[int, Work]:
    """How many untrained stand-ins there are, and what reading the training writes for them takes."""
    if not options["baselines"]:
        return 0, Work()
    writes = max(_LEAST_WRITES, 2 * text.features)
    return 3 + text.codes, Work(below=writes, calls=writes / text.length)


def _firings(text: Text, options: Mapping[str, Any]) -> Number:
    return min(text.positions, options["max_firings"] or text.positions)


def _replace(text: Text, options: Mapping[str, Any]) -> Work:
    more, reading = _untrained(text, options)
    return _reading(text).plus(reading, _replaced(text, options, _firings(text, options), _CONDITIONS + more))


def _replaced(text: Text, options: Mapping[str, Any], firings: Number, conditions: int) -> Work:
    later = _later(text, firings, conditions - _OWN_ONLY, options["horizon"])
    return _swapped(text, firings, conditions).plus(later)


def _population(text: Text, options: Mapping[str, Any]) -> Work:
    more, reading = _untrained(text, options)
    firings = text.positions
    if (each := options["max_firings_per_atom"]) is not None:
        chosen = text.features / (2 if text.codes else 1)
        firings = min(_SHARE_OF_POPULATION * firings, each * chosen)
    return _reading(text).plus(reading, _replaced(text, options, firings, _CONDITIONS + more))


def _compare(text: Text, options: Mapping[str, Any]) -> Work:
    more, reading = _untrained(text, options)
    conditions = text.dictionaries + more + len(options["random"]) + 2
    replaced = _replaced(text, options, _firings(text, options), conditions)
    return _reading(text, text.dictionaries).plus(reading, replaced)


def _formula(text: Text, options: Mapping[str, Any]) -> Work:
    horizon = options["max_horizon"] + 1
    rows = text.passages * min(options["n_atoms"], text.features) * len(options["epsilons"])
    derivative = 2 if options["form"] == "exact" else 0
    # The followed tokens' logits are a few numbers a position, and cost nothing.
    return _reading(text).plus(
        _native(text.passages, (text.length - horizon) / 2 + 2 * horizon),
        _rows(rows, horizon, 1 + derivative),
        _logits(text.passages * horizon),
        Work(calls=text.passages * 4),
    )


def _erase(text: Text, options: Mapping[str, Any]) -> Work:
    places, doses = _firings(text, options), len(options["doses"])
    # Half of them choose the token; the others are tested twice, and as many as all where nothing fires.
    choosing = places / 2 if options["token"] is None else 0
    tested = doses * (2 * (places - choosing) + places)
    passages = int(min(text.passages, places))
    native = Work(above=passages * text.length, calls=passages)
    rows = _rows(choosing + tested), _logits(choosing + tested + 2 * places, tested)
    return _reading(text).plus(native, *rows)


def _sign(text: Text, options: Mapping[str, Any]) -> Work:
    trials = options["n_trials"]
    # The derivative goes through the passages' own tokens too.
    gradient = Work(above=2 * text.positions, calls=text.passages)
    gradient = gradient.plus(_rows(trials, 1, 2), _logits(2 * trials))
    return _reading(text).plus(gradient, _swapped(text, trials, 1))


def _decoded(rows: Number, tokens: int, batches: Number) -> Work:
    """Rows that are decoded token by token, in batches."""
    return Work(rows * tokens, rows * tokens, rows * tokens, 0, batches * tokens)


def _install(text: Text, options: Mapping[str, Any]) -> Work:
    prompts, n_tokens, positions = text.passages, options["n_tokens"], options["positions"]
    targets = len(options["strata"] if options["targets"] is None else options["targets"])
    edits = prompts * targets
    for swept in (options["magnitude"], options["n_cells"]):
        edits *= max(1, len(swept)) if isinstance(swept, (tuple, list)) else 1
    batches = -(-prompts // _PROMPTS_PER_BATCH)
    times, steps, compared = 0, n_tokens, 1
    if options["direction"] == "greedy":  # the margins of the target, and of what is said natively
        steps, compared = min(n_tokens, options["n_ahead"]), 2
    if options["direction"] != "unembedding":  # forward and backward: the gradient, then the refinements
        times = 2 + (2 * options["n_refinements"] + 1 if options["n_refinements"] else 0)
    read = (prompts + 2 * edits) * (positions + n_tokens - 1)
    return _reading(text).plus(
        _native(prompts, text.length + positions + n_tokens),
        _rows(edits, positions + steps - 1, times),
        _logits(edits * steps * times * compared),
        Work(calls=batches * times),
        _decoded(prompts, n_tokens, batches),
        _decoded(edits * 2, n_tokens, 2 * batches),
        # The perplexity of what is said, under the unedited model.
        Work(read, read, (prompts + 2 * edits) * n_tokens, 0, 3 * batches),
    )


def _splice(text: Text, options: Mapping[str, Any]) -> Work:
    second = 3 * text.positions / 2
    return _native(text.passages, 3 * text.length).plus(_logits(second, second))


def _amplify(text: Text, options: Mapping[str, Any]) -> Work:
    rows = text.passages * (len(options["factors"]) + 2)
    batches = -(-text.passages // _PROMPTS_PER_BATCH)
    drawn = rows * options["n_tokens"] if options["temperature"] else 0
    return _reading(text).plus(
        _native(text.passages, text.length),
        _decoded(rows, options["n_tokens"], batches),
        _logits(0, drawn),
    )


def _selectivity(text: Text, options: Mapping[str, Any]) -> Work:
    positions = text.passages * options["n_positions"]
    each = 2 * min(options["n_atoms"], text.features)
    return _reading(text, 3).plus(_swapped(text, positions, each), _logits(0, positions * each))


def _trace(text: Text, options: Mapping[str, Any]) -> Work:
    horizon = options["max_horizon"] + 1
    rows = text.passages * 2 * min(options["n_atoms"], text.features)
    native = _native(text.passages, (text.length - horizon) / 2 + 2 * horizon)
    return _reading(text).plus(native, _rows(rows, horizon), _logits(rows * horizon))


def _read_once(text: Text, options: Mapping[str, Any]) -> Work:
    return _reading(text)


def _stability(text: Text, options: Mapping[str, Any]) -> Work:
    return _reading(text, text.dictionaries + 1)


def _read_all(text: Text, options: Mapping[str, Any]) -> Work:
    return _native(text.passages, text.length).plus(_logits(text.positions))


_COUNTS: dict[str, Callable[[Text, Mapping[str, Any]], Work]] = {
    "replace": _replace,
    "population": _population,
    "partition": _read_once,
    "formula": _formula,
    "erase": _erase,
    "sign": _sign,
    "install": _install,
    "splice": _splice,
    "amplify": _amplify,
    "compare": _compare,
    "contexts": _read_once,
    "selectivity": _selectivity,
    "trace": _trace,
    "stability": _stability,
}
