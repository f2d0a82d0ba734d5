"""Independent truths that the experiments are compared with: plain passes with edits, plain encodings."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor

from hooked_models import zoo
from writesae_lens import WriteSAE, WriteSAEConfig

LAYER, HEAD = 1, 2
"""The cell that all of these tests look at."""


def make_sae(model: Any, kind: str = "write", layer: int = LAYER, head: int = HEAD, **options: Any) -> Any:
    """A random SAE of 32 atoms on a cell's writes or states (``kind``), or a flat SAE of SAELens on its writes."""
    torch.manual_seed(options.pop("seed", 0))
    cell = model.cell(layer, head)
    if kind == "flat":
        sizes = {"d_sae": 32, "k": 2, "rescale_acts_by_decoder_norm": False} | options
        sae, kind = TopKSAE(TopKSAEConfig(d_in=cell.d_k * cell.d_v, **sizes)), "write"
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    sae.cfg.metadata.model_name = model.cfg.model_name
    return sae


def silenced(sae: Any) -> Any:
    """The SAE with no atom ever active."""
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    return sae


def read_passages(model: Any, n: int = 2, length: int = 20) -> Tensor:
    """The first passages of the shipped text, [n, length]."""
    text = zoo.held_out_text()[: 20 * n * length]
    return model.to_tokens(text, prepend_bos=False, truncate=False)[0, : n * length].view(n, length)


def cached(model: Any, tokens: Tensor, name: str) -> Tensor:
    """The activation at a hook, from a plain pass."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


def encoded(model: Any, sae: Any, tokens: Tensor) -> Tensor:
    """Coefficients of all atoms, [passage, pos, atom], from the activation at the SAE's own hook."""
    with torch.no_grad():
        return sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name)).double()


def dominant_atoms(model: Any, sae: Any, tokens: Tensor) -> set[int]:
    """The atoms that are the most active at some position."""
    acts = encoded(model, sae, tokens).flatten(0, 1)
    return {int(row.argmax()) for row in acts if row.max() > 0}


def logits_with_added(
    model: Any,
    passage: Tensor,
    positions: Tensor,
    matrices: list[Tensor],
    layer: int = LAYER,
    head: int = HEAD,
) -> tuple[Tensor, Tensor]:
    """Logits at each position after a full pass in which a hook adds the matrix to the write there; and without."""
    rows = torch.arange(len(positions))

    def add(write: Tensor, hook: Any) -> Tensor:
        write = write.clone()
        write[rows, positions] += torch.stack(matrices).flatten(1).to(write)
        return write

    with torch.no_grad():
        native = model(passage[None])[0, positions]
        hooks = [(model.write_hook_name(layer, head), add)]
        changed = model.run_with_hooks(passage.expand(len(positions), -1), fwd_hooks=hooks)
    return changed[rows, positions].double(), native.double()


def kl_nats(patched: Tensor, base: Tensor) -> Tensor:
    """KL(patched || base) of logits, in float64."""
    p, b = patched.double().log_softmax(-1), base.double().log_softmax(-1)
    return (p.exp() * (p - b)).sum(-1)
