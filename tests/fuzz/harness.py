"""Reads each mutation of a file in a child process, and says what came of it.

A child is forked for some tens of mutations, so that everything is imported once. Of each mutation it reports
what the reader did, the memory that its peak took beyond what the child had before, and what Python's audit
hooks saw. A child that dies (of a signal, of the time limit) is reported by its parent.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hooked_models import HookedModelError

SECONDS = 20  # of CPU, for one mutation
GROWTH, ALLOWANCE = 4, 200 * 10**6
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "pty.", "socket.connect")
_FORBIDDEN += ("pickle.find_class", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link", "os.symlink")
_FORBIDDEN += ("shutil.", "os.truncate", "os.kill", "webbrowser.", "ftplib.", "smtplib.", "urllib.Request")
_seen: list[str] | None = None


class Mutation(NamedTuple):
    """What is done to one file of a form."""

    file: str
    how: str
    content: bytes


class Form(NamedTuple):
    """A form of files that the packages read.

    Args:
        seeds: a sound example: contents by file name.
        read: reads a folder with such files, by the front door.
        writes: whether the reader may write into the folder itself.
    """

    name: str
    seeds: dict[str, bytes]
    read: Callable[[Path], Any]
    writes: bool = False


class Outcome(NamedTuple):
    """What became of a mutation: "loaded", "refused", or a fault."""

    mutation: Mutation
    verdict: str
    megabytes: float


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and args and isinstance(args[0], (str, bytes)):
        mode = args[1] if len(args) > 1 and isinstance(args[1], str) else ""
        if any(c in mode for c in "wax+"):
            _seen.append(f"open {os.fsdecode(args[0])} {mode}")
    elif event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {ascii(args)[:400]}")


sys.addaudithook(_audit)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def _read(form: Form, mutation: Mutation, folder: Path) -> tuple[str, float]:
    """The verdict on a mutation, and the megabytes that reading it took."""
    global _seen
    for name, content in form.seeds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(mutation.content if name == mutation.file else content)
    size = sum(len(content) for content in form.seeds.values()) + len(mutation.content)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, verdict = _status("VmRSS"), "loaded"
    space = _status("VmSize") + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _seen = []
    try:
        form.read(folder)
    except HookedModelError as error:
        verdict = "refused" if str(error).isprintable() and len(str(error)) < 2100 else "no printable line"
    except BaseException as error:  # a panic of Rust is no Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        verdict = f"{type(error).__name__}: {error!s:.200} ({last.filename}:{last.lineno})"
    finally:
        events, _seen = _seen, None
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grown = _status("VmHWM") - before
    did = [event for event in events if not event.startswith("open /dev/null")]
    if form.writes:
        did = [event for event in did if str(folder) not in event]
    if did:
        verdict = f"did {did[:3]}"
    elif grown > GROWTH * size + ALLOWANCE:
        verdict = f"grew by {grown / 1e6:.0f} MB from {size / 1e6:.1f} MB, {verdict}"
    return verdict, grown / 1e6


def run(form: Form, mutations: Sequence[Mutation], folder: Path, batch: int = 30) -> list[Outcome]:
    """The outcomes of reading mutations of a form, each in a folder of its own below ``folder``."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(mutations):
        waiting = mutations[len(outcomes) : len(outcomes) + batch]
        below = folder / f"{form.name}{len(outcomes)}"
        lines, status = _in_child(lambda w=waiting, at=below: _some(form, w, at))
        outcomes += [Outcome(m, *line) for m, line in zip(waiting, lines)]
        if len(lines) < len(waiting):
            died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
            verdict = f"ran for more than {SECONDS} s" if died == "SIGPROF" else f"died: {died}"
            outcomes.append(Outcome(waiting[len(lines)], verdict, 0.0))
    return outcomes


def _some(form: Form, mutations: Sequence[Mutation], folder: Path) -> Any:
    for mutation in mutations:
        folder.mkdir(parents=True, exist_ok=True)
        yield _read(form, mutation, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _in_child(work: Callable[[], Any]) -> tuple[list[tuple[str, float]], int]:
    """What an iterator gave in a forked child until it ended or died, and the child's status."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(out)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            for given in work():
                os.write(into, json.dumps(given).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(into)
    with open(out, encoding="utf-8") as file:
        lines = [tuple(json.loads(line)) for line in file]
    return lines, os.waitpid(child, 0)[1]


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Counts a form: mutations, loaded, refused, faults, and the largest growth in megabytes."""
    rows = ["form, mutations, loaded, refused, faults, most memory (MB)"]
    total: Counter[str] = Counter()
    for name, found in outcomes.items():
        counts = Counter(o.verdict if o.verdict in ("loaded", "refused") else "fault" for o in found)
        total += counts + Counter(mutations=len(found))
        most = max((o.megabytes for o in found), default=0.0)
        row = (name, len(found), counts["loaded"], counts["refused"], counts["fault"], f"{most:.0f}")
        rows.append(", ".join(map(str, row)))
    summed = (total["mutations"], total["loaded"], total["refused"], total["fault"])
    return "\n".join([*rows, ", ".join(map(str, ("all", *summed)))])
