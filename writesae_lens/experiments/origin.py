"""What a result was measured on (text, model, SAEs, package, call), and what speaks against its figures."""

from __future__ import annotations

import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import shown
from writesae_lens.experiments.passages import Passages

ORIGIN = (
    "text",
    "text_hash",
    "text_range",
    "text_tokens",
    "whole_text_hash",
    "model_fingerprint",
    "dtype",
    "version",
    "warnings",
    "call",
    "date",
)
"""Entries of every result's summary that say what it was measured on and how, beside model, hook and SAEs."""
N_GRAM_TABLE = (
    "layer 0: its writes are functions of the token (and its neighbours in the convolution) alone, an n-gram "
    "table"
)
"""The warning for cells of the first layer, where a dictionary need only know which tokens stand there."""
HALF_PRECISION = ("bfloat16", "float16")
# What is read is compared with the training text in pieces of 40 characters, one every 100, or 400 in all.
_PIECE, _STRIDE, _MOST_PIECES = 40, 100, 400
# Numbers of a weight that a fingerprint sums at a time.
_BITS_AT_ONCE = 2**17
# A larger file (in bytes) of training text is not compared.
_LARGEST_TEXT = 2**26


class ResultWarning(UserWarning):
    """Something that speaks against a result's figures; the result's summary and headline say it too."""


