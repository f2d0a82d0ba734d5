"""Generation install (paper, experiment 7): write a token into the memory, and see whether it is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor, nn

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, token_logits
from writesae_lens import statistics
from writesae_lens.divergences import wide
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.decoding import Prefix, batches
from writesae_lens.experiments.options import Count, Natural, NotNegative, Positive, Seed, as_list
from writesae_lens.experiments.passages import find_passages, token_id
from writesae_lens.experiments.passes import (
    check_finite,
    native_writes,
    unembedding_directions,
)
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator, seed_of
from writesae_lens.experiments.subjects import find_cell
from writesae_lens.figures import ATOM, DELETE, RANDOM, new_figure

# Adam's learning rate; the factors have norm 1.
_STEP = 0.1
# Logits that are in memory at once where the likeliest token is looked for.
_LOGITS_AT_ONCE = 2**25
# Native ranks at the first step, from 1: the paper's strata.
STRATA = {
    "frequent": (2, 100),
    "rank_100_1000": (100, 1000),
    "rare": (1000, None),
    "out_of_context": (None, None),  # the less likely half of the vocabulary, but not in the prompt
}


@experiment(
    "install",
    paper=7,
    question="Can a token be installed by writing it into the memory?",
    row="an edit: one prompt, target and magnitude",
    table=("target_in_continuation", "native_target_in_continuation", "mean_lift", "mean_control_lift"),
    max_passages=16,
    context_size=64,
)
def install_tokens(
    model: HookedRecurrent,
    sae_or_cell: SAE[Any] | Cell | tuple[int, int],
    prompts: Int[Tensor, "passage pos"] | str,
    targets: Sequence[int | str] | int | str | None = None,
    magnitude: Positive | Sequence[Positive] = 3.0,
    positions: Count = 3,
    direction: Literal["jacobian", "unembedding"] = "jacobian",
    n_refinements: Natural = 20,
    n_tokens: Count = 20,
    temperature: NotNegative = 0.0,
    context_size: Count | None = None,
    seed: Seed = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add a token's direction to a head's writes at a prompt's last positions, and decode: is the token said?

    At each of the last ``positions`` of the prompt a rank-1 matrix with ``magnitude`` times the norm of the
    native write there is added to that write; everything else is native. Directions:

    - ``unembedding`` (the paper's): key side that of the native write, value side W_O[head] W_U[target].
    - ``jacobian``: the rank-1 matrix of that norm that raises the target's logit most above the others: by
      the gradient of its margin over the likeliest other token (the log of the sum of its exponentials over
      the coming ``n_tokens`` steps, along the native continuation), through the true model: decay, erase,
      every coming read, norm, gate and all later layers. It starts as the gradient's leading singular pair at
      the native writes; as the head's norm bends the response long before three write norms,
      ``n_refinements`` steps of Adam on both factors follow, and the best step is kept.

    Each edit has a control, a Gaussian rank-1 write of the same norm.

    Args:
        model: the model.
        sae_or_cell: a cell, (layer, head), or an SAE on one; only the cell counts.
        prompts: ``[prompt, pos]``, or a text to cut into prompts.
        targets: ids, or texts of one token each; each is tried with every prompt (None: one drawn at random
            in each stratum of native ranks at the first step: 2 to 99, 100 to 999, from 1,000, and tokens
            of the less likely half that are not in the prompt; strata that the vocabulary has not are
            left out).
        magnitude: norm of the added matrix, in units of the native write there; several are tried one by one.
        positions: number of the prompt's last positions that are written to.
        direction: which matrix is added.
        n_refinements: Adam steps of ``jacobian``; 0 takes the gradient at the native writes as it is.
        n_tokens: number of tokens to decode.
        temperature: 0 is greedy, else tokens are drawn, with the same random numbers for every edit.
        context_size: length of a prompt where ``prompts`` is text (None: as in the SAE's training, else 256).
        seed: seed of targets, controls and draws.
        progress_folder: folder that keeps finished prompts, so that the same call resumes.
        verbose: show a progress bar.

    Returns:
        a result. ``records`` has one row per edit: prompt, target, stratum, magnitude, native_rank, rank
        (at the first step, from 1), rank_shift (how many ranks it rose), lift (of the first step's
        log-probability, nats), in_continuation, native_in_continuation, control_in_continuation,
        control_lift, continuation and native_continuation (token ids, as JSON). ``summary`` has
        target_in_continuation with a 95% interval (bootstrap over prompts), native_target_in_continuation,
        control_target_in_continuation, median_rank_shift, mean_lift, mean_control_lift, n_already_first (the
        edits whose target comes first natively, and so has nothing to gain there), first_token (how often the
        target comes first, of the other edits; None where there are none), and all of these by_stratum and
        by_magnitude.

    Raises:
        WriteSAEError: a target is not one token, prompts are not longer than ``positions``, or logits are not
            finite.
        HookedModelError: there is no such cell.
    """
    magnitudes = tuple(np.ravel(magnitude).tolist())
    targets = [targets] if isinstance(targets, (int, str)) else targets
    cell = find_cell(model, sae_or_cell)
    passages = find_passages(model, sae_or_cell, prompts, context_size)
    if passages.shape[1] <= positions:
        raise WriteSAEError(
            f"prompts of {passages.shape[1]} tokens are too short to write at their last {positions}: give "
            "longer ones, or fewer positions"
        )
    wanted = None if targets is None else [token_id(model, t) for t in as_list("targets", targets)]
    if wanted == []:
        raise WriteSAEError("there are no targets: give some, or None to draw them")
    run = Run("install", model, cell, passages, locals(), targets=wanted, magnitude=list(magnitudes))

    n_rows = (len(STRATA) if wanted is None else len(wanted)) * len(magnitudes)
    groups = batches(len(passages), n_rows * (positions + n_tokens) * model.cfg.d_vocab)

    def install(n: int) -> pd.DataFrame:
        group = _Prompts(model, cell, passages[groups[n]], positions, n_tokens, temperature, seed_of(seed, n))
        if wanted is None:
            names, chosen = group.draw_targets(generator(seed, n, 1))
        else:
            names, chosen = ["given"] * len(wanted), torch.tensor([wanted] * len(group.tokens))
        refine = n_refinements if direction == "jacobian" else None
        frame = group.install(chosen, names, magnitudes, refine, generator(seed, n))
        return frame.assign(prompt=np.arange(len(passages))[groups[n]][frame.prompt])

    records = run.records(range(len(groups)), install, "Installing", unit="batch")
    summary: dict[str, Any] = {**_summarize(records, seed), "n_prompts": len(passages)}
    interval = statistics.between(summary["target_in_continuation_ci"], ".1%")
    headline = (
        f"target in continuation {summary['target_in_continuation']:.1%}{interval}, natively "
        f"{summary['native_target_in_continuation']:.1%}, with random writes "
        f"{summary['control_target_in_continuation']:.1%}, {len(records)} installs"
    )
    return run.result(records, summary, headline)


