"""Firings: which atoms of an SAE are active at which positions of a passage, and the native writes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Site
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import is_whole
from writesae_lens.experiments.passes import check_finite, native_factors
from writesae_lens.saes.rank1 import Factors, inner
from writesae_lens.saes.sae import MatrixSAE


class Firings(NamedTuple):
    """Some firings of one passage: position, atom, coefficient and the native write there."""

    position: Int[Tensor, " firing"]
    atom: Int[Tensor, " firing"]
    coefficient: Float[Tensor, " firing"]
    write_key: Float[Tensor, "firing d_k"]
    write_value: Float[Tensor, "firing d_v"]

    def subset(self, index: Tensor) -> Firings:
        """The firings of some indices, or of a mask."""
        return Firings(*(x[index] for x in self))


def native_of(firings: Firings) -> Factors:
    """The native writes of firings, as factors of rank 1."""
    return Factors(firings.write_key[:, None].float(), firings.write_value[:, None].float())


class Activity(NamedTuple):
    """Coefficients of all atoms at every position of one passage, and the native writes."""

    acts: Float[Tensor, "pos d_sae"]
    write_key: Float[Tensor, "pos d_k"]
    write_value: Float[Tensor, "pos d_v"]

    @property
    def dominant(self) -> Int[Tensor, " pos"]:
        """The atom with the largest coefficient at every position; -1 where no atom is active."""
        return torch.where(self.acts.amax(dim=-1) > 0, self.acts.argmax(dim=-1), -1)


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
    if on_states:
        acts = sae.encode(cache[state_name][0])
    elif isinstance(sae, MatrixSAE):
        acts = sae.encode_factors(key, value)
    else:
        acts = sae.encode((key[:, :, None] * value[:, None, :]).flatten(1))
    check_finite("coefficients of the SAE's atoms", acts)
    return Activity(acts, key, value)


def find_firings(model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"]) -> Firings:
    """The firings of one passage: the dominant atom at each position where any atom is active."""
    acts, key, value = activity(model, sae, site, tokens)
    coefficient, atom = acts.max(dim=-1)
    fires = (coefficient > 0).nonzero().squeeze(-1)
    return Firings(fires, atom[fires], coefficient[fires].float(), key[fires], value[fires])


def check_any_fires(n_firings: int, n_tested: int, passages: Int[Tensor, "passage pos"]) -> None:
    """Refuse passages without firings, or with firings only at positions that are left out.

    Raises:
        WriteSAEError: there is nothing to test.
    """
    if not n_firings:
        raise WriteSAEError(
            f"no atom fires in {len(passages)} passages of {passages.shape[1]} tokens: is this the model "
            "and the hook that the SAE was trained on?"
        )
    if not n_tested:
        raise WriteSAEError("atoms fire, but skip_positions left none of the firings to test")


def _dominant(activities: Sequence[Activity], passages: Int[Tensor, "passage pos"]) -> Int[Tensor, " firing"]:
    """The atom of every firing.

    Raises:
        WriteSAEError: no atom fires.
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
) -> Int[Tensor, " atom"]:
    """A random choice of ``n_atoms`` atoms that fire (all, where there are fewer), sorted, on the CPU.

    Raises:
        WriteSAEError: no atom fires.
    """
    alive = _dominant(activities, passages).unique().cpu()
    return alive[torch.randperm(len(alive), generator=rng)[:n_atoms]].sort().values


def check_atom(sae: SAE[Any], atom: int | None) -> None:
    """Refuse an atom that the SAE does not have; None is allowed.

    Raises:
        WriteSAEError: there is no such atom.
    """
    if atom is not None and not (is_whole(atom) and 0 <= atom < sae.cfg.d_sae):
        raise WriteSAEError(f"atom {atom!r} does not exist: the SAE has atoms 0 to {sae.cfg.d_sae - 1}")


def choose_atom(
    atom: int | None, activities: Sequence[Activity], passages: Int[Tensor, "passage pos"]
) -> int:
    """The given atom, or the one that fires most often.

    Raises:
        WriteSAEError: the atom is active nowhere, or no atom fires.
    """
    if atom is None:
        atom = int(_dominant(activities, passages).bincount().argmax())
    if not any(bool((x.acts[:, atom] > 0).any()) for x in activities):
        raise WriteSAEError(f"atom {atom} is active at no position of these {len(passages)} passages")
    return int(atom)


def median_write_norm(activities: Sequence[Activity]) -> float:
    """Median Frobenius norm of a cell's native writes over all positions."""
    norms = [x.write_key.norm(dim=-1) * x.write_value.norm(dim=-1) for x in activities]
    return float(torch.cat(norms).median())


@torch.no_grad()
def atom_factors(sae: SAE[Any], atoms: Int[Tensor, " atom"], d_k: int, d_v: int) -> Factors:
    """Chosen decoder atoms as factors; the atoms of a flat SAE get rank d_v (column by column).

    Raises:
        WriteSAEError: an atom is not finite.
    """
    if isinstance(sae, MatrixSAE) and sae.cfg.decoder == "factored":
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
    """Signed cosine between each firing's native write and its own atom, as matrices (0: either is zero)."""
    writes = native_of(firings)
    return inner(writes, atoms) / (writes.norm().clamp(min=1e-30) * atoms.norm().clamp(min=1e-30))
