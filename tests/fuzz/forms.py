"""Every form of files that the two packages read: a sound example of a few KiB, and the front door."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from hooked_models import HookedRecurrent
from hooked_models.files.layouts import to_blinkdl
from hooked_models.modeling.fla import DeltaNetConfig, DeltaNetForCausalLM
from tests import conftest
from tests.fuzz.harness import Form
from tests.writesae_lens.published.made import checkpoint
from writesae_lens import WriteSAE, WriteSAEError
from writesae_lens.cli.subjects import load_sae
from writesae_lens.experiments.result import ExperimentResult, Progress, read_table, write_table

BEST = "writesae/qwen0p8b/L9_H4/best.pt"
_KEPT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_ZERO = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SETTINGS = {"experiment": "replace", "seed": 0}


def _saved(folder: Path, held: Any, **options: Any) -> bytes:
    torch.save(held, folder / "saved", **options)
    return (folder / "saved").read_bytes()


def _of_checkpoints(folder: Path) -> list[Form]:
    held = checkpoint("bilinear", d_sae=6, d_k=4, d_v=3, k=2)
    zipped = _saved(folder, held)
    flat = _saved(folder, checkpoint("flat", d_sae=6, d_k=3, d_v=3, k=2, dtype=torch.float16))
    legacy = _with_fixed_keys(_saved(folder, held, _use_new_zipfile_serialization=False))
    digests = {"files": [{"path": BEST, "sha256": "0" * 64}], "a": {"b": {"c": "1" * 64}}, "size": 3}

    def read(at: Path) -> Any:
        return _finite(WriteSAE.from_checkpoint(at / BEST))

    return [
        Form("best.pt, zip", {BEST: zipped}, read),
        Form("best.pt, zip, flat, half", {BEST: flat}, read),
        Form("best.pt, legacy", {BEST: legacy}, read),
        Form("manifest.json", {"manifest.json": json.dumps(digests).encode(), BEST: zipped}, read),
    ]


def _with_fixed_keys(legacy: bytes) -> bytes:
    """The same file; its storages' keys are addresses in memory, which would differ from run to run."""
    for n, key in enumerate(dict.fromkeys(re.findall(rb"\d{13,16}", legacy))):
        legacy = legacy.replace(key, str(10 ** (len(key) - 1) + n).encode())
    return legacy


def _finite(sae: Any) -> Any:
    assert all(bool(x.isfinite().all()) for x in sae.parameters())
    return sae


def _read_model(at: Path | str, **options: Any) -> Any:
    model = HookedRecurrent.boot_transformers(str(at), device="cpu", **options)
    assert all(bool(x.isfinite().all()) for x in model.original_model.parameters())
    return model


