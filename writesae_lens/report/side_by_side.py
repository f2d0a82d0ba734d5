"""One self-contained HTML page about two SAEs of a cell: measures, matched features, and their contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.files.whole_files import replacing
from writesae_lens import statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, find_experiment
from writesae_lens.experiments.features.sides import (
    PLURALS,
    features_by_side,
    firings_by_feature,
    side_of,
)
from writesae_lens.experiments.firings import is_codes
from writesae_lens.experiments.passages import Passages, find_passages
from writesae_lens.experiments.result import SUMMARY, ExperimentResult, Progress
from writesae_lens.experiments.run import fingerprint_sae
from writesae_lens.experiments.stability import LOOKUP, NOISE, THRESHOLDS
from writesae_lens.experiments.stand_ins import TITLES
from writesae_lens.experiments.subjects import find_site
from writesae_lens.experiments.swaps import above_floor
from writesae_lens.locks import locked
from writesae_lens.report import again, sections
from writesae_lens.report.atoms import profiles
from writesae_lens.report.browser import as_json, rounded, text_data, token_data
from writesae_lens.report.effects import measure_effects
from writesae_lens.report.measured_on import cautions, check_weights, differences
from writesae_lens.report.page import BROWSER, say_step
from writesae_lens.report.samples import Uses, read_uses, samples, token_texts
from writesae_lens.report.template import fill_in
from writesae_lens.use.labels import labels_of

PAGE = "side_by_side.html"
# Of the comparison that is run for the page: later effects cost a pass a token, and few firings say enough.
_MAX_FIRINGS, _HORIZON = 512, 32
_N_TOKENS = 6
_MEASURES = (
    ("median_recovered", "recovered in the median, own position"),
    ("median_recovered_later", "recovered in the median, later positions"),
    ("median_recovered_both", "recovered in the median, own and later"),
    ("recovered", "recovered, pooled, own position"),
    ("win_rate", "win rate, own position"),
    ("coverage", "tokens at which it fires"),
)


def make_side_by_side(
    out: str | Path,
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]],
    tokens: Int[Tensor, "passage pos"] | str,
    results: Sequence[ExperimentResult] = (),
    context_size: int | None = None,
    seed: int = 0,
    verbose: bool = True,
    code: str = "",
    command: str = "",
) -> Path:
    """Write side_by_side.html: what two SAEs of a cell recover, which features they share, contexts.

    The page is one file that needs no network. The comparison on the same firings (`compare`) and the
    matching of features (`stability`) are run on ``tokens`` if they are not among ``results``, and saved in
    ``out``/results; an interrupted call goes on from there when it is made again.

    Args:
        out: folder of the page.
        model: the model that the SAEs were trained on.
        saes: two SAEs by name, of one cell, both of atoms or both of codes.
        tokens: passages ``[passage, pos]``, or a text.
        results: of `compare` and `stability` on these SAEs, in this order and under these names.
        context_size: tokens of a passage, for text (None: as the first SAE was trained, else 256).
        seed: of the experiments that are run.
        verbose: show progress bars, and which step of how many they are of.
        code: Python code, shown on the page, that makes it again ("": the call of this function).
        command: the command, shown beside it ("": that of ``writesae-lens report``).

    Returns:
        the path of the page.

    Raises:
        WriteSAEError: there are not two SAEs of one cell and kind, one does not fit, the text is too short,
            or a result is of other SAEs, of another experiment, or of a model with other weights.
    """
    if not isinstance(saes, Mapping) or len(saes) != 2:
        n = len(saes) if isinstance(saes, Mapping) else "no mapping"
        raise WriteSAEError(f"a page compares two SAEs, {{name: sae, name: sae}}, got {n}")
    out, first = Path(out), next(iter(saes.values()))
    passages = find_passages(model, first, tokens, context_size)
    by_name = _by_name(saes, results)
    check_weights(results, model)
    options: dict[str, dict[str, Any]] = {
        "stability": {},  # first: it refuses what cannot be matched
        "compare": {
            "random": ("atom",),
            "max_firings": _MAX_FIRINGS,
            "horizon": _HORIZON if passages.shape[1] > 2 * _HORIZON else 0,
        },
    }
    run = {name: Path("results", name) for name in options if name not in by_name}
    references = [name if Path(name).exists() or ":" in name else None for name in saes]
    lines = again.of_report(model, list(saes.values()), passages, references, out, seed)
    steps = [*run, BROWSER]
    with locked(out):
        for name, folder in run.items():
            say_step(name, steps, verbose)
            progress = str(out / folder / "progress")
            by_name[name] = EXPERIMENTS[name].function(
                model, saes, passages, seed=seed, progress_folder=progress, verbose=verbose, **options[name]
            )
        lines = again.Again(command or lines.command, code or lines.python)
        say_step(BROWSER, steps, verbose)
        html = _render(model, saes, passages, by_name["compare"], by_name["stability"], lines, verbose)
        with replacing(out, (SUMMARY, PAGE)) as beside:
            for name, folder in run.items():
                by_name[name].save(beside / folder)
            (beside / PAGE).write_text(html, encoding="utf-8")
        for folder in run.values():  # last, so that an interruption before it loses nothing
            Progress.clear(out / folder / "progress")
    return out / PAGE


def _by_name(
    saes: Mapping[str, SAE[Any]], results: Sequence[ExperimentResult]
) -> dict[str, ExperimentResult]:
    """The given results by experiment.

    Raises:
        WriteSAEError: one is of another experiment, or of other SAEs.
    """
    by_name, own = {}, [fingerprint_sae(sae) for sae in saes.values()]
    for result in results:
        name = find_experiment(result.name).name
        if name not in ("compare", "stability"):
            raise WriteSAEError(
                f"a page of two SAEs shows results of compare and stability, and this is one of {name}: "
                "leave it out"
            )
        summary = result.summary
        if summary.get("sae_fingerprints") != own or summary.get("names") != list(saes):
            raise WriteSAEError(f"the {name} result is of other SAEs, or they stand in another order there")
        by_name[name] = result
    return by_name


def _render(
    model: HookedRecurrent,
    saes: Mapping[str, SAE[Any]],
    passages: Passages,
    comparison: ExperimentResult,
    matching: ExperimentResult,
    lines: again.Again,
    verbose: bool,
) -> str:
    """The page's HTML: side_by_side.html, filled in."""
    sites = [find_site(model, sae) for sae in saes.values()]
    cell, first = sites[0].cell, next(iter(saes.values()))
    uses = [
        read_uses(model, sae, site, passages, verbose) for sae, site in zip(saes.values(), sites, strict=True)
    ]
    shown = (comparison, matching)
    data = {
        "names": list(saes),
        "of_codes": is_codes(first),
        "thresholds": list(THRESHOLDS.values()),
        "text": text_data(token_texts(model, passages), passages.shape[1]),
        "saes": [
            _features(model, name, sae, passages, own, comparison.records, verbose)
            for (name, sae), own in zip(saes.items(), uses, strict=True)
        ],
        "pairs": _pairs(saes, uses, matching.records),
    }
    what = "codes" if is_codes(first) else "atoms"
    return fill_in(
        "side_by_side.html",
        title=f"Two SAEs on {model.cfg.model_name}",
        subtitle=f"layer {cell.layer}, head {cell.head}: {sites[0].kind}s of {cell.d_k} x {cell.d_v}",
        names=list(saes),
        text=f"{passages.text}: {len(passages):,} passages of {passages.shape[1]:,} tokens",
        notices=[*differences(shown, model, passages), *cautions(shown)],
        verdict=f"{_standing(saes, comparison.summary)} {_shared(matching.summary)}",
        measures=_measures(saes, uses, comparison.summary, matching.records, passages.numel()),
        settings=_settings(saes),
        sections=[sections.section(result) for result in shown],
        what=what,
        n_pairs=len(data["pairs"]),
        thresholds=list(THRESHOLDS.values()),
        data=as_json(data),
        again=lines,
    )


