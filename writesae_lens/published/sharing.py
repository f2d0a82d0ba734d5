"""Publishing SAEs: SAELens's own upload, and a model card with the results of the replacement test."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from hooked_models.errors import printable
from hooked_models.files.json_files import read_json
from writesae_lens import measures, statistics
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import fingerprint_sae, sentence
from writesae_lens.experiments.result import SUMMARY
from writesae_lens.experiments.subjects import check_sae
from writesae_lens.published.hub import transport_errors

_CARD = "README.md"
# Shares of what deleting a write does, at its own position, over the following ones, and both together.
_RECOVERED = [f"{name}{when}" for name in ("median_recovered", "recovered") for when in measures.WHEN]


def default_id(sae: SAE[Any]) -> str:
    """``L9_H4`` for an SAE on layer 9, head 4, as published ids are; ``sae`` if its hook names no cell."""
    metadata = sae.cfg.metadata
    cell = re.search(r"blocks\.(\d+)\..*\.(\d+)$", metadata.hook_name or "")
    if cell is None and metadata.layer is not None and metadata.head is not None:
        return f"L{metadata.layer}_H{metadata.head}"  # a published checkpoint without its base model
    return f"L{cell[1]}_H{cell[2]}" if cell else "sae"


def push(
    sae: SAE[Any],
    repo_id: str,
    sae_id: str | None = None,
    results: str | Path | None = None,
    revision: str = "main",
    private: bool = False,
) -> str:
    """Publish an SAE on the Hub: its weights, ``cfg.json``, and its section of the repository's model card.

    ``SAE.from_pretrained(repo_id, sae_id)`` loads it again, after ``import writesae_lens``.

    Args:
        sae: an SAE of any type.
        repo_id: owner/name of the repository, which is created if it does not exist.
        sae_id: the SAE's folder in the repository; by default its cell, ``L9_H4``.
        results: the folder of a saved replacement test of this SAE. Its figures go into the card, its summary
            beside the SAE.
        revision: the branch.
        private: whether a repository that is created now is private.

    Returns:
        the SAE's id.

    Raises:
        WriteSAEError: the results are not those of a replacement test or belong to another hook, the id
            cannot be a path in a repository, or the connection broke. `huggingface_hub` raises its own errors
            for missing rights.
    """
    check_sae(sae)
    sae_id = default_id(sae) if sae_id is None else str(sae_id).strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", sae_id) or sae_id == _CARD:
        raise WriteSAEError(f"{sae_id!r} is no id: give a path in the repository such as L9_H4 or gdn/L9_H4")
    summary = None if results is None else _summary(Path(results), sae)
    api = HfApi()
    with transport_errors(f"publishing to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        upload_saes_to_huggingface(
            {sae_id: sae}, repo_id, revision, show_progress=False, add_default_readme=False
        )
        if summary is not None:
            api.upload_file(
                path_or_fileobj=json.dumps(summary, indent=2).encode(),
                path_in_repo=f"{sae_id}/replacement.json",
                repo_id=repo_id,
                revision=revision,
                commit_message=f"Replacement test of {sae_id}",
            )
        card = _with_section(_card(repo_id, revision, sae), sae_id, _section(sae, repo_id, sae_id, summary))
        api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=_CARD,
            repo_id=repo_id,
            revision=revision,
            commit_message=f"Model card of {sae_id}",
        )
    return sae_id


def _summary(results: Path, sae: SAE[Any]) -> dict[str, Any]:
    """The summary of a saved replacement test, after a check that it was measured on the SAE's hook."""
    path = results / SUMMARY if results.is_dir() else results
    try:
        summary = read_json(path)
        finite = all(math.isfinite(figure) for figure in _figures(summary) if figure is not None)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise WriteSAEError(f"{path} is not what a replacement test saved ({error!r})") from error
    if not finite:
        raise WriteSAEError(
            f"{path} is not what a replacement test saved: some of its figures are not numbers"
        )
    hook = sae.cfg.metadata.hook_name
    if summary.get("hook_name") != hook:
        raise WriteSAEError(
            f"{path} was measured on {summary.get('hook_name')}, but the SAE belongs to {hook}"
        )
    if (known := summary.get("sae_fingerprints")) and fingerprint_sae(sae) not in known:
        raise WriteSAEError(f"{path} was measured on another SAE on {hook}: run the test again on this one")
    return summary


def _figures(summary: Mapping[str, Any]) -> list[float | None]:
    """The figures of a summary that the card shows; None where a test has no answer."""
    figures = [summary["win_rate"], summary["strict_chain_rate"], summary["n_firings"]]
    figures += summary["kl_ratio_atom_delete_random"] + (summary["win_rate_ci"] or [None, None])
    for name in _RECOVERED:
        figures += [summary.get(name), _lookup(summary).get(name), *(summary.get(f"{name}_ci") or [])]
    return [*figures, summary.get("win_rate_matched_norm")]


