"""A dictionary without training: its atoms are native writes of a cell."""

from typing import Any

import torch
from torch import Tensor

from writesae_lens import WriteSAE, WriteSAEConfig


def sae_of_writes(
    model: Any, layer: int, head: int, tokens: Tensor, d_sae: int, context_size: int
) -> WriteSAE:
    """An SAE whose atoms are writes at equal distances in the tokens [passage, pos]."""
    name, cell = model.write_hook_name(layer, head), model.cell(layer, head)
    with torch.no_grad():
        writes = model.run_with_cache(tokens, names_filter=[name])[1][name].flatten(0, 1)
    writes = writes[:: len(writes) // d_sae][:d_sae]
    left, _, right = torch.linalg.svd(writes.unflatten(-1, (cell.d_k, cell.d_v)), full_matrices=False)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=d_sae, k=4, encoder="tied"))
    with torch.no_grad():
        sae.dec_key.copy_(left[:, :, :1].mT)
        sae.dec_value.copy_(right[:, :1])
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name = model.cfg.model_name, name
    metadata.context_size = context_size
    return sae
