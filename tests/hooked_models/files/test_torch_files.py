"""PyTorch files as data: what `torch.save` wrote is read as torch reads it, and hostile files do nothing."""

from __future__ import annotations

import argparse
import codecs
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hooked_models import HookedModelError
from hooked_models.files import torch_files
from hooked_models.files.pickle_machine import Global, StandIn

CONTAINERS = ("zip", "legacy")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.int8, torch.uint8, torch.bool)
# mmap is the reading itself; the others are beartype's, which pytest puts around the package's functions.
_HARMLESS = ("mmap.__new__", "builtins.id", "object.__getattr__", "object.__setattr__", "compile", "exec")
_EVENTS: list[tuple[str, str]] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _EVENTS is not None:
        _EVENTS.append((event, ascii(args)[:200]))


sys.addaudithook(_audit)


@contextmanager
def nothing_but_reading(path: Path) -> Iterator[None]:
    """Python itself reports no import, call of the system, or opened file except this one, for reading."""
    global _EVENTS
    _EVENTS = []
    try:
        yield
    finally:
        seen, _EVENTS = _EVENTS, None
    others = [
        (event, args)
        for event, args in seen
        if event not in _HARMLESS and not (event == "open" and ascii(str(path)) in args and ", 'r'," in args)
    ]
    assert not others


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return request.param


def save(folder: Path, value: Any, container: str = "zip", protocol: int = 2) -> Path:
    """`torch.save` in one of the two forms."""
    path, zipped = folder / "best.pt", container == "zip"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(autouse=True, scope="module")
def _imported_before(tmp_path_factory) -> None:
    """What the first reading imports is no work of a hostile file."""
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape", "latin1"):
        codecs.lookup(codec)
    for container in CONTAINERS:
        value = {"x": torch.ones(2), "n": np.float64(1)}
        torch_files.read(save(tmp_path_factory.mktemp("first"), value, container), objects=True)


def assert_one_line(message: str, path: Path) -> None:
    """It names the file and is short."""
    assert "\n" not in message
    assert len(message.replace(str(path), path.name)) < 400
    assert str(path) in message


def refused(path: Path, objects: bool | None = None) -> str:
    """The message with which a file is refused, once everything about the refusal is as it should be."""
    messages = []
    before = sorted(path.parent.rglob("*"))
    for allowed in (True, False) if objects is None else (objects,):
        with nothing_but_reading(path), pytest.raises(HookedModelError) as caught:
            torch_files.read(path, objects=allowed)
        messages.append(str(caught.value))
        assert_one_line(messages[-1], path)
    assert sorted(path.parent.rglob("*")) == before
    return messages[-1]


# --- what torch.save writes -------------------------------------------------------------------------------


def plain(x: Any) -> Any:
    """What torch.load returns, as this reader is to return it."""
    if isinstance(x, torch.Tensor):
        return x.detach()
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    if isinstance(x, (set, frozenset)):
        return sorted(x)
    if isinstance(x, list):
        return [plain(value) for value in x]
    if isinstance(x, tuple):
        return tuple(plain(value) for value in x)
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, Path):
        return Global(type(x).__module__, type(x).__name__)
    return str(x) if isinstance(x, str) else x


def same(found: Any, expected: Any) -> None:
    """Equal in types, numbers, shapes and strides; NaN equals NaN."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, (dict, list, tuple)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        if isinstance(expected, dict):
            assert list(found) == list(expected)
            found, expected = list(found.values()), list(expected.values())
        for one, other in zip(found, expected):
            same(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected or (found != found and expected != expected)


def tensors_of_every_form() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=rng)
    held: dict[str, Any] = {str(d): (100 * torch.randn(3, 5, generator=rng)).to(d) for d in DTYPES}
    return held | {
        "row": base[2],
        "column": base[:, 3],
        "block": base[1:4, 2:7:2],
        "transposed": base.T,
        "expanded": torch.randn(4, 1, generator=rng).expand(4, 1),
        "scalar": torch.tensor(1.5),
        "element": base[5, 7],
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 4),
        "empty of a view": base[3:3],
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
        "parameter": nn.Parameter(torch.randn(2, 2, generator=rng)),
        "fixed parameter": nn.Parameter(base[0], requires_grad=False),
        "parameters": list(nn.Linear(2, 3).parameters()),
    }


def containers_of_every_form() -> dict[str, Any]:
    metadata: Any = OrderedDict(a=torch.ones(2), b=2)
    metadata._metadata = OrderedDict(version=1)
    nested: Any = []
    for depth in range(30):
        nested = [nested, (depth, {"depth": depth})]
    long = list(range(3000))
    return {
        "config": {
            "k": 32,
            "lr": 1e-3,
            "name": "größe \u2713 \U0001f600",
            "none": None,
            "on": True,
            "off": False,
        },
        "ordered": metadata,
        "numbers": [0, -1, 255, 256, 65536, 2**31, -(2**31), 2**63, -(2**70), 10**100, 1e-300, float("nan")],
        "bytes": [b"", b"abc\xff\x00", bytes(300)],
        "text": ["", "x" * 300, "new\nline", "\\", "'\""],
        "sets": [{1, 2}, frozenset({3}), set()],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "numpy": [
            np.float64(1.5),
            np.float32(2.5),
            np.float16(0.5),
            np.int64(-3),
            np.int32(7),
            np.bool_(True),
        ],
        "paths": [Path("runs/a/best.pt"), Path("best.pt"), Path("/data/runs")],
        "version": torch.__version__,
        "size": torch.Size([2, 3]),
        "nested": nested,
        "long": long,
        "again": long,
        "keys": {1: "one", 2.5: "half", None: 0, False: 2, "x": 3, b"y": 4},
        "empty": [{}, [], OrderedDict()],
        "with tensors": OrderedDict(x=[torch.arange(4), {"y": (torch.zeros(2, 2),)}]),
    }


def everything_in_one_file() -> dict[str, Any]:
    return {"everything": tensors_of_every_form() | containers_of_every_form()}


@pytest.mark.parametrize("make", [tensors_of_every_form, containers_of_every_form, everything_in_one_file])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_read_as_torch_reads_it(tmp_path, container, protocol, make):
    for name, value in make().items():
        file = save(tmp_path, value, container, protocol)
        try:
            same(torch_files.read(file), plain(torch.load(file, weights_only=False)))
        except (AssertionError, HookedModelError) as error:
            raise AssertionError(f"{name}: {error}") from error


def test_views_of_one_storage_stay_views_and_the_file_stays_as_it_is(tmp_path, container):
    whole = torch.arange(12.0).view(3, 4)
    file = save(tmp_path, {"a": whole, "b": whole[1], "c": whole.T}, container)
    before = hashlib.sha256(file.read_bytes()).digest()
    held = torch_files.read(file)
    held["b"].fill_(-1.0)
    whole[1] = -1.0
    same(held, {"a": whole, "b": whole[1], "c": whole.T})
    assert hashlib.sha256(file.read_bytes()).digest() == before
    del held
    file.unlink()


def test_without_checksums(tmp_path):
    """PyTorch can leave them out, or write them as zero."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(5.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    assert zlib.crc32(torch.arange(5.0).numpy().tobytes()) != data.CRC
    same(torch_files.read(tmp_path / "x.pt"), {"x": torch.arange(5.0)})


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(3.0))
        self.register_buffer("seen", torch.ones(3, dtype=torch.int64))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layers, self.size = Inner(), nn.ModuleList([nn.Linear(2, 2)]), 3


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_a_module_is_inert(tmp_path, container, protocol):
    value = {"sae": Outer(), "config": argparse.Namespace(k=3, name="x")}
    file = save(tmp_path, value, container, protocol)
    with nothing_but_reading(file):
        read = torch_files.read(file, objects=True)
    assert type(read["sae"]) is type(read["config"]) is StandIn
    assert read["config"].state == {"k": 3, "name": "x"}
    assert read["sae"].of == Global(__name__, "Outer")
    assert read["sae"].state["size"] == 3
    inner = read["sae"].state["_modules"]["inner"]
    same(inner.state["_parameters"], {"w": torch.arange(3.0)})
    same(inner.state["_buffers"], {"seen": torch.ones(3, dtype=torch.int64)})
    assert "Outer" in refused(file, objects=False)


