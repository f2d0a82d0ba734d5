"""The mixers against transformers, and their hooks against a float64 loop put into the stock model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_models import HookedGatedDeltaNet, HookedRecurrent
from tests.hooked_models.architectures import (
    MODELS,
    TOLERANCE,
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
    some_tokens,
    where_something_is_erased,
)
from tests.hooked_models.oracles import Edits, Trace, at, standing_in

# Unedited.


@on_every_model
def test_the_tiny_models_leave_nothing_at_its_initial_value(pair: Pair):
    """Or a factor of 1 and a term of 0 could be forgotten."""
    for name, x in pair.reference.named_parameters():
        assert float(x.detach().std()) > 0.01, name


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
@torch.no_grad()
def test_logits_equal_those_of_transformers(pair: Pair, length: int):
    tokens = some_tokens(2, length)
    expected = pair.logits(tokens)
    assert expected.std() > 0.5  # not a comparison of zeros
    assert_close(pair.model(tokens), expected)


@on_every_model
@pytest.mark.parametrize("length", [1, 66])
@torch.no_grad()
def test_stock_model_with_the_loop_equals_itself(pair: Pair, length: int):
    """The oracle of all that follows; with padding too, but for what padding itself puts out."""
    tokens, mask = some_tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        expected = pair.logits(tokens, **kwargs)
        for layer in pair.layers:
            found = pair.truth(tokens, layer, **kwargs)[0]
            assert_close(found[1], expected[1], 5e-5)
            assert_close(found[0, length // 3 :], expected[0, length // 3 :], 5e-5)


@on("mamba2")
def test_both_limits_of_the_time_step_are_reached(pair: Pair):
    decay = pair.truth(some_tokens(2, 66), 1)[1].decay
    step = decay.log() / -pair.reference.backbone.layers[1].mixer.A_log.detach().double().exp()
    for limit in pair.reference.config.time_step_limit:
        at_limit = (step - limit).abs() < 1e-6
        assert at_limit.any()
        assert not at_limit.all()


@on_every_model
@torch.no_grad()
def test_left_padding(pair: Pair):
    """A padded passage equals the passage alone, whatever the tokens under the padding."""
    lengths, longest = (70, 66, 3), 70
    tokens = some_tokens(3, longest)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    names = {kind: pair.point(1, f"{kind}.2") for kind in pair.kinds}
    logits, cache = pair.model.run_with_cache(tokens, attention_mask=mask, names_filter=list(names.values()))
    for row, n in enumerate(lengths):
        skipped, alone = longest - n, tokens[row : row + 1, longest - n :]
        assert_close(logits[row : row + 1, skipped:], pair.logits(alone))
        trace = pair.truth(alone, 1)[1]
        for kind, name in names.items():
            assert_close(cache[name][row, skipped:], trace.hook(f"{kind}.2")[0])
            assert (cache[name][row, :skipped] == 0).all()


@once_per_architecture
@torch.no_grad()
def test_left_padding_of_texts(pair: Pair):
    texts = ["w5 w9 w77", "w150 w151 w8 w9 w10 w11 w12"]
    logits = pair.model(texts, padding_side="left", prepend_bos=False)
    for row, text in enumerate(texts):
        alone = torch.tensor([[int(word[1:]) for word in text.split()]])
        assert_close(logits[row : row + 1, -alone.shape[1] :], pair.logits(alone))


# The hooks of the docstring's table.


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_every_hook_fires_once_with_its_shape_and_in_order(pair: Pair, use_cache: bool):
    """And there are no others: softmax layers have no cells, Mamba-2 erases nothing."""
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(x: Tensor, hook: Any) -> None:
        assert hook.name not in shapes
        shapes[hook.name] = tuple(x.shape)

    expected = {
        pair.point(layer, name): (2, 7, *size) for layer in pair.layers for name, size in pair.shapes.items()
    }
    per_head = {name for name in pair.model.hook_dict if re.search(r"hook_(write|erase|state)\.", name)}
    assert per_head == {name for name in expected if name[-1].isdigit()}
    hooks = [(name, watch) for name in expected]
    pair.model.run_with_hooks(some_tokens(2, 7), fwd_hooks=hooks, use_cache=use_cache)
    assert shapes == expected
    for layer in pair.layers:
        here = [name.split("hook_")[1] for name in shapes if name.startswith(f"blocks.{layer}.")]
        assert here[0] == "in"
        assert set(here[1:5]) == {"write_key", "write_value", "read", "decay"}
        assert here[5:-3] == [f"{kind}.{head}" for head in range(pair.heads) for kind in pair.kinds]
        assert here[-3:] == ["recurrence_out", "head_out", "out"]


@torch.no_grad()
def test_activations_equal_the_loop(pair: Pair):
    tokens = some_tokens(2, 67)
    for layer in pair.layers:
        trace = pair.truth(tokens, layer)[1]
        for name, x in pair.activations(tokens, layer, [x for x in pair.shapes if x != "in"]).items():
            assert_close(x, trace.hook(name))
            assert trace.hook(name).abs().max() > 0.01


@once_per_architecture
@torch.no_grad()
def test_cached_positions_can_be_sliced(pair: Pair):
    tokens = some_tokens(2, 9)
    whole = pair.activations(tokens, 1, pair.shapes)
    for name, last in pair.activations(tokens, 1, pair.shapes, pos_slice=slice(-2, None)).items():
        assert torch.equal(last, whole[name][:, -2:])


# Edits.


def look_into(seen: dict[str, Tensor]) -> Callable[..., None]:
    """A hook that puts copies of activations into ``seen``, by its name after "hook_"."""

    def look(x: Tensor, hook: Any) -> None:
        seen[hook.name.split("hook_")[1]] = x.clone()

    return look


def assert_seen(seen: dict[str, Tensor], trace: Trace) -> None:
    """Activations by their hooks' names are the loop's."""
    assert seen
    for name, x in seen.items():
        assert_close(x, trace.hook(name))


def replace(position: int | slice | list[int], new: Tensor) -> Callable[..., Tensor]:
    """A hook on a write, erase or state that returns a new tensor."""

    return lambda x, hook: at(position, slice(None), new.flatten(-2))(x)


def replace_in_place(position: int | slice | list[int], new: Tensor) -> Callable[..., None]:
    """The same in the tensor that the hook is shown."""

    def hook(x: Tensor, hook: Any) -> None:
        x[:, position] = new.flatten(-2).to(x)

    return hook


def check_set_matrices(pair: Pair, kind: str, layer: int, head: int, chosen: list[list[int]]) -> None:
    """Full-rank matrices in the place of the native ones, at the chosen positions of each row."""
    tokens = some_tokens(1, 67).expand(len(chosen), -1)
    native, new = pair.logits(tokens[:1]), pair.matrices(len(chosen), 67) / (4 if kind == "write" else 10)
    expected, _ = pair.truth(tokens, layer, pair.setting(kind, new, head, *enumerate(chosen)))

    def edit(x: Tensor, hook: Any) -> None:
        for row, positions in enumerate(chosen):
            x[row, positions] = new[row, positions].flatten(-2)

    for row, positions in enumerate(chosen):
        assert_close(expected[row, : positions[0]], native[0, : positions[0]])
        assert (expected[row] - native[0])[positions].abs().max() > 100 * TOLERANCE
    assert_close(pair.run(tokens, layer, {f"{kind}.{head}": edit}), expected)


@at_some_cells(*MODELS)
@torch.no_grad()
def test_a_set_write_state_or_erase_at_any_position_and_head(pair: Pair, layer: int, head: int):
    """All later tokens follow; where none is set, a_t b_t^T still takes its part of the edited state."""
    check_set_matrices(pair, "write", layer, head, [[0], [7 + head], [63], [64], [66]])
    for kind in pair.kinds[1:]:
        # A row's first, some, those at a chunk's edge, last and every other.
        check_set_matrices(pair, kind, layer, head, [[0, 1], [5, 40], [63, 64], [66], list(range(1, 67, 2))])


@torch.no_grad()
def test_edited_writes_at_every_position_of_two_heads_and_rows(pair: Pair):
    """Erases, states and outputs of all heads are those that the edited writes lead to."""
    tokens, layer = some_tokens(2, 67), 1
    first, second = pair.matrices(2, 67, seed=2) / 10, pair.matrices(2, 67, seed=3) / 10
    first[0] = 0

    def change(writes: Tensor) -> Tensor:
        return at(slice(None), 3, second.double())(at(slice(None), 1, first.double())(writes))

    expected, trace = pair.truth(tokens, layer, Edits(writes=change))
    seen: dict[str, Tensor] = {}
    hooks = {"write.1": replace(slice(None), first), "write.3": replace(slice(None), second)}
    looks = [f"{kind}.{head}" for kind in pair.kinds[1:] for head in range(pair.heads)]
    hooks |= dict.fromkeys([*looks, "recurrence_out"], look_into(seen))
    assert_close(pair.run(tokens, layer, hooks), expected)
    assert_seen(seen, trace)


@torch.no_grad()
def test_a_head_without_writes_reads_nothing(pair: Pair):
    tokens, seen = some_tokens(2, 20), {}
    native = pair.activations(tokens, 0, ["recurrence_out"])["recurrence_out"]
    hooks = {"write.2": lambda x, hook: torch.zeros_like(x), "recurrence_out": look_into(seen)}
    pair.run(tokens, 0, hooks)
    edited, others = seen["recurrence_out"], [h for h in range(pair.heads) if h != 2]
    assert edited[:, :, 2].abs().max() < 1e-5 < native[:, :, 2].abs().max()
    assert torch.equal(edited[:, :, others], native[:, :, others])


FACTORS = ("write_key", "write_value", "read", "decay", "recurrence_out", "head_out")
KINDS_OF_EDITS = [
    (name, point)
    for name in ("gdn", "mamba2", "rwkv7")
    for point in (*(f"{kind}.1" for kind in MODELS[name].kinds), *FACTORS)
]


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(("pair", "name"), KINDS_OF_EDITS, indirect=["pair"])
def test_edits_in_place_equal_returned_ones_and_idle_hooks_change_no_bit(
    pair: Pair, name: str, context: Callable[[], Any]
):
    tokens = some_tokens(2, 70)
    factor = 0.5 if name == "decay" else -0.5  # half an output is all the same to the norm that follows

    def in_place(x: Tensor, hook: Any) -> None:
        x[:, 4:9] *= factor

    def in_place_returned(x: Tensor, hook: Any) -> Tensor:
        x[:, 4:9].mul_(factor)
        return x

    def returned(x: Tensor, hook: Any) -> Tensor:
        return in_place_returned(x.clone(), hook)

    with context():
        native = pair.model(tokens)
        for idle in (nothing, lambda x, hook: x):
            logits = pair.run(tokens, 1, {name: idle})
            if (name, pair.mixer, context) == ("write_key", HookedGatedDeltaNet, torch.enable_grad):
                # The gradient of the key must leave out the erase, which takes another way to the same sum.
                assert_close(logits, native, 1e-5)
            else:
                assert torch.equal(logits, native)
        short = some_tokens(2, 20)
        edits = (returned, in_place, in_place_returned)
        first, *others = (pair.run(short, 1, {name: edit}) for edit in edits)
        assert (first - pair.model(short)).abs().max() > 100 * TOLERANCE
    for other in others:
        assert_close(other, first, 1e-6)


@torch.no_grad()
def test_an_equal_copy_leaves_the_logits(pair: Pair):
    tokens = some_tokens(2, 70)
    native = pair.logits(tokens)
    for layer in pair.layers:
        copies = dict.fromkeys(pair.shapes, lambda x, hook: x.clone())
        assert_close(pair.run(tokens, layer, copies), native)


@where_something_is_erased
@torch.no_grad()
def test_without_erases_the_state_only_decays_and_is_written_to(pair: Pair):
    tokens, layer, head = some_tokens(2, 67), 1, 2
    none, everywhere = torch.zeros(2, 67, pair.d_k, pair.d_v), (slice(None), slice(None))
    expected, trace = pair.truth(tokens, layer, pair.setting("erase", none, head, everywhere))
    seen: dict[str, Tensor] = {}
    hooks = {f"erase.{head}": replace(slice(None), none), f"state.{head}": look_into(seen)}
    logits = pair.run(tokens, layer, hooks)
    assert (expected - pair.logits(tokens)).abs().max() > 100 * TOLERANCE
    assert_close(logits, expected)
    decay, state = trace.decay.reshape(2, 67, pair.heads, -1, 1)[:, :, head], 0.0
    for t in range(67):
        state = decay[:, t] * state + trace.writes[:, t, head]
        assert_close(pair.unflatten(seen[f"state.{head}"])[:, t], state)


@torch.no_grad()
def test_writes_erases_and_states_edited_at_one_head(pair: Pair):
    """Tokens edited in one way, in two and in three; what came before a set state no longer matters."""
    tokens, layer, head = some_tokens(2, 67), pair.layers[-1], 2
    writes, states = pair.matrices(2, 67) / 10, pair.matrices(2, 67, seed=5) / 10
    erases = pair.matrices(2, 67, seed=6) / 20
    written, erased = slice(10, 60), [0, 9, 21, 35, 50, 51, 64]
    for chosen in ([20, 50], list(range(1, 67, 2))):
        edits = Edits(writes=at(written, head, writes[:, written].double()))
        if pair.erases:
            edits = pair.setting("erase", erases, head, (slice(None), erased), also=edits)
        before_states = pair.truth(tokens, layer, edits)[1]
        edits = pair.setting("state", states, head, (0, chosen), also=edits)
        expected, _ = pair.truth(tokens, layer, edits)
        seen: dict[str, Tensor] = {}

        def set_states(x: Tensor, hook: Any, chosen: Any = chosen, seen: Any = seen) -> None:
            look_into(seen)(x, hook)
            x[0, chosen] = states[0, chosen].flatten(-2)

        hooks = {"write": replace(written, writes[:, written]), "state": set_states}
        hooks["erase"] = replace_in_place(erased, erases[:, erased])
        logits = pair.run(tokens, layer, {f"{kind}.{head}": hooks[kind] for kind in pair.kinds})
        assert_close(logits, expected)
        assert_seen(seen, before_states)


FIELDS = [("write_key", "keys"), ("write_value", "values"), ("read", "reads")]  # of `Edits`


@pytest.mark.parametrize(
    ("name", "field"), [*FIELDS, ("recurrence_out", "recurrence_out"), ("head_out", "head_out")]
)
@torch.no_grad()
def test_edited_factors(pair: Pair, name: str, field: str):
    """Keys and values leave the erase native, reads and outputs touch one token only; later hooks see it."""
    tokens, window = some_tokens(2, 67), slice(30, 40)
    new = random(2, 10, pair.shapes[name][-1]) / 4
    native = pair.logits(tokens)

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, window, 2] = new
        return x

    for layer in pair.layers:
        expected, trace = pair.truth(tokens, layer, Edits(**{field: at(window, 2, new.double())}))
        assert (expected - native)[:, window].abs().max() > 100 * TOLERANCE
        seen: dict[str, Tensor] = {}
        kinds = pair.kinds if layer else ()
        looks = [("recurrence_out", look_into(seen)), *((f"{kind}.2", look_into(seen)) for kind in kinds)]
        fwd_hooks = [(pair.point(layer, x), hook) for x, hook in [(name, edit), *looks]]
        assert_close(pair.model.run_with_hooks(tokens, fwd_hooks=fwd_hooks), expected)
        assert_seen(seen, trace)


@torch.no_grad()
def test_edited_decay(pair: Pair):
    """It moves the erase too where it is a factor of it (Gated DeltaNet), and never the write."""
    tokens = some_tokens(2, 67)

    def change(decay: Tensor) -> Tensor:
        decay = decay.clone()
        decay[:, 30:40, 1] = 0.93
        decay[:, 35] = 0  # forget everything
        decay[:, 50, 2] = 1
        return decay

    native = pair.logits(tokens)
    for layer in pair.layers:
        expected, _ = pair.truth(tokens, layer, Edits(decay=change))
        assert (expected - native)[:, 30:].abs().max() > 100 * TOLERANCE
        assert_close(pair.run(tokens, layer, {"decay": lambda x, hook: change(x)}), expected)


@once_per_architecture
@torch.no_grad()
def test_a_hook_that_returns_another_shape_is_named(pair: Pair):
    for name, shape in pair.shapes.items():
        with refused(f"hook_{name} returned shape ", f"expected {(1, 5, *shape)}"):
            pair.run(some_tokens(1, 5), 1, {name: lambda x, hook: x[:, :1]})


# Cached decoding.


def pieces(length: int, *sizes: int) -> list[slice]:
    """Cut positions into pieces of these sizes, then single tokens."""
    edges = [0, *itertools.accumulate(sizes)]
    edges += range(edges[-1] + 1, length + 1)
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def decode(
    pair: Pair, tokens: Tensor, cuts: list[slice], layer: int, hooks: Callable[[slice], dict[str, Any]]
) -> Tensor:
    """Logits of a passage read piece by piece from one cache, with a layer's hooks made for each piece."""
    cache = {"past_key_values": pair.model.new_cache(), "use_cache": True}
    return torch.cat([pair.run(tokens[:, cut], layer, hooks(cut), **cache) for cut in cuts], 1)


