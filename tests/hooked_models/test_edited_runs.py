"""Swapped and added writes: equal to full edited passes, alone, inside one another and side by side."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hooked_models.errors import HookedModelError
from tests.hooked_models.architectures import (
    MODELS,
    VOCABULARY,
    Pair,
    assert_close,
    at_some_cells,
    greedy,
    nothing,
    on,
    on_every_model,
    once_per_architecture,
    random,
    refused,
    sae_at,
    some_tokens,
)

# Swapped writes.


def one_pass_each(
    pair: Pair, tokens: Tensor, layer: int, head: int, positions: list[int], writes: Tensor, erase: bool
) -> Tensor:
    """The stock model with the loop for a layer: a row a branch, edited at its position and read there."""
    places = list(enumerate(positions))
    new = writes[:, None].expand(-1, len(tokens), -1, -1)
    edits = pair.setting("write", new, head, *places)
    if not erase:
        edits = pair.setting("erase", torch.zeros_like(new), head, *places, also=edits)
    return pair.truth(tokens.expand(len(positions), -1), layer, edits)[0][range(len(positions)), positions]


@at_some_cells(*MODELS)
@pytest.mark.parametrize(("rank", "erase"), [(0, True), (1, False), (2, True)])
def test_swapped_writes_equal_one_edited_pass_each(pair: Pair, rank: int, erase: bool, layer: int, head: int):
    """At the first and last token, next to a chunk's edge, unordered, and several at one position."""
    tokens = some_tokens(70)
    positions = [40, 0, 69, 63, 64, 40, 1, 40, 2, 65]
    keys = random(len(positions), rank, pair.d_k) / 3
    values = random(len(positions), rank, pair.d_v, seed=2) / 3
    writes = torch.einsum("jrk,jrv->jkv", keys, values)
    assert rank or not writes.any()
    native, swapped = pair.model.run_with_swapped_writes(
        tokens, layer, head, torch.tensor(positions), keys, values, erase=erase
    )
    plain = pair.logits(tokens[None])[0].detach()
    assert_close(native, plain)
    expected = one_pass_each(pair, tokens, layer, head, positions, writes, erase)
    assert (expected - plain[positions]).abs().amax(-1).median() > 5e-3
    assert_close(swapped, expected)
    # The loop is float64 where the model is float32: both passes of the model itself agree closer.
    rows = range(len(positions))

    def edit(x: Tensor, hook: Any) -> None:
        x[rows, positions] = writes.flatten(-2) if "write" in hook.name else 0

    kinds = ("write", "erase") if pair.erases and not erase else ("write",)
    with torch.no_grad():
        edits = {f"{kind}.{head}": edit for kind in kinds}
        hooked = pair.run(tokens.expand(len(rows), -1), layer, edits)
    # Of a head that neither holds nor writes anything, RWKV-7's norm magnifies what rounding leaves.
    assert_close(swapped, hooked[rows, positions], 1e-5 if rank else 5e-5)


@once_per_architecture
@pytest.mark.parametrize("rank", [0, 2])
def test_added_writes_of_any_rank_equal_one_hooked_pass(pair: Pair, rank: int):
    """At every position of the passage, from a cache of its beginning and from the start."""
    tokens, positions, rows = some_tokens(30), torch.tensor([3, 9, 0]), range(3)
    keys, values = random(3, rank, pair.d_k) / 3, random(3, rank, pair.d_v, seed=2) / 3
    added = torch.einsum("jrk,jrv->jkv", keys, values)
    for start in (0, 12):
        cache = None
        if start:
            cache = pair.model.new_cache()
            with torch.no_grad():
                pair.model(tokens[None, :start], past_key_values=cache, use_cache=True)
        found = pair.model.run_with_added_writes(
            tokens[start:], 1, 2, positions, keys, values, past_key_values=cache
        )

        def edit(x: Tensor, hook: Any, at: Tensor = positions + start) -> None:
            x[rows, at] += added.flatten(-2)

        with torch.no_grad():
            expected = pair.run(tokens.expand(3, -1), 1, {"write.2": edit})[:, start:]
        assert_close(found, expected, 1e-5)


@on_every_model
def test_swapping_in_the_native_write_changes_nothing(pair: Pair):
    tokens, positions = some_tokens(66), torch.arange(66)
    with torch.no_grad():
        factors = pair.activations(tokens[None], 1, ["write_key", "write_value"])
    keys, values = (x[0, :, 2:3] for x in factors.values())
    native, swapped = pair.model.run_with_swapped_writes(tokens, 1, 2, positions, keys, values)
    assert_close(swapped, native, 1e-5)
    assert_close(native, pair.logits(tokens[None])[0])


@once_per_architecture
@pytest.mark.parametrize("erase", [True, False])
def test_a_passage_of_one_token_and_branches_of_none(pair: Pair, erase: bool):
    tokens, keys, values = some_tokens(1), random(2, 1, pair.d_k), random(2, 1, pair.d_v)
    run, first = pair.model.run_with_swapped_writes, torch.zeros(2, dtype=torch.long)
    native, swapped = run(tokens, 0, 1, first, keys, values, erase=erase)
    writes = torch.einsum("jrk,jrv->jkv", keys, values)
    assert_close(swapped, one_pass_each(pair, tokens, 0, 1, [0, 0], writes, erase))
    native, swapped = run(some_tokens(5), 0, 1, first[:0], keys[:0], values[:0], erase=erase)
    assert swapped.shape == (0, VOCABULARY)
    assert_close(native, pair.logits(some_tokens(1, 5))[0])


