"""Algebra of matrices that are sums of a few rank-1 terms, without building the matrices.

A write is X = key value^T; atom i is A_i = sum_r key_ir value_ir^T. Inner products factor,
<key value^T, v w^T> = (key . v)(value . w), so scores, reconstruction errors and overlaps cost d_k + d_v
multiplications a term where the flat formulas need d_k d_v.

Matrices without such factors (states, the atoms of a dense decoder) are plain tensors [.., d_k, d_v]; every
function takes either form.

Axis letters: N rows (writes), F atoms, J chosen atoms, R rank, K = d_k, V = d_v.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A row counts as rank 1 if its product with a random vector differs from that of its factors by at most
# this share of its norm.
RANK1_TOLERANCE = 1e-5
# Elements of the block of memory in which atoms are built.
_BLOCK = 2**22
# Measured at 128 x 128. An atom is built in the time that is saved by a product with it for d_v / 4 inputs.
_BUILD = 4
# A weight that is treated by itself takes as long as this many in a product of full matrices.
_PER_WEIGHT = 6
# Gradients with fewer nonzero entries than one in this many are computed entry by entry.
_SPARSE = 128


class Factors(NamedTuple):
    """Matrices as sums of rank-1 terms: ``key [..., rank, d_k]`` and ``value [..., rank, d_v]``."""

    key: Float[Tensor, "*batch rank d_k"]
    value: Float[Tensor, "*batch rank d_v"]

    def matrix(self) -> Float[Tensor, "*batch d_k d_v"]:
        """The matrices themselves."""
        return self.key.transpose(-1, -2) @ self.value

    def norm(self) -> Float[Tensor, "*batch"]:
        """Frobenius norms."""
        if self.key.shape[-2] == 1:
            return (self.key.norm(dim=-1) * self.value.norm(dim=-1)).squeeze(-1)
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

    def detach(self) -> Factors:
        return Factors(self.key.detach(), self.value.detach())


def factor_rank1(rows: Float[Tensor, "row d_k_d_v"], d_k: int, d_v: int) -> Factors | None:
    """The factors of flattened rank-1 matrices, or None if any row is not rank 1.

    The largest row of a matrix is parallel to its value; the products with it give the key. A product with a
    random vector checks that the matrix has no other part. Not differentiable.

    Args:
        rows: matrices, flattened row-major over ``[d_k, d_v]``; zero rows are fine.
        d_k, d_v: sides of the matrices.

    Returns:
        factors of rank 1 with unit values (the norm is the key's), in float32 at least.
    """
    if not len(rows):
        return Factors(rows.new_zeros(0, 1, d_k), rows.new_zeros(0, 1, d_v))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        matrices = rows.detach().unflatten(-1, (d_k, d_v))
        matrices = matrices.to(torch.promote_types(rows.dtype, torch.float32))
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(d_v, generator=generator).to(matrices)
        # In a rank-1 matrix every row is parallel to the value: the largest product is the largest row.
        probed = (matrices.flatten(0, 1) @ probe).unflatten(0, matrices.shape[:2])
        largest = probed.abs().argmax(-1)
        value = matrices[torch.arange(len(matrices), device=rows.device), largest]
        value = value / value.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        key = (value[:, None] @ matrices.mT).squeeze(1)  # this way round several times as fast
        missed = (probed - key * (value @ probe)[:, None]).norm(dim=-1)
        limit = RANK1_TOLERANCE if rows.dtype.itemsize >= 4 else 4 * torch.finfo(rows.dtype).eps
        if not bool((missed <= limit * key.norm(dim=-1)).all()):
            return None
        return Factors(key[:, None], value[:, None])


# A batch of matrices: in factors, or built [.., d_k, d_v].
Matrices: TypeAlias = Factors | Tensor


def built(matrices: Matrices) -> Float[Tensor, "*batch d_k d_v"]:
    """The matrices themselves."""
    return matrices.matrix() if isinstance(matrices, Factors) else matrices


def tensors(matrices: Matrices) -> tuple[Tensor, ...]:
    """The tensors that store the matrices: key and value factors, or the one tensor."""
    return tuple(matrices) if isinstance(matrices, Factors) else (matrices,)


def squared_norms(matrices: Matrices) -> Float[Tensor, "*batch"]:
    """|X_n|^2."""
    if isinstance(matrices, Factors):
        return matrices.norm().square()
    return matrices.square().sum((-1, -2))


def normalized(matrices: Matrices) -> Matrices:
    """The same directions with Frobenius norm 1."""
    if isinstance(matrices, Factors):
        return matrices.normalized()
    return matrices / matrices.flatten(-2).norm(dim=-1).clamp(min=1e-12)[..., None, None]


def leading_pairs(matrices: Matrices) -> Factors:
    """The best rank-1 approximation of each matrix, with norm 1 (zero matrices stay zero)."""
    if isinstance(matrices, Factors) and matrices.key.shape[-2] == 1:
        return matrices.normalized()
    left, _, right = torch.linalg.svd(built(matrices), full_matrices=False)
    return Factors(left[..., :1].mT, right[..., :1, :])


def overlaps(left: Matrices, right: Matrices) -> Float[Tensor, "left right"]:
    """<X_n, Y_i> of every left with every right matrix."""
    if not isinstance(right, Factors):
        return built(left).flatten(-2) @ right.flatten(-2).T
    if not isinstance(left, Factors):
        return _dense_overlaps(left, right)
    by_key = left.key.flatten(0, 1) @ right.key.flatten(0, 1).T
    by_value = left.value.flatten(0, 1) @ right.value.flatten(0, 1).T
    terms = by_key * by_value
    ranks = left.key.shape[1], right.key.shape[1]
    if ranks == (1, 1):
        return terms
    return terms.unflatten(1, (-1, ranks[1])).unflatten(0, (-1, ranks[0])).sum((1, 3))


def scores(rows: Matrices, encoder: Matrices) -> Float[Tensor, "row atom"]:
    """`overlaps` for inputs that need no gradient; its backward is cheap where few entries have one."""
    if isinstance(rows, Factors) and isinstance(encoder, Factors):
        return _Scores.apply(rows.key[:, 0], rows.value[:, 0], *encoder)
    return overlaps(rows, encoder)


def linear_scores(
    rows: Float[Tensor, "row d"], encoder: Float[Tensor, "code d"]
) -> Float[Tensor, "row code"]:
    """<x_n, e_i>; for inputs that need no gradient, its backward is cheap where few entries have one."""
    if rows.requires_grad:
        return rows @ encoder.T
    return _LinearScores.apply(rows, encoder)


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, encoder: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ encoder.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), grad = ctx.saved_tensors, grads[0]
        if int(grad.count_nonzero()) * _SPARSE > grad.numel():
            return None, grad.T @ rows
        row, code = grad.nonzero(as_tuple=True)
        terms = rows[row] * grad[row, code][:, None]
        return None, rows.new_zeros(grad.shape[1], rows.shape[1]).index_add_(0, code, terms)


class _Scores(torch.autograd.Function):
    """z_nf = sum_r (x_n . k_fr)(y_n . v_fr); TopK lets gradients through to k entries of a row only."""

    @staticmethod
    def forward(ctx: Any, x_key: Tensor, x_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_key, by_value = x_key @ key.flatten(0, 1).T, x_value @ value.flatten(0, 1).T
        ctx.save_for_backward(x_key, x_value, by_key, by_value)
        ctx.rank = key.shape[1]
        terms = by_key * by_value
        return terms if ctx.rank == 1 else terms.unflatten(1, (-1, ctx.rank)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_key, x_value, by_key, by_value = ctx.saved_tensors
        grad = grads[0] if ctx.rank == 1 else grads[0].repeat_interleave(ctx.rank, dim=1)
        # Columns with many entries that are not zero, as those of dead atoms in their loss, as products; the
        # other entries one by one.
        full = grad.count_nonzero(0) * _SPARSE > len(grad)
        if 2 * int(full.sum()) > len(full):
            out = [(grad * other).T @ x for x, other in ((x_key, by_value), (x_value, by_key))]
            return None, None, *(g.unflatten(0, (-1, ctx.rank)) for g in out)
        columns, (row, atom) = full.nonzero().squeeze(-1), grad.nonzero(as_tuple=True)
        single = ~full[atom]
        row, atom = row[single], atom[single]
        chosen, part, out = grad[row, atom], grad[:, columns], []
        for x, other in ((x_key, by_value), (x_value, by_key)):
            terms = x[row] * (chosen * other[row, atom])[:, None]
            summed = x.new_zeros(grad.shape[1], x.shape[1]).index_add_(0, atom, terms)
            summed[columns] = (part * other[:, columns]).T @ x
            out.append(summed)
        return None, None, *(g.unflatten(0, (-1, ctx.rank)) for g in out)


def _dense_overlaps(matrices: Float[Tensor, "row d_k d_v"], atoms: Factors) -> Float[Tensor, "row atom"]:
    """<X_n, A_i> of built matrices with atoms in factors.

    X_n v_i, then its product with k_i, takes as many multiplications as one product with the built atom, and
    d_k numbers more a pair. Building an atom takes d_k d_v numbers once for all rows, so that it pays from
    d_v / _BUILD rows on.
    """
    rank = atoms.key.shape[1]
    if len(matrices) * rank * _BUILD >= atoms.value.shape[-1]:
        return _DenseOverlaps.apply(matrices, *atoms)
    key, value = (x.flatten(0, 1) for x in atoms)
    terms = torch.einsum("nkf,fk->nf", matrices @ value.T, key)
    return terms if rank == 1 else terms.unflatten(-1, (-1, rank)).sum(-1)


def weighted_sums(weights: Float[Tensor, "row atom"], atoms: Matrices) -> Float[Tensor, "row d_k d_v"]:
    """sum_i weight_ni A_i, built; every weight has its gradient, weights of 0 too."""
    if isinstance(atoms, Factors):
        return _WeightedSums.apply(weights, *atoms)
    if not (torch.is_grad_enabled() and weights.requires_grad) and _few(weights):
        return combine(atoms, *_chosen(weights))
    return (weights @ atoms.flatten(-2)).unflatten(-1, atoms.shape[-2:])


# `_DenseOverlaps` and `_WeightedSums` are the derivatives of sum_ni g_ni <X_n, A_i> by g and by X: the
# backward pass of each is the other. Atoms are built some at a time, in one block of memory, and built again
# in the backward pass rather than kept: all together they take 1 GiB at 16,384 atoms of 128 x 128.


class _DenseOverlaps(torch.autograd.Function):
    """<X_n, A_i>, as products with the built atoms."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(matrices, key, value)
        flat, (n_atoms, _, d_k), d_v = matrices.flatten(-2), key.shape, value.shape[-1]
        step = _per_block(d_k * d_v)
        memory = key.new_empty(min(step, n_atoms), d_k, d_v)
        parts = []
        for k, v in zip(key.split(step), value.split(step)):
            block = torch.matmul(k.mT, v, out=memory[: len(k)])
            parts.append(flat @ block.flatten(-2).T)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matrices, key, value = ctx.saved_tensors
        by_matrices, by_atoms = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        grad = weighted_sums(grads[0], Factors(key, value)) if by_matrices else None
        return grad, *(_by_factors(grads[0], matrices, key, value) if by_atoms else (None, None))


class _WeightedSums(torch.autograd.Function):
    """sum_i weight_ni A_i: of the chosen atoms where they are few, else as products with the built atoms."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weights, key, value)
        if _few(weights, key.shape[1]):
            return combine(Factors(key, value), *_chosen(weights))
        (n_atoms, _, d_k), d_v = key.shape, value.shape[-1]
        step = _per_block(n_atoms * d_v)
        memory = key.new_empty(n_atoms, min(step, d_k), d_v)
        parts = []
        for k in key.split(step, dim=-1):
            block = torch.matmul(k.mT, value, out=memory[:, : k.shape[-1]])
            parts.append(weights @ block.flatten(-2))
        return torch.cat(parts, dim=-1).unflatten(-1, (d_k, d_v))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, key, value = ctx.saved_tensors
        by_weights, by_atoms = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        grad = _dense_overlaps(grads[0], Factors(key, value)) if by_weights else None
        return grad, *(_by_factors(weights, grads[0], key, value) if by_atoms else (None, None))


def _by_factors(
    weights: Float[Tensor, "row atom"], matrices: Float[Tensor, "row d_k d_v"], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivatives of sum_ni weight_ni <X_n, A_i> by the atoms' factors.

    Where few weights of a row are not 0, each row is multiplied with its own atoms. Else, and where these
    derivatives are to have derivatives, one product each leads from G_i = sum_n weight_ni X_n to the factors.
    """
    rank, sides = key.shape[1], matrices.shape[-2:]
    if torch.is_grad_enabled() or not _few(weights, rank):
        step = _per_block(sides.numel())
        parts = []
        for columns, k, v in zip(weights.split(step, -1), key.split(step), value.split(step)):
            summed = (columns.T @ matrices.flatten(-2)).unflatten(-1, sides)
            parts.append((v @ summed.mT, k @ summed))
        by_key, by_value = (torch.cat(side) for side in zip(*parts))
        return by_key, by_value
    indices, chosen = _chosen(weights)
    wide = torch.promote_types(key.dtype, torch.float32)
    by_key, by_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
    step = _per_block(indices.shape[1] * rank * sum(sides))
    for atoms, weight, rows in zip(indices.split(step), chosen.split(step), matrices.split(step)):
        weight = weight.repeat_interleave(rank, dim=-1)[..., None]
        for out, other, right in ((by_key, value, rows.mT), (by_value, key, rows)):
            terms = (other[atoms].flatten(1, 2) @ right) * weight
            out.index_add_(0, atoms.flatten(), terms.view(-1, *out.shape[1:]).to(wide))
    return by_key.to(key.dtype), by_value.to(value.dtype)


def _per_block(size: int) -> int:
    """How many tensors of so many numbers fit into a block, 1 at least."""
    return max(1, _BLOCK // max(1, size))


def _few(weights: Float[Tensor, "row atom"], rank: int = 1) -> bool:
    """Whether work on the weights that are not 0 alone is cheaper than one product of full matrices."""
    return _most(weights) * rank * _PER_WEIGHT <= weights.shape[-1]


def _most(weights: Float[Tensor, "row atom"]) -> int:
    """The most weights of a row that are not 0, and 1 at least."""
    return max(1, int(weights.count_nonzero(-1).amax())) if weights.numel() else 1


def _chosen(weights: Float[Tensor, "row atom"]) -> tuple[Tensor, Tensor]:
    """Indices of the weights that are not 0 and these weights, as many a row as the fullest one has."""
    indices = weights.abs().topk(_most(weights), dim=-1, sorted=False).indices
    return indices, weights.gather(-1, indices)


def inner(left: Matrices, right: Matrices) -> Float[Tensor, " row"]:
    """<X_n, Y_n>, row by row."""
    if not isinstance(left, Factors):
        if isinstance(right, Factors):
            return inner(right, left)
        return (left * right).sum((-1, -2))
    if isinstance(right, Factors):
        return ((left.key @ right.key.mT) * (left.value @ right.value.mT)).sum((-1, -2))
    return ((left.key @ right) * left.value).sum((-1, -2))


def squared_errors(
    rows: Matrices,
    atoms: Matrices,
    indices: Int[Tensor, "row chosen"],
    coefficients: Float[Tensor, "row chosen"],
) -> Float[Tensor, " row"]:
    """|X_n - sum_j coefficient_nj A_(index_nj)|^2; in factors neither X nor the sum is built.

    Args:
        rows: the X_n; in factors they are of rank 1. They get no gradient.
    """
    if not (isinstance(rows, Factors) and isinstance(atoms, Factors)):
        return (built(rows) - combine(atoms, indices, coefficients)).square().sum((-1, -2))
    rank = atoms.key.shape[1]
    weights = coefficients.repeat_interleave(rank, dim=1) if rank > 1 else coefficients
    key, value = (x[indices].flatten(1, 2) for x in atoms)
    return _SquaredErrors.apply(key, value, weights, rows.key[:, 0], rows.value[:, 0])


def squared_errors_of_codes(
    along: Float[Tensor, "row atom"],
    squared_norm: Float[Tensor, " row"],
    atoms: Matrices,
    codes: Float[Tensor, "row atom"],
) -> Float[Tensor, " row"]:
    """|X_n - sum_i codes_ni A_i|^2 where many codes are not zero, given <X_n, A_i> and |X_n|^2."""
    rebuilt = ((codes @ overlaps(atoms, atoms)) * codes).sum(-1)
    return squared_norm - 2 * (codes * along).sum(-1) + rebuilt


class _SquaredErrors(torch.autograd.Function):
    """e = |X|^2 - 2 s.w + w^T (K K^T * V V^T) w with s_j = <X, k_j v_j^T>.

    By symmetry each factor's gradient is one product with a J x J matrix; autograd would take two and
    several passes over [N, J, K].
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, weights: Tensor, x_key: Tensor, x_value: Tensor
    ) -> Tensor:
        by_key, by_value = ((f @ x[..., None]).squeeze(-1) for f, x in ((key, x_key), (value, x_value)))
        key_gram, value_gram = key @ key.mT, value @ value.mT
        squared = ((key_gram * value_gram) @ weights[..., None]).squeeze(-1)
        ctx.save_for_backward(
            key, value, weights, x_key, x_value, by_key, by_value, key_gram, value_gram, squared
        )
        norm = x_key.square().sum(-1) * x_value.square().sum(-1)
        return norm + (weights * (squared - 2 * by_key * by_value)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        key, value, weights, x_key, x_value, by_key, by_value, key_gram, value_gram, squared = saved
        scale = 2 * grads[0][:, None]
        pairs = (scale * weights)[..., None] * weights[:, None]
        grad_key = (pairs * value_gram) @ key
        grad_key.addcmul_((scale * weights * by_value)[..., None], x_key[:, None], value=-1)
        grad_value = (pairs * key_gram) @ value
        grad_value.addcmul_((scale * weights * by_key)[..., None], x_value[:, None], value=-1)
        return grad_key, grad_value, scale * (squared - by_key * by_value), None, None


def combine(
    atoms: Matrices, indices: Int[Tensor, "row chosen"], coefficients: Float[Tensor, "row chosen"]
) -> Float[Tensor, "row d_k d_v"]:
    """sum_j coefficient_nj A_(index_nj), built."""
    if not isinstance(atoms, Factors):
        flat = torch.nn.functional.embedding_bag(
            indices, atoms.flatten(-2), per_sample_weights=coefficients, mode="sum"
        )
        return flat.unflatten(-1, atoms.shape[-2:])
    key = atoms.key[indices] * coefficients[..., None, None]
    return key.flatten(1, 2).transpose(1, 2) @ atoms.value[indices].flatten(1, 2)
