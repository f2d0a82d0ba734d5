"""Checkpoint files as they are published, and what their formulas say that they compute."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a type has beside `steps_since_active`, by how it encodes and decodes.
DENSE = ("flat", "rank1")
KINDS = ("flat", "rank1", "bilinear", "bilinear_tied", "bilinear_flat", "bilinear_gated")
KINDS += ("bilinear_jumprelu",)
TOPK = KINDS[:5]


def checkpoint(
    kind: str,
    d_sae: int = 24,
    d_k: int = 6,
    d_v: int = 4,
    rank: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    two_d: bool = False,
    k: int = 5,
    batchtopk: bool = False,
    config: bool = True,
    without: Collection[str] = (),
    **said: Any,
) -> dict[str, Any]:
    """What ``best.pt`` holds: random weights with atoms of norms from 0.05 to 20.

    Args:
        two_d: factors as [F, d], for rank 1.
        config: whether there is one.
        without: keys that the config lacks.
        said: what the config says beside or instead of the truth.
    """
    rng = torch.Generator().manual_seed(seed)
    norms = torch.logspace(-1.3, 1.3, d_sae, dtype=torch.float64)[torch.randperm(d_sae, generator=rng)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def factors(key: str, value: str, scale: Tensor) -> dict[str, Tensor]:
        sides = {key: scale[:, None, None] * normal(d_sae, rank, d_k), value: normal(d_sae, rank, d_v)}
        return {name: x[:, 0] if two_d else x for name, x in sides.items()}

    d_in = d_k * d_v
    state: dict[str, Tensor] = {}
    if kind in DENSE:
        state |= {"encoder.weight": normal(d_sae, d_in), "encoder.bias": normal(d_sae)}
    elif kind != "bilinear_tied":
        state |= factors("V_enc", "W_enc", torch.ones(d_sae, dtype=torch.float64))
    if kind == "bilinear_gated":
        state |= {"b_gate": 0.2 * normal(d_sae), "b_mag": normal(d_sae), "r_mag": 0.5 * normal(d_sae)}
    elif kind not in DENSE:
        state["b_enc"] = normal(d_sae)
    if kind == "bilinear_jumprelu":
        state["log_threshold"] = 0.5 * normal(d_sae)
    if kind in ("flat", "bilinear_flat"):
        state |= {"decoder.weight": normal(d_in, d_sae) * norms, "decoder.bias": normal(d_in)}
    else:
        names = ("V", "W") if kind == "rank1" else ("V_dec", "W_dec")
        state |= factors(*names, norms) | {"bias": normal(d_k, d_v)}
    state = {name: x.to(dtype) for name, x in state.items()}
    state["steps_since_active"] = torch.arange(d_sae)
    held: dict[str, Any] = {
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": normal(3)}}, "param_groups": [{"lr": 1e-3}]},
        "step": 100,
        "epoch": 2,
        "val_mse": 0.25,
    }
    if config:
        extra = {
            "bilinear_gated": {"lambda_sparsity": 0.01, "lambda_aux": 0.03},
            "bilinear_jumprelu": {"lambda_sparsity": 0.01, "bandwidth": 0.001, "init_threshold": 0.01},
        }
        whole = {"sae_type": kind, "layer": 9, "head": 4, "n_features": d_sae, "d_k": d_k, "d_v": d_v}
        whole |= {"d_in": d_in, "expansion_factor": 1, "k": k, "rank": rank, "use_batchtopk": batchtopk}
        whole |= {
            "seed": seed,
            "lr": 3e-4,
            "lr_min": 3e-5,
            "batch_size": 256,
            "epochs": 3,
            "total_steps": 100,
        }
        whole |= {
            "n_params": sum(x.numel() for x in state.values()),
            "device": "cuda:0",
            "code_sha": "0123abc",
        }
        whole |= extra.get(kind, {})
        held["config"] = {name: x for name, x in (whole | said).items() if name not in without}
    return held


def save(place: Path, held: Any, **options: Any) -> Path:
    """Write to a file (``*.pt``), or as ``best.pt`` into a folder, which is made; the file."""
    file = place if place.suffix == ".pt" else place / "best.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, file, **options)
    return file


def matrices(count: int, d_k: int, d_v: int, rank: int | None = None, seed: int = 1) -> Tensor:
    """Random inputs [count, d_k, d_v] in float32: outer products' sums, or of full rank."""
    rng = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(count, d_k, d_v, generator=rng)
    key = torch.randn(count, d_k, rank, generator=rng)
    return key @ torch.randn(count, rank, d_v, generator=rng)