def swap_at(pair: Pair, position: int, layer: int = 1) -> tuple[Tensor, Tensor]:
    """A run with one swapped write."""
    keys, values = random(1, 1, pair.d_k), random(1, 1, pair.d_v)
    return pair.model.run_with_swapped_writes(
        some_tokens(9), layer, 2, torch.tensor([position]), keys, values
    )


@once_per_architecture
def test_swapped_writes_refuse_hooks_and_saes_in_their_way(pair: Pair):
    """In any layer, on the mixer or elsewhere."""
    before = pair.model(some_tokens(9))
    here = [pair.point(1, name) for name in (*(f"{kind}.2" for kind in pair.kinds), "decay", "out")]
    elsewhere = [pair.point(pair.layers[-1], "state.0"), "blocks.2.hook_in", "unembed.hook_in"]
    for name in here + elsewhere:
        with refused(name, "reset_hooks"), pair.model.hooks(fwd_hooks=[(name, nothing)]):
            swap_at(pair, 4)
        assert torch.equal(pair.model(some_tokens(9)), before)  # the model is as it was
    sae = sae_at(pair.point(1, "write.2"), pair.d_k * pair.d_v)
    with refused("reset_saes"), pair.model.saes([sae]):
        swap_at(pair, 4)
    swap_at(pair, 4)


@once_per_architecture
def test_swapped_writes_need_a_cell_and_a_position(pair: Pair):
    with refused(*pair.list_of_cells):
        swap_at(pair, 4, layer=pair.n_layers)
    for position in (-1, 9):
        with pytest.raises((HookedModelError, IndexError), match=str(position)):
            swap_at(pair, position)


# Runs inside one another, and side by side.


@dataclasses.dataclass
class Run:
    """An edited run with writes of its own, and what it gives alone."""

    pair: Pair
    seed: int
    linear: bool | None
    """None: swapped writes."""

    def __call__(self) -> Tensor:
        model, layer, head = self.pair.model, self.pair.layers[self.seed % 2], self.seed % self.pair.heads
        tokens, positions = some_tokens(20, seed=self.seed), torch.tensor([3, 11, 4])
        rank = () if self.linear is not None else (1,)
        keys = random(3, *rank, self.pair.d_k, seed=self.seed)
        values = random(3, *rank, self.pair.d_v, seed=self.seed + 9)
        if self.linear is None:
            return model.run_with_swapped_writes(tokens, layer, head, positions, keys, values)[1]
        return model.run_with_added_writes(tokens, layer, head, positions, keys, values, self.linear)


def during_a_run(pair: Pair, action: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A run with added writes, and an action taken in the middle of it, at the input of a middle layer."""
    results: list[Tensor] = []

    def act(x: Tensor, hook: Any) -> None:
        if not results:
            results.append(torch.empty(0))  # what acts must not act again
            results[0] = action()

    with pair.model.hooks(fwd_hooks=[(pair.point(1, "in"), act)]):
        return Run(pair, 0, False)(), results


@on("gdn", "rwkv7")
@torch.no_grad()
def test_a_call_inside_an_edited_run_does_not_see_its_edit(pair: Pair, mamba2_model: Any):
    tokens, prompt = some_tokens(3, 20, seed=5), some_tokens(1, 4)
    alone = Run(pair, 0, False)()
    actions: list[Callable[[], Tensor]] = [
        lambda: pair.model(tokens),
        lambda: pair.model.run_with_cache(tokens, names_filter="blocks.0.hook_in")[0],
        lambda: greedy(pair.model, prompt, 3),
        lambda: mamba2_model(tokens),
        Run(pair, 1, False),
        Run(pair, 1, True),
    ]
    for action in actions:
        expected = action()
        outer, (inner,) = during_a_run(pair, action)
        assert torch.equal(inner, expected)
        assert torch.equal(outer, alone)


@once_per_architecture
def test_edited_runs_in_threads_each_see_their_own_edit(pair: Pair):
    """Three kinds of run and plain passes, four at a time."""
    runs: list[Callable[[], Tensor]] = [
        Run(pair, seed, kind) for seed in (0, 1) for kind in (None, False, True)
    ]
    runs += [lambda: pair.model(some_tokens(2, 20)).detach()] * 2
    alone = [run() for run in runs]
    start = threading.Barrier(4)

    def repeatedly(numbers: range) -> list[tuple[int, Tensor]]:
        start.wait()
        return [(n, runs[n]()) for _ in range(3) for n in numbers]

    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(repeatedly, range(first, len(runs), 4)) for first in range(4)]
        for n, result in (pair for part in parts for pair in part.result()):
            assert torch.equal(result, alone[n]), n


@on("gdn")
def test_a_linear_run_inside_another_is_refused(pair: Pair):
    """And leaves the model, and torch, as they were."""
    before = Run(pair, 1, True)()

    def inner(x: Tensor, hook: Any) -> None:
        Run(pair, 0, True)()

    refused = pytest.raises(HookedModelError, match="linear=True cannot run inside another one")
    with refused, pair.model.hooks(fwd_hooks=[(pair.point(1, "in"), inner)]):
        Run(pair, 1, True)()
    with pytest.raises(HookedModelError, match="torch has no nested ones"), forward_ad.dual_level():
        Run(pair, 1, True)()
    assert torch.equal(Run(pair, 1, True)(), before)


@on("gdn")
def test_an_edited_run_that_fails_leaves_no_edit(pair: Pair):
    before = pair.model(some_tokens(1, 20))

    def fails(x: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), pair.model.hooks(fwd_hooks=[(pair.point(1, "out"), fails)]):
        Run(pair, 0, False)()
    assert torch.equal(pair.model(some_tokens(1, 20)), before)
