"""Saving an SAE so that its folder has both files, weights and configuration, or none of the new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hooked_models.files.whole_files import replacing
from writesae_lens.locks import locked

CONFIG = "cfg.json"


def save_whole(save: Callable[[Path], tuple[Path, Path]], path: str | Path) -> tuple[Path, Path]:
    """Let a method of SAELens save an SAE beside its place, then put the files there.

    Args:
        save: SAELens's method, which takes a folder and returns the paths of weights and configuration.
        path: the folder.

    Returns:
        the two paths in ``path``.

    Raises:
        WriteSAEError: another run is writing to the folder.
        OSError: of the disk; if it is full, the folder is as it was.
    """
    with locked(path), replacing(Path(path), (CONFIG,)) as beside:
        weights, config = save(beside)
    return Path(path, weights.name), Path(path, config.name)
