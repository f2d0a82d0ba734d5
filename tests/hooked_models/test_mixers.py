"""Gated DeltaNet against transformers, and its hooks against a float64 loop put into the stock model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracles import Edits, Trace, at, standing_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hooked_models import HookedRecurrent
from hooked_models.errors import HookedModelError

D_K, D_V, HEADS, VOCABULARY = 16, 24, 4, 200
LINEAR_LAYERS = (0, 1, 3)
TOLERANCE = 1e-4
CELLS = [(layer, head) for layer in LINEAR_LAYERS for head in range(HEADS)]


class Pair(NamedTuple):
    """A hooked model, the stock model of the same folder, and the folder."""

    model: Any
    reference: Any
    folder: Path


@pytest.fixture(params=["qwen3_5", "qwen3_next"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both projection layouts. A test that leaves a hook behind fails."""
    name = {"qwen3_5": "gdn"}.get(request.param, request.param)
    found = Pair(*(request.getfixturevalue(f"{name}_{x}") for x in ("model", "reference", "folder")))
    yield found
    left = [hook for hook, point in found.model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]
    found.model.reset_hooks(including_permanent=True)
    assert not left


@pytest.fixture
def qwen(gdn_model: Any, gdn_reference: Any, gdn_folder: Path) -> Pair:
    """Qwen3.5 alone, where the layout cannot matter."""
    return Pair(gdn_model, gdn_reference, gdn_folder)


def some_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def point(layer: int, name: str) -> str:
    return f"blocks.{layer}.linear_attn.hook_{name}"


def heads_of(flat: Tensor) -> Tensor:
    """[batch, pos, d_k * d_v] -> [batch, pos, d_k, d_v]."""
    return flat.unflatten(-1, (D_K, D_V))


def truth_of(
    pair: Pair, tokens: Tensor, layer: int, edits: Edits | None = None, **kwargs: Any
) -> tuple[Tensor, Trace]:
    """Logits of the stock model with the loop in one layer's place, and what the loop saw."""
    with torch.no_grad(), standing_in(pair.reference, pair.folder, layer, edits) as traces:
        logits = pair.reference(tokens, use_cache=False, **kwargs).logits
    return logits, traces[0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    if not found.numel():
        return
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance, f"off by {error:.2e}"


# Unedited.


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
@torch.no_grad()
def test_logits_equal_those_of_transformers(pair: Pair, length: int):
    tokens = some_tokens(2, length)
    expected = pair.reference(tokens, use_cache=False).logits
    assert expected.std() > 0.5  # not a comparison of zeros
    assert_close(pair.model(tokens), expected)


@pytest.mark.parametrize("length", [1, 66])
@torch.no_grad()
def test_stock_model_with_the_loop_equals_itself(pair: Pair, length: int):
    """The oracle of all that follows."""
    tokens = some_tokens(2, length)
    expected = pair.reference(tokens, use_cache=False).logits
    for layer in LINEAR_LAYERS:
        assert_close(truth_of(pair, tokens, layer)[0], expected, 5e-5)


@torch.no_grad()
def test_left_padding(pair: Pair):
    """A padded passage equals the passage alone, whatever the tokens under the padding."""
    lengths, longest = (70, 66, 3), 70
    tokens = some_tokens(3, longest)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    logits, cache = pair.model.run_with_cache(
        tokens, attention_mask=mask, names_filter=[point(1, "write.2"), point(1, "state.2")]
    )
    for row, n in enumerate(lengths):
        alone = tokens[row : row + 1, longest - n :]
        assert_close(logits[row : row + 1, longest - n :], pair.reference(alone, use_cache=False).logits)
        trace = truth_of(pair, alone, 1)[1]
        states = heads_of(cache[point(1, "state.2")])[row, longest - n :]
        assert_close(states, trace.states[0, :, 2])
        assert (cache[point(1, "write.2")][row, : longest - n] == 0).all()
        assert (cache[point(1, "state.2")][row, : longest - n] == 0).all()


@torch.no_grad()
def test_left_padding_of_texts(gdn_model: Any, gdn_reference: Any):
    texts = ["w5 w9 w77", "w150 w151 w8 w9 w10 w11 w12"]
    logits = gdn_model(texts, padding_side="left", prepend_bos=False)
    for row, text in enumerate(texts):
        alone = torch.tensor([[int(word[1:]) for word in text.split()]])
        expected = gdn_reference(alone, use_cache=False).logits
        assert_close(logits[row : row + 1, -alone.shape[1] :], expected)


# The hooks of the docstring's table.

SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "in": lambda b, t: (b, t, 64),
    "out": lambda b, t: (b, t, 64),
    "write_key": lambda b, t: (b, t, HEADS, D_K),
    "write_value": lambda b, t: (b, t, HEADS, D_V),
    "read": lambda b, t: (b, t, HEADS, D_K),
    "decay": lambda b, t: (b, t, HEADS),
    "recurrence_out": lambda b, t: (b, t, HEADS, D_V),
} | {f"{kind}.{head}": lambda b, t: (b, t, D_K * D_V) for kind in ("write", "state") for head in range(HEADS)}


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_every_hook_fires_once_with_its_shape_and_in_order(pair: Pair, use_cache: bool):
    fired: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(x: Tensor, hook: Any) -> None:
        fired.append(hook.name)
        shapes[hook.name] = tuple(x.shape)

    names = [point(layer, name) for layer in LINEAR_LAYERS for name in SHAPES]
    hooks = [(name, watch) for name in names]
    pair.model.run_with_hooks(some_tokens(2, 7), fwd_hooks=hooks, use_cache=use_cache)
    assert sorted(fired) == sorted(names)
    assert shapes == {point(layer, name): f(2, 7) for layer in LINEAR_LAYERS for name, f in SHAPES.items()}
    for layer in LINEAR_LAYERS:
        here = [name.split("hook_")[1] for name in fired if name.startswith(f"blocks.{layer}.")]
        assert here[0] == "in"
        assert set(here[1:5]) == {"write_key", "write_value", "read", "decay"}
        assert here[5:-2] == [f"{kind}.{head}" for head in range(HEADS) for kind in ("write", "state")]
        assert here[-2:] == ["recurrence_out", "out"]


