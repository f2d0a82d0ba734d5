"""PyTorch's files read as data: tensors, numbers, text, containers of these. No code in a file is ever run.

``torch.load(weights_only=True)`` runs no code either, but lets a file of a hundred bytes ask for any amount
of memory, and gives up on pickled modules. Here the pickles are interpreted by `PickleMachine`, and this file
reads the two containers that ``torch.save`` writes: zip archives and the older format. Memory is bounded by
the size of the file.
"""

from __future__ import annotations

import io
import mmap
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hooked_models.errors import HookedModelError
from hooked_models.files.pickle_machine import LONGEST_PICKLE, PickleMachine, Storage, WantsCode, short_count

# Files that torch.save wrote before it wrote zip archives begin with this number, in a pickle of its own.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Bytes of a zip archive's directory; Python's reader makes some 15 times as many of them.
_LARGEST_DIRECTORY = 4 * 2**20


def read(path: Path, objects: bool = False) -> Any:
    """The content of a file that ``torch.save`` wrote.

    Objects become `StandIn`s, and names of classes and functions `Global`s. Tensors are mapped from the file
    and take memory only when they are read; writing to them does not change the file.

    Args:
        path: a file in PyTorch's zip format or the older one, of any pickle protocol.
        objects: whether the file may hold objects, such as a pickled module; without, they are refused.

    Raises:
        HookedModelError: the file is missing, empty, damaged, not PyTorch's, or wants code to be run.
    """
    if not path.is_file():
        # A pipe or a device would be read without end.
        found = "a folder" if path.is_dir() else "no plain file" if path.exists() else "missing"
        raise HookedModelError(f"{path} is {found}: expected a file")
    if not path.stat().st_size:
        raise HookedModelError(f"{path} is empty: fetch it again")
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if mapped[:4] == b"PK\x03\x04":
                return _read_zip(file, mapped, objects)
            return _read_legacy(mapped, objects)
    except WantsCode as error:
        raise HookedModelError(
            f"{path} wants to run code ({error}) and was not loaded: only plain tensors are read"
        ) from error
    except HookedModelError as error:
        raise HookedModelError(f"{path} {error}") from error
    except OSError:
        raise
    # Which exception a damaged file raises depends on where the damage is.
    except Exception as error:
        raise HookedModelError(f"{path} is truncated or damaged, or no PyTorch file of tensors") from error


