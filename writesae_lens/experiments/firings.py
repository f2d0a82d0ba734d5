"""Firings: which features of an SAE are active at which positions of a passage, and what they write there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell, Site, sides_of
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.features.activity import NUMBERS_AT_ONCE, Activity
from writesae_lens.experiments.options import is_whole
from writesae_lens.experiments.passes import check_finite, native_factors
from writesae_lens.saes.rank1 import Factors, inner
from writesae_lens.saes.sae import MatrixSAE


class Firings(NamedTuple):
    """Some firings of one passage: what is active, and the native write there.

    A firing of atoms is a position where one is active; the dominant one is its ``atom``. A firing of codes
    is a position where codes of both sides are active; its ``atom`` is the number of the dominant value code,
    its ``key_code`` that of the dominant key code, its coefficient the Frobenius norm of the stand-in.

    The fields after ``write_value`` are None where only the native writes are needed.
    """

    position: Int[Tensor, " firing"]
    atom: Int[Tensor, " firing"]
    coefficient: Float[Tensor, " firing"]
    write_key: Float[Tensor, "firing d_k"]
    write_value: Float[Tensor, "firing d_v"]
    key_code: Int[Tensor, " firing"] | None = None
    """-1 at the firings of atoms."""
    features: Int[Tensor, "firing active"] | None = None
    """The features that the stand-in is made of: the dominant atom, or all active codes."""
    activations: Float[Tensor, "firing active"] | None = None
    """Their coefficients; 0 where a firing has fewer active codes than another."""

    def subset(self, index: Tensor) -> Firings:
        """The firings of some indices, or of a mask."""
        parts: list[Any] = [x if x is None else x[index] for x in self]
        return Firings(*parts)


def native_of(firings: Firings | Activity) -> Factors:
    """The native writes of firings, or of all positions, as factors of rank 1."""
    return Factors(firings.write_key[:, None].float(), firings.write_value[:, None].float())


@torch.no_grad()
def stand_in(sae: SAE[Any], firings: Firings, cell: Cell) -> Factors:
    """What takes the place of each firing's native write, at the size that the SAE gives it.

    Atoms: the dominant one times its coefficient, whole, also where it is not of rank 1. Codes: the product
    of what the active key codes and the active value codes sum to (`MatrixSAE.stand_in_of`), of rank 1.
    """
    if is_codes(sae):
        assert firings.features is not None
        assert firings.activations is not None
        return _of_codes(sae, firings.features, firings.activations)
    atoms = atom_factors(sae, firings.atom, cell.d_k, cell.d_v)
    return Factors(atoms.key * firings.coefficient[:, None, None], atoms.value)


def _of_codes(
    sae: Any, features: Int[Tensor, "row active"], coefficients: Float[Tensor, "row active"]
) -> Factors:
    """The rank-1 matrices of active codes, for some rows at a time."""
    step, parts = max(1, NUMBERS_AT_ONCE // sae.cfg.d_sae), []
    for of, size in zip(features.split(step), coefficients.split(step), strict=True):
        acts = size.new_zeros(len(size), sae.cfg.d_sae).scatter_add_(1, of, size)
        parts.append([side.float() for side in sae.stand_in_of(acts)])
    return Factors(*(torch.cat(side) for side in zip(*parts, strict=True)))


def is_codes(sae: SAE[Any]) -> bool:
    """Whether an SAE's features are key codes and value codes rather than atoms."""
    return isinstance(sae, MatrixSAE) and sae.is_codes