@torch.no_grad()
def test_softmax_layers_have_no_cells(pair: Pair):
    assert not [name for name in pair.model.hook_dict if name.startswith("blocks.2.linear_attn")]
    assert [(cell.layer, cell.head) for cell in pair.model.cells] == CELLS
    assert {(c.d_k, c.d_v, c.architecture) for c in pair.model.cells} == {(D_K, D_V, "gated_delta_net")}


@pytest.mark.parametrize("layer", LINEAR_LAYERS)
@torch.no_grad()
def test_activations_equal_the_loop(pair: Pair, layer: int):
    tokens = some_tokens(2, 67)
    trace = truth_of(pair, tokens, layer)[1]
    _, cache = pair.model.run_with_cache(tokens, names_filter=[point(layer, name) for name in SHAPES])
    expected = {
        "out": trace.output,
        "write_key": trace.keys,
        "write_value": trace.values,
        "read": trace.reads,
        "decay": trace.decay,
        "recurrence_out": trace.recurrence_out,
    }
    for name, x in expected.items():
        assert_close(cache[point(layer, name)], x)
    for head in range(HEADS):
        assert_close(heads_of(cache[point(layer, f"write.{head}")]), trace.writes[:, :, head])
        assert_close(heads_of(cache[point(layer, f"state.{head}")]), trace.states[:, :, head])
        assert trace.writes[:, :, head].abs().max() > 0.01


@torch.no_grad()
def test_cached_positions_can_be_sliced(qwen: Pair):
    names = [point(1, name) for name in SHAPES]
    tokens = some_tokens(2, 9)
    _, whole = qwen.model.run_with_cache(tokens, names_filter=names)
    _, last = qwen.model.run_with_cache(tokens, names_filter=names, pos_slice=slice(-2, None))
    for name in names:
        assert torch.equal(last[name], whole[name][:, -2:])


# Edits.


def replace(position: int | slice, new: Tensor) -> Callable[..., Tensor]:
    """A hook on a write or state that returns a new tensor."""

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, position] = new.flatten(-2).to(x)
        return x

    return hook


@pytest.mark.parametrize(("layer", "head"), CELLS)
@torch.no_grad()
def test_an_edited_write_at_any_position_and_head(pair: Pair, layer: int, head: int):
    """A full-rank write in the place of the native one; the erase stays native, all later tokens follow."""
    positions = [0, 7 + head, 63, 64, 66]  # one a row
    rows = range(len(positions))
    tokens = some_tokens(1, 67).expand(len(positions), -1)
    new = random(len(positions), D_K, D_V) / D_K
    native = pair.reference(tokens[:1], use_cache=False).logits

    def change(writes: Tensor) -> Tensor:
        writes = writes.clone()
        writes[rows, positions, head] = new.double()
        return writes

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[rows, positions] = new.flatten(-2)
        return x

    expected, _ = truth_of(pair, tokens, layer, Edits(writes=change))
    for row, position in enumerate(positions):
        assert_close(expected[row, :position], native[0, :position])
        assert (expected[row] - native[0])[position].abs().max() > 100 * TOLERANCE
    hooks = [(pair.model.write_hook_name(layer, head), edit)]
    assert_close(pair.model.run_with_hooks(tokens, fwd_hooks=hooks), expected)


