"""An experiment under way: its settings, and its parts, kept as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.inputs import fingerprint, fingerprint_run
from writesae_lens.experiments.result import ExperimentResult, Progress


class Run:
    """What the experiments share on their way out: a loop over parts that resumes, and the result's settings.

    Args:
        name: the experiment.
        model: the model.
        subject: the SAE, SAEs or cell that it is about.
        tokens: passages or prompts.
        folder: keeps finished parts, and resumes from them.
        verbose: show progress bars.
        settings: whatever else the records depend on; they end up in the result's summary.

    Raises:
        WriteSAEError: the folder holds parts made with other settings.
    """

    def __init__(
        self,
        name: str,
        model: HookedRecurrent,
        subject: SAE[Any] | Cell | Sequence[SAE[Any]],
        tokens: Int[Tensor, "passage pos"],
        folder: str | Path | None,
        verbose: bool,
        **settings: Any,
    ) -> None:
        if isinstance(subject, Cell):
            saes, hooks = [], model.write_hook_name(subject.layer, subject.head)
        else:
            saes = [subject] if isinstance(subject, SAE) else list(subject)
            found = [sae.cfg.metadata.hook_name for sae in saes]
            hooks = found[0] if len(found) == 1 else found
        self.name, self.verbose = name, verbose
        self.settings = {
            "experiment": name,
            "model": model.cfg.model_name,
            "architecture": model.cells[0].architecture,
            "hook_name": hooks,
            "sae_fingerprints": [fingerprint(*sae.state_dict().values()) for sae in saes],
            **settings,
        }
        inputs = None if folder is None else fingerprint_run(model, saes, tokens)
        made_by = {"inputs": inputs, "version": version("writesae-lens")}
        self._progress = Progress(folder, self.settings | made_by)

    def records(
        self, numbers: Sequence[int], compute: Callable[[int], pd.DataFrame], what: str, unit: str = "passage"
    ) -> pd.DataFrame:
        """The parts' rows, one after another; those that are kept in the folder are not computed again."""
        parts = []
        for number in tqdm(numbers, desc=what, unit=unit, disable=not self.verbose):
            parts.append(self._progress.part(number, lambda n=number: compute(n)))
        return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)

    def result(
        self,
        records: pd.DataFrame,
        summary: dict[str, Any],
        headline: str,
    ) -> ExperimentResult:
        """The result, with the settings in its summary."""
        about = {"headline": headline, **summary, **self.settings}
        return ExperimentResult(self.name, records, about)


def seed_of(seed: int, *numbers: int) -> int:
    """An independent seed for each part (and use), whatever order or run they are computed in."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A part's own source of random numbers (for one use, if there are several)."""
    return torch.Generator().manual_seed(seed_of(seed, *numbers))
