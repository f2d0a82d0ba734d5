"""What removing single features from single writes does to a logit difference, by full passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import run_lower_layers
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.unembedding import in_half_precision, logits_of, output_embedding, run_to_residual
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


def rounding(model: HookedRecurrent, question: Question, layer: int) -> float:
    """Standard deviation of the difference in L of two runs that differ in rounding alone, in logits.

    It is 0 from 32 bits on. As in `hooked_models.unembedding.rounding_kl`, each layer from ``layer`` on
    rounds the residual stream once in each run, x (1 + e) with e uniform within half a unit in the last
    place. So the variance is (eps^2 / 6) n_roundings sum_i (x_i dL/dx_i)^2, with x the last stream.

    Args:
        model: the model.
        question: what is compared.
        layer: of the edit.
    """
    if not in_half_precision(model):
        return 0.0
    with torch.no_grad():
        residual = run_to_residual(model, question.tokens[None], use_cache=False)[:, -1]
    n_roundings = len(model.blocks) - layer if torch.finfo(residual.dtype).bits < 32 else 1
    x = residual.detach().float().requires_grad_()
    (slope,) = torch.autograd.grad(question.differences(logits_of(model, x))[0], x)
    eps = torch.finfo(output_embedding(model).weight.dtype).eps
    return eps * math.sqrt(n_roundings / 6 * float((slope * x).detach().square().sum()))


def stacked(parts: Sequence[Factors]) -> Factors:
    """Single matrices ``[1, rank, d]`` as one batch, with zeros up to the highest rank."""
    rank = max(part.key.shape[1] for part in parts)
    sides = [
        torch.cat([functional.pad(side, (0, 0, 0, rank - side.shape[1])) for side in of])
        for of in zip(*parts, strict=True)
    ]
    return Factors(*sides)
