"""The training losses, one function each, from inner products: neither X nor its reconstruction is built.

A docstring gives a loss for one input, as a squared error or as a share. The function returns the mean over
the batch times the loss's weight, and shares in units of the mean |X|^2. None: the loss does not apply.

To add a loss, write a function of a `Step` and give it a line in `LOSSES`. Its weight is a field of
`WriteSAETrainingConfig`: checked in `_check_numbers` there, and 0 in the paper's recipe. Sparsity losses that
belong to an activation function are in `writesae_lens.saes.activations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from writesae_lens.saes.activations import Activation
from writesae_lens.saes.config import WriteSAETrainingConfig
from writesae_lens.saes.rank1 import (
    Factors,
    Matrices,
    built,
    inner,
    overlaps,
    squared_errors,
    squared_errors_of_codes,
    squared_norms,
    weighted_sums,
)

# The dead-atom loss costs the square of the atoms in it: at most this many times k_aux take part.
_POOL_PER_K_AUX = 4
# Read alignment looks at this many of an input's strongest atoms, weighted by a softmax of their coefficients
# with this temperature, in units of the input's norm.
_CANDIDATES, _TEMPERATURE = 4, 0.1


@dataclass(frozen=True)
class Step:
    """One batch in training. Scores and coefficients are those of atoms of norm 1.

    Args:
        cfg: weights and counts of the losses.
        activation: the function that turned scores into coefficients.
        rows: the inputs X_n.
        atoms: the decoder's atoms A_i, of norm 1.
        scores: z_ni, before the activation function.
        acts: the coefficients a_ni.
        bias: the decoder bias B, None if there is none.
        dead: which atoms are dead, None if unknown.
        reads: the vectors r_nh with which tokens read each write, the own token's first, those of later
            tokens pulled back to the write, zero where the passage has ended; None if unknown.
        coefficients: present weights of the sparsity losses, by SAELens's names.
    """

    cfg: WriteSAETrainingConfig
    activation: Activation
    rows: Matrices
    atoms: Matrices
    scores: Float[Tensor, "row d_sae"]
    acts: Float[Tensor, "row d_sae"]
    bias: Float[Tensor, "d_k d_v"] | None = None
    dead: Bool[Tensor, " d_sae"] | None = None
    reads: Float[Tensor, "row n_reads d_k"] | None = None
    coefficients: dict[str, float] | None = None

    @cached_property
    def squared(self) -> Float[Tensor, " row"]:
        """|X_n|^2."""
        return squared_norms(self.rows)

    @cached_property
    def unit(self) -> Float[Tensor, ""]:
        """Root mean square of |X_n|; its square brings losses that are shares to the units of the error."""
        return self.squared.mean().sqrt().detach()

    @cached_property
    def is_dense(self) -> bool:
        """Whether too many atoms of a row are active, or have gradients, for work on these alone to pay."""
        return self.activation.count(self.acts) > self.cfg.d_sae // 8

    @cached_property
    def errors(self) -> Float[Tensor, " row"]:
        """|X_n - X^_n|^2."""
        if self.is_dense:
            along = overlaps(self.rows, self.atoms)
            error = squared_errors_of_codes(along, self.squared, self.atoms, self.acts)
        else:
            values, indices = self.activation.chosen(self.acts)
            error = squared_errors(self.rows, self.atoms, indices, values)
        return error + _bias_terms(self.rows, self.atoms, self.acts, self.bias)

    def losses(self) -> dict[str, Tensor]:
        """Every loss that applies, weighted, by name; the training loss is their sum."""
        values = {name: loss(self) for name, loss in LOSSES.items()}
        applied = {name: value for name, value in values.items() if value is not None}
        return applied | self.activation.losses(self.scores, self.unit, self.coefficients or {})


def mse(step: Step) -> Tensor:
    """|X - X^|^2."""
    return step.errors.mean()


def dead_atoms(step: Step) -> Tensor:
    """|X - X^ - X^_dead|^2: the strongest dead atoms reconstruct what the live ones leave over.

    X^_dead adds up, for each input, the k_aux dead atoms with the largest scores, at these scores. No
    gradient reaches the live atoms.
    """
    cfg = step.cfg
    n_dead = 0 if step.dead is None else int(step.dead.sum())
    if step.dead is None or n_dead == 0 or not (cfg.aux_loss_coefficient and cfg.k_aux):
        return step.scores.new_zeros(())
    pool = step.dead.nonzero().squeeze(-1)
    if n_dead > _POOL_PER_K_AUX * cfg.k_aux:
        pool = pool[step.scores.detach()[:, pool].amax(0).topk(_POOL_PER_K_AUX * cfg.k_aux).indices]
    codes = step.scores[:, pool]
    if len(pool) > cfg.k_aux:
        values, indices = codes.topk(cfg.k_aux, dim=-1, sorted=False)
        codes = torch.zeros_like(codes).scatter(-1, indices, values)
    dead = step.atoms[pool]
    left_over = _left_over_along(step, dead)
    error = squared_errors_of_codes(left_over, step.errors.detach(), dead, codes).mean()
    return cfg.aux_loss_coefficient * min(1.0, n_dead / cfg.k_aux) * error


def gate_reconstruction(step: Step) -> Tensor | None:
    """|X - X^_gate|^2 of Gated SAEs, from the gate's codes alone; the decoder does not learn from it."""
    codes = step.activation.gate_codes(step.scores)
    if codes is None:
        return None
    atoms, bias = step.atoms.detach(), None if step.bias is None else step.bias.detach()
    error = squared_errors_of_codes(overlaps(step.rows, atoms), step.squared, atoms, codes)
    return (error + _bias_terms(step.rows, atoms, codes, bias)).mean()


