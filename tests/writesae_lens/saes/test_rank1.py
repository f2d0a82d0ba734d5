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
    weighted_sums,
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


@pytest.mark.parametrize("share", [0, 3, 10**9], ids=["entry by entry", "one column", "all columns"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_scores_have_the_gradients_of_overlaps_however_few_entries_matter(monkeypatch, share, full, rank):
    monkeypatch.setattr(rank1, "_SPARSE", share)
    rows, encoder = factors(7, 1, 4, 6, 0), factors(9, rank, 4, 6, 1)
    upstream = torch.ones(7, 9, dtype=torch.float64) if full else torch.zeros(7, 9, dtype=torch.float64)
    upstream[[0, 0, 3, 5, 6], [2, 5, 5, 5, 8]] = torch.tensor([1.0, -2, 3, 0.7, 0.5], dtype=torch.float64)
    for parameter in encoder:
        parameter.requires_grad_()
    torch.testing.assert_close(scores(rows, encoder), overlaps(rows, encoder))
    ours = torch.autograd.grad((scores(rows, encoder) * upstream).sum(), [*encoder])
    theirs = torch.autograd.grad((overlaps(rows, encoder) * upstream).sum(), [*encoder])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def few(rows: int, atoms: int, rng: torch.Generator, share: float, dtype=torch.float64) -> torch.Tensor:
    weights = torch.randn(rows, atoms, generator=rng, dtype=dtype)
    return weights * (torch.rand(rows, atoms, generator=rng) < share)


@pytest.mark.parametrize("block", [1, 70, 2**22], ids=["one at a time", "a few", "all at once"])
@pytest.mark.parametrize("share", [0.0, 0.04, 1.0], ids=["no weights", "few", "all"])
@pytest.mark.parametrize("n_rows", [0, 1, 12])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_products_with_built_matrices_equal_sums_written_out(monkeypatch, block, share, n_rows, rank):
    """Values, gradients and the gradients' gradients; rank None is a dense dictionary."""
    monkeypatch.setattr(rank1, "_BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    weights = few(n_rows, 25, rng, share).requires_grad_()
    atoms = factors(25, rank or 1, 5, 7, 1)
    atoms = dense(atoms) if rank is None else atoms
    leaves = [a.requires_grad_() for a in rank1.tensors(atoms)]
    a = atoms if rank is None else dense(atoms)
    pairs = (
        ((x,), overlaps(x, atoms), torch.einsum("nkv,fkv->nf", x, a), weights.detach()),
        ((weights,), weighted_sums(weights, atoms), torch.einsum("nf,fkv->nkv", weights, a), x.detach()),
    )
    for inputs, ours, theirs, upstream in pairs:
        torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(weighted_sums(weights, atoms), pairs[1][2])
        wanted = [*inputs, *leaves]
        for graph in (False, True):
            first, expected = (
                torch.autograd.grad(y, wanted, upstream, retain_graph=True, create_graph=graph)
                for y in (ours, theirs)
            )
            torch.testing.assert_close(first, expected)
        sums = (sum(g.square().sum() for g in grads) for grads in (first, expected))
        second, expected = (torch.autograd.grad(y, wanted, retain_graph=True) for y in sums)
        torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("n_rows", [2, 40])
@pytest.mark.parametrize("share", [0.04, 1.0])
def test_products_with_built_matrices_in_half_precision(n_rows, share):
    """Within the rounding of bfloat16 of the same numbers' products in float64."""
    rng = torch.Generator().manual_seed(0)
    half = torch.bfloat16
    x = torch.randn(n_rows, 16, 24, generator=rng).to(half).requires_grad_()
    weights = few(n_rows, 50, rng, share, torch.float32).to(half).requires_grad_()
    atoms = Factors(*(f.to(half).requires_grad_() for f in factors(50, 1, 16, 24, 1)))
    wide_x, wide_weights, wide_key, wide_value = (
        y.detach().double().requires_grad_() for y in (x, weights, *atoms)
    )
    a = dense(Factors(wide_key, wide_value))
    for ours, theirs, leaves, wide, upstream in (
        (overlaps(x, atoms), torch.einsum("nkv,fkv->nf", wide_x, a), x, wide_x, weights),
        (
            weighted_sums(weights, atoms),
            torch.einsum("nf,fkv->nkv", wide_weights, a),
            weights,
            wide_weights,
            x,
        ),
    ):
        assert ours.dtype == half
        grads = torch.autograd.grad(ours, [leaves, *atoms], upstream.detach())
        expected = torch.autograd.grad(
            theirs, [wide, wide_key, wide_value], upstream.detach().double(), retain_graph=True
        )
        for got, wanted in zip((ours, *grads), (theirs, *expected), strict=True):
            assert float((got.detach().double() - wanted).norm() / wanted.norm()) < 1e-2