@torch.no_grad()
def test_edited_writes_at_every_position_of_two_heads_and_rows(pair: Pair):
    tokens, layer = some_tokens(2, 67), 1
    first, second = random(2, 67, D_K, D_V, seed=2) / D_K, random(2, 67, D_K, D_V, seed=3) / D_K
    first[0] = 0

    def change(writes: Tensor) -> Tensor:
        return at(slice(None), 3, second.double())(at(slice(None), 1, first.double())(writes))

    expected, trace = truth_of(pair, tokens, layer, Edits(writes=change))
    seen: dict[str, Tensor] = {}

    def look(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.clone()

    logits = pair.model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (point(layer, "write.1"), replace(slice(None), first)),
            (point(layer, "write.3"), replace(slice(None), second)),
            *((point(layer, f"state.{head}"), look) for head in range(HEADS)),
            (point(layer, "recurrence_out"), look),
        ],
    )
    assert_close(logits, expected)
    assert_close(seen[point(layer, "recurrence_out")], trace.recurrence_out)
    for head in range(HEADS):  # the state hooks see what the edited writes led to
        assert_close(heads_of(seen[point(layer, f"state.{head}")]), trace.states[:, :, head])


@torch.no_grad()
def test_a_head_without_writes_puts_out_nothing(pair: Pair):
    """No bias and no skip: zero writes leave zero reads."""
    _, cache = pair.model.run_with_cache(some_tokens(2, 20), names_filter=point(0, "recurrence_out"))
    seen = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append(x.clone())

    pair.model.run_with_hooks(
        some_tokens(2, 20),
        fwd_hooks=[
            (point(0, "write.2"), lambda x, hook: torch.zeros_like(x)),
            (point(0, "recurrence_out"), look),
        ],
    )
    native = cache[point(0, "recurrence_out")]
    assert seen[0][:, :, 2].abs().max() < 1e-6 < native[:, :, 2].abs().max()
    assert torch.equal(seen[0][:, :, [0, 1, 3]], native[:, :, [0, 1, 3]])


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "name", ["write.1", "state.1", "write_key", "write_value", "read", "decay", "recurrence_out"]
)
def test_edits_in_place_equal_returned_ones(qwen: Pair, name: str, context: Callable[[], Any]):
    tokens = some_tokens(2, 20)

    def in_place(x: Tensor, hook: Any) -> None:
        x[:, 4:9] *= 0.5

    def in_place_returned(x: Tensor, hook: Any) -> Tensor:
        x[:, 4:9].mul_(0.5)
        return x

    def returned(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, 4:9] *= 0.5
        return x

    with context():
        native = qwen.model(tokens)
        first, *others = (
            qwen.model.run_with_hooks(tokens, fwd_hooks=[(point(1, name), edit)])
            for edit in (returned, in_place, in_place_returned)
        )
    assert (first - native).abs().max() > 100 * TOLERANCE
    for other in others:
        assert_close(other, first, 1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "name", ["write.1", "state.1", "write_key", "write_value", "read", "decay", "recurrence_out"]
)
def test_a_hook_that_changes_nothing_leaves_the_logits_bit_by_bit(
    qwen: Pair, name: str, context: Callable[[], Any]
):
    tokens = some_tokens(2, 70)
    with context():
        native = qwen.model(tokens)
        for idle in (lambda x, hook: None, lambda x, hook: x):
            logits = qwen.model.run_with_hooks(tokens, fwd_hooks=[(point(1, name), idle)])
            if (name, context) == ("write_key", torch.enable_grad):
                # The gradient of the key must leave out the erase, which takes another way to the same sum.
                assert_close(logits, native, 1e-5)
            else:
                assert torch.equal(logits, native)


@pytest.mark.parametrize("layer", LINEAR_LAYERS)
@torch.no_grad()
def test_an_equal_copy_leaves_the_logits(pair: Pair, layer: int):
    tokens = some_tokens(2, 70)
    native = pair.reference(tokens, use_cache=False).logits
    copies = [(point(layer, name), lambda x, hook: x.clone()) for name in SHAPES]
    assert_close(pair.model.run_with_hooks(tokens, fwd_hooks=copies), native)


@pytest.mark.parametrize(("layer", "head"), CELLS[1::2])
@torch.no_grad()
def test_a_set_state_is_the_state_and_later_tokens_follow(pair: Pair, layer: int, head: int):
    chosen = [[0], [5, 40], [63, 64], [66]]  # one list a row
    tokens = some_tokens(1, 67).expand(len(chosen), -1)
    native = pair.reference(tokens[:1], use_cache=False).logits
    new = random(len(chosen), 67, D_K, D_V) / 10
    states = torch.zeros(len(chosen), 67, HEADS, D_K, D_V, dtype=torch.float64)
    is_set = torch.zeros(len(chosen), 67, HEADS, dtype=torch.bool)
    states[:, :, head] = new.double()
    for row, positions in enumerate(chosen):
        is_set[row, positions, head] = True
    expected, _ = truth_of(pair, tokens, layer, Edits(states=(states, is_set)))

    def edit(x: Tensor, hook: Any) -> None:
        for row, positions in enumerate(chosen):
            x[row, positions] = new[row, positions].flatten(-2)

    for row, positions in enumerate(chosen):
        assert (expected[row] - native[0])[positions].abs().max() > 100 * TOLERANCE
    logits = pair.model.run_with_hooks(tokens, fwd_hooks=[(point(layer, f"state.{head}"), edit)])
    assert_close(logits, expected)


