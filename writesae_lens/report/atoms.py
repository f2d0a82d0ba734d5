"""What there is to know of every atom of a dictionary, for people to browse."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.passes import LOGITS_PER_PASS, native_factors
from writesae_lens.saes.rank1 import Matrices, leading_pairs, normalized, overlaps
from writesae_lens.saes.sae import MatrixSAE

# Rows of similarities between atoms that are held at once.
_BLOCK = 1024


class Profiles(NamedTuple):
    """What the decoder alone says of the atoms.

    Attributes:
        key, value: the leading singular pair of each atom, unit vectors; their product's sign is the atom's,
            and each pair is turned so that most reads of the text see the key side positively.
        read_share: share of the reads q with q . key > 0, at least one half.
        rank1_share: share of an atom's squared norm that the pair has (1 for rank-1 atoms).
        tokens, logits: ids of the tokens that the value side, through the head's output matrix and the
            unembedding, promotes most (first half, falling) and suppresses most (second half, rising).
        neighbours, cosines: the nearest other atoms by absolute cosine, and their signed cosines.
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
    """Read every atom's directions, tokens and neighbours off the decoder.

    The tokens are those of the direct path, value W_O[head] W_U (the paper's direction): no norm, no gate, no
    later layer. Which way an atom pushes depends on the sign with which it is read, hence on the text.

    Args:
        model: the model that the SAE was trained on.
        sae: any SAE on the cell.
        cell: the cell.
        passages: text whose reads give the keys' signs.
        n_tokens: tokens to give on each side.
        n_near: neighbours to give.
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
    tokens, logits = _tokens(model, cell, value, n_tokens)
    near, cosines = _neighbours(atoms, min(n_near, len(key) - 1))
    return Profiles(
        key,
        value,
        positive.maximum(1 - positive),
        cosine.square().clamp(max=1),
        tokens,
        logits,
        near,
        cosines,
    )


def _times(matrices: Matrices, value: Float[Tensor, "atom d_v"]) -> Float[Tensor, "atom d_k"]:
    if isinstance(matrices, Tensor):
        return torch.einsum("nkv,nv->nk", matrices.float(), value)
    return torch.einsum("nrk,nrv,nv->nk", matrices.key.float(), matrices.value.float(), value)


def _tokens(
    model: HookedRecurrent, cell: Cell, value: Float[Tensor, "atom d_v"], count: int
) -> tuple[Int[Tensor, "atom shown"], Float[Tensor, "atom shown"]]:
    native: Any = model.original_model
    unembedding = native.get_output_embeddings().weight.float()
    residual = value @ model.mixers[cell.layer].head_output(cell.head).float()
    count = min(count, len(unembedding) // 2)
    ids, sizes = [], []
    for part in residual.split(max(1, LOGITS_PER_PASS // len(unembedding))):
        logits = part @ unembedding.T
        (up, most), (down, least) = logits.topk(count), logits.topk(count, largest=False)
        ids.append(torch.cat([most, least], dim=1))
        sizes.append(torch.cat([up, down], dim=1))
    return torch.cat(ids), torch.cat(sizes)


def _neighbours(atoms: Matrices, count: int) -> tuple[Int[Tensor, "atom near"], Float[Tensor, "atom near"]]:
    n_atoms = len(atoms.key if not isinstance(atoms, Tensor) else atoms)
    near, cosines = [], []
    for rows in torch.arange(n_atoms).split(_BLOCK):
        similar = overlaps(atoms[rows], atoms)
        similar[torch.arange(len(rows)), rows] = 0
        found = similar.abs().topk(count).indices
        near.append(found)
        cosines.append(similar.gather(1, found))
    return torch.cat(near), torch.cat(cosines)


def statistics_of_atoms(
    partition: pd.DataFrame, replacement: pd.DataFrame, contexts: pd.DataFrame
) -> pd.DataFrame:
    """One row an atom of the dictionary, from the records of three experiments.

    Args:
        partition: of `partition_atoms`: class, firings and median cosine.
        replacement: of `replacement_test`: win rate and KLs.
        contexts: of `top_contexts`: largest coefficient and the most common token.

    Returns:
        a frame indexed by atom: class, n_firings, median_cosine, n_tested, win_rate, kl_atom, kl_delete
        (medians, nats), coefficient (largest), token (the most common text of its top contexts).
    """
    table = partition.set_index("atom")[["class", "n_firings", "median_cosine"]]
    tested = replacement.assign(win=replacement.kl_atom < replacement.kl_delete).groupby("atom")
    table = table.join(
        tested.agg(
            n_tested=("win", "size"),
            win_rate=("win", "mean"),
            kl_atom=("kl_atom", "median"),
            kl_delete=("kl_delete", "median"),
        )
    )
    table = table.join(contexts.groupby("atom").coefficient.max())
    texts = contexts.dropna(subset=["text"]).groupby("atom").text
    table = table.join(texts.agg(lambda each: each.mode().iloc[0]).rename("token"))
    table["n_tested"] = table.n_tested.fillna(0).astype(np.int64)
    return table