CUTS = {"token by token": (), "prefill": (16,), "one, then many": (1, 14), "pieces": (8, 2, 3, 1, 5)}
in_any_pieces = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())


@on_every_model
@in_any_pieces
@torch.no_grad()
def test_cached_decoding_equals_prefill(pair: Pair, cuts: tuple[int, ...]):
    tokens = some_tokens(2, 22)
    assert_close(decode(pair, tokens, pieces(22, *cuts), 0, lambda cut: {}), pair.logits(tokens))


@in_any_pieces
@torch.no_grad()
def test_cached_decoding_with_edits_at_absolute_positions(pair: Pair, cuts: tuple[int, ...]):
    """The cache carries an edit of the prefill into later tokens, and single tokens can be edited."""
    tokens, layer, head = some_tokens(2, 22), 1, 2
    edited = [0, 4, 9, 15, 16, 19, 21]
    new = pair.matrices(2, 22) / 10
    expected, trace = pair.truth(tokens, layer, pair.setting("write", new, head, (slice(None), edited)))
    assert (expected - pair.logits(tokens)).abs().max() > 100 * TOLERANCE
    seen: list[dict[str, Tensor]] = []

    def hooks(cut: slice) -> dict[str, Any]:
        here = [p for p in edited if cut.start <= p < cut.stop]
        seen.append({})

        def edit(x: Tensor, hook: Any) -> None:
            assert x.shape[1] == cut.stop - cut.start
            x[:, [p - cut.start for p in here]] = new[:, here].flatten(-2)
            look_into(seen[-1])(x, hook)

        looks = {f"{kind}.{head}": look_into(seen[-1]) for kind in pair.kinds}
        return looks | {f"write.{head}": edit}

    assert_close(decode(pair, tokens, pieces(22, *cuts), layer, hooks), expected)
    assert_seen({name: torch.cat([part[name] for part in seen], 1) for name in seen[0]}, trace)