class _Prompts:
    """Some prompts: their native continuations, and installs that share their cached prefixes."""

    def __init__(
        self,
        model: HookedRecurrent,
        cell: Cell,
        tokens: Int[Tensor, "prompt pos"],
        positions: int,
        n_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.model, self.cell, self.tokens = model, cell, tokens
        self.last, self.n_tokens = tokens[:, -positions:], n_tokens
        self.prefix = Prefix(model, cell, tokens[:, :-positions])
        self.how = {"n_tokens": n_tokens, "temperature": temperature, "seed": seed}
        writes = [native_writes(model, cell, prompt) for prompt in tokens]
        self.key, value = (torch.stack(x)[:, -positions:].float() for x in zip(*writes, strict=True))
        self.norm = self.key.norm(dim=-1) * value.norm(dim=-1)
        with torch.no_grad():
            logits, cache = self.prefix.run(self.last)
            self.logits = wide(logits)
            self.said = self.prefix.decode(logits, cache, **self.how)

    def draw_targets(self, rng: torch.Generator) -> tuple[list[str], Int[Tensor, "prompt target"]]:
        """One token of each stratum that the vocabulary has, for every prompt."""
        drawn: dict[str, list[int]] = {}
        for prompt, row in zip(self.tokens.tolist(), self.logits, strict=True):
            order = row.argsort(descending=True).tolist()
            unseen = set(range(len(order))) - set(prompt)
            for name, (low, high) in STRATA.items():
                if low is None:
                    pool = [t for t in order[len(order) // 2 :] if t in unseen]
                else:
                    pool = order[low - 1 : None if high is None else high - 1]
                if pool:
                    token = pool[int(torch.randint(0, len(pool), (), generator=rng))]
                    drawn.setdefault(name, []).append(token)
        return list(drawn), torch.tensor(list(drawn.values())).T

    def install(
        self,
        chosen: Int[Tensor, "prompt target"],
        names: list[str],
        magnitudes: tuple[float, ...],
        refine: int | None,
        rng: torch.Generator,
    ) -> pd.DataFrame:
        n_prompts, n_targets = chosen.shape
        n, device = n_targets * len(magnitudes), self.tokens.device  # edits of a prompt
        targets = chosen.to(device).repeat_interleave(len(magnitudes), dim=1).flatten()
        of = torch.arange(n_prompts, device=device).repeat_interleave(n)  # the prompt of each edit
        size = torch.tensor(magnitudes, device=device).repeat(n_prompts * n_targets)
        sizes = size[:, None] * self.norm[of]
        added = (
            self._unembedding(targets, of) if refine is None else self._jacobian(targets, of, sizes, refine)
        )
        shape = len(targets), self.last.shape[1]
        control = [torch.randn(*shape, d, generator=rng).to(device) for d in (self.cell.d_k, self.cell.d_v)]
        own, other = (self._decode(_of_norm(*x, sizes), of) for x in (added, (control[0], control[1])))
        native = self.logits[of], self.said[of]

        def log_p(first: Tensor) -> Tensor:
            return first.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

        def rank(first: Tensor) -> Tensor:
            return (first > first.gather(1, targets[:, None])).sum(-1) + 1

        def contains(said: Tensor) -> Tensor:
            return (said == targets[:, None]).any(-1)

        columns = {
            "prompt": of,
            "target": targets,
            "stratum": np.tile(np.repeat(names, len(magnitudes)), n_prompts),
            "magnitude": np.tile(magnitudes, n_prompts * n_targets),
            "native_rank": rank(native[0]),
            "rank": rank(own[0]),
            "rank_shift": rank(native[0]) - rank(own[0]),
            "lift": log_p(own[0]) - log_p(native[0]),
            "in_continuation": contains(own[1]),
            "native_in_continuation": contains(native[1]),
            "control_in_continuation": contains(other[1]),
            "control_lift": log_p(other[0]) - log_p(native[0]),
        }
        frame = pd.DataFrame({k: v.cpu().numpy() if torch.is_tensor(v) else v for k, v in columns.items()})
        texts = {"continuation": own[1], "native_continuation": native[1]}
        return frame.assign(
            **{name: [json.dumps(row) for row in said.tolist()] for name, said in texts.items()}
        )

    @torch.no_grad()
    def _decode(
        self, added: Float[Tensor, "row pos d_k d_v"], of: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_vocab"], Int[Tensor, "row token"]]:
        """First logits and continuation with what is added."""
        logits, cache = self.prefix.run(self.last[of], added)
        return wide(logits), self.prefix.decode(logits, cache, **self.how)

    def _unembedding(self, targets: Int[Tensor, " row"], of: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
        """The native keys, and the targets' rows of the unembedding as the head's output sees them."""
        values = unembedding_directions(self.model, self.cell, targets)
        return self.key[of], values[:, None].expand(-1, self.last.shape[1], -1)

    def _jacobian(
        self,
        targets: Int[Tensor, " row"],
        of: Int[Tensor, " row"],
        sizes: Float[Tensor, "row pos"],
        refine: int,
    ) -> tuple[Tensor, Tensor]:
        """Leading pairs of the gradient of the targets' margins by the writes."""
        native = torch.cat([self.last, self.said[:, :-1]], dim=1)
        along, lower, n_written = native[of], self.prefix.lower_layers(native), self.last.shape[1]
        lower = None if lower is None else lower.map(lambda x: x[of])
        sides = self.cell.d_k, self.cell.d_v
        coming = torch.zeros(len(of), along.shape[1] - n_written, *sides, device=of.device)

        def margin(added: Tensor) -> Float[Tensor, " row"]:
            residual = self.prefix.residual(along, torch.cat([added, coming], dim=1), lower)
            return _margins(self.model, residual[:, n_written - 1 :], targets).logsumexp(-1)

        with torch.enable_grad():
            nothing = torch.zeros(len(of), n_written, *sides, device=of.device, requires_grad=True)
            (gradient,) = torch.autograd.grad(margin(nothing).sum(), nothing)
        check_finite("gradients of the logits", gradient)
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        factors = [f.clone().requires_grad_() for f in (left[..., 0], right[..., 0, :])]
        optimizer = torch.optim.Adam(factors, lr=_STEP)
        best = [f.detach().clone() for f in factors]
        reached = torch.full((len(of),), -float("inf"), device=of.device)
        for turn in range(refine + 1 if refine else 0):
            with torch.enable_grad():
                found = margin(_of_norm(factors[0], factors[1], sizes))
            better = found.detach() > reached
            for kept, factor in zip(best, factors, strict=True):
                kept[better] = factor.detach()[better]
            reached[better] = found.detach()[better]
            if turn < refine:
                optimizer.zero_grad()
                (-found.sum()).backward(inputs=factors)
                optimizer.step()
        return best[0], best[1]


def _margins(
    model: HookedRecurrent, residual: Float[Tensor, "row pos d_model"], targets: Int[Tensor, " row"]
) -> Float[Tensor, "row pos"]:
    """By how much each row's target is above the likeliest other token, in logits.

    Which token that is takes all logits, in cuts of positions; the gradient is that of two logits.
    """
    places, others = targets[:, None].expand(residual.shape[:-1]), []
    with torch.no_grad():
        step = max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab)
        for rows, own in zip(residual.flatten(0, 1).split(step), places.flatten().split(step), strict=True):
            logits = logits_of(model, rows).scatter_(1, own[:, None], -float("inf"))
            others.append(logits.argmax(-1))
    both = torch.stack([places, torch.cat(others).view_as(places)], dim=-1)
    own, other = token_logits(model, residual[:, :, None].expand(*both.shape, -1), both).float().unbind(-1)
    return own - other


def _of_norm(
    keys: Float[Tensor, "row pos d_k"], values: Float[Tensor, "row pos d_v"], sizes: Float[Tensor, "row pos"]
) -> Float[Tensor, "row pos d_k d_v"]:
    unit = nn.functional.normalize(keys, dim=-1), nn.functional.normalize(values, dim=-1)
    return (unit[0] * sizes[..., None])[..., None] * unit[1][..., None, :]


def _summarize(records: pd.DataFrame, seed: int) -> dict[str, Any]:
    summary = _rates(records)
    said = statistics.cluster_bootstrap(records.in_continuation, records.prompt, seed)
    summary["target_in_continuation_ci"] = said
    summary["n_installs"] = len(records)
    for column in ("stratum", "magnitude"):
        found = records.groupby(column, sort=False)
        summary[f"by_{column}"] = {str(name): {"n": len(part), **_rates(part)} for name, part in found}
    return summary


def _rates(records: pd.DataFrame) -> dict[str, Any]:
    not_first = records.loc[records.native_rank > 1]
    return {
        "target_in_continuation": float(records.in_continuation.mean()),
        "native_target_in_continuation": float(records.native_in_continuation.mean()),
        "control_target_in_continuation": float(records.control_in_continuation.mean()),
        "n_already_first": len(records) - len(not_first),
        "first_token": statistics.rate(not_first["rank"] == 1),
        "median_rank_shift": float(records.rank_shift.median()),
        "mean_lift": float(records.lift.mean()),
        "mean_control_lift": float(records.control_lift.mean()),
    }


@figure("install")
def plot_install(result: ExperimentResult) -> Figure:
    """Target in the continuation by stratum and by magnitude, installed, native and with a random write."""
    summary = result.summary
    figure, axes = new_figure(10.0, 4.0, 2)
    bars = (("target", ATOM, summary["direction"]), ("control_target", RANDOM, "random write"),
            ("native_target", DELETE, "native"))  # fmt: skip
    for axis, column in zip(axes, ("stratum", "magnitude"), strict=True):
        groups = summary[f"by_{column}"]
        for shift, (name, color, label) in zip((-0.27, 0, 0.27), bars, strict=True):
            heights = [group[f"{name}_in_continuation"] for group in groups.values()]
            axis.bar(np.arange(len(groups)) + shift, heights, width=0.25, color=color, label=label)
        names = [name.replace("_", " ") if column == "stratum" else f"{float(name):g} x" for name in groups]
        axis.set_xticks(range(len(groups)), names)
        axis.set(ylim=(0, 1.05), xlim=(-0.6, max(len(names), 3) - 0.4))  # one group is no wall of color
        axis.set_title(f"By {column}", fontsize=11, loc="left")
    axes[0].set_ylabel(f"target in the next {summary['n_tokens']} tokens")
    axes[1].legend(frameon=False, fontsize=9)
    interval = statistics.between(summary["target_in_continuation_ci"], ".1%")
    said = f"Target said in {summary['target_in_continuation']:.1%} of {summary['n_installs']:,} installs"
    figure.suptitle(said + interval, fontsize=11, x=0.02, ha="left")
    return figure
