"""Parts that all readers share: the tensors of a file, and the check of their names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import torch_files
from hooked_models.files.pickle_machine import short_count

Tensors = dict[str, Tensor]
LARGEST_HEADER = 4 * 2**20
"""Bytes that the header of a ``.safetensors`` file may have: those of some 40,000 tensors."""
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Checkpoint(NamedTuple):
    """Everything that is needed to build a transformers model: its class, configuration and weights."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: Tensors


def read_tensors(path: Path) -> Tensors:
    """The tensors in a ``.safetensors`` or PyTorch file, by name. No code in the file is run.

    Raises:
        HookedModelError: the file is missing, empty, truncated or damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors" and path.is_file() and path.stat().st_size:
        check_header(path)
        try:
            return load_file(path)
        except Exception as error:  # which one depends on where the damage is
            raise damaged(path, error) from error
    content = torch_files.read(path)
    _check_is_tensors_by_name(path, content)
    torch_files.check_total_size(path, content.values())
    return dict(content)


def check_header(path: Path) -> None:
    """Refuse a ``.safetensors`` file whose header, which lists the tensors, is larger than any real one.

    Raises:
        HookedModelError: it has more than `LARGEST_HEADER` bytes.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise HookedModelError(
            f"{path} is truncated or damaged, or no checkpoint: it declares a header of more than "
            f"{LARGEST_HEADER:,} bytes"
        )


def damaged(path: Path, error: Exception) -> HookedModelError:
    """The error for a file of weights that another library cannot read."""
    return HookedModelError(f"{path} is truncated or damaged ({one_line(error)})")


def not_finite(tensors: Tensors) -> list[str]:
    """The names of the tensors that have NaN or infinite numbers."""
    return [name for name, x in tensors.items() if not is_finite(x)]


def is_finite(x: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; whole numbers are, and those of the meta device."""
    if x.is_meta or not x.is_floating_point() or not x.numel():
        return True
    if x.element_size() == 1:  # torch has no minimum of float8
        x = x.to(torch.float32)
    # isfinite would need half of the tensor's memory once more.
    low, high = x.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


def _check_is_tensors_by_name(path: Path, content: Any) -> None:
    needed = f"{path} must hold tensors by name and nothing else"
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise HookedModelError(f"{needed}, not {kind}")
    others = [
        f"{str(name)[:60]!r} ({type(x).__name__})" for name, x in content.items() if not isinstance(x, Tensor)
    ]
    nested = next((str(name) for name, x in content.items() if isinstance(x, dict)), None)
    if others:
        advice = "" if nested is None else f": save what {nested[:60]!r} holds to a file of its own"
        raise HookedModelError(f"{needed}, but also holds {_first_three(others)}{advice}")
    unnamed = [repr(name)[:60] for name in content if not isinstance(name, str)]
    if unnamed:
        raise HookedModelError(f"{needed}, but has keys that are not names: {_first_three(unnamed)}")


def listed(names: list[str]) -> str:
    """The number of tensors and the first three names, for a message."""
    return f"{len(names)} tensor(s): {_first_three(names)}"


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_activation(source: str, name: Any) -> None:
    """Refuse a ``hidden_act`` that is not in transformers' table of activations."""
    if name is not None and name not in ACT2FN:
        raise bad_field(source, "hidden_act", name, "the name of an activation in transformers' ACT2FN")


def bad_field(source: str, field: str, value: Any, expected: str) -> HookedModelError:
    """The error for a field of ``config.json`` with a value that cannot be used."""
    return HookedModelError(
        f"the config.json of {source} has {field} = {repr(value)[:80]}: expected {expected}"
    )


def check_layers(source: str, n_layers: int, n_tensors: int) -> None:
    """Refuse more layers than a checkpoint has tensors for: building them could take any amount of time.

    Raises:
        HookedModelError: there are fewer than eight tensors a layer; any model here has as many.
    """
    if n_layers * 8 > n_tensors:
        raise HookedModelError(
            f"{source}: {short_count(n_layers)} layers cannot be made of {n_tensors} tensors"
        )


def model_shapes(
    source: str, model_class: type[PreTrainedModel], config: Any, n_tensors: int
) -> dict[str, torch.Size]:
    """The shapes of a model's tensors by name, without allocating the tensors.

    Raises:
        HookedModelError: the configuration has more layers than the checkpoint has tensors for
            (``n_tensors``).
    """
    check_layers(source, config.num_hidden_layers, n_tensors)
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}


def check_tensors(
    source: str, tensors: Tensors, expected: dict[str, torch.Size], tied: str | None = None
) -> None:
    """Refuse tensors that are missing, unexpected, of another shape, not of weights' dtypes or not finite.

    Args:
        source: the checkpoint's name, for the message.
        tensors: its tensors.
        expected: the shapes that the model needs, by name.
        tied: the name of the embedding, where the model ties ``lm_head.weight`` to it; then the head may be
            left out.

    Raises:
        HookedModelError: tensors do not fit; the message lists every kind of misfit.
    """
    missing = [name for name in expected if name not in tensors]
    if tied is not None:
        missing = [name for name in missing if name != "lm_head.weight"]
    fitting = {name: x for name, x in tensors.items() if name in expected}
    problems = {
        "lacks": missing,
        "has unexpected": [name for name in tensors if name not in expected],
        "has the wrong shape for": [
            f"{name} {list(fitting[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in fitting and fitting[name].shape != shape
        ],
        "needs floating-point numbers in": [
            f"{name} ({x.dtype})" for name, x in fitting.items() if x.dtype not in _WEIGHT_DTYPES
        ],
        "has NaN or infinite numbers in": not_finite(fitting),
    }
    lines = [f"{problem} {listed(names)}" for problem, names in problems.items() if names]
    if lines:
        raise HookedModelError(f"the checkpoint {source} {'; '.join(lines)}")
    if tied is not None and not torch.equal(tensors.get("lm_head.weight", tensors[tied]), tensors[tied]):
        raise HookedModelError(f"{source} ties lm_head.weight to {tied}, but holds two different ones")