def _features(
    model: HookedRecurrent,
    name: str,
    sae: SAE[Any],
    passages: Passages,
    uses: Uses,
    comparison: pd.DataFrame,
    verbose: bool,
) -> dict[str, Any]:
    """What the page shows of one SAE's features: contexts, tokens, labels, what their stand-ins recover."""
    site = find_site(model, sae)
    decoder = profiles(model, sae, site.cell, passages, n_tokens=_N_TOKENS, verbose=verbose)
    effects = measure_effects(model, sae, site, passages, n_tokens=_N_TOKENS, verbose=verbose)
    rows = comparison.loc[comparison["name"] == name].rename(columns={"kl": "kl_atom"})
    tested = firings_by_feature(rows)
    tested = tested[above_floor(tested)]
    recovered = (1 - tested.kl_atom / tested.kl_delete).groupby(tested.atom).median()
    return {
        "samples": samples(uses, passages.shape[1]),
        "labels": labels_of(sae),
        "recovered": {int(n): rounded(value, 3) for n, value in zip(recovered.index, recovered)},
        **token_data(model, decoder, effects),
    }


def _pairs(saes: Mapping[str, SAE[Any]], uses: Sequence[Uses], matching: pd.DataFrame) -> list[list[Any]]:
    """Rows of side, both SAEs' features and their cosine; features without a partner stand alone."""
    first, second = saes.values()
    records = _matched(saes, matching)
    pairs = [
        [side, int(a), int(b), round(float(cosine), 3)]
        for side, a, b, cosine in zip(records.side, records.feature, records.match, records.cosine)
    ]
    alone = [set(own.feature.tolist()) for own in uses]
    alone[0] -= set(records.feature)
    alone[1] -= set(records.match)
    pairs += [[side_of(first, n), n, None, None] for n in sorted(alone[0])]
    return pairs + [[side_of(second, n), None, n, None] for n in sorted(alone[1])]


