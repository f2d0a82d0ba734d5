"""A running experiment: the settings that its result records, and the parts that it keeps to resume from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.catalogue import find_experiment
from writesae_lens.experiments.origin import (
    ORIGIN,
    ResultWarning,
    fingerprint,
    fingerprint_sae,
    now,
    origin_of,
    with_warnings,
)
from writesae_lens.experiments.passages import Passages
from writesae_lens.experiments.passes import last_logits
from writesae_lens.experiments.result import ExperimentResult, Progress

# Tokens that show whether weights are broken, and tell one model from another.
_FIRST_TOKENS = 32
_SUBJECT = ("experiment", "model", "architecture", "erases", "hook_name", "sae_fingerprints")
MEASURED_ON = (*_SUBJECT, *ORIGIN)
"""Entries of every result's summary that say what it was measured on, by which call, and when."""


class Run:
    """The common frame of the experiments: a loop over parts that can resume, and the result's settings.

    Every option of the experiment (`writesae_lens.experiments.options`) is recorded in the result's summary
    with the value that it has in ``arguments``.

    Args:
        name: of the experiment in the catalogue.
        model: the model.
        subject: the SAE, SAEs, cell or cells that the experiment is about; None: all cells of the model.
        tokens: passages or prompts.
        arguments: values of the experiment's arguments by name: ``locals()`` where the run is made, so that
            each option is recorded with the value that the variable of its name has then.
        parts_depend_on_options: False where finished parts are right whatever the options are.
        **settings: whatever else to record, or to record under an option's name in place of its value.

    Raises:
        WriteSAEError: the folder ``progress_folder`` holds parts made with other settings, or the SAEs are
            of different models, or the model's logits in the first passage are not finite.

    Warns:
        ResultWarning: of what speaks against the figures, such as a model in half precision.
    """

    def __init__(
        self,
        name: str,
        model: HookedRecurrent,
        subject: SAE[Any] | Cell | Sequence[SAE[Any]] | Sequence[Cell] | None,
        tokens: Int[Tensor, "passage pos"],
        arguments: Mapping[str, Any],
        parts_depend_on_options: bool = True,
        **settings: Any,
    ) -> None:
        about = model.cells if subject is None else subject
        about = [about] if isinstance(about, (SAE, Cell)) else list(about)
        saes = [x for x in about if isinstance(x, SAE)]
        hooks = [
            model.write_hook_name(x.layer, x.head) if isinstance(x, Cell) else x.cfg.metadata.hook_name
            for x in about
        ]
        cell = model.site(hooks[0]).cell
        self.name, self.verbose, entry = name, arguments.get("verbose"), find_experiment(name, of_models=True)
        options = {option: _plain(arguments[option]) for option in entry.own_options} | settings
        values = (
            name,
            model.cfg.model_name,
            cell.architecture,
            model.mixers[cell.layer].erases,
            hooks[0] if len(hooks) == 1 else hooks,
            [fingerprint_sae(sae) for sae in saes],
        )
        measured_on: dict[str, Any] = dict(zip(_SUBJECT, values, strict=True))
        # Some experiments run the model up to the cell's layer only, and would not see what is broken above.
        logits = last_logits(model, tokens[0, :_FIRST_TOKENS])
        read = tokens if isinstance(tokens, Passages) else Passages.of(tokens)
        named = [] if subject is None else hooks
        self._origin = origin_of(model, saes, named, read, entry.function, arguments)
        self.settings = measured_on | options
        folder = arguments.get("progress_folder")
        inputs = None if folder is None else fingerprint_run(logits, saes, tokens)
        made_by = {"inputs": inputs, "version": version("writesae-lens")}
        self._progress = Progress(
            folder, measured_on | (options if parts_depend_on_options else {}) | made_by
        )

    def records(
        self, numbers: Sequence[int], compute: Callable[[int], pd.DataFrame], what: str, unit: str = "passage"
    ) -> pd.DataFrame:
        """The rows of all parts, in order; parts that the folder has are not computed again."""
        parts = []
        for number in tqdm(numbers, desc=what, unit=unit, disable=not self.verbose):
            parts.append(self._progress.part(number, lambda n=number: compute(n)))
        return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)

    def warn(self, warning: str) -> None:
        """Warn of something else that speaks against the figures, also in the result and its headline."""
        self._origin["warnings"].append(warning)
        warnings.warn(warning, ResultWarning, stacklevel=4)

    def result(self, records: pd.DataFrame, summary: dict[str, Any], headline: str) -> ExperimentResult:
        """The result, with the settings and what it was measured on in its summary."""
        about = self._origin | {"date": now()}
        headline = with_warnings(headline, about["warnings"])
        return ExperimentResult(
            self.name, records, {"headline": headline, **summary, **self.settings, **about}
        )


def _plain(value: Any) -> Any:
    """A value as JSON has it: tuples are lists."""
    return [_plain(x) for x in value] if isinstance(value, (tuple, list)) else value


def seed_of(seed: int, *numbers: int) -> int:
    """An independent seed for each part (and use), whatever order or run they are computed in."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A random number generator for each part (and use), seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, *numbers))


def fingerprint_run(
    logits: Float[Tensor, " d_vocab"], saes: Sequence[SAE[Any]], passages: Int[Tensor, "passage pos"]
) -> str:
    """A hash of a run's inputs beside its settings: passages, logits of the first one, the SAEs' options."""
    options = [
        {k: v for k, v in sae.cfg.to_dict().items() if k not in ("device", "dtype", "metadata")}
        for sae in saes
    ]
    as_bytes = torch.frombuffer(bytearray(json.dumps(options, default=str).encode()), dtype=torch.uint8)
    return fingerprint(passages, logits, as_bytes)