@torch.no_grad()
def test_states_set_beside_edited_writes(pair: Pair):
    """Before a set state the edited writes no longer matter, after it they do; every other token set too."""
    tokens, layer, head = some_tokens(2, 67), 3, 2
    new_writes, new_states = random(2, 67, D_K, D_V) / D_K, random(2, 67, D_K, D_V, seed=5) / 10
    for chosen in ([20, 50], list(range(1, 67, 2))):
        states = torch.zeros(2, 67, HEADS, D_K, D_V, dtype=torch.float64)
        is_set = torch.zeros(2, 67, HEADS, dtype=torch.bool)
        states[:, :, head], is_set[0, chosen, head] = new_states.double(), True
        edits = Edits(writes=at(slice(10, 60), head, new_writes[:, 10:60].double()), states=(states, is_set))
        expected, _ = truth_of(pair, tokens, layer, edits)

        def set_states(x: Tensor, hook: Any, chosen: Any = chosen) -> None:
            x[0, chosen] = new_states[0, chosen].flatten(-2)

        logits = pair.model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (point(layer, f"write.{head}"), replace(slice(10, 60), new_writes[:, 10:60])),
                (point(layer, f"state.{head}"), set_states),
            ],
        )
        assert_close(logits, expected)


FACTOR_EDITS: dict[str, tuple[str, tuple[int, ...]]] = {
    "write_key": ("keys", (D_K,)),
    "write_value": ("values", (D_V,)),
    "read": ("reads", (D_K,)),
    "recurrence_out": ("recurrence_out", (D_V,)),
}


@pytest.mark.parametrize("layer", LINEAR_LAYERS)
@pytest.mark.parametrize("name", FACTOR_EDITS)
@torch.no_grad()
def test_edited_factors(pair: Pair, name: str, layer: int):
    """Keys and values leave the erase native, reads and outputs touch one token only."""
    field, size = FACTOR_EDITS[name]
    tokens, window = some_tokens(2, 67), slice(30, 40)
    new = random(2, 10, *size) / 4
    native = pair.reference(tokens, use_cache=False).logits
    expected, trace = truth_of(pair, tokens, layer, Edits(**{field: at(window, 2, new.double())}))
    assert (expected - native)[:, window].abs().max() > 100 * TOLERANCE
    seen: list[Tensor] = []

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, window, 2] = new
        return x

    def look(x: Tensor, hook: Any) -> None:
        seen.append(x.clone())

    logits = pair.model.run_with_hooks(
        tokens, fwd_hooks=[(point(layer, name), edit), (point(layer, "recurrence_out"), look)]
    )
    assert_close(logits, expected)
    assert_close(seen[0], trace.recurrence_out)


@pytest.mark.parametrize("layer", LINEAR_LAYERS)
@torch.no_grad()
def test_edited_decay_moves_the_erase_too(pair: Pair, layer: int):
    tokens = some_tokens(2, 67)

    def change(decay: Tensor) -> Tensor:
        decay = decay.clone()
        decay[:, 30:40, 1] = 0.93
        decay[:, 35] = 0  # forget everything
        decay[:, 50, 2] = 1
        return decay

    native = pair.reference(tokens, use_cache=False).logits
    expected, _ = truth_of(pair, tokens, layer, Edits(decay=change))
    assert (expected - native)[:, 30:].abs().max() > 100 * TOLERANCE
    logits = pair.model.run_with_hooks(tokens, fwd_hooks=[(point(layer, "decay"), lambda x, hook: change(x))])
    assert_close(logits, expected)


@torch.no_grad()
def test_a_write_hook_sees_edited_factors(pair: Pair):
    tokens, key = some_tokens(1, 20), random(D_K)
    seen = []

    def edit_key(x: Tensor, hook: Any) -> None:
        x[:, 7, 1] = key

    expected, trace = truth_of(pair, tokens, 0, Edits(keys=at(7, 1, key.double())))
    logits = pair.model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (point(0, "write_key"), edit_key),
            (point(0, "write.1"), lambda x, hook: seen.append(x.clone())),
        ],
    )
    assert_close(logits, expected)
    assert_close(heads_of(seen[0]), trace.writes[:, :, 1])


@pytest.mark.parametrize("kind", ["write", "state"])
@torch.no_grad()
def test_a_hook_that_returns_another_shape_is_told(qwen: Pair, kind: str):
    wrong = [(point(1, f"{kind}.2"), lambda x, hook: x.unflatten(-1, (D_K, D_V)))]
    with pytest.raises(HookedModelError, match=rf"hook_{kind}\.2.*expected \(1, 5, {D_K * D_V}\)"):
        qwen.model.run_with_hooks(some_tokens(1, 5), fwd_hooks=wrong)


