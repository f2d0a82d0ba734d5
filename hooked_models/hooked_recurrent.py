"""`HookedRecurrent`: a TransformerLens bridge whose recurrent layers show what they write."""

from __future__ import annotations

import dataclasses
import re
from numbers import Integral
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from hooked_models import calls, edited_runs, edits, unembedding, upstream, zoo
from hooked_models.architectures import adapters
from hooked_models.bridge import branch_attention, copies, lower_layers
from hooked_models.bridge.arguments import signature_of
from hooked_models.caches import CACHE_ARGUMENTS, pop_cache, refuse_unknown
from hooked_models.errors import HookedModelError, one_line
from hooked_models.files import loading
from hooked_models.mixers import HookedMixer

_SITE = re.compile(r"blocks\.(\d+)\.\w+\.hook_(write|state)\.(\d+)")

# Arguments of transformers that ask for results which a bridge's forward pass does not return.
_NOT_RETURNED = ("output_hidden_states", "output_router_logits", "num_items_in_batch")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One head of one recurrent layer: a matrix memory of shape ``[d_k, d_v]``."""

    layer: int
    head: int
    d_k: int
    d_v: int
    architecture: str
    """The mixer's kind: "gated_delta_net", "delta_net", "gla", "kda", "lightning", "mamba2", "rwkv7"."""


class Site(NamedTuple):
    """The cell that a hook name belongs to, and whether it is the hook of its write or of its state."""

    cell: Cell
    kind: Literal["write", "state"]


def sides_of(sae: Any) -> tuple[int, int] | None:
    """(d_k, d_v) of the matrices that an SAE takes, from its config or, for a flat SAE, its metadata."""
    for place in (sae.cfg, sae.cfg.metadata):
        d_k, d_v = getattr(place, "d_k", None), getattr(place, "d_v", None)
        if d_k is not None and d_v is not None:
            return d_k, d_v
    return None


