"""What is read and through what: one prompt, and the SAEs of one or more cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import shown
from writesae_lens.experiments.passages import Passages, as_passages, find_passages
from writesae_lens.experiments.subjects import find_site

SAEs = SAE[Any] | Iterable[SAE[Any]]
"""One SAE, or several, each of a site of its own."""
Prompt = Int[Tensor, "*row pos"] | Int[np.ndarray, "*row pos"] | Sequence[int] | Sequence[Sequence[int]] | str
"""A text, or token ids ``[pos]`` or ``[1, pos]`` as a tensor, an array or a list."""


def saes_by_site(model: HookedRecurrent, saes: SAEs) -> dict[Site, SAE[Any]]:
    """The SAEs by the write or state that each was trained on, in the order of layers and heads.

    Args:
        model: the model that they were trained on.
        saes: one SAE or several; of a mapping the values.

    Raises:
        WriteSAEError: there is none, two belong to the same site, or one does not fit the model.
        HookedModelError: the model has no such cell.
    """
    if isinstance(saes, SAE):
        saes = [saes]
    if isinstance(saes, Mapping):
        saes = saes.values()
    if not isinstance(saes, Iterable):
        raise WriteSAEError(f"an SAE or a list of SAEs is wanted, got {shown(saes)}")
    found: dict[Site, SAE[Any]] = {}
    for sae in saes:
        site = find_site(model, sae)
        if site in found:
            where = f"the {site.kind} of layer {site.cell.layer} head {site.cell.head}"
            raise WriteSAEError(f"two SAEs belong to {where}: give one for each")
        found[site] = sae
    if not found:
        raise WriteSAEError("there are no SAEs: give one at least")
    return dict(sorted(found.items(), key=lambda item: (item[0].cell.layer, item[0].cell.head, item[0].kind)))


def prompt_tokens(model: HookedRecurrent, saes: Iterable[SAE[Any]], prompt: Prompt) -> Passages:
    """One prompt as passages of one row, ``[1, pos]``, on the model's device.

    Args:
        model: for its tokenizer and vocabulary.
        saes: a BOS token is set before a text where the SAEs were trained with one.
        prompt: a text, or token ids ``[pos]`` or ``[1, pos]``, which are taken as they are.

    Raises:
        WriteSAEError: the prompt is empty, several rows, or neither text nor ids of the model's vocabulary,
            or the SAEs differ in whether they were trained with a BOS token.
        HookedModelError: a text for a model without a tokenizer.
    """
    if isinstance(prompt, str):
        with_bos = {bool(sae.cfg.metadata.prepend_bos) for sae in saes}
        if len(with_bos) > 1:
            raise WriteSAEError(
                "some SAEs were trained with a BOS token and some without: give the prompt as token ids"
            )
        ids = model.to_tokens(prompt, prepend_bos=False, truncate=False)
        if not ids.numel():
            raise WriteSAEError("the prompt is empty: give text or token ids")
        return as_passages(model, prompt, ids.shape[1] + any(with_bos), any(with_bos), "prompt")
    ids = prompt if isinstance(prompt, Tensor) else _whole_numbers(prompt)
    if ids is None or ids.ndim not in (1, 2) or not ids.numel() or ids.is_floating_point():
        raise WriteSAEError(
            f"a prompt is a text, or token ids [pos], a list or a tensor, one id at least; got "
            f"{shown(prompt)}"
        )
    tokens = find_passages(model, None, ids[None] if ids.ndim == 1 else ids, None)
    if len(tokens) != 1:
        raise WriteSAEError(f"one prompt is wanted, got {len(tokens)} rows: call once for each")
    return tokens


def _whole_numbers(prompt: Any) -> Int[Tensor, "..."] | None:
    """Lists and arrays of whole numbers as a tensor; None of anything else."""
    try:
        numbers = np.asarray(prompt)
    except (ValueError, TypeError, RuntimeError):  # rows of several lengths, or no numbers at all
        return None
    return torch.from_numpy(numbers.astype(np.int64)) if numbers.dtype.kind in "iu" else None
