"""Generation install (paper, experiment 7): write a token into the memory, and see whether it is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor, nn

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.decoding import Prefix
from writesae_lens.experiments.inputs import (
    check_at_least,
    check_choice,
    check_positive,
    find_cell,
    find_passages,
    native_writes,
    token_id,
)
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.figures import plot_install

# Native ranks at the first step, from 1: the paper's strata.
STRATA = {
    "frequent": (2, 100),
    "rank_100_1000": (100, 1000),
    "rare": (1000, None),
    "out_of_context": (None, None),  # the less likely half of the vocabulary, but not in the prompt
}


def install_tokens(
    model: HookedRecurrent,
    sae_or_cell: SAE[Any] | Cell | tuple[int, int],
    prompts: Int[Tensor, "passage pos"] | str,
    targets: Sequence[int | str] | None = None,
    magnitude: float | tuple[float, ...] = 3.0,
    positions: int = 3,
    direction: Literal["jacobian", "unembedding"] = "jacobian",
    n_refinements: int = 4,
    n_tokens: int = 20,
    temperature: float = 0.0,
    context_size: int | None = None,
    seed: int = 0,
    progress_folder: str | None = None,
    verbose: bool = True,
) -> ExperimentResult:
    """Add a token's direction to a head's writes at a prompt's last positions, decode, and look for it.

    At each of the last ``positions`` of the prompt a rank-1 matrix with ``magnitude`` times the norm of the
    native write there joins that write; everything else is native. Directions:

    - ``unembedding`` (the paper's): key side that of the native write, value side W_O[head] W_U[target].
    - ``jacobian``: the rank-1 matrix of that norm along which the target's log-probability at the first step
      rises most: the leading singular pair of its gradient by the write, through the true model (decay,
      erase, every coming read, norm, gate and all later layers). The gradient is taken at the native
      writes, then ``n_refinements`` times at what was found; the best of them by log-probability stays.

    Each edit has a control, a Gaussian rank-1 write of the same norm.

    Args:
        model: the model.
        sae_or_cell: a cell, (layer, head), or an SAE on one; only the cell counts.
        prompts: ``[prompt, pos]``, or a text to cut into prompts.
        targets: ids, or texts of one token each; each is tried with every prompt (None: one drawn at random
            in each stratum of native ranks at the first step: 2 to 99, 100 to 999, from 1,000, and tokens
            of the less likely half that are not in the prompt; strata that the vocabulary has not are
            left out).
        magnitude: of what is added, in units of the native write there; several are tried one by one.
        positions: how many.
        direction: what is written.
        n_refinements: of ``jacobian``; 0 is the derivative at the native writes.
        n_tokens: to decode.
        temperature: 0 is greedy, else tokens are drawn, with the same random numbers for every edit.
        context_size: tokens of a prompt, for text (None: the SAE's own, else 256).
        seed: of targets, controls and draws.
        progress_folder: keeps finished prompts, and resumes from them.
        verbose: show a progress bar.

    Returns:
        a result whose ``records`` have a row an edit: prompt, target, stratum, magnitude, native_rank, rank
        (at the first step, from 1), rank_shift (how many ranks it rose), lift (of the first step's
        log-probability, nats), in_continuation, native_in_continuation, control_in_continuation,
        control_lift, continuation and native_continuation (token ids, as JSON). Its ``summary`` has
        target_in_continuation with a 95% interval, native_target_in_continuation,
        control_target_in_continuation, median_rank_shift, mean_lift, first_token (how often the target
        comes first), and all of these by stratum and by magnitude.

    Raises:
        WriteSAEError: a target is not one token, or prompts are not longer than ``positions``.
        HookedModelError: there is no such cell.
    """
    magnitudes = magnitude if isinstance(magnitude, tuple) else (magnitude,)
    check_choice("direction", direction, "jacobian", "unembedding")
    check_positive(magnitude=magnitudes)
    check_at_least(1, positions=positions, n_tokens=n_tokens)
    check_at_least(0, seed=seed, n_refinements=n_refinements)
    if not 0 <= temperature < float("inf"):
        raise WriteSAEError(f"temperature={temperature} makes no sense: give 0 or more")
    cell = find_cell(model, sae_or_cell)
    passages = find_passages(model, sae_or_cell, prompts, context_size)
    if passages.shape[1] <= positions:
        raise WriteSAEError(
            f"prompts of {passages.shape[1]} tokens are too short to write at their last {positions}: give "
            "longer ones, or fewer positions"
        )
    wanted = None if targets is None else [token_id(model, t) for t in targets]
    if wanted == []:
        raise WriteSAEError("there are no targets: give some, or None to draw them")
    run = Run(
        "install", model, cell, passages, progress_folder, verbose, targets=wanted,
        magnitude=list(magnitudes), positions=positions, direction=direction, n_refinements=n_refinements,
        n_tokens=n_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip

    def install(n: int) -> pd.DataFrame:
        rng = generator(seed, n)
        prompt = _Prompt(model, cell, passages[n], positions)
        chosen = prompt.draw_targets(rng) if wanted is None else [(t, "given") for t in wanted]
        refine = n_refinements if direction == "jacobian" else None
        return prompt.install(chosen, magnitudes, refine, n_tokens, temperature, rng).assign(prompt=n)

    records = run.records(range(len(passages)), install, "Installing", unit="prompt")
    summary = _summarize(records) | {"n_prompts": len(passages)}
    low, high = summary["target_in_continuation_ci"]
    headline = (
        f"target in continuation {summary['target_in_continuation']:.1%} ({low:.1%} to {high:.1%}), natively "
        f"{summary['native_target_in_continuation']:.1%}, {len(records)} installs"
    )
    return run.result(records, summary, {"install": plot_install}, headline)


class _Prompt:
    """One prompt: its native continuation, and installs that share its cached prefix."""

    def __init__(
        self, model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], positions: int
    ) -> None:
        self.model, self.cell, self.tokens = model, cell, tokens
        self.last = tokens[-positions:]
        self.prefix = Prefix(model, cell, tokens[:-positions])
        key, value = (x[-positions:].float() for x in native_writes(model, cell, tokens))
        self.key, self.norm = key, key.norm(dim=-1) * value.norm(dim=-1)
        with torch.no_grad():
            self.logits = self.prefix.run(self.last[None])[0][0, -1].double()

    def ranks(self, logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, " row"]) -> Tensor:
        at = logits.gather(1, targets[:, None])
        return (logits > at).sum(-1) + 1

    def draw_targets(self, rng: torch.Generator) -> list[tuple[int, str]]:
        """One token of each stratum that has any."""
        order = self.logits.argsort(descending=True).tolist()
        inside, size = set(self.tokens.tolist()), len(order)
        drawn = []
        for name, (low, high) in STRATA.items():
            if name == "out_of_context":
                pool = [t for t in order[size // 2 :] if t not in inside]
            else:
                assert low is not None
                pool = order[low - 1 : None if high is None else high - 1]
            if pool:
                drawn.append((pool[int(torch.randint(0, len(pool), (), generator=rng))], name))
        return drawn

    def install(
        self,
        chosen: list[tuple[int, str]],
        magnitudes: tuple[float, ...],
        refine: int | None,
        n_tokens: int,
        temperature: float,
        rng: torch.Generator,
    ) -> pd.DataFrame:
        device, n = self.tokens.device, len(chosen) * len(magnitudes)
        targets = torch.tensor([t for t, _ in chosen for _ in magnitudes], device=device)
        sizes = torch.tensor([m for _ in chosen for m in magnitudes], device=device)[:, None] * self.norm
        added = self._unembedding(targets) if refine is None else self._jacobian(targets, sizes, refine)
        shape = n, len(self.last)
        control = [torch.randn(*shape, d, generator=rng).to(device) for d in (self.cell.d_k, self.cell.d_v)]
        every = torch.cat([_of_norm(*x, sizes) for x in (added, tuple(control))])
        every = torch.cat([every, every.new_zeros(1, *every.shape[1:])])  # the last row is native
        with torch.no_grad():
            logits, cache = self.prefix.run(self.last.expand(len(every), -1), every)
            first = logits[:, -1].double()
            said = self.prefix.decode(logits[:, -1], cache, n_tokens, temperature, rng=rng)
        contains = (said[:, None] == targets[:, None]).any(-1)  # [row, target]
        log_p = first.log_softmax(-1)[:, targets]
        own, ctl = torch.arange(n, device=device), torch.arange(n, 2 * n, device=device)
        native_rank = self.ranks(first[-1:].expand(n, -1), targets)
        rank = self.ranks(first[:n], targets)
        columns = {
            "target": targets,
            "stratum": np.repeat([name for _, name in chosen], len(magnitudes)),
            "magnitude": np.tile(magnitudes, len(chosen)),
            "native_rank": native_rank,
            "rank": rank,
            "rank_shift": native_rank - rank,
            "lift": log_p[own, own] - log_p[-1],
            "in_continuation": contains[own, own],
            "native_in_continuation": contains[-1],
            "control_in_continuation": contains[ctl, own],
            "control_lift": log_p[ctl, own] - log_p[-1],
        }
        frame = pd.DataFrame({k: v.cpu().numpy() if torch.is_tensor(v) else v for k, v in columns.items()})
        frame["continuation"] = [json.dumps(row) for row in said[:n].tolist()]
        frame["native_continuation"] = json.dumps(said[-1].tolist())
        return frame

    def _unembedding(self, targets: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
        """The native keys, and the targets' rows of the unembedding as the head's output sees them."""
        unembedding: Any = self.model.original_model.get_output_embeddings().weight  # type: ignore[operator]
        output = self.model.mixers[self.cell.layer].head_output(self.cell.head)
        values = (unembedding[targets].float() @ output.float().T).detach()
        count = len(self.last)
        return self.key.expand(len(targets), -1, -1), values[:, None].expand(-1, count, -1)

    def _jacobian(
        self, targets: Int[Tensor, " row"], sizes: Float[Tensor, "row pos"], refine: int
    ) -> tuple[Tensor, Tensor]:
        """Leading pairs of the gradient of the targets' log-probabilities by the writes."""
        shape = len(targets), len(self.last), self.cell.d_k, self.cell.d_v
        added = torch.zeros(shape, device=targets.device)
        best: tuple[Tensor, Tensor] | None = None
        reached = torch.full((len(targets),), -float("inf"), device=targets.device, dtype=torch.float64)
        pair = (added[..., 0], added[..., 0, :])
        for turn in range(refine + 2):
            added.requires_grad_()
            with torch.enable_grad():
                logits, _ = self.prefix.run(self.last.expand(len(targets), -1), added)
                log_p = logits[:, -1].double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
                (gradient,) = torch.autograd.grad(log_p.sum(), added)
            if turn:  # the first round is native
                better = (log_p.detach() > reached)[:, None, None]
                reached = torch.maximum(reached, log_p.detach())
                best = pair if best is None else (
                    torch.where(better, pair[0], best[0]), torch.where(better, pair[1], best[1])
                )  # fmt: skip
            left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
            pair = left[..., 0], right[..., 0, :]
            added = _of_norm(*pair, sizes)
        assert best is not None
        return best


def _of_norm(
    keys: Float[Tensor, "row pos d_k"], values: Float[Tensor, "row pos d_v"], sizes: Float[Tensor, "row pos"]
) -> Float[Tensor, "row pos d_k d_v"]:
    unit = nn.functional.normalize(keys, dim=-1), nn.functional.normalize(values, dim=-1)
    return (unit[0] * sizes[..., None])[..., None] * unit[1][..., None, :]


def _summarize(records: pd.DataFrame) -> dict[str, Any]:
    summary = _rates(records)
    low, high = statistics.wilson_interval(records.in_continuation)
    summary["target_in_continuation_ci"] = [low, high]
    summary["n_installs"] = len(records)
    for column in ("stratum", "magnitude"):
        found = records.groupby(column, sort=False)
        summary[f"by_{column}"] = {
            str(name): {"n": len(part), **_rates(part)} for name, part in found
        }
    return summary


def _rates(records: pd.DataFrame) -> dict[str, Any]:
    return {
        "target_in_continuation": float(records.in_continuation.mean()),
        "native_target_in_continuation": float(records.native_in_continuation.mean()),
        "control_target_in_continuation": float(records.control_in_continuation.mean()),
        "first_token": float((records["rank"] == 1).mean()),
        "median_rank_shift": float(records.rank_shift.median()),
        "mean_lift": float(records.lift.mean()),
        "mean_control_lift": float(records.control_lift.mean()),
    }