@in_any_pieces
@torch.no_grad()
def test_cached_decoding_with_set_erases_and_states(pair: Pair, cuts: tuple[int, ...]):
    tokens, layer, head = some_tokens(2, 22), 0, 3
    new = {"erase": pair.matrices(2, 22, seed=2) / 20, "state": pair.matrices(2, 22) / 10}
    chosen = {"erase": [1, 3, 9, 13, 16, 19, 20], "state": [2, 15, 19]}
    edits = Edits()
    for kind in pair.kinds[1:]:
        edits = pair.setting(kind, new[kind], head, (slice(None), chosen[kind]), also=edits)
    expected, _ = pair.truth(tokens, layer, edits)

    def hooks(cut: slice) -> dict[str, Any]:
        def edits_of(kind: str) -> Callable[..., None]:
            here = [p for p in chosen[kind] if cut.start <= p < cut.stop]
            return replace_in_place([p - cut.start for p in here], new[kind][:, here])

        return {f"{kind}.{head}": edits_of(kind) for kind in pair.kinds[1:]}

    assert_close(decode(pair, tokens, pieces(22, *cuts), layer, hooks), expected)


@torch.no_grad()
def test_cached_decoding_of_a_left_padded_batch_with_edits(pair: Pair):
    """Rows of different lengths go on from one cache as each would alone; only edited pieces have a hook."""
    lengths, longest, prefill, layer, head = (14, 9), 14, 11, 1, 0
    tokens, new = some_tokens(2, longest), pair.matrices(2, longest) / 10
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    edited = [7, 12]
    cache, parts = pair.new_cache(), []
    for cut in pieces(longest, prefill):
        here = [p for p in edited if cut.start <= p < cut.stop]
        edit = replace_in_place([p - cut.start for p in here], new[:, here])
        hooks = {f"write.{head}": edit} if here else {}
        parts.append(pair.run(tokens[:, cut], layer, hooks, attention_mask=mask[:, : cut.stop], **cache))
    logits = torch.cat(parts, 1)
    for row, n in enumerate(lengths):
        skipped = longest - n
        here = [p - skipped for p in edited]
        edits = Edits(writes=at(here, head, new[row : row + 1, edited].double()))
        alone = tokens[row : row + 1, skipped:]
        expected, _ = pair.truth(alone, layer, edits)
        after_the_edit = (expected - pair.logits(alone))[:, prefill - skipped]
        assert after_the_edit.abs().max() > 100 * TOLERANCE
        assert_close(logits[row : row + 1, skipped:], expected)


