"""Work in a forked process that is killed, or whose disk is full, at one of its file operations.

The parent imports and loads once; each point costs a fork and what the work itself takes.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hooked_models import HookedModelError

# Events of Python's audit hooks that stand for a file operation.
CREATING = ("open", "os.mkdir", "os.link", "os.symlink")
OTHERS = ("os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FINISHED, REFUSED, BROKEN = 0, 2, 3


class End(NamedTuple):
    """How a process ended: its exit status (None: killed), the file operations that it had begun (a letter
    each: c creates something, o does not), and its error.
    """

    status: int | None
    operations: str
    said: str

    def creating(self) -> list[int]:
        """Numbers of the operations that create something; the first of all operations is 1."""
        return [number for number, letter in enumerate(self.operations, 1) if letter == "c"]


def _is_operation(event: str, args: tuple[Any, ...], root: str) -> bool:
    if event == "open":
        path, _, flags = args
        return isinstance(path, (str, bytes, os.PathLike)) and bool(flags & _WRITES) and _inside(path, root)
    if event in CREATING or event in OTHERS:
        # Names within an open folder (shutil.rmtree) are relative: all of them are ours.
        return any(isinstance(x, int) and x >= 0 for x in args[2:]) or _inside(args[0], root)
    return False


def _inside(path: Any, root: str) -> bool:
    return not isinstance(path, int) and os.fsdecode(path).startswith(root)


def end_of(
    work: Callable[[], Any],
    root: Path,
    kill_at: int | None = None,
    full_from: int | None = None,
    largest: int | None = None,
) -> End:
    """Do some work in a fork.

    Args:
        work: what to do; an OSError or an error of the package counts as refused.
        root: file operations below it count.
        kill_at: kill the process before this operation (the first is 1).
        full_from: from this operation on nothing can be created: the disk is full.
        largest: bytes of the largest file that can be written, by whatever library.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return End(None, content.split(b"\0")[0].decode(), "")
        operations, _, said = content.partition(b"\0")
        return End(os.WEXITSTATUS(status), operations.decode(), said.decode(errors="replace"))
    os.close(reading)
    status, said = BROKEN, ""
    try:
        _limit(writing, str(root), kill_at, full_from, largest)
        work()
        status = FINISHED
    except (HookedModelError, OSError) as error:
        status, said = REFUSED, f"{type(error).__name__}: {error}"
    except BaseException:
        said = traceback.format_exc()
    finally:
        os.write(writing, b"\0" + said.encode(errors="replace")[-4000:])
        os._exit(status)


def _limit(pipe: int, root: str, kill_at: int | None, full_from: int | None, largest: int | None) -> None:
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if not _is_operation(event, args, root):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        creating = event in CREATING and not (event == "os.mkdir" and os.path.isdir(args[0]))
        os.write(pipe, b"c" if creating else b"o")
        if full_from is not None and count >= full_from and creating:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])

    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.addaudithook(watch)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder have exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def some(points: Sequence[int], at_most: int | None) -> list[int]:
    """All points, or evenly spread ones with the first and the last."""
    if at_most is None or len(points) <= at_most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (at_most - 1))] for i in range(at_most)]
