"""The checks that every model class passes. Each returns its error, as a share of what it is measured on.

Logits are compared in shares of their spread (the largest less the smallest number of all), activations in
shares of theirs, gradients in shares of the largest one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_models.unembedding import logits_of, run_to_residual
from tests.hooked_models.architectures import greedy, random
from tests.hooked_models.model_classes.case import Case
from tests.hooked_models.oracles import Edits, at

TOLERANCE = 1e-4
LENGTH = 21  # of passages; not a multiple of anything
LONG = 75  # more than a chunk of the engine


def share(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the spread of what is expected."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert bool(torch.isfinite(found).all())
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / (expected.max() - expected.min()).clamp(min=1e-30))


@torch.no_grad()
def logits(case: Case) -> float:
    """A full pass, shorter and longer than a chunk, against the reference."""
    both = (case.tokens(2, LENGTH), case.tokens(1, LONG, seed=1))
    return max(share(case.model(x, use_cache=False), case.logits(x)) for x in both)


@torch.no_grad()
def padding(case: Case) -> float:
    """Rows of a left-padded batch, read at once and then on with a cache, against each row alone."""
    tokens = case.tokens(3, LENGTH, seed=2)
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :13] = 0, 0
    together, more = case.model(tokens, attention_mask=mask, use_cache=False), case.tokens(3, 4, seed=3)
    cache = case.model.new_cache()
    case.model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    later = case.model(more, past_key_values=cache, use_cache=True)
    errors = []
    for row, first in enumerate((0, 5, 13)):
        alone = case.logits(torch.cat([tokens[row : row + 1, first:], more[row : row + 1]], 1))[0]
        errors.append(share(torch.cat([together[row, first:], later[row]]), alone))
    return max(errors)


@torch.no_grad()
def decoding(case: Case) -> float:
    """Token by token, and in pieces, with a cache, against the reference's full pass."""
    tokens = case.tokens(2, LENGTH, seed=4)
    expected, errors = case.logits(tokens), []
    for pieces in ((1,) * LENGTH, (7, 1, 1, 8, 4)):
        cache = case.model.new_cache()
        found = [
            case.model(part, past_key_values=cache, use_cache=True) for part in tokens.split(list(pieces), 1)
        ]
        errors.append(share(torch.cat(found, 1), expected))
    return max(errors)


@torch.no_grad()
def generation(case: Case) -> float:
    """The share of tokens of a greedy `generate` that differ from argmax after argmax of full passes."""
    prompt = case.tokens(1, 9, seed=5)
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, case.logits(expected)[:, -1:].argmax(-1)], 1)
    found = greedy(case.model, prompt, 8)
    assert found.shape == expected.shape
    return float((found != expected).double().mean())


HOOKS = ("write_key", "write_value", "read", "decay", "recurrence_out", "head_out", "out")


@torch.no_grad()
def activations(case: Case) -> float:
    """Every hook of every recurrent layer, against the float64 loop on the reference's own input."""
    tokens, errors = case.tokens(2, LENGTH, seed=6), []
    heads = case.of.cells[0]
    kinds = case.model.mixers[case.of.layers[0]].per_head_hooks
    for layer in case.of.layers:
        trace = case.trace(tokens, layer)
        names = [*HOOKS, *(f"{kind}.{head}" for kind in kinds for head in range(heads))]
        points = {name: case.model.hook_name(layer, *_split(name)) for name in names}
        _, cache = case.model.run_with_cache(tokens, names_filter=list(points.values()), use_cache=False)
        errors += [share(cache[point], trace.hook(name)) for name, point in points.items()]
    return max(errors)


def _split(name: str) -> tuple[str] | tuple[str, int]:
    kind, _, head = name.partition(".")
    return (kind, int(head)) if head else (kind,)


@torch.no_grad()
def edits(case: Case) -> float:
    """Writes, states and decays that hooks edit, against the loop with the same edits in the reference."""
    tokens, errors = case.tokens(2, LENGTH, seed=7), []
    heads, d_k, d_v = case.of.cells
    head, layer, new = heads - 1, case.of.layers[0], random(2, 2, d_k, d_v, seed=8)
    model, where = case.model, [4, 11]
    native = case.logits(tokens)

    def set_write(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, where] = new.flatten(-2)
        return x

    values = torch.zeros(2, LENGTH, heads, d_k, d_v, dtype=torch.float64)
    is_set = torch.zeros(2, LENGTH, heads, dtype=torch.bool)
    values[:, where, head], is_set[:, where, head] = new.double(), True
    by_name: list[tuple[str, Callable[..., Tensor], Edits]] = [
        ("write", set_write, Edits(writes=at(where, head, new))),
        ("state", set_write, Edits(states=(values, is_set))),
        ("decay", lambda x, hook: 0.5 * x, Edits(decay=lambda x: 0.5 * x)),
        ("write_value", lambda x, hook: -2 * x, Edits(values=lambda x: -2 * x)),
        ("head_out", lambda x, hook: -2 * x, Edits(head_out=lambda x: -2 * x)),
    ]
    if model.mixers[layer].erases:
        by_name.append(("erase", set_write, Edits(erases=(values, is_set))))
    for name, hook, edit in by_name:
        of_head = (head,) if name in ("write", "state", "erase") else ()
        point = model.hook_name(layer, name, *of_head)
        found = model.run_with_hooks(tokens, fwd_hooks=[(point, hook)], use_cache=False)
        with case.standing_in(layer, edit):
            expected = case.logits(tokens)
        assert share(expected, native) > 100 * TOLERANCE, f"the edit of {name} changes nothing"
        errors.append(share(found, expected))
    return max(errors)


