"""Profiles of the features: directions, tokens and neighbours, from the decoder and the reads of a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.features.meets import direct_tokens
from writesae_lens.experiments.features.sides import features_by_side
from writesae_lens.experiments.passes import native_factors
from writesae_lens.saes.rank1 import Matrices, leading_pairs, normalized, overlaps
from writesae_lens.saes.sae import MatrixSAE

# Atoms whose cosines to all others are computed at once: bounds memory.
_ATOMS_PER_BLOCK = 1024
# Reads of a token that a mean over them needs.
_FEW_READS = 3


class Profiles(NamedTuple):
    """Properties of all features, in the order of the dictionary.

    A code is shown with the other side at the cell's mean.

    Attributes:
        key, value: the leading singular pair of each atom, unit vectors whose product has the atom's sign. Of
            the two signs that a pair can have, it has the one with q . key > 0 for most reads q of the text.
        read_share: share of the reads q with q . key > 0, at least one half.
        rank1_share: share of an atom's squared norm that its leading pair has (1 for rank-1 atoms).
        tokens, logits: ids of tokens and their value W_O[head] W_U: first half the tokens that the atom
            promotes most, falling; second half those that it suppresses most, rising. Of a key code, an
            address, in both halves the tokens of the text whose own reads meet it most, and what share of
            their squared norm lies along it, in the mean.
        neighbours, cosines: the nearest other features (of codes: of the same side) by absolute cosine, and
            their signed cosines.
    """

    key: Float[Tensor, "atom d_k"]
    value: Float[Tensor, "atom d_v"]
    read_share: Float[Tensor, " atom"]
    rank1_share: Float[Tensor, " atom"]
    tokens: Int[Tensor, "atom shown"]
    logits: Float[Tensor, "atom shown"]
    neighbours: Int[Tensor, "atom near"]
    cosines: Float[Tensor, "atom near"]


@torch.no_grad()
def profiles(
    model: HookedRecurrent,
    sae: SAE[Any],
    cell: Cell,
    passages: Int[Tensor, "passage pos"],
    n_tokens: int = 10,
    n_near: int = 8,
    verbose: bool = True,
) -> Profiles:
    """Directions, tokens and neighbours of every atom.

    The tokens are those of the direct path, value W_O[head] W_U (the paper's direction), without norm, gate
    or later layers. An atom that is read with the opposite sign suppresses what it would promote; the sign
    that most reads of the text have is taken.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell.
        cell: the cell that the SAE was trained on.
        passages: text whose reads decide the keys' signs.
        n_tokens: number of promoted tokens, and of suppressed ones, for each atom.
        n_near: number of neighbours for each atom.
        verbose: show a progress bar.
    """
    if isinstance(sae, MatrixSAE):
        atoms: Matrices = normalized(sae.atoms())
    else:
        atoms = normalized(sae.W_dec.float().view(-1, cell.d_k, cell.d_v))
    pairs = leading_pairs(atoms)
    key, value = pairs.key[:, 0].float(), pairs.value[:, 0].float()
    cosine = torch.einsum("nk,nk->n", key, _times(atoms, value))
    reads = [
        native_factors(model, cell, passage)[2].float()
        for passage in tqdm(passages, desc="Reads", unit="passage", disable=not verbose)
    ]
    positive = sum((q @ key.T > 0).sum(0) for q in reads) / passages.numel()
    assert isinstance(positive, Tensor)
    sign = torch.where(positive < 0.5, -1.0, 1.0)[:, None]
    key, value = key * sign, value * sign
    read_share, rank1_share = positive.maximum(1 - positive), cosine.square().clamp(max=1)
    sides = features_by_side(sae)
    n_key = len(sides.get("key", ()))
    tokens, logits = direct_tokens(model, cell, value[n_key:], n_tokens)
    if n_key:
        readers = _readers(torch.cat(reads), passages.flatten(), key[:n_key], tokens.shape[1] // 2)
        tokens, logits = (
            torch.cat([torch.cat([own, own], dim=1), of_values])
            for own, of_values in zip(readers, (tokens, logits), strict=True)
        )
    count = min(n_near, min(map(len, sides.values())) - 1)
    neighbours = [_neighbours(atoms[side.start : side.stop], count, side.start) for side in sides.values()]
    near = (torch.cat(x) for x in zip(*neighbours, strict=True))
    return Profiles(key, value, read_share, rank1_share, tokens, logits, *near)


def _times(matrices: Matrices, value: Float[Tensor, "atom d_v"]) -> Float[Tensor, "atom d_k"]:
    """Each atom's matrix times its value side."""
    if isinstance(matrices, Tensor):
        return torch.einsum("nkv,nv->nk", matrices.float(), value)
    return torch.einsum("nrk,nrv,nv->nk", matrices.key.float(), matrices.value.float(), value)


def _readers(
    reads: Float[Tensor, "pos d_k"],
    tokens: Int[Tensor, " pos"],
    keys: Float[Tensor, "code d_k"],
    count: int,
) -> tuple[Int[Tensor, "code token"], Float[Tensor, "code token"]]:
    """For each address the tokens that read it most: the mean of (q . u)^2 / |q|^2 over a token's reads.

    Tokens that stand in the text fewer than `_FEW_READS` times are left out, unless that leaves too few.
    """
    along = (reads @ keys.T).square() / reads.square().sum(-1, keepdim=True).clamp(min=1e-30)
    ids, place, n = tokens.unique(return_inverse=True, return_counts=True)
    share = along.new_zeros(len(ids), len(keys)).index_add_(0, place, along) / n[:, None]
    often = n >= _FEW_READS
    if int(often.sum()) < count:
        often = torch.ones_like(often)
    size, best = share[often].T.topk(min(count, int(often.sum())), dim=1)
    missing = count - size.shape[1]  # a text of very few tokens: the last one is repeated
    best, size = (torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1) for x in (best, size))
    return ids[often][best], size


def _neighbours(
    atoms: Matrices, count: int, first: int
) -> tuple[Int[Tensor, "atom near"], Float[Tensor, "atom near"]]:
    """The other features with the largest absolute cosines, numbered from ``first``, and the cosines."""
    n_atoms = len(atoms.key if not isinstance(atoms, Tensor) else atoms)
    neighbours, cosines = [], []
    for rows in torch.arange(n_atoms).split(_ATOMS_PER_BLOCK):
        similar = overlaps(atoms[rows], atoms)
        similar[torch.arange(len(rows)), rows] = 0  # an atom is not its own neighbour
        neighbours.append(similar.abs().topk(count).indices)
        cosines.append(similar.gather(1, neighbours[-1]))
    return torch.cat(neighbours) + first, torch.cat(cosines)
