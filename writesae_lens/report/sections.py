"""The overview of the page: verdict, main numbers, training, and a section for each result."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sae_lens import SAE

from hooked_models.files.json_files import read_json
from writesae_lens import figures, statistics
from writesae_lens.experiments.catalogue import find_experiment
from writesae_lens.experiments.features.sides import PLURALS
from writesae_lens.experiments.origin import sentence
from writesae_lens.experiments.result import ExperimentResult, read_table
from writesae_lens.experiments.stand_ins import TITLES
from writesae_lens.saelens import history

# Win rates of the paper by architecture, and the models that they were measured on.
PAPER_WIN_RATES = {
    "gated_delta_net": (0.924, "Qwen3.5-0.8B"),
    "mamba2": (0.881, "Mamba-2-370M"),
    "rwkv7": (0.453, "RWKV-7-1.5B"),
}
# Untrained stand-ins that a verdict compares with, in words.
_UNTRAINED = {
    "lookup": "an untrained lookup of equal size",
    "pursuit": "untrained codes chosen by matching pursuit",
}
# Longer values of a summary, such as lists by token, are left to its summary.json.
_LONGEST_VALUE = 200


def verdict(summary: Mapping[str, Any]) -> str:
    """The answer of a replacement test in words: what do stand-ins recover of what deleting a write does?"""
    median = summary.get("median_recovered")
    if median is None:
        return "No answer: at every firing the deletion's KL is at the floor of rounding."
    interval = summary.get("median_recovered_ci") or [median, median]
    if interval[1] <= 0:
        answer = "No: at most firings deleting the write does less harm than the stand-in."
    elif interval[0] <= 0:
        answer = "Undecided: in the median, stand-in and deletion cannot be told apart on these firings."
    else:
        answer = (
            f"{_compared(summary, median) or 'Yes'}: half of the stand-ins recover {median:.1%} or more of "
            "what deleting the write does."
        )
    between = statistics.between(summary.get("median_recovered_ci"), ".1%")
    answer += f" Recovered in the median at the write's own position {median:.1%}{between}"
    if (later := summary.get("median_recovered_later")) is not None:
        between = statistics.between(summary.get("median_recovered_later_ci"), ".1%")
        answer += f", over the next {summary['horizon']} tokens {later:.1%}{between}"
    between = statistics.between(summary["win_rate_ci"], ".1%")
    answer += (
        f"; pooled {statistics.share(summary['recovered'])}. Stand-ins, also small ones, do less harm than "
        f"the deletion at {statistics.share(summary['win_rate'])} of firings{between}"
    )
    if summary["architecture"] in PAPER_WIN_RATES:
        paper_rate, paper_model = PAPER_WIN_RATES[summary["architecture"]]
        answer += (
            f"; this is the measure of the WriteSAE paper (arXiv:2605.12770), which reports {paper_rate:.1%} "
            f"on {paper_model}"
        )
    return f"{answer}."


def _compared(summary: Mapping[str, Any], median: float) -> str:
    """Which untrained stand-ins a median is larger than, and which not; empty for a result without any."""
    beaten, others = [], []
    for name, words in _UNTRAINED.items():
        untrained = _baselines(summary).get(name, {}).get("median_recovered")
        if untrained is not None:
            (beaten if median > untrained else others).append(f"{words} ({untrained:.1%})")
    if not beaten:
        return f"Stand-ins do not beat {' or '.join(others)}" if others else ""
    return f"Stand-ins beat {' and '.join(beaten)}{', not ' if others else ''}{''.join(others)}"


def about_sae(reference: str | None, settings: Mapping[str, str]) -> str:
    """What the SAE is loaded from, and how many tokens it was trained on, as far as that is known.

    Args:
        reference: a folder, a best.pt or RELEASE:ID; None where the page was not told.
        settings: of `training_settings`.
    """
    tokens = settings.get("training tokens")
    trained = "training tokens not recorded" if tokens is None else f"trained on {int(tokens):,} tokens"
    return f"SAE {reference or 'from memory, no folder given'}; {trained}"


def firings_read(replacement: ExperimentResult) -> str:
    """How many firings the figures of a replacement test are of."""
    records, left_out = replacement.records, replacement.summary.get("n_at_floor") or 0
    said = f"Stand-ins tested at {len(records):,} firings in {records['passage'].nunique():,} passages"
    floor = f", {left_out:,} of them left out as their deletion is at the floor of rounding"
    return f"{said}{floor if left_out else ''}"


def _baselines(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What untrained and random stand-ins reach, by name; results of earlier versions have none."""
    rows = summary.get("baselines")
    return {row["name"]: row for row in rows} if isinstance(rows, list) else {}


