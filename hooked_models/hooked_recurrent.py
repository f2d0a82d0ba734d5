"""`HookedRecurrent`: a TransformerLens bridge whose recurrent layers show what they write."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from safetensors import SafetensorError
from torch import Tensor
from torch.autograd import forward_ad

from hooked_models import zoo
from hooked_models.architectures import adapters
from hooked_models.caches import CACHE_ARGUMENTS, refuse_unknown, repeated, the_cache
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import loading
from hooked_models.mixers import Added, BranchAware, Branches, HookedMixer, Swap, is_listened_to

_SITE = re.compile(r"blocks\.(\d+)\.\w+\.hook_(write|state)\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One head of one recurrent layer: a matrix memory of shape ``[d_k, d_v]``."""

    layer: int
    head: int
    d_k: int
    d_v: int
    architecture: str


class Site(NamedTuple):
    """What a hook name points at: a cell, and whether its write or its state."""

    cell: Cell
    kind: Literal["write", "state"]


def sides_of(sae: Any) -> tuple[int, int] | None:
    """The sides of the matrices that an SAE takes, if it says: flat SAEs can in their metadata only."""
    for place in (sae.cfg, sae.cfg.metadata):
        d_k, d_v = getattr(place, "d_k", None), getattr(place, "d_v", None)
        if d_k is not None and d_v is not None:
            return d_k, d_v
    return None


