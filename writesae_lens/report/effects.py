"""What atoms and value codes promote and suppress: the measured shift of the logits, beside a control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell, Site
from hooked_models.unembedding import logits_of
from writesae_lens.experiments import swaps
from writesae_lens.experiments.firings import Firings, find_firings, is_codes, stand_in
from writesae_lens.experiments.replace import thin
from writesae_lens.experiments.run import generator
from writesae_lens.saes.rank1 import Factors

# Numbers of residual streams, and of logits, that are held at once: 64 MiB in float32 each.
_AT_ONCE = 2**24


class Effects(NamedTuple):
    """Measured effects of the atoms, or value codes, that fire, in rising order.

    A shift is the mean, over firings at which the atom is dominant, of the logits with the atom in the
    write's place minus those with the write deleted, at the firing's own position, each beyond the mean shift
    of all tokens. A value code is written alone, at the address that the active key codes give. A key code
    has no effect without a content, and is not measured.

    Attributes:
        atom: indices in the dictionary.
        n: number of firings measured.
        tokens: first half the ids of the tokens whose logits the atom raises most, falling; second half those
            that it lowers most, rising.
        shift: their shifts (logits).
        agreement: share of the firings at which the shift has the sign of the mean.
        control: shifts of the same tokens with another atom (of codes another content at the same address)
            of the same norm at the same firings.
    """

    atom: Int[Tensor, " measured"]
    n: Int[Tensor, " measured"]
    tokens: Int[Tensor, "measured shown"]
    shift: Float[Tensor, "measured shown"]
    agreement: Float[Tensor, "measured shown"]
    control: Float[Tensor, "measured shown"]


@torch.no_grad()
def measure_effects(
    model: HookedRecurrent,
    sae: SAE[Any],
    site: Site,
    passages: Int[Tensor, "passage pos"],
    n_tokens: int = 10,
    max_firings: int = 8,
    seed: int = 0,
    verbose: bool = True,
) -> Effects:
    """The tokens that each atom raises and lowers most where it fires.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell.
        site: the SAE's cell, and whether it is on writes or states.
        passages: text.
        n_tokens: number of raised tokens, and of lowered ones, for each atom.
        max_firings: firings of an atom to measure, drawn at random where there are more.
        seed: of the draws.
        verbose: show a progress bar.
    """
    firings = [find_firings(model, sae, site, passage) for passage in passages]
    kept = thin(firings, 0, None, max_firings, seed)
    some = [f.subset(index.to(f.atom.device)) for f, index in zip(firings, kept, strict=True)]
    atom, parts = torch.cat([f.atom for f in some]), []
    bar = tqdm(
        _blocks(atom, _AT_ONCE // (3 * model.cfg.d_model)), desc="Effects", unit="block", disable=not verbose
    )
    for atoms in bar:
        rows = _residuals(model, sae, site, passages, firings, kept, some, atoms, seed)
        for few in atoms.split(max(1, _AT_ONCE // (3 * model.cfg.d_vocab))):
            parts.append(_strongest(few, *_sums(model, few, *rows), min(n_tokens, model.cfg.d_vocab // 2)))
    if not parts:
        none = torch.zeros(0, 2 * n_tokens)
        return Effects(atom, atom, none.long(), none, none, none)
    return Effects(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _blocks(atom: Int[Tensor, " firing"], n_firings: int) -> list[Int[Tensor, " atom"]]:
    """The atoms, in blocks of about so many firings."""
    atoms, count = atom.unique(return_counts=True)
    block = (count.cumsum(0) - 1) // max(1, n_firings)
    return [atoms[block == n] for n in block.unique().tolist()]


def _residuals(
    model: HookedRecurrent,
    sae: SAE[Any],
    site: Site,
    passages: Int[Tensor, "passage pos"],
    every: Sequence[Firings],
    kept: Sequence[Tensor],
    some: Sequence[Firings],
    atoms: Int[Tensor, " atom"],
    seed: int,
) -> tuple[Int[Tensor, " row"], Float[Tensor, "condition row d_model"]]:
    """The last residual stream at the firings of some atoms, with three matrices in the write's place.

    Returns:
        each firing's atom; and the residual streams with the atom, with its control and with nothing written.
    """
    cell, found = site.cell, []
    for number, tokens in enumerate(passages):
        mine = torch.isin(some[number].atom, atoms)
        if not bool(mine.any()):
            continue
        here, index = some[number].subset(mine), kept[number][mine.cpu()]
        rng = generator(seed, number, int(atoms[0]))
        if is_codes(sae):
            own, other = _contents(sae, here, cell, rng)
        else:
            own = stand_in(sae, here, cell)
            other = swaps.random_like("atom", sae, every[number], index, cell, rng)
        conditions = [own, swaps.with_norm(other, own.norm()), swaps.zeros_like(own)]
        for part, _, branches in swaps.swapped_residuals(model, cell, tokens, here.position, conditions):
            found.append((here.atom[part], branches))
    atom, residuals = zip(*found, strict=True)
    return torch.cat(atom), torch.cat(residuals, dim=1)


def _sums(
    model: HookedRecurrent,
    atoms: Int[Tensor, " atom"],
    atom: Int[Tensor, " row"],
    residuals: Float[Tensor, "condition row d_model"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over the firings of some atoms: their number, sums of shifts, of positive ones, of the control's."""
    mine = torch.isin(atom, atoms).nonzero().squeeze(-1)
    at = torch.searchsorted(atoms, atom[mine])
    shifts, positive, others = torch.zeros(3, len(atoms), model.cfg.d_vocab, device=atoms.device)
    step = max(1, _AT_ONCE // (3 * model.cfg.d_vocab))
    for rows, to in zip(mine.split(step), at.split(step), strict=True):
        written, control, deleted = logits_of(model, residuals[:, rows])
        written, control = (x - deleted for x in (written, control))
        written, control = (x - x.mean(-1, keepdim=True) for x in (written, control))
        shifts.index_add_(0, to, written.to(shifts))
        positive.index_add_(0, to, (written > 0).to(shifts))
        others.index_add_(0, to, control.to(shifts))
    return at.bincount(minlength=len(atoms)), shifts, positive, others


def _contents(sae: SAE[Any], firings: Firings, cell: Cell, rng: torch.Generator) -> tuple[Factors, Factors]:
    """The dominant value code of each firing at its stand-in's address, and another value code there."""
    codes: Any = sae
    assert firings.features is not None
    assert firings.activations is not None
    size = (firings.activations * (firings.features == firings.atom[:, None])).sum(-1)
    own, vectors = firings.atom - codes.cfg.n_key, codes.dec_value.float()
    further = torch.randint(1, max(2, len(vectors)), own.shape, generator=rng).to(own.device)
    other = vectors[(own + further) % len(vectors)]
    contents = (vectors[own] * size[:, None])[:, None]
    address = stand_in(sae, firings, cell).key
    return Factors(address, contents), Factors(address, other[:, None])


def _strongest(
    atoms: Int[Tensor, " atom"],
    n: Int[Tensor, " atom"],
    shifts: Float[Tensor, "atom d_vocab"],
    positive: Float[Tensor, "atom d_vocab"],
    others: Float[Tensor, "atom d_vocab"],
    count: int,
) -> Effects:
    """The tokens with the largest and the smallest mean shifts."""
    mean = shifts / n[:, None]
    tokens = torch.cat([mean.topk(count).indices, mean.topk(count, largest=False).indices], dim=1)
    shift, up = mean.gather(1, tokens), positive.gather(1, tokens) / n[:, None]
    agreement = torch.where(shift > 0, up, 1 - up)
    return Effects(atoms, n, tokens, shift, agreement, others.gather(1, tokens) / n[:, None])
