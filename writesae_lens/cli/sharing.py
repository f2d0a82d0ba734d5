"""Bodies of the commands ``models``, ``pull``, ``convert`` and ``push``: published models and SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import HookedModelError, one_line, printable
from hooked_models.files.whole_files import replacing
from writesae_lens.cli.subjects import load_sae
from writesae_lens.errors import WriteSAEError
from writesae_lens.locks import locked
from writesae_lens.published import hub, releases
from writesae_lens.published import sharing as published
from writesae_lens.saes.sae import WriteSAE
from writesae_lens.saes.whole import CONFIG


def list_models() -> None:
    """Print the shipped models and a table of the published SAEs."""
    for name in zoo.SHIPPED:
        typer.echo(name)
    table = hub.published_table()
    typer.echo()
    typer.echo(table.to_string(index=False))
    if "?" in set(table["size"]):
        typer.echo("The Hub could not be reached: only the sizes of cached SAEs are shown.", err=True)


def list_cells(model_name: str) -> None:
    """Print the cells of a model: layer and head, size, architecture, hook of the write."""
    model = HookedRecurrent.boot_transformers(model_name, device="cpu")
    for cell in model.cells:
        hook = model.write_hook_name(cell.layer, cell.head)
        typer.echo(f"{cell.layer}:{cell.head}\t{cell.d_k} x {cell.d_v}\t{cell.architecture}\t{hook}")


def pull(release: str, ids: list[str] | None, revision: str | None, force: bool) -> None:
    """Download SAEs into the cache and print what they are; those that fail are named, and the status is 2.

    Raises:
        WriteSAEError: the release does not exist or has no such SAE.
    """
    known = releases.releases().get(release)
    if known is None and "/" not in release:
        raise WriteSAEError(f"no release {release!r}: there are {', '.join(releases.releases())}")
    paths = {} if known is None else known.saes_map
    unknown = [] if known is None else [name for name in ids or [] if name not in paths]
    if unknown:
        raise WriteSAEError(f"no {', '.join(unknown)} in {release}: there are {', '.join(paths)}")
    if not (ids or paths):
        raise WriteSAEError(f"which SAE of {release}? Give its folder")
    repository = release if known is None else known.repo_id
    failed = False
    for name in ids or list(paths):
        try:
            _describe(hub.fetch_config(repository, paths.get(name, name), revision, force))
        except (HookedModelError, OSError) as error:
            typer.echo(f"writesae-lens: {name}: {printable(one_line(error))}", err=True)
            failed = True
    if failed:
        raise typer.Exit(2)


def convert(checkpoint: Path, out: Path, model: str | None, layer: int | None, head: int | None) -> None:
    """Save a published checkpoint in SAELens's format."""
    sae = WriteSAE.from_checkpoint(checkpoint, model, layer, head)
    with locked(out), replacing(out, (CONFIG,)) as beside:
        sae.save_model(beside)
    _describe(sae.cfg.to_dict())
    typer.echo(f"converted: {out}")


def push(
    sae: str, repository: str, sae_id: str | None, results: Path | None, revision: str, private: bool
) -> None:
    """Publish an SAE, and print the line of Python that loads it."""
    name = published.push(load_sae(sae, "cpu"), repository, sae_id, results, revision, private)
    typer.echo(f'published: SAE.from_pretrained("{repository}", "{name}")')


def _describe(cfg: dict[str, Any]) -> None:
    """Print the size, model, hook and origin of an SAE from its configuration."""
    metadata = cfg["metadata"]
    d_k, d_v = (cfg.get(name, metadata.get(name)) for name in ("d_k", "d_v"))
    kind = metadata.get("sae_type") or cfg["architecture"]
    features, active = f"{cfg['d_sae']:,} atoms", cfg.get("k")
    if cfg.get("decoder") == "codes":
        features = f"{cfg['n_key']:,} key codes and {cfg['n_value']:,} value codes"
        active = f"{cfg['k_key']} and {cfg['k_value']}"
    lines = [
        f"{kind}, {features} for {d_k} x {d_v} matrices, k {active}",
        f"{metadata.get('model_name') or 'unknown model'}, {metadata.get('hook_name') or 'unknown hook'}",
    ]
    source = metadata.get("provenance")
    if source:
        lines.insert(0, " ".join(source.get(part, "") for part in ("repository", "file", "revision")).strip())
        checked = "as manifest.json says" if source["sha256_checked"] else "not checked: no manifest.json"
        lines += [metadata["orientation"], f"SHA-256 {source['sha256']}: {checked}"]
    typer.echo("\n  ".join(printable(line) for line in lines))
