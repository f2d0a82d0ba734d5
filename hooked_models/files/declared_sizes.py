"""A model's declared sizes against the numbers that its checkpoint holds, while the model is built.

``config.json`` may declare a million layers, or layers of ten million channels, beside weights of a few KiB.
transformers builds the model on the meta device, where tensors have shapes and no numbers, before it reads
weights; `within_checkpoint` looks at each parameter there, and stops at one too many.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from torch.nn.modules import module as torch_modules

from hooked_models.errors import HookedModelError
from hooked_models.files.layouts.checkpoint import Tensors, check_header, damaged, read_tensors
from hooked_models.files.sources import weight_files

# Parameters that a model may have beside those of its checkpoint, such as tied ones.
_MORE_PARAMETERS = 100
# Numbers in a byte of a quantised checkpoint, at most.
_PACKED = 4


class _Held(NamedTuple):
    """The number of tensors in a checkpoint, and of the numbers in them."""

    tensors: int
    numbers: int


@contextmanager
def within_checkpoint(
    source: Any, revision: str | None, tensors: Tensors | None, what: str
) -> Iterator[None]:
    """While open, this thread builds no model of more or larger parameters than a checkpoint's.

    A model may have twice as many numbers: checkpoints leave out one of two tied tensors.

    Args:
        source: folder or hub id; without weights there, nothing is limited.
        revision: of the hub id.
        tensors: the weights, where they have been read already.
        what: the model, for the message.

    Raises:
        HookedModelError: the model's parameters become too many, or the weights cannot be read.
    """
    held = _held_by(tensors) if tensors is not None else _held_in(source, revision)
    if held is None:
        yield
        return
    thread, seen, numbers = threading.get_ident(), set[tuple[int, str]](), 0

    def count(module: Any, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers
        if tensor is None or not tensor.is_meta or threading.get_ident() != thread:
            return
        if (id(module), name) not in seen:
            seen.add((id(module), name))
            numbers += tensor.numel()
        if len(seen) > 2 * held.tensors + _MORE_PARAMETERS or numbers > 2 * held.numbers:
            raise HookedModelError(
                f"the configuration of {what} declares a model of more than {len(seen) - 1:,} tensors or "
                f"{2 * held.numbers:,} numbers, but its checkpoint has {held.tensors:,} tensors of "
                f"{held.numbers:,} numbers: they do not belong together"
            )

    hook = torch_modules.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _held_by(tensors: Tensors) -> _Held:
    packed = (x.numel() if x.is_floating_point() else _PACKED * x.nbytes for x in tensors.values())
    return _Held(len(tensors), sum(packed))


def _held_in(source: Any, revision: str | None) -> _Held | None:
    """What the weights of a folder or repository hold, by their headers (None: it has none)."""
    if source is None:
        return None
    paths = weight_files(str(source), revision)
    parts = [_held_in_file(path) for path in paths]
    return _Held(sum(part.tensors for part in parts), sum(part.numbers for part in parts)) if parts else None


def _held_in_file(path: Path) -> _Held:
    if path.suffix != ".safetensors":
        return _held_by(read_tensors(path))
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  (it is no dict)
            sizes = [(piece.get_dtype(), math.prod(piece.get_shape())) for piece in slices]
    except Exception as error:  # which one depends on where the damage is
        raise damaged(path, error) from error
    return _Held(len(sizes), sum(n if dtype[0] in "FB" else 8 * _PACKED * n for dtype, n in sizes))
