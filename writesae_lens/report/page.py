"""One self-contained HTML page about an SAE: what it is, how its experiments went, and every atom."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from jaxtyping import Int
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens import figures
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import partition_atoms, replacement_test, top_contexts
from writesae_lens.experiments.inputs import find_passages, find_site, fingerprint
from writesae_lens.experiments.result import ExperimentResult, Progress, read_table, write_whole
from writesae_lens.report.atoms import Profiles, profiles, statistics_of_atoms
from writesae_lens.saelens import history

PAGE = "report.html"
# What the page cannot be made without; run where no saved result is given.
NEEDED = {"replacement": replacement_test, "partition": partition_atoms, "contexts": top_contexts}
# What each experiment asks, in the order of the page.
QUESTIONS = {
    "replacement": "Can atoms take the place of native writes?",
    "population": "Atom by atom, how often do they win?",
    "partition": "Which atoms look like native writes?",
    "contexts": "How specific are the atoms?",
    "comparison": "How do other dictionaries and controls do on the same firings?",
    "formula": "Does the formula predict how an atom shifts later logits?",
    "sign": "Does a token's logit move as the direction that is written for it predicts?",
    "erasure": "What happens when an atom's write is taken out?",
    "install": "Can tokens be installed by writing them into the memory?",
    "splice": "How much worse does the model predict on the SAE's reconstructions?",
    "amplification": "What does writing an atom larger do to a continuation?",
    "selectivity": "Does an atom move other tokens than its neighbours do?",
    "readers": "Who reads what an atom writes?",
}
# What the paper reports, by architecture.
PAPER_WIN_RATES = {
    "gated_delta_net": (0.924, "Qwen3.5-0.8B"),
    "mamba2": (0.881, "Mamba-2-370M"),
    "rwkv7": (0.453, "RWKV-7-1.5B"),
}
# Columns of the table of atoms: key, label, what it says, digits (None: text).
COLUMNS = (
    ("atom", "atom", "number in the dictionary", 0),
    (
        "class",
        "class",
        "register: like native writes; bundle: less so; dead: never the strongest here",
        None,
    ),
    ("token", "token", "the most common token of its top contexts", None),
    ("n_firings", "firings", "positions where it is the strongest atom", 0),
    ("coefficient", "largest", "its largest coefficient", 3),
    ("median_cosine", "cosine", "median cosine to the native writes whose place it takes", 2),
    ("n_tested", "tested", "of its firings, so many went through the replacement test", 0),
    (
        "win_rate",
        "wins",
        "share of its tested firings where the atom does less harm than deleting the write",
        2,
    ),
    ("kl_atom", "KL atom", "median KL with the atom in the write's place, nats", 3),
    ("kl_delete", "KL deleted", "median KL with the write deleted, nats", 3),
    ("nearest", "nearest", "absolute cosine to the nearest other atom", 2),
)
# Firings of an atom that its distributions show.
_MOST_FIRINGS = 300
_FLOOR = 1e-12


def make_report(
    out: str | Path,
    model: HookedRecurrent,
    sae: SAE[Any],
    tokens: Int[Tensor, "passage pos"] | str,
    results: Sequence[ExperimentResult] = (),
    training: str | Path | None = None,
    code: str = "",
    context_size: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Path:
    """Write report.html: an overview, every given result, and a browser of all atoms.

    The page is one file that needs no network. What it cannot do without (replacement test, partition, top
    contexts) is run on ``tokens`` where ``results`` lack it, and saved in ``out``/results; interrupted, it
    goes on from there.

    Args:
        out: folder of the page.
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        results: of experiments on this SAE (see `saved_results`).
        training: folder of the SAE, for its training curves (training.csv) and settings (runner_cfg.json).
        code: shown at the end, for people who want to do it again.
        context_size: tokens of a passage, for text (None: the SAE's own, else 256).
        seed: of what is run.
        verbose: show progress bars.

    Returns:
        the page.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or a result is of another SAE.
    """
    out = Path(out)
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    shown = list(results)
    for result in results:
        _check_fits(result, model, sae)
    found = {result.name: result for result in reversed(results)}
    missing = {name: out / "results" / name for name in NEEDED if name not in found}
    for name, folder in missing.items():
        unfinished = str(folder / "progress")
        found[name] = NEEDED[name](
            model, sae, passages, seed=seed, progress_folder=unfinished, verbose=verbose
        )
        found[name].save(folder)
        shown.append(found[name])
    decoder = profiles(model, sae, site.cell, passages, verbose=verbose)
    records = {name: found[name].records for name in NEEDED}
    table = statistics_of_atoms(records["partition"], records["replacement"], records["contexts"])
    table["nearest"] = decoder.cosines.abs().amax(1).cpu().numpy() if decoder.cosines.shape[1] else np.nan
    source = files("writesae_lens.report")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    summary, recipe = found["replacement"].summary, _recipe(sae, training)
    cell = site.cell
    html = template.from_string(source.joinpath("report.html").read_text(encoding="utf-8")).render(
        title=f"{type(sae).__name__} on {summary['model']}",
        subtitle=f"layer {cell.layer}, head {cell.head}: {site.kind}s of {cell.d_k} x {cell.d_v}, "
        f"{sae.cfg.d_sae:,} atoms",
        verdict=verdict(summary),
        cards=_cards(found),
        recipe=recipe,
        made=_made(sae, dict(recipe)),
        training=_training_image(training),
        sections=[_section(result) for result in sorted(shown, key=lambda r: list(QUESTIONS).index(r.name))],
        columns=[dict(zip(("key", "label", "about", "digits"), column)) for column in COLUMNS],
        n_atoms=len(table),
        data=_as_json(_payload(model, table, decoder, records, cell.d_k, cell.d_v)),
        plotly=get_plotlyjs(),
        script=source.joinpath("report.js").read_text(encoding="utf-8"),
        code=code,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PAGE, lambda path: path.write_text(html, encoding="utf-8"))
    for folder in missing.values():  # only now: what was finished before an interruption is not done again
        Progress.clear(folder / "progress")
    return out / PAGE


def saved_results(folder: str | Path) -> list[ExperimentResult]:
    """The result in a folder, or those in its subfolders (what `writesae-lens reproduce` writes).

    Raises:
        WriteSAEError: there are none, or one does not read.
    """
    folder = Path(folder)
    if (folder / "summary.json").is_file() or not folder.is_dir():
        return [ExperimentResult.load(folder)]
    inside = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not inside:
        raise WriteSAEError(f"{folder} holds no results of experiments, and neither do its subfolders")
    return [ExperimentResult.load(path) for path in inside]


def _check_fits(result: ExperimentResult, model: HookedRecurrent, sae: SAE[Any]) -> None:
    if result.name not in QUESTIONS:
        raise WriteSAEError(f"no experiment is called {result.name!r}: there are {', '.join(QUESTIONS)}")
    summary, name, hook = result.summary, model.cfg.model_name, sae.cfg.metadata.hook_name
    hooks = summary.get("hook_name") or []
    hooks = [hooks] if isinstance(hooks, str) else hooks
    # By cell: sign test and install are of a cell's writes, whatever the SAE is trained on.
    cells = [model.site(h).cell for h in hooks] if summary.get("model") == name else []
    if model.site(hook).cell not in cells:
        there = f"{' and '.join(hooks)} of {summary.get('model')}"
        raise WriteSAEError(f"the {result.name} result is of {there}, not of {hook} of {name}")
    prints = summary.get("sae_fingerprints")
    n_atoms = sae.cfg.d_sae
    largest = result.records["atom"].to_numpy().max() if "atom" in result.records else 0
    wrong_size = int(largest) >= n_atoms or (result.name == "partition" and len(result.records) != n_atoms)
    if wrong_size or (prints and fingerprint(*sae.state_dict().values()) not in prints):
        raise WriteSAEError(f"the {result.name} result is of another SAE on {hook} than this one")


def verdict(summary: dict[str, Any]) -> str:
    """What a replacement test's numbers amount to."""
    # Of one passage there is no interval over passages, but one over firings.
    rate, ends = summary["win_rate"], summary["win_rate_ci_by_passage"]
    over, (low, high) = ("passages", ends) if ends else ("firings", summary["win_rate_ci"])
    if low > 0.5:
        answer = "Yes: one atom keeps the model nearer to itself than deleting the write does."
    elif high < 0.5:
        answer = "No: deleting the write does less harm than putting the atom in its place."
    else:
        answer = "Undecided: atom and deletion cannot be told apart on these firings."
    paper_rate, paper_model = PAPER_WIN_RATES[summary["architecture"]]
    compared = "above" if rate > paper_rate else "below"
    return (
        f"{answer} The atom does less harm at {rate:.1%} of firings (95% interval over {over} {low:.1%} to "
        f"{high:.1%}). That is {compared} the {paper_rate:.1%} that the paper reports on {paper_model}."
    )


def _cards(found: dict[str, ExperimentResult]) -> list[tuple[str, str]]:
    tested, divided = found["replacement"].summary, found["partition"].summary
    low, high = tested["win_rate_ci"]
    n_atoms = sum(divided[f"n_{name}"] for name in ("register", "bundle", "rare", "dead"))
    return [
        (f"{tested['win_rate']:.1%}", f"win rate (over firings {low:.1%} to {high:.1%})"),
        (f"{tested['strict_chain_rate']:.1%}", "strict chain: atom < deleted < random"),
        (f"{tested['median_cosine']:.2f}", "median cosine of atom and write"),
        (f"{n_atoms - divided['n_dead']:,}", f"of {n_atoms:,} atoms are ever the strongest here"),
        (f"{divided['n_register']:,} / {divided['n_bundle']:,}", "registers / bundles"),
    ]


def _recipe(sae: SAE[Any], training: str | Path | None) -> list[tuple[str, str]]:
    """The SAE's settings, and its training's where they are known."""
    cfg, metadata = sae.cfg.to_dict(), sae.cfg.metadata
    rows = {name: cfg[name] for name in ("architecture", "d_sae", "k", "rank", "encoder", "decoder",
                                         "activation", "d_k", "d_v") if name in cfg}  # fmt: skip
    rows |= {"model": metadata.model_name, "hook": metadata.hook_name, "context size": metadata.context_size}
    rows |= metadata.training_architecture_details or {}
    # SAELens writes it once for several SAEs, beside their folders.
    places = [] if training is None else [Path(training), Path(training).parent]
    path = next((p / "runner_cfg.json" for p in places if (p / "runner_cfg.json").is_file()), None)
    if path is not None:
        run = json.loads(path.read_text(encoding="utf-8"))
        wanted = ("training_tokens", "train_batch_size_tokens", "lr", "lr_warm_up_steps", "lr_decay_steps",
                  "dead_feature_window", "seed", "dtype")  # fmt: skip
        rows |= {name: run[name] for name in wanted if name in run}
    rows |= {"trained with SAELens": metadata.sae_lens_training_version, "provenance": metadata.provenance}
    return [(name.replace("_", " "), f"{value}") for name, value in rows.items() if value is not None]


def _made(sae: SAE[Any], recipe: dict[str, str]) -> str:
    """The settings that matter, as a sentence."""
    parts = [f"{sae.cfg.d_sae:,} atoms"]
    if recipe.get("decoder") == "factored":
        parts.append(f"of rank {recipe['rank']}")
    often = {"topk": "", "batchtopk": "on average "}.get(recipe.get("activation", ""))
    if "k" in recipe and often is not None:
        parts.append(f"with {often}{recipe['k']} of them active at a time")
    line = " ".join(parts)
    tokens = recipe.get("training tokens")
    return f"{line}, trained on {int(tokens):,} inputs." if tokens else f"{line}."


def _training_image(training: str | Path | None) -> str | None:
    path = None if training is None else Path(training) / history.FILE
    if path is None or not path.is_file():
        return None
    return _image(figures.plot_training(read_table(path)))


def _section(result: ExperimentResult) -> dict[str, Any]:
    """A result on the page: headline, figures, and its plain numbers in a table to unfold."""
    numbers = [
        (name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
        for name, value in result.summary.items()
        if name != "headline" and isinstance(value, (int, float, str, list))
    ]
    shown = [number for number in numbers if len(number[1]) < 200]
    images = [(stem.replace("_", " "), _image(draw(result))) for stem, draw in result.figures.items()]
    method = _method(result.summary) if result.name == "replacement" else []
    return {
        "name": result.name,
        "question": QUESTIONS[result.name],
        "headline": result.headline,
        "method": method,
        "images": images,
        "numbers": shown,
    }


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


def _payload(
    model: HookedRecurrent,
    table: pd.DataFrame,
    decoder: Profiles,
    records: dict[str, pd.DataFrame],
    d_k: int,
    d_v: int,
) -> dict[str, Any]:
    """What the browser of atoms shows, short: numbers with few digits, profiles as bytes."""
    keys = [key for key, *_ in COLUMNS]
    frame = table.reset_index().rename(columns={"index": "atom"})[keys]
    digits = {key: count for key, *_, count in COLUMNS}
    rows = [
        [_short(value, digits[key]) for key, value in zip(keys, row)]
        for row in frame.itertuples(index=False, name=None)
    ]
    used = decoder.tokens.unique().tolist()
    tokenizer = model.tokenizer
    texts = {i: "" if tokenizer is None else str(tokenizer.decode([i])) for i in used}
    # What is no text of its own goes by its number.
    texts = {i: text if text and "\ufffd" not in text else f"token {i}" for i, text in texts.items()}
    return {
        "d_k": d_k,
        "d_v": d_v,
        "columns": keys,
        "rows": rows,
        "key": _bytes(decoder.key),
        "value": _bytes(decoder.value),
        "read": _numbers(decoder.read_share, 2),
        "rank1": _numbers(decoder.rank1_share, 2),
        "texts": texts,
        "tokens": decoder.tokens.tolist(),
        "logits": _numbers(decoder.logits, 3),
        "near": decoder.neighbours.tolist(),
        "cosines": _numbers(decoder.cosines, 3),
        "contexts": _contexts(records["contexts"]),
        "firings": _firings(records["replacement"]),
    }


def _contexts(records: pd.DataFrame) -> dict[int, list[list[Any]]]:
    """By atom: text before, the token, text after, coefficient, cosine, whether it is the strongest there."""
    found: dict[int, list[list[Any]]] = {}
    texts = records[["text_before", "text", "text_after"]].fillna("")
    texts["text"] = texts.text.where(texts.text != "", "token " + records.token.astype(str))
    rows = zip(
        records.atom, *(texts[name] for name in texts), records.coefficient, records.cosine, records.dominant
    )
    for atom, before, text, after, coefficient, cosine, dominant in rows:
        line = [before, text, after, _short(coefficient, 3), _short(cosine, 2), int(bool(dominant))]
        found.setdefault(int(atom), []).append(line)
    return found


def _firings(records: pd.DataFrame) -> dict[int, list[list[Any]]]:
    """By atom: cosines, log10 of the KLs with the atom and without the write, and whether the atom wins."""
    columns = pd.DataFrame(
        {
            "atom": records.atom,
            "cosine": records.cosine.round(3),
            "with": np.log10(records.kl_atom.clip(lower=_FLOOR)).round(2),
            "without": np.log10(records.kl_delete.clip(lower=_FLOOR)).round(2),
            "wins": (records.kl_atom < records.kl_delete).astype(int),
        }
    )
    found = {}
    for atom, part in columns.groupby("atom"):
        some = part if len(part) <= _MOST_FIRINGS else part.sample(_MOST_FIRINGS, random_state=0)
        found[int(str(atom))] = [some[name].tolist() for name in ("cosine", "with", "without", "wins")]
    return found


def _short(value: Any, digits: int | None) -> Any:
    if digits is None or value is None or isinstance(value, str):
        return value if isinstance(value, str) else None
    if not np.isfinite(value):
        return None
    return int(value) if digits == 0 else float(f"{value:.{digits}g}" if digits > 2 else f"{value:.3f}")


def _numbers(values: Tensor, digits: int) -> list[Any]:
    return np.round(values.double().cpu().numpy(), digits).tolist()


def _bytes(vectors: Tensor) -> str:
    """Rows as signed bytes, each scaled to its largest entry, for pictures."""
    scaled = vectors / vectors.abs().amax(1, keepdim=True).clamp(min=1e-30) * 127
    return base64.b64encode(scaled.round().cpu().numpy().astype(np.int8).tobytes()).decode()


def _as_json(payload: dict[str, Any]) -> str:
    """JSON that may stand in a script element, whatever the texts hold."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _image(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.as_png(figure, 130)).decode()
