"""Published checkpoints (``best.pt``) of every type, as configuration and weights of a SAELens SAE.

A file is read as data (`hooked_models.files.torch_files`). What its ``config`` says is compared with its
tensors; what it leaves out is read off them. The factored types become a `WriteSAE`, ``flat`` becomes
SAELens's own ``topk`` (with ``use_batchtopk``, which that lacks, a `WriteSAE` whose encoder and decoder are dense).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from hooked_models.errors import HookedModelError
from hooked_models.files import torch_files
from hooked_models.files.pickle_machine import StandIn
from writesae_lens.errors import WriteSAEError
from writesae_lens.published import manifest
from writesae_lens.published.releases import BaseModel, base_model
from writesae_lens.saes.activations import BATCHWISE
from writesae_lens.saes.config import ARCHITECTURE

FILE = "best.pt"
_DEFAULT_K = 32  # the paper's
_GATE_TEMPERATURE = 0.1
_CELL = re.compile(r"(?<![^/\\_])L(\d{1,5})_H(\d{1,5})(?![^/\\_])")
_K = re.compile(r"(?<![^/\\_])k(\d{1,5})(?![^/\\_])")

# encoder, decoder, activation and tensors of each type.
_DENSE_ENCODER, _DENSE_DECODER = {"encoder.weight", "encoder.bias"}, {"decoder.weight", "decoder.bias"}
_ENCODER, _DECODER = {"V_enc", "W_enc"}, {"V_dec", "W_dec", "bias"}
_KINDS: dict[str, tuple[str, str, str, set[str]]] = {
    "flat": ("dense", "dense", "topk", _DENSE_ENCODER | _DENSE_DECODER),
    "rank1": ("dense", "factored", "topk", _DENSE_ENCODER | {"V", "W", "bias"}),
    "bilinear": ("bilinear", "factored", "topk", _ENCODER | {"b_enc"} | _DECODER),
    "bilinear_tied": ("tied", "factored", "topk", {"b_enc"} | _DECODER),
    "bilinear_flat": ("bilinear", "dense", "topk", _ENCODER | {"b_enc"} | _DENSE_DECODER),
    "bilinear_gated": ("bilinear", "factored", "gated", _ENCODER | {"b_gate", "b_mag", "r_mag"} | _DECODER),
    "bilinear_jumprelu": (
        "bilinear",
        "factored",
        "jumprelu",
        _ENCODER | {"b_enc", "log_threshold"} | _DECODER,
    ),
}
_UNUSED = "steps_since_active"
# What modules with factors v and w call the same tensors, and what wrappers put before names.
_OF_MODULES = {"decoder.v": "V_dec", "decoder.w": "W_dec", "decoder.bias": "bias"}
_OF_MODULES |= {"encoder.v": "V_enc", "encoder.w": "W_enc", "encoder.bias": "b_enc"}
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|sae)\.)+")
_DEEPEST = 8
# Parts of a local path that may name model, cell and k: writesae/qwen0p8b/L9_H4/best.pt.
_PLACE = 4
# What a module without a config may say of itself.
_OWN = {"sae_type", "layer", "head", "n_features", "d_k", "d_v", "d_in", "k", "rank", "use_batchtopk"}


class Source(NamedTuple):
    """Where a checkpoint comes from; what is None is looked for in the file and its path."""

    model: str | None = None
    layer: int | None = None
    head: int | None = None
    provenance: Mapping[str, Any] = MappingProxyType({})

    def check(self) -> None:
        """Refuse what cannot be a model or a cell."""
        if not (self.model is None or isinstance(self.model, str)):
            raise WriteSAEError(f"a base model's name is a text, not a {type(self.model).__name__}")
        for name, number in (("layer", self.layer), ("head", self.head)):
            if not (number is None or (type(number) is int and number >= 0)):
                raise WriteSAEError(f"{name} must be a whole number from 0, not {str(number)[:40]!r}")


UNKNOWN = Source()


def load(path: str | Path, source: Source = UNKNOWN) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published checkpoint as SAELens takes it: the dictionary of a configuration, and a state dict.

    Raises:
        WriteSAEError: it is no such checkpoint, wants code to be run, contradicts itself or its path, is not
            what ``manifest.json`` says, or has tensors that are missing, of other shapes or not finite.
    """
    source.check()
    file = find_file(path)
    provenance = {"file": file.name, **source.provenance}
    if "sha256" not in provenance:
        digest = manifest.sha256(file)
        provenance |= {"sha256": digest, "sha256_checked": _check_local(file, digest)}
    try:
        held = torch_files.read(file, objects=True)
    except HookedModelError as error:
        raise WriteSAEError(str(error)) from error
    config, tensors = _parts(file, held)
    # Of a file from the Hub its path there; the cache's own folders say nothing.
    place = str(source.provenance.get("file", Path(*file.absolute().parts[-_PLACE:])))
    return _Checkpoint(file, place, config, tensors, source).converted(provenance)