class HookedRecurrent(SAETransformerBridge):
    """A recurrent language model with hook points on each head's cache writes.

    Everything of `TransformerBridge` and SAELens's `SAETransformerBridge` works as known there; the hooks
    of the recurrent layers are listed in `hooked_models.mixers.HookedMixer`. Hook names that match
    nothing raise `HookedModelError`.

    ``run_with_cache`` without a ``names_filter`` caches every head's writes, erases and states, d_k * d_v
    numbers a token each: name what you need on models of any size.
    """

    @classmethod
    def boot_transformers(cls, model_name: loading.Name, **kwargs: Any) -> HookedRecurrent:
        """Load a model: a Hugging Face id, a local folder or file, or one that ships (``"tiny-gdn"``).

        Beside Hugging Face's form: Mamba-2 as the mamba_ssm package saves it, RWKV-7 as
        flash-linear-attention does, and BlinkDL's RWKV-7 files (``"RWKV-x070-....pth"``).

        Args:
            model_name: hub id, folder, ``.pth`` file, or a name in `hooked_models.zoo.SHIPPED`.
            **kwargs: as for ``TransformerBridge.boot_transformers`` (device, dtype, revision, ...); a dtype
                may also be given by name, ``"bfloat16"``, as JSON configs must.

        Raises:
            HookedModelError: there is no model, its checkpoint is damaged or does not fit, no tokenizer is
                found, or it has no recurrent layer that this package knows.
        """
        model_name = loading.name_of(model_name)
        try:
            with adapters.registered(), loading.complete_checkpoints():
                source, options = loading.prepare(model_name, kwargs)
                model = super().boot_transformers(source, **options)
        except HookedModelError:
            raise
        except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
            raise HookedModelError(f"could not load {model_name}: {one_line(error)}") from error
        except loading.UNFORESEEN as error:
            line = f"{type(error).__name__}: {one_line(error)}"
            raise HookedModelError(f"could not load {model_name}: {line}") from error
        assert isinstance(model, HookedRecurrent)
        if not model.mixers:
            known = ", ".join(adapters.ADAPTERS)
            raise HookedModelError(
                f"{model_name} ({model.cfg.architecture}) has no recurrent layers that this package knows: "
                f"it hooks {known}; for other models use TransformerLens itself"
            )
        model.cfg.model_name = model_name
        if model_name in zoo.SHIPPED:  # TransformerLens's defaults differ by architecture
            model.cfg.default_prepend_bos = False
        return model

    @classmethod
    def for_sae(cls, sae: Any, **kwargs: Any) -> HookedRecurrent:
        """Load the model that an SAE belongs to, and make sure that the SAE fits its cell.

        Args:
            sae: an SAE of any type whose ``cfg.metadata`` has ``model_name`` and ``hook_name``.
            **kwargs: as for `boot_transformers`; by default the SAE's device, and the dtype and revision that
                its metadata's ``model_from_pretrained_kwargs`` has. Nothing else is taken from there: an SAE
                may come from strangers, who have no say in whether code of a model is run.

        Raises:
            HookedModelError: the SAE does not name its model or hook, the model cannot be loaded, has no
                such cell, or one of other sides.
        """
        metadata = _metadata_of(sae, "model_name", "hook_name")
        saved = metadata.model_from_pretrained_kwargs
        options = {name: saved[name] for name in ("dtype", "revision") if name in (saved or {})}
        model = cls.boot_transformers(metadata.model_name, **({"device": sae.cfg.device} | options | kwargs))
        model.check_sae(sae)
        return model

    def check_sae(self, sae: Any) -> None:
        """Make sure that an SAE's hook exists here and that its sizes are the cell's.

        Raises:
            HookedModelError: they are not.
        """
        name = self._resolve_hook_name(_metadata_of(sae, "hook_name").hook_name)
        self._check_hook_names([name])
        if _SITE.fullmatch(name) is None:
            return
        cell = self.site(name).cell
        sides = sides_of(sae) or (cell.d_k, cell.d_v)
        if sae.cfg.d_in != cell.d_k * cell.d_v or sides != (cell.d_k, cell.d_v):
            raise HookedModelError(
                f"the SAE takes {sae.cfg.d_in} numbers ({sides[0]} x {sides[1]}), but {name} gives "
                f"{cell.d_k} x {cell.d_v} = {cell.d_k * cell.d_v}"
            )

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """As `TransformerBridge.forward`; a cache is ``past_key_values`` on every architecture.

        transformers names Mamba-2's ``cache_params``, and would ignore one of another name.

        Raises:
            HookedModelError: the cache is another model's, or nothing takes one of the arguments.
        """
        cache = the_cache(kwargs)
        held = len(getattr(cache, "layers", ()))
        if cache is not None and held != len(self.new_cache().layers):
            raise HookedModelError(
                f"this {type(cache).__name__} of {held} layers does not fit the model: make one with "
                "model.new_cache()"
            )
        taken = inspect.signature(self.original_model.forward).parameters
        known = taken.keys() | inspect.signature(super().forward).parameters.keys()
        refuse_unknown({name: kwargs[name] for name in kwargs.keys() - known}, "the model")
        if cache is not None:
            kwargs[next(name for name in CACHE_ARGUMENTS if name in taken)] = cache
        return super().forward(input, *args, **kwargs)

    def new_cache(self) -> Any:
        """An empty cache to decode with: ``model(tokens, past_key_values=cache, use_cache=True)``."""
        return self.adapter.create_stateful_cache(
            self.original_model, batch_size=1, device=self.cfg.device, dtype=self.cfg.dtype
        )

    @property
    def mixers(self) -> dict[int, HookedMixer]:
        """The recurrent layers by layer number."""
        return {
            layer: module
            for layer, block in enumerate(self.blocks)
            for module in block.children()
            if isinstance(module, HookedMixer)
        }

    @property
    def cells(self) -> list[Cell]:
        """Every (layer, head) with a matrix memory, in order."""
        return [
            Cell(layer, head, *mixer.write_shape, mixer.architecture)
            for layer, mixer in self.mixers.items()
            for head in range(mixer.n_heads)
        ]

    def cell(self, layer: int, head: int) -> Cell:
        """The cell at (layer, head).

        Raises:
            HookedModelError: there is none; the message lists the valid ones.
        """
        if not (isinstance(layer, Integral) and isinstance(head, Integral)):
            raise HookedModelError(f"layer and head must be whole numbers, got {layer!r} and {head!r}")
        for cell in self.cells:
            if (cell.layer, cell.head) == (layer, head):
                return cell
        heads = {n: mixer.n_heads for n, mixer in self.mixers.items()}
        valid = ", ".join(f"layer {n}: heads 0-{count - 1}" for n, count in heads.items())
        raise HookedModelError(f"no cell at layer {layer}, head {head}; this model has {valid}")

    def write_hook_name(self, layer: int, head: int) -> str:
        """Name of the hook on one head's write, ``[batch, pos, d_k * d_v]`` row-major."""
        return self._hook_name("write", layer, head)

    def state_hook_name(self, layer: int, head: int) -> str:
        """Name of the hook on one head's state after the token, shaped like its write."""
        return self._hook_name("state", layer, head)

    def write_factor_hook_names(self, layer: int) -> tuple[str, str, str]:
        """Names of the hooks on all heads' write keys, write values and read vectors."""
        prefix = self.write_hook_name(layer, 0).rsplit(".hook_write", 1)[0]
        return f"{prefix}.hook_write_key", f"{prefix}.hook_write_value", f"{prefix}.hook_read"

    def site(self, hook_name: str) -> Site:
        """What a hook name points at.

        Raises:
            HookedModelError: it is no write or state hook, or its cell does not exist.
        """
        match = _SITE.fullmatch(hook_name) if isinstance(hook_name, str) else None
        if match is not None:
            layer, kind, head = int(match[1]), match[2], int(match[3])
            if self._hook_name(kind, layer, head) == hook_name:
                return Site(self.cell(layer, head), "write" if kind == "write" else "state")
        example = self._hook_name("write", self.cells[0].layer, 0)
        raise HookedModelError(
            f"{hook_name!r} is not the hook of a cell's write or state; one looks like {example!r}"
        )

    def run_with_swapped_writes(
        self,
        tokens: Int[Tensor, " pos"],
        layer: int,
        head: int,
        positions: Int[Tensor, " branch"],
        keys: Float[Tensor, "branch rank d_k"],
        values: Float[Tensor, "branch rank d_v"],
        erase: bool = True,
    ) -> tuple[Float[Tensor, "pos d_vocab"], Float[Tensor, "branch d_vocab"]]:
        """Native logits, and the logits at each position had the cell written something else just there.

        Equal to one full edited forward pass a branch, read at the edited position, for the cost of one
        pass over ``pos + branch`` tokens: what a branch sees before its position is native, so
        all branches share the native states, convolution inputs and attention keys.

        Args:
            tokens: one passage.
            layer, head: the cell.
            positions: where each branch stands; positions may repeat.
            keys, values: what each branch writes there, the sum over rank of key value^T. If they require
                gradients, so do the branches' logits; else nothing is differentiated.
            erase: whether the token's native erase still happens there; without it, the branch's state is
                the decayed one plus what is written.

        Returns:
            native logits ``[pos, d_vocab]`` and branch logits ``[branch, d_vocab]``.

        Raises:
            HookedModelError: no such cell, shapes or positions that do not fit, or anything is hooked.
        """
        cell, length, device = self.cell(layer, head), len(tokens), tokens.device
        positions = positions.to(device)
        if tokens.ndim != 1 or positions.ndim != 1 or positions.is_floating_point():
            raise HookedModelError(
                f"tokens must be one passage [pos] and positions whole numbers [branch], got shapes "
                f"{tuple(tokens.shape)} and {tuple(positions.shape)}, {positions.dtype}"
            )
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < length:
            raise HookedModelError(
                f"positions must lie in 0 .. {length - 1}, the passage's tokens; got "
                f"{int(positions.min())} .. {int(positions.max())}"
            )
        rank = keys.shape[1] if keys.ndim > 1 else 1
        expected = (len(positions), rank, cell.d_k), (len(positions), rank, cell.d_v)
        if (tuple(keys.shape), tuple(values.shape)) != expected:
            raise HookedModelError(
                f"keys and values must have shapes {expected[0]} and {expected[1]} here, got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        branches = Branches(length, positions)
        for_attention: dict[str, Any] = {}
        if len(self.mixers) < len(self.blocks):
            at = torch.cat([torch.arange(length, device=device), positions])
            # A native token sees what came before it, a branch the native tokens before it; both themselves.
            sees = torch.arange(len(at), device=device)[:, None] == torch.arange(len(at), device=device)
            sees[:, :length] |= torch.arange(length, device=device) < at[:, None]
            dtype = next(self.original_model.parameters()).dtype
            mask = torch.zeros(sees.shape, dtype=dtype, device=device)
            mask = mask.masked_fill(~sees, torch.finfo(dtype).min)[None, None]
            for_attention = {"attention_mask": mask, "position_ids": at[None]}
        busy = [name for name, point in self._hook_registry.items() if is_listened_to(point)]
        if busy:
            # They would see the native tokens and the branches in one row.
            raise HookedModelError(
                f"a run with swapped writes cannot honour the hooks on {', '.join(busy[:3])}: remove them "
                "first (model.reset_hooks(), model.reset_saes())"
            )
        mixing = [module for module in self.modules() if isinstance(module, BranchAware)]
        swapped = self.mixers[layer]
        try:
            for module in mixing:
                module._branches = branches
            swapped._swap = Swap(head, keys, values, erase)
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
            ):
                logits = self.forward(
                    torch.cat([tokens, tokens[positions]])[None], use_cache=False, **for_attention
                )[0]
        finally:
            for module in mixing:
                module._branches = None
            swapped._swap = None
        return logits[:length], logits[length:]

    @torch.no_grad()
    def run_with_added_writes(
        self,
        tokens: Int[Tensor, " pos"],
        layer: int,
        head: int,
        positions: Int[Tensor, " row"],
        keys: Float[Tensor, "row d_k"],
        values: Float[Tensor, "row d_v"],
        linear: bool = False,
        past_key_values: Any = None,
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of a passage when a cell writes key value^T beside its native write at one position.

        Args:
            tokens: one passage; every row reads it.
            layer, head: the cell.
            positions: where each row's write is added.
            keys, values: what is added.
            linear: give the *change* of the logits to first order in the layer's output. The added write is
                carried through every later decay and erase to every later read, and through the head's
                norm and gate, exactly; only what comes after the layer is linearised, at the native passage
                (one forward-mode derivative).
            past_key_values: a cache, of one row, of what comes before ``tokens``; it is left as it is.

        Raises:
            HookedModelError: no such cell, or shapes, positions or a cache that do not fit.
        """
        cell, n_rows = self.cell(layer, head), len(positions)
        found, expected = (tuple(keys.shape), tuple(values.shape)), ((n_rows, cell.d_k), (n_rows, cell.d_v))
        if tokens.ndim != 1 or positions.ndim != 1 or positions.is_floating_point() or found != expected:
            raise HookedModelError(
                f"tokens must be one passage [pos], positions whole numbers [row], keys and values of shapes "
                f"{expected[0]} and {expected[1]}; got {tuple(tokens.shape)}, {tuple(positions.shape)}, "
                f"{found[0]} and {found[1]}"
            )
        positions = positions.to(tokens.device)
        if n_rows and not 0 <= int(positions.min()) <= int(positions.max()) < len(tokens):
            raise HookedModelError(
                f"positions must lie in 0 .. {len(tokens) - 1}, the passage's tokens; got "
                f"{int(positions.min())} .. {int(positions.max())}"
            )
        mixer = self.mixers[layer]
        past: dict[str, Any] = {"use_cache": False}
        if past_key_values is not None:
            held = len(mixer.cached_state(past_key_values))
            if held != 1:
                raise HookedModelError(
                    f"past_key_values must hold one row, which all rows share; it holds {held}"
                )
            past = {"use_cache": True, "past_key_values": repeated(past_key_values, n_rows)}
        with forward_ad.dual_level() if linear else contextlib.nullcontext():
            try:
                mixer._added = Added(head, positions, keys, values, linear)
                logits = self.forward(tokens.expand(n_rows, -1), **past)
            finally:
                mixer._added = None
            if not linear:
                return logits
            change = forward_ad.unpack_dual(logits).tangent
            return torch.zeros_like(logits) if change is None else change

    # TransformerLens passes over names that match nothing; here they are errors.

    @property
    def hook_dict(self) -> dict[str, Any]:
        """All hook points by name, TransformerLens's aliases included (SAELens's bridge leaves them out)."""
        hooks = super().hook_dict
        self._add_aliases_to_hooks(hooks)
        return hooks

    def run_with_cache(
        self,
        input: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._check_hook_names([names_filter] if isinstance(names_filter, str) else names_filter)
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
        self._check_hook_names([name])
        return super().add_hook(name, *args, **kwargs)

    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> None:
        self.check_sae(sae)
        super().add_sae(sae, use_error_term=use_error_term)

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        wrapper = self._acts_to_saes.get(act_name)
        super()._reset_sae(act_name, prev_wrapper)
        # Bridge components shorten the name of a hook point that is set on them.
        name = self._resolve_hook_name(act_name)
        point = self._hook_registry.get(name)
        if prev_wrapper is None and point is not None:
            point.name = name
        # Attached, the SAE's own hooks bore the model's names.
        if wrapper is not None and all(w.sae is not wrapper.sae for w in self._acts_to_saes.values()):
            for own, hook in wrapper.sae.hook_dict.items():
                hook.name = own

    def _hook_name(self, kind: str, layer: int, head: int) -> str:
        self.cell(layer, head)
        slot = next(n for n, m in self.blocks[layer].named_children() if m is self.mixers[layer])
        return f"blocks.{layer}.{slot}.hook_{kind}.{head}"

    def _checked_hooks(self, hooks: Any) -> list[tuple[Any, Any]]:
        pairs = list(hooks)
        wrong = next((p for p in pairs if not isinstance(p, (tuple, list)) or len(p) != 2), None)
        if wrong is not None:
            raise HookedModelError(
                f"hooks must be a list of (name, function), got {wrong!r:.80} in it: write "
                "fwd_hooks=[(name, function)]"
            )
        self._check_hook_names([name for name, _ in pairs])
        return pairs

    def _check_hook_names(self, names: Iterable[str | Callable[..., Any]] | Any) -> None:
        if names is None:
            return
        if callable(names):
            if not any(names(name) for name in self.hook_dict):
                raise HookedModelError(f"{names!r:.80} is true of no hook point's name: see model.hook_dict")
            return
        wanted = list(names) if isinstance(names, Iterable) else [names]
        if all(isinstance(name, str) and name in self._hook_registry for name in wanted):
            return
        known = self.hook_dict
        for name in wanted:
            if callable(name):
                self._check_hook_names(name)
            elif not isinstance(name, str):
                raise HookedModelError(
                    f"a hook's name must be a text, got {name!r:.80}: see model.hook_dict, or "
                    "model.write_hook_name(layer, head)"
                )
            elif name not in known and name not in self._hook_registry:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise HookedModelError(f"no hook point is named {name!r}{hint}")


def _metadata_of(sae: Any, *names: str) -> Any:
    """The metadata of an SAE that says what it must."""
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    if metadata is None:
        raise HookedModelError(
            f"an SAE is wanted, got a {type(sae).__name__}: SAE.load_from_disk or SAE.from_pretrained "
            "gives one"
        )
    for name in names:
        if not isinstance(getattr(metadata, name, None), str):
            raise HookedModelError(
                f"the SAE does not say which model and cell it belongs to: set sae.cfg.metadata.{name}"
            )
    return metadata
