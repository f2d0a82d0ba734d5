"""Some prompts, their native continuations, and installs that share the prompts' cached prefixes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.divergences import wide
from writesae_lens.experiments.decoding import Prefix
from writesae_lens.experiments.installs.directions import Climb, most_read
from writesae_lens.experiments.installs.fluency import native_surprise, repetition
from writesae_lens.experiments.installs.writes import (
    Matrices,
    Sides,
    Sizes,
    native_sides,
    norms_of,
    of_norm,
    random_sides,
    unembedding_sides,
)


class Method(NamedTuple):
    """How the writes of an install are chosen; see `writesae_lens.experiments.install.install_tokens`."""

    direction: str
    n_refinements: int
    n_ahead: int
    magnitudes: tuple[float, ...]
    counts: tuple[int, ...]


class Said(NamedTuple):
    """What a model says: first logits, continuation, its tokens' -log p under the unedited model."""

    first: Float[Tensor, "row d_vocab"]
    tokens: Int[Tensor, "row token"]
    surprise: Float[Tensor, "row token"]

    def rows(self, of: Int[Tensor, " row"]) -> Said:
        """Those of some rows."""
        return Said(*(x[of] for x in self))


class Prompts:
    """Some prompts and their native continuations.

    Args:
        model: the model.
        cells: where writes are added.
        tokens: the prompts.
        positions: how many of their last tokens are written at.
        n_tokens, temperature, seed: of the continuations, as for `Prefix.decode`.
    """

    def __init__(
        self,
        model: HookedRecurrent,
        cells: list[Cell],
        tokens: Int[Tensor, "prompt pos"],
        positions: int,
        n_tokens: int,
        temperature: float,
        seed: int,
    ) -> None:
        self.model, self.cells, self.tokens = model, cells, tokens
        self.last = tokens[:, -positions:]
        self.prefix = Prefix(model, min(cell.layer for cell in cells), tokens[:, :-positions])
        self._how = {"n_tokens": n_tokens, "temperature": temperature, "seed": seed}
        self.sides = native_sides(model, cells, tokens, positions)
        self.norms = norms_of(self.sides)
        self.native = self._say(self.last, None)

    @torch.no_grad()
    def _say(self, last: Int[Tensor, "row pos"], added: Matrices | None) -> Said:
        logits, cache = self.prefix.run(last, added)
        tokens = self.prefix.decode(logits, cache, **self._how)
        return Said(wide(logits), tokens, native_surprise(self.model, self.prefix, last, tokens))

    def install(
        self, chosen: Int[Tensor, "prompt target"], names: list[str], method: Method, rng: torch.Generator
    ) -> pd.DataFrame:
        """Records of an install of each target, by every magnitude and number of cells, with its control.

        Args:
            chosen: the targets of each prompt.
            names: their strata.
            method: how the writes are chosen.
            rng: for the controls.
        """
        n_prompts, n_targets = chosen.shape
        conditions = [(m, n) for m in method.magnitudes for n in method.counts]
        n, device = n_targets * len(conditions), self.tokens.device  # edits of a prompt
        targets = chosen.to(device).repeat_interleave(len(conditions), dim=1).flatten()
        of = torch.arange(n_prompts, device=device).repeat_interleave(n)  # the prompt of each edit
        sides, sizes = self._chosen(targets, of, conditions, method)
        shape = len(targets), self.last.shape[1]
        control = random_sides(self.cells, shape, rng, device)
        own, other = (self._say(self.last[of], of_norm(x, sizes)) for x in (sides, control))
        magnitudes, counts = zip(*conditions, strict=True)
        labels = {
            "prompt": of.cpu().numpy(),
            "target": targets.cpu().numpy(),
            "stratum": np.tile(np.repeat(names, len(conditions)), n_prompts),
            "magnitude": np.tile(magnitudes, n_prompts * n_targets),
            "n_cells": np.tile(counts, n_prompts * n_targets),
        }
        return pd.DataFrame(labels | _measured(targets, own, other, self.native.rows(of)))

    def _chosen(
        self,
        targets: Int[Tensor, " row"],
        of: Int[Tensor, " row"],
        conditions: list[tuple[float, int]],
        method: Method,
    ) -> tuple[Sides, Sizes]:
        """The sides of what is added, and its norms: 0 in cells that a row does not write in."""
        magnitudes, counts = (torch.tensor(x, device=of.device) for x in zip(*conditions, strict=True))
        times = len(of) // len(conditions)
        norms: Sizes = {cell: magnitudes.repeat(times)[:, None] * x[of] for cell, x in self.norms.items()}
        keeps_path = method.direction != "jacobian"
        coming = self.native.tokens[:, : method.n_ahead] if keeps_path else self.native.tokens
        climb = Climb(self.model, self.prefix, self.cells, self.last, coming, of, targets, keeps_path)
        is_climbed = method.direction != "unembedding"
        slopes: Sizes = {}
        sides: Sides = {}
        if is_climbed or int(counts.min()) < len(self.cells):
            sides, slopes = climb.steepest()
        sizes = norms
        if int(counts.min()) < len(self.cells):
            written = most_read(slopes, norms, counts.repeat(times))
            sizes = {cell: x * written[cell][:, None] for cell, x in norms.items()}
        if is_climbed:
            return climb.climbed(sides, sizes, method.n_refinements), sizes
        native = {cell: (keys[of], values[of]) for cell, (keys, values) in self.sides.items()}
        return unembedding_sides(self.model, native, targets), sizes


def _measured(targets: Int[Tensor, " row"], own: Said, other: Said, native: Said) -> dict[str, Any]:
    """The columns of what the edits, their controls and the unedited model say."""

    def log_p(said: Said) -> Tensor:
        return said.first.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    def rank(said: Said) -> Tensor:
        return (said.first > said.first.gather(1, targets[:, None])).sum(-1) + 1

    every = {"": own, "native_": native, "control_": other}
    columns: dict[str, Tensor] = {
        "native_rank": rank(native),
        "rank": rank(own),
        "rank_shift": rank(native) - rank(own),
        "lift": log_p(own) - log_p(native),
    }
    columns |= {f"{name}in_continuation": (x.tokens == targets[:, None]).any(-1) for name, x in every.items()}
    columns["control_lift"] = log_p(other) - log_p(native)
    columns |= {f"{name}perplexity": x.surprise.double().mean(-1).exp() for name, x in every.items()}
    measured: dict[str, Any] = {name: x.cpu().numpy() for name, x in columns.items()}
    measured |= {f"{name}repetition": repetition(x.tokens) for name, x in every.items()}
    texts = {"continuation": own, "native_continuation": native}
    return measured | {name: [json.dumps(row) for row in x.tokens.tolist()] for name, x in texts.items()}
