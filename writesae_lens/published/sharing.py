"""Publishing SAEs: SAELens's own upload, and a model card with what was measured."""

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
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.result import SUMMARY
from writesae_lens.experiments.subjects import check_sae
from writesae_lens.published.hub import transport_errors

_CARD = "README.md"


def default_id(sae: SAE[Any]) -> str:
    """``L9_H4`` for an SAE on layer 9 head 4, as published SAEs are called; ``sae`` if it names no cell."""
    cell = re.search(r"blocks\.(\d+)\..*\.(\d+)$", sae.cfg.metadata.hook_name or "")
    return f"L{cell[1]}_H{cell[2]}" if cell else "sae"


def push(
    sae: SAE[Any],
    repo_id: str,
    sae_id: str | None = None,
    results: str | Path | None = None,
    revision: str = "main",
    private: bool = False,
) -> str:
    """Publish an SAE: safetensors, cfg.json, and its section of the repository's model card.

    It comes back with ``SAE.from_pretrained(repo_id, sae_id)`` where this package is imported.

    Args:
        sae: of any type.
        repo_id: owner/name; made if it does not exist.
        sae_id: its folder in the repository; default: its cell, ``L9_H4``.
        results: folder that a replacement test was saved in; goes into the card, and beside the SAE.
        revision: branch.
        private: for a repository made now.

    Returns:
        the SAE's id.

    Raises:
        WriteSAEError: the results are not of a replacement test or of another SAE, the id is no path in a
            repository, or the connection broke off. `huggingface_hub`'s own errors for missing rights.
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
    path = results / SUMMARY if results.is_dir() else results
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        low, high = summary["win_rate_ci"]
        numbers = [summary[name] for name in ("win_rate", "strict_chain_rate", "n_firings")] + [low, high]
        fits = all(math.isfinite(x) for x in numbers + summary["kl_ratio_atom_delete_random"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WriteSAEError(f"{path} is not what a replacement test saved ({error!r})") from error
    if not fits:
        raise WriteSAEError(
            f"{path} is not what a replacement test saved: some of its figures are no numbers"
        )
    hook = sae.cfg.metadata.hook_name
    if summary.get("hook_name") != hook:
        raise WriteSAEError(
            f"{path} was measured on {summary.get('hook_name')}, but the SAE belongs to {hook}"
        )
    return summary


def _card(repo_id: str, revision: str, sae: SAE[Any]) -> str:
    """The repository's card as it is, or the head of a new one."""
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
    begin, end = f"<!-- {sae_id} -->", f"<!-- end of {sae_id} -->"
    marked = f"{begin}\n{section}\n{end}"
    before, found, rest = card.partition(begin)
    if found and end in rest:
        return before + marked + rest.partition(end)[2]
    return f"{card.rstrip()}\n\n{marked}\n"


def _section(sae: SAE[Any], repo_id: str, sae_id: str, summary: dict[str, Any] | None) -> str:
    cfg, metadata = sae.cfg, sae.cfg.metadata
    what = f"{cfg.architecture()}, {cfg.d_sae:,} atoms"
    if cfg.architecture() == "writesae":
        what += f" for {cfg.d_k} x {cfg.d_v} matrices, rank {cfg.rank}"
        what += f"; encoder {cfg.encoder}, decoder {cfg.decoder}, activation {cfg.activation}, k {cfg.k}"
    rows = {"base model": metadata.model_name, "hook": metadata.hook_name, "dictionary": what}
    source = metadata.provenance
    if isinstance(source, dict):
        origin = (source.get("repository"), source.get("file"), f"SHA-256 {source.get('sha256')}")
        rows["converted from"] = ", ".join(str(part) for part in origin if part)
    lines = [f"## {sae_id}", "", "| | |", "|---|---|"]
    # An SAE may have been made by others: nothing in it may become more of the card than a cell.
    cells = {name: re.sub(r"[`|<>]", "?", printable(str(value))) for name, value in rows.items() if value}
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
    lines += [
        "",
        "Replacement test: the dominant atom in place of a native write, against deleting the write.",
        "",
    ]
    lines += ["| " + " | ".join(measured) + " |", "|" + "---|" * len(measured)]
    return "\n".join([*lines, "| " + " | ".join(measured.values()) + " |"])
