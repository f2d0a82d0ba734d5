"""What steering does to a text: continuations side by side, and a dose curve beside a random feature's."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from hooked_models.unembedding import logits_of
from writesae_lens.divergences import divergence
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.decoding import LOGITS_PER_PASS
from writesae_lens.experiments.options import Count, NotNegative, Positive, Seed, shown
from writesae_lens.experiments.passages import token_id
from writesae_lens.experiments.passes import check_finite, read
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run, generator
from writesae_lens.experiments.subjects import check_unhooked
from writesae_lens.figures import ATOM, INK, RANDOM, new_figure
from writesae_lens.use.additions import Addition, Chosen, Features, additions, amounts_of, parse_features
from writesae_lens.use.controls import random_features
from writesae_lens.use.labels import labels_of
from writesae_lens.use.prompts import Prompt, SAEs, prompt_tokens, saes_by_site
from writesae_lens.use.shading import for_shell, visible
from writesae_lens.use.steering import Hooks, Positions, Unit, among, checked_positions, hooks_of

_N_PROMOTED = 5
_WIDE = 10  # a ratio of perplexities from which on their axis is logarithmic
_FIGURES = {
    "kl": "KL to native, nats a token",
    "promoted": "probability of promoted tokens",
    "perplexity": "perplexity under the native model",
}


class Condition(NamedTuple):
    """What is written, and how many times the sizes that were asked for."""

    name: str
    """"native", "steered" or "random"."""
    dose: float


class Steered(ExperimentResult):
    """Continuations with and without steering: a result that notebooks and shells show side by side."""

    def side_by_side(self) -> dict[str, str]:
        """The first continuation natively, steered, and with the random features, at the shown dose."""
        records: Any = self.records[self.records["continuation"] == 0]
        shown = records[records.dose.isin([0.0, self.summary["shown_dose"]])]
        return dict(zip(shown.condition, shown.text.fillna(shown.ids), strict=True))

    def show(self) -> None:
        """Print the prompt (where the model has a tokenizer) and the continuations below each other."""
        prompt = "" if self.summary["prompt"] is None else f"{self.summary['prompt']}|"
        lines = [f"{name}: {for_shell(prompt + text)}" for name, text in self.side_by_side().items()]
        print("\n\n".join(lines))  # noqa: T201

    def _repr_html_(self) -> str:
        prompt = html.escape(for_shell(self.summary["prompt"] or ""))
        cells = "".join(
            f'<td style="text-align: left; vertical-align: top; white-space: pre-wrap; width: 33%">'
            f"<b>{name}</b><br><i>{prompt}</i>{html.escape(for_shell(text))}</td>"
            for name, text in self.side_by_side().items()
        )
        return f"<table><tr>{cells}</tr></table><div>{html.escape(self.headline)}</div>"


@experiment(
    "steer",
    question="What does the model say when features are written beside its own writes?",
    row="a continuation",
    of_prompt=True,
)
def steer(
    model: HookedRecurrent,
    saes: SAEs,
    features: Mapping[Features, float],
    prompt: Prompt,
    doses: tuple[Positive, ...] = (0.5, 1.0, 2.0, 4.0),
    n_tokens: Count = 40,
    n_continuations: Count = 4,
    temperature: NotNegative = 1.0,
    promoted: tuple[int | str, ...] | None = None,
    positions: Positions = None,
    tokens: Int[Tensor, "passage pos"] | str | None = None,
    unit: Unit = "firing",
    seed: Seed = 0,
) -> Steered:
    """Continue a prompt natively, steered (`steering`), and with random features, and compare.

    The control writes, for each feature, another one of its side that the text has, drawn at random, at the
    same norm and in the same way. All continuations with one number are drawn with the same random numbers.

    Args:
        model: the model.
        saes: an SAE on a cell's writes, or several of different cells.
        features: size by feature, as in `steering`.
        prompt: a text, or token ids ``[pos]``.
        doses: factors of all sizes, for the dose curve.
        n_tokens: tokens of each continuation.
        n_continuations: continuations of each dose and condition.
        temperature: 0 is greedy, and all continuations of a condition are one.
        promoted: tokens, as texts or ids, whose probability is followed (None: the five that gain most at the
            prompt's own tokens at dose 1, by their terms p log(p / p_native) of the KL to native).
        positions: where to write, as in `steering`; within the prompt and its continuations, whose last
            token is drawn and never read.
        tokens: text of the firing sizes, as in `steering`.
        unit: of the sizes, as in `steering`.
        seed: seed of the random features and the draws.

    Returns:
        a result. ``records`` has one row per continuation: condition ("native", "steered", "random"), dose,
        continuation (its number), text, ids (JSON), kl (nats a token, of the condition's next-token
        distributions to the native ones along the native continuation of that number, mean), promoted (the
        probability of the promoted tokens there, mean) and perplexity (of the continuation under the native
        model). ``summary`` has features and control (of each its coefficient at dose 1), promoted_tokens,
        shown_dose (1, or the first) and by_dose: the means of kl, promoted and perplexity by condition and
        dose (of perplexities the geometric mean).

    Raises:
        WriteSAEError: as `steering` and `read_prompt`; or positions lie after the text, promoted holds no
            token or one twice, none is given while nothing changes within the prompt, or logits are not
            finite.
        HookedModelError: anything is hooked, by an open `steering` for example; or the prompt is a text and
            the model has no tokenizer.
    """
    if len({f"{dose:g}" for dose in doses}) < len(doses):
        raise WriteSAEError(f"doses must differ in six digits, got {doses}")
    by_site = saes_by_site(model, saes)
    chosen = parse_features(by_site, features)
    where = checked_positions(positions)
    passage = prompt_tokens(model, by_site.values(), prompt)
    _check_within(where, passage.shape[1] + n_tokens - 1)
    check_unhooked(model)
    amounts = amounts_of(model, by_site, chosen, tokens, unit)
    controls = random_features(model, by_site, amounts, tokens, unit, generator(seed, 0))
    of_prompt = passage[0]
    added = additions(by_site, amounts)
    if promoted is None:
        followed = _promoted(model, of_prompt, hooks_of(model, added, where))
    else:
        followed = [token_id(model, token) for token in promoted]
        if not followed or len(set(followed)) < len(followed):
            raise WriteSAEError(f"promoted must be tokens that differ, one at least, got {shown(promoted)}")
    has_text = model.tokenizer is not None
    about = {
        "prompt": model.tokenizer.decode(of_prompt.tolist()) if has_text else None,
        "features": _described(by_site, amounts, chosen),
        "control": _described(by_site, controls),
        "promoted": followed,
        "positions": None if where is None else str(where),
    }
    steered = [sae for site, sae in by_site.items() if any(one.site == site for one in chosen)]
    run = Run("steer", model, steered, passage, locals(), **about)
    if not controls:
        run.warn("there is no other feature to draw a control from")
    writes = {"steered": added, "random": additions(by_site, controls)}
    conditions = [Condition("native", 0.0)]
    conditions += [Condition(name, dose) for name, x in writes.items() if x for dose in doses]
    frames, step = [], max(1, LOGITS_PER_PASS // (len(conditions) * model.cfg.d_vocab))
    for numbers in torch.arange(n_continuations).split(step):
        draws = [generator(seed, 1, n) for n in numbers.tolist()]
        hooks = _weighted(model, writes, conditions, len(draws), where)
        frame = _compare(model, of_prompt, conditions, hooks, n_tokens, temperature, draws, followed)
        frame["continuation"] += int(numbers[0])
        frames.append(frame)
    records = pd.concat(frames, ignore_index=True).sort_values(
        ["condition", "dose", "continuation"], key=_in_order, kind="stable", ignore_index=True
    )
    columns = ["condition", "dose", "continuation", "text", "ids", *_FIGURES]
    summary = {
        "promoted_tokens": [model.tokenizer.decode([x]) for x in followed] if has_text else followed,
        "shown_dose": 1.0 if 1.0 in doses else doses[0],
        "by_dose": _by_dose(records),
    }
    result = run.result(records.reindex(columns=columns), summary, _headline(summary))
    return Steered(result.name, result.records, result.summary)


def _check_within(positions: Positions, n_read: int) -> None:
    """Refuse positions of which one, or a slice of which all, lie after the tokens that are read."""
    if positions is None:
        return
    after = not bool(among(torch.arange(n_read), positions).any())
    if isinstance(positions, Sequence):
        after = max(positions) >= n_read
    if after:
        raise WriteSAEError(
            f"positions={positions!r:.60} go beyond the text: positions 0 to {n_read - 1} are read, of the "
            "prompt and its continuations"
        )


def _in_order(column: pd.Series) -> pd.Series:
    order = {"native": 0, "steered": 1, "random": 2}
    return column.map(order) if column.name == "condition" else column


def _described(
    saes: Mapping[Site, SAE[Any]],
    amounts: Mapping[Chosen, float],
    sizes: Mapping[Chosen, float] | None = None,
) -> list[dict[str, Any]]:
    """Features with their cells, labels and coefficients, for the summary."""
    return [
        {
            "layer": one.site.cell.layer,
            "head": one.site.cell.head,
            "features": list(one.features),
            "label": " x ".join(filter(None, map(labels_of(saes[one.site]).get, one.features))),
            "coefficient": amount,
        }
        | ({} if sizes is None else {"size": sizes[one]})
        for one, amount in amounts.items()
    ]


def _weighted(
    model: HookedRecurrent,
    writes: Mapping[str, Sequence[Addition]],
    conditions: Sequence[Condition],
    n_rows: int,
    positions: Positions,
) -> Hooks:
    """Hooks for a batch with some rows for each condition."""
    device = next(model.original_model.parameters()).device
    hooks: Hooks = []
    for name, added in writes.items():
        weights = torch.tensor([condition.dose * (condition.name == name) for condition in conditions])
        hooks += hooks_of(model, added, positions, weights.repeat_interleave(n_rows).to(device))
    return hooks


@torch.no_grad()
def _promoted(model: HookedRecurrent, prompt: Int[Tensor, " pos"], hooks: Hooks) -> list[int]:
    """The tokens that have the largest terms of KL(steered || native), in the mean over the prompt."""
    found = (_last_residual(model, prompt[None], h, len(prompt))[0] for h in ([], hooks))
    native, steered = (logits_of(model, residual).log_softmax(-1) for residual in found)
    check_finite("logits", native, steered)
    terms = (steered.exp() * (steered - native)).mean(0)
    if not terms.any():
        raise WriteSAEError(
            "what is written changes no prediction within the prompt, so no token gains there: say which "
            "tokens to follow, promoted=(token,)"
        )
    return terms.topk(min(_N_PROMOTED, len(terms))).indices.tolist()


def _last_residual(
    model: HookedRecurrent, tokens: Int[Tensor, "row pos"], hooks: Hooks, n_last: int
) -> Float[Tensor, "row last d_model"]:
    """The residual stream at the last tokens of each row, from a pass with hooks."""
    with model.hooks(fwd_hooks=hooks):
        cuts = list(read(model, tokens, model.new_cache()))
    return torch.cat(cuts, dim=1)[:, -n_last:]


@torch.no_grad()
def _compare(
    model: HookedRecurrent,
    prompt: Int[Tensor, " pos"],
    conditions: Sequence[Condition],
    hooks: Hooks,
    n_tokens: int,
    temperature: float,
    draws: Sequence[torch.Generator],
    promoted: Sequence[int],
) -> pd.DataFrame:
    """A continuation of each condition for each source of random numbers, and their figures."""
    rows = prompt.expand(len(conditions) * len(draws), -1)
    ids = _continued(model, rows, hooks, n_tokens, temperature, draws)
    whole = torch.cat([rows, ids], dim=1)[:, :-1]  # what predicts the last token is read, it is not
    natively = whole[: len(draws)].repeat(len(conditions), 1)
    along_native, own = (_last_residual(model, x, h, n_tokens) for x, h in ((natively, hooks), (whole, [])))
    figures = []
    for row, of_row in enumerate(ids):
        number, condition = row % len(draws), conditions[row // len(draws)]
        native, here = (logits_of(model, along_native[n]) for n in (number, row))
        check_finite("logits", here)
        log_p = logits_of(model, own[row]).log_softmax(-1).gather(-1, of_row[:, None])
        figures.append(
            {
                "condition": condition.name,
                "dose": condition.dose,
                "continuation": number,
                "text": None if model.tokenizer is None else model.tokenizer.decode(of_row.tolist()),
                "ids": json.dumps(of_row.tolist()),
                "kl": float(divergence(here, native).mean()) if condition.dose else 0.0,
                "promoted": float(here.softmax(-1)[:, list(promoted)].sum(-1).mean()),
                "perplexity": float((-log_p.double().mean()).exp()),
            }
        )
    return pd.DataFrame(figures)


def _continued(
    model: HookedRecurrent,
    rows: Int[Tensor, "row pos"],
    hooks: Hooks,
    n_tokens: int,
    temperature: float,
    draws: Sequence[torch.Generator],
) -> Int[Tensor, "row token"]:
    """The next tokens of each row; every len(draws)-th row is drawn with the same random numbers."""
    cache, chosen = model.new_cache(), []
    with model.hooks(fwd_hooks=hooks):
        residual = list(read(model, rows, cache))[-1]
        for step in range(n_tokens):
            logits = logits_of(model, residual[:, -1])
            check_finite("logits", logits)
            if temperature > 0:  # the largest of logits with Gumbel noise is a draw from their softmax
                noise = torch.stack([torch.rand(logits.shape[-1], generator=rng) for rng in draws])
                noise = -(-noise.clamp(min=1e-20).log()).log().to(logits.device)
                logits = logits / temperature + noise.repeat(len(rows) // len(draws), 1)
            chosen.append(logits.argmax(-1))
            if step < n_tokens - 1:
                residual = list(read(model, chosen[-1][:, None], cache))[-1]
    return torch.stack(chosen, dim=1)


def _by_dose(records: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """The means over continuations by condition and dose."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    groups: Any = records.groupby(["condition", "dose"], sort=False)
    for (condition, dose), group in groups:
        found = {name: float(group[name].mean()) for name in ("kl", "promoted")}
        found["perplexity"] = float(np.exp(np.log(group.perplexity).mean()))
        means.setdefault(str(condition), {})[f"{dose:g}"] = found
    return means


def _headline(summary: Mapping[str, Any]) -> str:
    by, dose = summary["by_dose"], f"{summary['shown_dose']:g}"
    native, steered, random = by["native"]["0"], by["steered"][dose], by.get("random", {}).get(dose)
    tokens = ", ".join(repr(visible(str(x))) for x in summary["promoted_tokens"])

    def beside(name: str, form: str) -> str:
        control = "" if random is None else f" (random {random[name]:{form}})"
        return f"{steered[name]:{form}}{control}"

    return (
        f"at {dose} x the sizes given: {beside('kl', '.3g')} nats a token to native; probability of {tokens} "
        f"{native['promoted']:.2%} -> {beside('promoted', '.2%')}"
    )


@figure("steer")
def plot_steer(result: ExperimentResult) -> Figure:
    """Dose curves of KL, promoted tokens and perplexity: steered, and the random features at equal norm."""
    by = result.summary["by_dose"]
    figure, axes = new_figure(11.0, 3.4, len(_FIGURES))
    looks = {"steered": (ATOM, "these features"), "random": (RANDOM, "random features, equal norm")}
    for axis, (name, title) in zip(axes, _FIGURES.items(), strict=True):
        native = by["native"]["0"][name]
        every = [found[name] for doses in by.values() for found in doses.values()]
        for condition, (color, label) in looks.items():
            points = sorted((float(dose), found[name]) for dose, found in by.get(condition, {}).items())
            doses, values = [0.0, *(x for x, _ in points)], [native, *(y for _, y in points)]
            if points:
                axis.plot(doses, values, "o-", ms=4, color=color, label=label)
        axis.axhline(native, color=INK, lw=0.8, ls=":")
        axis.set(xlabel="dose, times the sizes", xlim=(0, None))
        if name != "perplexity":
            axis.set_ylim(bottom=0)
        elif max(every) > _WIDE * min(every):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10, loc="left")
    axes[0].legend(frameon=False, fontsize=9)
    return figure
