"""A published SAE's tensors, checked against its config, its path and the caller, and converted for SAELens.

Whatever the config leaves out is read off the tensors. The factored types become a `WriteSAE`; ``flat``
becomes SAELens's own ``topk``, or with ``use_batchtopk``, which ``topk`` lacks, a `WriteSAE` with a dense
encoder and decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from sae_lens import __version__ as sae_lens_version
from torch import Tensor

from hooked_models.files.layouts.checkpoint import is_finite
from writesae_lens.errors import WriteSAEError
from writesae_lens.published.contents import is_plain, kind_of
from writesae_lens.published.releases import BaseModel, base_model, cell_of_path
from writesae_lens.saes.activations import BATCHWISE
from writesae_lens.saes.config import ARCHITECTURE

_DEFAULT_K = 32  # the paper's
_GATE_TEMPERATURE = 0.1  # the published gate's
_K = re.compile(r"(?<![^/\\_])k(\d{1,5})(?![^/\\_])")


class _Kind(NamedTuple):
    """A published ``sae_type``: the members of the WriteSAE family that it is made of, and its tensors."""

    encoder: str
    decoder: str
    activation: str
    tensors: set[str]


_DENSE_ENCODER, _DENSE_DECODER = {"encoder.weight", "encoder.bias"}, {"decoder.weight", "decoder.bias"}
_ENCODER, _DECODER = {"V_enc", "W_enc"}, {"V_dec", "W_dec", "bias"}
_GATE, _THRESHOLD = {"b_gate", "b_mag", "r_mag"}, {"log_threshold"}
_KINDS = {
    "flat": _Kind("dense", "dense", "topk", _DENSE_ENCODER | _DENSE_DECODER),
    "rank1": _Kind("dense", "factored", "topk", _DENSE_ENCODER | {"V", "W", "bias"}),
    "bilinear": _Kind("bilinear", "factored", "topk", _ENCODER | {"b_enc"} | _DECODER),
    "bilinear_tied": _Kind("tied", "factored", "topk", {"b_enc"} | _DECODER),
    "bilinear_flat": _Kind("bilinear", "dense", "topk", _ENCODER | {"b_enc"} | _DENSE_DECODER),
    "bilinear_gated": _Kind("bilinear", "factored", "gated", _ENCODER | _GATE | _DECODER),
    "bilinear_jumprelu": _Kind(
        "bilinear", "factored", "jumprelu", _ENCODER | {"b_enc"} | _THRESHOLD | _DECODER
    ),
}
_UNUSED_TENSOR = "steps_since_active"


class Source(NamedTuple):
    """Where a checkpoint comes from. The file and its path are asked for whatever is None here."""

    model: str | None = None
    layer: int | None = None
    head: int | None = None
    provenance: Mapping[str, Any] = MappingProxyType({})

    def check(self) -> None:
        """Refuse values that cannot name a model or a cell.

        Raises:
            WriteSAEError: the model is not a string, or layer or head is not a whole number from 0.
        """
        if not (self.model is None or isinstance(self.model, str)):
            raise WriteSAEError(f"a base model's name is a text, not a {type(self.model).__name__}")
        for name, number in (("layer", self.layer), ("head", self.head)):
            if not (number is None or (type(number) is int and number >= 0)):
                raise WriteSAEError(f"{name} must be a whole number from 0, not {str(number)[:40]!r}")


class PublishedSAE:
    """One published SAE. Creating it checks its tensors; `for_saelens` converts them.

    Args:
        file: the checkpoint, for messages.
        place: the end of its path, which may name model, cell and k.
        config: the config in the file, or empty.
        tensors: by their published names.
        source: what the caller says.

    Raises:
        WriteSAEError: tensors are missing, unknown, of another shape or not finite, or contradict the config.
    """

    def __init__(
        self,
        file: Path,
        place: str,
        config: dict[Any, Any],
        tensors: dict[str, Tensor],
        source: Source,
    ) -> None:
        self.file, self.place, self.config, self.tensors, self.source = file, place, config, tensors, source
        self.base = self._base()
        self.kind = self._kind()
        self.encoder, self.decoder, self.activation, names = _KINDS[self.kind]
        self.tensors = {name: self._finite(name) for name in sorted(names)}
        self._measure()
        self._check_shapes()

    def for_saelens(self, provenance: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration dictionary and the state dict of the SAE in SAELens.

        Args:
            provenance: where the file is from, for the metadata.

        Raises:
            WriteSAEError: the file, its path and the caller name different cells or models, or k is too
            large.
        """
        transposed, orientation = self._orientation()
        d_k, d_v = (self.d_v, self.d_k) if transposed else (self.d_k, self.d_v)
        k, batchwise = self._k(), self._batchwise()
        metadata = self._metadata(k, batchwise) | {"provenance": provenance, "orientation": orientation}
        cfg: dict[str, Any] = {
            "d_in": d_k * d_v,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "rescale_acts_by_decoder_norm": False,
            "k": k,
        }
        state = self._state(transposed)
        if self.kind == "flat" and not batchwise:
            cfg |= {"architecture": "topk", "metadata": metadata | {"d_k": d_k, "d_v": d_v}}
            return cfg, {
                "W_enc": state.pop("enc_matrix").flatten(1).T.contiguous(),
                "W_dec": state.pop("dec_matrix").flatten(1).contiguous(),
                "b_enc": state["b_enc"],
                "b_dec": state["b_dec"],
            }
        cfg |= {
            "architecture": ARCHITECTURE,
            "d_k": d_k,
            "d_v": d_v,
            "rank": self.rank,
            "encoder": self.encoder,
            "decoder": self.decoder,
            "activation": BATCHWISE if batchwise else self.activation,
            "gate_temperature": _GATE_TEMPERATURE if self.activation == "gated" else 0.0,
            "metadata": metadata,
        }
        return cfg, state

    def _metadata(self, k: int, batchwise: bool) -> dict[str, Any]:
        base, (layer, head) = self.base, self._cell()
        sparsity: dict[str, Any] = {}
        if self.activation == "topk":
            sparsity = {"k": k, "use_batchtopk": batchwise}
        if type(self.config.get("lambda_sparsity")) is float:
            sparsity["lambda_sparsity"] = self.config["lambda_sparsity"]
        return {
            "model_name": self.source.model or (base and base.name),
            "model_class_name": "HookedRecurrent",
            "hook_name": None
            if base is None or layer is None or head is None
            else base.hook_name(layer, head),
            "layer": layer,
            "head": head,
            "prepend_bos": False,
            "sae_lens_version": sae_lens_version,
            "sae_lens_training_version": None,
            "sparsity": sparsity,
            "sae_type": self.kind,
            "published_config": {
                name[:80]: value
                for name, value in self.config.items()
                if type(name) is str and is_plain(value)
            },
        }

    def _error(self, problem: str) -> WriteSAEError:
        return WriteSAEError(f"{self.file}: {problem}")

    def _kind(self) -> str:
        """The type that the config names or, without one, the type with exactly these tensors."""
        present = set(self.tensors) - {_UNUSED_TENSOR}
        named = self.config.get("sae_type")
        if named is not None:
            if type(named) is not str or named not in _KINDS:
                shown = ascii(named[:40]) if type(named) is str else f", {kind_of(named)},"
                raise self._error(f"sae_type {shown} is unknown: known are {', '.join(_KINDS)}")
            needed = _KINDS[named].tensors
            differences = (("lack", needed - present), ("have", present - needed))
            problems = [f"{verb} {_list(names)}" for verb, names in differences if names]
            if problems:
                raise self._error(
                    f"its config says {named!r}, which has {_list(needed)}, but its tensors "
                    + " and ".join(problems)
                )
            return named
        fitting = [kind for kind, (*_, names) in _KINDS.items() if names == present]
        if not fitting:
            distances = {kind: len(names ^ present) for kind, (*_, names) in _KINDS.items()}
            nearest = min(distances, key=distances.__getitem__)
            raise self._error(
                f"its tensors, {_list(present)}, are those of no known type; the nearest, {nearest!r}, has "
                f"{_list(_KINDS[nearest].tensors)}"
            )
        return fitting[0]

    def _finite(self, name: str) -> Tensor:
        x = self.tensors[name]
        if not x.is_floating_point():
            raise self._error(f"{name} holds {x.dtype}, not floating-point numbers")
        if not x.numel():
            raise self._error(f"{name} is empty, of shape {list(x.shape)}")
        if not is_finite(x):
            raise self._error(f"{name} has NaN or infinite numbers")
        return x

    def _measure(self) -> None:
        """Set d_sae, rank, d_k and d_v from the tensors, and give all factors their rank axis."""
        for name in ("V", "W", "V_enc", "W_enc", "V_dec", "W_dec"):
            x = self.tensors.get(name)
            if x is not None:
                if x.ndim not in (2, 3):
                    raise self._error(f"{name} has shape {list(x.shape)}, not [F, d] or [F, rank, d]")
                self.tensors[name] = x[:, None] if x.ndim == 2 else x
        t = self.tensors
        keys = next((t[n] for n in ("V_enc", "V_dec", "V") if n in t), None)
        values = next((t[n] for n in ("W_enc", "W_dec", "W") if n in t), None)
        self.rank = 1 if keys is None else keys.shape[1]
        if keys is not None and values is not None:
            self.d_sae, self.d_k, self.d_v = len(keys), keys.shape[-1], values.shape[-1]
            return
        weight = t["encoder.weight"]
        if weight.ndim != 2:
            raise self._error(f"encoder.weight has shape {list(weight.shape)}, not [F, d_in]")
        self.d_sae = len(weight)
        self.d_k, self.d_v = self._sides_of_rows(weight.shape[1])

    def _check_shapes(self) -> None:
        """Refuse tensors whose shapes differ from the measured sizes, and a config that names other sizes."""
        d_in = self.d_k * self.d_v
        factors = {
            name: [self.d_sae, self.rank, side]
            for letter, side in (("V", self.d_k), ("W", self.d_v))
            for name in (letter, f"{letter}_enc", f"{letter}_dec")
        }
        shapes = factors | {
            "encoder.weight": [self.d_sae, d_in],
            "decoder.weight": [d_in, self.d_sae],
            "decoder.bias": [d_in],
            "bias": [self.d_k, self.d_v],
        }
        for name, x in self.tensors.items():
            expected = shapes.get(name, [self.d_sae])
            if name == "bias" and list(x.shape) == [d_in]:
                continue
            if list(x.shape) != expected:
                raise self._error(
                    f"{name} has shape {list(x.shape)}, expected {expected} beside its other tensors (F = "
                    f"{self.d_sae}, rank {self.rank}, d_k {self.d_k}, d_v {self.d_v})"
                )
        measured = {"n_features": self.d_sae, "d_k": self.d_k, "d_v": self.d_v, "d_in": d_in}
        if self.kind != "flat":  # a flat SAE has no rank, so its config may name any
            measured["rank"] = self.rank
        for name, size in measured.items():
            configured = self._configured(name)
            if configured not in (None, size):
                raise self._error(f"its config says {name} = {configured}, its tensors {name} = {size}")

    def _sides_of_rows(self, d_in: int) -> tuple[int, int]:
        """d_k and d_v of dense rows: by the config, the base model's cells, or else as a square."""
        d_k, d_v = self._configured("d_k"), self._configured("d_v")
        if d_k or d_v:
            d_k, d_v = d_k or d_in // (d_v or 1), d_v or d_in // (d_k or 1)
            if d_k * d_v != d_in:
                raise self._error(
                    f"its config says d_k x d_v = {d_k} x {d_v}, its tensors have rows of {d_in}"
                )
            return d_k, d_v
        base = self.base
        if base is not None and base.d_k * base.d_v == d_in:
            return (base.d_v, base.d_k) if base.transposed else (base.d_k, base.d_v)
        side = round(d_in**0.5)
        if side * side != d_in:
            raise self._error(f"rows of {d_in} may have any sides: its config must say d_k and d_v")
        return side, side

    def _base(self) -> BaseModel | None:
        asked = None if self.source.model is None else base_model(self.source.model)
        named = base_model(self.place)
        if asked and named and asked != named:
            raise self._error(f"its path names {named.name}, but the caller {asked.name}: which is it?")
        return asked or named

    def _batchwise(self) -> bool:
        configured = self.config.get("use_batchtopk")
        if not (configured is None or type(configured) is bool):
            raise self._error(
                f"its config must say use_batchtopk as true or false, not as {kind_of(configured)}"
            )
        return bool(configured) and self.activation == "topk"

    def _configured(self, name: str, least: int = 1) -> int | None:
        """A whole number from the config (None: the config does not have it)."""
        number = self.config.get(name)
        if number is None:
            return None
        if type(number) is not int or not least <= number < 2**31:
            kind = "one out of range" if type(number) is int else kind_of(number)
            raise self._error(f"its config must say {name} as a whole number, not as {kind}")
        return number

    def _k(self) -> int:
        """k from the config, the path or the paper; only TopK uses it, but every config has the field."""
        in_path = [int(match[1]) for match in _K.finditer(self.place)]
        k = self._configured("k") or (in_path[-1:] or [min(_DEFAULT_K, self.d_sae)])[0]
        if k > self.d_sae:
            raise self._error(f"its config or path says k = {k}, its tensors have {self.d_sae} atoms")
        return k

    def _cell(self) -> tuple[int | None, int | None]:
        """Layer and head, from the caller, the config and the path, which must agree."""
        by_path = cell_of_path(self.place) or (None, None)
        cell: list[int | None] = []
        for name, asked, in_path in (
            ("layer", self.source.layer, by_path[0]),
            ("head", self.source.head, by_path[1]),
        ):
            said = {
                "the caller": asked,
                "its config": self._configured(name, least=0),
                "its path": in_path,
            }
            numbers = {who: number for who, number in said.items() if number is not None}
            if len(set(numbers.values())) > 1:
                raise self._error(
                    ", but ".join(f"{who} says {name} {n}" for who, n in numbers.items()) + ": which is it?"
                )
            cell.append(next(iter(numbers.values()), None))
        if cell.count(None) == 1:
            missing = "head" if cell[1] is None else "layer"
            raise self._error(f"layer {cell[0]}, head {cell[1]}: say {missing}= too")
        return cell[0], cell[1]

    def _orientation(self) -> tuple[bool, str]:
        """Whether the checkpoint's matrices are transposed against this package's, and the reason."""
        base, sides, swapped = self.base, (self.d_k, self.d_v), (self.d_v, self.d_k)
        as_is = f"as published, {self.d_k} x {self.d_v}"
        turned = f"transposed from {self.d_k} x {self.d_v} to {self.d_v} x {self.d_k}"
        if base is None:
            return False, f"{as_is}; no base model to check it against"
        cell = (base.d_k, base.d_v)
        if self.d_k != self.d_v:
            if sides == cell:
                return False, f"{as_is}, the sides of {base.name}'s cells"
            if swapped == cell:
                return True, f"{turned}, the sides of {base.name}'s cells"
            if base.transposed and self.d_k < self.d_v:
                return True, f"{turned}: the state side of a Mamba-2 is the longer one"
            return False, f"{as_is}; {base.name}'s cells are {cell[0]} x {cell[1]}"
        if base.transposed:
            return True, f"{turned}: the sides are equal, and Mamba-2's cache keeps [head_dim, d_state]"
        return False, as_is

    def _state(self, transposed: bool) -> dict[str, Tensor]:
        """The state dict of a `WriteSAE`."""
        t, state = self.tensors, {}
        key, value = ("value", "key") if transposed else ("key", "value")
        for side, member in (("enc", self.encoder), ("dec", self.decoder)):
            if member == "dense":
                weight = t["encoder.weight"] if side == "enc" else t["decoder.weight"].T
                state[f"{side}_matrix"] = self._matrices(weight, transposed)
            elif member != "tied":
                state[f"{side}_{key}"] = t[f"V_{side}"] if f"V_{side}" in t else t["V"]
                state[f"{side}_{value}"] = t[f"W_{side}"] if f"W_{side}" in t else t["W"]
        zeros = torch.zeros(self.d_sae, dtype=next(iter(t.values())).dtype)
        state["b_enc"] = t["b_enc"] if "b_enc" in t else t.get("encoder.bias", zeros)
        bias = t["bias"] if "bias" in t else t["decoder.bias"]
        state["b_dec"] = self._matrices(bias.reshape(1, -1), transposed).flatten()
        renamed = {"log_threshold": "log_threshold", "b_gate": "gate_bias"}
        renamed |= {"b_mag": "magnitude_bias", "r_mag": "log_gain"}
        state |= {f"activation_fn.{ours}": t[theirs] for theirs, ours in renamed.items() if theirs in t}
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}

    def _matrices(self, rows: Tensor, transposed: bool) -> Tensor:
        """Flat rows [n, d_in] as matrices in this package's orientation."""
        matrices = rows.unflatten(-1, (self.d_k, self.d_v))
        return matrices.mT if transposed else matrices


def _list(names: set[str]) -> str:
    shown = sorted(ascii(name[:40])[1:-1] for name in names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
