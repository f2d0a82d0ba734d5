"""What removing single features from single writes does to a logit difference, by full passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import run_lower_layers
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.unembedding import logits_of
from writesae_lens.saes.rank1 import Factors
from writesae_lens.use.attribution.memory import Question

# Tokens, over all rows, that one pass reads.
_TOKENS_AT_ONCE = 2**13


@torch.no_grad()
def without_parts(
    model: HookedRecurrent,
    question: Question,
    layer: int,
    heads: Int[Tensor, " row"],
    positions: Int[Tensor, " row"],
    parts: Factors,
) -> Float[Tensor, " row"]:
    """L of each row in a pass in which one write of the layer lacks one part, the erase staying native.

    Args:
        model: the model.
        question: what is compared, after which tokens.
        layer: of all writes.
        heads, positions: of each row's write.
        parts: what it lacks.
    """
    tokens, cell = question.tokens, model.cell(layer, 0)
    lower = run_lower_layers(model, tokens[None], layer, use_cache=False)
    differences = []
    for rows in torch.arange(len(positions), device=tokens.device).split(
        max(1, _TOKENS_AT_ONCE // len(tokens))
    ):
        residual = residual_with_added_writes(
            model,
            tokens,
            cell,
            positions[rows],
            -parts.key[rows],
            parts.value[rows],
            lower=lower,
            heads=heads[rows],
        )
        differences.append(question.differences(logits_of(model, residual[:, -1])))
    return torch.cat(differences)


def stacked(parts: Sequence[Factors]) -> Factors:
    """Single matrices ``[1, rank, d]`` as one batch, with zeros up to the highest rank."""
    rank = max(part.key.shape[1] for part in parts)
    sides = [
        torch.cat([functional.pad(side, (0, 0, 0, rank - side.shape[1])) for side in of])
        for of in zip(*parts, strict=True)
    ]
    return Factors(*sides)
