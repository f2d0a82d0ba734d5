"""Algebra of matrices that are sums of a few rank-1 terms, without building the matrices.

A write is X = key value^T; atom i is A_i = sum_r key_ir value_ir^T. Inner products factor,
<key value^T, v w^T> = (key . v)(value . w), so scores, reconstruction errors and overlaps cost d_k + d_v
multiplications a term where the flat formulas need d_k d_v.

Axis letters: N rows (writes), F atoms, J chosen atoms, R rank, K = d_k, V = d_v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A row counts as rank 1 if random probes see at most this much of something else, relative to its norm.
RANK1_TOLERANCE = 1e-5
_N_PROBES = 4
# Elements of the temporary that a dense score may build at once.
_BLOCK = 2**26


class Factors(NamedTuple):
    """Matrices as sums of rank-1 terms: ``key [..., rank, d_k]`` and ``value [..., rank, d_v]``."""

    key: Float[Tensor, "*batch rank d_k"]
    value: Float[Tensor, "*batch rank d_v"]

    def matrix(self) -> Float[Tensor, "*batch d_k d_v"]:
        """The matrices themselves."""
        return self.key.transpose(-1, -2) @ self.value

    def norm(self) -> Float[Tensor, "*batch"]:
        """Frobenius norms."""
        gram = (self.key @ self.key.transpose(-1, -2)) * (self.value @ self.value.transpose(-1, -2))
        return gram.sum((-1, -2)).clamp(min=0).sqrt()

    def normalized(self) -> Factors:
        """The same directions with Frobenius norm 1; at rank 1 both factors get norm 1."""
        key_norm = self.key.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        value_norm = self.value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        unit = Factors(self.key / key_norm, self.value / value_norm)
        if self.key.shape[-2] == 1:
            return unit
        size = key_norm * value_norm
        balanced = Factors(unit.key * size.sqrt(), unit.value * size.sqrt())
        scale = balanced.norm().clamp(min=1e-12).rsqrt()[..., None, None]
        return Factors(balanced.key * scale, balanced.value * scale)

    def __getitem__(self, index: object) -> Factors:  # type: ignore[override]
        """Index the batch axes."""
        return Factors(self.key[index], self.value[index])  # type: ignore[index]


def factor_rank1(rows: Float[Tensor, "row d_k_d_v"], d_k: int, d_v: int) -> Factors | None:
    """The factors of flattened rank-1 matrices, or None if any row is not rank 1.

    The row's largest matrix row is parallel to the value; the products with it give the key. A few random
    probes check that nothing else is there. Not differentiable.

    Args:
        rows: matrices, flattened row-major over ``[d_k, d_v]``; zero rows are fine.
        d_k, d_v: sides of the matrices.

    Returns:
        factors of rank 1 with unit values (the norm is the key's), in float32 at least.
    """
    with torch.no_grad():
        matrices = rows.detach().unflatten(-1, (d_k, d_v))
        matrices = matrices.to(torch.promote_types(rows.dtype, torch.float32))
        squares = torch.linalg.vecdot(matrices, matrices)
        largest = squares.argmax(-1)
        value = matrices[torch.arange(len(matrices), device=rows.device), largest]
        value = value / value.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(d_v, _N_PROBES, generator=generator).to(matrices)
        directions = torch.cat([value[..., None], probes.expand(len(value), -1, -1)], dim=-1)
        seen = matrices @ directions
        key = seen[..., 0]
        missed = seen[..., 1:] - key[..., None] * (value @ probes)[:, None, :]
        limit = RANK1_TOLERANCE if rows.dtype.itemsize >= 4 else 4 * torch.finfo(rows.dtype).eps
        bound = limit * squares.sum(-1).sqrt() * _N_PROBES**0.5
        if not bool((missed.flatten(1).norm(dim=-1) <= bound).all()):
            return None
        return Factors(key[:, None], value[:, None])


def scores(
    rows: Factors, atoms: Factors
) -> Float[Tensor, "row atom"]:
    """<X_n, A_i> of every row (rank 1) with every atom."""
    n_atoms, rank, _ = atoms.key.shape
    by_key = rows.key[:, 0] @ atoms.key.flatten(0, 1).T
    by_value = rows.value[:, 0] @ atoms.value.flatten(0, 1).T
    return (by_key * by_value).unflatten(-1, (n_atoms, rank)).sum(-1) if rank > 1 else by_key * by_value


def scores_dense(
    matrices: Float[Tensor, "row d_k d_v"], atoms: Factors
) -> Float[Tensor, "row atom"]:
    """<X_n, A_i> for rows of any rank, some atoms at a time."""
    n_atoms, rank, d_k = atoms.key.shape
    step = max(1, _BLOCK // max(1, len(matrices) * rank * d_k))
    blocks = []
    for start in range(0, n_atoms, step):
        key, value = (x[start : start + step].flatten(0, 1) for x in atoms)
        read = matrices @ value.T
        summed = torch.einsum("nkf,fk->nf", read, key)
        blocks.append(summed.unflatten(-1, (-1, rank)).sum(-1))
    return torch.cat(blocks, dim=-1)


def combine(
    atoms: Factors, indices: Int[Tensor, "row chosen"], coefficients: Float[Tensor, "row chosen"]
) -> Factors:
    """sum_j coefficient_nj A_(index_nj) as factors of rank chosen * rank."""
    key = atoms.key[indices] * coefficients[..., None, None]
    return Factors(key.flatten(1, 2), atoms.value[indices].flatten(1, 2))


def inner(left: Factors, right: Factors) -> Float[Tensor, "*batch"]:
    """<X_n, Y_n>, row by row."""
    by_key = left.key @ right.key.transpose(-1, -2)
    by_value = left.value @ right.value.transpose(-1, -2)
    return (by_key * by_value).sum((-1, -2))


def inner_with_matrix(rows: Factors, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, "*batch"]:
    """<X_n, M> for one matrix M."""
    return ((rows.key @ matrix) * rows.value).sum((-1, -2))