def write_alignment(step: Step) -> Tensor | None:
    """1 - cos(X, A) of each input's dominant atom A, the one with the largest coefficient."""
    weight = step.cfg.write_alignment_coefficient
    if not weight:
        return None
    dominant = step.atoms[step.acts.argmax(-1)]
    cosine = inner(step.rows, dominant) / step.squared.sqrt().clamp(min=1e-30)
    fires = (step.acts.amax(-1) > 0).to(cosine)
    misaligned = ((1 - cosine) * fires).sum() / fires.sum().clamp(min=1)
    return weight * step.unit.square() * misaligned


def read_alignment(step: Step) -> Tensor | None:
    """r / (1 + r) with r = sum_h |c A^T r_h / s - X^T r_h|^2 / sum_h |X^T r_h|^2: the error as it is read.

    The sums are over the write's own read and the later ones that are known. The ratio saturates, so that
    every write counts, not only the large ones. It is a mean over the strongest atoms, weighted by a softmax
    of their coefficients c, so that the encoder learns which atom to prefer. s is the share of the write that
    its dominant atom should take (`dominant_share`; of a tied encoder 1).
    """
    cfg = step.cfg
    if not cfg.read_alignment_coefficient or step.reads is None:
        return None
    indices = step.scores.topk(min(_CANDIDATES, step.scores.shape[-1]), dim=-1).indices
    share = 1.0 if cfg.encoder == "tied" else cfg.dominant_share
    values = step.activation.coefficients_of(step.scores).gather(-1, indices) / share
    weights = (values / (_TEMPERATURE * step.squared.sqrt().clamp(min=1e-30)[:, None])).softmax(-1)
    native = _read_out(step.rows[:, None], step.reads)
    by_atoms = _read_out(step.atoms[indices], step.reads) * values[..., None, None]
    power = native.square().sum((-1, -2)).clamp(min=1e-30)
    ratio = (by_atoms - native).square().sum((-1, -2)) / power
    misread = (weights * ratio / (1 + ratio)).sum(-1)
    return cfg.read_alignment_coefficient * step.unit.square() * misread.mean()


# Names as SAELens logs them.
LOSSES: dict[str, Callable[[Step], Tensor | None]] = {
    "mse_loss": mse,
    "auxiliary_reconstruction_loss": dead_atoms,
    "gate_reconstruction_loss": gate_reconstruction,
    "write_alignment_loss": write_alignment,
    "read_alignment_loss": read_alignment,
}


def _left_over_along(step: Step, dead: Matrices) -> Float[Tensor, "row dead"]:
    """<X - X^, D_i> for dead atoms D_i, with gradients for these alone.

    Of writes and atoms in factors it is <X, D_i> less a sum over the row's active atoms of their inner
    products with D_i, each computed once a batch. Else X - X^ is built.
    """
    bias = None if step.bias is None else step.bias.detach()
    acts, live = step.acts.detach(), step.atoms.detach()
    if not (isinstance(step.rows, Factors) and isinstance(live, Factors)):
        left_over = built(step.rows).detach() - weighted_sums(acts, live)
        return overlaps(left_over if bias is None else left_over - bias, dead)
    along = overlaps(step.rows, dead)
    if step.is_dense:
        along = along - acts @ overlaps(live, dead)
    else:
        values, indices = step.activation.chosen(acts)
        active, places = indices.unique(return_inverse=True)
        shared = overlaps(live[active], dead)
        along = along - embedding_bag(places, shared, per_sample_weights=values, mode="sum")
    return along if bias is None else along - inner(dead, bias)


def _bias_terms(
    rows: Matrices,
    atoms: Matrices,
    codes: Float[Tensor, "row d_sae"],
    bias: Float[Tensor, "d_k d_v"] | None,
) -> Tensor | float:
    """|X - sum_i codes_i A_i - B|^2 - |X - sum_i codes_i A_i|^2."""
    if bias is None:
        return 0.0
    return 2 * ((codes * inner(atoms, bias)).sum(-1) - inner(rows, bias)) + bias.square().sum()


def _read_out(
    matrices: Matrices, reads: Float[Tensor, "row n_reads d_k"]
) -> Float[Tensor, "row atom n_reads d_v"]:
    """X^T r for matrices ``[row, atom]`` and some read vectors a row."""
    if isinstance(matrices, Factors):
        return (reads[:, None] @ matrices.key.mT) @ matrices.value
    return reads[:, None] @ matrices
