"""Everything here replaces or rests on parts of transformers, TransformerLens and SAELens that are not public.

A new version of one of them can break this file (and `caches`, which reads the caches of transformers without
importing TransformerLens) without notice. ``tests/hooked_models/test_upstream.py`` fails when it does.

| what this package does | what it rests on |
|---|---|
| `registered` | ``ArchitectureAdapterFactory._adapters`` and ``SUPPORTED_ARCHITECTURES``, the dictionaries in which TransformerLens looks a model class up |
| the table in `architectures.adapters` | ``adapter.component_mapping["blocks"].submodules``, ``create_stateful_cache`` and ``prepare_loading`` of TransformerLens's adapters |
| `architectures.own_adapters` | ``ArchitectureAdapter`` and its ``prepare_model``, called with the loaded model; ``hook_aliases`` of blocks; ``sparse_required`` of ``MoEBridge`` |
| `architectures.lightning` | that MiniMax's model takes no cache but a ``MiniMaxCache``, and its ``linear_cache`` (the model classes' tests) |
| `complete_checkpoints` | ``PreTrainedModel.from_pretrained``, through which every model is loaded, and its ``output_loading_info`` |
| `is_listened_to` | torch's dictionaries of a module's hooks, to which ``HookPoint.add_hook`` adds |
| `HeadSplit` | ``splits_attention_heads`` of a hook point's conversion, by which ``pos_slice`` finds the position axis |
| `CheckedBridge` | ``_hook_registry``, ``_add_aliases_to_hooks``, ``_resolve_hook_name``, ``_reset_sae`` and ``_acts_to_saes`` of the bridges |
| `boot_arguments` | the signature of ``TransformerBridge.boot_transformers`` |
| `bridge.public_methods` | the signatures of the bridges' public methods; ``cfg.is_stateful``, which hands ``generate`` without a cache over to ``hf_generate``; ``adapter.supports_fold_ln`` |
| `bridge.copies` | ``torch._C._nn._parse_to``; ``_original_component`` in the names of weights; transformers' ``save_pretrained(state_dict=)`` |
| `bridge.activation_cache` | ``ActivationCache`` and its methods, ``_get_cached_ln_scale`` among them, and ``hook_out`` of a block's parts |
| `files.tokenizers.keep_tokenizer` | ``init_kwargs["name_or_path"]`` and ``["add_bos_token"]``, by which TransformerLens loads a tokenizer again |
| `mixers.HookedMixer` | ``GeneralizedComponent.get_hooks``, ``set_original_component`` and ``submodules``, which ``setup_submodules`` reads after it |
| `bridge.lower_layers` | ``model.blocks``, through whose ``forward``, set on each block, the Hugging Face model runs its layers (``test_lower_layers.py``) |
| `bridge.branch_attention` | that an attention's class has "Attention" in its name, and its arguments a token axis second; its ``forward`` is set as the blocks' (``test_branch_attention.py``) |
| `unembedding.run_to_residual` | ``ln_final`` gets the last residual stream, and ``logits_to_keep`` may be an empty tensor (``test_unembedding.py``) |
| `caches` | ``layers``, ``has_previous_state``, ``conv_states`` and ``recurrent_states`` (tensors before transformers 5.14, dicts of them since) |
"""  # noqa: E501  (a table)

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.factories import architecture_adapter_factory as factory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import Slice
from transformers import PreTrainedModel

from hooked_models.bridge.activation_cache import RecurrentActivationCache
from hooked_models.bridge.arguments import bound, idle, like, refusals
from hooked_models.bridge.copies import CopyableBridge
from hooked_models.errors import HookedModelError
from hooked_models.files.declared_sizes import within_checkpoint
from hooked_models.files.layouts import listed, not_finite

_LAYER = re.compile(r"blocks\.(\d+)\.")
HOOKS_OF_ATTENTION = {"q": "read", "k": "write_key", "v": "write_value", "z": "head_out"}
"""The hook of a recurrent layer for each of TransformerLens's hooks of an attention head."""
# The hooks after the last layer.
_AT_THE_END = ("ln_final", "unembed", "hook_unembed")