def _card(repo_id: str, revision: str, sae: SAE[Any]) -> str:
    """The repository's card, or the head of a new one."""
    try:
        return Path(hf_hub_download(repo_id, _CARD, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        model = sae.cfg.metadata.model_name or ""
        data = ModelCardData(
            library_name="saelens",
            tags=["sparse-autoencoder", "writesae"],
            base_model=model if model.count("/") == 1 else None,
        )
        text = (
            "Sparse autoencoders on the cache writes of recurrent language models: SAELens and writesae-lens."
        )
        return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n{text}\n"))


def _with_section(card: str, sae_id: str, section: str) -> str:
    """The card with an SAE's section replaced, or added at the end; all other text stays."""
    begin, end = f"<!-- {sae_id} -->", f"<!-- end of {sae_id} -->"
    marked = f"{begin}\n{section}\n{end}"
    before, marker, rest = card.partition(begin)
    if marker and end in rest:
        return before + marked + rest.partition(end)[2]
    return f"{card.rstrip()}\n\n{marked}\n"


def _section(sae: SAE[Any], repo_id: str, sae_id: str, summary: dict[str, Any] | None) -> str:
    """An SAE's section of the card: a table of facts, how to load it, and the replacement test's figures."""
    cfg, metadata = sae.cfg, sae.cfg.metadata
    dictionary = _dictionary(cfg)
    rows = {"base model": metadata.model_name, "hook": metadata.hook_name, "dictionary": dictionary}
    source = metadata.provenance
    if isinstance(source, dict):
        origin = (source.get("repository"), source.get("file"), f"SHA-256 {source.get('sha256')}")
        rows["converted from"] = ", ".join(str(part) for part in origin if part)
    lines = [f"## {sae_id}", "", "| | |", "|---|---|"]
    # The SAE may come from strangers: none of its strings may become markup of the card.
    cells = {name: _plain(value) for name, value in rows.items() if value}
    lines += [f"| {name} | `{value}` |" for name, value in cells.items()]
    code = ["import writesae_lens  # registers the type with SAELens", "from sae_lens import SAE", ""]
    code += [f'sae = SAE.from_pretrained("{repo_id}", "{sae_id}")']
    lines += ["", "```python", *code, "```"]
    if summary is None:
        return "\n".join([*lines, "", "No replacement test was given for this SAE."])
    about = [sentence(summary), *map(str, summary.get("warnings") or [])]
    lines += [
        "",
        "Replacement test: the SAE's stand-in in place of a native write, against deleting the write.",
        *(f"\n`{_plain(line)}`" for line in about),
    ]
    return "\n".join([*lines, *_recovered(summary), *_papers_figures(summary)])


def _dictionary(cfg: Any) -> str:
    """What an SAE's dictionary is, in a line."""
    if cfg.architecture() != "writesae":
        return f"{cfg.architecture()}, {cfg.d_sae:,} atoms"
    features, active = f"{cfg.d_sae:,} atoms", f"k {cfg.k}"
    if cfg.decoder == "codes":
        features = f"{cfg.n_key:,} key codes and {cfg.n_value:,} value codes"
        active = f"k {cfg.k_key} and {cfg.k_value}"
    return (
        f"writesae, {features} for {cfg.d_k} x {cfg.d_v} matrices, rank {cfg.rank}; encoder {cfg.encoder}, "
        f"decoder {cfg.decoder}, activation {cfg.activation}, {active}"
    )


def _recovered(summary: Mapping[str, Any]) -> list[str]:
    """The table of what stand-ins and the untrained lookup recover; earlier versions did not measure it."""
    horizon, lookup, rows = summary.get("horizon"), _lookup(summary), []
    for when, where in (
        ("", "at the write's own position"),
        ("_later", f"over the next {horizon} tokens"),
        ("_both", "both together"),
    ):
        median, pooled = f"median_recovered{when}", f"recovered{when}"
        if summary.get(median) is None:
            continue
        interval = statistics.between(summary.get(f"{median}_ci"), ".1%")
        shares = [statistics.share(of.get(name)) for of in (summary, lookup) for name in (median, pooled)]
        rows.append([where, f"{shares[0]}{interval}", *shares[1:]])
    titles = ["recovered of what the deletion does", "median (95% interval)", "pooled"]
    titles += ["untrained lookup of equal size: median", "pooled"]
    return _table(titles, rows) if rows else []


def _papers_figures(summary: Mapping[str, Any]) -> list[str]:
    """The table of the paper's measures, at the write's own position."""
    ratios = summary["kl_ratio_atom_delete_random"]
    interval = statistics.between(summary["win_rate_ci"], ".1%")
    measured = {
        "win rate (95% interval)": f"{statistics.share(summary['win_rate'])}{interval}",
        "strict chain": statistics.share(summary["strict_chain_rate"]),
        "median KL, stand-in : deleted : random": " : ".join(
            "none" if ratio is None else f"{ratio:.1f}" for ratio in ratios
        ),
        "firings": f"{summary['n_firings']:,}",
    }
    if (matched := summary.get("win_rate_matched_norm")) is not None:
        measured["win rate at the native norm"] = statistics.share(matched)
    return ["", "The paper's measures:", *_table(list(measured), [list(measured.values())])]


def _lookup(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the untrained lookup reaches at the same firings; empty where it was not tested."""
    rows = summary.get("baselines")
    return next((row for row in rows if row["name"] == "lookup"), {}) if isinstance(rows, list) else {}


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, after an empty one."""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


def _plain(value: Any) -> str:
    """A value as a text that can stand between backticks in a cell of a table."""
    return re.sub(r"[`|<>]", "?", printable(str(value)))
