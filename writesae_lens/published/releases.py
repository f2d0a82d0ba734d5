"""What is published: the base models of WriteSAEs, and releases for SAELens's directory."""

from __future__ import annotations

import re
from typing import NamedTuple

from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

REPOSITORY = "JackYoung27/writesae-ckpts"
# SAELens's name for the functions that load these files.
LOADER = "writesae"


class BaseModel(NamedTuple):
    """What must be known of a model to put a published SAE on its site."""

    name: str  # as HookedRecurrent boots it
    mixer: str  # the part of hook names between layer and hook
    d_k: int
    d_v: int
    # Whether the library's cache, on which SAEs were trained, keeps a head's state as [d_v, d_k].
    transposed: bool = False

    def hook_name(self, layer: int, head: int) -> str:
        """The head's state, in `HookedRecurrent`'s names."""
        return f"blocks.{layer}.{self.mixer}.hook_state.{head}"


# By the name that folders of checkpoints bear.
BASE_MODELS = {
    "qwen0p8b": BaseModel("Qwen/Qwen3.5-0.8B", "linear_attn", 128, 128),
    "qwen4b": BaseModel("Qwen/Qwen3.5-4B", "linear_attn", 128, 128),
    "qwen27b": BaseModel("Qwen/Qwen3.5-27B", "linear_attn", 128, 128),
    "mamba2-370m": BaseModel("state-spaces/mamba2-370m", "mixer", 128, 64, transposed=True),
    "rwkv7-1.5b": BaseModel("fla-hub/rwkv7-1.5B-world", "attn", 64, 64),
    "deltanet-1.3b": BaseModel("fla-hub/delta_net-1.3B-100B", "attn", 128, 128),
    "gla-1.3b": BaseModel("fla-hub/gla-1.3B-100B", "attn", 256, 512),
    "tiny-gdn": BaseModel("tiny-gdn", "linear_attn", 32, 48),
    "tiny-mamba2": BaseModel("tiny-mamba2", "mixer", 48, 32, transposed=True),
    "tiny-rwkv7": BaseModel("tiny-rwkv7", "attn", 32, 32),
}

_PUBLISHED = {
    "writesae-qwen3.5-0.8b": ("qwen0p8b", ("L1_H4", "L9_H4", "L17_H4"), ("L9_H4",)),
    "writesae-qwen3.5-4b": ("qwen4b", ("L12_H8",), ()),
    "writesae-qwen3.5-27b": ("qwen27b", ("L32_H16",), ()),
    "writesae-mamba2-370m": ("mamba2-370m", ("L24_H0",), ("L24_H0",)),
    "writesae-rwkv7-1.5b": ("rwkv7-1.5b", ("L12_H0",), ("L12_H0",)),
    "writesae-deltanet-1.3b": ("deltanet-1.3b", ("L12_H8",), ()),
    "writesae-gla-1.3b": ("gla-1.3b", ("L12_H0",), ()),
}


def releases() -> dict[str, PretrainedSAELookup]:
    """The published SAEs, as entries of SAELens's directory: ids are cells, ``L9_H4``, and ``L9_H4_flat``."""
    return {name: _lookup(name, *what) for name, what in _PUBLISHED.items()}


def _lookup(release: str, tag: str, cells: tuple[str, ...], flat: tuple[str, ...]) -> PretrainedSAELookup:
    paths = {cell: f"writesae/{tag}/{cell}" for cell in cells}
    paths |= {f"{cell}_flat": f"flat_baseline/{tag}_{cell}" for cell in flat}
    return PretrainedSAELookup(
        release=release,
        repo_id=REPOSITORY,
        model=BASE_MODELS[tag].name,
        conversion_func=LOADER,
        saes_map=paths,
        expected_var_explained=dict.fromkeys(paths, 1.0),  # SAELens's values of what is not known
        expected_l0=dict.fromkeys(paths, 0.0),
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=None,
    )


def base_model(text: str) -> BaseModel | None:
    """The base model that a path or a model's name names, if it is one of these; the last one counts."""
    by_name = {model.name.lower(): model for model in BASE_MODELS.values()}
    if text.lower() in by_name:
        return by_name[text.lower()]
    places = {
        match.start(): model
        for tag, model in BASE_MODELS.items()
        for match in re.finditer(rf"(?<![^/\\_]){re.escape(tag)}(?![^/\\_-])", text)
    }
    return places[max(places)] if places else None
