"""The published SAEs: their base models, and their releases for SAELens's directory."""

from __future__ import annotations

import re
from typing import NamedTuple

from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

REPOSITORY = "JackYoung27/writesae-ckpts"
# The name under which SAELens finds the functions that load these files.
LOADER = "writesae"
_CELL = re.compile(r"(?<![^/\\_])L(\d{1,5})_H(\d{1,5})(?![^/\\_])")


class BaseModel(NamedTuple):
    """The facts about a model that put a published SAE on its hook without loading the model."""

    name: str  # as HookedRecurrent boots it
    mixer: str  # the recurrent layer's name within a block, as it stands in hook names
    d_k: int
    d_v: int
    architecture: str  # of its cells, as in `Cell.architecture`
    # Whether transformers' cache, on whose states the SAEs were trained, keeps a head's state as [d_v, d_k].
    transposed: bool = False

    def hook_name(self, layer: int, head: int) -> str:
        """The name of the hook on a head's state, as `HookedRecurrent.state_hook_name` returns it."""
        return f"blocks.{layer}.{self.mixer}.hook_state.{head}"


# By the model's name in the folders of checkpoints.
BASE_MODELS = {
    "qwen0p8b": BaseModel("Qwen/Qwen3.5-0.8B", "linear_attn", 128, 128, "gated_delta_net"),
    "qwen4b": BaseModel("Qwen/Qwen3.5-4B", "linear_attn", 128, 128, "gated_delta_net"),
    "qwen27b": BaseModel("Qwen/Qwen3.5-27B", "linear_attn", 128, 128, "gated_delta_net"),
    "mamba2-370m": BaseModel("state-spaces/mamba2-370m", "mixer", 128, 64, "mamba2", transposed=True),
    "rwkv7-1.5b": BaseModel("fla-hub/rwkv7-1.5B-world", "attn", 64, 64, "rwkv7"),
    "deltanet-1.3b": BaseModel("fla-hub/delta_net-1.3B-100B", "attn", 128, 128, "delta_net"),
    "gla-1.3b": BaseModel("fla-hub/gla-1.3B-100B", "attn", 256, 512, "gla"),
    "tiny-gdn": BaseModel("tiny-gdn", "linear_attn", 32, 48, "gated_delta_net"),
    "tiny-mamba2": BaseModel("tiny-mamba2", "mixer", 48, 32, "mamba2", transposed=True),
    "tiny-rwkv7": BaseModel("tiny-rwkv7", "attn", 32, 32, "rwkv7"),
}

# Of each release: the model's name in the folders, the cells of its WriteSAEs, the cells of its flat
# baselines.
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
    """The published SAEs as entries of SAELens's directory. An id is a cell, ``L9_H4``, or ``L9_H4_flat``."""
    return {release: _lookup(release, *rest) for release, rest in _PUBLISHED.items()}


def _lookup(release: str, tag: str, cells: tuple[str, ...], flat: tuple[str, ...]) -> PretrainedSAELookup:
    paths = {cell: f"writesae/{tag}/{cell}" for cell in cells}
    paths |= {f"{cell}_flat": f"flat_baseline/{tag}_{cell}" for cell in flat}
    return PretrainedSAELookup(
        release=release,
        repo_id=REPOSITORY,
        model=BASE_MODELS[tag].name,
        conversion_func=LOADER,
        saes_map=paths,
        expected_var_explained=dict.fromkeys(paths, 1.0),  # the values with which SAELens marks them unknown
        expected_l0=dict.fromkeys(paths, 0.0),
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=None,
    )


def base_model(text: str) -> BaseModel | None:
    """The base model with this name, or the last one that is named in this path (None: none is)."""
    by_name = {model.name.lower(): model for model in BASE_MODELS.values()}
    if text.lower() in by_name:
        return by_name[text.lower()]
    positions = {
        match.start(): model
        for tag, model in BASE_MODELS.items()
        for match in re.finditer(rf"(?<![^/\\_]){re.escape(tag)}(?![^/\\_-])", text)
    }
    return positions[max(positions)] if positions else None


def cell_of_path(path: str) -> tuple[int, int] | None:
    """(layer, head) of the last cell that a path or id names, as in ``L9_H4_flat`` (None: it names none)."""
    cells = list(_CELL.finditer(path))
    return (int(cells[-1][1]), int(cells[-1][2])) if cells else None
