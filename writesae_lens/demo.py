"""The main job on a shipped model, as a user would write it: train, test by replacement, write the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo
from hooked_models.files.whole_files import replacing
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import ExperimentResult, replacement_test
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import SUMMARY
from writesae_lens.locks import locked
from writesae_lens.report import again
from writesae_lens.report.page import PAGE, make_report
from writesae_lens.saelens.runner import train_cells
from writesae_lens.saelens.saving import note_output_path
from writesae_lens.saes.config import WriteSAETrainingConfig
from writesae_lens.saes.whole import CONFIG

# Of the replacement test: a firing's effect is followed over the tokens after it, which costs a pass each.
TEST_PASSAGES, MAX_FIRINGS, HORIZON = 64, 512, 32


def run_demo(
    out: str | Path,
    model_name: str = "tiny-gdn",
    cell: tuple[int, int] | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    training_tokens: int = zoo.TRAINING_TOKENS,
    seed: int = 0,
) -> ExperimentResult:
    """Train a WriteSAE on text that a shipped model never saw, run the replacement test, write a report.

    The files of an earlier demo in ``out`` stay until all new ones are made, and then give way to them.

    Args:
        out: folder for sae/ (SAELens's format), records.csv, summary.json, PNG figures, report.html, and the
            results that the page also shows (results/).
        model_name: a shipped model.
        cell: (layer, head); None is `zoo.DEFAULT_CELLS`'s.
        d_sae, k: codes in the dictionary, and codes active on each write, half of them for keys and half for
            values (None: as in the recommended recipe).
        training_tokens: writes to train on; the text is read again as often as that takes.
        seed: of everything random.

    Raises:
        WriteSAEError: the model does not ship, or has no such cell; another run is writing to ``out``.
    """
    if model_name not in zoo.SHIPPED:
        raise WriteSAEError(
            f"the demo runs on shipped models ({', '.join(zoo.SHIPPED)}), got {model_name!r}; for others "
            "use the Python interface"
        )
    out = Path(out)
    model = HookedRecurrent.boot_transformers(model_name, device="cpu")
    chosen = model.cell(*(cell or zoo.DEFAULT_CELLS[model_name]))
    sizes = {name: size for name, size in (("d_sae", d_sae), ("k", k)) if size is not None}
    # All files are made beside their places, so that they never stand beside those of another run.
    with locked(out), replacing(out, (CONFIG, SUMMARY, PAGE)) as beside:
        (folder,) = train_cells(
            model,
            [chosen],
            beside / "sae",
            training_tokens,
            lambda c: WriteSAETrainingConfig.recommended(d_k=c.d_k, d_v=c.d_v, **sizes),
            seed=seed,
        )
        note_output_path(folder, out / "sae")
        sae = SAE.load_from_disk(folder)
        passages = as_passages(model, "\n\n".join(zoo.shipped_text()[1]), sae.cfg.metadata.context_size)
        passages = passages[:TEST_PASSAGES]
        result = replacement_test(model, sae, passages, horizon=HORIZON, max_firings=MAX_FIRINGS, seed=seed)
        result.save(beside)
        given: dict[str, Any] = {"cell": cell, "d_sae": d_sae, "k": k, "seed": seed or None}
        if training_tokens != zoo.TRAINING_TOKENS:
            given["training_tokens"] = training_tokens
        command, code = _again(out, model_name, given)
        about: dict[str, Any] = {
            "seed": seed,
            "reference": str(out / "sae"),
            "command": command,
            "code": code,
        }
        make_report(beside, model, sae, passages, [result], folder, **about)
    return result


def _again(out: Path, model_name: str, given: Mapping[str, Any]) -> again.Again:
    """The command of the demo and the call of `run_demo`, with the options that are not None."""
    given = {name: value for name, value in given.items() if value is not None}
    options = [
        (f"--{name.replace('_', '-')}", ":".join(map(str, value)) if name == "cell" else value)
        for name, value in given.items()
    ]
    arguments = [again.quoted(str(out)), again.quoted(model_name)]
    arguments += [f"{name}={value!r}" for name, value in given.items()]
    return again.Again(
        again.command("demo", [("--model", model_name), ("--out", out), *options]),
        f"from writesae_lens.demo import run_demo\n\nrun_demo({', '.join(arguments)})",
    )
