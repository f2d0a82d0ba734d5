"""The forward pass that is running: which of its tokens are padding, and where the others are in their text.

Every way to run a model ends in one call of the Hugging Face model: `HookedRecurrent.forward`, ``generate``,
transformers' own ``generate``, or that model itself. `watch` puts hooks around this call. They refuse inputs,
masks, positions and caches that the recurrent layers would not honour, and open a `Call`, in which the layers
find the padding and hooks find their positions. A call inside another one, from a hook, has its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hooked_models import caches, edits
from hooked_models.bridge import position_ids
from hooked_models.caches import Past
from hooked_models.errors import HookedModelError

if TYPE_CHECKING:
    from hooked_models.hooked_recurrent import HookedRecurrent


@dataclasses.dataclass
class Call:
    """One call of a Hugging Face model, from its first check to its return."""

    module: nn.Module
    outer: Call | None
    """The call from whose hooks this one was made."""
    shape: tuple[int, int] = (0, 0)
    """Rows and new tokens."""
    device: Any = None
    real: Bool[Tensor, "batch pos"] | None = None
    """False at padding; None where every token is real."""
    past: Past = dataclasses.field(default_factory=Past)
    """What the cache holds from before the call."""
    cache: Any = None
    last_position: Int[Tensor, "batch one"] | None = None
    """Position id of each row's last token (None: the model counts by itself)."""

    def mask(self) -> Int[Tensor, "batch pos"]:
        """1 at the call's tokens, 0 at its padding."""
        if self.real is None:
            return torch.ones(self.shape, dtype=torch.long, device=self.device)
        return self.real.long()

    def positions(self) -> Int[Tensor, "batch pos"]:
        """Each token's number in its text, with the cached tokens and without padding; -1 at padding."""
        before = self.past.n_tokens()
        if before is None:
            raise HookedModelError(
                "it is not known how many tokens of each row the cache holds, because something else filled "
                "or rearranged it: give the attention_mask [batch, past + new] of cached and new tokens"
            )
        mask = self.mask()
        here = mask.cumsum(1) - 1 + (before[:, None] if isinstance(before, Tensor) else before)
        return here.masked_fill(mask == 0, -1)


_HYBRID = {"full_attention", "linear_attention", "hybrid", "moe", "mlp"}
"""Kinds of layers of the models that take a mask for attention and one for recurrent layers."""
_CALL: ContextVar[Call | None] = ContextVar("call of a Hugging Face model that is running", default=None)
_LAST_ONLY: ContextVar[list[bool] | None] = ContextVar("True until a loop that samples begins", default=None)


class NoCallError(HookedModelError, RuntimeError):
    """No forward pass is running. TransformerLens, which reads every attribute, expects a RuntimeError."""


def current() -> Call | None:
    """The innermost call that is running in this thread, of whatever model."""
    return _CALL.get()


def _innermost(module: nn.Module) -> Call | None:
    call = _CALL.get()
    while call is not None and call.module is not module:
        call = call.outer
    return call


def running(module: nn.Module) -> Call:
    """The call of this Hugging Face model that is running.

    Raises:
        NoCallError: there is none.
    """
    call = _innermost(module)
    if call is None:
        raise NoCallError(
            "no forward pass is running: model.positions and model.attention_mask are there inside hooks, "
            "while the model reads"
        )
    return call


def real_tokens(attention_mask: Tensor | None, shape: torch.Size) -> Bool[Tensor, "batch pos"] | None:
    """Which of a layer's tokens are real (None: all are).

    The running call knows it from the mask that the model was given. What reaches a layer of it differs by
    model: nothing for a single token, a mask of attention where that stands in the same block. So a layer's
    own mask counts only where it is called by itself.

    Args:
        attention_mask: what the layer is given, of new tokens, or of cached and new ones.
        shape: rows and new tokens, as the first axes of what the layer reads.
    """
    call = _CALL.get()
    if call is not None and call.shape == tuple(shape[:2]):
        return call.real
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask[:, -shape[1] :] != 0
    return None


