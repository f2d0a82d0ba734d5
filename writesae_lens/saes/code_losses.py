"""The training losses of codes, one function each, from each side by itself: neither X nor X^ is built.

A write of norm |X| has a unit key k and a unit value v; k^ and v^ are their stand-ins (v^ in units of |X|).
As in `writesae_lens.saes.losses`, a docstring gives a loss for one input, as a share of |X|^2; the function
returns the mean over the batch times the loss's weight, in units of the batch's mean |X|^2. So every write
counts the same, small or large. None: the loss does not apply.

To add a loss, write a function of a `CodeStep` and give it a line in `LOSSES`. Its weight is a field of
`WriteSAETrainingConfig`. The sparsity loss of an activation function is in `writesae_lens.saes.activations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from writesae_lens.saes.activations import Activation
from writesae_lens.saes.config import WriteSAETrainingConfig

# At most this many times k_aux dead codes take part in the dead-code loss.
_POOL_PER_K_AUX = 4


class Split(NamedTuple):
    """Writes norm * key value^T; key and value of norm 1 (of a zero write: 0)."""

    key: Float[Tensor, "row d_k"]
    value: Float[Tensor, "row d_v"]
    norm: Float[Tensor, " row"]


@dataclass(frozen=True)
class Side:
    """One side of a batch in training. Scores and coefficients are those of codes of norm 1.

    Args:
        activation: the function that turned scores into coefficients.
        target: the unit vectors x_n to be coded.
        codes: the codes c_i, of norm 1.
        scores: z_ni, before the activation function.
        acts: the coefficients a_ni.
        dead: which codes are dead, None if unknown.
    """

    activation: Activation
    target: Float[Tensor, "row d"]
    codes: Float[Tensor, "code d"]
    scores: Float[Tensor, "row code"]
    acts: Float[Tensor, "row code"]
    dead: Bool[Tensor, " code"] | None = None

    @cached_property
    def coded(self) -> Float[Tensor, "row d"]:
        """x^_n = sum_i a_ni c_i."""
        count = self.activation.count(self.acts)
        if count > len(self.codes) // 8:
            return self.acts @ self.codes
        values, indices = self.activation.chosen(self.acts)
        return functional.embedding_bag(indices, self.codes, per_sample_weights=values, mode="sum")

    @cached_property
    def errors(self) -> Float[Tensor, " row"]:
        """|x_n - x^_n|^2."""
        return (self.target - self.coded).square().sum(-1)


@dataclass(frozen=True)
class CodeStep:
    """One batch in training.

    Args:
        cfg: weights and counts of the losses.
        norm: |X_n|.
        key, value: the two sides.
        scores, acts: of both sides as SAELens gets them: key codes, then value codes in the writes' units.
        reads: the vectors r_nh with which tokens read each write, the own token's first, zero where the
            passage has ended; None if unknown.
        coefficients: present weights of the sparsity losses, by SAELens's names.
    """

    cfg: WriteSAETrainingConfig
    norm: Float[Tensor, " row"]
    key: Side
    value: Side
    scores: Float[Tensor, "row d_sae"]
    acts: Float[Tensor, "row d_sae"]
    reads: Float[Tensor, "row n_reads d_k"] | None = None
    coefficients: dict[str, float] | None = None

    @cached_property
    def unit(self) -> Float[Tensor, ""]:
        """Root mean square of |X_n|."""
        return self.norm.square().mean().sqrt().detach()

    def losses(self) -> dict[str, Tensor]:
        """Every loss that applies, weighted, by name; the training loss is their sum."""
        values = {name: loss(self) for name, loss in LOSSES.items()}
        applied = {name: value for name, value in values.items() if value is not None}
        for side in (self.key, self.value):
            for name, loss in side.activation.losses(side.scores, self.unit, self.coefficients or {}).items():
                applied[name] = applied[name] + loss if name in applied else loss
        return applied


def mse(step: CodeStep) -> Tensor:
    """|k - k^|^2 + |v - v^|^2: the squared errors with one side in code and the other as it is, added up.

    To first order this is |X - X^|^2 / |X|^2 of the stand-in itself. Of a zero write it is 0.
    """
    errors = (step.key.errors + step.value.errors) * (step.norm > 0)
    return step.unit.square() * errors.mean()


def dead_codes(step: CodeStep) -> Tensor:
    """|x - x^ - x^_dead|^2 of both sides: the strongest dead codes code what the live ones leave over.

    x^_dead adds up, for each input, the k_aux dead codes of a side with the largest scores, at these scores.
    No gradient reaches the live codes.
    """
    weight, k_aux = step.cfg.aux_loss_coefficient, step.cfg.k_aux
    total = step.unit.new_zeros(())
    for side in (step.key, step.value):
        pool = None if side.dead is None else side.dead.nonzero().squeeze(-1)
        if pool is None or len(pool) == 0 or not (weight and k_aux):
            continue
        n_dead = len(pool)
        if n_dead > _POOL_PER_K_AUX * k_aux:
            strongest = side.scores.detach()[:, pool].amax(0).topk(_POOL_PER_K_AUX * k_aux).indices
            pool = pool[strongest]
        scores = side.scores[:, pool]
        if len(pool) > k_aux:
            values, indices = scores.topk(k_aux, dim=-1, sorted=False)
            scores = torch.zeros_like(scores).scatter(-1, indices, values)
        by_dead = scores @ side.codes[pool]
        left_over = (side.target - side.coded).detach()
        total = total + min(1.0, n_dead / k_aux) * (left_over - by_dead).square().sum(-1).mean()
    return weight * step.unit.square() * total


def read_alignment(step: CodeStep) -> Tensor | None:
    """e / (1 + e) with e = sum_h |(r_h . k^) v^ - (r_h . k) v|^2 / sum_h (r_h . k)^2: the error as read.

    The ratio saturates, so that every write counts, not only those that are hard to code. A write that
    nobody reads has none.
    """
    weight = step.cfg.read_alignment_coefficient
    if not weight or step.reads is None:
        return None
    native = torch.einsum("nhk,nk->nh", step.reads, step.key.target)
    by_codes = torch.einsum("nhk,nk->nh", step.reads, step.key.coded)
    power = native.square().sum(-1)
    squared = step.value.coded.square().sum(-1) * by_codes.square().sum(-1)
    along = (step.value.coded * step.value.target).sum(-1) * (by_codes * native).sum(-1)
    ratio = (squared - 2 * along + power).clamp(min=0) / power.clamp(min=torch.finfo(power.dtype).tiny)
    misread = ratio / (1 + ratio) * (power > 0)
    return weight * step.unit.square() * misread.mean()


# Names as SAELens logs them.
LOSSES: dict[str, Callable[[CodeStep], Tensor | None]] = {
    "mse_loss": mse,
    "auxiliary_reconstruction_loss": dead_codes,
    "read_alignment_loss": read_alignment,
}