def find_file(path: str | Path) -> Path:
    """The checkpoint that a path means: a file, or the one ``best.pt`` in a folder.

    Raises:
        WriteSAEError: there is none, or more than one.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise WriteSAEError(f"{path} does not exist: give a checkpoint, or a folder that holds a {FILE}")
    found = [path / FILE] if (path / FILE).is_file() else sorted(f for f in path.rglob(FILE) if f.is_file())
    if len(found) == 1:
        return found[0]
    if not found and (path / SAE_CFG_FILENAME).is_file():
        raise WriteSAEError(f"{path} is in SAELens's form, with no {FILE}: give it to SAE.load_from_disk")
    which = f" ({', '.join(str(f.parent.relative_to(path)) for f in found[:4])}, ...)" if found else ""
    raise WriteSAEError(f"{path} holds {len(found) or 'no'} {FILE}{which}: give the folder of one")


def _check_local(file: Path, digest: str) -> bool:
    """Against the manifest of a copy of a repository that the file lies in, if it does."""
    file = file.absolute()
    for folder in file.parents[1:5]:
        if (folder / manifest.MANIFEST).is_file():
            return manifest.check(folder / manifest.MANIFEST, file.relative_to(folder).as_posix(), digest)
    return False


def _parts(file: Path, held: Any) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """The configuration (empty if there is none) and the tensors, from whatever layout they lie in."""
    config: Any = {}
    if isinstance(held, dict):
        config = held.get("config")
        config = (config.state if isinstance(config, StandIn) else config) or {}
        if not isinstance(config, dict):
            raise WriteSAEError(f"{file} has a {type(config).__name__} where its config belongs, not a dict")
        inner = [name for name in ("model_state_dict", "state_dict", "sae") if name in held]
        weights = held[inner[0]] if inner else held
    else:
        weights = held
    tensors = weights
    if isinstance(weights, StandIn):
        tensors = dict(_module_tensors(weights, "", set()))
        own = {name: x for name, x in weights.state.items() if name in _OWN and _is_plain(x)}
        config = own | config
    if not isinstance(tensors, dict):
        raise WriteSAEError(f"{file} holds {_kind_of(weights)} where a dict of tensors belongs")
    others = [(name, _kind_of(x)) for name, x in tensors.items() if not isinstance(x, Tensor)]
    if others or not tensors:
        listed = ", ".join(f"{name[:40]!a} ({kind})" for name, kind in others[:6] if type(name) is str)
        found = f"also holds {listed}" if tensors else "holds none"
        raise WriteSAEError(f"{file} must hold tensors by name (model_state_dict), but {found}")
    if any(type(name) is not str for name in tensors):
        raise WriteSAEError(f"{file} has tensors without a name")
    return config, _named(tensors)


def _kind_of(x: Any) -> str:
    return f"an object of {x.of}" if isinstance(x, StandIn) else f"a {type(x).__name__}"


def _module_tensors(module: StandIn, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """A pickled module's tensors, named as in its state dict; of other objects, their attributes."""
    seen.add(id(module))
    held = (module.state.get(part) for part in ("_parameters", "_buffers", "_modules"))
    for attributes in (module.state, *held):
        for name, x in attributes.items() if isinstance(attributes, dict) else ():
            if isinstance(x, Tensor):
                yield f"{prefix}{name}", x
            elif isinstance(x, StandIn) and id(x) not in seen and prefix.count(".") < _DEEPEST:
                yield from _module_tensors(x, f"{prefix}{name}.", seen)


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {_WRAPPERS.sub("", name): x for name, x in tensors.items()}
    if not {"decoder.v", "decoder.w"} <= set(names):
        return names
    dense = "encoder.weight" in names
    here = {"decoder.v": "V", "decoder.w": "W", "decoder.bias": "bias"} if dense else _OF_MODULES
    return {here.get(name, name): x for name, x in names.items()}


