"""The subject of an experiment: a model, an SAE, and the cell of the model that the SAE belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_lens import SAE

from hooked_models import HookedRecurrent
from hooked_models.errors import HookedModelError
from hooked_models.hooked_recurrent import Cell, Site
from writesae_lens.cells import parse_cells
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import is_whole, shown


def check_model(model: Any) -> None:
    """Refuse anything but a `HookedRecurrent`.

    Raises:
        WriteSAEError: ``model`` is something else.
    """
    if not isinstance(model, HookedRecurrent):
        raise WriteSAEError(
            f"the first argument must be a HookedRecurrent, got {shown(model)}: "
            "HookedRecurrent.boot_transformers(name) loads one"
        )


def check_unhooked(model: HookedRecurrent) -> None:
    """Refuse a model with hooks or SAEs in it (open `steering`, for example) where the native one is meant.

    Raises:
        HookedModelError: anything is hooked.
    """
    if model.busy_hooks:
        raise HookedModelError(
            f"this looks at the native model, but {', '.join(model.busy_hooks[:3])} is hooked: remove the "
            "hooks first (model.reset_hooks(), model.reset_saes())"
        )


def check_sae(sae: Any) -> None:
    """Refuse anything but one of SAELens's SAEs, and an SAE whose weights are not numbers.

    Raises:
        WriteSAEError: ``sae`` is something else, or has NaN in its weights.
    """
    if not isinstance(sae, SAE):
        raise WriteSAEError(
            f"an SAE is wanted, got {shown(sae)}: SAE.load_from_disk or SAE.from_pretrained gives one"
        )
    broken = [name for name, x in sae.named_parameters() if bool(x.isnan().any())]
    if broken:
        raise WriteSAEError(
            f"the SAE has NaN in {', '.join(broken)}: its training went wrong, train it again"
        )


def find_site(model: HookedRecurrent, sae: SAE[Any]) -> Site:
    """The cell that the SAE was trained on, and whether on its writes or states, from the SAE's metadata.

    Raises:
        WriteSAEError: there is no model or no SAE, the SAE names no hook or has NaN in its weights, it is on
            another device, or it expects inputs that are scaled at run time.
        HookedModelError: the model has no such cell, or one of other sizes than the SAE's.
    """
    check_model(model)
    check_sae(sae)
    metadata = sae.cfg.metadata
    name = metadata.hook_name
    if name is None:
        example = "for example to model.write_hook_name(layer, head)"
        if metadata.layer is not None and metadata.head is not None:
            example = f"its file says to model.write_hook_name({metadata.layer}, {metadata.head})"
        raise WriteSAEError(
            "the SAE does not say which hook it belongs to: set sae.cfg.metadata.hook_name, " + example
        )
    site = model.site(name)
    model.check_sae(sae)
    sae_device = next(sae.parameters()).device
    model_device = next(model.original_model.parameters()).device
    if sae_device != model_device:
        raise WriteSAEError(
            f"the SAE is on {sae_device}, the model on {model_device}: move the SAE, "
            f"sae.to({str(model_device)!r})"
        )
    if sae.cfg.normalize_activations != "none":
        raise WriteSAEError(
            f"the SAE scales its inputs (normalize_activations={sae.cfg.normalize_activations!r}), so its "
            "coefficients are not in units of writes: fold the scale in first"
        )
    return site


def common_cell(
    model: HookedRecurrent, saes: Mapping[str, SAE[Any]], reserved: Iterable[str], verb: str
) -> Cell:
    """The cell of all of several SAEs, by their names.

    Args:
        model: the model.
        saes: the SAEs.
        reserved: names that no SAE may have.
        verb: what is done with them, for messages.

    Raises:
        WriteSAEError: there are none, they are not on one cell, or one has a name that is reserved.
    """
    if not isinstance(saes, Mapping):
        raise WriteSAEError(
            f"saes must be a dict of names and SAEs, got a {type(saes).__name__}: {{name: sae}}"
        )
    if not saes:
        raise WriteSAEError(f"there are no SAEs to {verb}: give one at least, {{name: sae}}")
    if taken := sorted(set(saes) & set(reserved)):
        raise WriteSAEError(f"{', '.join(taken)} are reserved names: give the SAEs others")
    cells = {name: find_site(model, sae).cell for name, sae in saes.items()}
    cell = next(iter(cells.values()))
    if other := [name for name, own in cells.items() if own != cell]:
        raise WriteSAEError(
            f"{', '.join(other)} belong to another cell than layer {cell.layer} head {cell.head}: {verb} "
            "SAEs of one cell"
        )
    return cell


def find_cell(model: HookedRecurrent, sae_or_cell: SAE[Any] | Cell | tuple[int, int]) -> Cell:
    """The cell of an SAE, or the cell that is given, as a `Cell` or as (layer, head).

    Raises:
        WriteSAEError: there is no model, the SAE does not fit it, or the cell is another model's.
        HookedModelError: the model has no such cell.
    """
    check_model(model)
    if isinstance(sae_or_cell, SAE):
        return find_site(model, sae_or_cell).cell
    if isinstance(sae_or_cell, Cell):
        cell = model.cell(sae_or_cell.layer, sae_or_cell.head)
        if cell != sae_or_cell:
            raise WriteSAEError(f"{sae_or_cell} is another model's: here it is {cell}")
        return cell
    if not isinstance(sae_or_cell, (tuple, list)) or len(sae_or_cell) != 2:
        raise WriteSAEError(f"an SAE, a cell or (layer, head) is wanted, got {shown(sae_or_cell)}")
    return model.cell(*sae_or_cell)


CellOrSAE = SAE[Any] | Cell | tuple[int, int]
"""What names a cell: itself, (layer, head), or an SAE on it."""


def find_cells(model: HookedRecurrent, sae_or_cell: CellOrSAE | str | Sequence[CellOrSAE]) -> list[Cell]:
    """One cell or several, in the order in which they are given.

    Args:
        model: the model.
        sae_or_cell: what `find_cell` takes, a list of it, or a text as `parse_cells` takes it ("1:*").

    Raises:
        WriteSAEError: as `find_cell`; or there are none, or one comes twice.
        HookedModelError: the model has no such cell.
    """
    check_model(model)
    if isinstance(sae_or_cell, str):
        if ":" not in sae_or_cell:
            raise WriteSAEError(
                f"an SAE, a cell or (layer, head) is wanted, got {sae_or_cell!r}; as text, cells are "
                "LAYER:HEAD, with * for all and commas between, for example 1:*"
            )
        return parse_cells(model, sae_or_cell)
    given: Any = sae_or_cell
    is_list = isinstance(given, (list, tuple)) and not (len(given) == 2 and all(map(is_whole, given)))
    several: list[Any] = list(given) if is_list else [given]
    cells = [find_cell(model, each) for each in several]
    if not cells:
        raise WriteSAEError("there are no cells: give one at least")
    if twice := [cell for n, cell in enumerate(cells) if cell in cells[:n]]:
        raise WriteSAEError(f"layer {twice[0].layer} head {twice[0].head} is given twice: give each once")
    return cells