def without_padding(x: Tensor, real: Bool[Tensor, "batch pos"] | None) -> Tensor:
    """``x`` [batch, pos, ...] with zeros at padding, whatever it has there, be it not a number."""
    if real is None:
        return x
    return x.masked_fill(~real.view(*real.shape, *(1,) * (x.ndim - 2)), 0)


@contextmanager
def reading() -> Iterator[None]:
    """Around a forward pass: whatever ends it, the calls that it opened end too."""
    token, last_only = _CALL.set(_CALL.get()), _LAST_ONLY.set(None)
    try:
        yield
    finally:
        _LAST_ONLY.reset(last_only)
        _CALL.reset(token)


@contextmanager
def sampling() -> Iterator[None]:
    """Around a loop that samples, which reads the logits of the last token alone of its first pass.

    Passes that come in between, from a hook or from a criterion that ends the loop, have all their logits.
    """
    token = _LAST_ONLY.set([True])
    try:
        yield
    finally:
        _LAST_ONLY.reset(token)


def reads_last_logits_only() -> bool:
    """Whether the pass that begins now is the first of a loop that samples; later ones have one token."""
    waiting = _LAST_ONLY.get()
    return bool(waiting) and waiting.pop()


def check_is_tensor(argument: Any, name: str) -> None:
    """Refuse an argument that is given and no tensor.

    Raises:
        HookedModelError: it is neither None nor a tensor.
    """
    if argument is not None and not isinstance(argument, Tensor):
        raise HookedModelError(f"{name} must be a tensor, got a {type(argument).__name__}")


def watch(model: HookedRecurrent) -> None:
    """Open a `Call` around every call of a bridge's Hugging Face model, and check what it is given."""
    module: Any = model.original_model
    layers = {mixer.layer_index: (mixer.n_heads, *mixer.write_shape) for mixer in model.mixers.values()}
    kinds = set(getattr(module.config, "layer_types", None) or ())
    names = tuple(inspect.signature(module.forward).parameters)
    n_cache_layers = len(model.new_cache().layers)
    # Where attention has a window, transformers makes its mask.
    has_window = getattr(module.config, "sliding_window", None) is not None
    is_hybrid = bool(kinds) and kinds <= _HYBRID and "position_ids" in names and not has_window
    facts = _Facts(names, layers, n_cache_layers, model.has_attention, is_hybrid)
    module.register_forward_pre_hook(functools.partial(_begin, facts), with_kwargs=True)
    module.register_forward_hook(_end, with_kwargs=True, always_call=True)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the checks need to know of a model.

    Args:
        names: the arguments of the model's forward pass, in order.
        layers: heads, d_k and d_v of each recurrent layer, by its number in a cache.
        n_cache_layers: layers of a cache.
        has_attention: whether any layer has softmax attention.
        is_hybrid: whether the model takes one mask for attention and one for recurrent layers, and either may
            be missing.
    """

    names: tuple[str, ...]
    layers: dict[int, tuple[int, int, int]]
    n_cache_layers: int
    has_attention: bool
    is_hybrid: bool


def _begin(facts: _Facts, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Check the arguments of a call, and open it."""
    call = Call(module, _CALL.get())
    _CALL.set(call)  # first, for `_end` comes also after an error
    given = dict(zip(facts.names, args, strict=False)) | kwargs
    caches.refuse_packing(given)
    call.shape, call.device = _checked_tokens(module, given)
    cache = caches.cache_in(given)
    if cache is not None:
        call.past = _checked_past(facts, module, cache, call.shape[0])
    changes: dict[str, Any] = {}
    if edits.swapped_writes() is None:  # whose branches have a mask and positions of their own
        mask, ids = given.get("attention_mask"), given.get("position_ids")
        into_cache = cache is not None or bool(given.get("use_cache"))
        rearranged = call.past.rearranged
        changes = _read_mask(call, mask, into_cache, facts.has_attention)
        position_ids.check(call, ids)
        if ids is None and "position_ids" in facts.names:
            ids = changes["position_ids"] = position_ids.following(call, rearranged, facts.has_attention)
        if facts.is_hybrid and not caches.has_fixed_length(cache) and not isinstance(mask, dict):
            changes |= _masks_by_kind(call, module, changes.get("attention_mask"), facts.has_attention)
        if ids is not None:
            call.last_position = ids.reshape(-1, *ids.shape[-2:])[0, :, -1:].expand(call.shape[0], 1)
    if cache is not None:
        call.cache = cache
        caches.remember(cache, Past(whole=False))
    changed = {name: value for name, value in changes.items() if value is not given.get(name)}
    return ((), given | changed) if changed else None


