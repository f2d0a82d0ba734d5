"""Loading a published checkpoint (``best.pt``) of any type as the configuration and weights of a SAELens SAE.

The file is read as data (`hooked_models.files.torch_files`), its content is found in whichever layout it has
(`contents`), compared with what its config, its path and the caller say, and converted (`conversion`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from hooked_models.errors import HookedModelError
from hooked_models.files import torch_files
from writesae_lens.errors import WriteSAEError
from writesae_lens.published import manifest
from writesae_lens.published.contents import config_and_tensors
from writesae_lens.published.conversion import PublishedSAE, Source

FILE = "best.pt"
_UNKNOWN = Source()
# The last parts of a local path may name model, cell and k: writesae/qwen0p8b/L9_H4/best.pt.
_NAMING_PARTS = 4


def load(path: str | Path, source: Source = _UNKNOWN) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published checkpoint in the form of SAELens's loaders: a configuration dictionary and a state dict.

    Raises:
        WriteSAEError: the file is no such checkpoint, wants code to be run, contradicts itself, its path or
            the caller, has another SHA-256 than ``manifest.json`` lists, or has tensors that are missing, of
            another shape or not finite.
    """
    source.check()
    file = find_file(path)
    provenance = {"file": file.name, **source.provenance}
    if "sha256" not in provenance:
        digest = manifest.sha256(file)
        provenance |= {"sha256": digest, "sha256_checked": _check_local_manifest(file, digest)}
    try:
        content = torch_files.read(file, objects=True)
    except HookedModelError as error:
        raise WriteSAEError(str(error)) from error
    config, tensors = config_and_tensors(file, content)
    # A file from the Hub has its path in the repository; the folders of the cache name nothing.
    place = str(source.provenance.get("file", Path(*file.absolute().parts[-_NAMING_PARTS:])))
    return PublishedSAE(file, place, config, tensors, source).for_saelens(provenance)


def find_file(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or the one ``best.pt`` in a folder or below it.

    Raises:
        WriteSAEError: there is none, or more than one.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.exists() and not path.is_dir():  # a pipe or a device, which would be read without end
        raise WriteSAEError(f"{path} is no plain file: give a checkpoint, or a folder that holds a {FILE}")
    if not path.is_dir():
        raise WriteSAEError(f"{path} does not exist: give a checkpoint, or a folder that holds a {FILE}")
    files = [path / FILE] if (path / FILE).is_file() else sorted(f for f in path.rglob(FILE) if f.is_file())
    if len(files) == 1:
        return files[0]
    if not files and (path / SAE_CFG_FILENAME).is_file():
        raise WriteSAEError(f"{path} is in SAELens's form, with no {FILE}: give it to SAE.load_from_disk")
    which = f" ({', '.join(str(f.parent.relative_to(path)) for f in files[:4])}, ...)" if files else ""
    raise WriteSAEError(f"{path} holds {len(files) or 'no'} {FILE}{which}: give the folder of one")


def _check_local_manifest(file: Path, digest: str) -> bool:
    """Whether a manifest above the file lists it, where the file lies in a copy of a repository."""
    file = file.absolute()
    for folder in file.parents[1:5]:
        if (folder / manifest.MANIFEST).is_file():
            return manifest.check(folder / manifest.MANIFEST, file.relative_to(folder).as_posix(), digest)
    return False