def test_torch_load_itself_allocates_what_a_file_asks_for(tmp_path):
    """Why `torch.load(weights_only=True)` is not the reader: 50 MB for a file of some hundred bytes."""
    asked = 50_000_000
    path = write(tmp_path, zipped(call(name("builtins", "bytearray"), integer(asked)) + b"."))
    assert path.stat().st_size < 1000
    tracemalloc.start()
    try:
        assert len(torch.load(path, weights_only=True)) == asked
        assert tracemalloc.get_traced_memory()[1] > asked
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        refused(path)
        assert tracemalloc.get_traced_memory()[1] - held < asked / 10
    finally:
        tracemalloc.stop()


# --- pickles by hand --------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) < 256:
        return b"\x8a" + bytes([len(data)]) + data
    return b"\x8b" + struct.pack("<i", len(data)) + data


def number(value: int) -> bytes:
    """The length before a storage in the form before zip."""
    return struct.pack("<q", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def list_(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def dict_(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_(*arguments) + b"R"


def stored(count: int | bytes, key: str = "0", kind: bytes = name("torch", "FloatStorage")) -> bytes:
    count = integer(count) if isinstance(count, int) else count
    return tuple_(text("storage"), kind, text(key), text("cpu"), count) + b"Q"


def tensor(storage: bytes, size: list[int], stride: list[int], offset: int = 0) -> bytes:
    sizes = (tuple_(*map(integer, numbers)) for numbers in (size, stride))
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, integer(offset), *sizes, b"\x89", hooks)


def zipped(
    pickled: bytes | None,
    data: dict[str, bytes] | None = None,
    files: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    aligned: bool = True,
) -> bytes:
    """A file in the zip form; storages begin at multiples of 64, as torch has them, or at odd places."""
    out = io.BytesIO()
    content = {} if pickled is None else {"best/data.pkl": pickled}
    content |= {"best/version": b"3\n", "best/byteorder": b"little"} | (files or {})
    content |= {f"best/data/{key}": value for key, value in (data or {}).items()}
    with zipfile.ZipFile(out, "w", compression) as archive:
        for filename, value in content.items():
            info = zipfile.ZipInfo(filename)
            info.compress_type = compression
            begin = out.tell() + 30 + len(filename)
            padding = (-begin - 4) % 64 + (not aligned)
            info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
            archive.writestr(info, value)
    return out.getvalue()


def legacy(pickled: bytes, keys: tuple[str, ...] = (), data: bytes = b"", **others: bytes) -> bytes:
    """A file in the form before zip; ``others`` replace the pickles magic, version, system and last."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    values = {
        "magic": 0x1950A86A20F9469CFC6C,
        "version": 1001,
        "system": system,
        "": None,
        "last": list(keys),
    }
    parts = {part: pickle.dumps(value, 2) for part, value in values.items()} | {"": pickled} | others
    return b"".join(parts.values()) + data


FOUR, ONE = {"0": bytes(4)}, number(1) + bytes(4)  # one number, in either form


def in_container(container: str, pickled: bytes) -> bytes:
    """A file with one storage of one number."""
    return zipped(pickled, FOUR) if container == "zip" else legacy(pickled, ("0",), ONE)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "best.pt"
    path.write_bytes(content)
    return path


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.how = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self) -> Any:
        return self.how

    def __hash__(self) -> int:
        return 1


def test_files_built_by_hand_are_read(tmp_path):
    """The builders make good files: what is refused below is refused for what is wrong with it."""
    numbers = np.arange(6, dtype="<f4")
    pickled = dict_(text("x"), tensor(stored(6), [2, 3], [3, 1]), text("n"), integer(5)) + b"."
    expected = {"x": torch.arange(6.0).view(2, 3), "n": 5}
    data = {"0": numbers.tobytes()}
    forms = [zipped(pickled, data), zipped(pickled, data, aligned=False)]
    for content in (*forms, legacy(pickled, ("0",), number(6) + numbers.tobytes())):
        same(torch_files.read(write(tmp_path, content)), expected)
    same(torch.load(write(tmp_path, zipped(pickled, data)), weights_only=True), expected)


# --- code -------------------------------------------------------------------------------------------------


def code(marker: str) -> dict[str, bytes]:
    """Pickles that, if they were run, would make the file ``marker`` or do worse, by their disguise."""
    command, source = f"touch {marker}", f"open({marker!r}, 'w').close()"
    system = call(name("os", "system"), text(command))
    found: dict[str, bytes] = {}

    def reduce(functions: str, *arguments: bytes) -> None:
        for function in functions.split():
            module, attribute = function.split(":")
            found[f"{module}.{attribute}"] = call(name(module, attribute), *arguments)

    touch, imported = list_(text("touch"), text(marker)), call(name("builtins", "__import__"), text("os"))
    reduce("os:system posix:system nt:system os:popen pathlib:os.system", text(command))
    reduce("torch:_utils._rebuild_tensor_v2", text(command))
    reduce("subprocess:Popen subprocess:check_output", touch)
    reduce("builtins:eval builtins:exec __builtin__:eval timeit:timeit pdb:run", text(source))
    reduce("builtins:open io:open _io:FileIO codecs:open", text(marker), text("w"))
    reduce("runpy:run_path os:remove os:mkdir torch:load torch.jit:load numpy:load", text(marker))
    reduce("pathlib:Path.touch", text(marker))
    reduce("builtins:__import__ importlib:import_module", text("antigravity"))
    reduce("runpy:_run_code numpy.testing._private.utils:runstring", text(source), dict_())
    reduce("webbrowser:open urllib.request:urlopen", text("http://localhost:9/"))
    reduce("torch.storage:_load_from_bytes _pickle:loads", text("x"))
    reduce("os:execvp", text("touch"), touch)
    reduce("builtins:compile", text(source), text("x"), text("exec"))
    reduce("builtins:getattr", imported, text("system"))
    reduce("builtins:type", text("X"), b")", dict_())
    reduce("builtins:map", name("os", "system"), list_(text(command)))
    reduce("builtins:list", call(name("builtins", "map"), name("os", "system"), list_(text(command))))
    reduce("builtins:bytearray", integer(10))
    reduce("functools:partial", name("os", "system"), text(command))
    reduce("operator:methodcaller", text("system"), text(command))
    reduce("operator:attrgetter", text("system"))
    reduce("ctypes:CDLL", text("libc.so.6"))
    reduce("shutil:rmtree", text(str(Path(marker).parent)))
    reduce("socket:create_connection", tuple_(text("localhost"), integer(9)))
    reduce("torch.hub:load", text("owner/name"), text("model"))
    reduce("torch:save", integer(1), text(marker))
    reduce("torch._inductor.codecache:compile_file", text(marker), text(marker), text(command))
    reduce("torch.utils.cpp_extension:load_inline", text("x"), text(source))
    reduce("numpy:save", text(marker), integer(1))
    reduce("pickle:loads", text(pickle.dumps(1).hex()))
    reduce("_codecs:encode", text(command), text("rot13"))
    reduce("collections:defaultdict", name("os", "system"))
    reduce("torch._utils:_rebuild_parameter", name("os", "system"), b"\x89", dict_())
    reduce("torch._tensor:_rebuild_from_type_v2", name("os", "system"), name("os", "system"), tuple_())
    reduce("copyreg:_reconstructor", name("os", "system"), name("builtins", "object"), text(command))
    reduce("copyreg:__newobj__", name("subprocess", "Popen"), text(command))
    reduce("os:path.join", text("a"), text("b"))
    chain = call(name("builtins", "getattr"), imported, text("system"))
    found |= {
        "a chain of getattr": call(chain, text(command)),
        "loads of bytes": call(name("pickle", "loads"), b"B" + number(len(system) + 1)[:4] + system + b"."),
        "in the arguments of OrderedDict": call(name("collections", "OrderedDict"), list_(system)),
        "in the arguments of set": call(name("builtins", "set"), list_(system)),
        "in the arguments of a tensor": call(name("torch._utils", "_rebuild_tensor_v2"), system),
        "in a list of tuples": list_(tuple_(list_(tuple_(system)))),
        "popped again": system + b"0N",
        "as what is called": call(system, text("x")),
        "as the arguments": name("os", "system") + system + b"R",
        "arguments in a list": name("os", "system") + list_(text(command)) + b"R",
        "of one argument": name("os", "system") + text(command) + b"\x85R",
        "remembered": name("os", "system") + b"q\x000h\x00" + text(command) + b"\x85R",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R",
        "STACK_GLOBAL, dotted": b"\x80\x04"
        + call(text("builtins") + text("eval.__call__") + b"\x93", text(source)),
        "STACK_GLOBAL of numbers": b"\x80\x04" + integer(1) + integer(2) + b"\x93",
        "NEWOBJ": name("subprocess", "Popen") + tuple_(touch) + b"\x81",
        "NEWOBJ with a state": name("subprocess", "Popen") + tuple_(text(command)) + b"\x81" + dict_() + b"b",
        "NEWOBJ without arguments": name("tempfile", "TemporaryDirectory") + b")\x81",
        "NEWOBJ of a call": system + b")\x81",
        "NEWOBJ_EX": name("subprocess", "Popen") + b")" + dict_(text("args"), touch) + b"\x92",
        "OBJ": b"(" + name("os", "system") + text(command) + b"o",
        "OBJ of nothing": b"(o",
        "INST": b"(" + text(command) + b"ios\nsystem\n",
        "INST without arguments": b"(itempfile\nTemporaryDirectory\n",
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "PERSID": f"Pos.system({command!r})\n".encode(),
        "BINPERSID of code": system + b"Q",
        "BINPERSID of text": text(command) + b"Q",
        "a storage of code": stored(1, kind=name("os", "system")),
        "a storage's key is code": tuple_(text("storage"), name("torch", "FloatStorage"), system) + b"Q",
        "NEXT_BUFFER": b"\x80\x05\x97",
        "READONLY_BUFFER": b"\x80\x05" + text("x") + b"\x98",
        "no known opcode": b"\xff",
        "BUILD of a list": b"]" + dict_(text("append"), name("os", "system")) + b"b",
        "BUILD of text": text("x") + dict_(text("__class__"), name("os", "system")) + b"b",
        "BUILD with code": name("argparse", "Namespace") + b")\x81" + system + b"b",
        "an attribute is code": name("argparse", "Namespace") + b")\x81" + dict_(text("k"), system) + b"b",
        "a slot is code": name("x", "X") + b")\x81" + tuple_(b"N", dict_(text("k"), system)) + b"b",
        "a key is code": dict_(system, integer(1)),
        "a key is a tuple": dict_(tuple_(name("os", "system")), integer(1)),
        "a value is code": dict_(text("x"), system),
        "items for a function": name("os", "system") + b"(" + text("x") + b"e",
        "keys for a function": name("os", "system") + b"(" + text("x") + integer(1) + b"u",
    }
    evil, module = Evil(os.system, command), nn.Identity()
    module.hook = evil
    places: dict[str, Any] = {"": evil, ", with a state": Evil(eval, source, state={"x": 1})}
    places |= {", as a key": {evil: 1}, ", in a module": {"sae": module}}
    places[", in a checkpoint"] = {"model_state_dict": {}, "config": {"k": 1, "lr": evil}}
    places[", in an optimizer"] = {"model_state_dict": {}, "optimizer_state_dict": {"state": [evil]}}
    for protocol in range(6):
        for place, value in places.items():
            found[f"protocol {protocol}{place}"] = pickle.dumps(value, protocol)[:-1]
    return {disguise: pickled + b"." for disguise, pickled in found.items()}


@pytest.mark.parametrize("disguise", list(code("marker")))
def test_code_is_refused(tmp_path, disguise, container):
    marker = tmp_path / "marker"
    refused(write(tmp_path, in_container(container, code(str(marker))[disguise])))
    assert not marker.exists()


LIVE = ["os.system", "builtins.exec", "builtins.open", "a chain of getattr", "loads of bytes", "popped again"]
LIVE += [
    "in the arguments of set",
    "remembered",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "a key is code",
    "protocol 0",
]
LIVE += ["protocol 5, in a checkpoint", "protocol 2, in a module", "an attribute is code"]


@pytest.mark.parametrize("disguise", LIVE)
def test_the_code_is_live(tmp_path, disguise):
    """Python's own pickle runs it: the tests above refuse something."""
    marker = tmp_path / "marker"
    pickle.loads(code(str(marker))[disguise])
    assert marker.exists()


def test_the_name_of_what_a_file_wants_is_in_the_message(tmp_path):
    message = refused(write(tmp_path, zipped(code("x")["os.system"])))
    assert "os.system" in message
    assert "run code" in message
    assert "shutil.rmtree" in refused(write(tmp_path, legacy(code("x")["shutil.rmtree"])))


@pytest.mark.parametrize("opcode", ["GLOBAL", "STACK_GLOBAL"])
def test_a_name_cannot_disfigure_the_message(tmp_path, opcode):
    """No line breaks, terminal codes or pages of text from the file."""
    evil = "x\r\x1b[2J\u2028" + 10_000 * "y"
    function = name("os", evil) if opcode == "GLOBAL" else text("os\n") + text(evil) + b"\x93"
    message = refused(write(tmp_path, zipped(call(function) + b".")))
    assert message.isprintable()


@pytest.mark.parametrize("part", ["magic", "version", "system", "last"])
@pytest.mark.parametrize("disguise", ["os.system", "NEWOBJ", "INST", "STACK_GLOBAL", "protocol 2, as a key"])
def test_code_in_the_other_pickles_of_a_legacy_file(tmp_path, part, disguise):
    marker = tmp_path / "marker"
    pickled = code(str(marker))[disguise]
    refused(write(tmp_path, legacy(pickle.dumps({}, 2), **{part: pickled})))
    assert not marker.exists()


SYSTEM, ORDERED = name("os", "system"), name("collections", "OrderedDict")
DICT, EVAL, CODE = name("builtins", "dict"), name("builtins", "eval"), dict_(text("__code__"), text("x"))
METHODS = dict_(text("__class__"), SYSTEM, text("items"), SYSTEM)
# What names no call: its pickle, and what is read.
INERT: dict[str, tuple[bytes, Any]] = {
    "a function": (SYSTEM, Global("os", "system")),
    "a function with a state": (SYSTEM + CODE + b"b", Global("os", "system")),
    "a class with a state": (DICT + dict_(text("__init__"), SYSTEM) + b"b", Global("builtins", "dict")),
    "an OrderedDict with a state": (call(ORDERED) + METHODS + b"b", {}),
    "functions in lists": (
        list_(SYSTEM, tuple_(EVAL)),
        [Global("os", "system"), (Global("builtins", "eval"),)],
    ),
    "code after the end": (b"N." + call(SYSTEM, text("touch marker")), None),
}


@pytest.mark.parametrize("what", INERT)
def test_names_alone_do_nothing(tmp_path, what):
    pickled, expected = INERT[what]
    path = write(tmp_path, zipped(pickled + b"."))
    with nothing_but_reading(path):
        held = torch_files.read(path)
    same(held, expected)


@pytest.mark.parametrize("kind", ["subprocess Popen", "os _Environ", "tempfile TemporaryDirectory"])
@pytest.mark.parametrize("how", ["NEWOBJ", "copyreg"])
def test_an_object_of_any_class_is_a_stand_in(tmp_path, kind, how):
    """Only where objects are allowed, and never the thing itself."""
    kind = kind.split()
    made = name(*kind) + b")\x81"
    if how == "copyreg":
        made = call(name("copyreg", "_reconstructor"), name(*kind), name("builtins", "object"), b"N")
    state = dict_(text("__class__"), integer(1), text("__setstate__"), name("os", "system"), text("of"), b"N")
    path = write(tmp_path, zipped(made + state + b"b."))
    with nothing_but_reading(path):
        held = torch_files.read(path, objects=True)
    assert type(held) is StandIn
    assert held.of == Global(*kind)
    assert held.state == {"__class__": 1, "__setstate__": Global("os", "system"), "of": None}
    assert ".".join(kind) in refused(path, objects=False)


# --- memory and time --------------------------------------------------------------------------------------

HUGE = 10**5000
# A list of two of itself, forty times over: written out it has 2^40 parts.
LAUGHS = list_() + b"q\x00" + b"".join(b"0](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
NONES = list_(b"N" * 100_000)


def copies(function: bytes, argument: bytes, count: int = 30_000, ending: bytes = b"R") -> bytes:
    """One large argument, handed to a function again and again, what it returns kept."""
    return list_(argument + b"\x85q\x010", *[function + b"h\x01" + ending] * count)


def doubled(function: bytes) -> bytes:
    """f(x, x) of f(x, x) of ..., forty deep."""
    return text(20 * "x") + b"".join(b"q\x000" + function + b"h\x00h\x00\x86R" for _ in range(40))


def of_misaligned(times: int = 3000) -> bytes:
    return list_(*[tensor(stored(250_000), [1], [1])] * times)


def overlapping() -> bytes:
    """Many entries whose data are the same bytes."""
    out = io.BytesIO(zipped(list_(*[stored(250_000, str(n)) for n in range(3000)]) + b".", aligned=False))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("best/data/x", bytes(1_000_000))
        one = archive.getinfo("best/data/x")
        for n in range(3000):
            info = zipfile.ZipInfo(f"best/data/{n}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(info, field, getattr(one, field))
            info.compress_type = zipfile.ZIP_STORED
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
        archive._didModify = True
    return out.getvalue()


def with_directory(directory: bytes, large: bool = False) -> bytes:
    """An archive whose directory is these bytes, in either form of its last record."""
    content = zipped(b"N.")
    begin = content.index(b"PK\x01\x02")
    size = 2**32 - 1 if large else len(directory)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, size, size if large else begin, 0)
    more = b""
    if large:
        more = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(directory), begin)
        more += struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + len(directory), 1)
    return content[:begin] + directory + more + end


def forged(content: bytes, entry: str, **fields: int) -> bytes:
    """An archive whose central directory says something else of one entry."""
    at = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "compressed": (20, "<I")}
    at |= {"size": (24, "<I"), "attributes": (38, "<I"), "offset": (42, "<I")}
    begin = content.index(b"PK\x01\x02")
    while content[begin + 46 :][: struct.unpack_from("<H", content, begin + 28)[0]] != entry.encode():
        begin = content.index(b"PK\x01\x02", begin + 4)
    changed = bytearray(content)
    for field, value in fields.items():
        place, form = at[field]
        struct.pack_into(form, changed, begin + place, value)
    return bytes(changed)


