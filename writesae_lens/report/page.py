"""One self-contained HTML page about an SAE: its training, the results of its experiments, and every atom."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Int
from plotly.offline import get_plotlyjs
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent, zoo
from hooked_models.files.whole_files import replacing
from hooked_models.hooked_recurrent import Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS, find_experiment
from writesae_lens.experiments.features.meets import met_by_distance, reads_met
from writesae_lens.experiments.firings import activity, is_codes
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.passages import Passages, find_passages
from writesae_lens.experiments.result import RECORDS, SUMMARY, ExperimentResult, Progress
from writesae_lens.experiments.run import fingerprint_sae
from writesae_lens.experiments.subjects import find_site
from writesae_lens.locks import locked
from writesae_lens.report import again, sections
from writesae_lens.report.atoms import profiles
from writesae_lens.report.browser import as_json, browser_data, text_data
from writesae_lens.report.columns import columns_of, table_of_atoms
from writesae_lens.report.effects import measure_effects
from writesae_lens.report.measured_on import cautions, check_weights, differences
from writesae_lens.report.samples import read_uses, samples, token_texts
from writesae_lens.report.template import fill_in
from writesae_lens.use.labels import labels_of

PAGE = "report.html"
# Experiments whose results the page cannot be made without; they are run if no result is given.
NEEDED = ("replace", "partition", "contexts")
# The last step of a page: what its browser of features shows is measured.
BROWSER = "the browser of features"


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
    reference: str | None = None,
    command: str = "",
) -> Path:
    """Write report.html: an overview, every given result, and a browser of all atoms or codes.

    The page is one file that needs no network. The replacement test, the partition and the top contexts are
    run on ``tokens`` if they are not among ``results``, and saved in ``out``/results; an interrupted call
    goes on from there when it is made again.

    Args:
        out: folder of the page.
        model: the model that the SAE was trained on.
        sae: any SAE on a cell's writes, or on its states.
        tokens: passages ``[passage, pos]``, or a text.
        results: of experiments on this SAE (see `saved_results`).
        training: folder of the SAE, for its training curves (training.csv) and settings (runner_cfg.json).
        code: Python code, shown at the end of the page, that makes it again ("": the call of this function).
        context_size: tokens of a passage, for text (None: the SAE's own, else 256).
        seed: of the experiments that are run.
        verbose: show progress bars, and which step of how many they are of.
        reference: what the lines of code on the page load the SAE from, as after --sae: a folder, a best.pt
            or RELEASE:ID (None: ``training``).
        command: the command, shown beside ``code`` ("": that of ``writesae-lens report``).

    Returns:
        the path of the page.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, or a result is of another SAE, or of a
            model with other weights.

    Warns:
        ResultWarning: a result is of another text or number format; the page says so too.
    """
    out = Path(out)
    site, passages = find_site(model, sae), find_passages(model, sae, tokens, context_size)
    for result in results:
        _check_fits(result, model, sae)
    check_weights(results, model)
    for line in differences(results, model, passages):
        warnings.warn(line, ResultWarning, stacklevel=2)
    reference = reference or (None if training is None else str(training))
    own = again.of_report(model, [sae], passages, [reference], out, seed)
    by_name = {find_experiment(result.name).name: result for result in reversed(results)}
    run = {name: Path("results", name) for name in NEEDED if name not in by_name}
    steps = [*run, BROWSER]
    with locked(out):
        for name, folder in run.items():
            say_step(name, steps, verbose)
            progress = str(out / folder / "progress")
            by_name[name] = EXPERIMENTS[name].function(
                model, sae, passages, seed=seed, progress_folder=progress, verbose=verbose
            )
        shown = [*results, *(by_name[name] for name in run)]
        needed = [by_name[name] for name in NEEDED]
        lines = again.Again(command or own.command, code or own.python)
        say_step(BROWSER, steps, verbose)
        html = _render(model, sae, site, passages, shown, needed, training, reference, lines, verbose)
        with replacing(out, (SUMMARY, PAGE), _other_results_in(out, shown)) as beside:
            for name, folder in run.items():
                by_name[name].save(beside / folder)
            (beside / PAGE).write_text(html, encoding="utf-8")
        for folder in run.values():  # last, so that an interruption before it loses nothing
            Progress.clear(out / folder / "progress")
    return out / PAGE


def say_step(step: str, steps: Sequence[str], verbose: bool) -> None:
    """Say on stderr which of a page's steps begins, and how many there are: each has progress bars."""
    if verbose:
        tqdm.write(f"Step {steps.index(step) + 1} of {len(steps)}: {step}", file=sys.stderr)


def _other_results_in(out: Path, shown: Sequence[ExperimentResult]) -> list[Path]:
    """Files of results that an earlier page in the folder was made from, and this one is not."""
    files = []
    for name in NEEDED:
        folder = out / "results" / name
        with contextlib.suppress(WriteSAEError):
            summary = ExperimentResult.load(folder).summary
            if not any(result.summary == summary for result in shown):
                pictures = (f"{stem}.png" for stem in EXPERIMENTS[name].figures)
                files += [folder / file for file in (RECORDS, SUMMARY, *pictures)]
    return files


def saved_results(folder: str | Path) -> list[ExperimentResult]:
    """The result in a folder, or those in its subfolders (as `writesae-lens reproduce` writes them).

    Raises:
        WriteSAEError: there are none, or one of them is damaged.
    """
    folder = Path(folder)
    if (folder / "summary.json").is_file() or not folder.is_dir():
        return [ExperimentResult.load(folder)]
    subfolders = sorted(path.parent for path in folder.glob("*/summary.json"))
    if not subfolders:
        raise WriteSAEError(f"{folder} holds no results of experiments, and neither do its subfolders")
    return [ExperimentResult.load(path) for path in subfolders]


def _check_fits(result: ExperimentResult, model: HookedRecurrent, sae: SAE[Any]) -> None:
    """Refuse a result of an unknown experiment, or of another model, cell or SAE."""
    find_experiment(result.name)
    summary, model_name, hook = result.summary, model.cfg.model_name, sae.cfg.metadata.hook_name
    hooks = summary.get("hook_name") or []
    hooks = [hooks] if isinstance(hooks, str) else hooks
    # Cells are compared, not hooks: sign test and install name the write, whatever the SAE is trained on.
    cells = [model.site(h).cell for h in hooks] if summary.get("model") == model_name else []
    if model.site(hook).cell not in cells:
        measured_on = f"{' and '.join(hooks)} of {summary.get('model')}"
        raise WriteSAEError(f"the {result.name} result is of {measured_on}, not of {hook} of {model_name}")
    fingerprints = summary.get("sae_fingerprints")
    n_atoms = sae.cfg.d_sae
    largest = result.records["atom"].to_numpy().max() if "atom" in result.records else 0
    wrong_size = int(largest) >= n_atoms or (result.name == "partition" and len(result.records) != n_atoms)
    if wrong_size or (fingerprints and fingerprint_sae(sae) not in fingerprints):
        raise WriteSAEError(f"the {result.name} result is of another SAE on {hook} than this one")


def _met(
    model: HookedRecurrent, sae: SAE[Any], site: Site, passages: Int[Tensor, "passage pos"]
) -> pd.DataFrame:
    """How the reads that meet each key code are spread over the tokens that follow a write."""
    met = [reads_met(model, sae, site.cell, p, activity(model, sae, site, p)) for p in passages]
    return met_by_distance(pd.concat(met, ignore_index=True))


def _render(
    model: HookedRecurrent,
    sae: SAE[Any],
    site: Site,
    passages: Passages,
    shown: Sequence[ExperimentResult],
    needed: Sequence[ExperimentResult],
    training: str | Path | None,
    reference: str | None,
    lines: again.Again,
    verbose: bool,
) -> str:
    """The page's HTML: report.html, filled in."""
    replacement, partition, contexts = needed
    cell, settings = site.cell, sections.training_settings(sae, training)
    decoder = profiles(model, sae, cell, passages, verbose=verbose)
    labels = labels_of(sae)
    table = table_of_atoms(partition.records, replacement.records, contexts.records, decoder, labels)
    effects = measure_effects(model, sae, site, passages, verbose=verbose)
    columns = columns_of(partition.records, labels)
    met = _met(model, sae, site, passages) if is_codes(sae) else None
    shown_uses = samples(read_uses(model, sae, site, passages, verbose), passages.shape[1])
    data = browser_data(model, table, columns, decoder, effects, shown_uses, replacement.records, met, labels)
    data |= {
        "text": text_data(token_texts(model, passages), passages.shape[1]),
        "loading": again.loading(model, {"sae": reference}),
        "reading": again.reading(passages, sae),
        "shipped": model.cfg.model_name in zoo.SHIPPED,
        "on_states": site.kind == "state",
    }
    what = "codes" if is_codes(sae) else "atoms"
    headings, rows = sections.standings(replacement.summary)

    def position(result: ExperimentResult) -> int:
        return list(EXPERIMENTS).index(find_experiment(result.name).name)

    return fill_in(
        "report.html",
        title=f"{type(sae).__name__} on {model.cfg.model_name}",
        subtitle=f"layer {cell.layer}, head {cell.head}: {site.kind}s of {cell.d_k} x {cell.d_v}, "
        f"{sae.cfg.d_sae:,} {what}{', n-gram tables by construction' if not cell.layer else ''}",
        about_sae=sections.about_sae(reference, settings),
        firings=sections.firings_read(replacement),
        text=f"{passages.text}: {len(passages):,} passages of {passages.shape[1]:,} tokens",
        notices=[*differences(shown, model, passages), *cautions(shown)],
        verdict=sections.verdict(replacement.summary),
        cards=sections.main_numbers(replacement.summary, partition.summary),
        settings=settings.items(),
        trained=sections.training_sentence(sae, settings),
        training=sections.training_curves(training),
        sections=[sections.section(result) for result in sorted(shown, key=position)],
        headings=headings,
        standings=rows,
        guards=sections.guards(replacement.summary),
        what=what,
        labelled=bool(labels),
        columns=columns,
        n_atoms=len(table),
        data=as_json(data),
        plotly=get_plotlyjs(),
        again=lines,
    )