class _Checkpoint:
    """The tensors of one checkpoint, held against what its config says."""

    def __init__(
        self,
        file: Path,
        place: str,
        config: dict[Any, Any],
        tensors: dict[str, Tensor],
        source: Source,
    ) -> None:
        self.file, self.place, self.config, self.tensors = file, place, config, tensors
        self.source, self.base = source, self._base(source)
        self.kind = self._kind()
        self.encoder, self.decoder, self.activation, names = _KINDS[self.kind]
        self.tensors = {name: self._checked(name) for name in sorted(names)}
        self._measure()

    def converted(self, provenance: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As SAELens takes it."""
        base = self.base
        layer, head = self._cell(self.source)
        transposed, orientation = self._orientation(base)
        k, batchwise = self._k(), self._batchwise()
        d_k, d_v = (self.d_v, self.d_k) if transposed else (self.d_k, self.d_v)
        metadata = {
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
            "sparsity": {"k": k, "use_batchtopk": batchwise} if self.activation == "topk" else {},
            "provenance": provenance,
            "orientation": orientation,
            "sae_type": self.kind,
            "published_config": {
                name[:80]: value
                for name, value in self.config.items()
                if type(name) is str and _is_plain(value)
            },
        }
        if type(self.config.get("lambda_sparsity")) is float:
            metadata["sparsity"]["lambda_sparsity"] = self.config["lambda_sparsity"]
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
        if self.kind == "flat" and not batchwise:
            state = self._flat_state(transposed)
            return cfg | {"architecture": "topk", "metadata": metadata | {"d_k": d_k, "d_v": d_v}}, state
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
        return cfg, self._state(transposed)

    def _fails(self, problem: str) -> WriteSAEError:
        return WriteSAEError(f"{self.file}: {problem}")

    def _kind(self) -> str:
        present = set(self.tensors) - {_UNUSED}
        named = self.config.get("sae_type")
        if named is not None:
            if type(named) is not str or named not in _KINDS:
                shown = ascii(named[:40]) if type(named) is str else f", {_kind_of(named)},"
                raise self._fails(f"sae_type {shown} is unknown: known are {', '.join(_KINDS)}")
            missing, extra = _KINDS[named][3] - present, present - _KINDS[named][3]
            if missing or extra:
                raise self._fails(
                    f"its config says {named!r}, which has {_list(_KINDS[named][3])}, but its tensors "
                    + " and ".join(
                        f"{what} {_list(names)}"
                        for what, names in (("lack", missing), ("have", extra))
                        if names
                    )
                )
            return named
        fitting = [kind for kind, (*_, names) in _KINDS.items() if names == present]
        if not fitting:
            kinds = {kind: len(names ^ present) for kind, (*_, names) in _KINDS.items()}
            nearest = min(kinds, key=kinds.__getitem__)
            raise self._fails(
                f"its tensors, {_list(present)}, are those of no known type; the nearest, {nearest!r}, has "
                f"{_list(_KINDS[nearest][3])}"
            )
        return fitting[0]

    def _checked(self, name: str) -> Tensor:
        x = self.tensors[name]
        if not x.is_floating_point():
            raise self._fails(f"{name} holds {x.dtype}, not floating-point numbers")
        if not x.numel():
            raise self._fails(f"{name} is empty, of shape {list(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise self._fails(f"{name} has NaN or infinite numbers")
        return x

    def _measure(self) -> None:
        """Sizes, from the tensors; then whether tensors and config agree on them."""
        for name in ("V", "W", "V_enc", "W_enc", "V_dec", "W_dec"):
            x = self.tensors.get(name)
            if x is not None:
                if x.ndim not in (2, 3):
                    raise self._fails(f"{name} has shape {list(x.shape)}, not [F, d] or [F, rank, d]")
                self.tensors[name] = x[:, None] if x.ndim == 2 else x
        t = self.tensors
        keys = next((t[n] for n in ("V_enc", "V_dec", "V") if n in t), None)
        values = next((t[n] for n in ("W_enc", "W_dec", "W") if n in t), None)
        self.rank = 1 if keys is None else keys.shape[1]
        if keys is not None and values is not None:
            self.d_sae, self.d_k, self.d_v = len(keys), keys.shape[-1], values.shape[-1]
        else:
            weight = t["encoder.weight"]
            if weight.ndim != 2:
                raise self._fails(f"encoder.weight has shape {list(weight.shape)}, not [F, d_in]")
            self.d_sae = len(weight)
            self.d_k, self.d_v = self._flat_sides(weight.shape[1])
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
        for name, x in t.items():
            expected = shapes.get(name, [self.d_sae])
            if name == "bias" and list(x.shape) == [d_in]:
                continue
            if list(x.shape) != expected:
                raise self._fails(
                    f"{name} has shape {list(x.shape)}, expected {expected} beside its other tensors (F = "
                    f"{self.d_sae}, rank {self.rank}, d_k {self.d_k}, d_v {self.d_v})"
                )
        measured = {"n_features": self.d_sae, "d_k": self.d_k, "d_v": self.d_v, "d_in": d_in}
        if self.kind != "flat":  # which may say any
            measured["rank"] = self.rank
        for name, size in measured.items():
            said = self._said(name)
            if said not in (None, size):
                raise self._fails(f"its config says {name} = {said}, its tensors {name} = {size}")

    def _flat_sides(self, d_in: int) -> tuple[int, int]:
        d_k, d_v = self._said("d_k"), self._said("d_v")
        if d_k or d_v:
            d_k, d_v = d_k or d_in // (d_v or 1), d_v or d_in // (d_k or 1)
            if d_k * d_v != d_in:
                raise self._fails(
                    f"its config says d_k x d_v = {d_k} x {d_v}, its tensors have rows of {d_in}"
                )
            return d_k, d_v
        base = self.base
        if base is not None and base.d_k * base.d_v == d_in:
            return (base.d_v, base.d_k) if base.transposed else (base.d_k, base.d_v)
        side = round(d_in**0.5)
        if side * side != d_in:
            raise self._fails(f"rows of {d_in} may have any sides: its config must say d_k and d_v")
        return side, side

    def _base(self, source: Source) -> BaseModel | None:
        asked = None if source.model is None else base_model(source.model)
        named = base_model(self.place)
        if asked and named and asked != named:
            raise self._fails(f"its path names {named.name}, but the caller {asked.name}: which is it?")
        return asked or named

    def _batchwise(self) -> bool:
        said = self.config.get("use_batchtopk")
        if not (said is None or type(said) is bool):
            raise self._fails(f"its config must say use_batchtopk as true or false, not as {_kind_of(said)}")
        return bool(said) and self.activation == "topk"

    def _said(self, name: str, least: int = 1) -> int | None:
        said = self.config.get(name)
        if said is None:
            return None
        if type(said) is not int or not least <= said < 2**31:
            kind = "one out of range" if type(said) is int else _kind_of(said)
            raise self._fails(f"its config must say {name} as a whole number, not as {kind}")
        return said

    def _k(self) -> int:
        """Only what TopK selects needs it; for the others SAELens's config still has a field."""
        named = [int(match[1]) for match in _K.finditer(self.place)]
        k = self._said("k") or (named[-1:] or [min(_DEFAULT_K, self.d_sae)])[0]
        if k > self.d_sae:
            raise self._fails(f"its config or path says k = {k}, its tensors have {self.d_sae} atoms")
        return k

    def _cell(self, source: Source) -> tuple[int | None, int | None]:
        found = list(_CELL.finditer(self.place))
        by_path = tuple(int(n) for n in found[-1].groups()) if found else (None, None)
        cell: list[int | None] = []
        for name, asked, named in (("layer", source.layer, by_path[0]), ("head", source.head, by_path[1])):
            said = self._said(name, least=0)
            known = {
                where: n
                for where, n in (("the caller", asked), ("its config", said), ("its path", named))
                if n is not None
            }
            if len(set(known.values())) > 1:
                raise self._fails(
                    ", but ".join(f"{where} says {name} {n}" for where, n in known.items()) + ": which is it?"
                )
            cell.append(next(iter(known.values()), None))
        if cell.count(None) == 1:
            missing = "head" if cell[1] is None else "layer"
            raise self._fails(f"layer {cell[0]}, head {cell[1]}: say {missing}= too")
        return cell[0], cell[1]

    def _orientation(self, base: BaseModel | None) -> tuple[bool, str]:
        """Whether the checkpoint's matrices are transposed against this package's, and how that was told."""
        here, swapped = (self.d_k, self.d_v), (self.d_v, self.d_k)
        as_is = f"as published, {self.d_k} x {self.d_v}"
        turned = f"transposed from {self.d_k} x {self.d_v} to {self.d_v} x {self.d_k}"
        if base is None:
            return False, f"{as_is}; no base model to check it against"
        cell = (base.d_k, base.d_v)
        if self.d_k != self.d_v:
            if here == cell:
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
        t, state = self.tensors, {}
        key, value = ("value", "key") if transposed else ("key", "value")
        for side, kind in (("enc", self.encoder), ("dec", self.decoder)):
            if kind == "dense":
                weight = t["encoder.weight"] if side == "enc" else t["decoder.weight"].T
                state[f"{side}_matrix"] = self._turned(weight, transposed)
            elif kind != "tied":
                state[f"{side}_{key}"] = t[f"V_{side}"] if f"V_{side}" in t else t["V"]
                state[f"{side}_{value}"] = t[f"W_{side}"] if f"W_{side}" in t else t["W"]
        zeros = torch.zeros(self.d_sae, dtype=next(iter(t.values())).dtype)
        state["b_enc"] = t["b_enc"] if "b_enc" in t else t.get("encoder.bias", zeros)
        bias = t["bias"] if "bias" in t else t["decoder.bias"]
        state["b_dec"] = self._turned(bias.reshape(1, -1), transposed).flatten()
        renamed = {"log_threshold": "log_threshold", "b_gate": "gate_bias"}
        renamed |= {"b_mag": "magnitude_bias", "r_mag": "log_gain"}
        state |= {f"activation_fn.{ours}": t[theirs] for theirs, ours in renamed.items() if theirs in t}
        return {name: x.contiguous().clone() for name, x in state.items()}

    def _flat_state(self, transposed: bool) -> dict[str, Tensor]:
        state = self._state(transposed)
        return {
            "W_enc": state["enc_matrix"].flatten(1).T.contiguous(),
            "W_dec": state["dec_matrix"].flatten(1).contiguous(),
            "b_enc": state["b_enc"],
            "b_dec": state["b_dec"],
        }

    def _turned(self, rows: Tensor, transposed: bool) -> Tensor:
        matrices = rows.unflatten(-1, (self.d_k, self.d_v))
        return matrices.mT if transposed else matrices


def _list(names: set[str]) -> str:
    shown = sorted(ascii(name[:40])[1:-1] for name in names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _is_plain(value: Any) -> bool:
    """Whether it can stand in a configuration file."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float) or (isinstance(value, str) and len(value) < 200)
