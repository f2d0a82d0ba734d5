"""Gradients of a logit difference with respect to what heads write into their memories.

The difference L = logit(target) - logit(alternative) is read at the last token. Writes are inputs of a linear
recurrence, so their gradients follow from those of its outputs o_t = S_t^T q_t by the same recurrence run
backwards, exactly::

    dL/dW_s = q_s (dL/do_s)^T + T_{s+1}^T dL/dW_{s+1}

`native` gives dL/do of every layer by one backward pass; `along_path` averages it between memories that are
deleted and native ones; `write_gradients` carries either to the writes of one head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hooked_models import HookedRecurrent
from hooked_models.recordings import record_recurrences
from hooked_models.recurrence import Recurrence, Trajectory
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.experiments.passes import check_finite
from writesae_lens.experiments.subjects import check_unhooked

# Tokens, over all rows, that one pass with gradients reads.
_TOKENS_AT_ONCE = 2**12


@dataclasses.dataclass(frozen=True)
class Question:
    """Why does the model prefer one token to another after a prompt?

    Args:
        tokens: the prompt up to the token after which the two are compared; no later one has a part in it.
        target, alternative: ids.
    """

    tokens: Int[Tensor, " pos"]
    target: int
    alternative: int

    def differences(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        """L of each row."""
        return logits[:, self.target] - logits[:, self.alternative]


class LayerMemory(NamedTuple):
    """A layer's memory in the native pass."""

    recurrence: Recurrence
    outputs: Float[Tensor, "pos head d_v"]
    """o_t = S_t^T q_t, before norm and gate."""
    by_outputs: Float[Tensor, "pos head d_v"]
    """dL/do_t."""


@contextmanager
def hooked(model: HookedRecurrent, hooks: Mapping[int, Mapping[str, Any]]) -> Iterator[None]:
    """Hooks by layer and short name while open; those of others are refused.

    Raises:
        HookedModelError: anything is hooked already.
    """
    check_unhooked(model)
    named = [(model.hook_name(layer, name), hook) for layer, of in hooks.items() for name, hook in of.items()]
    with model.hooks(fwd_hooks=named):
        yield


def last_logits(model: HookedRecurrent, rows: Int[Tensor, "row pos"]) -> Float[Tensor, "row d_vocab"]:
    """Logits after the last token of each row, in float32 at least, with gradients where they are on."""
    logits = logits_of(model, run_to_residual(model, rows, use_cache=False)[:, -1])
    check_finite("logits", logits)
    return logits


