"""A pickle read as data: an interpreter of the opcodes that make tensors, numbers, text and containers.

It works on `pickletools.genops`, imports nothing that a pickle names and calls nothing but the functions in
`PickleMachine._call`. All that one file's pickles make may take `MOST_MEMORY`, by the costs below.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hooked_models.errors import HookedModelError

LONGEST_PICKLE = 16 * 2**20
"""Bytes that a pickle may have. Without the numbers of tensors, real ones have some hundred KiB at most."""
MOST_MEMORY = 96 * 2**20
"""Bytes that the objects of one pickle may take. A tensor in a state dict takes about 3 KiB of them."""
_MOST_AXES = 8
# Bytes that an opcode's work may leave in memory, where that is more than a number or a place in a list: a
# pickle of one-byte opcodes could otherwise grow a hundredfold. The values that follow an opcode come on top.
_LEAST_COST = 48
_COSTS: dict[str, int] = dict.fromkeys(("EMPTY_DICT", "DICT"), 224)
_COSTS |= dict.fromkeys(("EMPTY_LIST", "EMPTY_SET", "MARK", "LIST", "FROZENSET"), 128)
_COSTS |= dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM"), 96)
_COSTS |= dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), 128)
_COSTS |= dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), 256)
_COSTS |= dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BINPERSID"), 800)  # a tensor, a storage, an object
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


class Global(NamedTuple):
    """The name of a class or function in a pickle. The class or function itself is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        # One short printable line, whatever the file contains.
        return ascii(f"{self.module}.{self.name}"[:80])[1:-1]


class StandIn:
    """An object in a pickle, as data: the name of its class (``of``) and its attributes (``state``)."""

    def __init__(self, of: Global) -> None:
        self.of = of
        self.state: Any = None


class WantsCode(ValueError):
    """A pickle calls a function or makes an object that is not allowed."""


class Storage(NamedTuple):
    """The numbers behind one or several tensors."""

    values: Tensor  # flat


