"""What codes do in their cell: which later reads a key code meets, which tokens a value code promotes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.recordings import later_reads_of_head
from writesae_lens.experiments.features.activity import NUMBERS_AT_ONCE, Activity
from writesae_lens.experiments.passes import check_finite, unembedding_directions

DISTANCES = (0, 1, 2, 4, 8, 16, 32)
"""Distances, in tokens, from a write to the reads that are measured; 0 is the write's own token."""


@torch.no_grad()
def reads_met(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    tokens: Int[Tensor, " pos"],
    active: Activity,
    distances: Sequence[int] = DISTANCES,
) -> pd.DataFrame:
    """How strongly later reads meet the key codes that are active in a passage.

    What is written at the address u_i at t reaches the output h tokens on as <r_{t,h}, u_i> times its
    content, where r_{t,h} is that token's read vector, pulled back through the transitions between
    (`hooked_models.recordings.later_reads_of_head`): decay and erase are in it.

    Args:
        model: the model.
        sae: an SAE of codes.
        cell: its cell.
        tokens: one passage.
        active: what is active there.
        distances: h, in tokens.

    Returns:
        a row for each position, active key code and distance: code, position (t), distance (h), met
        (<r_{t,h}, u_i>, of the code at norm 1); none for reads past the passage's end.

    Raises:
        WriteSAEError: reads are not finite.
    """
    codes: Any = sae
    of_keys = (active.feature < active.n_key) & (active.coefficient > 0)
    at, code = active.position[of_keys].long(), active.feature[of_keys].long()
    reads = later_reads_of_head(model, tokens[None], cell.layer, cell.head, list(distances))[0].float()
    check_finite(f"reads of layer {cell.layer} head {cell.head}", reads)
    unit = torch.nn.functional.normalize(codes.dec_key.float(), dim=-1)
    met = (reads[at] @ unit[code][:, :, None]).squeeze(-1)
    steps = torch.tensor(distances, device=at.device)
    inside = at[:, None] + steps < len(tokens)
    columns = {
        "code": code[:, None].expand_as(met),
        "position": at[:, None].expand_as(met),
        "distance": steps.expand_as(met),
        "met": met.double(),
    }
    return pd.DataFrame({name: x[inside].cpu().numpy() for name, x in columns.items()})


def met_by_distance(met: pd.DataFrame) -> pd.DataFrame:
    """For how long each key code is read: the share of <read, code>^2 at each distance.

    Args:
        met: rows of `reads_met`, of any number of passages.

    Returns:
        a row a code, a column a distance: the mean of <r, u>^2 there over the sum of these means.
    """
    square = met.assign(square=met["met"] ** 2)
    means = square.pivot_table(
        index="code", columns="distance", values="square", aggfunc="mean", fill_value=0
    )
    return means.div(means.sum(axis=1).where(means.sum(axis=1) > 0), axis=0)


@torch.no_grad()
def promoted_tokens(
    model: HookedRecurrent, cell: Cell, values: Float[Tensor, "content d_v"], count: int
) -> tuple[Int[Tensor, "content token"], Float[Tensor, "content token"]]:
    """The tokens whose unembedding direction each content points along most, and how far.

    This is the paper's direction, W_O[head] W_U[token]: what a positive read of the content would promote if
    nothing stood between the head's output and the logits. `erase_atom` and the report measure what it does.
    """
    tokens, size = direct_tokens(model, cell, values, count)
    count = tokens.shape[1] // 2
    return tokens[:, :count], size[:, :count]


@torch.no_grad()
def direct_tokens(
    model: HookedRecurrent, cell: Cell, values: Float[Tensor, "content d_v"], count: int
) -> tuple[Int[Tensor, "content shown"], Float[Tensor, "content shown"]]:
    """The ``count`` tokens (at most half of all) that each content points along most, and against most.

    The directions W_O[head] W_U[token] have d_v numbers, fewer than the d_model of the unembedding, and are
    made once for all contents, for some tokens of the vocabulary at a time.

    Returns:
        tokens and the products of content and direction: first half the largest, falling; second half the
        smallest, rising.
    """
    count, device = min(count, model.cfg.d_vocab // 2), values.device
    sizes = torch.zeros(len(values), 0, device=device)
    best = dict.fromkeys((True, False), (sizes, sizes.long()))  # the largest, and the smallest
    step = max(1, NUMBERS_AT_ONCE // max(len(values), cell.d_v, model.cfg.d_model))
    for part in torch.arange(model.cfg.d_vocab, device=device).split(step):
        along = values.float() @ unembedding_directions(model, cell, part).T
        for largest, (sizes, tokens) in best.items():
            size, place = along.topk(min(count, len(part)), dim=1, largest=largest)
            size, tokens = torch.cat([sizes, size], dim=1), torch.cat([tokens, part[place]], dim=1)
            size, kept = size.topk(min(count, size.shape[1]), dim=1, largest=largest)
            best[largest] = size, tokens.gather(1, kept)
    sizes, tokens = (torch.cat(x, dim=1) for x in zip(*best.values(), strict=True))
    return tokens, sizes
