"""Files made to take memory or to load wrong numbers, by kind; each in every form that it can have."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from hooked_models import HookedModelError
from tests.fuzz import harness
from tests.fuzz.forms import BEST, all_forms
from tests.fuzz.harness import Form, Mutation
from tests.writesae_lens.published.made import checkpoint
from writesae_lens import WriteSAE, WriteSAEError

OTHER = "a" * 64
PAD = "k" * 500_000
DIGESTS = ",".join(f'"{i}":"{OTHER}"' for i in range(5_000))
MODELS = {"BlinkDL .pth": "x.pth", "mamba_ssm folder": "pytorch_model.bin"}
MODELS |= {"fla folder": "model.safetensors", "HF folder": "model.safetensors"}
SAES = {
    "SAELens folder, bilinear_gated": "sae_weights.safetensors",
    "best.pt, zip": BEST,
    "best.pt, legacy": BEST,
}
SAES |= {"SAELens folder, flat": "sae_weights.safetensors", "best.pt, zip, flat, half": BEST}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    return {form.name: form for form in all_forms(tmp_path_factory.mktemp("seeds"))}


def refusal(form: Form, folder: Path, **contents: bytes) -> str:
    """The message with which a form is refused once some of its files have other contents."""
    for name, content in (form.seeds | contents).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(HookedModelError) as caught:
        form.read(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def changed(folder: Path, name: str, content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A file of tensors, after a change to its content."""
    path = folder / f"changed{Path(name).suffix}"
    path.write_bytes(content)
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        held = torch.load(path, weights_only=True)
        change(held)
        torch.save(held, path)
    return path.read_bytes()


def _weights(held: Any) -> dict[str, torch.Tensor]:
    return held.get("model_state_dict", held)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*MODELS, *SAES])
def test_numbers_that_are_not_finite(forms, tmp_path, name, value):
    """In any tensor of any form: all of them would make every logit NaN, without a word."""
    file = (MODELS | SAES)[name]
    content = forms[name].seeds[file]
    tensors: dict[str, torch.Tensor] = {}
    changed(tmp_path, file, content, lambda held: tensors.update(_weights(held)))
    floats = [
        n for n, x in tensors.items() if x.is_floating_point() and x.numel() and "blocks.0.att.v" not in n
    ]
    for tensor in floats[:: max(1, len(floats) // 4)]:
        spoilt = changed(
            tmp_path, file, content, lambda held, t=tensor: _weights(held)[t].view(-1)[-1:].fill_(value)
        )
        message = refusal(forms[name], tmp_path / "x", **{file: spoilt})
        assert re.search("NaN or infinite|not finite", message)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.bool]
)
@pytest.mark.parametrize("name", ["BlinkDL .pth", "mamba_ssm folder", "fla folder", *SAES])
def test_odd_dtypes(forms, tmp_path, name, dtype):
    def convert(held: Any) -> None:
        tensors = _weights(held)
        first = sorted(n for n in tensors if tensors[n].is_floating_point() and "lm_head" not in n)[0]
        tensors[first] = tensors[first].to(dtype)

    file = (MODELS | SAES)[name]
    refusal(forms[name], tmp_path / "x", **{file: changed(tmp_path, file, forms[name].seeds[file], convert)})


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["BlinkDL .pth", "mamba_ssm folder", "best.pt, zip"])
def test_shared_numbers(forms, tmp_path, name, legacy):
    """Tensors that lie over each other: whole, or shifted by one. One second name is fine (a tied head)."""
    file = (MODELS | SAES)[name]

    def share(held: Any) -> None:
        tensors = _weights(held)
        size = max(x.numel() for x in tensors.values())
        base = torch.full((size + 50,), 0.1)
        for n, (tensor, x) in enumerate(sorted(tensors.items())):
            if x.is_floating_point():
                tensors[tensor] = base[n % 2 :][: x.numel()].view(x.shape)

    path = tmp_path / "shared"
    path.write_bytes(forms[name].seeds[file])
    held = torch.load(path, weights_only=True)
    share(held)
    # The example is small, so that its pickle would hide what its tensors share: leave only large tensors.
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    large = torch.zeros(200_000)
    _weights(held).update({f"more{n}": large[n:] for n in range(3)})
    torch.save(held, path, _use_new_zipfile_serialization=not legacy)
    assert "share their numbers" in refusal(forms[name], tmp_path / "x", **{file: path.read_bytes()})


