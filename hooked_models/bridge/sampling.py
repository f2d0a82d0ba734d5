"""What ``generate``, ``generate_stream`` and ``hf_generate`` are asked for: nothing that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hooked_models.bridge.arguments import idle, is_whole, wrong
from hooked_models.errors import HookedModelError

_RETURNS = ("input", "str", "tokens")


def check(taker: str, given: dict[str, Any], model: Any) -> None:
    """Refuse what a method that samples would ignore, or that does not fit the model.

    Args:
        taker: the method's name.
        given: the arguments of the call, by name.
        model: the bridge.

    Raises:
        HookedModelError: there is such an argument.
    """
    prompt = given.get("input", "")
    check_prompt(taker, prompt)
    is_text = not isinstance(prompt, Tensor)
    _check_drawing(taker, given)
    _check_stops(taker, given, model)
    if given.get("return_type", "input") not in _RETURNS:
        raise wrong(taker, "return_type", given["return_type"], ", ".join(map(repr, _RETURNS)))
    if given.get("return_type") == "str" and model.tokenizer is None:
        raise HookedModelError(f"{taker}: return_type='str' needs a tokenizer: say return_type='tokens'")
    if given.get("output_logits") and given.get("return_type") == "str":
        raise idle(taker, "return_type", "output_logits=True returns tokens with their logits")
    for name in ("pixel_values", "forced_bos_token_id"):
        if given.get(name) is not None:
            raise HookedModelError(f"{taker}: {name} is for models of another kind, this one reads text")
    for name in ("names_filter", "device"):
        if given.get(name) is not None and not given.get("return_cache"):
            raise idle(taker, name, "it concerns the cache of activations, which return_cache=True asks for")
    side, reads_padding = given.get("padding_side"), taker == "generate"
    if is_text and side == "right":
        raise idle(taker, "padding_side", "texts are padded on the left, so that they end together")
    if not is_text and side is not None and not reads_padding:
        raise idle(taker, "padding_side", "tokens are taken as they are; generate reads padding off them")
    if not is_text and given.get("prepend_bos") and side is None and not begins_with_bos(prompt, model):
        raise idle(taker, "prepend_bos", "tokens are taken as they are; give text, or put the token there")


def begins_with_bos(tokens: Any, model: Any) -> bool:
    """Whether every row of tokens begins with the BOS token, so that ``prepend_bos=True`` holds already."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return isinstance(tokens, Tensor) and bos is not None and bool((tokens[..., :1] == bos).all())


def check_prompt(taker: str, prompt: Any) -> None:
    """Refuse what is neither text, texts nor tokens ``[batch, pos]``.

    Raises:
        HookedModelError: it is not.
    """
    expected = "a text, a list of texts, or tokens [batch, pos]"
    if isinstance(prompt, Tensor):
        if prompt.ndim == 2 or prompt.is_floating_point():
            return
        raise HookedModelError(f"{taker}: tokens of shape {list(prompt.shape)}, expected [batch, pos]")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise wrong(taker, "input", prompt, expected)


def _check_drawing(taker: str, given: dict[str, Any]) -> None:
    """Whether and how a token is drawn."""
    both = given.get("top_k") is not None and given.get("top_p", 1.0) not in (None, 1.0)
    if both and taker != "hf_generate":  # transformers honours both
        raise idle(taker, "top_p", "top_k is given too; give one of them")
    if given.get("do_sample", True) and given.get("temperature", 1.0) != 0:
        return
    greedy = {"temperature": (0, 1), "top_k": (None,), "top_p": (None, 1), "freq_penalty": (0,)}
    for name, neutral in greedy.items():
        if name in given and given[name] not in neutral:
            raise idle(taker, name, "the likeliest token is taken, none is drawn (do_sample, temperature)")


def _check_stops(taker: str, given: dict[str, Any], model: Any) -> None:
    """Whether and at which tokens the text ends."""
    end = given.get("eos_token_id")
    if not given.get("stop_at_eos", True):
        if end is not None:
            raise idle(taker, "eos_token_id", "stop_at_eos is False")
        return
    if end is None:
        own = getattr(model.cfg, "eos_token_id", None), getattr(model.tokenizer, "eos_token_id", None)
        if own == (None, None):
            raise HookedModelError(
                f"{taker}: there is no tokenizer with an end-of-text token to stop at: give eos_token_id, or "
                "say stop_at_eos=False"
            )
        return
    several = isinstance(end, Iterable) and not isinstance(end, (str, Tensor))
    ends: list[Any] = list(end) if several else [end]
    size = model.vocabulary_size
    if not ends or not all(is_whole(x) and 0 <= x < size for x in ends):
        raise wrong(taker, "eos_token_id", end, f"a token, or a list of tokens, of 0 to {size - 1}")


def are_texts(prompt: Any) -> bool:
    """Whether a prompt is more than one text."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 1 and all(isinstance(x, str) for x in prompt)
