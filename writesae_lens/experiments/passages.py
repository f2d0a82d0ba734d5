"""Passages of text: token tensors of equal length that every experiment reads."""

from __future__ import annotations

import hashlib
import operator
import os
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Count, check, shown
from writesae_lens.experiments.subjects import check_model

DEFAULT_CONTEXT = 256
"""Tokens of a passage where neither the caller nor the SAE's training gives a number."""
_TOKEN_DTYPES = (torch.int64, torch.int32)


class Passages(Tensor):
    """Passages ``[passage, pos]`` that know which text they were cut from.

    To torch a plain LongTensor. A slice of passages (``passages[-24:]``) knows which ones it holds; whatever
    else is computed from them is a plain tensor.

    Attributes:
        text: name of the text; "tokens" where token ids were given.
        whole_text: hash of the whole text, also of what is not among the passages; None for token ids.
        step: tokens of the text in a passage, without a BOS token.
        first: number of the first passage in the text.
    """

    # As torch's own Parameter does: operations take it for a plain tensor and give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    text: str
    whole_text: str | None
    step: int
    first: int

    @staticmethod
    def of(
        tokens: Int[Tensor, "passage pos"],
        text: str = "tokens",
        whole_text: str | None = None,
        step: int = 0,
        first: int = 0,
    ) -> Passages:
        """Token ids with what they are passages of."""
        made = tokens.as_subclass(Passages)
        made.text, made.whole_text, made.step, made.first = text, whole_text, step, first
        return made

    def moved(self, device: torch.device) -> Passages:
        """The same passages on a device."""
        return Passages.of(
            self.as_subclass(Tensor).to(device), self.text, self.whole_text, self.step, self.first
        )

    @property
    def token_range(self) -> list[int] | None:
        """First token of the text that is read, and the one after the last; None for token ids."""
        if self.whole_text is None:
            return None
        return [self.first * self.step, (self.first + len(self)) * self.step]

    def __getitem__(self, index: Any) -> Any:
        chosen = super().__getitem__(index).as_subclass(Tensor)
        if not (isinstance(index, slice) and index.step in (None, 1)):
            return chosen
        first = self.first + index.indices(len(self))[0]
        return Passages.of(chosen, self.text, self.whole_text, self.step, first)


def as_passages(
    model: HookedRecurrent,
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None = None,
    prepend_bos: bool = False,
    name: str | None = None,
) -> Passages:
    """Passages of equal length on the model's device, from a token tensor or from text.

    Results name the text that their passages were cut from, so that no result is taken for one of another.

    Args:
        model: for its tokenizer and vocabulary.
        tokens: ``[passage, pos]``, or one text to cut into passages; a last, shorter piece is left out.
        context_size: tokens of a passage of text (None: 256).
        prepend_bos: start every passage of text with the BOS token, which counts as one of its tokens.
        name: of the text, for the results (None: that of a part of the shipped text, else "text").

    Raises:
        WriteSAEError: the text is shorter than one passage, the model has no tokenizer, or tokens are not
            ids of the model's vocabulary in the shape of passages.
    """
    check_model(model)
    check(Count | None, context_size=context_size)
    if isinstance(tokens, str):
        tokens = _cut(model, tokens, context_size or DEFAULT_CONTEXT, prepend_bos, name)
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
    device = next(model.original_model.parameters()).device
    return (tokens if isinstance(tokens, Passages) else Passages.of(tokens)).moved(device)


def _cut(model: HookedRecurrent, text: str, size: int, prepend_bos: bool, name: str | None) -> Passages:
    """Passages of ``size`` tokens of a text."""
    step = size - prepend_bos
    if not step:
        raise WriteSAEError(f"a passage of {size} tokens is too short: give a larger context_size")
    if lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise WriteSAEError(
            f"the text holds {lone!r}, half of a surrogate pair, which is no character: read it with the "
            "encoding that it was written with"
        )
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
    whole = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Passages.of(passages, name or _shipped_name(text) or "text", whole, step)


def _shipped_name(text: str) -> str | None:
    """The name of a part of the shipped text, or of all of it; None of any other text."""
    if text == zoo.held_out_text():
        return zoo.TEXT_NAME
    return next((zoo.part_name(part) for part in zoo.PARTS if text == zoo.text(part)), None)


def find_passages(
    model: HookedRecurrent,
    subject: SAE[Any] | Cell | tuple[int, int] | None,
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None,
    name: str | None = None,
) -> Passages:
    """`as_passages`, with the BOS token and (unless it is given) the context size of the SAE's training.

    Raises:
        WriteSAEError: as `as_passages`.
    """
    metadata = subject.cfg.metadata if isinstance(subject, SAE) else None
    if isinstance(tokens, str) and context_size is None and metadata is not None:
        context_size = metadata.context_size
    return as_passages(model, tokens, context_size, bool(metadata and metadata.prepend_bos), name)


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
    if isinstance(token, bool) or (isinstance(token, Tensor) and token.dtype == torch.bool):
        raise WriteSAEError(f"a token is an id or the text of one token, not {shown(token)}")
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


def other_token(model: HookedRecurrent, token: int | str, target: int) -> int:
    """The id of the token that a target is compared with.

    Raises:
        WriteSAEError: as `token_id`; or it is the target.
    """
    other = token_id(model, token)
    if other == target:
        raise WriteSAEError(f"target and alternative are the same token, {target}: give two")
    return other