# Cached decoding.


def pieces(length: int, *sizes: int) -> list[slice]:
    """Cut positions into pieces of these sizes, then single tokens."""
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    edges += range(edges[-1] + 1, length + 1)
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def decode(pair: Pair, tokens: Tensor, cuts: list[slice], hooks: Callable[[slice], list[Any]]) -> Tensor:
    """Logits of a passage read piece by piece from one cache, with hooks made for each piece."""
    cache = DynamicCache(config=pair.reference.config)
    parts = [
        pair.model.run_with_hooks(tokens[:, cut], fwd_hooks=hooks(cut), past_key_values=cache, use_cache=True)
        for cut in cuts
    ]
    return torch.cat(parts, 1)


CUTS = {"token by token": (), "prefill": (16,), "one, then many": (1, 14), "pieces": (8, 2, 3, 1, 5)}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_cached_decoding_equals_prefill(pair: Pair, cuts: tuple[int, ...]):
    tokens = some_tokens(2, 22)
    expected = pair.reference(tokens, use_cache=False).logits
    assert_close(decode(pair, tokens, pieces(22, *cuts), lambda cut: []), expected)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_cached_decoding_with_edits_at_absolute_positions(pair: Pair, cuts: tuple[int, ...]):
    """The cache carries an edit of the prefill into later tokens, and single tokens can be edited."""
    tokens, layer, head = some_tokens(2, 22), 1, 2
    edited = [0, 4, 9, 15, 16, 19, 21]
    new = random(2, 22, D_K, D_V) / D_K
    expected, trace = truth_of(
        pair, tokens, layer, Edits(writes=lambda w: at(edited, head, new[:, edited].double())(w))
    )
    assert (expected - pair.reference(tokens, use_cache=False).logits).abs().max() > 100 * TOLERANCE
    states: list[Tensor] = []

    def hooks(cut: slice) -> list[Any]:
        here = [p for p in edited if cut.start <= p < cut.stop]

        def edit(x: Tensor, hook: Any) -> None:
            assert x.shape[1] == cut.stop - cut.start
            for p in here:
                x[:, p - cut.start] = new[:, p].flatten(-2)

        return [
            (point(layer, f"write.{head}"), edit),
            (point(layer, f"state.{head}"), lambda x, hook: states.append(x.clone())),
        ]

    assert_close(decode(pair, tokens, pieces(22, *cuts), hooks), expected)
    assert_close(heads_of(torch.cat(states, 1)), trace.states[:, :, head])


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@torch.no_grad()
def test_cached_decoding_with_set_states(pair: Pair, cuts: tuple[int, ...]):
    tokens, layer, head = some_tokens(2, 22), 0, 3
    chosen, new = [2, 15, 19], random(2, 22, D_K, D_V) / 10
    states = torch.zeros(2, 22, HEADS, D_K, D_V, dtype=torch.float64)
    is_set = torch.zeros(2, 22, HEADS, dtype=torch.bool)
    states[:, :, head], is_set[:, chosen, head] = new.double(), True
    expected, _ = truth_of(pair, tokens, layer, Edits(states=(states, is_set)))

    def hooks(cut: slice) -> list[Any]:
        def edit(x: Tensor, hook: Any) -> None:
            for p in chosen:
                if cut.start <= p < cut.stop:
                    x[:, p - cut.start] = new[:, p].flatten(-2)

        return [(point(layer, f"state.{head}"), edit)]

    assert_close(decode(pair, tokens, pieces(22, *cuts), hooks), expected)


@torch.no_grad()
def test_cached_decoding_of_a_left_padded_batch_with_edits(pair: Pair):
    """Rows of different lengths go on from one cache as each would alone."""
    lengths, longest, prefill, layer, head = (14, 9), 14, 11, 1, 0
    tokens, new = some_tokens(2, longest), random(2, longest, D_K, D_V) / D_K
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    edited = [7, 12]
    cache, parts = DynamicCache(config=pair.reference.config), []
    for cut in pieces(longest, prefill):

        def edit(x: Tensor, hook: Any, cut: slice = cut) -> None:
            for p in edited:
                if cut.start <= p < cut.stop:
                    x[:, p - cut.start] = new[:, p].flatten(-2)

        parts.append(
            pair.model.run_with_hooks(
                tokens[:, cut],
                fwd_hooks=[(point(layer, f"write.{head}"), edit)],
                attention_mask=mask[:, : cut.stop],
                past_key_values=cache,
                use_cache=True,
            )
        )
    logits = torch.cat(parts, 1)
    for row, n in enumerate(lengths):
        skipped = longest - n
        here = [p - skipped for p in edited]
        edits = Edits(writes=at(here, head, new[row : row + 1, edited].double()))
        expected, _ = truth_of(pair, tokens[row : row + 1, skipped:], layer, edits)
        assert_close(logits[row : row + 1, skipped:], expected)


