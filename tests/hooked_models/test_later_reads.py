"""Reads of later tokens, pulled back to a write: against float64 matrices and full hooked passes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from torch import Tensor

from hooked_models import HookedModelError
from hooked_models.recordings import later_reads_of_head, record_recurrences
from hooked_models.recurrence import Recurrence
from hooked_models.responses import later_reads
from tests.hooked_models.test_recurrence import Problem, problems

DISTANCES = (1, 2, 5, 0, 9)


def transition(rec: Recurrence, row: int, t: int, head: int) -> Tensor:
    """T_t = diag(exp g_t) + a_t b_t^T, built."""
    d_k = rec.k.shape[-1]
    matrix = torch.diag(rec.g[row, t, head].exp().expand(d_k))
    if rec.a is None or rec.b is None:
        return matrix
    a = rec.a[row, t, head]
    return matrix + torch.outer(a * rec.k[row, t, head] if a.ndim == 0 else a, rec.b[row, t, head])


def by_matrices(recurrence: Recurrence, distances: tuple[int, ...]) -> Tensor:
    rec = recurrence.map(Tensor.double)
    batch, length, heads, d_k = rec.k.shape
    reads = torch.zeros(batch, length, heads, len(distances), d_k, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            for t in range(length):
                for place, h in enumerate(distances):
                    if t + h < length:
                        read = rec.q[row, t + h, head]
                        for s in range(t + h, t, -1):
                            read = transition(rec, row, s, head).T @ read
                        reads[row, t, head, place] = read
    return reads


@given(problems(batch=1, heads=2, length=12))
def test_later_reads_are_products_with_transposed_transitions(problem: Problem):
    found = later_reads(problem.recurrence, DISTANCES)
    assert found.dtype == problem.recurrence.dtype
    expected = by_matrices(problem.recurrence, DISTANCES)
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=problem.tolerance)


@given(problems(batch=2, heads=3, length=7, dtype=torch.float64))
def test_heads_and_rows_are_independent_and_nothing_is_read_past_the_end(problem: Problem):
    rec = problem.recurrence
    found = later_reads(rec, (6, 7, 100, 2))
    torch.testing.assert_close(later_reads(rec.heads(2, 0), (6, 7, 100, 2)), found[:, :, [2, 0]])
    torch.testing.assert_close(later_reads(rec.map(lambda x: x[1:]), (2,))[0], found[1, :, :, 3:])
    for past_the_end in (found[:, 1:, :, 0], found[:, :, :, 1:3], found[:, 5:, :, 3]):
        assert not past_the_end.any()
    assert later_reads(rec, ()).shape == (2, 7, 3, 0, rec.k.shape[-1])


@given(problems(batch=1, heads=1, length=9, dtype=torch.float64))
def test_padding_reads_nothing_and_lets_reads_through(problem: Problem):
    """Idle positions behind the text and in front of it: the reads of the text alone."""
    rec, text = problem.recurrence, slice(2, 7)
    padded = torch.tensor([[True, True, False, False, False, False, False, True, True]])
    found = later_reads(rec.idle_at(padded), (1, 3))
    torch.testing.assert_close(found[:, text], later_reads(rec.positions(text), (1, 3)))
    # A hole counts as a position, at which nothing changes.
    hole = torch.zeros(1, 9, dtype=torch.bool)
    hole[0, 4] = True
    kept = later_reads(rec.map(lambda x: torch.cat([x[:, :4], x[:, 5:]], dim=1)), (1, 2))
    found = later_reads(rec.idle_at(hole), (1, 2, 3))
    torch.testing.assert_close(found[:, 3, :, 1], kept[:, 3, :, 0])
    torch.testing.assert_close(found[:, 3, :, 2], kept[:, 3, :, 1])
    assert not found[:, 3, :, 0].any()


def test_bfloat16_and_autocast_are_computed_in_float32():
    rec = Recurrence(
        *(torch.randn(1, 6, 2, 4) for _ in range(1)), -torch.rand(1, 6, 2), *(torch.randn(1, 6, 2, 4),) * 2
    )
    half = rec.map(Tensor.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = later_reads(half, (1, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_matrices(half, (1, 3)), rtol=1e-4, atol=1e-4)


def test_reads_of_a_head_are_what_its_writes_add_to_later_outputs(pair):
    """A deleted write, in a full hooked pass, is missed at t + h by exactly (r . k) v."""
    model, layer = pair.model, max(pair.model.mixers)
    head, t, distances = 1, 3, (0, 1, 2, 4, 8)
    tokens = torch.randint(5, 150, (2, 14), generator=torch.Generator().manual_seed(3))
    reads = later_reads_of_head(model, tokens, layer, head, distances)
    key_name, value_name, _ = model.write_factor_hook_names(layer)
    out_name = model.hook_name(layer, "recurrence_out")
    names = [key_name, value_name, out_name]
    _, native = model.run_with_cache(tokens, names_filter=names, prepend_bos=False)

    def delete(x: Tensor, hook: object) -> Tensor:
        x[:, t, head] = 0
        return x

    with model.hooks(fwd_hooks=[(value_name, delete)]):
        _, edited = model.run_with_cache(tokens, names_filter=[out_name], prepend_bos=False)
    missed = (native[out_name] - edited[out_name])[:, :, head]
    key, value = (native[name][:, t, head] for name in (key_name, value_name))
    for place, h in enumerate(distances):
        expected = torch.einsum("bk,bk,bv->bv", reads[:, t, place], key, value)
        torch.testing.assert_close(
            missed[:, t + h], expected, rtol=1e-3, atol=1e-5 * float(value.abs().max())
        )
    assert not reads[:, -1, 1:].any()


def test_padded_rows_have_the_reads_that_they_have_alone(pair):
    model, layer = pair.model, max(pair.model.mixers)
    tokens = torch.randint(5, 150, (1, 9), generator=torch.Generator().manual_seed(4))
    alone = later_reads_of_head(model, tokens, layer, 0, (1, 4))
    mixer = model.mixers[layer]
    for left in (True, False):
        padding = torch.full((1, 3), 2)
        padded = torch.cat([padding, tokens] if left else [tokens, padding], dim=1)
        mask = (torch.arange(12)[None] >= 3).long() if left else (torch.arange(12)[None] < 9).long()
        with torch.no_grad(), record_recurrences([mixer]) as recording:
            model(padded, attention_mask=mask, prepend_bos=False)
        found = later_reads(recording[mixer].heads(0), (1, 4))[:, :, 0]
        torch.testing.assert_close(found[mask.bool()], alone[0], rtol=1e-3, atol=1e-5)


def test_what_is_recorded_is_what_hooks_on_the_factors_left(gdn_model):
    layer = max(gdn_model.mixers)
    mixer, tokens = gdn_model.mixers[layer], torch.arange(10, 18)[None]
    with gdn_model.hooks(fwd_hooks=[(gdn_model.hook_name(layer, "read"), lambda x, hook: 2 * x)]):
        twice = later_reads_of_head(gdn_model, tokens, layer, 0, (1,))
    torch.testing.assert_close(twice, 2 * later_reads_of_head(gdn_model, tokens, layer, 0, (1,)))
    with record_recurrences([mixer]) as outer:
        with record_recurrences([]) as inner:
            gdn_model(tokens)
        assert outer == {}
        assert inner == {}
        other = threading.Thread(target=lambda: gdn_model(tokens))
        other.start()
        other.join()
        assert outer == {}
        gdn_model(tokens)
        assert outer[mixer].q.shape[1] == 8
        last = outer[mixer]
    gdn_model(tokens)
    assert outer[mixer] is last


@pytest.mark.parametrize("wrong", [-1, True])
def test_distances_that_are_none_are_refused(gdn_model, wrong):
    with pytest.raises(HookedModelError, match=r"whole numbers of tokens from 0, got"):
        later_reads_of_head(gdn_model, torch.arange(10, 14)[None], max(gdn_model.mixers), 0, (1, wrong))
