"""Logits in float32 from a model in half precision.

In bfloat16 a logit of 10 is known to 1/16, while an edit of one head moves logits by a hundredth of that. The
recurrences are computed in float32 in any case; here the last norm and the unembedding are too. What remains
is the rounding of the residual stream by the layers themselves.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hooked_models.upstream import is_listened_to

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

_WEIGHTS_AT_ONCE = 2**25
"""Weights of the unembedding that are converted at a time, 128 MB in float32."""


def run_to_logits(model: HookedRecurrent, tokens: Any, **options: Any) -> Float[Tensor, "batch pos d_vocab"]:
    """``model(tokens, **options)``; in half precision, the last norm and the unembedding are in float32.

    On a model in float32 or float64 this is that call and nothing else. So it is where something hooks the
    last norm or the unembedding, for a hook there means what the model itself computes.

    Args:
        model: the model.
        tokens: as for the model: ``[batch, pos]``, or a passage.
        **options: as for `HookedRecurrent.forward`; without ``return_type`` and ``logits_to_keep``.

    Returns:
        logits: of the model's dtype where that has 32 bits or more, else float32.
    """
    if not in_half_precision(model) or any(is_listened_to(point) for point in _last_hooks(model)):
        return model.forward(tokens, **options)
    own, seen = threading.get_ident(), []

    def see(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() == own:
            seen.append(arguments[0])

    handle = model.ln_final.register_forward_pre_hook(see)
    try:
        # The model's own unembedding of no position costs nothing.
        nothing = torch.zeros(0, dtype=torch.long, device=model.cfg.device)
        model.forward(tokens, logits_to_keep=nothing, **options)
    finally:
        handle.remove()
    return logits_of(model, seen[-1])


def in_half_precision(model: HookedRecurrent) -> bool:
    """Whether the model's weights have fewer than 32 bits (bfloat16, float16)."""
    dtype = model.original_model.get_output_embeddings().weight.dtype
    return torch.finfo(dtype).bits < 32


def logits_of(
    model: HookedRecurrent, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_vocab"]:
    """Last norm and unembedding of the residual stream after the last layer, in float32 at least.

    The unembedding is converted in cuts of the vocabulary, and again in the backward pass, so that no second
    copy of it is kept.
    """
    norm = copy.deepcopy(model.ln_final.original_component).float()
    unembed = model.original_model.get_output_embeddings()
    weight, bias = unembed.weight, unembed.bias
    hidden, step = norm(residual.float()), max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    parts = []
    for start in range(0, len(weight), step):
        here = slice(start, start + step)
        arguments = hidden, weight[here], None if bias is None else bias[here]
        differentiate = torch.is_grad_enabled() and hidden.requires_grad
        parts.append(
            checkpoint(_unembedded, *arguments, use_reentrant=False)
            if differentiate
            else _unembedded(*arguments)
        )
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return model.adapter.apply_output_logits_transform(logits)


def _unembedded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden, weight.float(), None if bias is None else bias.float())


def _last_hooks(model: HookedRecurrent) -> list[nn.Module]:
    """The hook points of the last norm and of the unembedding."""
    return [*model.ln_final.get_hooks().values(), *model.unembed.get_hooks().values()]