@torch.no_grad()
def test_an_edit_in_the_prefill_alone_is_in_the_cache(pair: Pair):
    tokens, new = some_tokens(1, 12), random(1, D_K, D_V)
    expected, _ = truth_of(pair, tokens, 0, Edits(writes=at(3, 1, new.double())))
    native = pair.reference(tokens, use_cache=False).logits
    assert (expected - native)[:, 8:].abs().max() > 100 * TOLERANCE
    cache = DynamicCache(config=pair.reference.config)
    edit = [(point(0, "write.1"), replace(3, new))]
    pair.model.run_with_hooks(tokens[:, :8], fwd_hooks=edit, past_key_values=cache, use_cache=True)
    rest = pair.model(tokens[:, 8:], past_key_values=cache, use_cache=True)
    assert_close(rest, expected[:, 8:])


@torch.no_grad()
def test_a_cache_can_pass_between_the_two_models(pair: Pair):
    """What the hooked layer keeps in a cache is what the stock layer keeps there."""
    tokens = some_tokens(2, 20)
    expected = pair.reference(tokens, use_cache=False).logits[:, 9:]
    cache = DynamicCache(config=pair.reference.config)
    pair.model(tokens[:, :9], past_key_values=cache, use_cache=True)
    assert_close(pair.reference(tokens[:, 9:], past_key_values=cache, use_cache=True).logits, expected)
    cache = DynamicCache(config=pair.reference.config)
    pair.reference(tokens[:, :9], past_key_values=cache, use_cache=True)
    assert_close(pair.model(tokens[:, 9:], past_key_values=cache, use_cache=True), expected)


@torch.no_grad()
def test_generation_is_edited_token_by_token(pair: Pair):
    """Greedy generation equals the greedy loop over the stock model with the edited layer."""
    prompt, layer, head, n_new = some_tokens(1, 6), 3, 1, 7
    push = random(D_K, D_V)
    written: list[int] = []

    def greedy(edits: Edits | None) -> Tensor:
        tokens = prompt
        for _ in range(n_new):
            best = truth_of(pair, tokens, layer, edits)[0][:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
        return tokens

    def edit(x: Tensor, hook: Any) -> Tensor:
        written.append(x.shape[1])
        return x + push.flatten()

    expected = greedy(Edits(writes=at(slice(None), head, lambda w: w + push.double())))
    assert not torch.equal(expected, greedy(None))
    with pair.model.hooks(fwd_hooks=[(point(layer, f"write.{head}"), edit)]):
        found = pair.model.generate(
            prompt,
            max_new_tokens=n_new,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
    assert torch.equal(found, expected)
    assert written == [6] + [1] * (n_new - 1)


# Gradients.


def loss_of(logits: Tensor) -> Tensor:
    """A loss in which every logit counts."""
    return (logits * random(*logits.shape[1:], seed=9)).sum()


def expected_gradient(pair: Pair, tokens: Tensor, layer: int, what: str) -> Tensor:
    """d loss / d write, or state after the token, through the loop by autograd."""
    shift: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        shift.append(torch.zeros_like(x).requires_grad_())
        return x + shift[-1]

    with standing_in(pair.reference, pair.folder, layer, Edits(**{what: leaf})):
        loss = loss_of(pair.reference(tokens, use_cache=False).logits)
        return torch.autograd.grad(loss, shift[0])[0]


def assert_same_gradient(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 1e-3
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 3), (3, 0)])
def test_gradient_with_respect_to_a_write(pair: Pair, layer: int, head: int):
    tokens = some_tokens(2, 67)
    expected = expected_gradient(pair, tokens, layer, "writes")[:, :, head]
    name = point(layer, f"write.{head}")
    seen: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        seen.append(x)

    def keep_copy(x: Tensor, hook: Any) -> Tensor:
        seen.append(x.clone())
        return seen[-1]

    for hook in (keep, keep_copy):  # read, and replaced by an equal tensor
        with pair.model.hooks(fwd_hooks=[(name, hook)]):
            loss = loss_of(pair.model(tokens))
        assert_same_gradient(heads_of(torch.autograd.grad(loss, seen[-1])[0]), expected)


def test_gradient_of_an_edited_write(pair: Pair):
    """At a write far from the native one, where the gated norm bends."""
    tokens, layer, head, new = some_tokens(1, 40), 1, 2, random(1, D_K, D_V)
    leaves = [new.clone().requires_grad_(), new.double().requires_grad_()]
    edit = [(point(layer, f"write.{head}"), replace(20, leaves[0]))]
    loss = loss_of(pair.model.run_with_hooks(tokens, fwd_hooks=edit))
    edits = Edits(writes=at(20, head, leaves[1]))
    with standing_in(pair.reference, pair.folder, layer, edits):
        expected = loss_of(pair.reference(tokens, use_cache=False).logits)
    assert_same_gradient(torch.autograd.grad(loss, leaves[0])[0], torch.autograd.grad(expected, leaves[1])[0])


