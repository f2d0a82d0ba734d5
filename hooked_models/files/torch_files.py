"""PyTorch's files read as data: tensors, numbers, text, containers of these; nothing in them is ever run.

``torch.load(weights_only=True)`` runs no code either, but lets a file of a hundred bytes ask for any amount
of memory, and gives up on pickled modules. Here a machine of the pickle opcodes that make data works on
`pickletools.genops`; it imports nothing that a file names, and the memory that it takes is bounded by the
size of the file.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import re
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hooked_models.errors import HookedModelError

# A pickle holds no numbers of tensors, only what they are called: the largest seen are of some hundred KiB.
_LONGEST_PICKLE = 16 * 2**20
_MOST_AXES = 8
_T = TypeVar("_T")
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What torch.save wrote before its files were zip archives begins with this number in a pickle of its own.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Global(NamedTuple):
    """The name of a class or function; what bears it is never looked for."""

    module: str
    name: str

    def __str__(self) -> str:
        # As one printable line, whatever the file says.
        return ascii(f"{self.module}.{self.name}"[:80])[1:-1]


class StandIn:
    """An object that a file describes: the name of its class, and its attributes."""

    def __init__(self, of: Global) -> None:
        self.of = of
        self.state: Any = None


class WantsCode(ValueError):
    """A file asks for a call of something that is not on the list."""


class _Storage(NamedTuple):
    values: Tensor  # flat


def read(path: Path, objects: bool = False) -> Any:
    """What ``torch.save`` wrote, with `StandIn` and `Global` in the places of objects and names of code.

    Tensors are mapped from the file, privately: they cost memory as they are read.

    Args:
        path: a file in PyTorch's zip format or the older one, of any pickle protocol.
        objects: whether objects may stand in it (as in a pickled module); without, they are refused.

    Raises:
        HookedModelError: the file is missing, empty, damaged, no such file, or wants code to be run.
    """
    if not path.is_file():
        raise HookedModelError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: expected a file")
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
    # What a damaged file raises depends on where the damage is.
    except Exception as error:
        raise HookedModelError(f"{path} is truncated or damaged, or no PyTorch file of tensors") from error


def _read_zip(file: Any, mapped: mmap.mmap, objects: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    if any(info.filename.rpartition("/")[2] == "constants.pkl" for info in infos):
        raise HookedModelError("is a TorchScript program, which is code: only plain tensors are read")
    places = _places(mapped, infos)
    pickles = [name for name in places if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("no pickle, or more than one")
    root = pickles[0].removesuffix("data.pkl")
    if places[pickles[0]][1] > _LONGEST_PICKLE:
        raise HookedModelError(f"has a pickle of more than {_LONGEST_PICKLE:,} bytes: not a checkpoint")

    def content(name: str) -> bytes:
        return mapped[places[name][0] : sum(places[name])]

    def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
        begin, size = places[f"{root}data/{key}"]
        if size != count * dtype.itemsize:
            raise HookedModelError(
                f"declares {_short(count)} numbers in {key[:20]!a}, but holds {size:,} bytes of them"
            )
        return _flat(mapped, begin, dtype, count)

    if f"{root}byteorder" in places and content(f"{root}byteorder") != b"little":
        raise HookedModelError("was written on a big-endian machine: load and save it there first")
    return _Machine(storage, objects).run(io.BytesIO(content(pickles[0])))


def _places(mapped: mmap.mmap, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Where each file of an archive begins and how long it is; all must lie whole and apart."""
    places: dict[str, tuple[int, int]] = {}
    at = 0
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
        if info.filename in places or info.header_offset < at:
            raise HookedModelError(f"holds two files in one place, {name}: not written by PyTorch")
        at = begin + info.file_size
        with memoryview(mapped) as whole, whole[begin:at] as part:
            # PyTorch can be told to leave the checksum out.
            if len(part) != info.file_size or info.CRC not in (0, zlib.crc32(part)):
                raise HookedModelError(f"is truncated or damaged: {name} is not as saved")
        places[info.filename] = begin, info.file_size
    return places


