"""Automatic labels: a callable names features by their contexts, another tests the names on held-out ones."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hooked_models.errors import one_line, printable
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Count, NotNegative, Seed, check, is_whole, shown
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.result import read_table, write_table

Labeller = Callable[[dict[str, Any]], str]
"""Gets a feature, a line of `export_features` with its "top" contexts alone, and returns a label."""
Judge = Callable[[str, list[str]], Sequence[bool]]
"""Gets a label and some texts, and says of each whether the label's feature is active in it."""

_COLUMNS = ("layer", "head", "feature", "label", "balanced_accuracy", "chance", "n_judged", "error", "sae")
_NEEDED = ("layer", "head", "feature", "sae", "n_active", "contexts")
_ATTEMPTS = 3
# Features after which the file is written anew.
_OFTEN = 25
_LONGEST_LABEL = 200
_T = TypeVar("_T")


def label_features(
    features: pd.DataFrame | str | Path,
    labeller: Labeller,
    out: str | Path,
    judge: Judge | None = None,
    n_judged: Count = 8,
    wait: NotNegative = 1.0,
    seed: Seed = 0,
    verbose: bool = True,
) -> pd.DataFrame:
    """Let a callable label features by their strongest contexts, and test its labels by detection.

    The judge is shown, in random order, contexts that the labeller has not seen: ``n_judged`` in which the
    feature is active, from all its firings and not the strongest alone, and as many in which it is not. It
    says from the label which are which. (Paulo et al. 2024, "Automatically interpreting millions of
    features", call this detection scoring.) Guessing has a balanced accuracy of one half.

    A call that fails with an OSError (timeouts, connections, a server that is busy) or a ValueError (a reply
    that does not read) is made three times; then the feature is listed with the error and without a label,
    or without a score. Other exceptions stop the run, as does an interruption; the labels so far are in
    ``out``, and the same call goes on from there: features that it has a label and a score of are not asked
    for again, those that failed are.

    Args:
        features: features.jsonl of `export_features`, or the table, or some rows of it, that
            ``pandas.read_json(path, lines=True)`` makes. Features that are never active are left out.
        labeller: see `Labeller`; `ChatEndpoint.label` asks a language model.
        out: CSV of labels, for `add_labels`.
        judge: see `Judge`; `ChatEndpoint.judge`. None: labels are not tested.
        n_judged: contexts of either kind that the judge is shown, where the export has so many.
        wait: seconds before a call is made again; four times as many before the last one.
        seed: of the choice and the order of the judge's contexts.
        verbose: show a progress bar.

    Returns:
        a row a feature, as in ``out``: layer, head, feature, label, balanced_accuracy (of the judge, empty
        where it was not asked), chance (0.5), n_judged (texts that it was shown; 0 where the export has none
        with, or none without the feature: one that is active in every stretch of text), error (of the last
        attempt, empty where none failed), sae (fingerprint).

    Raises:
        WriteSAEError: the export does not read or has no active feature; ``out`` has labels of another SAE.

    Warns:
        ResultWarning: features have no label, or no score.
    """
    check(Count, n_judged=n_judged)
    check(NotNegative, wait=wait)
    check(Seed, seed=seed)
    lines = _active(features)
    out = Path(out)
    done = _done(out, lines, judge is not None)
    rows: list[dict[str, Any]] = []

    def so_far() -> pd.DataFrame:
        """The table, with what an earlier call has made of the features that are still to come."""
        later = [done[key] for key in map(_key, lines[len(rows) :]) if key in done]
        table = pd.DataFrame([*rows, *later], columns=list(_COLUMNS)).astype({"n_judged": "Int64"})
        if len(table):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_table(out, table)
        return table

    try:
        for line in tqdm(lines, desc="Labelling", unit="feature", disable=not verbose):
            known = done.get(_key(line))
            rows.append(known or _labelled(line, labeller, judge, n_judged, wait, seed))
            if known is None and len(rows) % _OFTEN == 0:
                so_far()
    finally:
        table = so_far()
    _warn(table, out, judge is not None)
    return table


def _key(line: dict[str, Any]) -> tuple[int, int, int]:
    return line["layer"], line["head"], line["feature"]