def resized(content: bytes, entry: str, size: int, **fields: int) -> bytes:
    return forged(content, f"best/{entry}", size=size, compressed=size, **fields)


def in_both(pickles: dict[str, bytes]) -> dict[str, Callable[[], bytes]]:
    """Files in both forms, each with one storage of one number."""
    forms = itertools.product(pickles.items(), CONTAINERS)
    return {f"{what} ({form})": partial(in_container, form, x + b".") for (what, x), form in forms}


DEVICE, PATH, SIZE = name("torch", "device"), name("pathlib", "PosixPath"), name("torch", "Size")
SET, BIG = name("builtins", "set"), tensor(stored(12_500_000), [1], [1]) + b"."
VIEW = name("torch._utils", "_rebuild_tensor_v2") + b"q\x01" + tuple_(
    stored(1), integer(0), tuple_(integer(1)), tuple_(integer(1)), b"\x89", b"}"
)  # fmt: skip
# Objects that take up to 150 times the bytes of their opcodes.
GROWING = {
    "dicts": b"}" * 4_000_000,
    "dicts of one": b"}NNs" * 1_000_000,
    "marks": b"(" * 4_000_000,
    "tuples of tuples": b")" + b"\x85" * 4_000_000,
    "memos": b"N" + b"\x94" * 4_000_000,
    "views of one tensor": VIEW + b"q\x02" + b"h\x01h\x02R" * 800_000,
    "objects": name("x", "X") + b"q\x01" + b"h\x01)\x81}b" * 600_000,
    "names": b"cx\nX\n" * 800_000,
    "numbers popped": b"K\x010" * 1_300_000,
    "a long text of one wide character": text("x" * 15_000_000 + "\U0001f600"),
}
# Refused; and what is read, for it is data, in memory that the file's own size bounds.
REFUSED: dict[str, Callable[[], bytes]] = {
    **in_both(
        {
            "a large shape": tensor(stored(1), [10**6, 10**6], [10**6, 1]),
            "a large shape of strides 0": tensor(stored(1), [10**12], [0]),
            "two numbers, stride 0, of one": tensor(stored(1), [2], [0]),
            "a large offset": tensor(stored(1), [1], [1], offset=10**12),
            "a large stride": tensor(stored(1), [2], [10**12]),
            "a shape past 64 bits": tensor(stored(1), [2**63, 2**63], [0, 0]),
            "a shape past 64 bits that wraps to 1": tensor(stored(1), [2**32, 2**32], [0, 0]),
            "a shape of numbers too long to print": tensor(stored(1), [HUGE, HUGE], [HUGE, 1]),
            "an offset too long to print": tensor(stored(1), [1], [1], offset=HUGE),
            "an empty shape with a large side": tensor(stored(1), [0, HUGE], [1, 1]),
            "a thousand axes": tensor(stored(1), [1] * 1000, [1] * 1000),
            "a negative size": tensor(stored(1), [-1], [1]),
            "a negative stride": tensor(stored(1), [1], [-1]),
            "a negative offset": tensor(stored(1), [1], [1], offset=-1),
            "a size that is true": call(name("torch._utils", "_rebuild_tensor_v2"), stored(1), b"\x88"),
            "a large storage": stored(10**12),
            "a storage past 64 bits": stored(2**64),
            "a storage too long to print": stored(HUGE),
            "a negative storage": stored(-1),
            "bytearray": call(name("builtins", "bytearray"), integer(10**11)),
            "bytes": call(name("builtins", "bytes"), integer(10**11)),
            "torch.zeros": call(name("torch", "zeros"), integer(10**11)),
            "numpy.zeros": call(name("numpy", "zeros"), integer(10**11)),
            "a range": call(name("builtins", "list"), call(name("builtins", "range"), integer(10**11))),
            "BINUNICODE8": b"\x8d" + struct.pack("<Q", 2**62),
            "BINUNICODE": b"X" + struct.pack("<I", 2**32 - 1),
            "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**62),
            "BINBYTES8 past 63 bits": b"\x8e" + struct.pack("<Q", 2**64 - 1),
            "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40),
            "LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1),
            "a LONG4 below 0": b"\x8b" + struct.pack("<i", -1),
            "a number as text": b"L" + b"9" * 100_000 + b"L\n",
            "laughs as arguments": name("os", "system") + LAUGHS + b"R",
            "laughs called": LAUGHS + b")R",
            "laughs as the kind of a storage": stored(1, kind=LAUGHS),
            "laughs as the number of a storage": stored(LAUGHS),
            "laughs as a tensor's storage": tensor(LAUGHS, [1], [1]),
        }
    ),
    "a compressed pickle": lambda: zipped(b"N" * 50_000_000 + b".", compression=zipfile.ZIP_DEFLATED),
    "a compressed storage": lambda: zipped(BIG, {"0": bytes(50_000_000)}, None, zipfile.ZIP_DEFLATED),
    "bzip2": lambda: zipped(b"N.", compression=zipfile.ZIP_BZIP2),
    "lzma": lambda: zipped(b"N.", compression=zipfile.ZIP_LZMA),
    "a size of 4 GiB": lambda: resized(zipped(stored(2**30 - 1) + b".", FOUR), "data/0", 2**32 - 4, crc=0),
    "a pickle of 4 GB": lambda: resized(zipped(b"N."), "data.pkl", 4 * 10**9),
    "a pickle larger than the file": lambda: resized(zipped(b"N."), "data.pkl", 10**6, crc=0),
    "overlapping entries": overlapping,
}
# Either is right, in bounded memory and time: to refuse them, or to read them as the data that they are.
BOUNDED: dict[str, Callable[[], bytes]] = {
    **in_both(
        {
            "LONG_BINPUT far up": b"Nr" + struct.pack("<I", 2**31 - 1),
            "PUT far up": b"Np" + b"9" * 4000 + b"\n",
            "lists a million deep": b"]" * 10**6 + b"a" * (10**6 - 1),
            "tuples deep": b")" + b"\x85" * 10**5,
            "dicts deep": b"}N" * 10**5 + b"N" + b"s" * 10**5,
            "marks deep": b"(" * 10**5 + b"t" * 10**5,
            "objects deep": (name("x", "X") + b")\x81}N") * 10**4 + b"N" + b"sb" * 10**4,
            "laughs": LAUGHS,
            "laughs as a device": call(DEVICE, LAUGHS),
            "laughs as a path": call(PATH, LAUGHS),
            "laughs as a version": name("torch.torch_version", "TorchVersion") + LAUGHS + b"\x85\x81",
            "laughs as a number type": call(name("numpy", "dtype"), LAUGHS),
            "laughs as an OrderedDict": call(ORDERED, LAUGHS),
            "laughs as a key": dict_(LAUGHS, b"N"),
            "a path of two of itself": doubled(PATH),
            "copied as sizes": copies(SIZE, NONES),
            "copied as sets": copies(SET, NONES),
            "copied as encoded text": copies(b"", text("x" * 100_000), ending=b"R")
            .replace(b"\x85q\x010", text("latin1") + b"\x86q\x010", 1)
            .replace(b"h\x01R", name("_codecs", "encode") + b"h\x01R"),
            "copied as a path": copies(PATH, text("x" * 100_000)),
            "copied as dicts": copies(ORDERED, list_(*[integer(n) + b"N\x86" for n in range(20_000)])),
            "copied as attributes": list_(
                dict_(*[integer(n) + b"N" for n in range(20_000)]) + b"q\x010",
                *[name("x", "X") + b")\x81h\x01b"] * 10_000,
            ),
            "sizes of megabytes": call(
                name("torch._utils", "_rebuild_tensor_v2"),
                stored(1),
                integer(0),
                integer(1 << 2**23) + b"q\x010" + tuple_(*[b"h\x01"] * 8) + b"q\x02",
                b"h\x02",
                b"\x89",
                b"}",
            ),
        }
    ),
    **in_both(GROWING),
    "a storage used often (zip)": lambda: zipped(
        of_misaligned() + b".", {"0": bytes(1_000_000)}, aligned=False
    ),
    "a storage used often, aligned (zip)": lambda: zipped(of_misaligned() + b".", {"0": bytes(1_000_000)}),
    **{
        f"a storage used often, after {n} bytes more (legacy)": lambda n=n: legacy(
            text("x" * n) + b"0" + of_misaligned() + b".", ("0",), number(250_000) + bytes(10**6)
        )
        for n in range(2)
    },
    "a large directory": lambda: with_directory(bytes(8 << 20)),
    "a large directory, zip64": lambda: with_directory(bytes(8 << 20), large=True),
    "many entries": lambda: zipped(b"N.", {str(n): b"" for n in range(20_000)}),
}

