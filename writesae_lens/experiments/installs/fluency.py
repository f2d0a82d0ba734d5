"""What an install costs in fluency: the continuation's perplexity natively, and its repetition."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.unembedding import logits_of
from writesae_lens.experiments.decoding import Prefix

# Logits that are in memory at once.
LOGITS_AT_ONCE = 2**25
# Repetition counts runs of so many tokens.
_GRAM = 3


@torch.no_grad()
def native_surprise(
    model: HookedRecurrent, prefix: Prefix, last: Int[Tensor, "row pos"], said: Int[Tensor, "row token"]
) -> Float[Tensor, "row token"]:
    """-log p of every token of some continuations under the unedited model, in nats.

    Args:
        model: the model.
        prefix: the prompts' cached tokens.
        last: those of the prompts' tokens that are not cached, for every row.
        said: the continuations.
    """
    residual = prefix.residual(torch.cat([last, said[:, :-1]], dim=1))[:, last.shape[1] - 1 :]
    step = max(1, LOGITS_AT_ONCE // model.cfg.d_vocab)
    parts = []
    for rows, tokens in zip(residual.flatten(0, 1).split(step), said.flatten().split(step), strict=True):
        log_p = logits_of(model, rows).float().log_softmax(-1)
        parts.append(-log_p.gather(1, tokens[:, None]).squeeze(1))
    return torch.cat(parts).view_as(said)


def repetition(said: Int[Tensor, "row token"]) -> list[float]:
    """The share of each continuation's runs of three tokens that have stood in it before."""
    shares = []
    for ids in said.tolist():
        grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return shares