def _active(features: pd.DataFrame | str | Path) -> list[dict[str, Any]]:
    """The features of an export that are active somewhere."""
    if isinstance(features, (str, Path)):
        try:
            with Path(features).open(encoding="utf-8") as file:
                lines = [json.loads(line) for line in file if line.strip()]
        except (OSError, ValueError) as error:
            raise WriteSAEError(f"{features} does not read as an export: {one_line(error)[:160]}") from error
    else:
        lines = features.to_dict("records")
    if any(not isinstance(line, dict) or set(_NEEDED) - set(line) for line in lines):
        raise WriteSAEError(
            f"an export has {', '.join(_NEEDED)} in every line: give what export_features wrote"
        )
    if len({(*_key(line)[:2], line["sae"]) for line in lines}) > len({_key(line)[:2] for line in lines}):
        raise WriteSAEError("two SAEs of one cell are in this export: label the rows of one at a time")
    active = [line for line in lines if line["n_active"]]
    if not active:
        raise WriteSAEError("none of these features is active anywhere: there is nothing to label")
    return active


def _done(out: Path, lines: Sequence[dict[str, Any]], judged: bool) -> dict[Any, dict[str, Any]]:
    """The rows of an earlier call that need not be made again."""
    if not out.exists():
        return {}
    table = read_table(out)
    if set(_COLUMNS) - set(table):
        raise WriteSAEError(f"{out} is there already, and no file of label_features: give another name")
    saes = {(line["layer"], line["head"]): line["sae"] for line in lines}
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    if any(saes.get((row["layer"], row["head"])) != row["sae"] for row in rows):
        raise WriteSAEError(f"{out} is there already, with labels of another SAE: give another name")
    return {
        _key(row): row | {"error": row["error"] or ""}
        for row in rows
        if row["label"] and not (row["error"] or (judged and row["n_judged"] is None))
    }