class HookedRecurrent(upstream.CheckedBridge):
    """A recurrent language model with hook points on each head's cache writes.

    Everything of `TransformerBridge` and SAELens's `SAETransformerBridge` works as it does there; the hooks
    of the recurrent layers are listed in `hooked_models.mixers.HookedMixer`. A hook name that matches
    nothing raises `HookedModelError`.

    ``run_with_cache`` without a ``names_filter`` caches every head's writes, erases and states, d_k * d_v
    numbers a token each: name what you need on models of any size. Where only a write is wanted,
    ``run_with_cache(..., names_filter=[write], stop_at_layer=layer + 1)`` leaves out the layers above it and
    the logits: on Qwen3.5-0.8B, at layer 9 of 24, it costs a quarter.
    """

    @classmethod
    def boot_transformers(cls, model_name: loading.Name, **kwargs: Any) -> HookedRecurrent:
        """Load a model: a Hugging Face id, a local folder or file, or one that ships (``"tiny-gdn"``).

        Beside Hugging Face's form: Mamba-2 as the mamba_ssm package saves it, RWKV-7,
        DeltaNet, GLA and Gated DeltaNet as flash-linear-attention does, and BlinkDL's RWKV-7 files
        (``"RWKV-x070-....pth"``).

        Args:
            model_name: hub id, folder, ``.pth`` file, or a name in `hooked_models.zoo.SHIPPED`.
            **kwargs: as for ``TransformerBridge.boot_transformers`` (device, dtype, revision, ...); a dtype
                may also be given by name, ``"bfloat16"``, as JSON configs must. With ``load_weights=False``
                the model has new weights, drawn from torch's generator, and the sizes of the checkpoint.

        Raises:
            HookedModelError: there is no model, its checkpoint is damaged or does not fit, no tokenizer is
                found, it has no recurrent layer that this package knows, a package is missing that it
                needs, or an option is unknown or would have no effect.
        """
        model_name = loading.name_of(model_name)
        try:
            with adapters.registered(), upstream.complete_checkpoints():
                source, options = loading.prepare(model_name, kwargs, upstream.boot_arguments())
                model = super().boot_transformers(source, **options)
        except HookedModelError:
            raise
        except (OSError, ValueError, RuntimeError, AssertionError, ImportError, SafetensorError) as error:
            raise HookedModelError(f"could not load {model_name}: {one_line(error)}") from error
        except Exception as error:  # any class, on what transformers and TransformerLens do not check
            line = f"{type(error).__name__}: {one_line(error)}"
            raise HookedModelError(f"could not load {model_name}: {line}") from error
        assert isinstance(model, HookedRecurrent)
        vars(model)["_mixers"] = model._find_mixers()  # to look through all blocks takes milliseconds
        if not model.mixers:
            model_class = model.cfg.architecture
            raise HookedModelError(
                f"{model_name} ({model_class}) has no recurrent layer: its configuration has other kinds only"
            )
        calls.watch(model)
        lower_layers.make_blocks_skippable(model)
        branch_attention.run_in_cuts(model)
        copies.keep_names(model.original_model)
        unembedding.freeze_added_bias(model)
        # TransformerLens's adapter of RWKV-7 is of another implementation, which cannot decode from a cache.
        model.adapter.supports_kv_cache = model.adapter.supports_batched_generation = True
        model.cfg.model_name = model_name
        if model_name in zoo.SHIPPED:  # TransformerLens's defaults differ by architecture
            model.cfg.default_prepend_bos = False
        return model

    @classmethod
    def from_pretrained(cls, model_name: loading.Name, **kwargs: Any) -> HookedRecurrent:
        """`boot_transformers` by the name that ``HookedTransformer`` has for it; weights stay unprocessed."""
        return cls.boot_transformers(model_name, **kwargs)

    @classmethod
    def for_sae(cls, sae: Any, **kwargs: Any) -> HookedRecurrent:
        """Load the model that an SAE belongs to, and make sure that the SAE fits its cell.

        Args:
            sae: an SAE of any type whose ``cfg.metadata`` has ``model_name`` and ``hook_name``.
            **kwargs: as for `boot_transformers`; by default the SAE's device, and the dtype and revision that
                its metadata's ``model_from_pretrained_kwargs`` has. Nothing else is taken from there: an SAE
                may come from strangers, and must not decide whether a model's own code is run.

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
        name = self.resolved(_metadata_of(sae, "hook_name").hook_name)
        if _SITE.fullmatch(name) is None:
            return
        cell = self.site(name).cell
        sides = sides_of(sae) or (cell.d_k, cell.d_v)
        if sae.cfg.d_in != cell.d_k * cell.d_v or sides != (cell.d_k, cell.d_v):
            known = "" if sides_of(sae) is None else f" ({sides[0]} x {sides[1]})"
            raise HookedModelError(
                f"the SAE takes {sae.cfg.d_in} numbers{known}, but {name} gives {cell.d_k} x {cell.d_v} = "
                f"{cell.d_k * cell.d_v}: give the model that it was trained on, as "
                "HookedRecurrent.for_sae(sae) loads it"
            )

    def forward(
        self,
        input: Any,
        *args: Any,
        edit: edits.Edit | None = None,
        lower: lower_layers.LowerLayers | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `TransformerBridge.forward`; a cache is ``past_key_values`` on every architecture.

        transformers names Mamba-2's ``cache_params``, and would ignore one of another name.

        Args:
            input: tokens or text.
            *args: as for `TransformerBridge.forward`.
            edit: swapped or added writes that this call carries; see `run_with_swapped_writes` and
                `run_with_added_writes`.
            lower: what the lower layers make of the tokens (`bridge.lower_layers`): the call leaves them out.
            **kwargs: as for `TransformerBridge.forward`.

        Raises:
            HookedModelError: nothing takes one of the arguments, or the model would not honour it: a cache of
                another model or number of rows; a mask of another shape, or with padding between tokens or,
                on the way into a cache, after them; packed documents; tokens outside the vocabulary.
        """
        cache = pop_cache(kwargs)
        signature = signature_of(super().forward)
        of_model = signature_of(self.original_model.forward).parameters.keys()
        own = kwargs.keys() - of_model - signature.parameters.keys()
        refuse_unknown({name: kwargs[name] for name in own}, "the model")
        unseen = [name for name in _NOT_RETURNED if kwargs.get(name)]
        if unseen:
            raise HookedModelError(
                f"a forward pass does not return what {unseen[0]} asks for: use run_with_cache, or "
                "model.original_model"
            )
        given = signature.bind(input, *args, **kwargs).arguments
        if isinstance(input, (list, tuple)) and not (input and all(isinstance(x, str) for x in input)):
            what = f"a {type(input).__name__} of {type(input[0]).__name__}" if input else "an empty list"
            raise HookedModelError(
                f"the model reads a text, a list of texts, or a tensor of token ids [batch, pos]; got {what}"
            )
        calls.check_is_tensor(given.get("attention_mask"), "attention_mask")
        wants_cache = given.get("return_type") == "logits_and_cache"
        if wants_cache:
            cache = self.new_cache() if cache is None else cache
            kwargs["use_cache"] = True
        if cache is not None:
            kwargs[next(name for name in CACHE_ARGUMENTS if name in of_model)] = cache
        if calls.reads_last_logits_only() and not unembedding.is_hooked(self):
            kwargs["logits_to_keep"] = 1
        with calls.reading(), edits.edit_in_force(edit), lower_layers.given(lower):
            output = super().forward(input, *args, **kwargs)
        return (output[0], cache) if wants_cache else output

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Where the tokens of the forward pass that is running are in their texts, for use in a hook.

        Each token's number in its row, counted from 0 at the row's first token: cached tokens count, padding
        does not, so a text has the same positions alone, in a batch, and token by token in ``generate``.
        Padded positions have -1.

        Raises:
            HookedModelError: no forward pass is running, or something else filled its cache, so that nobody
                knows how many tokens it holds.
        """
        return calls.running(self.original_model).positions()

    @property
    def attention_mask(self) -> Int[Tensor, "batch pos"]:
        """1 at the tokens of the forward pass that is running, 0 at its padding; ones if nothing is padded.

        Of the call's new tokens only, shaped like `positions`; cached tokens have no column.

        Raises:
            HookedModelError: no forward pass is running.
        """
        return calls.running(self.original_model).mask()

    def new_cache(self) -> Any:
        """An empty cache to decode with: ``model(tokens, past_key_values=cache, use_cache=True)``."""
        return self.adapter.create_stateful_cache(
            self.original_model, batch_size=1, device=self.cfg.device, dtype=self.cfg.dtype
        )

    @property
    def mixers(self) -> dict[int, HookedMixer]:
        """The recurrent layers by layer number."""
        return vars(self).get("_mixers") or self._find_mixers()

    def _find_mixers(self) -> dict[int, HookedMixer]:
        return {
            layer: module
            for layer, block in enumerate(self.blocks)
            for module in block.children()
            if isinstance(module, HookedMixer) and module.is_recurrent
        }

    @property
    def has_attention(self) -> bool:
        """Whether any layer has softmax attention, instead of a recurrence or beside it."""
        return any(True for block in self.blocks for _ in branch_attention.attention_of(block))

    @property
    def cells(self) -> list[Cell]:
        """Every (layer, head) with a matrix memory, in order."""
        return [cell for layer in self.mixers for cell in self._cells_of(layer)]

    def _cells_of(self, layer: int) -> list[Cell]:
        mixer = self.mixers[layer]
        sides, kind = mixer.write_shape, mixer.architecture
        return [Cell(layer, head, *sides, kind) for head in range(mixer.n_heads)]

    def cell(self, layer: int, head: int) -> Cell:
        """The cell at (layer, head).

        Raises:
            HookedModelError: there is none; the message lists the valid ones.
        """
        if not (isinstance(layer, Integral) and isinstance(head, Integral)):
            raise HookedModelError(f"layer and head must be whole numbers, got {layer!r} and {head!r}")
        for cell in self._cells_of(int(layer)) if layer in self.mixers else ():
            if cell.head == head:
                return cell
        raise HookedModelError(f"no cell at layer {layer}, head {head}; this model has {self._valid_cells()}")

    def hook_name(self, layer: int, hook: str, head: int | None = None) -> str:
        """Full name of a hook of a layer's mixer.

        Args:
            layer: a recurrent layer.
            hook: its name in the table of `HookedMixer` without ``hook_``: write, erase, state; in, out,
                write_key, write_value, read, decay, recurrence_out, head_out.
            head: for write, erase and state, which every head has its own of.

        Raises:
            HookedModelError: no such layer, head or hook; the message lists those that exist.
        """
        if head is not None:
            self.cell(layer, head)
        if not isinstance(layer, Integral) or layer not in self.mixers:
            raise HookedModelError(f"layer {layer!r} is not recurrent; this model has {self._valid_cells()}")
        mixer = self.mixers[layer]
        of_heads = mixer.per_head_hooks
        of_layer = [x.removeprefix("hook_") for x in mixer.get_hooks() if "." not in x]
        if hook not in (of_layer if head is None else of_heads):
            which = "" if head is None else f" of head {head}"
            if head is not None and hook in of_layer:
                raise HookedModelError(
                    f"hook {hook!r} of layer {layer} has all heads: leave out head= and take "
                    f"[:, :, {head}] of what it gives"
                )
            if hook in upstream.HOOKS_OF_ATTENTION:
                which += f" (TransformerLens's hook_{hook} is {upstream.HOOKS_OF_ATTENTION[hook]!r} here)"
            raise HookedModelError(
                f"layer {layer} has no hook {hook!r}{which}; it has {', '.join(of_layer)}, and with "
                f"head=0 to {mixer.n_heads - 1} {', '.join(of_heads)}"
            )
        slot = next(name for name, module in self.blocks[layer].named_children() if module is mixer)
        return f"blocks.{layer}.{slot}.hook_{hook}" + ("" if head is None else f".{head}")

    def write_hook_name(self, layer: int, head: int) -> str:
        """Name of the hook on one head's write, ``[batch, pos, d_k * d_v]`` row-major."""
        return self.hook_name(layer, "write", self.cell(layer, head).head)

    def state_hook_name(self, layer: int, head: int) -> str:
        """Name of the hook on one head's state after the token, shaped like its write."""
        return self.hook_name(layer, "state", self.cell(layer, head).head)

    def write_factor_hook_names(self, layer: int) -> tuple[str, str, str]:
        """Names of the hooks on all heads' write keys, write values and read vectors."""
        key, value, read = (self.hook_name(layer, name) for name in ("write_key", "write_value", "read"))
        return key, value, read

    def site(self, hook_name: str) -> Site:
        """The cell that the hook name of a write or a state belongs to, and which of the two it is.

        Raises:
            HookedModelError: it is no write or state hook, or its cell does not exist.
        """
        match = _SITE.fullmatch(hook_name) if isinstance(hook_name, str) else None
        if match is not None:
            layer, kind, head = int(match[1]), match[2], int(match[3])
            if self.hook_name(layer, kind, head) == hook_name:
                return Site(self.cell(layer, head), "write" if kind == "write" else "state")
        example = self.write_hook_name(self.cells[0].layer, 0)
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
        pass over ``pos + branch`` tokens: a branch sees native tokens only before its position, so
        all branches share the native states, convolution inputs and attention keys.

        Args:
            tokens: one passage.
            layer, head: the cell.
            positions: of the branches; they may repeat.
            keys, values: what each branch writes there, the sum over rank of key value^T. If they require
                gradients, so do the branches' logits; else nothing is differentiated.
            erase: whether the token's native erase still happens there; without it, the branch's state is
                the decayed one plus what is written.

        Returns:
            native logits ``[pos, d_vocab]`` and branch logits ``[branch, d_vocab]``.

        Raises:
            HookedModelError: no such cell, shapes or positions that do not fit, or anything is hooked.
        """
        cell = self.cell(layer, head)
        return edited_runs.run_with_swapped_writes(self, tokens, cell, positions, keys, values, erase)

    def run_with_added_writes(
        self,
        tokens: Int[Tensor, " pos"],
        layer: int,
        head: int,
        positions: Int[Tensor, " row"],
        keys: Float[Tensor, "row *rank d_k"],
        values: Float[Tensor, "row *rank d_v"],
        linear: bool = False,
        past_key_values: Any = None,
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of a passage when a cell writes key value^T beside its native write at one position.

        Args:
            tokens: one passage; every row reads it.
            layer, head: the cell.
            positions: where each row's write is added.
            keys, values: the factors of what is added, ``[row, d_k]`` and ``[row, d_v]``; or, where it is a
                sum over rank, ``[row, rank, d_k]`` and ``[row, rank, d_v]``.
            linear: return the *change* of the logits to first order in the layer's output. The added write is
                carried through every later decay and erase to every later read, and through the head's
                norm and gate, exactly; only what comes after the layer is linearised, at the native passage
                (one forward-mode derivative).
            past_key_values: a cache, of one row, of what comes before ``tokens``; it is left as it is.

        Raises:
            HookedModelError: no such cell, shapes, positions or a cache that do not fit, or ``linear`` inside
                another forward-mode derivative.
        """
        cell = self.cell(layer, head)
        return edited_runs.run_with_added_writes(
            self, tokens, cell, positions, keys, values, linear, past_key_values
        )

    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> None:
        self.check_sae(sae)
        super().add_sae(sae, use_error_term=use_error_term)

    def _valid_cells(self) -> str:
        return ", ".join(f"layer {n}: heads 0-{mixer.n_heads - 1}" for n, mixer in self.mixers.items())


def _metadata_of(sae: Any, *names: str) -> Any:
    """The metadata of an SAE, after a check that it has these fields."""
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
