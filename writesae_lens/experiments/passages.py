"""Passages of text: token tensors of equal length that every experiment reads."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Count, check, shown
from writesae_lens.experiments.subjects import check_model

DEFAULT_CONTEXT = 256
"""Tokens of a passage where neither the caller nor the SAE's training gives a number."""
_TOKEN_DTYPES = (torch.int64, torch.int32)


def as_passages(
    model: HookedRecurrent,
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None = None,
    prepend_bos: bool = False,
) -> Int[Tensor, "passage pos"]:
    """Passages of equal length on the model's device, from a token tensor or from text.

    Args:
        model: for its tokenizer and vocabulary.
        tokens: ``[passage, pos]``, or one text to cut into passages; a last, shorter piece is left out.
        context_size: tokens of a passage of text (None: 256).
        prepend_bos: start every passage of text with the BOS token, which counts as one of its tokens.

    Raises:
        WriteSAEError: the text is shorter than one passage, the model has no tokenizer, or tokens are not
            ids of the model's vocabulary in the shape of passages.
    """
    check_model(model)
    check(Count | None, context_size=context_size)
    if isinstance(tokens, str):
        tokens = _cut(model, tokens, context_size or DEFAULT_CONTEXT, prepend_bos)
    elif context_size is not None:
        raise WriteSAEError("context_size cuts text; these tokens are cut into passages already")
    is_tensor = isinstance(tokens, Tensor)
    if not is_tensor or tokens.ndim != 2 or not tokens.numel() or tokens.dtype not in _TOKEN_DTYPES:
        raise WriteSAEError(
            f"tokens must be a LongTensor [passage, pos] or a text, got {shown(tokens)}: model.to_tokens "
            "makes them from text, torch.tensor from lists"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.cfg.d_vocab:
        raise WriteSAEError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())}, but the model has "
            f"{model.cfg.d_vocab} tokens: were they made with another tokenizer?"
        )
    return tokens.to(next(model.original_model.parameters()).device)


def _cut(model: HookedRecurrent, text: str, size: int, prepend_bos: bool) -> Int[Tensor, "passage pos"]:
    """Passages of ``size`` tokens of a text."""
    step = size - prepend_bos
    if not step:
        raise WriteSAEError(f"a passage of {size} tokens is too short: give a larger context_size")
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    if text and not len(ids):
        raise WriteSAEError("the model has no tokenizer to read text with: give token ids instead")
    if len(ids) < step:
        hint = "give more text or a smaller context_size"
        if os.path.isfile(text):
            hint = f"{text} is the name of a file: give what open(...).read() gives"
        raise WriteSAEError(f"the text is too short: {len(ids)} tokens, while one passage has {size}; {hint}")
    passages = ids[: len(ids) // step * step].view(-1, step)
    if prepend_bos:
        bos = torch.full_like(passages[:, :1], model.tokenizer.bos_token_id)
        passages = torch.cat([bos, passages], dim=1)
    return passages


def find_passages(
    model: HookedRecurrent,
    subject: SAE[Any] | Cell | tuple[int, int],
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None,
) -> Int[Tensor, "passage pos"]:
    """`as_passages`, with the BOS token and (unless it is given) the context size of the SAE's training.

    Raises:
        WriteSAEError: as `as_passages`.
    """
    metadata = subject.cfg.metadata if isinstance(subject, SAE) else None
    if isinstance(tokens, str) and context_size is None and metadata is not None:
        context_size = metadata.context_size
    return as_passages(model, tokens, context_size, bool(metadata and metadata.prepend_bos))


def check_horizon(passages: Int[Tensor, "passage pos"], max_horizon: int) -> None:
    """Refuse passages in which no position has ``max_horizon`` tokens after it.

    Raises:
        WriteSAEError: the passages are too short.
    """
    if passages.shape[1] <= max_horizon:
        raise WriteSAEError(
            f"passages of {passages.shape[1]} tokens have no room for a horizon of {max_horizon}: give "
            "longer ones, or a smaller max_horizon"
        )


def token_id(model: HookedRecurrent, token: int | str) -> int:
    """The id of a token that is given as an id, or as the text of exactly one token.

    Raises:
        WriteSAEError: there is no such id, or the text is not one token.
    """
    if isinstance(token, str):
        if model.tokenizer is None:
            raise WriteSAEError("the model has no tokenizer to read text with: give token ids instead")
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(model.tokenizer.decode([i])) for i in ids)
            raise WriteSAEError(
                f"{token!r} is not one token but {len(ids)} ({pieces}); many tokens start with a space"
            )
        return ids[0]
    try:
        token = operator.index(token)  # numpy's and torch's whole numbers too
    except TypeError as error:
        raise WriteSAEError(f"a token is an id or the text of one token, not {shown(token)}") from error
    if not 0 <= token < model.cfg.d_vocab:
        raise WriteSAEError(f"token {token} does not exist: ids run from 0 to {model.cfg.d_vocab - 1}")
    return token