DECLARED: dict[str, dict[str, list[Any]]] = {
    "mamba_ssm folder": {
        "n_layer": [10**6, -1, 1.0, "2", None, True, 0],
        "d_model": [10**7, -8, "8", None, True],
        "vocab_size": [10**9, 0, 1.5],
        "ssm_cfg": [
            [],
            3,
            "Mamba2",
            {"layer": "Mamba2", "d_state": 10**9},
            {"layer": "Mamba2", "headdim": 0},
        ],
        "tie_embeddings": ["yes", 1],
    },
    "fla folder": {
        "num_hidden_layers": [10**6, -1, 2.0, "2", None, True, 0],
        "hidden_size": [10**7, -8, 0, None, True, 10**18],
        "vocab_size": [10**9, -1, False],
        "intermediate_size": [10**12, -1],
        "decay_low_rank_dim": [10**9, "2", -1],
        "norm_eps": [float("nan"), float("inf"), -1.0, "x"],
        "hidden_ratio": [float("inf")],
    },
    "HF folder": {
        "num_hidden_layers": [10**6, -1, "2"],
        "hidden_size": [10**7, -8, "8"],
        "vocab_size": [10**9, -1],
        "intermediate_size": [10**9],
        "linear_num_value_heads": [10**6],
        "linear_value_head_dim": [10**6],
        "layer_types": [["linear_attention"] * 100_000, 3],
    },
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_sizes(forms, tmp_path, name):
    """Sizes that contradict the tensors are refused before anything is allocated by them, in bounded time."""
    config = json.loads(forms[name].seeds["config.json"])
    made = [
        Mutation("config.json", f"{field} = {value!r:.30}", json.dumps(config | {field: value}).encode())
        for field, values in DECLARED[name].items()
        for value in values
    ]
    found = harness.run(forms[name], made, tmp_path)
    assert not [(o.mutation.how, o.verdict) for o in found if o.verdict != "refused"]
    assert max(o.megabytes for o in found) < 200


MANIFESTS = {
    "a long key": f'{{"{PAD}":{{{DIGESTS}}}}}',
    "a long name": f'{{"path":".{PAD}",{DIGESTS}}}',
    "deep": '{"a":' * 900 + f"{{{DIGESTS}}}" + "}" * 900,
    "empty objects": "[" + "{}," * 100_000 + "1]",
    "punctuation": '{"' + "._" * 250_000 + f'":{{{DIGESTS}}}}}',
    "long keys, deep": f'{{"x/{PAD[:4000]}":' * 900 + f'"{OTHER}"' + "}" * 900,
}


def test_manifests(forms, tmp_path):
    """Each digest once took the text of all keys above it."""
    made = [Mutation("manifest.json", how, text.encode()) for how, text in MANIFESTS.items()]
    found = harness.run(forms["manifest.json"], made, tmp_path)
    assert not [(o.mutation.how, o.verdict) for o in found if o.verdict not in ("loaded", "refused")]


METADATA: list[Any] = [[], "x", 3, True, {"hook_name": 3}, {"hook_name": ["x"]}, {"model_name": {}}]
METADATA += [{"model_class_name": 1}, {"layer": "9"}, {"layer": -1}, {"head": 1.5}, {"head": True}]
METADATA += [{"context_size": "128"}, {"prepend_bos": "no"}, {"prepend_bos": 1}, {"sparsity": [1]}]
METADATA += [{"model_from_pretrained_kwargs": "x"}, {"to_dict": 1}, {"__class__": 1}, {"provenance": "x"}]
METADATA += [{"sae_lens_version": "new"}, {"sae_lens_version": 6}]


@pytest.mark.parametrize("flat", [False, True])
def test_metadata_of_a_wrong_type(forms, tmp_path, flat):
    form = forms["SAELens folder, flat" if flat else "SAELens folder, bilinear_gated"]
    for n, wrong in enumerate(METADATA):
        config = json.loads(form.seeds["cfg.json"])
        config["metadata"] = config["metadata"] | wrong if isinstance(wrong, dict) else wrong
        refusal(form, tmp_path / str(n), **{"cfg.json": json.dumps(config).encode()})
        with pytest.raises(WriteSAEError, match=r"metadata|sae_lens_version"):
            SAE.load_from_disk(tmp_path / str(n))


FIELDS = {
    "architecture": ["x", 3, None, []],
    "d_sae": [None, "6", 6.0, -1, 10**7, True],
    "dtype": [3, "int8", "x"],
}
FIELDS |= {"device": [3, []], "metadata": [None]}
SPOILT = {"empty": b"", "BOM": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"), "deep": b"[" * 10**5}
SPOILT |= {"a list": b"[]", "text": b'"x"', "null": b"null", "a long number": b"1" * 5000}
SPOILT |= {"twice": b'{"d_k": 1, "d_k": 2}', "large": b" " * (5 << 20)}


@pytest.mark.parametrize("flat", [False, True])
def test_a_configuration_of_an_sae(forms, tmp_path, flat):
    form = forms["SAELens folder, flat" if flat else "SAELens folder, bilinear_gated"]
    config = json.loads(form.seeds["cfg.json"])
    texts = [json.dumps(config | {name: x}).encode() for name, values in FIELDS.items() for x in values]
    for n, text in enumerate([*texts, *SPOILT.values()]):
        refusal(form, tmp_path / str(n), **{"cfg.json": text})
        with pytest.raises(WriteSAEError):
            SAE.load_from_disk(tmp_path / str(n))


@pytest.mark.parametrize("name", ["mamba_ssm folder", "fla folder", "HF folder"])
def test_a_configuration_of_a_model_that_is_spoilt(forms, tmp_path, name):
    for n, text in enumerate(SPOILT.values()):
        refusal(forms[name], tmp_path / str(n), **{"config.json": text})


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", [*MODELS, "SAELens folder, flat", "best.pt, zip"])
def test_no_plain_file(forms, tmp_path, name, kind):
    """In the place of any file; a pipe that is opened would wait for ever."""
    for n, file in enumerate(forms[name].seeds):
        folder = tmp_path / str(n)
        for other, content in forms[name].seeds.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        (folder / file).unlink()
        if kind == "pipe":
            os.mkfifo(folder / file)
        elif kind == "folder":
            (folder / file).mkdir()
        else:
            (folder / file).symlink_to("/dev/zero")
        with pytest.raises(HookedModelError):
            forms[name].read(folder)


def test_a_name_of_a_megabyte_in_a_module_is_not_joined_with_the_names_below(tmp_path):
    module: Any = torch.nn.Module()
    module.add_module("n" * 1_000_000, torch.nn.ParameterList([torch.ones(1) for _ in range(300)]))
    torch.save({"sae": module}, tmp_path / "best.pt")
    with pytest.raises(WriteSAEError, match="1,000,000 characters"):
        WriteSAE.from_checkpoint(tmp_path / "best.pt")


def test_honest_views_load(tmp_path):
    """Factors that are views of one tensor, and a head that is the embedding."""
    held = checkpoint("bilinear", d_sae=6, d_k=4, d_v=4)
    both = torch.cat([held["model_state_dict"]["V_dec"], held["model_state_dict"]["W_dec"]])
    held["model_state_dict"] |= {"V_dec": both[:6], "W_dec": both[6:]}
    torch.save(held, tmp_path / "best.pt")
    assert WriteSAE.from_checkpoint(tmp_path / "best.pt").cfg.d_sae == 6