def _labelled(
    line: dict[str, Any], labeller: Labeller, judge: Judge | None, n_judged: int, wait: float, seed: int
) -> dict[str, Any]:
    """The row of one feature."""
    row: dict[str, Any] = {name: line[name] for name in ("layer", "head", "feature", "sae")}
    row |= {"label": "", "balanced_accuracy": None, "chance": 0.5, "n_judged": None, "error": ""}
    of_kind = {k: [c for c in line["contexts"] if c["kind"] == k] for k in ("top", "random", "silent")}
    label, row["error"] = _tried(lambda: _text(labeller(line | {"contexts": of_kind["top"]})), wait)
    if label is None:
        return row
    row["label"] = label
    if judge is None:
        return row
    rng = np.random.default_rng([seed, *_key(line)])
    count = min(n_judged, len(of_kind["random"]), len(of_kind["silent"]))
    chosen = [(c, kind == "random") for kind in ("random", "silent") for c in of_kind[kind][:count]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    row["n_judged"] = len(chosen)
    if not chosen:
        return row
    texts, fires = ["".join(c["tokens"]) for c, _ in chosen], np.array([fires for _, fires in chosen])
    says, row["error"] = _tried(lambda: _verdicts(judge(label, texts), len(texts)), wait)
    if says is not None:
        row["balanced_accuracy"] = float(
            np.mean([(says == fires)[fires].mean(), (says == fires)[~fires].mean()])
        )
    return row


def _tried(call: Callable[[], _T], wait: float) -> tuple[_T | None, str]:
    """What a call returns, or None and the error of the last attempt."""
    said = ""
    for attempt in range(_ATTEMPTS):
        try:
            return call(), ""
        except WriteSAEError:  # it will not get better
            raise
        except (OSError, ValueError) as error:
            said = printable(f"{type(error).__name__}: {one_line(error)}"[:200])
            if attempt + 1 < _ATTEMPTS:
                time.sleep(wait * 4**attempt)
    return None, said


def _text(label: Any) -> str:
    """A label on one line.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"the labeller returned {shown(label)}, no label")
    return " ".join(printable(" ".join(label.split())).split())


def _verdicts(says: Any, count: int) -> NDArray[np.bool_]:
    """The judge's answers as booleans.

    Raises:
        ValueError: they are not one a text.
    """
    if len(says) != count or not all(isinstance(x, (bool, np.bool_)) for x in says):
        raise ValueError(f"the judge returned {shown(list(says))}, not True or False for {count} texts")
    return np.array(says, dtype=bool)


def _warn(table: pd.DataFrame, out: Path, judged: bool) -> None:
    unnamed = int((table.label == "").sum())
    unscored = int(table.balanced_accuracy.isna().sum()) - unnamed if judged else 0
    parts = [
        f"{n} of {len(table)} features have no {what}"
        for n, what in ((unnamed, "label"), (unscored, "score"))
        if n
    ]
    if parts:
        first = next((error for error in table.error if error), "too few held-out contexts")
        warnings.warn(f"{' and '.join(parts)} ({first}): see {out}", ResultWarning, stacklevel=3)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, and for no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class ChatEndpoint:
    """A language model behind an endpoint of OpenAI's kind (``POST BASE_URL/chat/completions``).

    ``label_features(export, endpoint.label, "labels.csv", judge=endpoint.judge)`` labels with it. Local
    servers (llama.cpp, vLLM, Ollama) have such endpoints too.

    Args:
        base_url: without /chat/completions (None: the environment's OPENAI_BASE_URL, else OpenAI's own).
        model: name of the model (None: OPENAI_MODEL).
        key: sent as a bearer token (None: OPENAI_API_KEY; without one none is sent).
        timeout: seconds to wait for a reply.

    Raises:
        WriteSAEError: no model is named, or the address is not http.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if not re.match(r"https?://", url):
            raise WriteSAEError(f"base_url={shown(url)} is no address of a server: give http(s)://...")
        self.model = model or os.environ.get("OPENAI_MODEL") or ""
        if not self.model:
            raise WriteSAEError("which language model? Give model=, or set OPENAI_MODEL")
        self._url, self._timeout = f"{url.rstrip('/')}/chat/completions", timeout
        self._key = key or os.environ.get("OPENAI_API_KEY")

    def label(self, feature: dict[str, Any]) -> str:
        """A label from the strongest contexts of a feature and the tokens that it promotes.

        Raises:
            OSError: the server cannot be reached in time, or is busy.
            ValueError: the reply is no label.
            WriteSAEError: the server refuses the request.
        """
        contexts = [
            "".join(f"<<{t}>>" if a > 0 else t for t, a in zip(c["tokens"], c["activations"], strict=True))
            for c in feature["contexts"]
        ]
        parts = [f"{n}. {text!r}" for n, text in enumerate(contexts, 1)]
        if promoted := [x["text"] for x in feature.get("promoted", ())]:
            parts.append(f"Where it is active, these tokens become more likely next: {promoted}")
        question = (
            "A feature of a language model is active on the tokens marked <<like this>> in these texts:\n"
            + "\n".join(parts)
            + "\nWhat do the marked tokens have in common? Reply with a phrase of ten words at most, alone."
        )
        label = " ".join(self._ask(question).split()).strip("\"'. ")
        if not 0 < len(label) <= _LONGEST_LABEL:
            raise ValueError(f"the reply is no label: {label[:60]!r}")
        return label

    def judge(self, label: str, texts: list[str]) -> list[bool]:
        """Which texts fit a label.

        Raises:
            OSError: the server cannot be reached in time, or is busy.
            ValueError: the reply is no list of numbers of texts.
            WriteSAEError: the server refuses the request.
        """
        numbered = "\n".join(f"{n}. {text!r}" for n, text in enumerate(texts, 1))
        question = (
            f"A feature of a language model is described as: {label}\nIn which of these texts is it active "
            f"on some token?\n{numbered}\nReply with a JSON list of their numbers alone, as in [1, 4] or []."
        )
        reply = self._ask(question)
        found = re.search(r"\[[\d,\s]*\]", reply)
        numbers = json.loads(found[0]) if found else None
        if numbers is None or not all(is_whole(n) and 1 <= n <= len(texts) for n in numbers):
            raise ValueError(f"the reply is no list of numbers from 1 to {len(texts)}: {reply[:60]!r}")
        return [n in numbers for n in range(1, len(texts) + 1)]

    def _ask(self, question: str) -> str:
        """The model's reply to one message."""
        message = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(message).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self._timeout) as response:
                reply = json.loads(response.read())
        except http.client.HTTPException as error:
            raise OSError(f"the server broke off its reply: {error!r}") from error
        except urllib.error.HTTPError as error:
            if error.code in (408, 409, 425, 429) or error.code >= 500:
                raise OSError(f"the server answers {error.code} {error.reason}") from error
            about = one_line(error.read().decode("utf-8", "replace"))[:200]
            raise WriteSAEError(f"{self._url} answers {error.code} {error.reason}: {about}") from error
        try:
            content = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise ValueError(f"the reply has no choices[0].message.content: {str(reply)[:60]}") from error
        if not isinstance(content, str):
            raise ValueError(f"the reply's content is {shown(content)}, no text")
        return content
