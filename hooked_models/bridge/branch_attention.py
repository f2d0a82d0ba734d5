"""Softmax attention in a run with swapped writes: some branches at a time, each with the mask that it needs.

The bridge's attention builds a matrix of all tokens by all tokens. A branch attends to the native tokens
before its position and to itself, so branches do not need each other: the attention is run for the native
tokens and some branches at a time, and its memory does not grow with the square of their number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_models import edits
from hooked_models.mixers import HookedMixer

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

# Entries of one layer's matrix over all heads: 64 MiB in float32, of which the bridge holds a few at once.
_SCORES_AT_ONCE = 2**24


def attention_of(module: nn.Module) -> Iterator[nn.Module]:
    """The softmax attentions in a module, beside and inside the mixers that are not recurrent."""
    for child in module.children():
        name = type(child).__name__
        if "Attention" in name and "DecoderLayer" not in name:  # as OlmoHybridAttentionDecoderLayer
            yield child
        elif not (isinstance(child, HookedMixer) and child.is_recurrent):
            yield from attention_of(child)


def run_in_cuts(model: HookedRecurrent) -> None:
    """Let every attention of a model look up whether it has branches; done once, when the model is loaded."""
    for block in model.blocks:
        for attention in dict.fromkeys(attention_of(block)):
            vars(attention)["forward"] = functools.partial(_forward, attention, model.cfg.n_heads)


def options_with_branches(
    model: HookedRecurrent, length: int, positions: Int[Tensor, " branch"]
) -> dict[str, Any]:
    """The mask and position ids of a passage and branches, for a model with softmax attention; else nothing.

    The mask only keeps transformers from making one: each attention is given its own.
    """
    if not model.has_attention:
        return {}
    ids = torch.cat([torch.arange(length, device=positions.device), positions])[None]
    nothing = torch.zeros(1, 1, 1, 1, device=positions.device)
    return {"attention_mask": nothing.expand(1, 1, ids.shape[1], ids.shape[1]), "position_ids": ids}


def _forward(attention: nn.Module, n_heads: int, *args: Any, **options: Any) -> Any:
    """The attention's own forward pass; with branches, one for the native tokens and each cut of them."""
    run = functools.partial(type(attention).forward, attention)
    swapped = edits.swapped_writes()
    if swapped is None:
        return run(*args, **options)
    native, count = swapped.n_native, len(swapped.positions)
    cut = max(native // 2, math.isqrt(_SCORES_AT_ONCE // n_heads) - native, 1)
    device, outputs = swapped.positions.device, []
    for some in torch.arange(count, device=device).split(cut) if count else [swapped.positions]:
        tokens = torch.cat([torch.arange(native, device=device), native + some])
        given = {name: _of_tokens(value, tokens, native + count) for name, value in options.items()}
        hidden = [_of_tokens(value, tokens, native + count) for value in args]
        states = hidden[0] if hidden else given["hidden_states"]
        given["attention_mask"] = _mask(native, swapped.positions[some], states.dtype)
        output = run(*hidden, **given)
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(output[:, native:] if outputs else output)
    return torch.cat(outputs, dim=1), None


def _of_tokens(value: Any, tokens: Int[Tensor, " some"], length: int) -> Any:
    """An argument's entries of some tokens, where it has an entry for each."""
    if isinstance(value, tuple):
        return tuple(_of_tokens(part, tokens, length) for part in value)
    has_tokens = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
    return value[:, tokens] if has_tokens else value


def _mask(native: int, positions: Int[Tensor, " branch"], dtype: torch.dtype) -> Float[Tensor, "1 1 all all"]:
    """0 where a token attends to another, the least number elsewhere."""
    at = torch.cat([torch.arange(native, device=positions.device), positions])
    sees = torch.eye(len(at), dtype=torch.bool, device=positions.device)
    sees[:, :native] |= at[:native] < at[:, None]
    mask = torch.zeros(sees.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[None, None]
