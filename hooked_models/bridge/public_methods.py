"""The public methods of TransformerLens's and SAELens's bridges, each with a check of its arguments.

Of most methods nothing more is needed than a comparison of the call with the method's signature and with
`arguments.RULES`: these are wrapped in one loop below. What else one of them would ignore is refused by the
method of its name in `CheckedMethods`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor, nn
from transformers import GenerationConfig

from hooked_models import calls
from hooked_models.bridge import arguments, sampling
from hooked_models.bridge.arguments import bound, idle, like, refusals, wrong
from hooked_models.errors import HookedModelError

# Those that run the model, and with it functions of the user: what these raise must come out as it is.
_RUN = {name for name in vars(SAETransformerBridge) if name.startswith("run_with")}
_RUN |= {"forward", "run_with_cache", "run_with_hooks", "generate", "generate_stream", "hf_generate"}
_RUN |= {"hooks", "saes"}
# Those that torch and TransformerLens call while a bridge is built or saved.
_OF_TORCH = {"parameters", "named_parameters", "state_dict", "train", "to"}
_RETURNS = ("logits", "loss", "both", "logits_and_cache", None)


class CheckedMethods(SAETransformerBridge):
    """SAELens's bridge, whose methods refuse arguments that they would ignore or misunderstand."""

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens that the model has an embedding for."""
        hf_model: Any = self.original_model
        return len(hf_model.get_input_embeddings().weight)

    @classmethod
    def boot_native(cls, *_: Any, **__: Any) -> NoReturn:
        """Refused, as other ways to boot a model of TransformerLens are."""
        raise HookedModelError(
            f"{cls.__name__} has no boot_native and no from_pretrained_no_processing: say "
            f"{cls.__name__}.boot_transformers, which leaves weights as they are"
        )

    from_pretrained_no_processing = boot_native

    @like(SAETransformerBridge.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bound(super().forward, args, kwargs)
        self._check_stop("forward", given)
        wanted = given.get("return_type", "logits")
        if (wanted is not None and not isinstance(wanted, str)) or wanted not in _RETURNS:
            raise wrong("forward", "return_type", wanted, ", ".join(map(repr, _RETURNS)))
        if given.get("loss_per_token") and wanted not in ("loss", "both"):
            raise idle("forward", "loss_per_token", "return_type is neither 'loss' nor 'both'")
        if isinstance(given.get("input"), Tensor):
            self._refuse_as_they_are("forward", given, "; a mask is attention_mask")
        for name in ("start_at_layer", "pixel_values", "input_values"):
            if given.get(name) is not None:
                raise HookedModelError(f"forward: {name} is not supported by this model: leave it out")
        if sampling.are_texts(given["input"]) and given.get("attention_mask") is None:
            # TransformerLens takes a BOS token for padding where both are one token, and has padding on the
            # right in the loss.
            side = given.pop("padding_side", None) or getattr(self.tokenizer, "padding_side", None)
            rows = [self.to_tokens(text, prepend_bos=given.get("prepend_bos")) for text in given["input"]]
            given["input"], given["attention_mask"] = self._padded(rows, side or "right")
            given.pop("prepend_bos", None)
        return super().forward(**given)

    @like(SAETransformerBridge.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        given = self._sampling("generate", super().generate, args, kwargs)
        prompt, cached = given["input"], given.get("use_past_kv_cache", True)
        stateful = getattr(self.cfg, "is_stateful", False)
        if given.get("return_cache") and (
            (stateful and cached) or (not isinstance(prompt, str) and len(prompt) > 1)
        ):
            raise HookedModelError(
                "generate: return_cache is not supported here: call run_with_cache on the tokens returned"
            )
        if sampling.are_texts(prompt) and given.get("attention_mask") is None:
            given |= self._as_tokens(list(prompt), given.pop("prepend_bos", None))
            given.pop("padding_side", None)
            if given.get("return_type", "input") == "input":  # what went in was text
                given["return_type"] = "str"
        if not stateful or cached:
            with calls.sampling():
                return super().generate(**given)
        # TransformerLens would hand over to hf_generate, and drop most arguments on the way.
        self.cfg.is_stateful = False
        try:
            with calls.sampling():
                return super().generate(**given)
        finally:
            self.cfg.is_stateful = stateful

    @like(SAETransformerBridge.generate_stream)
    def generate_stream(self, *args: Any, **kwargs: Any) -> Any:
        given = self._sampling("generate_stream", super().generate_stream, args, kwargs)
        usual = given.get("prepend_bos") in (None, self.cfg.default_prepend_bos)
        if sampling.are_texts(given["input"]) and not usual:
            raise HookedModelError(
                "generate_stream: prepend_bos of several texts is model.cfg.default_prepend_bos: set that, "
                "or use generate"
            )
        return super().generate_stream(**given)

    @like(SAETransformerBridge.hf_generate)
    def hf_generate(self, *args: Any, **kwargs: Any) -> Any:
        hf_model: Any = self.original_model
        given = bound(super().hf_generate, args, kwargs)
        own = inspect.signature(super().hf_generate).parameters
        of_transformers = {
            *GenerationConfig().to_dict(),
            *inspect.signature(hf_model.generate).parameters,
        }
        of_transformers |= inspect.signature(hf_model.forward).parameters.keys()
        arguments.refuse_unknown_names("hf_generate", given.keys() - of_transformers, own)
        prompt = given["input"] = _as_rows(given.get("input", ""))
        wanted = given.pop("return_type", "input") or "input"
        sampling.check("hf_generate", given | {"return_type": wanted}, self)
        if self.tokenizer is None:
            raise HookedModelError("hf_generate needs a tokenizer: generate reads tokens without one")
        end = hf_model.generation_config.eos_token_id
        if not given.get("stop_at_eos", True) and end is not None:
            raise HookedModelError(
                "hf_generate: stop_at_eos=False would have no effect, transformers stops at the token of the "
                "model's generation_config: set its eos_token_id to None, or use generate"
            )
        if not given.get("use_past_kv_cache", True):
            given["use_cache"] = False
        if not isinstance(prompt, Tensor):
            # TransformerLens would put the BOS token before texts, which generate does not do here.
            del given["input"]
            given = dict[str, Any](self._as_tokens([prompt] if isinstance(prompt, str) else prompt)) | given
        output: Any = super().hf_generate(**given, return_type="tokens")
        if wanted == "tokens" or (wanted == "input" and isinstance(prompt, Tensor)):
            return output
        tokens = output if isinstance(output, Tensor) else output.sequences
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        is_one = isinstance(prompt, str) or (isinstance(prompt, Tensor) and len(texts) == 1)
        return texts[0] if is_one else texts

    @like(SAETransformerBridge.to_tokens)
    def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(super().to_tokens, args, kwargs)
        self._check_tokenizer("to_tokens")
        texts = given["input"]
        parts = [texts] if isinstance(texts, str) else texts
        if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(x, str) for x in parts):
            raise wrong("to_tokens", "input", texts, "a text or a list of texts")
        surrogates = any("\ud800" <= c <= "\udfff" for part in parts for c in part)
        advice = surrogates * "the text has half of a surrogate pair, which is no character"
        with refusals("to_tokens", advice):
            tokens = super().to_tokens(**given)
        if tokens.numel() and int(tokens.max()) >= self.vocabulary_size:
            raise HookedModelError(
                f"to_tokens: the tokenizer gives token {int(tokens.max())}, but the model's vocabulary ends "
                f"at {self.vocabulary_size - 1}: give the model's own tokenizer, or say prepend_bos=False"
            )
        return tokens

    @like(SAETransformerBridge.to_string)
    def to_string(self, *args: Any, **kwargs: Any) -> Any:
        given = bound(super().to_string, args, kwargs)
        self._check_tokenizer("to_string")
        self._check_ids("to_string", given["tokens"])
        with refusals("to_string"):
            return super().to_string(**given)

    @like(SAETransformerBridge.to_str_tokens)
    def to_str_tokens(self, *args: Any, **kwargs: Any) -> Any:
        given = bound(super().to_str_tokens, args, kwargs)
        self._check_tokenizer("to_str_tokens")
        if not isinstance(given["input"], (str, list)):
            self._check_ids("to_str_tokens", given["input"])
            self._refuse_as_they_are("to_str_tokens", given)
        with refusals("to_str_tokens"):
            return super().to_str_tokens(**given)

    @like(SAETransformerBridge.tokens_to_residual_directions)
    def tokens_to_residual_directions(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(super().tokens_to_residual_directions, args, kwargs)
        if not isinstance(given["tokens"], str):
            self._check_ids("tokens_to_residual_directions", given["tokens"])
        with refusals("tokens_to_residual_directions"):
            return super().tokens_to_residual_directions(**given)

    @like(SAETransformerBridge.loss_fn)
    def loss_fn(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(super().loss_fn, args, kwargs)
        logits, tokens = given["logits"], given["tokens"]
        with refusals("loss_fn"):
            if logits.shape[:-1] != tokens.shape:
                raise HookedModelError(
                    f"loss_fn: logits of {list(logits.shape[:-1])} positions, but tokens {list(tokens.shape)}"
                )
            return super().loss_fn(**given)

    def reset_saes(self, act_names: Any = None) -> None:
        """As SAELens's, with an error where no SAE is."""
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in names or ():
            if name not in self.acts_to_saes:
                held = ", ".join(self.acts_to_saes) or "none is"
                raise HookedModelError(f"reset_saes: no SAE is attached at {name!r}; attached: {held}")
        super().reset_saes(names)

    @contextmanager
    def saes(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        given = bound(super().saes, args, kwargs)
        saes = given.get("saes", [])
        saes = list(saes) if isinstance(saes, (list, tuple)) else [saes]
        names: list[Any] = [getattr(getattr(sae, "cfg", None), "metadata", None) for sae in saes]
        if isinstance(given.get("saes"), Mapping) or any(metadata is None for metadata in names):
            raise wrong("saes", "saes", given.get("saes"), "an SAE or a list of SAEs")
        places = [metadata.hook_name_out or metadata.hook_name for metadata in names]
        twice = {place for place in places if places.count(place) > 1}
        if twice:
            raise HookedModelError(
                f"saes: two SAEs for {', '.join(twice)}: the second would replace the first"
            )
        given["saes"] = saes
        with super().saes(**given):
            yield self

    @like(SAETransformerBridge.enable_compatibility_mode)
    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        given = bound(super().enable_compatibility_mode, args, kwargs)
        if given.get("fold_ln") and not getattr(self.adapter, "supports_fold_ln", True):
            raise idle(
                "enable_compatibility_mode", "fold_ln", "the norms of this architecture cannot be folded"
            )
        with refusals("enable_compatibility_mode"):
            super().enable_compatibility_mode(**given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            part = getattr(type(self), name, None)
            if not isinstance(part, property) or part.fget is None:
                raise error
        return part.fget(self)  # Python asks here for a property that raised an AttributeError

    def _sampling(self, taker: str, method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of a method of TransformerLens that samples, checked."""
        arguments.refuse_unknown_names(taker, kwargs, inspect.signature(method).parameters, _INSTEAD)
        given = bound(method, args, kwargs)
        given["input"] = _as_rows(given.get("input", ""))
        sampling.check(taker, given, self)
        mask = given.get("attention_mask")
        prompt = given["input"] if isinstance(given["input"], Tensor) else None
        if mask is not None and (prompt is None or mask.shape != prompt.shape):
            shape = "text, which has a mask of its own" if prompt is None else list(prompt.shape)
            raise HookedModelError(
                f"{taker}: attention_mask has shape {list(mask.shape)}, the prompt is {shape}"
            )
        return given

    def _refuse_as_they_are(self, taker: str, given: dict[str, Any], instead: str = "") -> None:
        """Refuse arguments that concern texts, beside tokens that they do not hold of already."""
        for name in ("prepend_bos", "padding_side"):
            holds = name == "prepend_bos" and sampling.begins_with_bos(given["input"], self)
            if given.get(name) and not holds:
                raise idle(taker, name, f"tokens are taken as they are{instead}")

    def _as_tokens(self, texts: list[str], prepend_bos: bool | None = None) -> dict[str, Tensor]:
        """Texts as ``input`` and ``attention_mask``, padded on the left."""
        rows = [self.to_tokens(text, prepend_bos=prepend_bos, truncate=False) for text in texts]
        tokens, mask = self._padded(rows, "left")
        return {"input": tokens, "attention_mask": mask}

    def _padded(
        self, rows: list[Int[Tensor, "1 _"]], side: str
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Tokens of several texts, and their mask, which is 1 at each text's own tokens."""
        length = max(row.shape[1] for row in rows)
        gaps = [(length - row.shape[1], 0) if side == "left" else (0, length - row.shape[1]) for row in rows]
        padding = self.tokenizer.pad_token_id or 0
        pad = torch.nn.functional.pad
        tokens = torch.cat([pad(row, gap, value=padding) for row, gap in zip(rows, gaps, strict=True)])
        mask = [pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)]
        return tokens, torch.cat(mask)

    def _check_stop(self, taker: str, given: dict[str, Any]) -> None:
        stop, count = given.get("stop_at_layer"), len(self.blocks)
        if stop is None:
            return
        if not -count <= stop <= count:
            raise wrong(
                taker, "stop_at_layer", stop, f"a number from {-count} to {count}, the model's layers"
            )
        if given.get("return_type") in ("loss", "both") and stop != count:
            raise HookedModelError(f"{taker}: there is no loss with stop_at_layer: leave return_type out")

    def _check_tokenizer(self, taker: str) -> None:
        if self.tokenizer is None:
            raise HookedModelError(
                f"{taker}: the model has no tokenizer: set model.tokenizer, or give tokens"
            )

    def _check_ids(self, taker: str, tokens: Any) -> None:
        """Refuse token ids that are no whole numbers, or lie outside of model and tokenizer."""
        with refusals(taker):
            ids = torch.as_tensor(tokens)
        size = max(self.vocabulary_size, 0 if self.tokenizer is None else len(self.tokenizer))
        if ids.numel() and (ids.is_floating_point() or ids.dtype is torch.bool):
            raise HookedModelError(f"{taker}: tokens are whole numbers, got {ids.dtype}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise HookedModelError(
                f"{taker}: tokens must lie in 0 .. {size - 1}, got {int(ids.min())} .. {int(ids.max())}"
            )


_INSTEAD = {
    "num_beams": "hf_generate has it",
    "num_return_sequences": "hf_generate has it",
    "seed": "call torch.manual_seed before",
    "past_key_values": "generate fills a cache of its own",
}


def _as_rows(prompt: Any) -> Any:
    return prompt[None] if isinstance(prompt, Tensor) and prompt.ndim == 1 else prompt


def _checked(method: Callable[..., Any], runs_the_model: bool) -> Callable[..., Any]:
    """The method with a check of its arguments; where it runs no function of a user, errors are refusals."""

    @functools.wraps(method)
    def call(self: CheckedMethods, *args: Any, **kwargs: Any) -> Any:
        bound(method.__get__(self), args, kwargs)
        if runs_the_model:
            return method(self, *args, **kwargs)
        with refusals(method.__name__):
            return method(self, *args, **kwargs)

    return call


def _checked_property(name: str, part: property) -> property:
    """A property of weights that a recurrent layer has not, with an error that says so."""

    @functools.wraps(part.fget)  # type: ignore[arg-type]
    def get(self: CheckedMethods) -> Any:
        with refusals(name, "a recurrent layer has other weights: see model.original_model"):
            return part.fget(self)  # type: ignore[misc]

    return property(get)


# TransformerLens 4 defines the methods about hooks in a class that TransformerBridge inherits from.
_bases = CheckedMethods.__mro__[1:]
for _owner in _bases[: _bases.index(nn.Module)]:
    for _name, _part in list(vars(_owner).items()):
        if _name.startswith("_") or _name in vars(CheckedMethods) or _name in _OF_TORCH:
            continue
        if inspect.isfunction(_part):
            setattr(CheckedMethods, _name, _checked(getattr(SAETransformerBridge, _name), _name in _RUN))
        elif isinstance(_part, property) and _part.fset is None and _name[:2] in ("W_", "b_", "QK", "OV"):
            setattr(CheckedMethods, _name, _checked_property(_name, _part))