def check_total_size(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors of a file that together declare more bytes than the file has.

    Tensors of a PyTorch file may share their numbers, so that a small file can name any number of large
    tensors, each of which takes memory of its own once it is converted. One of them may have a second name,
    as the embedding that a model also uses as its head.

    Raises:
        HookedModelError: the sum of the sizes is above the file's.
    """
    total, seen, twice = 0, set(), 0
    for tensor in tensors:
        place = (tensor.data_ptr(), tensor.nbytes)
        total += tensor.nbytes
        twice = max(twice, tensor.nbytes if place in seen else 0)
        seen.add(place)
    size = path.stat().st_size
    if total - twice > size:
        raise HookedModelError(
            f"{path} has {size:,} bytes, but declares tensors of {total:,}, which share their numbers: save "
            "each tensor's own numbers (tensor.clone())"
        )


def _read_zip(file: BinaryIO, mapped: mmap.mmap, objects: bool) -> Any:
    if _directory_size(mapped) > _LARGEST_DIRECTORY:
        raise HookedModelError(f"has a directory of more than {_LARGEST_DIRECTORY:,} bytes: not a checkpoint")
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    if any(info.filename.rpartition("/")[2] == "constants.pkl" for info in infos):
        raise HookedModelError("is a TorchScript program, which is code: only plain tensors are read")
    places = _entries(mapped, infos)
    pickles = [name for name in places if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("no pickle, or more than one")
    root = pickles[0].removesuffix("data.pkl")
    if places[pickles[0]][1] > LONGEST_PICKLE:
        raise HookedModelError(f"has a pickle of more than {LONGEST_PICKLE:,} bytes: not a checkpoint")

    def content(name: str) -> bytes:
        return mapped[places[name][0] : sum(places[name])]

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        begin, size = places[f"{root}data/{key}"]
        if size != count * dtype.itemsize:
            raise HookedModelError(
                f"declares {short_count(count)} numbers in {key[:20]!a}, but holds {size:,} bytes of them"
            )
        return _flat(mapped, begin, dtype, count)

    if f"{root}byteorder" in places and content(f"{root}byteorder") != b"little":
        raise HookedModelError("was written on a big-endian machine: load and save it there first")
    return PickleMachine(storage, objects).run(io.BytesIO(content(pickles[0])))


def _directory_size(mapped: mmap.mmap) -> int:
    """Bytes of the directory at the end of an archive, as the last record declares them."""
    record, locator, larger = mapped[-22:], mapped[-42:-38], mapped[-98:-42]
    if not (record.startswith(b"PK\x05\x06") and record.endswith(b"\0\0")):
        raise ValueError("no record at the end, or a comment after it")
    if locator == b"PK\x06\x07" and larger.startswith(b"PK\x06\x06"):  # the form for large files
        return int.from_bytes(larger[40:48], "little")
    return int.from_bytes(record[12:16], "little")


def _entries(mapped: mmap.mmap, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Begin and length of each file in an archive.

    Raises:
        HookedModelError: a file is compressed, damaged, a link or named outside of the archive, or two
        overlap.
    """
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = ascii(info.filename[:60])
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or info.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise HookedModelError(f"holds a file named {name}, outside of itself: not written by PyTorch")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise HookedModelError(f"holds a link, {name}: not written by PyTorch")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise HookedModelError(f"holds a compressed file, {name}: not written by PyTorch")
        lengths = mapped[info.header_offset + 26 : info.header_offset + 30]
        begin = info.header_offset + 30 + sum(int.from_bytes(x, "little") for x in (lengths[:2], lengths[2:]))
        if info.filename in places or info.header_offset < end:
            raise HookedModelError(f"holds two files in one place, {name}: not written by PyTorch")
        end = begin + info.file_size
        with memoryview(mapped) as whole, whole[begin:end] as part:
            # A checksum of 0 is one that PyTorch was asked to leave out.
            if len(part) != info.file_size or info.CRC not in (0, zlib.crc32(part)):
                raise HookedModelError(f"is truncated or damaged: {name} is not as saved")
        places[info.filename] = begin, info.file_size
    return places


def _read_legacy(mapped: mmap.mmap, objects: bool) -> Any:
    """The content of a file in the older format.

    It has five pickles (a number, the version, the system, the content, the keys of the storages), then the
    data of the storages in the order of their keys, each after its length.
    """
    head = io.BytesIO(mapped[:LONGEST_PICKLE])
    plain = PickleMachine(_no_storage, objects=False)
    if plain.run(head) != _LEGACY_MAGIC or plain.run(head) != 1001:
        raise ValueError("another format")
    if not plain.run(head)["little_endian"]:
        raise HookedModelError("was written on a big-endian machine: load and save it there first")
    # The data begins after the last pickle, so the content is read twice: first for the storages' sizes
    # alone.
    begin = head.tell()
    sizes = PickleMachine(
        lambda dtype, key, count: Storage(torch.empty(count, dtype=dtype, device="meta")), objects
    )
    sizes.run(head)
    keys = plain.run(head)
    position, places = head.tell(), {}
    for key in keys:
        values = sizes.storages[key].values
        if int.from_bytes(mapped[position : position + 8], "little") != len(values):
            raise ValueError("a storage of another size")
        places[key] = position + 8
        position += 8 + values.nbytes
    if position > len(mapped):
        raise ValueError("truncated")
    del sizes  # the content, once
    head.seek(begin)
    machine = PickleMachine(lambda dtype, key, count: _flat(mapped, places[key], dtype, count), objects)
    return machine.run(head)


def _no_storage(dtype: torch.dtype, key: str, count: int) -> Storage:
    raise ValueError("a storage in a pickle that has none")


def _flat(mapped: mmap.mmap, begin: int, dtype: torch.dtype, count: int) -> Storage:
    """The numbers that begin at a byte of the file: mapped, or copied where they are not aligned."""
    if not count:
        return Storage(torch.empty(0, dtype=dtype))
    if begin % dtype.itemsize:
        with memoryview(mapped) as whole, whole[begin : begin + count * dtype.itemsize] as part:
            aligned = bytearray(part)
        return Storage(torch.frombuffer(aligned, dtype=dtype, count=count))
    return Storage(torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin))
