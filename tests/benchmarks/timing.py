"""Side-by-side timing: both sides of a ratio take turns in one process."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    what: str
    against: str
    ratio: str
    wanted: str
    ours: str
    theirs: str


def take_turns(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def slowdown(what: str, ours: list[float], theirs: list[float], against: str, wanted: str) -> Row:
    """A row that says how many times longer ours takes: the median over rounds of their ratio."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Row(what, against, f"{ratio:.2f} x", wanted, _ms(ours), _ms(theirs))


def speedup(what: str, ours: list[float], theirs: list[float], against: str, wanted: str) -> Row:
    """A row that says how many times faster ours is, from the medians."""
    ratio = statistics.median(theirs) / statistics.median(ours)
    return Row(what, against, f"{ratio:.0f} x faster", wanted, _ms(ours), _ms(theirs))


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:,.0f} ms"
