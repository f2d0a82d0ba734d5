"""Factored algebra against the matrices themselves, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from writesae_lens.saes import rank1
from writesae_lens.saes.rank1 import (
    Factors,
    combine,
    factor_rank1,
    inner,
    overlaps,
    scores,
    squared_errors,
)

sizes = st.tuples(st.integers(1, 9), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3))


def factors(n: int, rank: int, d_k: int, d_v: int, seed: int, dtype=torch.float64) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(n, rank, d_k, generator=rng, dtype=dtype),
        torch.randn(n, rank, d_v, generator=rng, dtype=dtype),
    )


def dense(x: Factors) -> torch.Tensor:
    return torch.einsum("nrk,nrv->nkv", x.key, x.value)


@given(sizes, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_products_equal_those_of_the_matrices(size, seed):
    n, d_k, d_v, rank = size
    rows, atoms = factors(n, 1, d_k, d_v, seed), factors(6, rank, d_k, d_v, seed + 1)
    x, a = dense(rows), dense(atoms)
    expected = torch.einsum("nkv,fkv->nf", x, a)
    torch.testing.assert_close(overlaps(rows, atoms), expected)
    torch.testing.assert_close(overlaps(x, atoms), expected)
    torch.testing.assert_close(overlaps(atoms, atoms), torch.einsum("nkv,fkv->nf", a, a))
    torch.testing.assert_close(atoms.norm(), a.flatten(1).norm(dim=1))
    m = dense(factors(1, 3, d_k, d_v, seed + 2))[0]
    torch.testing.assert_close(inner(atoms, m), (a * m).sum((1, 2)))
    unit = dense(atoms.normalized())
    torch.testing.assert_close(unit, a / a.flatten(1).norm(dim=1)[:, None, None])


@given(sizes, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_squared_errors_and_their_gradients_equal_the_dense_ones(size, seed):
    n, d_k, d_v, rank = size
    rows, atoms = factors(n, 1, d_k, d_v, seed), factors(6, rank, d_k, d_v, seed + 1)
    rng = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(6, generator=rng)[:3] for _ in range(n)])
    weights = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    inputs = [*atoms, weights]
    for x in inputs:
        x.requires_grad_()
    errors = squared_errors(rows, atoms, indices, weights)
    built = torch.einsum("nj,njkv->nkv", weights, dense(atoms)[indices])
    torch.testing.assert_close(combine(atoms, indices, weights), built)
    expected = (dense(rows) - built).square().sum((1, 2))
    torch.testing.assert_close(errors, expected)
    scale = torch.randn(n, generator=rng, dtype=torch.float64)
    ours = torch.autograd.grad((errors * scale).sum(), inputs)
    theirs = torch.autograd.grad((expected * scale).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_factors_come_back_from_flat_rows(dtype, scale):
    x = dense(factors(20, 1, 7, 5, 0, torch.float64)) * scale
    x[3] = 0
    x[4, 0] = 0  # a key with a zero entry
    rows = factor_rank1(x.flatten(1).to(dtype), 7, 5)
    assert rows is not None
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    error = (dense(rows).double() - x).flatten(1).norm(dim=1)
    assert (error <= tolerance * x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-3])
def test_rows_of_higher_rank_are_not_taken_for_rank_1(share):
    x = dense(factors(20, 1, 7, 5, 0))
    x[11] += share * dense(factors(1, 1, 7, 5, 1))[0]
    assert factor_rank1(x.flatten(1).float(), 7, 5) is None
    assert factor_rank1(torch.full((2, 35), float("nan")), 7, 5) is None


@pytest.mark.parametrize("share", [1, 10**9], ids=["always entry by entry", "never"])
@pytest.mark.parametrize("rank", [1, 2])
def test_scores_have_the_gradients_of_overlaps_however_few_entries_matter(monkeypatch, share, rank):
    monkeypatch.setattr(rank1, "_SPARSE", 0 if share == 1 else share)
    rows, encoder = factors(7, 1, 4, 6, 0), factors(9, rank, 4, 6, 1)
    upstream = torch.zeros(7, 9, dtype=torch.float64)
    upstream[[0, 0, 3, 6], [2, 5, 5, 8]] = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    for parameter in encoder:
        parameter.requires_grad_()
    torch.testing.assert_close(scores(rows, encoder), overlaps(rows, encoder))
    ours = torch.autograd.grad((scores(rows, encoder) * upstream).sum(), [*encoder])
    theirs = torch.autograd.grad((overlaps(rows, encoder) * upstream).sum(), [*encoder])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
