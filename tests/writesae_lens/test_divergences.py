"""KLs from the logits' difference in float32, against log-probabilities in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from writesae_lens.divergences import compare, divergence, log_probability_change, logits_floor

DIRECTIONS = "patched_base", "base_patched"


def exact(patched, base, kl="patched_base"):
    p, q = (
        x.double().log_softmax(-1) for x in ((patched, base) if kl == "patched_base" else (base, patched))
    )
    return (p.exp() * (p - q)).sum(-1)


def logits(size, rows=6, vocab=5000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 2 * torch.randn(rows, vocab, generator=generator)
    return base + size * torch.randn(rows, vocab, generator=generator), base


@pytest.mark.parametrize("kl", DIRECTIONS)
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.03, 0.3, 3.0, 40.0])
def test_small_and_large_shifts_equal_float64(size, kl):
    """The first gives KLs of 5e-9, of which log-probabilities in float32 hold no figure."""
    patched, base = logits(size)
    expected = exact(patched, base, kl)
    torch.testing.assert_close(divergence(patched, base, kl), expected, rtol=1e-5, atol=0)
    if size == 1e-4:
        p, q = patched.log_softmax(-1), base.log_softmax(-1)
        in_float32 = (p.exp() * (p - q)).sum(-1).double()
        assert float((in_float32 / expected - 1).abs().max()) > 1


@pytest.mark.parametrize("kl", DIRECTIONS)
@pytest.mark.parametrize("constant", [1.0, -17.0, 300.0])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.3])
def test_a_constant_shift_of_all_logits_is_no_part(size, constant, kl):
    patched, base = logits(size)
    patched = patched + constant
    expected = exact(patched, base, kl)  # of what rounding has left of the logits
    torch.testing.assert_close(divergence(patched, base, kl), expected, rtol=1e-5, atol=1e-15)


def test_rows_of_all_sizes_in_one_call_are_compared_each_alone():
    parts = [logits(size, rows=2, seed=n) for n, size in enumerate((1e-4, 0.03, 3.0, 40.0))]
    patched, base = (torch.cat(side) for side in zip(*parts))
    alone = torch.cat([divergence(*part) for part in parts])
    torch.testing.assert_close(divergence(patched, base), alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(alone, exact(patched, base), rtol=1e-5, atol=0)


def test_equal_logits_have_a_kl_of_0():
    base = logits(0.0)[1]
    assert torch.equal(divergence(base.clone(), base), torch.zeros(6, dtype=torch.float64))


def test_one_token_that_becomes_certain_or_impossible():
    base = torch.zeros(2, 10)
    patched = base.clone()
    patched[0, 3], patched[1, 3] = 200.0, -200.0
    for kl in DIRECTIONS:
        torch.testing.assert_close(divergence(patched, base, kl), exact(patched, base, kl), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(1e-3, 30), st.integers(0, 2**31))
def test_any_few_logits(vocab, size, seed):
    patched, base = logits(size, rows=3, vocab=vocab, seed=seed)
    for kl in DIRECTIONS:
        torch.testing.assert_close(
            divergence(patched, base, kl), exact(patched, base, kl), rtol=1e-5, atol=1e-13
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_give_no_number(bad, side):
    pair = logits(0.1)
    pair[side][2, 7] = bad
    for kl in DIRECTIONS:
        found = divergence(*pair, kl)
        assert not found[2].isfinite()
        assert found[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("size", [1e-4, 0.1, 5.0, 50.0])
def test_changes_of_one_log_probability_and_of_the_normalizer(size):
    patched, base = logits(size)
    change, kl = log_probability_change(patched, base, 11)
    expected = patched.double().log_softmax(-1)[:, 11] - base.double().log_softmax(-1)[:, 11]
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(kl, exact(patched, base), rtol=1e-5, atol=0)
    normalizers = patched.double().logsumexp(-1) - base.double().logsumexp(-1)
    torch.testing.assert_close(
        compare(patched, base).log_normalizers, normalizers, rtol=1e-5, atol=1e-6 * size
    )


def test_the_floor_is_the_kl_of_rounding_errors_that_are_drawn():
    """Six units in the last place of every logit, either way."""
    base, kls = logits(0.0, vocab=300)[1], []
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        sign = torch.randint(0, 2, base.shape, generator=generator) * 2.0 - 1
        wrong = base.double() * (1 + 6 * torch.finfo(torch.float32).eps * sign.double())
        p, q = wrong.log_softmax(-1), base.double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(logits_floor(base).double(), torch.stack(kls).mean(0), rtol=0.15, atol=0)