def transposed(held: dict[str, Any]) -> dict[str, Any]:
    """The same SAE, of matrices that lie the other way round."""
    state = dict(held["model_state_dict"])
    config = dict(held.get("config", {}))
    vectors = [n for n in ("encoder.weight", "decoder.weight", "decoder.bias") if n in state]
    if "bias" in state:
        d_k, d_v = state["bias"].shape
        state["bias"] = state["bias"].T.contiguous()
    else:
        d_k, d_v = sides(held)
    for name in vectors:
        axis = 0 if name.startswith("decoder") else 1
        rows = state[name].movedim(axis, -1).unflatten(-1, (d_k, d_v))
        state[name] = rows.mT.flatten(-2).movedim(-1, axis).contiguous()
    for key, value in (("V", "W"), ("V_enc", "W_enc"), ("V_dec", "W_dec")):
        if key in state:
            state[key], state[value] = state[value], state[key]
    if config:
        config["d_k"], config["d_v"] = d_v, d_k
    return {**held, "model_state_dict": state} | ({"config": config} if config else {})


def sides(held: dict[str, Any]) -> tuple[int, int]:
    """d_k and d_v: of the factors, else from the config."""
    state = held["model_state_dict"]
    for key, value in (("V", "W"), ("V_enc", "W_enc"), ("V_dec", "W_dec")):
        if key in state:
            return state[key].shape[-1], state[value].shape[-1]
    return held["config"]["d_k"], held["config"]["d_v"]


def truth(
    held: dict[str, Any], inputs: Tensor, k: int | None = None, batchtopk: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Coefficients [n, F] and reconstructions [n, d_k, d_v] in float64 of matrices [n, d_k, d_v].

    ``k`` and ``batchtopk`` are the config's unless given.
    """
    config = held.get("config", {})
    k = config["k"] if k is None else k
    batchtopk = config.get("use_batchtopk", False) if batchtopk is None else batchtopk
    t = {name: x.double() for name, x in held["model_state_dict"].items()}
    x = inputs.double()

    def matrix(key: str, value: str) -> Tensor:
        v, w = (t[n] if t[n].ndim == 3 else t[n][:, None] for n in (key, value))
        return torch.einsum("frk,frv->fkv", v, w)

    if "encoder.weight" in t:
        s = x.flatten(1) @ t["encoder.weight"].T
    else:
        s = torch.einsum("nkv,fkv->nf", x, matrix(*(("V_enc", "W_enc") if "V_enc" in t else DECODER)))
    z = s + next((t[n] for n in ("b_enc", "encoder.bias") if n in t), 0)
    if "b_gate" in t:
        gate = torch.sigmoid((s + t["b_gate"]) / 0.1)
        acts = gate * torch.relu(torch.exp(t["r_mag"]) * s + t["b_mag"])
    elif "log_threshold" in t:
        acts = torch.where(z > torch.exp(t["log_threshold"]), z, 0.0)
    elif batchtopk:
        flat = torch.relu(z).flatten()
        acts = _kept(flat, min(k * len(x), len(flat))).view_as(z)
    else:
        acts = torch.relu(_kept(z, k))
    if "decoder.weight" in t:
        out = acts @ t["decoder.weight"].T + t["decoder.bias"]
        return acts, out.view_as(x)
    atoms = matrix(*(("V", "W") if "V" in t else DECODER))
    return acts, torch.einsum("nf,fkv->nkv", acts, atoms) + t["bias"]


DECODER = ("V_dec", "W_dec")


def _kept(z: Tensor, k: int) -> Tensor:
    """The k largest of each row, zeros elsewhere."""
    order = z.argsort(dim=-1, descending=True)[..., :k]
    return torch.zeros_like(z).scatter(-1, order, z.gather(-1, order))
