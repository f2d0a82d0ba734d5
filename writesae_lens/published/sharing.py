"""Publishing SAEs: SAELens's own upload, and a model card with the results of the replacement test."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from hooked_models.errors import printable
from hooked_models.files.json_files import read_json
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import fingerprint_sae, sentence
from writesae_lens.experiments.result import SUMMARY
from writesae_lens.experiments.subjects import check_sae
from writesae_lens.published.hub import transport_errors

_CARD = "README.md"


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
        low, high = summary["win_rate_ci"]
        numbers = [summary[name] for name in ("win_rate", "strict_chain_rate", "n_firings")] + [low, high]
        finite = all(math.isfinite(x) for x in numbers + summary["kl_ratio_atom_delete_random"])
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
    dictionary = f"{cfg.architecture()}, {cfg.d_sae:,} atoms"
    if cfg.architecture() == "writesae":
        dictionary += f" for {cfg.d_k} x {cfg.d_v} matrices, rank {cfg.rank}"
        dictionary += f"; encoder {cfg.encoder}, decoder {cfg.decoder}, activation {cfg.activation}"
        dictionary += f", k {cfg.k}"
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
    low, high = summary["win_rate_ci"]
    ratio = " : ".join(f"{x:.1f}" for x in summary["kl_ratio_atom_delete_random"])
    measured = {
        "win rate (95% interval)": f"{summary['win_rate']:.1%} ({low:.1%} to {high:.1%})",
        "strict chain": f"{summary['strict_chain_rate']:.1%}",
        "median KL, atom : deleted : random": ratio,
        "firings": f"{summary['n_firings']:,}",
    }
    about = [sentence(summary), *map(str, summary.get("warnings") or [])]
    lines += [
        "",
        "Replacement test: the dominant atom in place of a native write, against deleting the write.",
        *(f"\n`{_plain(line)}`" for line in about),
        "",
    ]
    lines += ["| " + " | ".join(measured) + " |", "|" + "---|" * len(measured)]
    return "\n".join([*lines, "| " + " | ".join(measured.values()) + " |"])


def _plain(value: Any) -> str:
    """A value as a text that can stand between backticks in a cell of a table."""
    return re.sub(r"[`|<>]", "?", printable(str(value)))
