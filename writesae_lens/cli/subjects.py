"""Loading what a command is about: the model, SAEs, cell and text that the user names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import typer
from sae_lens import SAE
from safetensors import SafetensorError

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import one_line, printable
from hooked_models.files.loading import check_device
from hooked_models.hooked_recurrent import Cell
from writesae_lens import WriteSAE
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.passages import Passages, find_passages
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
    passages: Passages


def load(subject: Subject) -> Loaded:
    """Load a subject; what is read where no text is named is the test part of the shipped text.

    Raises:
        WriteSAEError: an SAE, the model or the text cannot be loaded; an SAE names no cell; or no model is
            named, or no text given for a model that does not ship with one.
    """
    check_device(subject.device)
    saes = [load_sae(reference, subject.device, subject.model) for reference in subject.saes]
    name = _model_name(subject.saes, saes, subject.model)
    # A name that is neither shipped nor a folder nor like one of the Hub is refused by boot_transformers.
    if subject.text is None and name not in zoo.SHIPPED and ("/" in name or Path(name).exists()):
        raise WriteSAEError(f"{name} ships with no text: give --text FILE")
    text = zoo.text("test") if subject.text is None else read_text(subject.text)
    model = HookedRecurrent.boot_transformers(name, device=subject.device)
    for reference, sae in zip(subject.saes, saes, strict=True):
        _complete(sae, reference, name, model)
    layer_and_head = parse_cell(subject.cell)
    cell = None if layer_and_head is None else model.cell(*layer_and_head)
    trained_on = saes[0] if saes else cell
    text_name = None if subject.text is None else printable(subject.text.name)
    passages = find_passages(model, trained_on, text, subject.context_size, text_name)
    return Loaded(model, saes, cell, _last(passages, subject))


def load_saes(
    references: Sequence[str], model: str | None, device: str
) -> tuple[HookedRecurrent, list[SAE[Any]]]:
    """SAEs and their model, for commands that read a prompt.

    Args:
        references: SAEs; a folder of several, such as a sweep's, stands for all that are in it.
        model: its name (None: the one that the first SAE names).
        device: of both.

    Raises:
        WriteSAEError: an SAE or the model cannot be loaded, an SAE names no cell, or no model is named.
    """
    check_device(device)
    named = [one for reference in references for one in each_in(reference)]
    saes = [load_sae(reference, device, model) for reference in named]
    name = _model_name(named, saes, model)
    loaded = HookedRecurrent.boot_transformers(name, device=device)
    for reference, sae in zip(named, saes, strict=True):
        _complete(sae, reference, name, loaded)
    return loaded, saes


def each_in(reference: str) -> list[str]:
    """The SAEs that a reference stands for: those in a folder's folders if it is none itself."""
    folder = Path(reference)
    inside = sorted(folder.glob("*/sae_weights.safetensors"))
    if (folder / "cfg.json").is_file() or (folder / "best.pt").is_file() or not inside:
        return [reference]
    return [str(path.parent) for path in inside]


def _model_name(references: Sequence[str], saes: Sequence[SAE[Any]], model: str | None) -> str:
    """The model that is named, or that the first SAE names.

    Raises:
        WriteSAEError: none is.
    """
    name = model or next((sae.cfg.metadata.model_name for sae in saes), None)
    if name is None:
        raise WriteSAEError(f"{references[0]} does not say which model it belongs to: give --model")
    return name


def read_prompt_text(prompt: str | None, text: Path | None) -> str:
    """The prompt of a command: the text of ``--prompt``, or of the file of ``--text``.

    Raises:
        WriteSAEError: neither is given, or both, or the file does not read.
    """
    if (prompt is None) == (text is None):
        raise WriteSAEError("which prompt? Give one of --prompt TEXT and --text FILE")
    return read_text(text) if text is not None else str(prompt)


def _complete(sae: SAE[Any], reference: str, model_name: str, model: HookedRecurrent) -> None:
    """Let an SAE that names no hook have that of the write of the layer and head that its file names.

    Raises:
        WriteSAEError: it names no layer and head either.
        HookedModelError: the model has no such cell.
    """
    metadata = sae.cfg.metadata
    if metadata.hook_name is not None:
        return
    if metadata.layer is None or metadata.head is None:
        example = model.write_hook_name(model.cells[0].layer, model.cells[0].head)
        raise WriteSAEError(
            f"{reference}: the SAE does not say which hook it belongs to; put it into the metadata in its "
            f'cfg.json ("hook_name": "{example}"), or name the cell of a best.pt by writesae-lens convert'
        )
    metadata.hook_name = model.write_hook_name(metadata.layer, metadata.head)
    metadata.model_name = metadata.model_name or model_name
    typer.echo(
        f"writesae-lens: {reference} names layer {metadata.layer}, head {metadata.head} and no hook: it is "
        f"taken for an SAE on the writes there, {metadata.hook_name}",
        err=True,
    )


def _last(passages: Passages, subject: Subject) -> Passages:
    """The last passages of a text, and a line on stderr where it has fewer than were asked for."""
    wanted, size = subject.max_passages, passages.shape[1]
    if len(passages) < wanted:
        left_out = "" if subject.text is not None else " (what SAEs are trained on is no part of it)"
        typer.echo(
            f"writesae-lens: {passages.text}{left_out} has {len(passages)} passages of {size} tokens: all "
            f"are read, where --max-passages allows {wanted}",
            err=True,
        )
    return passages[-wanted:]


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
    """The text in a UTF-8 file; a byte order mark at its start is no part of it.

    Raises:
        WriteSAEError: the file is missing, not UTF-8, or holds NUL characters, which no text has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise WriteSAEError(
            f"could not read {path} as UTF-8 text: {error}{hint}: save it as UTF-8"
        ) from error
    except OSError as error:
        raise WriteSAEError(f"could not read {path} as UTF-8 text: {error}") from error
    if "\0" in text:
        raise WriteSAEError(
            f"could not read {path} as UTF-8 text: character {text.index(chr(0)) + 1:,} is NUL, which no "
            "text has: is it a binary file, or UTF-16?"
        )
    return text


def load_sae(reference: str, device: str, model: str | None = None) -> SAE[Any]:
    """An SAE from a folder that SAELens wrote, a published best.pt, or ``RELEASE:ID`` on the Hub.

    Args:
        reference: the folder, file or ``RELEASE:ID``.
        device: of the SAE.
        model: the base model of a best.pt, where its path does not tell.

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
        # What the published SAEs of the paper's models were trained on is known; shipped models have none.
        base = None if model in zoo.SHIPPED else model
        return WriteSAE.from_checkpoint(folder, base, device=device)
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


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show what speaks against a result as a line on stderr, each once, in place of Python's warnings."""
    told: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
        if not issubclass(category, ResultWarning):
            show(message, category, *where, **how)
        elif str(message) not in told:
            told.add(str(message))
            typer.echo(f"writesae-lens: warning: {printable(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ResultWarning)
        show, warnings.showwarning = warnings.showwarning, tell
        yield


def token_of(text: str) -> int | str:
    """A token as a user names it: an id, or the text of one token."""
    return int(text) if text.isdecimal() else text