def _read_legacy(mapped: mmap.mmap, objects: bool) -> Any:
    """Pickles of a number, the version, the system, what was saved and the storages' keys; then data."""
    head = io.BytesIO(mapped[:_LONGEST_PICKLE])
    plain = _Machine(_no_storage, objects=False)
    if plain.run(head) != _LEGACY_MAGIC or plain.run(head) != 1001:
        raise ValueError("another format")
    if not plain.run(head)["little_endian"]:
        raise HookedModelError("was written on a big-endian machine: load and save it there first")
    # Where data begins is known after the last pickle only: a first reading of the fourth finds its sizes.
    begin = head.tell()
    sizes = _Machine(
        lambda dtype, key, count: _Storage(torch.empty(count, dtype=dtype, device="meta")), objects
    )
    sizes.run(head)
    keys = plain.run(head)
    at, places = head.tell(), {}
    for key in keys:
        values = sizes.storages[key].values
        if int.from_bytes(mapped[at : at + 8], "little") != len(values):
            raise ValueError("a storage of another size")
        places[key] = at + 8
        at += 8 + values.nbytes
    if at > len(mapped):
        raise ValueError("truncated")
    head.seek(begin)
    machine = _Machine(lambda dtype, key, count: _flat(mapped, places[key], dtype, count), objects)
    return machine.run(head)


def _no_storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
    raise ValueError("a storage where none belongs")


def _flat(mapped: mmap.mmap, begin: int, dtype: torch.dtype, count: int) -> _Storage:
    if not count:
        return _Storage(torch.empty(0, dtype=dtype))
    if begin % dtype.itemsize:
        aligned = bytearray(mapped[begin : begin + count * dtype.itemsize])
        return _Storage(torch.frombuffer(aligned, dtype=dtype, count=count))
    return _Storage(torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin))


# Opcodes that push what stands with them.
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"}
_VALUES |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Sets are lists here: nothing needs their order of look-up, and hashes of nested tuples can overflow.
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_FROM_MARK = {"LIST": list, "TUPLE": tuple, "FROZENSET": list}


