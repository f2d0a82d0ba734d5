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
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooked_models.errors import HookedModelError

# A pickle holds no numbers of tensors, only what they are called: the largest seen are of some hundred KiB.
_LONGEST_PICKLE = 16 * 2**20
_MOST_AXES = 8
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
    except (Exception, RecursionError) as error:
        raise HookedModelError(f"{path} is truncated or damaged, or no PyTorch file of tensors") from error


def _read_zip(file: Any, mapped: mmap.mmap, objects: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    _check_entries(infos)
    entries = {info.filename: info for info in infos}
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("no pickle, or more than one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise HookedModelError("is a TorchScript program, which is code: only plain tensors are read")
    if entries[pickles[0]].file_size > _LONGEST_PICKLE:
        raise HookedModelError(f"has a pickle of more than {_LONGEST_PICKLE:,} bytes: not a checkpoint")

    def begin_of(info: zipfile.ZipInfo) -> int:
        lengths = mapped[info.header_offset + 26 : info.header_offset + 30]
        begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
        begin += int.from_bytes(lengths[2:], "little")
        with memoryview(mapped) as whole, whole[begin : begin + info.file_size] as part:
            # PyTorch can be told to leave the checksum out.
            if len(part) != info.file_size or info.CRC not in (0, zlib.crc32(part)):
                raise HookedModelError(f"is truncated or damaged: {info.filename[:60]!a} is not as saved")
        return begin

    def content(name: str) -> bytes:
        return mapped[(begin := begin_of(entries[name])) : begin + entries[name].file_size]

    def storage(dtype: torch.dtype, key: str, count: int) -> _Storage:
        info = entries[f"{root}data/{key}"]
        if info.file_size != count * dtype.itemsize:
            held = f"{info.file_size:,} bytes of them"
            raise HookedModelError(f"declares {_short(count)} numbers in {key[:20]!a}, but holds {held}")
        return _flat(mapped, begin_of(info), dtype, count)

    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise HookedModelError("was written on a big-endian machine: load and save it there first")
    return _Machine(storage, objects).run(io.BytesIO(content(pickles[0])))


def _check_entries(infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise HookedModelError("holds two files of one name: not written by PyTorch")
    for info in infos:
        name = ascii(info.filename[:60])
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or info.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise HookedModelError(f"holds a file named {name}, outside of itself: not written by PyTorch")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise HookedModelError(f"holds a link, {name}: not written by PyTorch")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise HookedModelError(f"holds a compressed file, {name}: not written by PyTorch")


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
    found: dict[str, tuple[torch.dtype, int]] = {}

    def without_data(dtype: torch.dtype, key: str, count: int) -> _Storage:
        if found.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError("one storage, two sizes")
        return _Storage(torch.empty(count, dtype=dtype, device="meta"))

    _Machine(without_data, objects).run(head)
    keys = plain.run(head)
    at, places = head.tell(), {}
    for key in keys:
        dtype, count = found[key]
        if int.from_bytes(mapped[at : at + 8], "little") != count:
            raise ValueError("a storage of another size")
        places[key] = at + 8
        at += 8 + count * dtype.itemsize
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
    """Interprets one pickle; ``storage`` finds the numbers that it speaks of."""

    def __init__(self, storage: Callable[[torch.dtype, str, int], _Storage], objects: bool) -> None:
        self.storage, self.objects = storage, objects
        self.made: list[StandIn] = []

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
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise WantsCode(f"pickle's {name}")
        for made in self.made:
            if not isinstance(made.state, dict):
                raise WantsCode(str(made.of))
        return stack.pop()

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise ValueError("a call of what is no function")
        module, name = function
        match function:
            case ("torch._utils", "_rebuild_tensor_v2"):
                return self._tensor(*arguments[:4])
            case ("torch._utils", "_rebuild_parameter"):
                if not isinstance(arguments[0], Tensor):
                    raise ValueError("a parameter without a tensor")
                return arguments[0]
            case ("collections", "OrderedDict"):
                made: dict[Any, Any] = {}
                for key, value in arguments[0] if arguments else ():
                    _fill(made, [key, value])
                return made
            case ("torch", "Size"):
                return tuple(arguments[0])
            case ("torch", "device"):
                return ":".join(str(x)[:20] for x in arguments)
            case ("_codecs", "encode") if arguments[1] in ("latin1", "latin-1"):
                return arguments[0].encode("latin1")
            case ("builtins" | "__builtin__", "set" | "frozenset"):
                return list(arguments[0])
            case ("copyreg" | "copy_reg", "_reconstructor"):
                kind, _, value = arguments
                return self._object(kind, () if value is None else (value,))
            case ("numpy", "dtype"):
                return Global("numpy", str(arguments[0])[:8])
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar"):
                kind = arguments[0].name
                if kind not in ("f2", "f4", "f8", "i4", "i8", "b1"):
                    raise ValueError("a number of another kind")
                return np.frombuffer(arguments[1], dtype=kind, count=1)[0].item()
            case _ if module.split(".")[0] == "pathlib" and name.endswith("Path"):
                return "/".join(str(part) for part in arguments)
        raise WantsCode(str(function))

    def _object(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(kind, Global):
            raise ValueError("an object of what is no class")
        if kind == ("collections", "OrderedDict"):
            return {}
        if kind == ("torch.torch_version", "TorchVersion"):
            return str(arguments[0])
        if not self.objects or arguments:
            raise WantsCode(str(kind))
        made = StandIn(kind)
        self.made.append(made)
        return made

    def _build(self, made: Any, state: Any) -> None:
        if isinstance(made, StandIn):
            made.state = {}
            for attributes in state if isinstance(state, tuple) else (state,):  # and those in slots
                made.state |= attributes or {}
        elif not (type(made) is dict or isinstance(made, Global)):  # an OrderedDict's, a number type's
            raise ValueError("a state for what has none")

    def _stored(self, reference: Any) -> _Storage:
        _, kind, key, _, count = reference[:5]
        named = isinstance(kind, Global) and kind.module in ("torch", "torch.cuda")
        if not named or kind.name not in _DTYPES or type(key) is not str or type(count) is not int:
            raise ValueError(f"numbers of an unknown kind, {kind}")
        if count < 0 or (len(reference) > 5 and reference[5] is not None):
            raise ValueError("a storage of another form")
        return self.storage(_DTYPES[kind.name], key, count)

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
