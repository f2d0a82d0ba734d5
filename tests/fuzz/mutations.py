"""Seeded mutations of files: of their bytes, and of what JSON, pickles, zip archives and safetensors say."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tests.fuzz.harness import Form, Mutation

_NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**6, 10**7, 10**12)
_JSON: tuple[Any, ...] = (*_NUMBERS, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), -float("inf"))
_JSON += (True, False, None, "", "x", "a\nb\x1b[31m", "\ud800", "../../etc/passwd", "float16", "x" * 5000)
_JSON += ([], {}, [[]], [None] * 300, {"x": {"y": 1}}, [1, "a"], ["x"] * 3, {"": ""}, {"__class__": "x"})
_SPECIAL = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff" * 8, bytes(8))
_SPECIAL += (b"\x00\x7c", b"\x80\x7f", b"\xff\xff\xff\x7f", b"PK\x05\x06", b"\x80\x02.", b"\n", b'"', b"{")


def flipped(rng: random.Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _n in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= rng.choice((0xFF, 0x80, 1 << rng.randrange(8)))
    return bytes(changed)


def cut_short(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def inserted(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    more = rng.choice(
        (rng.randbytes(rng.randrange(1, 40)), rng.choice(_SPECIAL), bytes(rng.randrange(1, 5000)))
    )
    return data[:at] + more + data[at:]


def spliced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    begin_of_other = rng.randrange(len(other) + 1)
    part = other[begin_of_other : begin_of_other + rng.randrange(1, 3000)]
    return rng.choice(
        (data[:begin] + data[end:], data[:begin] + part + data[end:], data[:end] + data[begin:])
    )


def overwritten(rng: random.Random, data: bytes, _: bytes) -> bytes:
    number = rng.choice(_NUMBERS)
    forms = [struct.pack("<I", number % 2**32), struct.pack("<Q", number % 2**64), rng.choice(_SPECIAL)]
    value, at = rng.choice(forms), rng.randrange(len(data))
    return (data[:at] + value + data[at + len(value) :])[: max(len(data), at + len(value))]


def _places(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys: Any = (
        content if isinstance(content, dict) else range(len(content) if isinstance(content, list) else 0)
    )
    found = [place] if place else []
    for key in list(keys)[:60]:
        found += _places(content[key], (*place, key))
    return found


def json_changed(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """One to three values replaced, left out or added; or the text as a whole spoilt."""
    whole = (
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode().encode("utf-16"),
        lambda: data + rng.choice((b"}", b"[", b"\x00", b"x", data)),
        lambda: b"[" * 50_000,
        lambda: b'{"a":' * 20_000,
        lambda: data.replace(b"{", b'{"architecture": 1, "architecture": 2, ', 1),
        lambda: b"[" + b"[],{}," * 300_000 + b"1]",
        lambda: json.dumps(rng.choice(_JSON)).encode(),
    )
    if rng.random() < 0.2:
        return rng.choice(whole)()
    content = json.loads(data)
    for _n in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(content)
        if not places:
            break
        *way, last = rng.choice(places)
        holder = content
        for key in way:
            holder = holder[key]
        how = rng.random()
        if how < 0.15 and isinstance(holder, dict):
            del holder[last]
        elif how < 0.25 and isinstance(holder, dict):
            holder[rng.choice(("x", "to_dict", "__class__", "\ud800", ""))] = rng.choice(_JSON)
        else:
            holder[last] = rng.choice(_JSON)
    return json.dumps(content, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def pickle_changed(rng: random.Random, data: bytes) -> bytes:
    """Opcodes left out, doubled, swapped, or with another argument."""
    places = [place for _, _, place in pickletools.genops(data) if place is not None] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(places)]
    for _n in range(rng.choice((1, 1, 2, 4))):
        at, how = rng.randrange(len(parts)), rng.randrange(6)
        number = rng.choice(_NUMBERS)
        length = max(1, (number.bit_length() + 8) // 8)
        if how == 0:
            del parts[at]
        elif how == 1:
            parts[at : at + 1] = [parts[at]] * rng.choice((2, 3, 1000))
        elif how == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif how == 3:
            parts[at] = rng.choice(
                (b"N", b")", b"]", b"}", b"0", b"2", b"(", b"t", b"R", b"b", b"\x88", b"Q")
            )
        elif how == 4 and parts[at][:1] in b"KMJ":
            parts[at] = b"\x8a" + bytes([length]) + number.to_bytes(length, "little", signed=True)
        elif parts[at][:1] == b"c":
            parts[at] = rng.choice((b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nDoubleStorage\n"))
        elif len(parts[at]) > 1:
            parts[at] = parts[at][:1] + flipped(rng, parts[at][1:], b"")
        if not parts:
            return b"."
    return b"".join(parts)


def zip_changed(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """One entry changed, with its right checksum, so that the change is read."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    if rng.random() < 0.35:
        name = rng.choice(list(entries))
    if name.endswith("data.pkl") and rng.random() < 0.85:
        entries[name] = pickle_changed(rng, entries[name])
    elif entries[name]:
        entries[name] = rng.choice((flipped, overwritten, inserted, cut_short))(rng, entries[name], b"")
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for filename, content in entries.items():
            if rng.random() < 0.01:
                filename = rng.choice(("../x", "/x", filename + "2", filename.upper()))
            archive.writestr(filename, content)
    return out.getvalue()