def origin_of(
    model: HookedRecurrent,
    saes: Sequence[SAE[Any]],
    hooks: Sequence[str],
    passages: Passages,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """The entries `ORIGIN` of a result's summary but the date; what is in ``warnings`` is warned of, too.

    Args:
        model: the model.
        saes: the SAEs that the experiment is about; none where it is about a cell.
        hooks: the hooks of the SAEs, or of the cell; none where it is about the whole model.
        passages: what is read.
        function: the experiment's function.
        arguments: its arguments by name.

    Raises:
        WriteSAEError: the SAEs are of different models.
    """
    found = _warnings(model, saes, hooks, passages)
    for warning in found:
        warnings.warn(warning, ResultWarning, stacklevel=5)
    return {
        "text": passages.text,
        "text_hash": fingerprint(passages),
        "text_range": passages.token_range,
        "text_tokens": passages.numel(),
        "whole_text_hash": passages.whole_text,
        "model_fingerprint": fingerprint_model(model),
        "dtype": dtype_of(model),
        "version": version("writesae-lens"),
        "warnings": found,
        "call": call_of(model, hooks, passages.text, function, arguments),
    }


def now() -> str:
    """The date and time in UTC, to the second, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def with_warnings(headline: str, found: Sequence[str]) -> str:
    """A headline, with the result's warnings behind it."""
    return f"{headline} [{'; '.join(found)}]" if found else headline


def sentence(summary: Mapping[str, Any]) -> str:
    """A result's text, model, version, date and call in words, without what an earlier version left out."""
    text = "a text that it does not name"
    if "text_hash" in summary:
        text = str(summary.get("text"))
        if isinstance(span := summary.get("text_range"), list):
            text += f", tokens {' to '.join(map(_number, span))}"
        text += f" ({_number(summary.get('text_tokens'))} tokens, hash {summary['text_hash']})"
    model = f"{summary.get('model')}" + (f" in {summary['dtype']}" if "dtype" in summary else "")
    parts = [f"Measured on {text}", model]
    if "version" in summary:
        parts.append(f"writesae-lens {summary['version']}, {summary.get('date')}")
    return "; ".join(parts) + (f": {summary['call']}" if "call" in summary else ".")


def _number(x: Any) -> str:
    return f"{x:,}" if isinstance(x, int) else str(x)


def dtype_of(model: HookedRecurrent) -> str:
    """The name of the number format of a model's weights (of the embedding: some keep a few others)."""
    weights = (x for x in model.original_model.parameters() if x.is_floating_point())
    return str(next(weights).dtype).removeprefix("torch.")


def _warnings(
    model: HookedRecurrent, saes: Sequence[SAE[Any]], hooks: Sequence[str], passages: Passages
) -> list[str]:
    """What speaks against a result's figures, a line each."""
    found, dtype = [], dtype_of(model)
    if any(model.site(hook).cell.layer == 0 for hook in hooks):
        found.append(N_GRAM_TABLE)
    if dtype in HALF_PRECISION:
        found.append(f"the model is in {dtype}, so small effects may be rounding: repeat it in float32")
    named = {_plain_name(name): name for sae in saes if (name := sae.cfg.metadata.model_name)}
    if len(named) > 1:
        raise WriteSAEError(
            f"the SAEs are of different models ({', '.join(map(str, named.values()))}): only SAEs of one "
            "model can be tested together"
        )
    own = model.cfg.model_name
    if named and _plain_name(own) not in named:
        found.append(f"the SAE is of the model {next(iter(named.values()))}, this is {own}")
    share = max((share_trained_on(model, sae, passages) for sae in saes), default=0.0)
    if share:
        shown_share = f"{share:.0%}" if share >= 0.01 else "a part"
        found.append(f"{shown_share} of this text is text that the SAE was trained on")
    return found


def _plain_name(name: Any) -> str:
    """A model's name without the folder or owner before it, so that a local copy has the same one."""
    return Path(str(name)).name.lower().replace("_", "-")


def share_trained_on(model: HookedRecurrent, sae: SAE[Any], passages: Passages) -> float:
    """The share of what is read that stands in the text that an SAE was trained on, as far as that is known.

    Known are the shipped text and text files that ``sae.cfg.metadata.dataset_path`` names. Line breaks and
    spaces do not count.
    """
    path = str(sae.cfg.metadata.dataset_path or "")
    if not _training_text(path) or model.tokenizer is None:
        return 0.0
    read = model.tokenizer.decode(passages.flatten().tolist(), skip_special_tokens=True)
    return _share_in(path, " ".join(read.split()))


@functools.lru_cache(maxsize=16)
def _share_in(path: str, text: str) -> float:
    """The share of a text that stands in a training text; cached, for a search in 60 MB takes seconds."""
    training = _training_text(path)
    stride = max(_STRIDE, len(text) // _MOST_PIECES)
    pieces = [text[i : i + _PIECE] for i in range(0, len(text) - _PIECE + 1, stride)]
    return sum(piece in training for piece in pieces) / max(1, len(pieces))


@functools.lru_cache(maxsize=4)
def _training_text(path: str) -> str:
    """The text that a data set's name stands for, with single spaces; empty where it is not known."""
    if path == zoo.TEXT_NAME:
        return " ".join(zoo.text("train").split())
    try:
        if not path or not Path(path).is_file() or Path(path).stat().st_size > _LARGEST_TEXT:
            return ""
        return " ".join(Path(path).read_text(encoding="utf-8", errors="ignore").split())
    except (OSError, ValueError):
        return ""


def call_of(
    model: HookedRecurrent,
    hooks: Sequence[str],
    text: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> str:
    """The call of an experiment as one line: model, hooks and text by name, and what is not a default.

    Args:
        model: the model.
        hooks: of the SAEs or the cell.
        text: the text's name.
        function: the experiment's function.
        arguments: its arguments by name.
    """
    parameters = inspect.signature(function).parameters
    about = [hooks[0] if len(hooks) == 1 else list(hooks)] if hooks else []
    subjects = (model.cfg.model_name, *about, text)
    parts = [f"{name}={subject!r}" for name, subject in zip(parameters, subjects)]
    for name, parameter in list(parameters.items())[len(subjects) :]:
        if name in ("progress_folder", "verbose") or name not in arguments:
            continue
        given = arguments[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            parts += [f"{option}={shown(value)}" for option, value in given.items()]
        elif name == "seed" or given != parameter.default:
            parts.append(f"{name}={shown(given)}")
    return " ".join(f"{function.__name__}({', '.join(parts)})".split())


def fingerprint_model(model: HookedRecurrent) -> str:
    """A short hash of a model's weights in their number format, whatever device they are on.

    Of every tensor the sum of its bits (as whole numbers) and 64 entries at equal distances count, for
    hashing all weights of a large model would take minutes.
    """
    tensors = [x.detach() for x in model.original_model.state_dict().values() if not x.is_meta]
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = []
    for x in tensors:
        whole = torch.view_as_real(x) if x.is_complex() else x
        flat = whole.contiguous().view(-1)
        bits = flat.view(kinds[flat.element_size()])
        some = bits[:: max(1, len(bits) // 64)][:64]
        # In cuts, for torch makes a copy in 64 bits of what it sums.
        sums = [part.sum(dtype=torch.int64) for part in bits.split(_BITS_AT_ONCE)]
        parts += [torch.cat([torch.stack(sums).sum()[None], some.to(torch.int64)])]
    about = str([(str(x.dtype), tuple(x.shape)) for x in tensors]).encode()
    every = [part.cpu() for part in parts]
    return fingerprint(torch.frombuffer(bytearray(about), dtype=torch.uint8), *every)


def fingerprint_sae(sae: SAE[Any]) -> str:
    """A short hash of an SAE's weights, by which results are told apart.

    A tied encoder's gain of 1 does not count: files from before it was kept have none.
    """
    weights = sae.state_dict()
    if "enc_gain" in weights and bool((weights["enc_gain"] == 1).all()):
        del weights["enc_gain"]
    return fingerprint(*weights.values())


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of the contents of tensors."""
    digest = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        digest.update(str((x.dtype, tuple(x.shape))).encode())
        digest.update(x.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()[:16]
