"""Logits in float32 from a model in half precision.

In bfloat16 a logit of 10 is known to 1/16, while an edit of one head moves logits by a hundredth of that. The
recurrences are computed in float32 in any case; here the last norm and the unembedding are too. What remains
is the rounding of the residual stream by the layers themselves.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hooked_models.errors import HookedModelError

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent

_WEIGHTS_AT_ONCE = 2**25
"""Weights of the unembedding that are converted at a time, 128 MB in float32."""


def run_to_logits(model: HookedRecurrent, tokens: Any, **options: Any) -> Float[Tensor, "batch pos d_vocab"]:
    """``model(tokens, **options)``; in half precision, the last norm and the unembedding are in float32.

    On a model in float32 or float64 this is that call and nothing else. It is the same where something hooks
    the last norm or the unembedding: such a hook is meant for what the model itself computes.

    Args:
        model: the model.
        tokens: as for the model: ``[batch, pos]``, or a passage.
        **options: as for `HookedRecurrent.forward`; without ``return_type`` and ``logits_to_keep``.

    Returns:
        logits: of the model's dtype where that has 32 bits or more, else float32.
    """
    if not in_half_precision(model) or is_hooked(model):
        return model.forward(tokens, **options)
    return logits_of(model, run_to_residual(model, tokens, **options))


def run_to_residual(
    model: HookedRecurrent, tokens: Any, **options: Any
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream after the last layer, from a pass that unembeds nothing.

    Args:
        model: the model.
        tokens, **options: as for `run_to_logits`.

    Raises:
        HookedModelError: something hooks the last norm or the unembedding, which the pass leaves out.
    """
    if is_hooked(model):
        raise HookedModelError(
            "this run makes its logits of the last residual stream, past the hooks on "
            f"{', '.join(model.busy_hooks[:3])}: remove them first (model.reset_hooks(), model.reset_saes())"
        )
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
    return seen[-1]


def in_half_precision(model: HookedRecurrent) -> bool:
    """Whether the model's weights have fewer than 32 bits (bfloat16, float16)."""
    return torch.finfo(output_embedding(model).weight.dtype).bits < 32