# Opcodes that push the value that follows them.
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"}
_VALUES |= {"BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Sets become lists: no reader looks members up, and hashing nested tuples can overflow the stack.
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_FROM_MARK = {"LIST": list, "TUPLE": tuple, "FROZENSET": list}


class PickleMachine:
    """Interprets pickles of one file.

    Args:
        storage: returns the storage of (dtype, key, number of elements); called once for each key.
        objects: whether a pickle may describe objects, which become `StandIn`s.
    """

    def __init__(self, storage: Callable[[torch.dtype, str, int], Storage], objects: bool) -> None:
        self.storage, self.objects = storage, objects
        self.storages: dict[str, Storage] = {}
        self._stand_ins: list[StandIn] = []
        self._memory_left = MOST_MEMORY
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []  # one for each open mark

    def run(self, stream: io.BytesIO) -> Any:
        """The object in the next pickle of a stream.

        Raises:
            WantsCode: the pickle calls a function or makes an object that is not allowed.
            HookedModelError: it asks for more memory than `MOST_MEMORY`, or declares more numbers than there
                are.
            ValueError: PyTorch does not write such a pickle. Damage raises other exceptions, too.
        """
        self._stack, self._outer_stacks = [], []
        memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(stream):
            name: str = opcode.name
            self._spend(_COSTS.get(name, _LEAST_COST) + (0 if arg is None else sys.getsizeof(arg)))
            if name in _VALUES:
                self._stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(arg)] = self._stack[-1]  # type: ignore[arg-type]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self._stack.append(memo[int(arg)])  # type: ignore[arg-type]
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name == "MARK":
                self._outer_stacks.append(self._stack)
                self._stack = []
            elif name == "POP_MARK" or (name == "POP" and not self._stack):
                # Python's own machine also lets a pickle pop a mark by POP.
                self._since_mark()
            elif name == "POP":
                self._stack.pop()
            elif name == "DUP":
                self._stack.append(self._stack[-1])
            elif name not in ("PROTO", "FRAME", "STOP") and not self._contain(name):
                self._make(name, arg)
        for stand_in in self._stand_ins:
            if not isinstance(stand_in.state, dict):
                raise WantsCode(str(stand_in.of))
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        """Remove everything after the last mark from the stack, and the mark."""
        top, self._stack = self._stack, self._outer_stacks.pop()
        return top

    def _contain(self, name: str) -> bool:
        """Carry out an opcode that makes or fills a container; False for any other opcode."""
        if name in _FROM_MARK:
            items = self._since_mark()
            self._stack.append(_FROM_MARK[name](items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            self._stack[-size:] = [tuple(self._stack[-size:])]
        elif name in ("APPENDS", "ADDITEMS"):
            items = self._since_mark()
            _extend(self._stack[-1], items)
        elif name == "APPEND":
            item = self._stack.pop()
            _extend(self._stack[-1], [item])
        elif name in ("SETITEMS", "DICT"):
            items = self._since_mark()
            if name == "DICT":
                self._stack.append({})
            _fill(self._stack[-1], items)
        elif name == "SETITEM":
            value, key = self._stack.pop(), self._stack.pop()
            _fill(self._stack[-1], [key, value])
        else:
            return False
        return True

    def _make(self, name: str, arg: Any) -> None:
        """Carry out an opcode that names, calls, makes or fills an object."""
        stack = self._stack
        if name == "GLOBAL":
            stack.append(Global(*str(arg).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (type(attribute) is type(module) is str):
                raise ValueError("a name that is not text")
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
            self._set_state(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._stored(stack.pop()))
        elif name in ("INST", "OBJ"):
            kind = Global(*str(arg).split(" ", 1)) if name == "INST" else self._since_mark()[0]
            raise WantsCode(str(kind) if isinstance(kind, Global) else "an unnamed class")
        elif name.startswith("EXT"):
            raise WantsCode(f"pickle's {name}")
        else:
            raise ValueError(f"{name}, which PyTorch does not write")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise ValueError("a call of something that is not a function")
        # A pickle can pass one large object to many calls, so no call may copy its arguments.
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
            return function  # the arguments do not matter
        raise WantsCode(str(function))

    def _object(self, kind: Any, arguments: tuple[Any, ...]) -> Any:
        _typed(kind, Global)
        if kind == ("collections", "OrderedDict"):
            return {}
        if kind == ("torch.torch_version", "TorchVersion"):
            return _typed(arguments[0], str)
        if not self.objects or arguments:
            raise WantsCode(str(kind))
        stand_in = StandIn(kind)
        self._stand_ins.append(stand_in)
        return stand_in

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, StandIn):
            attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if slots:
                plain = _typed(attributes or {}, dict)
                self._spend(100 * (len(_typed(slots, dict)) + len(plain)))
                attributes = {**plain, **slots}
            target.state = attributes
        elif not (type(target) is dict or isinstance(target, Global)):  # an OrderedDict's, a number type's
            raise ValueError("a state for an object that has none")

    def _spend(self, size: int) -> None:
        """Refuse a pickle that makes more than `MOST_MEMORY`; those of checkpoints stay far below."""
        self._memory_left -= size
        if self._memory_left < 0:
            raise HookedModelError(
                f"makes objects of more than {MOST_MEMORY >> 20} MiB beside its tensors: not a checkpoint"
            )

    def _stored(self, reference: Any) -> Any:
        """The storage (or the class) that a persistent id of PyTorch refers to."""
        if reference[0] == "module" and isinstance(reference[1], Global):
            return reference[1]  # a class, with its source
        _, kind, key, _, count = reference[:5]
        named = isinstance(kind, Global) and kind.module in ("torch", "torch.cuda")
        if named and kind.name.endswith("Storage") and kind.name not in _DTYPES:
            raise HookedModelError(
                f"holds numbers of a kind that no weights have, {kind}: save them as float32"
            )
        if not named or kind.name not in _DTYPES or type(key) is not str or type(count) is not int:
            raise ValueError("numbers of an unknown kind")
        if count < 0 or (len(reference) > 5 and reference[5] is not None):
            raise ValueError("a storage of another form")
        dtype = _DTYPES[kind.name]
        if key not in self.storages:
            self.storages[key] = self.storage(dtype, key, count)
        stored = self.storages[key]
        if stored.values.dtype != dtype or len(stored.values) != count:
            raise ValueError("one storage, two sizes")
        return stored

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        numbers = [offset, *size, *stride]
        if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > _MOST_AXES:
            raise ValueError("a tensor of another form")
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("sizes that are not whole numbers from 0")
        available, count = len(storage.values), math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0
        if count > available or last >= max(available, 1):
            shape = " x ".join(map(short_count, size))
            raise HookedModelError(f"declares a tensor of {shape} numbers, but holds {available:,} for it")
        return storage.values.as_strided(tuple(size), tuple(stride), offset)


def _typed(x: Any, kind: type[_T]) -> _T:
    if not isinstance(x, kind):
        raise ValueError("something of another type")
    return x


def short_count(count: int) -> str:
    """A number that a file declares, in a short form however large it is."""
    return f"{count:,}" if abs(count) < 10**15 else "over 10^15"


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise ValueError("items for something that is not a list")
    target.extend(items)


def _fill(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items for something that is not a dict")
    for key, value in zip(items[::2], items[1::2]):
        if key is not None and type(key) not in (str, int, float, bool, bytes):
            raise ValueError("a key that is not a name")
        target[key] = value
