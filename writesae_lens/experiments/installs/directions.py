"""The writes that raise a target most: by the gradient through all cells that are written at, jointly."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, token_logits
from writesae_lens.experiments.decoding import Prefix
from writesae_lens.experiments.installs.fluency import LOGITS_AT_ONCE
from writesae_lens.experiments.installs.writes import Matrices, Sides, Sizes, of_norm
from writesae_lens.experiments.passes import check_finite

# Adam's learning rate; the factors have norm 1.
_STEP = 0.1


class Climb:
    """Some rows, each with a target, and how far writes raise it above the other tokens.

    A token's margin at a step is its logit minus that of the likeliest other token. A row's score sums, over
    the coming steps along a continuation, the exponentials of the target's margin (and takes the log). With
    ``keeps_path``, the margin at a step counts at most as much as those of the continuation's own tokens
    before it: greedy decoding says the target at that step if, and only if, all of these are positive.

    Args:
        model: the model.
        prefix: the prompts' cached tokens.
        cells: where writes are added.
        last: ``[prompt, pos]``: the tokens after the cached ones, which are written at.
        continuation: the tokens after them; the last one is not read.
        of: the prompt of each row: equally many rows for each prompt, prompt by prompt.
        targets: of each row.
        keeps_path: see above.
    """

    def __init__(
        self,
        model: HookedRecurrent,
        prefix: Prefix,
        cells: list[Cell],
        last: Int[Tensor, "prompt pos"],
        continuation: Int[Tensor, "prompt token"],
        of: Int[Tensor, " row"],
        targets: Int[Tensor, " row"],
        keeps_path: bool,
    ) -> None:
        self.model, self.prefix, self.cells, self.targets = model, prefix, cells, targets
        self.n_written, self.keeps_path = last.shape[1], keeps_path
        along = torch.cat([last, continuation[:, :-1]], dim=1)
        lower = prefix.lower_layers(along)
        self.lower = None if lower is None else lower.map(lambda x: x[of])
        self.along, self.coming = along[of], continuation[of]

    def score(self, added: Matrices) -> Float[Tensor, " row"]:
        """The scores with matrices added to the native writes."""
        n_coming = self.along.shape[1] - self.n_written
        whole = {
            cell: torch.cat([x, x.new_zeros(len(x), n_coming, *x.shape[2:])], dim=1)
            for cell, x in added.items()
        }
        residual = self.prefix.residual(self.along, whole, self.lower)[:, self.n_written - 1 :]
        own = margins(self.model, residual, self.targets[:, None].expand(-1, n_coming + 1))
        if self.keeps_path and n_coming:
            path = margins(self.model, residual[:, :-1], self.coming[:, :-1]).cummin(dim=1).values
            own = torch.cat([own[:, :1], torch.minimum(own[:, 1:], path)], dim=1)
        return own.logsumexp(-1)

    def steepest(self) -> tuple[Sides, Sizes]:
        """The leading pairs of the gradients of the scores by the writes, and their singular values."""
        shape = len(self.along), self.n_written
        with torch.enable_grad():
            nothing = {
                cell: torch.zeros(*shape, cell.d_k, cell.d_v, device=self.along.device, requires_grad=True)
                for cell in self.cells
            }
            gradients = torch.autograd.grad(self.score(nothing).sum(), list(nothing.values()))
        check_finite("gradients of the logits", *gradients)
        sides: Sides = {}
        slopes: Sizes = {}
        for cell, gradient in zip(self.cells, gradients, strict=True):
            left, values, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            sides[cell], slopes[cell] = (left[..., 0], right[..., 0, :]), values[..., 0]
        return sides, slopes

    def climbed(self, start: Sides, sizes: Sizes, n_steps: int) -> Sides:
        """Sides after steps of Adam on those of all cells at once; each row keeps those of its best step."""
        factors = [factor.clone().requires_grad_() for pair in start.values() for factor in pair]
        optimizer = torch.optim.Adam(factors, lr=_STEP)
        best = [factor.detach().clone() for factor in factors]
        reached = torch.full((len(self.targets),), -float("inf"), device=self.targets.device)
        for turn in range(n_steps + 1 if n_steps else 0):
            with torch.enable_grad():
                found = self.score(of_norm(_paired(start, factors), sizes))
            better = found.detach() > reached
            for kept, factor in zip(best, factors, strict=True):
                kept[better] = factor.detach()[better]
            reached[better] = found.detach()[better]
            if turn < n_steps:
                optimizer.zero_grad()
                (-found.sum()).backward(inputs=factors)
                optimizer.step()
        return _paired(start, best)


def _paired(cells: Sides, factors: list[Tensor]) -> Sides:
    return dict(zip(cells, zip(factors[::2], factors[1::2], strict=True), strict=True))


def most_read(slopes: Sizes, sizes: Sizes, counts: Int[Tensor, " row"]) -> dict[Cell, Bool[Tensor, " row"]]:
    """The cells in which each row writes: as many as it may, those that move its target most, to first order.

    Args:
        slopes: the largest rise of the score by a matrix of norm 1 in each cell and position.
        sizes: the norms of what is written there.
        counts: how many cells each row writes in.
    """
    gains = torch.stack([(slopes[cell] * sizes[cell]).sum(-1) for cell in slopes], dim=-1)
    places = gains.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return dict(zip(slopes, (places < counts[:, None]).unbind(-1), strict=True))


def margins(
    model: HookedRecurrent,
    residual: Float[Tensor, "row pos d_model"],
    tokens: Int[Tensor, "row pos"],
) -> Float[Tensor, "row pos"]:
    """By how much each token is above the likeliest other one, in logits.

    Which token that is takes all logits, in cuts of positions; the gradient is that of two logits.
    """
    others = []
    with torch.no_grad():
        step = max(1, LOGITS_AT_ONCE // model.cfg.d_vocab)
        for rows, own in zip(residual.flatten(0, 1).split(step), tokens.flatten().split(step), strict=True):
            logits = logits_of(model, rows).scatter_(1, own[:, None], -float("inf"))
            others.append(logits.argmax(-1))
    both = torch.stack([tokens, torch.cat(others).view_as(tokens)], dim=-1)
    own, other = token_logits(model, residual[:, :, None].expand(*both.shape, -1), both).float().unbind(-1)
    return own - other