def logits_of(
    model: HookedRecurrent, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_vocab"]:
    """Last norm and unembedding of the residual stream after the last layer, in float32 at least.

    An unembedding in half precision is converted in cuts of the vocabulary, and again in the backward pass,
    so that no second copy of it is kept.
    """
    hidden, parts = _normed(model, residual), []
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    for weight, bias in _cuts(model, hidden.dtype):
        parts.append(
            checkpoint(_unembedded, hidden, weight, bias, use_reentrant=False)
            if differentiate and weight.dtype != hidden.dtype
            else _unembedded(hidden, weight, bias)
        )
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return model.adapter.apply_output_logits_transform(logits)


def token_logits(
    model: HookedRecurrent, residual: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """The logit of one token at each place, in float32 at least, without those of all others.

    Args:
        model: the model.
        residual: the residual stream after the last layer.
        tokens: ids.
    """
    hidden, unembed = _normed(model, residual), output_embedding(model)
    logits = (hidden * unembed.weight[tokens].to(hidden)).sum(-1)
    if unembed.bias is not None:
        logits = logits + unembed.bias[tokens].to(hidden)
    return model.adapter.apply_output_logits_transform(logits)


@torch.no_grad()
def rounding_kl(
    model: HookedRecurrent, residual: Float[Tensor, "position d_model"], layer: int
) -> Float[Tensor, " position"]:
    """KL between two runs that differ by nothing but how they round the residual stream; 0 from 32 bits on.

    A run with an edit rounds each layer's sum anew. Each layer from ``layer`` on is counted with one rounding
    of the residual stream, x (1 + e) with e uniform within half a unit in the last place, in each of the two
    runs. (Mamba-2 keeps the stream itself in float32, and only what its layers read and add is rounded: that
    is counted as one rounding in all.) The KL is the expected one to second order, half of the variance of
    the logits' shift under the predicted distribution p::

        (eps^2 / 12) n_roundings sum_i x_i^2 Var_p(W_i)        x after the last norm, W the unembedding

    times the square of the factor by which some models (Granite, Falcon-H1) scale their logits.

    Args:
        model: the model.
        residual: the native residual stream after the last layer.
        layer: of the edit.
    """
    if not in_half_precision(model):
        return torch.zeros(len(residual), device=residual.device)
    eps = torch.finfo(output_embedding(model).weight.dtype).eps
    in_half = torch.finfo(residual.dtype).bits < 32
    n_roundings = len(model.blocks) - layer if in_half else 1
    p, x = logits_of(model, residual).softmax(-1), _normed(model, residual)
    mean, square, start = torch.zeros_like(x), torch.zeros_like(x), 0
    for weight, _ in _cuts(model, x.dtype):
        part = p[:, start : start + len(weight)]
        mean += part @ weight.float()
        square += part @ weight.float().square()
        start += len(weight)
    spread = (x.square() * (square - mean.square()).clamp(min=0)).sum(-1)
    scale = model.adapter.apply_output_logits_transform(torch.ones((), device=spread.device))
    return eps**2 / 12 * n_roundings * scale**2 * spread


def _normed(model: HookedRecurrent, residual: Float[Tensor, "*batch d_model"]) -> Tensor:
    """The last norm, in float32 at least."""
    wide = torch.promote_types(output_embedding(model).weight.dtype, torch.float32)
    norm = model.ln_final.original_component
    if output_embedding(model).weight.dtype != wide:
        norm = copy.deepcopy(norm).to(wide)
    return norm(residual.to(wide))


@torch.no_grad()
def last_norm_weight(model: HookedRecurrent) -> Float[Tensor, " d_model"]:
    """The weight of the last norm, by which it multiplies the stream that it has scaled.

    It is read from what the norm makes of a known stream: some norms keep it as an offset from 1.
    """
    weight = next(model.ln_final.original_component.parameters(), None)
    x = torch.ones(model.cfg.d_model, device=model.cfg.device if weight is None else weight.device)
    x[::2] = -1
    x = x * 1e3  # beside which the norm's epsilon is nothing
    known = x - x.mean() if model.cfg.normalization_type in ("LN", "LNPre") else x
    return (_normed(model, x) - _normed(model, torch.zeros_like(x))) / (known / known.square().mean().sqrt())


def logit_factor(model: HookedRecurrent) -> float:
    """The factor by which a model scales its logits (Granite, Falcon-H1); 1 in others.

    Raises:
        HookedModelError: it caps them, so that no part of the residual stream has an effect of its own.
    """
    one, two = (float(model.adapter.apply_output_logits_transform(torch.tensor(x))) for x in (1.0, 2.0))
    if two != 2 * one:
        raise HookedModelError(
            f"this {model.cfg.architecture} caps its logits, which are no sums then: compare what "
            "hooked_models.unembedding.logits_of gives with and without the part"
        )
    return one


def output_embedding(model: HookedRecurrent) -> Any:
    """The model's unembedding: a Linear, in the bridge component that stands in its place.

    Raises:
        HookedModelError: it is adapted (peft's LoRA) or quantised, so that its weight is not all of it.
    """
    hf_model: Any = model.original_model
    unembed = hf_model.get_output_embeddings()
    linear = getattr(unembed, "original_component", unembed)
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        raise HookedModelError(
            f"the unembedding is a {kind}, of which this run would read the base weight alone: merge the "
            "adapter first (merge_and_unload()), or leave lm_head out of it"
        )
    return unembed


def _cuts(model: HookedRecurrent, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The unembedding's weight and bias; in cuts of the vocabulary, if they are to be converted."""
    unembed = output_embedding(model)
    at_once = _WEIGHTS_AT_ONCE if unembed.weight.dtype != dtype else unembed.weight.numel()
    step = max(1, at_once // unembed.weight.shape[1])
    weights = unembed.weight.split(step)
    return zip(weights, [None] * len(weights) if unembed.bias is None else unembed.bias.split(step))


def _unembedded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden, weight.to(hidden), None if bias is None else bias.to(hidden))


def freeze_added_bias(model: HookedRecurrent) -> None:
    """Keep out of training the bias of zeros that TransformerLens gives an unembedding which has none.

    The Hugging Face model has no place for it: once trained, it would be lost on saving.
    """
    bias = model.unembed.original_component.bias
    if bias is not None and not bias.any():
        bias.requires_grad_(False)


def is_hooked(model: HookedRecurrent) -> bool:
    """Whether a hook or an SAE is on the last norm or the unembedding."""
    return any(name.startswith(("ln_final.", "unembed.")) for name in model.busy_hooks)