class _Machine:
    """Interprets one pickle; ``storage`` finds the numbers that it speaks of, once for each name."""

    def __init__(self, storage: Callable[[torch.dtype, str, int], _Storage], objects: bool) -> None:
        self.storage, self.objects = storage, objects
        self.storages: dict[str, _Storage] = {}
        self.made: list[StandIn] = []
        self.left = _LONGEST_PICKLE

    def run(self, stream: io.BytesIO) -> Any:
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks under the marks
        memo: dict[int, Any] = {}

        def popped() -> list[Any]:
            nonlocal stack
            top, stack = stack, below.pop()
            return top

        for opcode, arg, _ in pickletools.genops(stream):
            name: str = opcode.name
            if name in _VALUES:
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(arg)] = stack[-1]  # type: ignore[arg-type]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[int(arg)])  # type: ignore[arg-type]
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                below.append(stack)
                stack = []
            elif name in _FROM_MARK:
                items = popped()
                stack.append(_FROM_MARK[name](items))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ("APPENDS", "ADDITEMS"):
                items = popped()
                _extend(stack[-1], items)
            elif name == "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            elif name in ("SETITEMS", "DICT"):
                items = popped()
                if name == "DICT":
                    stack.append({})
                _fill(stack[-1], items)
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            elif name == "GLOBAL":
                stack.append(Global(*str(arg).split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not (type(attribute) is type(module) is str):
                    raise ValueError("a name that is no text")
                stack.append(Global(module, attribute))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            elif name in ("NEWOBJ", "NEWOBJ_EX"):
                options = stack.pop() if name == "NEWOBJ_EX" else {}
                arguments, kind = stack.pop(), stack.pop()
                stack.append(self._object(kind, (*arguments, *options.values())))
            elif name == "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(self._stored(stack.pop()))
            elif name == "POP":
                # A pickle may pop a mark, as Python's own machine lets it.
                if stack:
                    stack.pop()
                else:
                    popped()
            elif name == "POP_MARK":
                popped()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name in ("INST", "OBJ"):
                kind = Global(*str(arg).split(" ", 1)) if name == "INST" else popped()[0]
                raise WantsCode(str(kind) if isinstance(kind, Global) else "an unnamed class")
            elif name.startswith("EXT"):
                raise WantsCode(f"pickle's {name}")
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"{name}, which PyTorch does not write")
        for made in self.made:
            if not isinstance(made.state, dict):
                raise WantsCode(str(made.of))
        return stack.pop()

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise ValueError("a call of what is no function")
        # What a pickle makes once it can name many times, so nothing here copies what it is given.
        match function:
            case ("torch._utils", "_rebuild_tensor_v2"):
                return self._tensor(*arguments[:4])
            case ("torch._utils", "_rebuild_parameter"):
                return _typed(arguments[0], Tensor)
            case ("collections", "OrderedDict") if not arguments:
                return {}
            case ("torch", "Size"):
                return _typed(arguments[0], tuple)
            case ("builtins" | "__builtin__", "set" | "frozenset"):
                return _typed(arguments[0], list)
            case ("builtins" | "__builtin__", "bytes") if not arguments:
                return b""
            case ("_codecs", "encode") if arguments[1] in ("latin1", "latin-1"):
                text = _typed(arguments[0], str)
                self._spend(len(text))
                return text.encode("latin1")
            case ("copyreg" | "copy_reg", "_reconstructor"):
                kind, _, value = arguments
                return self._object(kind, () if value is None else (value,))
            case ("numpy", "dtype"):
                return Global("numpy", _typed(arguments[0], str))
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar"):
                kind = _typed(arguments[0], Global).name
                if not re.fullmatch("[fiu][1248]|b1", kind):
                    raise ValueError("a number of another kind")
                return np.frombuffer(_typed(arguments[1], bytes), dtype=kind, count=1)[0].item()
        module, name = function
        if function == ("torch", "device") or (module.split(".")[0] == "pathlib" and name.endswith("Path")):
            return function  # which one does not matter
        raise WantsCode(str(function))

    def _object(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        _typed(kind, Global)
        if kind == ("collections", "OrderedDict"):
            return {}
        if kind == ("torch.torch_version", "TorchVersion"):
            return _typed(arguments[0], str)
        if not self.objects or arguments:
            raise WantsCode(str(kind))
        made = StandIn(kind)
        self.made.append(made)
        return made

    def _build(self, made: Any, state: Any) -> None:
        if isinstance(made, StandIn):
            attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if slots:
                plain = _typed(attributes or {}, dict)
                self._spend(len(_typed(slots, dict)) + len(plain))
                attributes = {**plain, **slots}
            made.state = attributes
        elif not (type(made) is dict or isinstance(made, Global)):  # an OrderedDict's, a number type's
            raise ValueError("a state for what has none")

    def _spend(self, size: int) -> None:
        """What is copied is part of the pickle, so that no honest one copies more than it is long."""
        self.left -= size
        if self.left < 0:
            raise HookedModelError("makes more of its pickle than is in it: not written by PyTorch")

    def _stored(self, reference: Any) -> Any:
        if reference[0] == "module" and isinstance(reference[1], Global):
            return reference[1]  # a class, with its source
        _, kind, key, _, count = reference[:5]
        named = isinstance(kind, Global) and kind.module in ("torch", "torch.cuda")
        if not named or kind.name not in _DTYPES or type(key) is not str or type(count) is not int:
            raise ValueError("numbers of an unknown kind")
        if count < 0 or (len(reference) > 5 and reference[5] is not None):
            raise ValueError("a storage of another form")
        dtype = _DTYPES[kind.name]
        if key not in self.storages:
            self.storages[key] = self.storage(dtype, key, count)
        found = self.storages[key]
        if found.values.dtype != dtype or len(found.values) != count:
            raise ValueError("one storage, two sizes")
        return found

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        whole = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > _MOST_AXES:
            raise ValueError("a tensor of another form")
        if any(type(n) is not int or n < 0 for n in whole):
            raise ValueError("sizes that are no sizes")
        held, count = len(storage.values), math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
        if count > held or last >= max(held, 1):
            shape = " x ".join(map(_short, size))
            raise HookedModelError(f"declares a tensor of {shape} numbers, but holds {held:,} for it")
        return storage.values.as_strided(tuple(size), tuple(stride), offset)


def _typed(x: Any, kind: type[_T]) -> _T:
    if not isinstance(x, kind):
        raise ValueError("something of another type")
    return x


def _short(count: int) -> str:
    """A number that a file declares, however large."""
    return f"{count:,}" if abs(count) < 10**15 else "over 10^15"


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError("items for what is no list")
    target.extend(items)


def _fill(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items for what is no dict")
    for key, value in zip(items[::2], items[1::2]):
        if key is not None and type(key) not in (str, int, float, bool, bytes):
            raise ValueError("a key that is no name")
        target[key] = value