def native(
    model: HookedRecurrent, question: Question, layers: list[int]
) -> tuple[float, dict[int, LayerMemory]]:
    """L, and the memories of some layers with its gradients by their outputs: one pass each way."""
    outputs: dict[int, Tensor] = {}
    zeros: dict[int, Tensor] = {}

    def listen(layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            outputs[layer], zeros[layer] = x.detach(), torch.zeros_like(x, requires_grad=True)
            return x + zeros[layer]

        return hook

    hooks = {layer: {"recurrence_out": listen(layer)} for layer in layers}
    with hooked(model, hooks), record_recurrences([model.mixers[n] for n in layers]) as recorded:
        difference = question.differences(last_logits(model, question.tokens[None]))[0]
    grads = torch.autograd.grad(difference, [zeros[n] for n in layers])
    check_finite("gradients", *grads)
    memories = {
        n: LayerMemory(recorded[model.mixers[n]].map(Tensor.detach), outputs[n][0], grad[0])
        for n, grad in zip(layers, grads, strict=True)
    }
    return float(difference.detach()), memories


@torch.no_grad()
def write_gradients(
    recurrence: Recurrence, by_outputs: Float[Tensor, "row pos d_v"]
) -> Float[Tensor, "row pos d_k d_v"]:
    """dL/dW_s of one head for each row of dL/do: the recurrence backwards, with T^T for T.

    Args:
        recurrence: of one head, in one passage.
        by_outputs: dL/do_t, for one difference L or several.
    """
    rows = len(by_outputs)
    rec = recurrence.with_erase_vector().map(lambda x: x.expand(rows, *x.shape[1:]))

    def backwards(x: Tensor) -> Tensor:  # what belongs to s + 1, at s, from the last s to the first
        return functional.pad(x[:, 1:], (0, 0) * (x.ndim - 2) + (0, 1)).flip(1)

    reverse = Recurrence(
        q=torch.zeros_like(rec.q),
        g=backwards(rec.g),
        k=rec.q.flip(1),
        v=by_outputs.flip(1)[:, :, None],
        a=None if rec.b is None else backwards(rec.b),
        b=None if rec.a is None else backwards(rec.a),
    )
    return Trajectory(reverse).states()[:, :, 0].flip(1)


class _Heads(NamedTuple):
    """What deleting the memories of some heads of a layer changes within the layer, at its native input."""

    memory: Float[Tensor, "one pos head d_v"]
    """o_t; a leaf."""
    heads: Float[Tensor, "one pos head d_v"]
    """What W_O reads, as a function of ``memory`` alone."""
    change: Float[Tensor, "pos head d_v"]
    """That minus the same of deleted memories."""


def _deleted(x: Float[Tensor, "row pos head d_v"], heads: list[int]) -> Float[Tensor, "row pos head d_v"]:
    x = x.clone()
    x[:, :, heads] = 0
    return x


def _within_layers(
    model: HookedRecurrent, question: Question, heads: Mapping[int, list[int]]
) -> dict[int, _Heads]:
    """Each layer's `_Heads`, from a pass of two rows, native and deleted, with native input to all layers."""
    memory: dict[int, Tensor] = {}
    found: dict[int, _Heads] = {}

    def delete(layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            memory[layer] = x[:1].detach().requires_grad_()
            return torch.cat([memory[layer], _deleted(x[1:].detach(), heads[layer])])

        return hook

    def restore(layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            found[layer] = _Heads(memory[layer], x[:1], (x[:1] - x[1:])[0].detach())
            return x[:1].detach().repeat(2, 1, 1, 1)

        return hook

    hooks = {n: {"recurrence_out": delete(n), "head_out": restore(n)} for n in heads}
    with hooked(model, hooks):
        last_logits(model, question.tokens.expand(2, -1))
    return found


def between(
    model: HookedRecurrent,
    question: Question,
    heads: Mapping[int, list[int]],
    changes: Mapping[int, Tensor],
    shares: Float[Tensor, " row"],
    weights: Float[Tensor, " row"],
) -> tuple[Float[Tensor, " row"], dict[int, Float[Tensor, "pos head d_v"]]]:
    """L with given shares of the native contributions of some memories, and its weighted mean gradient.

    The memories are deleted, and a share of what the native ones add to the layer's heads is added instead.

    Args:
        heads: the heads whose memories are deleted, by layer.
        changes: what they add natively (`_Heads.change`); may be left out where all shares are 0.
        shares: 0: deleted, 1: native.
        weights: of each row's gradient; none is computed if all are 0.

    Returns:
        L of each row, and sum_row weight dL/d(contribution) of each layer.
    """
    added: dict[int, Tensor] = {}

    def delete(layer: int) -> Any:
        return lambda x, hook: _deleted(x, heads[layer])

    def add(layer: int, part: Tensor) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            share = part.to(x)[:, None, None, None]
            added[layer] = (share * changes[layer]).requires_grad_(bool(weights.any()))
            return x + added[layer]

        return hook

    differences, sums = [], {layer: torch.zeros_like(change) for layer, change in changes.items()}
    cut = max(1, _TOKENS_AT_ONCE // len(question.tokens))
    for part, weight in zip(shares.split(cut), weights.split(cut), strict=True):
        hooks = {n: {"recurrence_out": delete(n)} for n in heads}
        for n in changes:
            hooks[n]["head_out"] = add(n, part)
        with hooked(model, hooks), torch.set_grad_enabled(bool(weights.any())):
            rows = question.tokens.expand(len(part), -1)
            found = question.differences(last_logits(model, rows))
        if weights.any():
            grads = torch.autograd.grad((found * weight.to(found)).sum(), [added[n] for n in sums])
            check_finite("gradients", *grads)
            for layer, grad in zip(sums, grads, strict=True):
                sums[layer] += grad.sum(0)
        differences.append(found.detach())
    return torch.cat(differences), sums


def deleted_difference(model: HookedRecurrent, question: Question, heads: Mapping[int, list[int]]) -> float:
    """L with every write of some heads deleted."""
    none = torch.zeros(1)
    return float(between(model, question, heads, {}, none, none)[0])


def along_path(
    model: HookedRecurrent, question: Question, heads: Mapping[int, list[int]], steps: int
) -> dict[int, Float[Tensor, "pos head d_v"]]:
    """Gradients by outputs with which the native outputs of some heads account for L(native) - L(deleted).

    Path: the contributions of all the memories to their heads' outputs, all scaled together, from deleted to
    native (`between`); the gradient is its mean there, by Gauss-Legendre quadrature. A norm over a head makes
    the way from o_t to the contribution ignore the length of o_t, and its derivative misses nearly all that
    o_t contributes. What it misses is shared among the writes by their part of o_t, (c . o_t) / |o_t|^2, for
    which the norm's scale is held at its native value.

    Returns:
        for each layer x_t with sum_t <x_t, o_t> over its heads = its part of the path's integral.
    """
    within = _within_layers(model, question, heads)
    nodes, weights = (torch.as_tensor(x) / 2 for x in np.polynomial.legendre.leggauss(steps))
    changes = {layer: of.change for layer, of in within.items()}
    _, mean = between(model, question, heads, changes, nodes + 0.5, weights)
    found = {}
    for layer, of in within.items():
        (linear,) = torch.autograd.grad(of.heads, of.memory, mean[layer][None])
        found[layer] = _completed(linear[0], of.memory[0].detach(), mean[layer] * of.change, heads[layer])
    return found


def _completed(
    linear: Float[Tensor, "pos head d_v"],
    outputs: Float[Tensor, "pos head d_v"],
    contributed: Float[Tensor, "pos head d_v"],
    heads: list[int],
) -> Float[Tensor, "pos head d_v"]:
    """The gradients ``linear``, with multiples of the outputs added so that they sum to what is contributed.

    What heads without a deleted memory contribute (through a norm that they share with one) is divided among
    those with one by the squared length of their outputs.
    """
    lengths = outputs.square().sum(-1)  # [pos, head]
    length, by_head = lengths[:, heads], contributed.to(outputs).sum(-1)
    of_others = by_head.sum(-1, keepdim=True) - by_head[:, heads].sum(-1, keepdim=True)
    tiny = torch.finfo(outputs.dtype).tiny
    wanted = by_head[:, heads] + of_others * length / length.sum(-1, keepdim=True).clamp(min=tiny)
    missed = wanted - (linear * outputs).sum(-1)[:, heads]
    completed = linear.clone()
    completed[:, heads] += (missed / length.clamp(min=tiny))[..., None] * outputs[:, heads]
    return completed
