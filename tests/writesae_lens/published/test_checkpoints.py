"""Published checkpoints (``best.pt``) against the formulas of their page."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from torch import nn

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.published.made import (
    KINDS,
    TOPK,
    checkpoint,
    matrices,
    save,
    transposed,
    truth,
)
from writesae_lens import WriteSAE, WriteSAEError
from writesae_lens.published import checkpoints
from writesae_lens.published.releases import BASE_MODELS

CELL = Path("writesae/qwen0p8b/L9_H4")


def equal(sae: Any, held: dict[str, Any], inputs: torch.Tensor, turned: bool = False, **how: Any) -> None:
    """An SAE computes what the page says; ``turned``: of the transposes of the checkpoint's matrices."""
    acts, out = truth(held, inputs, **how)
    mine = (inputs.mT if turned else inputs).flatten(1)
    found = sae.encode(mine)
    near(found, acts)
    near(sae.decode(found), (out.mT if turned else out).flatten(1))


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max().clamp(min=1e-3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * scale)


def label(x: Any) -> str:
    """For pytest, which would print numbers of any length."""
    return type(x).__name__


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """An exception where something takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


FORMS = [(1, False), (1, True), (2, False)]
CONFIGS = {
    "config": {},
    "no config": {"config": False},
    "no type": {"without": ("sae_type", "d_in", "n_features")},
    "no sizes": {"without": ("n_features", "d_in", "rank", "expansion_factor", "layer", "head")},
}


@pytest.mark.parametrize("batchtopk", [False, True])
@pytest.mark.parametrize("configured", CONFIGS)
@pytest.mark.parametrize(("rank", "two_d"), FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_page(tmp_path, kind, rank, two_d, configured, batchtopk):
    if batchtopk and configured == "no config":
        pytest.skip("a file without config does not say so")
    # Square where flat weights alone must tell the sides.
    d_v = 6 if kind == "flat" and configured == "no config" else 4
    for dtype in (torch.float32, torch.float16):
        held = checkpoint(
            kind, d_v=d_v, rank=rank, two_d=two_d, dtype=dtype, batchtopk=batchtopk, **CONFIGS[configured]
        )
        sae = WriteSAE.from_checkpoint(save(tmp_path / "L9_H4_k5" / str(dtype), held))
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (6 * d_v, 24, 5)
        assert isinstance(sae, TopKSAE) == (kind == "flat" and not batchtopk)
        for rows in (1, 2, None):
            inputs = matrices(9, 6, d_v, rows)
            equal(sae, held, inputs, k=5, batchtopk=batchtopk)


@pytest.mark.parametrize("batchtopk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_factors(tmp_path, kind, batchtopk):
    held = checkpoint(kind, batchtopk=batchtopk, rank=2)
    sae = WriteSAE.from_checkpoint(save(tmp_path, held))
    if not isinstance(sae, WriteSAE):
        pytest.skip("sae_lens's own SAE has none")
    rng = torch.Generator().manual_seed(2)
    key, value = torch.randn(7, 6, generator=rng), torch.randn(7, 4, generator=rng)
    near(sae.encode_factors(key, value), truth(held, key[:, :, None] * value[:, None])[0])


@given(
    kind=st.sampled_from(KINDS),
    d_sae=st.integers(1, 12),
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    rank=st.integers(1, 3),
    rows=st.integers(1, 6),
    k=st.integers(1, 12),
    batchtopk=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_sizes(tmp_path_factory, kind, d_sae, sides, rank, rows, k, batchtopk, seed):
    held = checkpoint(kind, d_sae, *sides, rank=rank, k=min(k, d_sae), batchtopk=batchtopk, seed=seed)
    sae = WriteSAE.from_checkpoint(save(tmp_path_factory.mktemp("any"), held))
    for inputs_rank in (1, None):
        equal(sae, held, matrices(rows, *sides, inputs_rank, seed=seed + 1))


@pytest.mark.parametrize(
    ("model", "sides"), [("tiny-mamba2", (32, 48)), ("mamba2-370m", (4, 6)), ("mamba2-370m", (5, 5))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_mamba2_is_transposed(tmp_path, kind, model, sides):
    """[head_dim, d_state] becomes [d_state, head_dim], and nothing else changes."""
    held = checkpoint(kind, 12, *sides)
    sae = WriteSAE.from_checkpoint(save(tmp_path / model / "L9_H4", held))
    inputs = [matrices(5, *sides, rank) for rank in (1, None)]
    for x in inputs:
        equal(sae, held, x, turned=True)
    assert sae.cfg.metadata.orientation.startswith("transposed from")
    # The transposed file, where nothing turns it.
    other = WriteSAE.from_checkpoint(save(tmp_path / "elsewhere" / "L9_H4", transposed(held)))
    near(other.encode(inputs[1].mT.flatten(1)), sae.encode(inputs[1].mT.flatten(1)).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "sides"), [("tiny-mamba2", (48, 32)), ("qwen0p8b", (5, 5)), ("tiny-gdn", (32, 48))]
)
def test_others_stay_as_they_are(tmp_path, kind, model, sides):
    held = checkpoint(kind, 12, *sides)
    sae = WriteSAE.from_checkpoint(save(tmp_path / model / "L9_H4", held))
    equal(sae, held, matrices(5, *sides))
    assert sae.cfg.metadata.orientation.startswith("as published")


@pytest.mark.parametrize("model", ["tiny-mamba2", "tiny-gdn"])
def test_flat_weights_without_config_take_the_sides_of_their_model(tmp_path, model):
    sides = (32, 48)
    held = checkpoint("flat", 12, *sides, config=False)
    sae = WriteSAE.from_checkpoint(save(tmp_path / f"flat_baseline/{model}_L1_H2_k4", held))
    equal(sae, held, matrices(5, *sides), turned=model == "tiny-mamba2", k=4)


def test_flat_weights_of_any_sides_are_refused(tmp_path):
    file = save(tmp_path, checkpoint("flat", config=False))
    assert "d_k and d_v" in refused(file)


# --- what is said of it -------------------------------------------------------------------------------------


def test_metadata(tmp_path):
    file = save(tmp_path / CELL, checkpoint("bilinear", batchtopk=True))
    sae = WriteSAE.from_checkpoint(tmp_path)
    said = sae.cfg.metadata
    assert said.model_name == "Qwen/Qwen3.5-0.8B"
    assert said.hook_name == "blocks.9.linear_attn.hook_state.4"
    assert (said.layer, said.head) == (9, 4)
    assert said.sparsity == {"k": 5, "use_batchtopk": True}
    assert said.provenance == {
        "file": "best.pt",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "sha256_checked": False,
    }
    assert said.published_config["code_sha"] == "0123abc"


@pytest.mark.parametrize("kind", ["bilinear_gated", "bilinear_jumprelu"])
def test_metadata_of_other_activations(tmp_path, kind):
    sae = WriteSAE.from_checkpoint(save(tmp_path, checkpoint(kind, batchtopk=True)), "Qwen/Qwen3.5-4B")
    assert sae.cfg.metadata.sparsity == {"lambda_sparsity": 0.01}
    assert sae.cfg.metadata.model_name == "Qwen/Qwen3.5-4B"
    assert sae.cfg.metadata.hook_name == "blocks.9.linear_attn.hook_state.4"


@pytest.mark.parametrize(
    ("folder", "said", "expected"),
    [("writesae_L9_H4_nf2048_k7_s42", {"k": 6}, 6), ("writesae_L9_H4_nf2048_k7_s42", {}, 7), ("x", {}, 32)],
)
@pytest.mark.parametrize("kind", TOPK)
def test_k(tmp_path, kind, folder, said, expected):
    held = checkpoint(kind, 40, without=() if said else ("k",), **said)
    sae = WriteSAE.from_checkpoint(save(tmp_path / folder, held))
    assert sae.cfg.k == expected
    equal(sae, held, matrices(4, 6, 4), k=expected)


def test_the_cell_comes_from_the_folder_or_the_caller(tmp_path):
    file = save(tmp_path / "writesae_L9_H4_nf2048_k5_s42", checkpoint("rank1", without=("layer", "head")))
    said = WriteSAE.from_checkpoint(file).cfg.metadata
    assert (said.layer, said.head) == (9, 4)
    file = save(tmp_path / "x", checkpoint("rank1", config=False))
    said = WriteSAE.from_checkpoint(file, layer=0, head=3).cfg.metadata
    assert (said.layer, said.head) == (0, 3)


def test_a_manifest_above_the_file(tmp_path):
    """Every layout of a manifest: test_manifest.py."""
    file = save(tmp_path / CELL, checkpoint("rank1"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({str(CELL): digest}))
    assert WriteSAE.from_checkpoint(file).cfg.metadata.provenance["sha256_checked"] is True
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in refused(file, name="manifest.json")


# --- layouts ------------------------------------------------------------------------------------------------


class Factors(nn.Module):
    """A decoder or encoder with factors v and w, as some releases pickle it."""

    def __init__(self, v: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, name: str) -> None:
        super().__init__()
        self.v, self.w, self.bias = nn.Parameter(v), nn.Parameter(w), nn.Parameter(bias)
        self.name = name


class Dense(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class Module(nn.Module):
    """With its tensors at the top, or in parts."""

    def __init__(self, tensors: dict[str, torch.Tensor], parts: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, x in tensors.items():
            if x.is_floating_point():
                self.register_parameter(name, nn.Parameter(x))
            else:
                self.register_buffer(name, x)
        for name, part in parts.items():
            self.add_module(name, part)
        self.k = 5


def module(held: dict[str, Any], factors: bool) -> nn.Module:
    state = dict(held["model_state_dict"])
    parts: dict[str, nn.Module] = {}
    if factors:
        names = ({"V_dec", "W_dec"} <= set(state) and ("V_dec", "W_dec", "bias")) or ("V", "W", "bias")
        parts["decoder"] = Factors(*(state.pop(name) for name in names), name="decoder")
        if "V_enc" in state:
            parts["encoder"] = Factors(*(state.pop(n) for n in ("V_enc", "W_enc", "b_enc")), name="encoder")
    for name in ("encoder", "decoder"):
        if f"{name}.weight" in state:
            parts[name] = Dense(state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))
    return Module(state, parts)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("kind", "factors"), [*((kind, False) for kind in KINDS), ("bilinear", True), ("rank1", True)]
)
def test_a_pickled_module(tmp_path, kind, factors, zipped):
    held = checkpoint(kind)
    pickled = {"sae": module(held, factors), "config": argparse.Namespace(**held["config"])}
    file = save(tmp_path, pickled, _use_new_zipfile_serialization=zipped)
    equal(WriteSAE.from_checkpoint(file), held, matrices(4, 6, 4))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_names(tmp_path, kind, prefix):
    held = checkpoint(kind, d_v=6, config=False)
    state = {f"{prefix}{name}": x for name, x in held["model_state_dict"].items()}
    for n, layout in enumerate(({"model_state_dict": state}, {"state_dict": state}, state, {"sae": state})):
        if prefix and n % 2:
            continue
        sae = WriteSAE.from_checkpoint(save(tmp_path / f"k5/{n}", layout))
        equal(sae, held, matrices(4, 6, 6), k=5)


def test_older_containers_and_any_protocol(tmp_path):
    held = checkpoint("bilinear")
    for protocol in (2, 4, 5):
        for zipped in (True, False):
            options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
            file = save(tmp_path / f"{protocol}{zipped}", held, **options)
            equal(WriteSAE.from_checkpoint(file), held, matrices(4, 6, 4))


@pytest.mark.parametrize("batchtopk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(tmp_path, kind, batchtopk):
    held = checkpoint(kind, batchtopk=batchtopk, rank=2)
    sae = WriteSAE.from_checkpoint(save(tmp_path / CELL, held))
    sae.save_model(tmp_path / "saved")
    again = SAE.load_from_disk(tmp_path / "saved")
    inputs = matrices(6, 6, 4)
    equal(again, held, inputs)
    assert torch.equal(again.encode(inputs.flatten(1)), sae.encode(inputs.flatten(1)))
    for name in ("hook_name", "layer", "head", "provenance", "orientation", "published_config", "sparsity"):
        assert getattr(again.cfg.metadata, name) == getattr(sae.cfg.metadata, name), name


# --- what is refused ----------------------------------------------------------------------------------------


def refused(path: Path, *args: Any, name: str = "best.pt", **options: Any) -> str:
    """The message of the error: one line that names the file."""
    folder = path if path.is_dir() else path.parent
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(WriteSAEError) as caught:
        WriteSAE.from_checkpoint(path, *args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(path), name)) < 500
    assert name in message
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    return message


@pytest.mark.parametrize("name", ["n_features", "d_k", "d_v", "d_in", "rank"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_contradicts_the_tensors(tmp_path, kind, name):
    if name == "rank" and kind == "flat":
        pytest.skip("flat weights have none")
    held = checkpoint(kind)
    held["config"][name] = 77
    message = refused(save(tmp_path, held))
    assert "77" in message
    # Dense rows tell d_k and d_v by their product only.
    by_rows = kind == "flat" and name in ("d_k", "d_v")
    truly = {"n_features": 24, "d_k": 6, "d_v": 4, "d_in": 24, "rank": 1}[name]
    assert str(24 if by_rows else truly) in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_type_that_contradicts_the_tensors(tmp_path, kind, other):
    if kind == other:
        pytest.skip("no contradiction")
    message = refused(save(tmp_path, checkpoint(kind, sae_type=other)))
    assert repr(other) in message
    assert "lack" in message or "have" in message


def test_an_unknown_type(tmp_path):
    message = refused(save(tmp_path, checkpoint("rank1", sae_type="rank_7")))
    assert "rank_7" in message
    assert all(kind in message for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_k_above_the_number_of_atoms(tmp_path, kind):
    message = refused(save(tmp_path, checkpoint(kind, k=25)))
    assert "25" in message
    assert "24" in message


@pytest.mark.parametrize("what", ["layer", "head"])
def test_a_cell_that_contradicts_another(tmp_path, what):
    messages = [
        refused(save(tmp_path / CELL, checkpoint("rank1", **{what: 3}))),
        refused(save(tmp_path / "x", checkpoint("rank1")), **{what: 3}),
        refused(save(tmp_path / "y_L9_H4", checkpoint("rank1", config=False)), **{what: 3}),
    ]
    for part in (f"{what} 3", f"{what} {9 if what == 'layer' else 4}"):
        assert all(part in message for message in messages)


def test_no_file_or_too_many(tmp_path):
    with pytest.raises(WriteSAEError, match="does not exist"):
        WriteSAE.from_checkpoint(tmp_path / "gone")
    with pytest.raises(WriteSAEError, match=r"no best\.pt"):
        WriteSAE.from_checkpoint(tmp_path)
    for n in range(2):
        save(tmp_path / f"L{n}_H0", checkpoint("rank1", layer=n, head=0))
    with pytest.raises(WriteSAEError, match="L0_H0, L1_H0"):
        WriteSAE.from_checkpoint(tmp_path)


SPOILT = {
    "missing": lambda x: None,
    "NaN": lambda x: torch.full_like(x, float("nan")),
    "infinite": lambda x: torch.full_like(x, -float("inf")),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "one more axis": lambda x: x[None, None],
    "a scalar": lambda x: x.flatten()[0],
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "a column less": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "no tensor": lambda x: x.tolist(),
    "a number": lambda x: 1.0,
    "text": lambda x: "x\ny",
    "sparse": lambda x: x.to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "a module": lambda x: nn.Identity(),
}


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_tensors(tmp_path, kind, spoilt):
    for name in checkpoint(kind)["model_state_dict"]:
        if name == "steps_since_active":
            continue
        held = checkpoint(kind)
        state = held["model_state_dict"]
        x = SPOILT[spoilt](state.pop(name))
        state |= {} if x is None else {name: x}
        message = refused(save(tmp_path, held))
        # Of two sizes that disagree the message names either.
        if spoilt not in ("sparse", "quantized", "complex", "a row more", "a column less"):
            assert name in message


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_too_many(tmp_path, kind, configured):
    held = checkpoint(kind, config=configured, d_v=6)
    held["model_state_dict"]["V_new\n\x1b[2J" + 500 * "x"] = torch.ones(3)
    assert "V_new" in refused(save(tmp_path, held))


SIZES = ("n_features", "d_k", "d_v", "d_in", "rank", "k", "layer", "head")


@pytest.mark.parametrize(
    "value", ["6", 6.0, True, [6], {"a": 1}, -1, 2**31, 10**5000, float("nan"), b"6"], ids=label
)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_are_none(tmp_path, name, value):
    held = checkpoint("flat" if name in ("d_k", "d_v") else "bilinear")
    held["config"][name] = value
    assert name in refused(save(tmp_path, held))


# What stands in a checkpoint of another kind, and a word of the message.
SPOILT_CHECKPOINTS = [
    *(
        ({"config": x}, "config")
        for x in ([1], "text", 7, (1, 2), True, {"k": {"x": 1}}, {1: 2, "k": [5]}, 2.5)
    ),
    *(({"sae_type": x}, "") for x in (7, 2.5, True, [], {}, ["flat"], 10**5000, b"flat", "x\n" * 500)),
    *(({"use_batchtopk": x}, "use_batchtopk") for x in ("False", 1, [True], torch.ones(2))),
    *(({x: 0}, f"must say {x} as a whole number") for x in ("k", "n_features", "d_in")),
    *(({"tensor": x}, "") for x in (7, 10**5000, None, 2.5, b"V")),
    *(
        ({"all": x}, "")
        for x in ([], {}, 7, "text", None, {"config": {}}, {"model_state_dict": [1]}, {"sae": None})
    ),
]


@pytest.mark.parametrize(("change", "part"), SPOILT_CHECKPOINTS, ids=label)
def test_a_checkpoint_of_something_else(tmp_path, change, part):
    ((where, value),) = change.items()
    held = checkpoint("bilinear" if where != "tensor" else "rank1")
    if where == "all":
        held = value
    elif where == "tensor":
        held["model_state_dict"][value] = torch.ones(3)
    elif where == "config":
        held["config"] = value
    else:
        held["config"][where] = value
    assert part in refused(save(tmp_path, held))


@pytest.mark.parametrize(
    "value", [10**5000, -(10**5000), float("nan"), float("inf"), "x" * 10**5, [1], {"a": [1]}], ids=label
)
@pytest.mark.parametrize("name", ["seed", "code_sha", "lambda_sparsity", "x\ny"])
def test_what_else_a_config_says_does_no_harm(tmp_path, name, value):
    """Nothing needs it; the SAE can be saved, and its file is JSON."""
    held = checkpoint("rank1")
    held["config"][name] = value
    sae = WriteSAE.from_checkpoint(save(tmp_path / "x", held))
    equal(sae, held, matrices(3, 6, 4))
    sae.save_model(tmp_path / "saved")
    equal(SAE.load_from_disk(tmp_path / "saved"), held, matrices(3, 6, 4))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "where", ["config", "a value of config", "optimizer", "weights", "module", "key", "all"]
)
def test_code_is_refused(tmp_path, where, zipped):
    evil, held = Evil(tmp_path / "marker"), checkpoint("rank1")
    if where == "module":
        held["sae"] = module(held, False)
        held["sae"].hook = evil
    elif where == "all":
        held = evil
    else:
        places = {"config": (held, "config"), "a value of config": (held["config"], "device")}
        places |= {"weights": (held["model_state_dict"], "V"), "key": (held, evil)}
        places["optimizer"] = (held["optimizer_state_dict"]["state"][0], "exp_avg")
        place, name = places[where]
        place[name] = evil
    message = refused(save(tmp_path, held, _use_new_zipfile_serialization=zipped))
    assert "system" in message
    assert not (tmp_path / "marker").exists()


def test_a_zero_atom_is_an_atom(tmp_path):
    """It reconstructs nothing, and its coefficient is what its encoder says."""
    for kind in KINDS:
        held = checkpoint(kind)
        state = held["model_state_dict"]
        names = [n for n in ("V", "V_dec", "decoder.weight") if n in state]
        for name in names:
            (state[name].T if name == "decoder.weight" else state[name])[3] = 0
        equal(WriteSAE.from_checkpoint(save(tmp_path, held)), held, matrices(6, 6, 4))


def test_a_module_that_holds_itself(tmp_path):
    """Its tensors are read once."""
    held = checkpoint("bilinear")
    ring = module(held, False)
    ring.__dict__["me"] = ring
    file = save(tmp_path, {"sae": ring, "config": held["config"]})
    with alarm(5):
        equal(WriteSAE.from_checkpoint(file), held, matrices(3, 6, 4))


def test_modules_held_many_times(tmp_path):
    """They are not followed along each of 30^9 paths."""
    part: nn.Module = Dense(torch.ones(2), torch.ones(2))
    for _ in range(9):
        above = nn.Module()
        above.__dict__.update({f"part{n}": part for n in range(30)})
        part = above
    file = save(tmp_path, {"sae": part})
    with alarm(5):
        refused(file)


def test_a_module_without_config_says_what_it_is_itself(tmp_path):
    held = checkpoint("bilinear", k=7, batchtopk=True)
    made = module(held, False)
    made.k, made.use_batchtopk, made.layer, made.head = 7, True, 3, 5
    sae = WriteSAE.from_checkpoint(save(tmp_path, {"sae": made}))
    assert (sae.cfg.metadata.layer, sae.cfg.metadata.head) == (3, 5)
    equal(sae, held, matrices(9, 6, 4))


def test_the_base_model_of_the_caller_and_of_the_path(tmp_path):
    file = save(tmp_path / CELL, checkpoint("bilinear", d_k=5, d_v=5))
    both = refused(file, "state-spaces/mamba2-370m")
    assert "Qwen/Qwen3.5-0.8B" in both
    assert "state-spaces/mamba2-370m" in both
    # A name that is not known here is another copy of the path's model.
    metadata = WriteSAE.from_checkpoint(file, "me/my-qwen").cfg.metadata
    assert metadata.model_name == "me/my-qwen"
    assert metadata.hook_name == "blocks.9.linear_attn.hook_state.4"
    bare = save(tmp_path / "x.pt", checkpoint("bilinear", d_k=5, d_v=5))
    for name in ("qwen/qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B"):
        assert "linear_attn" in WriteSAE.from_checkpoint(bare, name).cfg.metadata.hook_name
    other = WriteSAE.from_checkpoint(bare, "AntonV/mamba2-370m-hf").cfg.metadata
    assert other.hook_name == "blocks.9.mixer.hook_state.4"
    assert "transposed" in other.orientation


def test_only_the_end_of_a_path_is_read(tmp_path):
    """Of two numbers the last, and none of the folders that a user has above."""
    far = tmp_path / "mamba2-370m_L1_H1_k9" / "a" / "b" / "c"
    held = checkpoint("bilinear", without=["k", "layer", "head"], d_k=5, d_v=5)
    metadata = WriteSAE.from_checkpoint(save(far, held)).cfg.metadata
    assert (metadata.model_name, metadata.layer, metadata.sparsity["k"]) == (None, None, 24)
    near = save(tmp_path / "k9" / "writesae_qwen4b_L9_H4_nf24_k7_s42", held)
    metadata = WriteSAE.from_checkpoint(near).cfg.metadata
    assert (metadata.model_name, metadata.layer, metadata.sparsity["k"]) == ("Qwen/Qwen3.5-4B", 9, 7)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"layer": -1, "head": 0}, "layer must be a whole number"),
        ({"layer": True, "head": 0}, "layer must be a whole number"),
        ({"layer": 1, "head": "0"}, "head must be a whole number"),
        ({"layer": 1}, "say head= too"),
        ({"head": 1}, "say layer= too"),
        ({"model_name": Path("qwen4b")}, "a base model's name is a text"),
    ],
)
def test_arguments_that_name_no_cell(tmp_path, options, part):
    """Through the loader, which callers of another typing reach too."""
    source = checkpoints.Source(options.get("model_name"), options.get("layer"), options.get("head"))
    file = save(tmp_path, checkpoint("bilinear", without=["layer", "head"]))
    with pytest.raises(WriteSAEError, match=part):
        checkpoints.load(file, source)


def test_a_copy_that_is_made_of_links(tmp_path):
    """As the cache of the Hub is: the names are those of the links, the manifest beside them counts."""
    data = save(tmp_path / "blobs" / "x.pt", checkpoint("bilinear", without=["layer", "head"]))
    link = tmp_path / "snapshots" / "c0ffee" / CELL / "best.pt"
    link.parent.mkdir(parents=True)
    link.symlink_to(data)
    assert WriteSAE.from_checkpoint(link).cfg.metadata.hook_name == "blocks.9.linear_attn.hook_state.4"
    (tmp_path / "snapshots/c0ffee/manifest.json").write_text(json.dumps({str(CELL): "0" * 64}))
    assert "0" * 64 in refused(link.parent)


def test_a_folder_by_the_name_of_a_file(tmp_path):
    (tmp_path / "best.pt").mkdir()
    assert "holds no best.pt" in refused(tmp_path)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_threshold_that_is_never_reached(tmp_path, gradient):
    held = checkpoint("bilinear_jumprelu")
    held["model_state_dict"]["log_threshold"][:2] = 100.0
    sae = WriteSAE.from_checkpoint(save(tmp_path, held))
    x = matrices(9, 6, 4)
    with torch.set_grad_enabled(gradient):
        equal(sae, held, x)
    sae.encode(x.flatten(1)).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in sae.parameters())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "flat"])
def test_norms_are_not_folded(tmp_path, kind):
    sae = WriteSAE.from_checkpoint(save(tmp_path, checkpoint(kind)))
    with pytest.raises(NotImplementedError):
        sae.fold_W_dec_norm()
    with pytest.raises(NotImplementedError):
        sae.fold_activation_norm_scaling_factor(2.0)
    assert sae.cfg.rescale_acts_by_decoder_norm is False
    assert sae.cfg.encoder == {"bilinear_tied": "tied", "rank1": "dense"}.get(kind, "bilinear")
    x = matrices(9, 6, 4).flatten(1)
    scores = x @ sae.W_enc + sae.b_enc
    hidden = []
    sae.hook_sae_acts_pre.add_hook(lambda z, hook: hidden.append(z))
    sae.encode(x)
    torch.testing.assert_close(hidden[0], scores)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"d_sae": 2**45}, "instead of"),
        ({"d_sae": 2**61}, "no dictionary has"),
        ({"d_k": "6"}, "d_k must be a whole number"),
        ({"rescale_acts_by_decoder_norm": "false"}, "must be True or False"),
        ({"gate_temperature": -1}, "gate_temperature must be 0 or more"),
        ({"reshape_activations": "hook_z"}, "leave reshape_activations"),
        ({"normalize_activations": "layer_norm"}, "use 'none'"),
        ({"encoder": "x" * 10**6}, "is unknown: choose"),
    ],
)
def test_a_configuration_that_was_changed(tmp_path, changes, part):
    WriteSAE.from_checkpoint(save(tmp_path, checkpoint("bilinear"))).save_model(tmp_path / "sae")
    file = tmp_path / "sae" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(WriteSAEError) as error:
        SAE.load_from_disk(tmp_path / "sae")
    assert part in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda t: t | {"b_enc": t["b_enc"] * float("nan")}, "NaN or infinite"),
        (lambda t: t | {"b_enc": t["b_enc"].long()}, "torch.int64"),
        (lambda t: t | {"dec_key": t["dec_key"][:, :, :-1].contiguous()}, "instead of [24, 1, 6]"),
        (lambda t: t | {"other": t["b_enc"]}, "an unexpected 'other'"),
        (lambda t: {n: x for n, x in t.items() if n != "enc_key"}, "missing"),
    ],
)
def test_weights_that_were_changed(tmp_path, spoil, part):
    """SAELens converts types as it reads, so the weights are given by hand."""
    sae = WriteSAE.from_checkpoint(save(tmp_path, checkpoint("bilinear")))
    with pytest.raises(WriteSAEError, match=re.escape(part)):
        sae.process_state_dict_for_loading(spoil({name: x.clone() for name, x in sae.state_dict().items()}))


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_base_models_have_the_hooks_and_sides_of_their_models(name):
    model, base = HookedRecurrent.boot_transformers(name, device="cpu"), BASE_MODELS[name]
    for cell in model.cells:
        assert base.hook_name(cell.layer, cell.head) == model.state_hook_name(cell.layer, cell.head)
        assert (base.d_k, base.d_v, base.architecture) == (cell.d_k, cell.d_v, cell.architecture)
    assert base.transposed == model.mixers[model.cells[0].layer].state_is_transposed