def _end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Close a call; if it came to its end, note what the cache now holds."""
    call = _innermost(module)
    if call is None:
        return
    _CALL.set(call.outer)
    if output is None:
        return
    cache = call.cache
    if cache is None and isinstance(output, dict):  # an output of transformers, maybe with a new cache
        cache = caches.cache_in(output)
    if cache is not None:
        caches.remember(cache, call.past.gone_on(call.shape, call.real, call.last_position))


def _checked_tokens(module: nn.Module, given: dict[str, Any]) -> tuple[tuple[int, int], Any]:
    """Rows, new tokens and device of a call's ids or embeddings.

    Raises:
        HookedModelError: they are none, of a wrong shape or kind, or outside the vocabulary.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor) == isinstance(embeds, Tensor):
        what = "both tokens and inputs_embeds" if ids is not None else "neither tokens nor inputs_embeds"
        raise HookedModelError(f"the model was given {what}: give one of them, as a tensor")
    x, axes = (ids, "[batch, pos]") if embeds is None else (embeds, "[batch, pos, d_model]")
    assert isinstance(x, Tensor)
    if x.ndim != axes.count(",") + 1:
        what = "token ids" if embeds is None else "inputs_embeds (floats; tokens are whole numbers)"
        raise HookedModelError(f"{what} must have shape {axes}, got {tuple(x.shape)}")
    if not (x.shape[0] and x.shape[1]):
        raise HookedModelError(
            f"there are no tokens to read in a batch of shape {tuple(x.shape[:2])}: give one at least"
        )
    if embeds is None:
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise HookedModelError(f"token ids must be whole numbers, got {x.dtype}")
        size = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if low < 0 or high >= size:
            raise HookedModelError(
                f"token ids must lie in 0 .. {size - 1}, the model's vocabulary; got {low} .. {high}"
            )
    return (x.shape[0], x.shape[1]), x.device


def _masks_by_kind(call: Call, module: Any, mask: Tensor | None, has_attention: bool) -> dict[str, Any]:
    """A hybrid's masks, to change in the arguments of its call.

    In that of attention padding sees itself. transformers lets it see nothing; then its attention is 0 / 0
    where the mask is -inf (in float64 and in TransformerLens's compatibility mode), which later layers and
    all gradients would take over. Without attention there is no such mask: transformers would make one of
    the cache's length, which a cache of recurrent layers alone does not know.
    """
    recurrent = None if call.real is None else call.real.long()
    if not has_attention:
        return {"attention_mask": {"full_attention": None, "linear_attention": recurrent}}
    if mask is None or recurrent is None or module.config._attn_implementation != "eager":
        return {}
    key = torch.arange(mask.shape[1], device=mask.device)
    query = key[-call.shape[1] :, None]
    sees = ((key <= query) & (mask != 0)[:, None] | (key == query))[:, None]  # [batch, one, pos, all]
    dtype = module.get_input_embeddings().weight.dtype
    full = torch.zeros(sees.shape, dtype=dtype, device=mask.device)
    full = full.masked_fill(~sees, torch.finfo(dtype).min)
    return {"attention_mask": {"full_attention": full, "linear_attention": recurrent}}


def _checked_past(facts: _Facts, module: nn.Module, cache: Any, batch: int) -> Past:
    """What a cache holds, after a check that the layers will honour it."""
    caches.check(cache, facts.n_cache_layers, facts.layers, batch)
    if module.training and any(getattr(x, "gradient_checkpointing", False) for x in module.modules()):
        raise HookedModelError(
            "a cache cannot be used while training with activation checkpointing, which runs each layer "
            "twice: give none, or model.eval() first"
        )
    return caches.past_of(cache)