def test_gradient_with_respect_to_a_state(pair: Pair):
    """A shift of the state after a token is worth as much as one of its write."""
    tokens, layer, head = some_tokens(2, 30), 1, 2
    expected = expected_gradient(pair, tokens, layer, "writes")[:, :, head]
    seen: list[Tensor] = []
    with pair.model.hooks(fwd_hooks=[(point(layer, f"state.{head}"), lambda x, hook: seen.append(x))]):
        loss = loss_of(pair.model(tokens))
    assert_same_gradient(heads_of(torch.autograd.grad(loss, seen[0])[0]), expected)


@pytest.mark.parametrize(
    ("name", "field"),
    [("write_key", "keys"), ("write_value", "values"), ("read", "reads"), ("decay", "decay")],
)
def test_gradient_with_respect_to_factors(pair: Pair, name: str, field: str):
    """Through an erase that stays native, but for the decay, which is in both."""
    tokens, layer = some_tokens(2, 30), 0
    seen: list[Tensor] = []

    def shift(x: Tensor, hook: Any) -> Tensor:
        seen.append(torch.zeros_like(x).requires_grad_())
        return x + seen[0]

    loss = loss_of(pair.model.run_with_hooks(tokens, fwd_hooks=[(point(layer, name), shift)]))
    (found,) = torch.autograd.grad(loss, seen)
    expected = expected_gradient(pair, tokens, layer, field)
    if name == "decay":  # a float32 cannot hold much of d loss / d alpha at an alpha of e^-30: compare d log
        decay = truth_of(pair, tokens, layer)[1].decay
        found, expected = found * decay, expected * decay
    assert_same_gradient(found, expected)


def test_backward_hooks_see_the_gradient(pair: Pair):
    tokens, layer, head = some_tokens(2, 20), 1, 1
    expected = expected_gradient(pair, tokens, layer, "writes")[:, :, head]
    seen: list[Tensor] = []

    def watch(grad: Tensor, hook: Any) -> None:
        seen.append(grad)

    with pair.model.hooks(bwd_hooks=[(point(layer, f"write.{head}"), watch)]):
        loss_of(pair.model(tokens)).backward()
    pair.model.zero_grad()
    assert len(seen) == 1
    assert_same_gradient(heads_of(seen[0]), expected)


def test_cached_gradients(pair: Pair):
    tokens, name = some_tokens(1, 9), point(1, "write.0")
    loss, cache = pair.model.run_with_cache(
        tokens, names_filter=[name, point(1, "state.0")], incl_bwd=True, return_type="loss"
    )
    pair.model.zero_grad()
    shift: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        shift.append(torch.zeros_like(x).requires_grad_())
        return x + shift[0]

    with standing_in(pair.reference, pair.folder, 1, Edits(writes=leaf)):
        logits = pair.reference(tokens, use_cache=False).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected, shift)
    assert_same_gradient(heads_of(cache[f"{name}_grad"]), gradient[:, :, 0])


def test_gradient_of_a_hooked_state_with_respect_to_a_hooked_write(qwen: Pair):
    """Both only read: the state after a token moves with its own write one to one."""
    seen: list[Tensor] = []
    hooks = [(point(1, f"{kind}.1"), lambda x, hook: seen.append(x)) for kind in ("write", "state")]
    with qwen.model.hooks(fwd_hooks=hooks):
        qwen.model(some_tokens(1, 8))
    write, state = seen
    (found,) = torch.autograd.grad(state[:, -1].sum(), write, allow_unused=True)
    assert found is not None
    assert_close(found[:, -1], torch.ones(1, D_K * D_V))