@contextmanager
def registered(adapters: dict[str, Callable[[Any], Any]]) -> Iterator[None]:
    """While open, TransformerLens builds bridges of these model classes with these adapters.

    Afterwards its own are back, so that importing this package changes no other bridge. (The entry points of
    TransformerLens would refuse to replace adapters that it already has.)

    Args:
        adapters: functions from a bridge's config to an adapter, by the name of the model class in Hugging
            Face's configuration. TransformerLens looks for that name in one dictionary and for the adapter in
            another; both are filled.
    """
    tables: list[dict[str, Any]] = [
        factory.ArchitectureAdapterFactory._adapters,
        factory.SUPPORTED_ARCHITECTURES,
    ]
    before = [dict(table) for table in tables]
    for table in tables:
        table.update(adapters)
    try:
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            for name in adapters:
                if name in own:
                    table[name] = own[name]
                else:
                    del table[name]


@contextmanager
def complete_checkpoints() -> Iterator[None]:
    """While open, transformers refuses a checkpoint whose tensors do not fit, where it would invent them."""
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("output_loading_info", False):
            return load(cls, *args, output_loading_info=True, **kwargs)
        kwargs.setdefault("ignore_mismatched_sizes", True)
        held = (args[0] if args else None, kwargs.get("revision"), kwargs.get("state_dict"))
        with within_checkpoint(*held, cls.__name__):
            model, info = load(cls, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        mismatched = sorted(str(key) for key in info["mismatched_keys"])
        infinite = not_finite(model.state_dict())
        problems = {"lacks": missing, "has the wrong shape for": mismatched}
        problems["has NaN or infinite numbers in"] = infinite
        for problem, names in problems.items():
            if names:
                where = "" if not args or args[0] is None else f" in {args[0]}"
                raise HookedModelError(f"the checkpoint of {cls.__name__}{where} {problem} {listed(names)}")
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[assignment]


def boot_arguments() -> list[str]:
    """The names of the arguments with which TransformerLens boots a model."""
    return list(inspect.signature(TransformerBridge.boot_transformers).parameters)


def is_listened_to(point: nn.Module) -> bool:
    """Whether a hook, or an SAE in the hook point's place, wants the activation."""
    if not isinstance(point, HookPoint):
        return True
    return bool(
        point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks
    )


class HeadSplit(BaseTensorConversion):
    """Converts nothing; tells TransformerLens that a hook's axes end with pos, head, d."""

    splits_attention_heads = True

    def handle_conversion(self, input_value: Any, *_: Any) -> Any:
        return input_value

    def revert(self, input_value: Any, *_: Any) -> Any:
        return input_value


class CheckedBridge(CopyableBridge):
    """SAELens's bridge, with an error where a hook's name matches nothing, which TransformerLens ignores."""

    @property
    def hook_dict(self) -> dict[str, Any]:
        """All hook points by name, TransformerLens's aliases included (SAELens's bridge leaves them out)."""
        hooks = super().hook_dict
        self._add_aliases_to_hooks(hooks)
        return hooks

    @property
    def busy_hooks(self) -> list[str]:
        """The names of the hook points that have a hook or an SAE."""
        return [name for name, point in self._hook_registry.items() if is_listened_to(point)]

    def resolved(self, hook_name: str) -> str:
        """The name of a hook point, of the name or an alias.

        Raises:
            HookedModelError: there is no such hook point.
        """
        name = self._resolve_hook_name(hook_name)
        if name not in self._hook_registry:
            self.check_hook_names([name])
        return name

    def hook_point(self, hook_name: str) -> nn.Module:
        """The hook point of this name or alias, or the SAE in its place, without making a table of all.

        Raises:
            HookedModelError: there is no such hook point.
        """
        return self._hook_registry[self.resolved(hook_name)]

    @like(TransformerBridge.run_with_cache)
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given("run_with_cache", super().run_with_cache, args, kwargs)
        given["names_filter"] = wanted = self._filter(given.get("names_filter"))
        prompt = given["input"]
        if isinstance(prompt, str):
            given.pop("padding_side", None)  # nothing is padded, and TransformerLens goes on with tokens
        if given.get("remove_batch_dim") and _rows(prompt) != 1:
            raise HookedModelError(f"run_with_cache: remove_batch_dim needs one row, got {_rows(prompt)}")
        self._check_slice(prompt, given)
        self._refuse_after_stop("run_with_cache", [wanted] if isinstance(wanted, str) else wanted, given)
        if given.get("incl_bwd") and given.get("return_type") != "loss":
            raise HookedModelError(
                "run_with_cache: incl_bwd needs one number to derive: say return_type='loss'"
            )
        output, cache = super().run_with_cache(**given)
        if wanted is not None and not len(cache):
            raise HookedModelError("run_with_cache: no activation that names_filter asks for is in this pass")
        if isinstance(cache, ActivationCache):
            cache = RecurrentActivationCache(cache.cache_dict, self, cache.has_batch_dim)
        return output, cache

    @like(TransformerBridge.run_with_hooks)
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given("run_with_hooks", super().run_with_hooks, args, kwargs)
        if given.get("names_filter") is not None:
            raise idle("run_with_hooks", "names_filter", "a hook's name, or a filter, stands in fwd_hooks")
        without_rows = given.pop("remove_batch_dim", False)
        if without_rows and _rows(given["input"]) != 1:
            raise HookedModelError(
                f"run_with_hooks: remove_batch_dim needs one row, got {_rows(given['input'])}"
            )
        for side in {"fwd_hooks", "bwd_hooks"} & given.keys():
            pairs = self._checked_hooks(given[side])
            self._refuse_after_stop("run_with_hooks", [name for name, _ in pairs], given)
            given[side] = [(name, _for_one_row(hook)) for name, hook in pairs] if without_rows else pairs
        return super().run_with_hooks(**given)

    @like(TransformerBridge.hooks)
    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        given = bound(super().hooks, args, kwargs)
        for side in {"fwd_hooks", "bwd_hooks"} & given.keys():
            given[side] = self._checked_hooks(given[side])
        return super().hooks(**given)

    @like(TransformerBridge.add_hook)
    def add_hook(self, *args: Any, **kwargs: Any) -> Any:
        given = bound(super().add_hook, args, kwargs)
        self._checked_hooks([(given["name"], given["hook_fn"])])
        return super().add_hook(**given)

    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> None:
        metadata = sae.cfg.metadata
        for name in (metadata.hook_name, metadata.hook_name_out):
            if name is not None:  # SAELens would leave the SAE out
                self.resolved(name)
        super().add_sae(sae, use_error_term=use_error_term)

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        wrapper = self._acts_to_saes.get(act_name)
        super()._reset_sae(act_name, prev_wrapper)
        # Bridge components shorten the name of a hook point that is set on them.
        name = self._resolve_hook_name(act_name)
        point = self._hook_registry.get(name)
        if prev_wrapper is None and point is not None:
            point.name = name
        # While attached, the SAE's own hooks had names of the model's.
        if wrapper is not None and all(w.sae is not wrapper.sae for w in self._acts_to_saes.values()):
            for own_name, hook in wrapper.sae.hook_dict.items():
                hook.name = own_name

    def _given(self, taker: str, method: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of a method that runs the model, checked; the forward pass checks the others."""
        given = bound(method, args, kwargs)
        own = {"device", *inspect.signature(method).parameters}  # device is in run_with_cache's **kwargs
        for name in given.keys() - own - inspect.signature(TransformerBridge.forward).parameters.keys():
            for other in ("run_with_hooks", "run_with_cache", "run_with_saes", "generate"):
                if name in inspect.signature(getattr(CopyableBridge, other)).parameters:
                    around = " (with model.hooks(...): around it)" if name.endswith("wd_hooks") else ""
                    raise HookedModelError(f"{taker} takes no argument {name!r}, which {other} has{around}")
        self._check_stop(taker, given)
        if isinstance(given.get("input"), (str, list, tuple)):
            self._check_tokenizer(taker)
        return given

    def _filter(self, names: Any) -> Any:
        """A ``names_filter`` as TransformerLens takes it, after a check that it means hook points."""
        if names is None or callable(names) or isinstance(names, str):
            self.check_hook_names(names if names is None or callable(names) else [names])
            return names
        wanted = list(names) if isinstance(names, Iterable) else [names]
        if not wanted:
            raise HookedModelError("names_filter has no names: leave it out to cache everything")
        if any(callable(name) for name in wanted):
            raise HookedModelError("names_filter must be a name, a list of names, or one function of a name")
        self.check_hook_names(wanted)
        return wanted

    def _check_slice(self, prompt: Any, given: dict[str, Any]) -> None:
        """Refuse a ``pos_slice`` that is none, or of positions that are not there."""
        wanted = given.get("pos_slice")
        if wanted is None:
            return
        with refusals("run_with_cache", "pos_slice is a position, a list of them, or (start, end[, step])"):
            chosen = Slice.unwrap(wanted)
            tokens = (
                prompt if isinstance(prompt, Tensor) else self.to_tokens(prompt, given.get("prepend_bos"))
            )
            chosen.apply(torch.empty(tokens.shape[min(1, tokens.ndim - 1)]), dim=0)

    def _refuse_after_stop(self, taker: str, names: Any, given: dict[str, Any]) -> None:
        """Refuse hooks of which a pass comes to none, because it stops before."""
        stop, count = given.get("stop_at_layer"), len(self.blocks)
        if stop is None or stop == count or names is None or callable(names):
            return
        named = [self._resolve_hook_name(name) for name in names if isinstance(name, str)]
        layers = [_LAYER.match(name) for name in named]
        late = [
            int(layer[1]) >= stop % count if layer else name.startswith(_AT_THE_END)
            for name, layer in zip(named, layers, strict=True)
        ]
        if named and len(named) == len(names) and all(late):
            raise HookedModelError(
                f"{taker}: stop_at_layer={stop} comes before {named[0]}, which would not run"
            )

    def _checked_hooks(self, hooks: Any) -> list[tuple[Any, Any]]:
        if not isinstance(hooks, Iterable) or isinstance(hooks, (str, Mapping)):
            raise HookedModelError(
                f"hooks must be a list of (name, function), got {hooks!r:.80}: write "
                "fwd_hooks=[(name, function)]"
            )
        pairs = list(hooks)
        wrong = next((p for p in pairs if not isinstance(p, (tuple, list)) or len(p) != 2), None)
        if wrong is not None:
            raise HookedModelError(
                f"hooks must be a list of (name, function), got {wrong!r:.80} in it: write "
                "fwd_hooks=[(name, function)]"
            )
        self.check_hook_names([name for name, _ in pairs])
        for name, function in pairs:
            if not _takes_a_hook(function):
                raise HookedModelError(
                    f"the hook at {name!r:.80} must be a function of (activation, hook), got {function!r:.80}"
                )
        return pairs

    def check_hook_names(self, names: Iterable[str | Callable[..., Any]] | Any) -> None:
        """Refuse names that are no hook point's, and filter functions that no hook point's name satisfies."""
        if names is None:
            return
        if callable(names):
            if not any(names(name) for name in self.hook_dict):
                raise HookedModelError(f"{names!r:.80} is true of no hook point's name: see model.hook_dict")
            return
        wanted = list(names) if isinstance(names, Iterable) else [names]
        if all(isinstance(name, str) and type(self._hook_registry.get(name)) is HookPoint for name in wanted):
            return
        hook_dict = self.hook_dict
        for name in wanted:
            if callable(name):
                self.check_hook_names(name)
            elif not isinstance(name, str):
                raise HookedModelError(
                    f"a hook's name must be a text, got {name!r:.80}: see model.hook_dict, or "
                    "model.write_hook_name(layer, head)"
                )
            elif name not in hook_dict and name in self._hook_registry:
                own = [hook for hook in hook_dict if hook.startswith(f"{name}.")]
                raise HookedModelError(
                    f"an SAE stands in the place of {name}, whose hooks are {', '.join(own)}: name one of "
                    "them, or call model.reset_saes()"
                )
            elif name not in hook_dict:
                close = self._like(name)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise HookedModelError(f"no hook point is named {name!r}{hint}")

    def _like(self, name: str) -> list[str]:
        """Hook points that a name that is none's may have meant, those of its layer before others."""
        close = difflib.get_close_matches(name, self.hook_dict, n=3, cutoff=0.5)
        layer, of_attention = _LAYER.match(name), HOOKS_OF_ATTENTION.get(name.rpartition("hook_")[2])
        if layer is None:
            return close
        here = [hook for hook in self.hook_dict if hook.startswith(layer[0])]
        instead = [hook for hook in here if hook.endswith(f".hook_{of_attention}")]
        return instead or [hook for hook in close if hook in here] or close


def _rows(prompt: Any) -> int:
    """How many texts a prompt holds."""
    if isinstance(prompt, Tensor):
        return len(prompt) if prompt.ndim > 1 else 1
    return 1 if isinstance(prompt, str) else len(prompt)


def _takes_a_hook(function: Any) -> bool:
    """Whether something can be called with an activation and ``hook=``."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, hook=None)
    except TypeError:
        return False
    except ValueError:  # it has no signature that Python knows
        return True
    return True


def _for_one_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that sees activations without their axis of rows, and may return None, as any hook."""

    @functools.wraps(function)
    def without_rows(x: Tensor, hook: Any) -> Tensor | None:
        changed = function(x[0], hook=hook)
        return None if changed is None else changed[None]

    return without_rows
