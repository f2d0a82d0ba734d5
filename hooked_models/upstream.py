"""Everything here replaces or rests on parts of transformers, TransformerLens and SAELens that are not public.

A new version of one of them can break this file (and `caches`, which reads the caches of transformers without
importing TransformerLens) without notice. ``tests/hooked_models/test_upstream.py`` fails when it does.

| what this package does | what it rests on |
|---|---|
| `registered` | ``ArchitectureAdapterFactory._adapters`` and ``SUPPORTED_ARCHITECTURES``, the dictionaries in which TransformerLens looks a model class up |
| the table in `architectures.adapters` | ``adapter.component_mapping["blocks"].submodules``, ``create_stateful_cache`` and ``prepare_loading`` of TransformerLens's adapters |
| `complete_checkpoints` | ``PreTrainedModel.from_pretrained``, through which every model is loaded, and its ``output_loading_info`` |
| `is_listened_to` | torch's dictionaries of a module's hooks, to which ``HookPoint.add_hook`` adds |
| `HeadSplit` | ``splits_attention_heads`` of a hook point's conversion, by which ``pos_slice`` finds the position axis |
| `CheckedBridge` | ``_hook_registry``, ``_add_aliases_to_hooks``, ``_resolve_hook_name``, ``_reset_sae`` and ``_acts_to_saes`` of the bridges |
| `mixers.HookedMixer` | ``GeneralizedComponent.get_hooks``, ``set_original_component`` and ``submodules``, which ``setup_submodules`` reads after it |
| `caches` | ``layers``, ``has_previous_state``, ``conv_states`` and ``recurrent_states`` (tensors before transformers 5.14, dicts of them since) |
"""  # noqa: E501  (a table)

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import nn
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.factories import architecture_adapter_factory as factory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from hooked_models.errors import HookedModelError
from hooked_models.files.declared_sizes import within_checkpoint
from hooked_models.files.layouts import listed, not_finite


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


class CheckedBridge(SAETransformerBridge):
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
        self.check_hook_names([name])
        return name

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.check_hook_names([names_filter] if isinstance(names_filter, str) else names_filter)
        return super().run_with_cache(
            input, return_cache_object, remove_batch_dim, names_filter, *args, **kwargs
        )

    def run_with_hooks(
        self, input: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any
    ) -> Any:
        fwd_hooks, bwd_hooks = self._checked_hooks(fwd_hooks), self._checked_hooks(bwd_hooks)
        return super().run_with_hooks(input, fwd_hooks, bwd_hooks, *args, **kwargs)

    def hooks(  # type: ignore[override]
        self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any
    ) -> Any:
        fwd_hooks, bwd_hooks = self._checked_hooks(fwd_hooks), self._checked_hooks(bwd_hooks)
        return super().hooks(fwd_hooks, bwd_hooks, *args, **kwargs)

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_hook_names([name])
        return super().add_hook(name, *args, **kwargs)

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

    def _checked_hooks(self, hooks: Any) -> list[tuple[Any, Any]]:
        pairs = list(hooks)
        wrong = next((p for p in pairs if not isinstance(p, (tuple, list)) or len(p) != 2), None)
        if wrong is not None:
            raise HookedModelError(
                f"hooks must be a list of (name, function), got {wrong!r:.80} in it: write "
                "fwd_hooks=[(name, function)]"
            )
        self.check_hook_names([name for name, _ in pairs])
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
        if all(isinstance(name, str) and name in self._hook_registry for name in wanted):
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
            elif name not in hook_dict and name not in self._hook_registry:
                close = difflib.get_close_matches(name, hook_dict, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise HookedModelError(f"no hook point is named {name!r}{hint}")
