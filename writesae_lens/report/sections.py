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
from writesae_lens.experiments.origin import sentence
from writesae_lens.experiments.result import ExperimentResult, read_table
from writesae_lens.saelens import history

# Win rates of the paper by architecture, and the models that they were measured on.
PAPER_WIN_RATES = {
    "gated_delta_net": (0.924, "Qwen3.5-0.8B"),
    "mamba2": (0.881, "Mamba-2-370M"),
    "rwkv7": (0.453, "RWKV-7-1.5B"),
}
# Longer values of a summary, such as lists by token, are left to its summary.json.
_LONGEST_VALUE = 200


def verdict(summary: Mapping[str, Any]) -> str:
    """The answer of a replacement test in words: does an atom do less harm than deleting the write?"""
    if summary["win_rate"] is None:
        return "No answer: at every firing the deletion's KL is at the floor of rounding."
    # A single passage gives no interval over passages, but one over firings.
    rate, by_passage = summary["win_rate"], summary["win_rate_ci_by_passage"]
    unit, (low, high) = ("passages", by_passage) if by_passage else ("firings", summary["win_rate_ci"])
    if low > 0.5:
        answer = "Yes: one atom keeps the model nearer to itself than deleting the write does."
    elif high < 0.5:
        answer = "No: deleting the write does less harm than putting the atom in its place."
    else:
        answer = "Undecided: atom and deletion cannot be told apart on these firings."
    interval = f"95% interval over {unit} {low:.1%} to {high:.1%}"
    answer += f" The atom does less harm at {rate:.1%} of firings ({interval})."
    if summary["architecture"] not in PAPER_WIN_RATES:
        return answer
    paper_rate, paper_model = PAPER_WIN_RATES[summary["architecture"]]
    compared = "above" if rate > paper_rate else "below"
    return f"{answer} That is {compared} the {paper_rate:.1%} that the paper reports on {paper_model}."


def main_numbers(replacement: Mapping[str, Any], partition: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Figures and labels at the top of the page, from the summaries of replacement test and partition."""
    interval = statistics.between(replacement["win_rate_ci"], ".1%")
    chain = statistics.share(replacement["strict_chain_rate"])
    n_atoms = sum(partition[f"n_{name}"] for name in ("register", "bundle", "rare", "dead"))
    return [
        (statistics.share(replacement["win_rate"]), f"win rate over firings{interval}"),
        (chain, "strict chain: KL of atom < deletion < random write"),
        (f"{replacement['median_cosine']:.2f}", "median cosine of atom and write"),
        (f"{n_atoms - partition['n_dead']:,}", f"of {n_atoms:,} atoms are dominant somewhere in this text"),
        (f"{partition['n_register']:,} / {partition['n_bundle']:,}", "registers / bundles"),
    ]


def training_settings(sae: SAE[Any], training: str | Path | None) -> dict[str, str]:
    """The SAE's settings, and those of its training if its folder has them."""
    cfg, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    settings = {name: cfg[name] for name in ("architecture", "d_sae", "k", "rank", "encoder", "decoder",
                                             "activation", "d_k", "d_v") if name in cfg}  # fmt: skip
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
        settings |= {name: run[name] for name in shown if name in run}
    settings |= {
        "trained with SAELens": metadata.sae_lens_training_version,
        "provenance": metadata.provenance,
    }
    return {name.replace("_", " "): f"{value}" for name, value in settings.items() if value is not None}


def training_sentence(sae: SAE[Any], settings: Mapping[str, str]) -> str:
    """The settings that matter most, as a sentence."""
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
        (name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
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
        "atom": "another atom",
        "orthogonal": "a random rank-1 matrix orthogonal to the write",
        "native_marginals": "a rank-1 matrix with coordinates of other writes",
    }[summary["random"]]
    direction = "KL(patched || native)" if summary["kl"] == "patched_base" else "KL(native || patched)"
    # Results saved by earlier versions do not say whether the cell erases: most do.
    whole_update = summary["replaces"] == "update" and summary.get("erases", True)
    replaced = "whole native update (erase and write)" if whole_update else "native write"
    return [
        f"At every position one atom of the SAE is dominant. The {replaced} of the cell at that token is "
        f"replaced by the atom at {size}, by nothing, and by {random} of the atom's norm; the rest of the "
        f"model runs on. The score is how far the next-token distribution moves, {direction}.",
        "Points under the dashed line are firings where the atom is the better stand-in.",
    ]


def _image(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.as_png(figure, 130)).decode()