MEASURE = """
import json, os, resource, signal, sys, time
import torch
from pathlib import Path
from hooked_models import HookedModelError
from hooked_models.files import torch_files

def number(file, name):
    return next(int(line.split()[1]) << 10 for line in open(file) if line.startswith(name))

def measured(path, objects):
    space = number("/proc/self/status", "VmSize") + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    signal.setitimer(signal.ITIMER_PROF, 6)  # of CPU, however busy the machine is
    before, began = number("/proc/self/status", "VmRSS"), time.perf_counter()
    try:
        torch_files.read(Path(path), objects=objects)
        said, wanting = None, False
    except HookedModelError as error:
        said, wanting = str(error), isinstance(error.__cause__, MemoryError)
    except BaseException as error:
        said, wanting = None, repr(error)[:300]
    return {"error": said, "wanting": wanting, "bytes": number("/proc/self/status", "VmHWM") - before,
            "seconds": time.perf_counter() - began}

torch.zeros(1)
for line in sys.stdin:
    path, objects = json.loads(line)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.write(into, json.dumps(measured(path, objects)).encode())
        os._exit(0)
    os.close(into)
    answer = open(out, "rb").read()
    status = os.waitpid(child, 0)[1]
    print(json.dumps(json.loads(answer) if answer else {"died": status}), flush=True)
"""