@on("gdn", "qwen3_next", "mamba2_plain", "rwkv7")
@torch.no_grad()
def test_a_cache_can_pass_between_the_two_models(pair: Pair):
    """What the hooked layer keeps in a cache is what the stock layer keeps there.

    Token by token and without limits of the time step: some versions of transformers' Mamba-2 cannot go on
    from a cache with several tokens, others forget the limits for a single one.
    """
    tokens = some_tokens(2, 14)
    expected = pair.logits(tokens)
    for models in itertools.permutations((pair.model, pair.reference)):
        cache = pair.new_cache()
        for cut, model in zip(pieces(14, 9), itertools.cycle(models)):
            out = model(tokens[:, cut], **cache)
            assert_close(out if isinstance(out, Tensor) else out.logits, expected[:, cut])


@torch.no_grad()
def test_generation_is_edited_token_by_token(pair: Pair):
    """Greedy generation equals the greedy loop over the stock model with the edited layer."""
    prompt, layer, head, n_new = some_tokens(1, 6), pair.layers[-1], 1, 7
    push = 3 * pair.matrices()
    written: list[int] = []

    def stock(edits: Edits | None) -> Tensor:
        tokens = prompt
        for _ in range(n_new):
            best = pair.truth(tokens, layer, edits)[0][:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
        return tokens

    def edit(x: Tensor, hook: Any) -> Tensor:
        written.append(x.shape[1])
        return x + push.flatten()

    expected = stock(Edits(writes=at(slice(None), head, lambda w: w + push.double())))
    assert not torch.equal(expected, stock(None))
    with pair.model.hooks(fwd_hooks=[(pair.point(layer, f"write.{head}"), edit)]):
        assert torch.equal(greedy(pair.model, prompt, n_new), expected)
    assert written == [6] + [1] * (n_new - 1)


# Gradients.


def loss_of(logits: Tensor) -> Tensor:
    """A loss in which every logit counts."""
    return (logits * random(*logits.shape[1:], seed=9)).sum()


def add_leaf(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """An edit that adds a zero of its own, which goes to ``kept``, to differentiate by."""

    def edit(x: Tensor) -> Tensor:
        kept.append(torch.zeros_like(x).requires_grad_())
        return x + kept[-1]

    return edit


def expected_gradient(
    pair: Pair, tokens: Tensor, layer: int, what: str, loss: Callable[[Tensor], Tensor] = loss_of
) -> Tensor:
    """d loss / d what, a field of `Edits`, through the loop by autograd."""
    shift: list[Tensor] = []
    with standing_in(pair.reference, pair.folder, layer, Edits(**{what: add_leaf(shift)})):
        return torch.autograd.grad(loss(pair.logits(tokens)), shift)[0]


def assert_same_gradient(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 1e-3
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


@at_some_cells("gdn", "qwen3_next", "mamba2", "rwkv7")
def test_gradient_with_respect_to_a_write(pair: Pair, layer: int, head: int):
    """A shift of the token's erase or state is worth as much, for all three are summands of the state."""
    tokens = some_tokens(2, 67)
    expected = expected_gradient(pair, tokens, layer, "writes")[:, :, head].flatten(-2)
    seen: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        seen.append(x)

    def keep_copy(x: Tensor, hook: Any) -> Tensor:
        seen.append(x.clone())
        return seen[-1]

    cases = [("write", keep), ("write", keep_copy)]  # read, and replaced by an equal tensor
    if layer == 1:
        cases += [(kind, keep) for kind in pair.kinds[1:]]
    for kind, hook in cases:
        loss = loss_of(pair.run(tokens, layer, {f"{kind}.{head}": hook}))
        assert_same_gradient(torch.autograd.grad(loss, seen[-1])[0], expected)


def test_gradient_of_edited_matrices(pair: Pair):
    """At a write, erase or state far from the native one, where the gated norm bends."""
    tokens, layer, head = some_tokens(1, 40), 1, 2
    for kind in pair.kinds:
        new = pair.matrices(1, 40)
        leaf, exact = new.clone().requires_grad_(), new.double().requires_grad_()
        loss = loss_of(pair.run(tokens, layer, {f"{kind}.{head}": replace(20, leaf[:, 20])}))
        with standing_in(pair.reference, pair.folder, layer, pair.setting(kind, exact, head, (0, 20))):
            expected = loss_of(pair.logits(tokens))
        found = torch.autograd.grad(loss, leaf)[0]
        assert_same_gradient(found, torch.autograd.grad(expected, exact)[0])


@once_per_architecture
def test_gradient_through_edits_that_depend_on_what_they_edit(pair: Pair):
    """Of the layer's output with respect to its input, with every matrix of a head halved."""
    hidden, layer, head = random(2, 30, pair.d_model), 0, 2
    mixer, everywhere = pair.model.mixers[layer], (slice(None), slice(None))
    truth = pair.oracle(layer)
    for kind in pair.kinds:
        leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        with pair.model.hooks(fwd_hooks=[(pair.point(layer, f"{kind}.{head}"), lambda x, hook: x / 2)]):
            out = mixer(leaf)
        out = out[0] if isinstance(out, tuple) else out
        halved = getattr(truth(exact), f"{kind}s")[:, :, head] / 2
        expected = truth(exact, edits=pair.setting(kind, halved, head, everywhere)).output
        assert_close(out, expected)
        (gradient,) = torch.autograd.grad(loss_of(expected), exact)
        assert_same_gradient(torch.autograd.grad(loss_of(out), leaf)[0], gradient)


@pytest.mark.parametrize(("name", "field"), [*FIELDS, ("decay", "decay")])
def test_gradient_with_respect_to_factors(pair: Pair, name: str, field: str):
    """Through an erase that stays native, but for a decay that is a factor of it."""
    tokens, layer = some_tokens(2, 30), 0
    seen: list[Tensor] = []
    shift = add_leaf(seen)
    loss = loss_of(pair.run(tokens, layer, {name: lambda x, hook: shift(x)}))
    (found,) = torch.autograd.grad(loss, seen)
    expected = expected_gradient(pair, tokens, layer, field)
    if name == "decay":  # a float32 cannot hold much of d loss / d alpha at an alpha of e^-30: compare d log
        decay = pair.truth(tokens, layer)[1].decay
        found, expected = found * decay, expected * decay
    assert_same_gradient(found, expected)


def test_backward_hooks_see_the_gradient(pair: Pair):
    tokens, layer, head = some_tokens(2, 20), 1, 1
    expected = expected_gradient(pair, tokens, layer, "writes")[:, :, head]
    seen: list[Tensor] = []

    def watch(grad: Tensor, hook: Any) -> None:
        seen.append(grad)

    with pair.model.hooks(bwd_hooks=[(pair.point(layer, f"write.{head}"), watch)]):
        loss_of(pair.model(tokens)).backward()
    pair.model.zero_grad()
    assert len(seen) == 1
    assert_same_gradient(pair.unflatten(seen[0]), expected)


def test_cached_gradients(pair: Pair):
    tokens, name = some_tokens(1, 9), pair.point(1, "write.0")
    loss, cache = pair.model.run_with_cache(
        tokens, names_filter=[name, pair.point(1, "state.0")], incl_bwd=True, return_type="loss"
    )
    pair.model.zero_grad()

    def loss_of_next_token(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])

    assert_close(loss, loss_of_next_token(pair.logits(tokens)))
    gradient = expected_gradient(pair, tokens, 1, "writes", loss_of_next_token)
    assert_same_gradient(pair.unflatten(cache[f"{name}_grad"]), gradient[:, :, 0])


@once_per_architecture
def test_gradient_of_hooked_matrices_with_respect_to_a_hooked_write(pair: Pair):
    """Both only read: a state moves with its token's write one to one, an erase with those before."""
    tokens, layer, head = some_tokens(1, 8), 1, 2
    shift: list[Tensor] = []
    with standing_in(pair.reference, pair.folder, layer, Edits(writes=add_leaf(shift))) as traces:
        pair.logits(tokens)
    for kind in pair.kinds[1:]:
        seen: list[Tensor] = []
        names = [f"{name}.{head}" for name in ("write", kind)]
        pair.run(tokens, layer, dict.fromkeys(names, lambda x, hook, seen=seen: seen.append(x)))
        ends = seen[1][:, -1], traces[0].hook(names[1])[:, -1]
        found, expected = (
            torch.autograd.grad(loss_of(end), leaf, retain_graph=True)[0]
            for end, leaf in zip(ends, (seen[0], shift[0]))
        )
        assert_same_gradient(pair.unflatten(found), expected[:, :, head])


@pytest.fixture
def forgetful(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """One head of each layer decays by more than a float32 can say: exp(g) is 0 (RWKV-7 has a limit)."""
    layers = [pair.reference.get_submodule(pair.oracle(layer).name) for layer in pair.layers]
    layers += [pair.model.mixers[layer].original_component for layer in pair.layers]
    for layer, name in itertools.product(layers, ("A_log", "dt_bias")):
        if hasattr(layer, name):
            gates = getattr(layer, name).data.clone()
            gates[3] = 5.0
            monkeypatch.setattr(getattr(layer, name), "data", gates)
    return pair


SCALED_DECAYS = [(name, factor) for name in ("gdn", "mamba2") for factor in (None, 1.0, 0.0)]


@pytest.mark.parametrize(("pair", "factor"), [*SCALED_DECAYS, ("rwkv7", 0.0)], indirect=["pair"])
def test_gradients_where_the_decay_is_zero(forgetful: Pair, factor: float | None):
    """Read, scaled by 1, and set to 0 by a hook: exp(g) = 0 has no logarithm, but no gradient is NaN."""
    tokens = some_tokens(1, 12)
    decays: list[Tensor] = []

    def hook(x: Tensor, hook: Any) -> Tensor | None:
        decays.append(x.detach())
        return None if factor is None else x * factor

    forgetful.model.zero_grad()
    logits, stock = forgetful.run(tokens, 1, {"decay": hook}), forgetful.logits(tokens)
    if factor != 0:
        assert (decays[0][:, :, 3] == 0).all()
        assert_close(logits, stock)
    loss_of(stock).backward()
    assert all(x.grad.isfinite().all() for x in forgetful.reference.parameters())
    forgetful.reference.zero_grad()
    loss_of(logits).backward()
    gradients = [(name, x.grad) for name, x in forgetful.model.original_model.named_parameters()]
    bad = [name for name, x in gradients if x is not None and not x.isfinite().all()]
    forgetful.model.zero_grad()
    assert not bad


@once_per_architecture
@pytest.mark.parametrize(
    "wanted",  # nothing, some kinds, all of one head, factors, everything
    [r"^$", r"write\.", r"erase\.[13]", r"state\.[03]", r"\.1", r"^(?!in|out)[^.]*$", r""],
)
def test_reading_leaves_the_parameters_gradients(pair: Pair, wanted: str):
    names = [name for name in pair.shapes if re.search(wanted, name)]
    tokens = some_tokens(2, 67)
    pair.reference.zero_grad()
    loss_of(pair.logits(tokens)).backward()
    expected = {name: x.grad for name, x in pair.reference.named_parameters()}
    hooks = [(pair.point(layer, name), nothing) for layer in pair.layers for name in names]
    pair.model.zero_grad()
    loss_of(pair.model.run_with_hooks(tokens, fwd_hooks=hooks)).backward()
    parameters = pair.model.original_model.named_parameters()
    found = {name.replace("._original_component", ""): x.grad for name, x in parameters}
    pair.model.zero_grad()
    pair.reference.zero_grad()
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
    length = 40 if pair.decay_per_channel else 48  # where factors and weights are smaller than matrices
    one_head, all_heads = length * pair.d_k * pair.d_v, length * pair.d_k * pair.d_v * pair.heads

    def largest(*names: str) -> int:
        with torch.set_grad_enabled(grad), LargestTensors() as seen:
            pair.run(some_tokens(1, length), 1, dict.fromkeys(names, nothing))
        return seen.numel

    assert largest() < one_head
    assert largest(*FACTORS) < one_head
    for kind in pair.kinds:
        assert one_head <= largest(f"{kind}.2") < all_heads


# Low precision.


@torch.no_grad()
def test_bfloat16(pair: Pair):
    """No further from float32 than transformers in bfloat16; the recurrence's hooks come in float32."""
    tokens = some_tokens(2, 65)
    exact = pair.logits(tokens)
    model = HookedRecurrent.boot_transformers(str(pair.folder), device="cpu", dtype="bfloat16")
    stock = type(pair.reference).from_pretrained(
        pair.folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    logits, cache = model.run_with_cache(tokens, names_filter=[pair.point(1, name) for name in pair.shapes])

    def error(x: Tensor) -> float:
        return float((x.float() - exact).abs().mean())

    native = stock(tokens, use_cache=False).logits
    assert logits.dtype == native.dtype  # transformers' Mamba-2 gives float32
    assert error(logits) < 1.5 * error(native)
    for name in pair.shapes:
        inside = name not in ("in", "head_out", "out")
        assert cache[pair.point(1, name)].dtype == (torch.float32 if inside else torch.bfloat16)
    new = pair.matrices(1)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(pair.point(1, "write.2"), replace(20, new))])
    truth, _ = pair.truth(tokens, 1, Edits(writes=at(20, 2, new.double())))
    change = (truth - exact)[:, 20:].float()
    off = (edited - logits).float()[:, 20:] - change
    assert float(off.abs().mean()) < 0.5 * float(change.abs().mean())


@torch.no_grad()
def test_autocast(pair: Pair):
    """Projections in bfloat16, the recurrence in float32, and nothing fails."""
    tokens, names = some_tokens(2, 65), [pair.point(1, "state.0"), pair.point(1, "write.0")]
    exact = pair.logits(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = pair.logits(tokens)
        logits, cache = pair.model.run_with_cache(tokens, names_filter=names)
    assert {cache[name].dtype for name in names} == {torch.float32}
    assert (logits - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()