@pytest.fixture
def forgetful(qwen: Pair) -> Iterator[Pair]:
    """One head of each layer decays by more than a float32 can say: exp(g) is 0."""
    nets = (qwen.model.original_model, qwen.reference)
    layers = [net.model.layers[layer].linear_attn for net in nets for layer in LINEAR_LAYERS]
    before = [(layer.A_log.detach().clone(), layer.dt_bias.detach().clone()) for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.A_log[3], layer.dt_bias[3] = 5.0, 5.0
    yield qwen
    with torch.no_grad():
        for layer, (rate, bias) in zip(layers, before):
            layer.A_log.copy_(rate)
            layer.dt_bias.copy_(bias)


@pytest.mark.parametrize("factor", [None, 1.0, 0.0])
def test_gradients_where_the_decay_is_zero(forgetful: Pair, factor: float | None):
    """Read, scaled by 1, and set to 0 by a hook: exp(g) = 0 has no logarithm, but no gradient is NaN."""
    tokens = some_tokens(1, 12)
    decays: list[Tensor] = []

    def hook(x: Tensor, hook: Any) -> Tensor | None:
        decays.append(x.detach())
        return None if factor is None else x * factor

    forgetful.model.zero_grad()
    logits = forgetful.model.run_with_hooks(tokens, fwd_hooks=[(point(1, "decay"), hook)])
    assert (decays[0][..., 3] == 0).all()
    if factor != 0:
        assert_close(logits, forgetful.reference(tokens, use_cache=False).logits)
    loss_of(forgetful.reference(tokens, use_cache=False).logits).backward()
    assert all(x.grad.isfinite().all() for x in forgetful.reference.parameters())
    forgetful.reference.zero_grad()
    loss_of(logits).backward()
    bad = [
        name
        for name, x in forgetful.model.original_model.named_parameters()
        if x.grad is not None and not x.grad.isfinite().all()
    ]
    forgetful.model.zero_grad()
    assert not bad


READ_ALL = {
    "nothing": [],
    "writes": ["write.0", "write.1", "write.2", "write.3"],
    "states": ["state.0", "state.3"],
    "both": ["write.1", "state.1"],
    "factors": ["write_key", "write_value", "read", "decay", "recurrence_out"],
    "everything": list(SHAPES),
}


@pytest.mark.parametrize("names", READ_ALL.values(), ids=READ_ALL.keys())
def test_reading_leaves_the_parameters_gradients(qwen: Pair, names: list[str]):
    tokens = some_tokens(2, 67)
    qwen.reference.zero_grad()
    loss_of(qwen.reference(tokens, use_cache=False).logits).backward()
    expected = {name: x.grad for name, x in qwen.reference.named_parameters()}
    hooks = [(point(layer, name), lambda x, hook: None) for layer in LINEAR_LAYERS for name in names]
    qwen.model.zero_grad()
    loss_of(qwen.model.run_with_hooks(tokens, fwd_hooks=hooks)).backward()
    found = {
        name.replace("._original_component", ""): x.grad
        for name, x in qwen.model.original_model.named_parameters()
    }
    qwen.model.zero_grad()
    qwen.reference.zero_grad()
    assert found.keys() >= expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        assert float((found[name] - gradient).abs().max()) <= 1e-3 * scale, name


# What an idle hook costs: nothing.


class LargestTensors(TorchDispatchMode):
    """Notes how large the tensors are that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_no_matrix_is_built_for_a_hook_that_nobody_listens_to(pair: Pair, grad: bool):
    length = 48
    one_head, all_heads = length * D_K * D_V, length * D_K * D_V * HEADS

    def largest(*names: str) -> int:
        with torch.set_grad_enabled(grad), LargestTensors() as seen:
            hooks = [(point(1, name), lambda x, hook: None) for name in names]
            pair.model.run_with_hooks(some_tokens(1, length), fwd_hooks=hooks)
        return seen.numel

    assert largest() < one_head
    assert largest("write_key", "write_value", "read", "decay", "recurrence_out") < one_head
    assert one_head <= largest("write.2") < all_heads
    assert one_head <= largest("state.2") < all_heads


# Low precision.


@torch.no_grad()
def test_bfloat16(pair: Pair):
    """No further from float32 than transformers in bfloat16; the recurrence's hooks come in float32."""
    tokens = some_tokens(2, 65)
    exact = pair.reference(tokens, use_cache=False).logits
    model = HookedRecurrent.boot_transformers(str(pair.folder), device="cpu", dtype=torch.bfloat16)
    stock = type(pair.reference).from_pretrained(
        pair.folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    logits, cache = model.run_with_cache(tokens, names_filter=[point(1, name) for name in SHAPES])
    assert logits.dtype == torch.bfloat16

    def error(x: Tensor) -> float:
        return float((x.float() - exact).abs().mean())

    assert error(logits) < 1.5 * error(stock(tokens, use_cache=False).logits)
    inside = set(SHAPES) - {"in", "out"}
    assert {cache[point(1, name)].dtype for name in inside} == {torch.float32}
    assert {cache[point(1, name)].dtype for name in ("in", "out")} == {torch.bfloat16}
    new = random(1, D_K, D_V)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(point(1, "write.2"), replace(20, new))])
    truth, _ = truth_of(pair, tokens, 1, Edits(writes=at(20, 2, new.double())))
    change = (truth - exact)[:, 20:].float()
    off = (edited - logits).float()[:, 20:] - change
    assert float(off.abs().mean()) < 0.5 * float(change.abs().mean())


@torch.no_grad()
def test_autocast(qwen: Pair):
    """Projections in bfloat16, the recurrence in float32, and nothing fails."""
    tokens = some_tokens(2, 65)
    exact = qwen.reference(tokens, use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = qwen.reference(tokens, use_cache=False).logits
        logits, cache = qwen.model.run_with_cache(
            tokens, names_filter=[point(1, "state.0"), point(1, "write.0")]
        )
    assert cache[point(1, "state.0")].dtype == cache[point(1, "write.0")].dtype == torch.float32
    assert (logits - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()
