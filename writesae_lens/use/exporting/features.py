"""Export of features as JSON lines, for dashboards, language models and notebooks, and for Neuronpedia."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.files.whole_files import replacing
from hooked_models.hooked_recurrent import Site
from writesae_lens.experiments.features.sides import side_of
from writesae_lens.experiments.firings import activity, check_any_fires
from writesae_lens.experiments.options import Count, Natural, Seed, check
from writesae_lens.experiments.origin import fingerprint_sae
from writesae_lens.experiments.passages import Passages, find_passages
from writesae_lens.locks import locked
from writesae_lens.report.effects import Effects, measure_effects
from writesae_lens.saes.sae import MatrixSAE
from writesae_lens.use.exporting.neuronpedia import (
    FOLDER,
    check_set_name,
    remove_empty,
    write_neuronpedia,
    written_in,
)
from writesae_lens.use.labels import labels_of
from writesae_lens.use.prompts import SAEs, saes_by_site

FILE = "features.jsonl"
_N_BINS = 20
# Windows that are looked at for each one without the feature that is wanted.
_TRIES = 16


class _How(NamedTuple):
    """How the features of an SAE are shown."""

    n_contexts: int
    before: int
    after: int
    n_tokens: int
    max_firings: int
    seed: int
    verbose: bool


def export_features(
    model: HookedRecurrent,
    sae_or_saes: SAEs,
    tokens: Int[Tensor, "passage pos"] | str,
    out: str | Path,
    n_contexts: Count = 8,
    before: Natural = 16,
    after: Natural = 8,
    n_tokens: Count = 10,
    max_firings: Count = 8,
    neuronpedia: str | None = None,
    context_size: Count | None = None,
    seed: Seed = 0,
    verbose: bool = True,
) -> Path:
    """Write features.jsonl: a line of JSON for every feature of the SAEs, whether it is active or not.

    ``pandas.read_json(path, lines=True)`` reads it. A line has

    - model, hook_name, layer, head, site ("write" or "state"), sae (fingerprint of its weights), feature (its
      number), side ("atom", "key" or "value"), label ("" without one, see `add_labels`), text (name of what
      was read) and version (of this package);
    - n_positions (read), n_active (of them), density (their quotient), max_coefficient and median_coefficient
      (over active positions; null where there are none), histogram (of the coefficients at active positions:
      edges of 20 bins from 0 to the largest, and counts), decoder_norm (Frobenius norm of the atom; of a code
      the norm of its vector);
    - promoted and suppressed: the tokens whose logits the feature was measured to raise and lower most where
      it is the dominant one (`writesae_lens.report.effects`): token (id), text, shift (logits, mean over
      n_measured firings, beyond the mean of all tokens), agreement (share of firings at which the shift has
      this sign), control (shift with another atom or content of the same norm). Empty for features that are
      nowhere dominant, and for key codes, which are addresses and have no effect without a content;
    - contexts: kind ("top": the strongest; "random": drawn at random from the other active positions;
      "silent": windows drawn at random in which it is never active; up to n_contexts of each, from windows
      that do not start from the same stretch of text), passage and position (of the firing, or the middle),
      at (its index in the window), coefficient (there), tokens (texts) and activations (the coefficients of
      all of them). Only "top" contexts are meant for finding a label: the others test it.

    Args:
        model: the model that the SAEs were trained on.
        sae_or_saes: any SAE on a cell's writes, or on its states; or several, each of a site of its own.
        tokens: passages ``[passage, pos]``, or a text.
        out: folder of the files.
        n_contexts: contexts of each kind.
        before: tokens before the firing in a context.
        after: tokens after it.
        n_tokens: promoted tokens, and suppressed ones.
        max_firings: firings of a feature at which its effect is measured, at most.
        neuronpedia: name of a Neuronpedia source set ("writesae-2k"): also writes the folder neuronpedia/, in
            the layout of Neuronpedia's bulk exports (`writesae_lens.use.exporting.neuronpedia`). What an
            earlier call wrote there is removed in any case, for it is of other features.
        context_size: tokens of a passage where ``tokens`` is text (None: as in the SAE's training, else 256).
        seed: of the draws.
        verbose: show progress bars.

    Returns:
        the path of features.jsonl.

    Raises:
        WriteSAEError: SAE and cell do not fit, the text is too short, nothing fires, a name is no name of
            a source set, or the folder cannot be made.
    """
    check(Count, n_contexts=n_contexts, n_tokens=n_tokens, max_firings=max_firings)
    check(Natural, before=before, after=after)
    check(Seed, seed=seed)
    check_set_name(neuronpedia)
    sites, how = (
        saes_by_site(model, sae_or_saes),
        _How(n_contexts, before, after, n_tokens, max_firings, seed, verbose),
    )
    read = {site: find_passages(model, sae, tokens, context_size) for site, sae in sites.items()}
    out = Path(out)
    with locked(out), replacing(out, (FILE,), written_in(out / FOLDER)) as beside:
        with (beside / FILE).open("w", encoding="utf-8") as file:
            for site, sae in sites.items():
                for row in _rows(model, sae, site, read[site], how):
                    file.write(
                        json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
                    )
        if neuronpedia is not None:
            write_neuronpedia(beside / FILE, beside / FOLDER, neuronpedia)
    remove_empty(out / FOLDER)
    return out / FILE


class _Uses(NamedTuple):
    """All active positions of all features, by feature, then by place: a position of the joined passages."""

    start: NDArray[np.int64]
    """Of each feature the index of its first use; one more at the end."""
    place: NDArray[np.int64]
    coefficient: NDArray[np.float64]

    def of(self, feature: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Places and coefficients of one feature."""
        mine = slice(self.start[feature], self.start[feature + 1])
        return self.place[mine], self.coefficient[mine]


def _uses(model: HookedRecurrent, sae: SAE[Any], site: Site, passages: Passages, verbose: bool) -> _Uses:
    parts = []
    for n, passage in enumerate(tqdm(passages, desc="Reading", unit="passage", disable=not verbose)):
        active = activity(model, sae, site, passage)
        on = active.coefficient > 0
        place = active.position[on].long() + n * len(passage)
        parts.append((active.feature[on].long().cpu(), place.cpu(), active.coefficient[on].double().cpu()))
    feature, place, coefficient = (torch.cat(x).numpy() for x in zip(*parts, strict=True))
    check_any_fires(len(feature), len(feature), passages)
    order = np.argsort(feature, kind="stable")  # places rise already
    start = np.concatenate([[0], np.bincount(feature, minlength=sae.cfg.d_sae).cumsum()])
    return _Uses(start, place[order], coefficient[order])


def _rows(
    model: HookedRecurrent, sae: SAE[Any], site: Site, passages: Passages, how: _How
) -> Iterator[dict[str, Any]]:
    """The lines of one SAE."""
    uses, texts = _uses(model, sae, site, passages, how.verbose), _Texts(model)
    effects = measure_effects(
        model, sae, site, passages, how.n_tokens, how.max_firings, how.seed, how.verbose
    )
    measured = {feature: row for row, feature in enumerate(effects.atom.tolist())}
    labels, windows = labels_of(sae), _Windows(passages, texts, how)
    norms, package = _norms(sae).double().tolist(), version("writesae-lens")
    about = {"model": model.cfg.model_name, "hook_name": sae.cfg.metadata.hook_name}
    about |= {
        "layer": site.cell.layer,
        "head": site.cell.head,
        "site": site.kind,
        # With a prefix, for readers of tables take digits alone for a number.
        "sae": f"sha256:{fingerprint_sae(sae)}",
    }
    features = tqdm(range(sae.cfg.d_sae), desc="Writing", unit="feature", disable=not how.verbose)
    for feature in features:
        place, coefficient = uses.of(feature)
        largest = float(coefficient.max(initial=0.0))
        counts, edges = np.histogram(coefficient, _N_BINS, (0, largest or 1))
        yield {
            **about,
            "feature": feature,
            "side": side_of(sae, feature),
            "label": labels.get(feature, ""),
            "text": passages.text,
            "version": package,
            "n_positions": passages.numel(),
            "n_active": len(place),
            "density": len(place) / passages.numel(),
            "max_coefficient": _short(largest) if len(place) else None,
            "median_coefficient": _short(float(np.median(coefficient))) if len(place) else None,
            "histogram": {"edges": [_short(x) for x in edges.tolist()], "counts": counts.tolist()},
            "decoder_norm": _short(norms[feature]),
            **_effect(effects, measured.get(feature), texts),
            "contexts": windows.contexts(place, coefficient, feature),
        }


@torch.no_grad()
def _norms(sae: SAE[Any]) -> Float[Tensor, " d_sae"]:
    """Of atoms their Frobenius norms, of codes the norms of their vectors."""
    return sae.get_W_dec_norm() if isinstance(sae, MatrixSAE) else sae.W_dec.norm(dim=-1)


def _effect(effects: Effects, row: int | None, texts: _Texts) -> dict[str, Any]:
    """What a feature was measured to promote and suppress."""
    if row is None:
        return {"n_measured": 0, "promoted": [], "suppressed": []}
    columns = (effects.tokens, effects.shift, effects.agreement, effects.control)
    tokens = [
        {"token": token, "text": texts[token], "shift": _short(shift), "agreement": _short(agreement)}
        | {"control": _short(control)}
        for token, shift, agreement, control in zip(*(x[row].tolist() for x in columns), strict=True)
    ]
    half = len(tokens) // 2
    return {"n_measured": int(effects.n[row]), "promoted": tokens[:half], "suppressed": tokens[half:]}


class _Windows:
    """Windows of text around positions of the passages.

    Args:
        passages: the text.
        texts: of its tokens.
        how: how many windows of which size, and the seed of the draws.
    """

    def __init__(self, passages: Passages, texts: _Texts, how: _How) -> None:
        self.how, self.length = how, passages.shape[1]
        self.tokens = passages.flatten().tolist()
        self.texts = [texts[token] for token in self.tokens]
        # One window at most of each kind starts from a stretch of as many tokens as a window has.
        span = how.before + 1 + how.after
        place = np.arange(len(self.tokens))
        self.stretch = place // self.length * (self.length // span + 1) + place % self.length // span
        self.dense = np.zeros(len(self.tokens))

    def contexts(
        self, place: NDArray[np.int64], coefficient: NDArray[np.float64], feature: int
    ) -> list[dict[str, Any]]:
        """The contexts of a feature: the strongest, some at random, and some without it."""
        rng = np.random.default_rng([self.how.seed, feature])
        self.dense[place] = coefficient
        strongest = self._apart(np.lexsort((place, -coefficient)), place)[: self.how.n_contexts]
        # Not from the neighbouring stretches either: then no token stands in a context of both kinds.
        near = (self.stretch[place[strongest]][:, None] + np.arange(-1, 2)).ravel()
        rest = ~np.isin(self.stretch[place], near)
        others = self._apart(rng.permutation(np.flatnonzero(rest)), place)[: self.how.n_contexts]
        found = [self._context("top", at) for at in place[strongest].tolist()]
        found += [self._context("random", at) for at in place[others].tolist()]
        found += [self._context("silent", at) for at in self._silent(rng)]
        self.dense[place] = 0
        return found

    def _apart(self, order: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of indices of places, in an order, the first in each stretch of text."""
        _, first = np.unique(self.stretch[place[order]], return_index=True)
        return order[np.sort(first)]

    def _silent(self, rng: np.random.Generator) -> list[int]:
        """The middles of windows, drawn at random, in which the feature is active nowhere."""
        places = rng.integers(len(self.tokens), size=_TRIES * self.how.n_contexts)
        silent = np.array([not self.dense[self._window(at)].any() for at in places.tolist()])
        places = places[silent]
        return places[self._apart(np.arange(len(places)), places)][: self.how.n_contexts].tolist()

    def _window(self, at: int) -> slice:
        """The places of the window around one, within its passage."""
        first = at // self.length * self.length
        return slice(max(first, at - self.how.before), min(first + self.length, at + self.how.after + 1))

    def _context(self, kind: str, at: int) -> dict[str, Any]:
        window = self._window(at)
        passage, position = divmod(at, self.length)
        return {
            "kind": kind,
            "passage": passage,
            "position": position,
            "at": at - window.start,
            "coefficient": _short(self.dense[at]),
            "tokens": self.texts[window],
            "activations": [_short(x) for x in self.dense[window].tolist()],
        }


class _Texts(dict[int, str]):
    """The texts of tokens by id; without a tokenizer their ids."""

    def __init__(self, model: HookedRecurrent) -> None:
        self.tokenizer = model.tokenizer

    def __missing__(self, token: int) -> str:
        text = f"token {token}" if self.tokenizer is None else str(self.tokenizer.decode([token]))
        return self.setdefault(token, text)


def _short(x: float) -> float | int:
    """A number with four digits, which is enough to shade a text."""
    return float(f"{x:.4g}") if x else 0