@torch.no_grad()
def swapped_writes(case: Case) -> float:
    """Many writes swapped in one run, against a full pass of the reference for each."""
    tokens, positions = case.tokens(14, seed=9), torch.tensor([3, 0, 3, 13])
    heads, d_k, d_v = case.of.cells
    layer, head = case.of.layers[-1], heads - 1
    keys, values = random(4, 1, d_k, seed=10), random(4, 1, d_v, seed=11)
    _, found = case.model.run_with_swapped_writes(tokens, layer, head, positions, keys, values)
    expected = []
    for position, key, value in zip(positions.tolist(), keys, values, strict=True):
        edit = Edits(writes=at(position, head, torch.einsum("rk,rv->kv", key, value)))
        with case.standing_in(layer, edit):
            expected.append(case.logits(tokens[None])[0, position])
    native = case.logits(tokens[None])[0, positions]
    assert share(torch.stack(expected), native) > 100 * TOLERANCE, "the swapped writes change nothing"
    return share(found, torch.stack(expected))


@torch.no_grad()
def added_writes(case: Case) -> float:
    """Writes added at positions, each in a full pass of the reference."""
    tokens, positions = case.tokens(14, seed=12), torch.tensor([2, 9])
    _, d_k, d_v = case.of.cells
    layer, head = case.of.layers[0], 0
    keys, values = random(2, d_k, seed=13), random(2, d_v, seed=14)
    found = case.model.run_with_added_writes(tokens, layer, head, positions, keys, values)
    expected = []
    for position, key, value in zip(positions.tolist(), keys, values, strict=True):
        added = torch.outer(key, value)
        edit = Edits(writes=at(position, head, lambda x, added=added: x + added))
        with case.standing_in(layer, edit):
            expected.append(case.logits(tokens[None])[0])
    return share(found, torch.stack(expected))


def formula(case: Case) -> float:
    """The exact first-order change by an added write, against the derivative of the reference's full pass.

    The change of the layer's output is finite; what comes after the layer is linearised.
    """
    tokens, position = case.tokens(14, seed=16), 5
    _, d_k, d_v = case.of.cells
    layer, head = case.of.layers[0], 0
    key, value = random(1, d_k, seed=17), random(1, d_v, seed=18)
    found = case.model.run_with_added_writes(
        tokens, layer, head, torch.tensor([position]), key, value, linear=True
    )[0]
    assert float(found.abs().max()) > 0
    added = torch.outer(key[0], value[0])
    size = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with (
        torch.enable_grad(),
        case.growing(layer, Edits(writes=at(position, head, lambda x: x + added)), size),
    ):
        logits, errors = case.logits(tokens[None])[0], []
        for seed in range(3):
            weights = random(*found.shape, seed=seed)
            (expected,) = torch.autograd.grad((logits * weights).sum(), size, retain_graph=True)
            terms = (found * weights).double()
            # The sum of n terms of either sign has their norm as its scale.
            errors.append(abs(float(terms.sum() - expected)) / float(terms.norm()))
    return max(errors)


@torch.no_grad()
def unembedded(case: Case) -> float:
    """Logits from the last residual stream, as all experiments make them, against the reference's."""
    tokens = case.tokens(2, LENGTH, seed=20)
    residual = run_to_residual(case.model, tokens, use_cache=False)
    return share(logits_of(case.model, residual), case.logits(tokens))


def gradients(case: Case) -> float:
    """Of the loss, by every parameter of a recurrent layer and by the embedding, against the reference."""
    tokens = case.tokens(2, LENGTH, seed=15)
    found, expected = ([], [])
    for model, run, into in (
        (case.model.original_model, lambda: case.model(tokens, use_cache=False), found),
        (case.reference, lambda: case.logits(tokens), expected),
    ):
        names = _parameters(case)
        parameters = [_parameter(model, name) for name in names]
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            out = run()
            loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            into += torch.autograd.grad(loss, parameters, allow_unused=True)
    errors = []
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            errors.append(float((one - other).abs().max() / other.abs().max().clamp(min=1e-8)))
    assert errors
    return max(errors)


def _parameters(case: Case) -> list[str]:
    names = [f"{case.oracle(n).name}." for n in case.of.layers]
    return [n for n, _ in case.reference.named_parameters() if n.startswith(tuple(names)) or "embed" in n]


def _parameter(model: Any, name: str) -> Any:
    """A parameter of a model by its name in the reference; bridge components stand between modules."""
    by_name = {
        n.replace("_original_component.", "").replace("original_component.", ""): p
        for n, p in model.named_parameters()
    }
    return by_name[name]


CHECKS: dict[str, Callable[[Case], float]] = {
    "logits": logits,
    "padding": padding,
    "decoding": decoding,
    "generate": generation,
    "activations": activations,
    "edited": edits,
    "swapped": swapped_writes,
    "added": added_writes,
    "formula": formula,
    "unembedded": unembedded,
    "gradients": gradients,
}