def legacy_changed(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """The content's pickle changed, the others and the numbers as they were."""
    stream, ends = io.BytesIO(data), []
    for _n in range(5):
        for _op in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    which = rng.choice((3, 3, 3, 4, 2))
    begin, end = ends[which - 1], ends[which]
    return data[:begin] + pickle_changed(rng, data[begin:end]) + data[end:]


def safetensors_changed(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The header's JSON or its length changed, or special numbers put into the data."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    how = rng.random()
    if how < 0.15:
        return struct.pack("<Q", rng.choice(_NUMBERS) % 2**64) + header + body
    if how < 0.4:
        at = rng.randrange(0, len(body), 4)
        return data[:8] + header + body[:at] + rng.choice(_SPECIAL[:3]) + body[at + 4 :]
    if how < 0.6:
        content = json.loads(header)
        name = rng.choice([n for n in content if n != "__metadata__"])
        part = rng.choice(("dtype", "shape", "data_offsets"))
        dtypes = ("F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "U16", "F4", "x")
        sizes = ([], [0], [10**6, 10**6], [2**63], [2**32, 2**32], [-1], [1.5], [1] * 100, [0, 2**62])
        content[name][part] = rng.choice(dtypes if part == "dtype" else sizes)
        header = json.dumps(content).encode()
    else:
        header = json_changed(rng, header, other)
    return struct.pack("<Q", len(header)) + header + body


_BYTES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    *(flipped, cut_short, inserted, spliced, overwritten),
)


def structured(name: str, data: bytes) -> Callable[[random.Random, bytes, bytes], bytes] | None:
    """The mutation that knows a file's form (None: there is none)."""
    if name.endswith(".json"):
        return json_changed
    if name.endswith(".safetensors"):
        return safetensors_changed
    if data[:4] == b"PK\x03\x04":
        return zip_changed
    return legacy_changed if name.endswith((".pt", ".pth", ".bin")) else None


def mutations(form: Form, count: int, seed: int, files: tuple[str, ...] = ()) -> list[Mutation]:
    """So many mutations of a form, the same for the same seed; two of three know what they change.

    Args:
        form: its files are taken in turn.
        count: of the mutations.
        seed: of the choice.
        files: those to change (none: all).
    """
    rng, made = random.Random(f"{form.name} {seed}"), []
    names = list(files or form.seeds)
    for n in range(count):
        name = names[n % len(names)]
        data, other = form.seeds[name], form.seeds[rng.choice(list(form.seeds))]
        knowing = structured(name, data)
        how = knowing if knowing is not None and rng.random() < 0.67 else rng.choice(_BYTES)
        made.append(Mutation(name, how.__name__, how(rng, data, other)))
    return made