def _of_models(folder: Path) -> list[Form]:
    tokenizer_at = folder / "tokenizer"
    conftest.save_tokenizer(tokenizer_at)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_at)
    small = {"num_hidden_layers": 2, "vocab_size": 16}
    sizes = small | {"hidden_size": 8, "head_dim": 4, "value_dim": 8, "intermediate_size": 8}
    sizes |= {"decay_low_rank_dim": 2, "a_low_rank_dim": 2, "v_low_rank_dim": 2, "gate_low_rank_dim": 2}
    rwkv = conftest.rwkv7(**sizes, group_norm_eps=64e-5, **_ZERO)
    rwkv.save_pretrained(folder / "fla")
    narrow: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "conv_size": 2}
    spec = {"layers": [1], "num_heads": 2}
    delta_net = DeltaNetForCausalLM(DeltaNetConfig(**small, **_ZERO, **narrow, attn=spec))
    delta_net.save_pretrained(folder / "delta_net")
    mamba = conftest.mamba2(
        **small, **_ZERO, hidden_size=8, expand=2, num_heads=2, head_dim=8, state_size=4, n_groups=1,
        time_step_limit=(0.0, float("inf")), tie_word_embeddings=True,
    )  # fmt: skip
    tensors = {name: x.clone() for name, x in mamba.state_dict().items()}
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    raw = {"d_model": 8, "n_layer": 2, "vocab_size": 16, "attn_layer_idx": [], "tie_embeddings": True}
    raw |= {"ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "dt_limit": [0.0, 100.0]}}
    raw |= {"rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 8}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    narrow = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": conftest.VOCABULARY}
    hybrid = conftest.hybrid("qwen3_5", **layers, **narrow)
    hybrid.save_pretrained(folder / "hf")
    conftest.save_tokenizer(folder / "hf")
    transformers.Mamba2ForCausalLM(mamba.config).save_pretrained(folder / "mamba_hf")
    fla, delta = (
        {name: (folder / at / name).read_bytes() for name in ("config.json", "model.safetensors")}
        for at in ("fla", "delta_net")
    )
    hf = {name: (folder / "hf" / name).read_bytes() for name in _KEPT if (folder / "hf" / name).is_file()}
    pth, half = to_blinkdl(rwkv), {name: x.half() for name, x in to_blinkdl(rwkv).items()}
    mamba_files = {"config.json": json.dumps(raw).encode(), "pytorch_model.bin": _saved(folder, tensors)}
    in_parts = {"config.json": mamba_files["config.json"], "a.bin": mamba_files["pytorch_model.bin"]}
    index = {"weight_map": dict.fromkeys(tensors, "a.bin"), "metadata": {"total_size": 1}}
    in_parts["pytorch_model.bin.index.json"] = json.dumps(index).encode()

    def read(at: Path) -> Any:
        return _read_model(at, tokenizer=tokenizer)

    def read_pth(at: Path) -> Any:
        return _read_model(at / "x.pth", tokenizer=tokenizer)

    return [
        Form("BlinkDL .pth", {"x.pth": _saved(folder, pth)}, read_pth),
        Form("BlinkDL .pth, half", {"x.pth": _saved(folder, half)}, read_pth),
        Form("mamba_ssm folder", mamba_files, read),
        Form("mamba_ssm folder, in parts", in_parts, read),
        Form("fla folder", fla, read),
        Form("fla folder, DeltaNet", delta, read),
        Form("HF folder", hf, _read_model),
    ]


def _of_saes(folder: Path) -> list[Form]:
    forms = []
    for kind in ("bilinear_gated", "flat"):
        torch.save(checkpoint(kind, d_sae=6, d_k=3, d_v=3, k=2), folder / "best.pt")
        WriteSAE.from_checkpoint(folder / "best.pt", layer=9, head=4).save_model(folder / kind)
        names = ("cfg.json", "sae_weights.safetensors")
        files = {name: (folder / kind / name).read_bytes() for name in names}
        forms.append(Form(f"SAELens folder, {kind}", files, lambda at: _finite(load_sae(str(at), "cpu"))))
    return forms


def _of_results(folder: Path) -> list[Form]:
    records = pd.DataFrame(
        {"passage": [0, 1], "token": ["a", "=b\n"], "kl_atom": [0.5, 1e-9], "atom": [3, 4]}
    )
    write_table(folder / "records.csv", records)
    summary = {"experiment": "trace", "headline": "x", "n": 2, "ci": [0.1, 0.9]}
    saved = {
        "records.csv": (folder / "records.csv").read_bytes(),
        "summary.json": json.dumps(summary).encode(),
    }
    Progress(folder / "progress", _SETTINGS).part(0, lambda: records)
    parts = {f.name: f.read_bytes() for f in (folder / "progress").iterdir() if f.suffix in (".json", ".csv")}

    def resumed(at: Path) -> Any:
        return Progress(at, _SETTINGS).part(0, lambda: records)

    return [
        Form("result folder", saved, ExperimentResult.load),
        Form("progress folder", parts, resumed, writes=True),
        Form("table", {"training.csv": saved["records.csv"]}, _read_table),
    ]


def _read_table(at: Path) -> Any:
    try:
        return read_table(at / "training.csv")
    except (ValueError, OSError) as error:  # as its callers do
        raise WriteSAEError(" ".join(str(error).split())) from error


def all_forms(folder: Path) -> list[Form]:
    """Every form, its examples made below a folder."""
    return [f for make in (_of_checkpoints, _of_models, _of_saes, _of_results) for f in make(folder)]