@pytest.fixture(scope="module")
def measure(tmp_path_factory) -> Iterator[Callable[[bytes, bool], tuple[Path, dict[str, Any]]]]:
    """What reading a file costs, each in a child of one small process; it may take 2 GiB and 6 seconds."""
    folder = tmp_path_factory.mktemp("bombs")
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:

        def ask(content: bytes, objects: bool) -> tuple[Path, dict[str, Any]]:
            path = write(folder, content)
            print(json.dumps([str(path), objects]), file=process.stdin, flush=True)
            return path, json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("what", [*REFUSED, *BOUNDED])
def test_memory_and_time_are_bounded(measure, what):
    content = (REFUSED | BOUNDED)[what]()
    path, found = measure(content, True)
    assert "died" not in found, "it took more than 6 seconds, or crashed"
    assert found["wanting"] is False, "it asked for more than 2 GiB, or raised something else"
    assert found["bytes"] < 200e6 + 4 * len(content)
    message = found["error"]
    assert message or what not in REFUSED
    if message:
        assert_one_line(message, path)


# --- broken -----------------------------------------------------------------------------------------------


GOOD = {"x": torch.arange(5.0), "y": torch.arange(6).view(2, 3).T, "k": 3, "name": "abc"}


def test_every_truncation_is_refused(tmp_path, container):
    whole = save(tmp_path, GOOD, container).read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 20, len(whole))]:
        refused(write(tmp_path, whole[:length]))


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, container):
    """One bit, or all; in the pickle, the data and the directory. No other exception comes of it.

    The form before zip has no checksums, so that its numbers may be others.
    """
    path = save(tmp_path, GOOD, container)
    whole, messages = path.read_bytes(), []
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0xFF if place % 2 else 1 << place % 8
        path.write_bytes(changed)
        with nothing_but_reading(path):
            try:
                held = torch_files.read(path)
            except HookedModelError as error:
                messages.append(str(error))
            else:
                if container == "zip":
                    same(held, GOOD)
    assert len(messages) > 50
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


