"""One self-contained HTML page about a trained WriteSAE and its replacement test."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens.experiments.result import ExperimentResult, write_whole

# What the paper reports, by architecture.
PAPER_WIN_RATES = {
    "gated_delta_net": (0.924, "Qwen3.5-0.8B"),
    "mamba2": (0.881, "Mamba-2-370M"),
    "rwkv7": (0.453, "RWKV-7-1.5B"),
}
N_ATOMS, N_CONTEXTS, MIN_FIRINGS = 6, 4, 8
_BEFORE, _AFTER = 24, 8


def write_report(
    path: str | Path,
    model: HookedRecurrent,
    result: ExperimentResult,
    passages: Int[Tensor, "passage pos"],
    training: dict[str, Any] | None = None,
    code: str = "",
) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        model: for its tokenizer.
        result: of `replacement_test`.
        passages: the tokens that it was run on.
        training: optional section: ``text`` (paragraphs) and ``figures`` (alt text to figure).
        code: what reproduces the run.
    """
    summary = result.summary
    section = None
    if training is not None:
        section = {"text": training["text"], "images": _images(training["figures"])}
    source = files("writesae_lens").joinpath("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    atoms = best_atoms(result.records)
    html = page.render(
        title=f"WriteSAE on {summary['model']}",
        subtitle=f"{summary['hook_name']} · {summary['n_firings']:,} firings of {summary['n_atoms']:,} atoms "
        f"in {summary['n_passages']:,} passages",
        verdict=verdict(summary),
        cards=_cards(summary),
        training=section,
        method=_method(summary),
        images=_images({f"{stem.replace('_', ' ')}": draw(result) for stem, draw in result.figures.items()}),
        table=_table(summary),
        atoms_intro=f"Atoms with at least {MIN_FIRINGS} firings, by win rate, then by how far below deletion "
        "they stay. The marked token is where the atom fires, the text around it is the passage.",
        atoms=[_atom(model, result.records, passages, atom) for atom in atoms],
        code=code,
        footer="KL divergences are in nats, between next-token distributions at the edited position. The "
        "numbers of the test come from records.csv beside this page.",
    )
    path = Path(path)
    write_whole(path, lambda p: p.write_text(html, encoding="utf-8"))
    return path


def verdict(summary: dict[str, Any]) -> str:
    """What the numbers amount to, in two sentences."""
    # Of one passage there is no interval over passages, but one over firings.
    rate, ends = summary["win_rate"], summary["win_rate_ci_by_passage"]
    over, (low, high) = ("passages", ends) if ends else ("firings", summary["win_rate_ci"])
    if low > 0.5:
        answer = "Yes: one rank-1 atom keeps the model nearer to itself than deleting the write does"
    elif high < 0.5:
        answer = "No: deleting the write does less harm than putting the atom in its place"
    else:
        answer = "Undecided: atom and deletion cannot be told apart on these firings"
    paper_rate, paper_model = PAPER_WIN_RATES[summary["architecture"]]
    compared = "above" if rate > paper_rate else "below"
    return (
        f"{answer}, at {rate:.1%} of firings (95% interval over {over} {low:.1%} to {high:.1%}). "
        f"That is {compared} the {paper_rate:.1%} that the paper reports on {paper_model}."
    )


def best_atoms(records: pd.DataFrame) -> list[int]:
    """Atoms with enough firings, by win rate, then by median ratio of KLs."""
    frame = records.assign(
        win=records.kl_atom < records.kl_delete,
        ratio=(records.kl_atom + 1e-12) / (records.kl_delete + 1e-12),
    )
    atoms = frame.groupby("atom").agg(win=("win", "mean"), ratio=("ratio", "median"), count=("win", "size"))
    often = pd.DataFrame(atoms[atoms["count"] >= MIN_FIRINGS])
    atoms = often.sort_values(by=["win", "ratio"], ascending=[False, True])
    return [int(atom) for atom in atoms.index[:N_ATOMS]]


def _atom(model: HookedRecurrent, records: pd.DataFrame, passages: Tensor, atom: int) -> dict[str, Any]:
    mine = pd.DataFrame(records[records.atom == atom]).sort_values(by="coefficient", ascending=False)
    wins = (mine.kl_atom < mine.kl_delete).mean()
    line = (
        f"{len(mine)} firings · wins {wins:.0%} · median KL {mine.kl_atom.median():.2g} against "
        f"{mine.kl_delete.median():.2g} deleted · median cosine {mine.cosine.median():.2f}"
    )
    contexts, seen = [], set()
    for passage, position in zip(mine.passage, mine.position, strict=True):
        before, token, after = (
            _text(model, passages[passage, max(0, start) : stop])
            for start, stop in (
                (position - _BEFORE, position),
                (position, position + 1),
                (position + 1, position + 1 + _AFTER),
            )
        )
        if (before[-12:], token) not in seen and len(contexts) < N_CONTEXTS:
            seen.add((before[-12:], token))
            contexts.append((before, token, after))
    return {"number": atom, "line": line, "contexts": contexts}


def _text(model: HookedRecurrent, tokens: Tensor) -> str:
    return str(model.tokenizer.decode(tokens.tolist())).replace("\n", "↵")


def _cards(summary: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = summary["win_rate_ci"]
    return [
        (f"{summary['win_rate']:.1%}", f"win rate ({low:.1%} to {high:.1%})"),
        (f"{summary['strict_chain_rate']:.1%}", "strict chain: atom < delete < random"),
        (f"{summary['median_cosine']:.2f}", "median cosine of atom and write"),
        (f"{summary['n_firings']:,}", f"firings, {summary['n_atoms']:,} atoms"),
    ]


def _method(summary: dict[str, Any]) -> list[str]:
    size = "its coefficient" if summary["scale"] == "coefficient" else "the native write's norm"
    other = {
        "gaussian": "a random rank-1 matrix",
        "atom": "another atom",
        "orthogonal": "a random rank-1 matrix orthogonal to the write",
        "native_marginals": "a rank-1 matrix with coordinates of other writes",
    }[summary["random"]]
    direction = "KL(patched || native)" if summary["kl"] == "patched_base" else "KL(native || patched)"
    whole = summary["replaces"] == "update" and summary["architecture"] != "mamba2"
    replaced = "whole native update (erase and write)" if whole else "native write"
    return [
        f"At every position the SAE names one dominant atom. The {replaced} of that cell at that token is "
        f"replaced by the atom at {size}, by nothing, and by {other} of the atom's norm; the rest of the "
        f"model runs on. The score is how far the next-token distribution moves, {direction}.",
        "Points under the dashed line are firings where the atom is the better stand-in.",
    ]


def _table(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    def interval(name: str) -> str:
        ends = summary[name]
        return "none" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"

    medians = [
        (
            f"median KL, {label}",
            f"{summary[f'median_kl_{name}']:.3g} ± {summary[f'median_kl_{name}_error']:.1g}",
            "nats; ± is MAD / √n",
        )
        for name, label in (("atom", "atom"), ("delete", "deleted"), ("random", "random"))
    ]
    ratio = " : ".join(f"{x:.2f}" for x in summary["kl_ratio_atom_delete_random"])
    rates = summary["win_rate_by_effect_quartile"]
    quarters = ", ".join("-" if x is None else f"{x:.0%}" for x in rates)
    return [
        ("win rate, by atom", interval("win_rate_ci_by_atom"), "bootstrap over atoms"),
        ("win rate, by passage", interval("win_rate_ci_by_passage"), "bootstrap over passages"),
        ("win rate by quarter", quarters, "from the writes that matter least to those that matter most"),
        *medians,
        ("ratio", ratio, "atom : deleted : random, medians"),
        (
            "Cliff's delta",
            f"{summary['cliffs_delta']:.3f}",
            "deleted against atom; 1 is total separation",
        ),
        ("Wilcoxon p", _p_value(summary["wilcoxon_p"]), "paired, one-sided"),
        (
            "never dominant",
            f"{summary['n_atoms_never_dominant']:,}",
            "atoms that lead at no tested firing",
        ),
    ]


def _p_value(p: float) -> str:
    return f"{p:.2g}" if p > 1e-300 else "below 1e-300"


def _images(figures: dict[str, Figure]) -> list[dict[str, str]]:
    images = []
    for alt, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append({"alt": alt, "data": f"data:image/png;base64,{data}"})
    return images