def _matched(saes: Mapping[str, SAE[Any]], matching: pd.DataFrame) -> pd.DataFrame:
    """The pairs of the two SAEs among the records of `stability`."""
    one, other = saes
    return matching.loc[(matching["first"] == one) & (matching["second"] == other)]


def _standing(saes: Mapping[str, SAE[Any]], summary: Mapping[str, Any]) -> str:
    """What both recover on the same firings, in words."""
    rows = {row["name"]: row for row in summary["table"]}
    parts = []
    for name in (*saes, LOOKUP):
        if name in rows:
            both = statistics.share(rows[name].get("median_recovered_both", rows[name]["median_recovered"]))
            parts.append(f"{TITLES.get(name, name)} {both}")
    what = (
        f"at the own position and over the next {summary['horizon']} tokens"
        if summary["horizon"]
        else ("at the own position")
    )
    return f"Recovered in the median, {what}: {', '.join(parts)}."


def _shared(summary: Mapping[str, Any]) -> str:
    """How many features have a partner in the other SAE, beside what chance gives."""
    table, parts = summary["table"], []
    by_chance = {row["side"]: row for row in table if row["first"] == LOOKUP and row["second"] == LOOKUP}
    for row in (row for row in table if row["second"] not in (LOOKUP, NOISE)):
        chance = by_chance.get(row["side"], {})
        share, usual = (statistics.share(each.get("share_above_07")) for each in (row, chance))
        parts.append(f"{share} of the active {PLURALS[row['side']]} (of two untrained lookups {usual})")
    return f"{' and '.join(parts)} have a partner with a cosine above 0.7 in the other SAE."


def _measures(
    saes: Mapping[str, SAE[Any]],
    uses: Sequence[Uses],
    summary: Mapping[str, Any],
    matching: pd.DataFrame,
    n_positions: int,
) -> list[list[str]]:
    """Rows of the table of measures: a label, both SAEs, and the untrained lookup where it has the figure."""
    rows = {row["name"]: row for row in summary["table"]}
    names = [*saes, LOOKUP]

    def shown(name: str, key: str) -> str:
        row = rows.get(name, {})
        if row.get(key) is None:
            return "–"
        return f"{row[key]:.1%}{statistics.between(row.get(f'{key}_ci'), '.1%')}"

    table = [
        [label, *(shown(name, key) for name in names)]
        for key, label in _MEASURES
        if any(rows[name].get(key) is not None for name in saes)
    ]
    cosines = (f"{rows[name]['median_cosine']:.2f}" if name in rows else "–" for name in names)
    table.append(["median cosine of stand-in and write", *cosines])
    records, ends = _matched(saes, matching), ("feature", "match")
    for side, plural in PLURALS.items():
        features = [features_by_side(sae).get(side, range(0)) for sae in saes.values()]
        if not features[0]:
            continue
        own = [
            use.feature[(use.feature >= f.start) & (use.feature < f.stop)] for use, f in zip(uses, features)
        ]
        active = [len(np.unique(each)) for each in own]
        table.append([plural, *(f"{len(f):,}" for f in features), "–"])
        table.append([f"{plural} active in this text", *(f"{n:,}" for n in active), "–"])
        table.append([f"active {plural} a token", *(f"{len(x) / n_positions:.1f}" for x in own), "–"])
        for threshold in THRESHOLDS.values():
            near = records[(records.side == side) & (records.cosine > threshold)]
            shares = (near[end].nunique() / max(1, n) for end, n in zip(ends, active, strict=True))
            table.append(
                [f"active {plural} with a partner above {threshold}", *(f"{x:.1%}" for x in shares), "–"]
            )
    return table


def _settings(saes: Mapping[str, SAE[Any]]) -> list[tuple[str, str, str, bool]]:
    """Both SAEs' settings, and whether they differ; those that do come first."""
    both = [
        sections.training_settings(sae, name if Path(name).is_dir() else None) for name, sae in saes.items()
    ]
    rows = [
        (name, both[0].get(name, "–"), both[1].get(name, "–"), both[0].get(name) != both[1].get(name))
        for name in dict.fromkeys(name for own in both for name in own)
    ]
    return sorted(rows, key=lambda row: not row[3])