@torch.no_grad()
def activity(model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"]) -> Activity:
    """Run one passage up to the cell's layer and encode its writes (or states, if the SAE is made for those).

    Raises:
        WriteSAEError: the cell's activations, or the SAE's coefficients, are not finite.
    """
    cell = site.cell
    state_name = model.state_hook_name(cell.layer, cell.head)
    on_states = site.kind == "state"
    key, value, _, cache = native_factors(model, cell, tokens, [state_name] * on_states)
    key, value = key.clone(), value.clone()  # they are views of all heads' sides
    return activity_of(sae, key, value, cache[state_name][0] if on_states else None)


@torch.no_grad()
def activity_of(
    sae: SAE[Any],
    key: Float[Tensor, "pos d_k"],
    value: Float[Tensor, "pos d_v"],
    states: Float[Tensor, "pos d_k_d_v"] | None = None,
) -> Activity:
    """Encode a cell's writes key value^T, or its states where these are given.

    Raises:
        WriteSAEError: the SAE's coefficients are not finite.
    """

    def encode(rows: slice) -> Tensor:
        if states is not None:
            return sae.encode(states[rows])
        if isinstance(sae, MatrixSAE):
            return sae.encode_factors(key[rows], value[rows])
        return sae.encode((key[rows, :, None] * value[rows, None, :]).flatten(1))

    # Of an SAE whose activation looks at the whole batch, a batch is what is encoded at once.
    step = max(1, NUMBERS_AT_ONCE // max(sae.cfg.d_sae, sae.cfg.d_in))
    parts = (encode(slice(start, start + step)) for start in range(0, len(key), step))
    active = Activity.of(parts, key, value, sae.cfg.n_key if is_codes(sae) else 0)
    check_finite("coefficients of the SAE's features", active.coefficient)
    return active


def find_firings(model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"]) -> Firings:
    """The firings of one passage; see `Firings`."""
    return firings_of(sae, activity(model, sae, site, tokens))


@torch.no_grad()
def firings_of(sae: SAE[Any], active: Activity) -> Firings:
    """The firings among the positions of one passage."""
    at = (active.dominant >= 0).nonzero().squeeze(-1)
    active = active.at(at)
    writes = active.write_key, active.write_value
    if is_codes(sae):
        features, activations = active.by_position()
        coefficient = _of_codes(sae, features, activations).norm()
    else:
        features, activations = active.dominant[:, None], active.greatest()[:, None]
        coefficient = activations[:, 0].float()
    return Firings(
        at, active.dominant, coefficient, *writes, active.dominant_key, features, activations.float()
    )


@torch.no_grad()
def contribution(sae: SAE[Any], active: Activity, feature: int, cell: Cell | None = None) -> Factors:
    """The matrix with which one feature takes part in the stand-in at each position; zero where inactive.

    An atom: itself times its coefficient. A value code j: key^ (b_j w_j)^T, with key^ the sum of the active
    key codes. A key code i: (a_i u_i) value^^T, with value^ the sum of the active value codes.

    Args:
        sae: the SAE.
        active: what is active, of all its features.
        feature: number of the feature.
        cell: the SAE's cell, for a flat SAE that does not say what sides its atoms have.

    Raises:
        WriteSAEError: a flat SAE says no sides, and no cell is given.
    """
    check_atom(sae, feature)
    if is_codes(sae):
        return _of_codes(sae, *active.alone(feature).by_position())
    sides = (cell.d_k, cell.d_v) if cell is not None else sides_of(sae)
    if sides is None:
        raise WriteSAEError("this flat SAE does not say which sides its atoms have: give its cell too")
    atom = atom_factors(sae, torch.tensor([feature], device=active.position.device), *sides)
    coefficients = active.of_feature(feature)[:, None, None].float()
    return Factors(atom.key * coefficients, atom.value.expand(len(active), -1, -1))


def check_any_fires(n_firings: int, n_tested: int, passages: Int[Tensor, "passage pos"]) -> None:
    """Refuse passages without firings, or with firings only at positions that are left out.

    Raises:
        WriteSAEError: there is nothing to test.
    """
    if not n_firings:
        raise WriteSAEError(
            f"nothing fires in {len(passages)} passages of {passages.shape[1]} tokens: is this the model "
            "and the hook that the SAE was trained on?"
        )
    if not n_tested:
        raise WriteSAEError("there are firings, but skip_positions left none of them to test")


def _dominant(activities: Sequence[Activity], passages: Int[Tensor, "passage pos"]) -> Int[Tensor, " firing"]:
    """The atom (of codes: the value code) of every firing.

    Raises:
        WriteSAEError: nothing fires.
    """
    atoms = torch.cat([x.dominant for x in activities])
    atoms = atoms[atoms >= 0]
    check_any_fires(len(atoms), len(atoms), passages)
    return atoms


def draw_atoms(
    activities: Sequence[Activity],
    passages: Int[Tensor, "passage pos"],
    n_atoms: int,
    rng: torch.Generator,
    with_key_codes: bool = True,
) -> Int[Tensor, " atom"]:
    """A random choice of ``n_atoms`` atoms that fire (all, where there are fewer), sorted, on the CPU.

    Of codes: among those that dominate either side at some firing.

    Args:
        activities: of every passage.
        passages: what they are of.
        n_atoms: how many to choose.
        rng: of the choice.
        with_key_codes: of codes, False: value codes alone.

    Raises:
        WriteSAEError: nothing fires.
    """
    alive = _dominant(activities, passages)
    if with_key_codes:
        keys = torch.cat([x.dominant_key for x in activities])
        alive = torch.cat([alive, keys[keys >= 0]])
    alive = alive.unique().cpu()
    return alive[torch.randperm(len(alive), generator=rng)[:n_atoms]].sort().values


def check_atom(sae: SAE[Any], atom: int | None) -> None:
    """Refuse the number of an atom or code that the SAE does not have; None is allowed.

    Raises:
        WriteSAEError: there is no such atom.
    """
    if atom is not None and not (is_whole(atom) and 0 <= atom < sae.cfg.d_sae):
        what = "code" if is_codes(sae) else "atom"
        raise WriteSAEError(f"{what} {atom!r} does not exist: the SAE has {what}s 0 to {sae.cfg.d_sae - 1}")


def choose_atom(
    atom: int | None, activities: Sequence[Activity], passages: Int[Tensor, "passage pos"]
) -> int:
    """The given atom, or the one that fires most often (of codes: the most frequent value code).

    Raises:
        WriteSAEError: the atom is active nowhere, or nothing fires.
    """
    if atom is None:
        atom = int(_dominant(activities, passages).bincount().argmax())
    if not any(bool((x.of_feature(atom) > 0).any()) for x in activities):
        what = "code" if any(x.n_key for x in activities) else "atom"
        raise WriteSAEError(f"{what} {atom} is active at no position of these {len(passages)} passages")
    return int(atom)


def median_write_norm(activities: Sequence[Activity]) -> float:
    """Median Frobenius norm of a cell's native writes over all positions."""
    norms = [x.write_key.norm(dim=-1) * x.write_value.norm(dim=-1) for x in activities]
    return float(torch.cat(norms).median())


@torch.no_grad()
def atom_factors(sae: SAE[Any], atoms: Int[Tensor, " atom"], d_k: int, d_v: int) -> Factors:
    """Chosen decoder atoms as factors; the atoms of a flat SAE get rank d_v (column by column).

    A code counts as the matrix that it has with the other side at the cell's mean (`MatrixSAE.W_dec`).

    Raises:
        WriteSAEError: an atom is not finite.
    """
    if isinstance(sae, MatrixSAE) and sae.cfg.decoder != "dense":
        factors = Factors(*(f[atoms].float() for f in sae.decoder_factors()))
        check_finite("SAE's atoms", *factors)
        return factors
    matrices = sae.W_dec[atoms].float().view(-1, d_k, d_v)
    check_finite("SAE's atoms", matrices)
    if not isinstance(sae, MatrixSAE) and getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # SAELens's coefficients are those of atoms of norm 1.
        matrices = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    columns = torch.eye(d_v, device=matrices.device).expand(len(matrices), -1, -1)
    return Factors(matrices.mT, columns)


def native_cosines(firings: Firings, atoms: Factors) -> Float[Tensor, " firing"]:
    """Signed cosine between each firing's native write and a matrix (0: either is zero)."""
    writes = native_of(firings)
    return inner(writes, atoms) / (writes.norm().clamp(min=1e-30) * atoms.norm().clamp(min=1e-30))


def atom_cosines(sae: SAE[Any], firings: Firings, cell: Cell) -> Float[Tensor, " firing"]:
    """`native_cosines` with each firing's own atom, for some at a time: the atoms of a flat SAE are whole."""
    step = max(1, NUMBERS_AT_ONCE // (cell.d_k * cell.d_v))
    return torch.cat(
        [
            native_cosines(firings.subset(rows), atom_factors(sae, firings.atom[rows], cell.d_k, cell.d_v))
            for rows in torch.arange(len(firings.atom), device=firings.atom.device).split(step)
        ]
    )
