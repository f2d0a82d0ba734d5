"""One run a folder: a lock that a second run on the same folder meets, and that ends with its process."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hooked_models.files.whole_files import remove_leftovers
from writesae_lens.errors import WriteSAEError

try:
    import fcntl
except ImportError:  # Windows: runs there are not kept apart
    fcntl = None

LOCK = ".writesae-lens.lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# Descriptors of the locks that this process has, by thread and folder.
_held: dict[tuple[int, str], int] = {}


@contextmanager
def locked(folder: str | Path | None, wait: float = 0.0) -> Iterator[None]:
    """Keep other processes and threads out of an output folder, and remove what killed ones left in it.

    The lock is the system's (flock on a hidden file), so it ends with the process that has it, however that
    ends; the file is removed at the end. Within one thread the calls nest.

    Args:
        folder: is created if it does not exist, and removed if it stays empty. None: nothing is locked.
        wait: seconds to wait for another run.

    Raises:
        WriteSAEError: another run is writing to the folder, or it cannot be made or written to.
        OSError: of the disk.
    """
    key = (threading.get_ident(), os.path.realpath(folder or ""))
    if folder is None or key in _held:
        yield
        return
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _held[key] = _acquire(folder, time.monotonic() + wait)
        try:
            remove_leftovers(folder)
            yield
        finally:
            descriptor = _held.pop(key, None)
            if descriptor is not None:  # None: in a forked process, which has no lock
                _release(descriptor, folder / LOCK)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _acquire(folder: Path, until: float) -> int:
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
            is_file = isinstance(error, (FileExistsError, NotADirectoryError))
            why = os.strerror(errno.ENOTDIR) if is_file else error.strerror
            raise WriteSAEError(f"{folder} cannot be made: {why}; give another folder") from error
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the run before has just removed its folder
            continue
        except PermissionError as error:
            raise WriteSAEError(
                f"{folder} cannot be written to: {error.strerror}; give another folder"
            ) from error
        try:
            _lock(descriptor, folder)
            # The run before may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _TAKEN:
                os.close(descriptor)
                raise
            if time.monotonic() >= until:
                os.close(descriptor)
                raise WriteSAEError(
                    f"another run is writing to {folder}: wait until it has ended, or give another folder"
                ) from error
            time.sleep(0.05)
        os.close(descriptor)


def _release(descriptor: int, path: Path) -> None:
    if fcntl is None:  # Windows removes no file that somebody has open
        os.close(descriptor)
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"no locks where {folder} is: two runs in it are not kept apart", stacklevel=4)


def _forget() -> None:
    """In a forked process: close the copies of the descriptors, so that a lock ends with its own process."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