X = tensor(stored(1), [1], [1]) + b"."
TWO = list_(stored(1), stored(2)) + b"."
COMPLEX, WHOLE = name("torch", "ComplexFloatStorage"), name("torch", "IntStorage")


def archive(**names: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for filename, value in names.items():
            opened.writestr(filename, value)
    return out.getvalue()


def twice(filename: str) -> bytes:
    out = io.BytesIO(zipped(X, FOUR))
    with zipfile.ZipFile(out, "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr(filename, b"N.")
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as opened:
        for member, value in (("storages", b"N."), ("tensors", b"N."), ("pickle", code("x")["os.system"])):
            info = tarfile.TarInfo(member)
            info.size = len(value)
            opened.addfile(info, io.BytesIO(value))
    return out.getvalue()


def scripted() -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), out)
    return out.getvalue()


BROKEN: dict[str, Callable[[], bytes]] = {
    "an empty file": lambda: b"",
    "text": lambda: b"hello\n" * 50,
    "a page": lambda: b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "GIF": lambda: b"GIF89a" + bytes(100),
    "safetensors": lambda: struct.pack("<Q", 2) + b"{}",
    "gzip": lambda: gzip.compress(zipped(X, FOUR)),
    "tar": tar,
    "a pickle alone": lambda: pickle.dumps({"x": 1}),
    "random bytes": lambda: np.random.default_rng(0).bytes(1000),
    "random bytes as a zip": lambda: b"PK\x03\x04" + np.random.default_rng(0).bytes(1000),
    "an empty zip": lambda: archive(),
    "a zip of text": lambda: archive(**{"a.txt": b"x"}),
    "an npz": lambda: archive(**{"x.npy": b"\x93NUMPY"}),
    "no pickle": lambda: zipped(None, FOUR),
    "two pickles": lambda: zipped(X, FOUR, {"other/data.pkl": X}),
    "a pickle of nothing": lambda: zipped(b""),
    "a pickle without an end": lambda: zipped(X[:-1], FOUR),
    "an end without a pickle": lambda: zipped(b"."),
    "an unknown memo": lambda: zipped(b"h\x07."),
    "a mark too few": lambda: zipped(b"t."),
    "an odd dict": lambda: zipped(b"}(Nu."),
    "a lone tensor of text": lambda: zipped(tensor(text("x"), [1], [1]) + b"."),
    "more sizes than strides": lambda: zipped(tensor(stored(1), [1, 1], [1]) + b".", FOUR),
    "a storage of another kind": lambda: zipped(stored(1, kind=COMPLEX) + b".", {"0": bytes(8)}),
    "missing data": lambda: zipped(X),
    "too little data": lambda: zipped(X, {"0": bytes(3)}),
    "too much data": lambda: zipped(X, {"0": bytes(8)}),
    "data of another checksum": lambda: forged(zipped(X, FOUR), "best/data/0", crc=1),
    "a pickle of another checksum": lambda: forged(zipped(X, FOUR), "best/data.pkl", crc=1),
    "data outside of the file": lambda: forged(zipped(X, FOUR), "best/data/0", offset=2**31),
    "data in the directory": lambda: forged(zipped(X, FOUR), "best/data/0", offset=600),
    "a link": lambda: forged(zipped(X, FOUR), "best/data/0", attributes=0o120777 << 16),
    "two files of one name": lambda: twice("best/data/0"),
    "two pickles of one name": lambda: twice("best/data.pkl"),
    "TorchScript": scripted,
    "constants": lambda: zipped(X, FOUR, {"best/constants.pkl": b"N."}),
    "big-endian (zip)": lambda: zipped(X, FOUR, {"best/byteorder": b"big"}),
    "big-endian (legacy)": lambda: legacy(X, ("0",), ONE, system=pickle.dumps({"little_endian": False}, 2)),
    "an unknown byte order": lambda: zipped(X, FOUR, {"best/byteorder": b"middle"}),
    **{
        f"a file named {filename}": lambda filename=filename: zipped(X, FOUR, {filename: b"x"})
        for filename in ("../x", "best/../../x", "/etc/x", "\\x", "..\\x", "best\\..\\x", "C:\\x", "C:/x")
    },
    "another magic number": lambda: legacy(X, ("0",), ONE, magic=pickle.dumps(7, 2)),
    "another version": lambda: legacy(X, ("0",), ONE, version=pickle.dumps(1002, 2)),
    "no system": lambda: legacy(X, ("0",), ONE, system=pickle.dumps({}, 2)),
    "a system that is a number": lambda: legacy(X, ("0",), b"", system=pickle.dumps(1, 2)),
    "a key too few": lambda: legacy(X, (), b""),
    "a key too many": lambda: legacy(X, ("0", "1"), ONE + ONE),
    "a key that is a list": lambda: legacy(X, last=pickle.dumps([["0"]], 2)),
    "keys that are a number": lambda: legacy(X, last=pickle.dumps(3, 2)),
    "a storage of another size": lambda: legacy(X, ("0",), number(2) + bytes(8)),
    "a storage of size -1": lambda: legacy(X, ("0",), number(-1) + bytes(8)),
    "one storage of two sizes": lambda: legacy(TWO, ("0",), number(2) + bytes(8)),
    "one storage of two types": lambda: legacy(list_(stored(1), stored(1, kind=WHOLE)) + b".", ("0",), ONE),
}
# Words of the message, for some of them.
SAID = {
    "an empty file": "empty",
    "too much data": "declares 1 numbers",
    "data of another checksum": "damaged",
    "a pickle of another checksum": "damaged",
    "a link": "link",
    "two files of one name": "two files",
    "two pickles of one name": "two files",
    "TorchScript": "TorchScript",
    "constants": "TorchScript",
    "big-endian (zip)": "big-endian",
    "big-endian (legacy)": "big-endian",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_or_no_checkpoint_is_refused(tmp_path, what):
    message = refused(write(tmp_path, BROKEN[what]()))
    assert SAID.get(what, "outside" if what.startswith("a file named") else "") in message
    assert message.isprintable()


def test_no_file(tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    for path, said in (
        (tmp_path / "best.pt", "missing"),
        (tmp_path, "folder"),
        (tmp_path / "link.pt", "missing"),
    ):
        with pytest.raises(HookedModelError, match=said):
            torch_files.read(path)


def test_containers_in_themselves(tmp_path, container):
    """A list, a dict and a module that hold themselves are as they were; nothing follows them for ever."""
    loop: list[Any] = []
    loop.append(loop)
    ring: dict[str, Any] = {}
    ring["ring"] = ring
    module = nn.Identity()
    module.__dict__["me"] = module
    path = save(tmp_path, {"loop": loop, "ring": ring, "sae": module}, container)
    held = torch_files.read(path, objects=True)
    assert held["loop"][0] is held["loop"]
    assert held["ring"]["ring"] is held["ring"]
    assert held["sae"].state["me"] is held["sae"]


@pytest.mark.parametrize(
    "value",
    [
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.eye(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, device="meta"),
        Evil(math.sqrt, 2.0),
        range(3),
        slice(1, 2),
        re.compile("x"),
        np.ones(3),
        1j,
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_plain_tensor_is_refused(tmp_path, container, value):
    refused(save(tmp_path, {"x": value}, container))