def standings(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of stand-ins: the SAE's own, then the baselines at the same firings."""
    figures = [
        (f"{name}{when}", f"{label}{where}")
        for when, where in (("", ""), ("_later", ", later"), ("_both", ", both"))
        for name, label in (("median_recovered", "median recovered"), ("recovered", "pooled"),
                            ("win_rate", "wins"))
        if summary.get(f"{name}{when}") is not None
    ]  # fmt: skip
    rows = {"this SAE": summary, **{TITLES.get(n, n): row for n, row in _baselines(summary).items()}}
    table = [[name, *(statistics.share(row.get(key)) for key, _ in figures)] for name, row in rows.items()]
    return ["stand-in", *(label for _, label in figures)], table


def guards(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values and labels of the guards and of figures that qualify the others, where the result has them."""
    n = summary.get("n_train_writes")
    n_train = "some training writes" if n is None else f"{n:,} training writes"
    labels = [
        ("bits", "{:.1f}", "bits to name the features of a write (coefficients not counted; an upper bound)"),
        ("free_dimensions", "{:.1f}", "free dimensions of the stand-in around a write"),
        ("free_dimensions_of_a_write", "{:,}", "free dimensions of a write"),
        ("n_features_active", "{:,}", "features active somewhere in this text"),
        ("seen_share", "{:.1%}", "of firings use only features that this text uses at least 5 times"),
        ("nearest_train_cosine", "{:.2f}", f"median cosine of a write to the nearest of {n_train}"),
        ("own_share", "{:.1%}", "of what deleting a write does happens at its own position (median)"),
        ("win_rate_matched_norm", "{:.1%}", "wins with stand-ins of the native write's norm"),
        ("strict_chain_rate", "{:.1%}", "strict chain: stand-in < deletion < random stand-in"),
        ("chain_ceiling", "{:.1%}", "its reference: the chain of the exact native write"),
        ("n_at_floor", "{:,}", "firings left out, their deletion being at the floor of rounding"),
        ("n_without_horizon", "{:,}", "firings left out, too near to the end of their passage"),
    ]
    return [(form.format(summary[key]), label) for key, form, label in labels if summary.get(key) is not None]


def main_numbers(replacement: Mapping[str, Any], partition: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Figures and labels at the top of the page, from the summaries of replacement test and partition."""
    cards = []
    for when, where in (("", "own position"), ("_later", "later positions"), ("_both", "own and later")):
        if (median := replacement.get(f"median_recovered{when}")) is not None:
            cards.append((f"{median:.1%}", f"recovered in the median, {where}"))
    if (lookup := _baselines(replacement).get("lookup")) is not None:
        share = statistics.share(lookup["median_recovered"])
        cards.append((share, "recovered by an untrained lookup of equal size"))
    if (pursuit := _baselines(replacement).get("pursuit")) is not None:
        share = statistics.share(pursuit["median_recovered"])
        cards.append((share, "recovered by untrained codes with matching pursuit"))
    interval = statistics.between(replacement["win_rate_ci"], ".1%")
    cards.append((statistics.share(replacement["win_rate"]), f"win rate over firings{interval}"))
    if (bits := replacement.get("bits")) is not None:
        cards.append((f"{bits:.1f}", "bits to name the features of a write"))
    cards.append((f"{replacement['median_cosine']:.2f}", "median cosine of stand-in and write"))
    of_sides = partition.get("by_side") or {"atom": partition}
    for side, own in of_sides.items():
        n = sum(own[f"n_{name}"] for name in ("register", "bundle", "rare", "dead"))
        what = PLURALS[side]
        cards.append((f"{n - own['n_dead']:,}", f"of {n:,} {what} are dominant somewhere in this text"))
    return cards


def training_settings(sae: SAE[Any], training: str | Path | None) -> dict[str, str]:
    """The SAE's settings, and those of its training if its folder has them."""
    cfg, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    shown = ("architecture", "d_sae", "n_key", "n_value", "k", "k_key", "k_value", "rank", "encoder",
             "decoder", "activation", "d_k", "d_v")  # fmt: skip
    settings = {name: cfg[name] for name in shown if cfg.get(name) not in (None, 0)}
    settings |= {
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "context size": metadata.context_size,
        **(metadata.training_architecture_details or {}),
    }
    # SAELens's runner for several SAEs writes the file once, beside their folders.
    folders = [] if training is None else [Path(training), Path(training).parent]
    path = next((f / "runner_cfg.json" for f in folders if (f / "runner_cfg.json").is_file()), None)
    if path is not None:
        run = read_json(path)
        shown = ("training_tokens", "train_batch_size_tokens", "lr", "lr_warm_up_steps", "lr_decay_steps",
                 "dead_feature_window", "seed", "dtype")  # fmt: skip
        values = {name: run[name] for name in shown if name in run}
        # SAELens takes 1e6 tokens, too: whole numbers are shown as such.
        whole = {name: int(x) for name, x in values.items() if isinstance(x, float) and x.is_integer()}
        settings |= values | whole
    settings |= {
        "trained with SAELens": metadata.sae_lens_training_version,
        "provenance": metadata.provenance,
    }
    return {name.replace("_", " "): _plain(value) for name, value in settings.items() if value is not None}


def training_sentence(sae: SAE[Any], settings: Mapping[str, str]) -> str:
    """The settings that matter most, as a sentence."""
    if settings.get("decoder") == "codes":
        sides = [f"{settings[f'n {side}']} {side} codes" for side in ("key", "value")]
        parts = [f"{' and '.join(sides)},"]
        settings = dict(settings) | {"k": f"{settings['k key']} + {settings['k value']}"}
    else:
        parts = [f"{sae.cfg.d_sae:,} atoms"]
    if settings.get("decoder") == "factored":
        parts.append(f"of rank {settings['rank']}")
    how_many = {"topk": "", "batchtopk": "on average "}.get(settings.get("activation", ""))
    if "k" in settings and how_many is not None:
        parts.append(f"with {how_many}{settings['k']} of them active at a time")
    sentence = " ".join(parts)
    tokens = settings.get("training tokens")
    return f"{sentence}, trained on {int(tokens):,} inputs." if tokens else f"{sentence}."


def training_curves(training: str | Path | None) -> str | None:
    """The figure of the training's history, if the SAE's folder has one."""
    path = None if training is None else Path(training) / history.FILE
    if path is None or not path.is_file():
        return None
    return _image(figures.plot_training(read_table(path)))


def section(result: ExperimentResult) -> dict[str, Any]:
    """A result on the page: question, headline and figures, and its plain numbers in a table that unfolds."""
    experiment = find_experiment(result.name)
    numbers = [
        (name.replace("_", " "), _plain(value))
        for name, value in result.summary.items()
        if name != "headline" and isinstance(value, (int, float, str, list))
    ]
    return {
        "name": result.name,
        "question": experiment.question,
        "headline": result.headline,
        "measured_on": sentence(result.summary),
        "method": _replacement_method(result.summary) if result.name == "replace" else [],
        "images": [(stem.replace("_", " "), _image(draw(result))) for stem, draw in result.figures.items()],
        "records": f"{len(result.records):,} records, each of them {experiment.row}",
        "numbers": [(name, value) for name, value in numbers if len(value) < _LONGEST_VALUE],
    }


def _replacement_method(summary: Mapping[str, Any]) -> list[str]:
    """What the replacement test did, with the options that it was run with."""
    size = "its coefficient" if summary["scale"] == "coefficient" else "the native write's norm"
    random = {
        "gaussian": "a random rank-1 matrix",
        "atom": "other atoms or codes of the dictionary",
        "orthogonal": "a random rank-1 matrix orthogonal to the write",
        "native_marginals": "a rank-1 matrix with coordinates of other writes",
    }[summary["random"]]
    direction = "KL(patched || native)" if summary["kl"] == "patched_base" else "KL(native || patched)"
    # Results saved by earlier versions do not say whether the cell erases: most do.
    whole_update = summary["replaces"] == "update" and summary.get("erases", True)
    replaced = "whole native update (erase and write)" if whole_update else "native write"
    return [
        f"The {replaced} of the cell at a token is replaced by the SAE's stand-in (the dominant atom, or the "
        f"product of the active codes) at {size}, by nothing, and by {random} of the stand-in's norm; the "
        f"rest of the model runs on. The score is how far the next-token distribution moves, {direction}.",
        "Recovered is 1 - KL / KL of the deletion. Points under the dashed line are firings where the "
        "stand-in does less harm than the deletion.",
    ]


def _plain(value: Any) -> str:
    """A value of a folded table: numbers that are not whole with four digits, lists without brackets."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def _image(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.as_png(figure, 130)).decode()
