"""Baselines that a WriteSAE is compared with (paper, experiment 10): other dictionaries of the same cell.

Each is an SAE with the cell's hook in its metadata, so every experiment takes it. The paper's variant with a
dense encoder is trained with ``WriteSAETrainingConfig(encoder="dense")``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import sides_of
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Count, Seed, check
from writesae_lens.experiments.passages import find_passages
from writesae_lens.experiments.passes import native_writes
from writesae_lens.experiments.stand_ins import untrained
from writesae_lens.experiments.subjects import check_model, check_sae
from writesae_lens.saes.activations import for_training
from writesae_lens.saes.config import WriteSAEConfig, WriteSAETrainingConfig
from writesae_lens.saes.sae import WriteSAE

# How many writes the principal component is computed from; their Gram matrix has the square of it in entries.
_MAX_WRITES = 4096


@torch.no_grad()
def flat_svd(sae: SAE[Any], d_k: int | None = None, d_v: int | None = None) -> WriteSAE:
    """A flat TopK SAE with each atom replaced by its best rank-1 approximation (its leading singular pair).

    Encoder, selection and decoder bias are those of the flat SAE, so every coefficient stays the same.

    Args:
        sae: SAELens's ``topk``, or a `WriteSAE` with dense encoder and decoder.
        d_k, d_v: sides of the cell, if neither the SAE's config nor its metadata has them.

    Raises:
        WriteSAEError: the SAE is of another kind, or its sides are unknown.
    """
    check_sae(sae)
    check(Count | None, d_k=d_k, d_v=d_v)
    cfg: Any = sae.cfg
    ours = isinstance(cfg, WriteSAEConfig) and (cfg.encoder, cfg.decoder, cfg.activation)
    if ours != ("dense", "dense", "topk") and cfg.architecture() != "topk":
        raise WriteSAEError("flat_svd takes an SAE whose encoder and decoder are dense, with TopK")
    sides = (d_k, d_v) if d_k is not None and d_v is not None else sides_of(sae)
    if sides is None or sides[0] * sides[1] != sae.cfg.d_in:
        raise WriteSAEError(
            f"the atoms of this SAE are rows of {sae.cfg.d_in} numbers: give d_k and d_v, with that product"
        )
    if sae.cfg.normalize_activations != "none":
        raise WriteSAEError(
            f"normalize_activations={sae.cfg.normalize_activations!r} scales the inputs: fold that in first"
        )
    names = ("W_dec", "W_enc", "b_enc", "b_dec")
    atoms, encoder, bias, decoder_bias = (getattr(sae, name).float() for name in names)
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - decoder_bias @ encoder
    if sae.cfg.rescale_acts_by_decoder_norm:  # atoms are selected as if all had norm 1
        norm = atoms.norm(dim=-1).clamp(min=1e-8)
        atoms, encoder, bias = atoms / norm[:, None], encoder * norm, bias * norm
    left, singular, right = torch.linalg.svd(atoms.view(-1, *sides), full_matrices=False)
    flat = WriteSAE(
        WriteSAEConfig(
            d_k=sides[0], d_v=sides[1], d_sae=sae.cfg.d_sae, k=sae.cfg.k, encoder="dense",
            rescale_acts_by_decoder_norm=False, device=sae.cfg.device, metadata=sae.cfg.metadata,
        )
    )  # fmt: skip
    flat.load_state_dict(
        {
            "dec_key": (left[:, :, 0] * singular[:, :1])[:, None],
            "dec_value": right[:, :1],
            "enc_matrix": encoder.T.reshape(-1, *sides),
            "b_enc": bias,
            "b_dec": decoder_bias,
        }
    )
    return flat


@torch.no_grad()
def principal_component(
    model: HookedRecurrent,
    layer: int,
    head: int,
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None = None,
    seed: int = 0,
) -> WriteSAE:
    """An SAE of two atoms: the leading principal component of a cell's writes (not centred), and minus it.

    Args:
        model: the model.
        layer, head: the cell.
        tokens: passages whose writes are used, or a text; of more than 4,096 writes a random sample is used.
        context_size: tokens of a passage, for text (None: 256).
        seed: of the sample.

    Raises:
        HookedModelError: the model has no such cell, the text is shorter than a passage, or the writes are
            all zero or not finite.
    """
    check_model(model)
    check(Seed, seed=seed)
    cell = model.cell(layer, head)
    passages = find_passages(model, cell, tokens, context_size)
    writes = [native_writes(model, cell, passage) for passage in passages]
    key, value = (torch.cat(x).cpu().double() for x in zip(*writes, strict=True))
    chosen = torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))[:_MAX_WRITES]
    key, value = key[chosen], value[chosen]
    # The component is a weighted sum of the writes; factors give the Gram matrix that has the weights.
    weights = torch.linalg.eigh((key @ key.T) * (value @ value.T)).eigenvectors[:, -1]
    component = (key * weights[:, None]).T @ value
    if not float(component.norm()) > 0:
        raise WriteSAEError(
            f"the writes of layer {layer} head {head} are all zero, and have no principal component: choose "
            "another cell"
        )
    component = component / component.norm()
    sae = WriteSAE(
        WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=2, k=1, encoder="tied", decoder="dense")
    ).to(passages.device)
    sae.load_state_dict(sae.state_dict() | {"dec_matrix": torch.stack([component, -component]).float()})
    sae.cfg.metadata.model_name = model.cfg.model_name
    sae.cfg.metadata.hook_name = model.write_hook_name(layer, head)
    return sae


def lookup(
    model: HookedRecurrent,
    layer: int,
    head: int,
    d_sae: int,
    tokens: Int[Tensor, "passage pos"] | str | None = None,
    seed: int = 0,
) -> WriteSAE:
    """An untrained SAE whose atoms are ``d_sae`` writes of a text: the most similar one stands in.

    It is tied and has k=1, so that a write's stand-in is its projection onto the write of the text that has
    the largest cosine to it (`writesae_lens.experiments.stand_ins`). Every experiment takes it.

    Args:
        model: the model.
        layer, head: the cell.
        d_sae: number of writes; all, where the text has fewer.
        tokens: passages or a text (None: the training part of the shipped text).
        seed: of the choice of writes.

    Raises:
        HookedModelError: the model has no such cell, the text is shorter than a passage, or the writes are
            all zero or not finite.
    """
    check_model(model)
    check(Count, d_sae=d_sae)
    check(Seed, seed=seed)
    return untrained(model, model.cell(layer, head), d_sae, tokens, seed).lookup


def matched_d_sae(cfg: WriteSAETrainingConfig, encoder: str, decoder: str) -> int:
    """How many features a dictionary of another kind has with as many parameters, or just fewer.

    Args:
        cfg: config of the dictionary to match.
        encoder, decoder: kind of the other dictionary, as in the config; codes count as half of each side.

    Raises:
        WriteSAEError: there is no such encoder or decoder, or they do not go together.
    """
    check(Literal["bilinear", "tied", "dense"], encoder=encoder)
    check(Literal["factored", "dense", "codes"], decoder=decoder)
    if (encoder, decoder) == ("dense", "codes"):
        raise WriteSAEError("codes have an encoder of their own a side: choose encoder bilinear or tied")
    # Parameters of the activation per feature (thresholds, gates), and the bias.
    learnt = 1 + sum(p.numel() for p in for_training(cfg, torch.zeros(1)).parameters())
    factors = cfg.rank * (cfg.d_k + cfg.d_v)

    def per_atom(encoder: str, decoder: str) -> int:
        sizes = {"bilinear": factors, "dense": cfg.d_k * cfg.d_v, "tied": 0}
        return sizes[encoder] + sizes["bilinear" if decoder == "factored" else "dense"] + learnt

    budget = cfg.d_sae * per_atom(cfg.encoder, cfg.decoder)
    if cfg.decoder == "codes":
        of_codes = cfg.n_key * cfg.d_k + cfg.n_value * cfg.d_v
        budget = of_codes * (1 if cfg.encoder == "tied" else 2) + cfg.d_sae * learnt
    if decoder == "codes":  # a key code and a value code at a time
        pair = (cfg.d_k + cfg.d_v) * (1 if encoder == "tied" else 2) + 2 * learnt
        return 2 * max(1, budget // pair)
    return max(1, budget // per_atom(encoder, decoder))
