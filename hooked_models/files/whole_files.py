"""Writing files that a reader finds whole or not at all, however the process that writes them ends.

New files are made under temporary names in the folder where they belong, their contents are brought to the
disk, and then they are renamed. A process that is killed, or whose disk is full, leaves files of temporary
names behind at most; `remove_leftovers` removes them.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PREFIX, _SUFFIX = ".writesae-lens.", ".part"
# Errors of a full or failing disk; the system does not name the file in them.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What a file system answers that cannot bring a folder to the disk.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOTSUP)


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has one of the temporary names of this module."""
    return path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder under temporary names.

    The caller makes sure that no other process is writing there.
    """
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        _remove(path)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file of a temporary name beside ``path``, then rename it to ``path``.

    Raises:
        OSError: of ``write``, or of the disk; then ``path`` is as it was.
    """
    beside = path.parent / _temporary_name()
    try:
        with _naming(path):
            write(beside)
            _sync(beside)
            os.replace(beside, path)
            _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(folder: Path, last: Sequence[str] = (), stale: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary folder whose files, in subfolders too, take their places in ``folder`` all together.

    That happens when the block ends without an error: the old files of the same names are removed, then the
    new ones renamed. Files named in ``last`` are the first to be removed and the last to be there, so whoever
    finds one of them finds old files only, or all new ones. Other files of the folder stay.

    Args:
        folder: is created if it does not exist.
        last: names of the files that a reader looks for first (a result's summary, an SAE's cfg.json), in the
            order in which they are put into place, after all others.
        stale: files of the earlier contents, to be removed where no new file has the name.

    Yields:
        the temporary folder.

    Raises:
        OSError: of the disk; if it is full, ``folder`` is as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / _temporary_name()
    try:
        with _naming(folder):
            beside.mkdir()
            yield beside
            _switch(beside, folder, last, stale)
    finally:
        _remove(beside)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error.

    A folder that is there already is replaced.

    Raises:
        OSError: of the disk; then ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, old = path.parent / _temporary_name(), path.parent / _temporary_name()
    try:
        with _naming(path):
            beside.mkdir()
            yield beside
            _finish(beside)
            if path.exists():
                os.rename(path, old)
            os.rename(beside, path)
            _sync(path.parent)
    finally:
        _remove(beside)
        _remove(old)


def _temporary_name() -> str:
    return f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"


def _switch(beside: Path, folder: Path, last: Sequence[str], stale: Iterable[Path]) -> None:
    def rank(path: Path) -> tuple[int, str]:
        return (last.index(path.name) + 1 if path.name in last else 0), str(path)

    new = sorted((path.relative_to(beside) for path in _finish(beside)), key=rank)
    for parent in {(folder / path).parent for path in new}:
        parent.mkdir(parents=True, exist_ok=True)
    old = {folder / path for path in new} | set(stale)
    for path in old:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    near: dict[Path, Path] = {}
    try:
        for path in new:
            near[path] = _on_disk_of(folder / path, beside / path)
        for path in sorted((path for path in old if os.path.lexists(path)), key=rank, reverse=True):
            path.unlink()
        _sync(folder)
        for path in new:
            os.rename(near[path], folder / path)
    finally:
        for path, file in near.items():
            if file != beside / path:
                file.unlink(missing_ok=True)
    for parent in {(folder / path).parent for path in new} | {folder}:
        _sync(parent)


def _on_disk_of(place: Path, file: Path) -> Path:
    """The file, or a whole copy beside its place, where a link to another disk stands between the two."""
    if place.parent.stat().st_dev == file.stat().st_dev:
        return file
    copy = place.parent / _temporary_name()
    try:
        shutil.copyfile(file, copy)
        copy.chmod(file.stat().st_mode & 0o777)
        _sync(copy)
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    return copy


def _finish(folder: Path) -> list[Path]:
    """Bring all files of a temporary folder to the disk, with the permissions that the user's umask gives."""
    mode = folder.stat().st_mode & 0o666  # mkdir has applied the umask; some libraries write 0600
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        _sync(path)
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        _sync(path)
    return files


def _sync(path: Path) -> None:
    """Bring a file's contents, or a folder's entries, to the disk."""
    # Windows brings only files to the disk that are open for writing.
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NOT_FOR_FOLDERS):
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put a path into errors of the disk, which name no file or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            error.filename = str(path)
        raise
