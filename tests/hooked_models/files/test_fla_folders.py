"""Folders of flash-linear-attention's DeltaNet, GLA and Gated DeltaNet: right logits, or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hooked_models import HookedRecurrent
from hooked_models.modeling.fla import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GLAConfig,
)
from tests.conftest import randomise, save_tokenizer
from tests.hooked_models.architectures import assert_close, refused, some_tokens
from tests.hooked_models.model_classes import fla_folders

BUILD = {
    "delta_net": fla_folders.delta_net,
    "gla": fla_folders.gla,
    "gated_deltanet": fla_folders.gated_delta_net,
}
# Fields of published configurations that no class of flash-linear-attention has any more, or that choose a
# kernel or how it trains.
WITHOUT_EFFECT = {"attn_mode": "fused_recurrent", "fuse_swiglu": False, "fuse_cross_entropy": False}
WITHOUT_EFFECT |= {"use_l2warp": True, "fuse_linear_cross_entropy": True, "norm_first": False}
WITHOUT_EFFECT |= {"share_conv_kernel": True, "rope_scaling": None, "attn": None, "attnres_block_size": None}


def write(folder: Path, kind: str, model: Any = None, **changes: Any) -> Any:
    """A folder as the hub has it, whose code would fail; returns the model."""
    torch.manual_seed(0)
    model = BUILD[kind](num_hidden_layers=2) if model is None else model
    randomise(model, 0)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "code.Model"}, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("import triton_only\n")
    return model


def boot(folder: Path) -> Any:
    return HookedRecurrent.boot_transformers(folder, device="cpu")


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_as_published_and_back(tmp_path: Path, kind: str) -> None:
    model, tokens = write(tmp_path, kind, **WITHOUT_EFFECT), some_tokens(2, 30)
    hooked = boot(tmp_path)
    assert_close(hooked(tokens), model(tokens).logits)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits, 1e-6)
    hooked.save_pretrained(tmp_path / "again")
    save_tokenizer(tmp_path / "again")
    assert_close(boot(tmp_path / "again")(tokens), hooked(tokens), 0.0)


@torch.no_grad()
def test_the_mlps_maps_in_one_tensor(tmp_path: Path) -> None:
    """The old layout; and a parameter of Gated DeltaNet that nothing used."""
    model, tokens = write(tmp_path, "gated_deltanet"), some_tokens(1, 20)
    tensors = load_file(tmp_path / "model.safetensors")
    for n in range(2):
        mlp = f"model.layers.{n}.mlp"
        parts = [tensors[f"{mlp}.gate_proj.weight"], tensors.pop(f"{mlp}.up_proj.weight")]
        tensors[f"{mlp}.gate_proj.weight"] = torch.cat(parts)
        tensors[f"model.layers.{n}.attn.D"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(boot(tmp_path)(tokens), model(tokens).logits)


def test_our_class_even_where_another_package_answers_to_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    class Foreign(PreTrainedConfig):
        model_type = "delta_net"

    write(tmp_path, "delta_net")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "delta_net", Foreign)
    assert isinstance(boot(tmp_path).original_model, DeltaNetForCausalLM)


ATTENTION = {"layers": [1], "num_heads": 4}
# A kind, what to change in its configuration, and words of the message.
WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *((kind, {"attnres_block_size": 2}, ("attnres_block_size = 2", "None")) for kind in BUILD),
    *((kind, {"hidden_act": "powlu"}, ("hidden_act = 'powlu'", "'swish'")) for kind in BUILD),
    *((kind, {"conv_bias": True}, ("conv_bias = True",)) for kind in BUILD),
    *((kind, {"attn": ATTENTION | {"window_size": 64}}, ("window_size = 64",)) for kind in BUILD),
    *((kind, {"expand_v": 0.51}, ("expand_v",)) for kind in BUILD),
    *((kind, {"num_heads": 0}, ("num_heads" if kind != "delta_net" else "heads",)) for kind in BUILD),
    ("delta_net", {"attn": ATTENTION | {"qk_norm": True}}, ("attn needs layers and num_heads",)),
    ("delta_net", {"attn": {"layers": [1]}}, ("attn needs layers and num_heads",)),
    ("delta_net", {"attn": ATTENTION | {"layers": [7]}}, ("outside 0 .. 1", "[7]")),
    ("delta_net", {"attn": [ATTENTION, ATTENTION]}, ("names layers twice",)),
    ("delta_net", {"attn": ATTENTION | {"num_kv_heads": 3}}, ("4 heads over 3",)),
    ("delta_net", {"attn": ATTENTION | {"rope_theta": "big"}}, ("wrong type",)),
    ("delta_net", {"attn": ATTENTION | {"layers": "all"}}, ("wrong type",)),
    ("delta_net", {"attn": "soft"}, ("attn needs layers and num_heads",)),
    ("delta_net", {"attn": ATTENTION}, ("unexpected", "wrong shape")),
    ("delta_net", {"qk_activation": "gelu"}, ("qk_activation", "silu, relu, elu, identity", "'gelu'")),
    ("delta_net", {"qk_norm": "l3"}, ("qk_norm must be one of l2, sum", "'l3'")),
    ("delta_net", {"use_output_norm": False}, ("use_output_norm = False",)),
    ("delta_net", {"use_beta": False}, ("unexpected", "b_proj")),
    ("delta_net", {"use_gate": True}, ("lacks", "g_proj")),
    ("delta_net", {"use_short_conv": False}, ("unexpected", "conv1d")),
    ("delta_net", {"conv_size": 0}, ("conv_size",)),
    ("delta_net", {"conv_size": 3}, ("conv1d.weight [64, 1, 4] instead of [64, 1, 3]",)),
    ("delta_net", {"use_beta": 1}, ("use_beta = 1",)),
    ("delta_net", {"norm_eps": "small"}, ("norm_eps = 'small'",)),
    ("delta_net", {"expand_k": [1]}, ("expand_k = [1]",)),
    ("delta_net", {"num_hidden_layers": 3}, ("lacks", "model.layers.2")),
    ("delta_net", {"num_hidden_layers": 10**9}, ("layers cannot be made of",)),
    ("delta_net", {"hidden_size": -64}, ("hidden_size = -64",)),
    ("gla", {"feature_map": "bias_gelu"}, ("feature_map must be one of relu", "'bias_gelu'")),
    ("gla", {"num_kv_heads": 3}, ("num_kv_heads 3 does not divide num_heads 4",)),
    ("gla", {"gate_logit_normalizer": 8}, ("gate_logit_normalizer = 8", "16")),
    ("gla", {"gate_low_rank_dim": 8}, ("gate_low_rank_dim = 8", "16")),
    ("gla", {"use_gk": False}, ("use_gk = False",)),
    ("gla", {"use_gv": True}, ("use_gv = True",)),
    ("gla", {"fuse_norm": False}, ("lacks", "g_norm.weight")),
    ("gla", {"elementwise_affine": False}, ("unexpected", "g_norm_swish_gate.weight")),
    ("gla", {"clamp_min": "low"}, ("clamp_min = 'low'",)),
    ("gated_deltanet", {"num_v_heads": 3}, ("num_heads 4 does not divide num_v_heads 3",)),
    ("gated_deltanet", {"output_gate_activation": "tanh"}, ("output_gate_activation", "'tanh'")),
    ("gated_deltanet", {"head_dim": 0}, ("head_dim 0",)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp("fla") / kind for kind in BUILD}
    for kind, folder in made.items():
        write(folder, kind)
    return made


@pytest.mark.parametrize(("kind", "changes", "parts"), WRONG)
def test_configurations_that_do_not_fit(
    folders: dict[str, Path], kind: str, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    file = folders[kind] / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    try:
        with refused(str(folders[kind]), *parts) as error:
            boot(folders[kind])
    finally:
        file.write_text(before)
    assert len(str(error.value)) < 500


def test_defaults_are_flash_linear_attentions() -> None:
    """Of the fields that its published folders leave out; its own classes, where they can be looked at."""
    delta, gla, gated = DeltaNetConfig(), GLAConfig(), GatedDeltaNetConfig()
    assert (delta.num_heads, delta.head_sizes(), delta.intermediate_size) == (16, (128, 128), 5632)
    assert (gla.num_heads, gla.head_sizes(), gla.use_short_conv) == (4, (256, 512), False)
    assert (gated.num_heads, gated.head_sizes(), gated.num_hidden_layers) == (6, (256, 512), 21)
