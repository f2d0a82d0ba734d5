"""Loading what a command is about: the model, SAEs, cell and text that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from sae_lens import SAE
from safetensors import SafetensorError
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import one_line
from hooked_models.files.loading import check_device
from hooked_models.hooked_recurrent import Cell
from writesae_lens import WriteSAE
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.passages import find_passages
from writesae_lens.published.hub import transport_errors

# What SAELens raises on a cfg.json that is valid JSON, but not the configuration of an SAE.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class Subject(NamedTuple):
    """What a command is about, as the user names it."""

    saes: list[str]
    cell: str | None
    model: str | None
    text: Path | None
    context_size: int | None
    max_passages: int
    device: str


class Loaded(NamedTuple):
    """A subject, loaded; its passages are the last ones of the text."""

    model: HookedRecurrent
    saes: list[SAE[Any]]
    cell: Cell | None
    passages: Int[Tensor, "passage pos"]


def load(subject: Subject) -> Loaded:
    """Load a subject.

    Raises:
        WriteSAEError: an SAE, the model or the text cannot be loaded; or no model is named, or no text given
            for a model that does not ship with one.
    """
    check_device(subject.device)
    saes = [load_sae(reference, subject.device) for reference in subject.saes]
    name = subject.model or next((sae.cfg.metadata.model_name for sae in saes), None)
    if name is None:
        raise WriteSAEError(f"{subject.saes[0]} does not say which model it belongs to: give --model")
    # A name that is neither shipped nor a folder nor like one of the Hub is refused by boot_transformers.
    if subject.text is None and name not in zoo.SHIPPED and ("/" in name or Path(name).exists()):
        raise WriteSAEError(f"{name} ships with no text: give --text FILE")
    text = zoo.held_out_text() if subject.text is None else read_text(subject.text)
    model = HookedRecurrent.boot_transformers(name, device=subject.device)
    layer_and_head = parse_cell(subject.cell)
    cell = None if layer_and_head is None else model.cell(*layer_and_head)
    trained_on = saes[0] if saes else cell
    assert trained_on is not None, "every command wants an SAE or a cell"
    passages = find_passages(model, trained_on, text, subject.context_size)
    return Loaded(model, saes, cell, passages[-subject.max_passages :])


def parse_cell(text: str | None) -> tuple[int, int] | None:
    """Layer and head of ``LAYER:HEAD``; None of None.

    Raises:
        WriteSAEError: the text is no cell.
    """
    if text is None:
        return None
    layer, _, head = text.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise WriteSAEError(f"a cell is written LAYER:HEAD, for example 1:0, got {text!r}")
    return int(layer), int(head)


def read_text(path: Path) -> str:
    """The text in a UTF-8 file.

    Raises:
        WriteSAEError: the file is missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WriteSAEError(f"could not read {path} as UTF-8 text: {error}") from error


def load_sae(reference: str, device: str) -> SAE[Any]:
    """An SAE from a folder that SAELens wrote, a published best.pt, or ``RELEASE:ID`` on the Hub.

    Raises:
        WriteSAEError: there is no such SAE, or its files are damaged.
    """
    folder = Path(reference)
    release, colon, sae_id = reference.rpartition(":")
    if not folder.exists() and colon:
        try:
            with transport_errors(f"fetching {sae_id} of {release}"):
                return SAE.from_pretrained(release, sae_id, device=device)
        except (ValueError, KeyError, OSError) as error:  # unknown release or id; no access to the Hub
            raise WriteSAEError(f"could not load {reference}: {one_line(error)}") from error
    if folder.is_file() or (folder / "best.pt").is_file():
        return WriteSAE.from_checkpoint(folder, device=device)
    missing = [n for n in ("cfg.json", "sae_weights.safetensors") if not (folder / n).is_file()]
    if missing:
        raise WriteSAEError(
            f"{folder} is no SAE folder: {' and '.join(missing)} not found in it; give the folder that "
            "SAELens wrote (in a demo's output: sae/), a best.pt, or RELEASE:ID"
        )
    try:
        return SAE.load_from_disk(folder, device=device)
    except (OSError, SafetensorError, AssertionError, *_MALFORMED) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise WriteSAEError(
            f"could not load the SAE in {folder}: {type(error).__name__}: {reason}"
        ) from error