def _read_mask(call: Call, mask: Any, into_cache: bool, has_attention: bool) -> dict[str, Any]:
    """Find a call's padding in its mask, and what the cache holds in the mask's earlier columns.

    Returns:
        the mask, where that of the model's arguments has to be changed.

    Raises:
        HookedModelError: the mask's shape or values do not fit, or it cannot be honoured.
    """
    if isinstance(mask, dict):  # generate makes one mask for each kind of layer
        mask = mask.get("linear_attention")
        if mask is not None and not bool(mask.all()):
            call.real = mask != 0
        return {}
    past, (batch, length) = call.past, call.shape
    if mask is None:
        if past.mask is None or not has_attention:
            return {}
        if past.rearranged:
            raise HookedModelError(
                "the rows of the cache were rearranged, and some have padding: give the attention_mask "
                "[batch, past + new]"
            )
        return {"attention_mask": torch.cat([past.mask, past.mask.new_ones(batch, length)], 1).long()}
    _check_mask_shape(call, mask, has_attention)
    given, mask = mask, mask.to(call.device)
    only_zero_one, all_real = torch.stack([((mask == 0) | (mask == 1)).all(), (mask != 0).all()]).tolist()
    if not only_zero_one:
        raise HookedModelError(
            "attention_mask must have 1 at tokens and 0 at padding; it has other values, as additive masks do"
        )
    real = mask != 0
    if mask.shape[1] > length:
        before = None if all_real else real[:, :-length]
        call.past = Past(mask.shape[1] - length, before, past.last_position)
    elif past.mask is not None and not past.rearranged:
        real, all_real = torch.cat([past.mask, real], 1), False
    if not all_real and not _check_padding(real, length, into_cache):
        call.real = real[:, -length:]
    if has_attention:
        return {"attention_mask": given}
    return {"attention_mask": None if call.real is None else call.real.long()}


def _check_mask_shape(call: Call, mask: Any, has_attention: bool) -> None:
    """Refuse a mask that is none, or of another shape than the tokens."""
    past, (batch, length) = call.past, call.shape
    check_is_tensor(mask, "attention_mask")
    if mask.is_complex() or mask.ndim != 2 or mask.shape[0] != batch:
        fits = False
    elif past.columns is None:
        fits = mask.shape[1] >= length
    else:
        allowed = {past.columns + length} | (set() if has_attention else {length})
        fits = mask.shape[1] in allowed
    if not fits:
        cached = f", with {past.columns} tokens before them in the cache" if past.columns else ""
        columns = length + (past.columns or 0)
        raise HookedModelError(
            f"attention_mask has shape {tuple(mask.shape)}, the tokens have {batch, length}{cached}: the "
            f"mask must have shape {batch, columns}, 1 at tokens and 0 at padding"
        )


def _check_padding(real: Bool[Tensor, "batch all_pos"], length: int, into_cache: bool) -> bool:
    """Refuse padding that no convolution or token shift can leave out, and rows of padding alone.

    Returns:
        whether none of the new tokens is padding.

    Raises:
        HookedModelError: there is padding between tokens, or after them on the way into a cache, or a row has
            no token.
    """
    behind = (real.cumsum(1) > 0) & ~real  # padding after a token
    inside = ((behind.cumsum(1) > 0) & real).any(1)
    empty, new = ~real.any(1), real[:, -length:]
    facts = [inside, behind.any(1), empty, new.any(1), new.all(1)]
    inside_of, behind_of, empty_of, some_new, all_new = torch.stack(facts).tolist()
    if True in inside_of:
        raise HookedModelError(
            f"attention_mask has padding between the tokens of row {inside_of.index(True)}, cached ones "
            "included: padding can only come before a row's first token or, without a cache, after its last"
        )
    if into_cache and True in behind_of:
        raise HookedModelError(
            f"row {behind_of.index(True)} has padding after its tokens, which would be read into the cache: "
            "pad on the left (padding_side='left')"
        )
    if True in empty_of and not (into_cache and any(some_new)):
        raise HookedModelError(
            f"row {empty_of.index(True)} of the batch has no token, only padding: leave the row out"
        )
    return all(all_new)
