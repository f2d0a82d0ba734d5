"""Checkpoints in other forms than Hugging Face's, through the front door: right logits, or one clear line."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hooked_models import HookedModelError, HookedRecurrent, RWKV7ForCausalLM
from hooked_models.files.layouts import mamba_ssm, to_blinkdl
from hooked_models.files.loading import name_of
from hooked_models.files.world_tokenizer import WorldTokenizer
from tests import conftest
from tests.conftest import VOCABULARY
from tests.hooked_models import architectures
from tests.hooked_models.architectures import greedy, refused, some_tokens

# Earlier versions of transformers normalise all groups together.
GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1
Tensors = dict[str, Tensor]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert expected.std() > 0.3
    architectures.assert_close(found, expected, tolerance)


def boot(source: Path | str, **options: Any) -> Any:
    return HookedRecurrent.boot_transformers(str(source), device="cpu", **options)


@torch.no_grad()
def gives(source: Path | str, reference: Any, *shape: int, **options: Any) -> Any:
    """The booted model, whose logits are the reference's."""
    model, tokens = boot(source, **options), some_tokens(*shape)
    assert_close(model(tokens), reference(tokens).logits)
    return model


def refuses(source: Path | str, *parts: str, **options: Any) -> None:
    """Booting raises the package's error with one short line that has these parts."""
    with refused(*parts) as error:
        boot(source, **options)
    assert len(str(error.value)) < 500


class Lacking:
    """A field that a configuration is to lack."""


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not Lacking}
    (folder / "config.json").write_text(json.dumps(kept))


ZERO = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def mamba2(**changes: Any) -> Any:
    return conftest.mamba2(**(ZERO | changes))


def rwkv7(**changes: Any) -> Any:
    """With the epsilon of BlinkDL's files."""
    return conftest.rwkv7(**(ZERO | {"group_norm_eps": 64e-5, "intermediate_size": 160} | changes))


def clones(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def tokenizer_folder(build_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words "wn", of which the n-th is token n."""
    source, folder = build_folder("words", rwkv7(), 0), tmp_path_factory.mktemp("tokenizer")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


Randomised = Callable[[Any, int], Any]


@pytest.fixture(scope="session")
def randomised(build_folder: Any) -> Randomised:
    """randomised(model, seed) -> the model, no parameter at its initial value."""

    def build(model: Any, seed: int) -> Any:
        build_folder("randomised", model, seed)
        return model.requires_grad_(False)

    return build


# mamba_ssm's form.


def mamba_ssm_config(**changes: Any) -> dict[str, Any]:
    """As the published ones are, but small: 4 heads of 128 x 64 in each of 2 layers."""
    config = {"d_model": 128, "d_intermediate": 0, "n_layer": 2, "vocab_size": 197, "attn_cfg": {}}
    config |= {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "rms_norm": True, "tie_embeddings": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    return {**config, **changes}


def write_mamba_ssm(folder: Path, model: Any, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = clones(model.state_dict())
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# What transformers calls the published models' sizes.
PUBLISHED = {"hidden_size": 128, "num_heads": 4, "head_dim": 64, "state_size": 128, "n_groups": 1}
PUBLISHED |= {"expand": 2, "conv_kernel": 4, "chunk_size": 256, "num_hidden_layers": 2}
PUBLISHED |= {"tie_word_embeddings": True, "time_step_limit": (0.0, float("inf"))}


@pytest.fixture(scope="module")
def mamba_reference(randomised: Randomised) -> Any:
    return randomised(mamba2(**PUBLISHED), 11)


@pytest.fixture
def mamba_folder(tmp_path: Path, mamba_reference: Any) -> Path:
    return write_mamba_ssm(tmp_path / "mamba", mamba_reference, mamba_ssm_config())


@torch.no_grad()
def test_mamba_ssm_as_published(mamba_folder, mamba_reference, tokenizer):
    """Sizes that the configuration leaves out are mamba_ssm's; 197 words are padded to 200."""
    model = gives(mamba_folder, mamba_reference, 2, 300, tokenizer=tokenizer)
    assert {(c.d_k, c.d_v) for c in model.cells} == {(128, 64)}
    assert len(model.cells) == 8
    assert model.original_model.config.layer_norm_epsilon == 1e-5
    prompt = some_tokens(2, 9)
    expected = mamba_reference.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy(model, prompt, 6), expected)


@torch.no_grad()
def test_mamba_ssm_with_every_field_changed(randomised, tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "expand": 3, "head_dim": 12, "state_size": 20, "n_groups": GROUPS}
    sizes |= {"conv_kernel": 3, "chunk_size": 16, "use_bias": True, "use_conv_bias": False}
    reference = randomised(mamba2(**sizes, residual_in_fp32=False), 12)
    ssm = {"layer": "Mamba2", "d_state": 20, "headdim": 12, "expand": 3, "ngroups": GROUPS, "d_conv": 3}
    ssm |= {"chunk_size": 16, "dt_limit": [0.2, 1.2], "bias": True, "conv_bias": False, "rmsnorm": True}
    ssm |= {"norm_before_gate": False, "D_has_hdim": False, "A_init_range": [1, 8], "dt_min": 0.01}
    changes = {"d_model": 32, "n_layer": 3, "vocab_size": 193, "ssm_cfg": ssm, "tie_embeddings": False}
    config = mamba_ssm_config(**changes, residual_in_fp32=False, pad_vocab_size_multiple=20)
    folder = write_mamba_ssm(tmp_path, reference, config)
    gives(folder, reference, 1, 60, tokenizer=tokenizer)


@torch.no_grad()
def test_mamba_ssm_head_left_out_where_it_is_tied(mamba_folder, mamba_reference, tokenizer):
    """And safetensors, and a dtype."""
    tensors = torch.load(mamba_folder / "pytorch_model.bin")
    del tensors["lm_head.weight"]
    save_file(tensors, mamba_folder / "model.safetensors")
    (mamba_folder / "pytorch_model.bin").unlink()
    gives(mamba_folder, mamba_reference, 1, 30, tokenizer=tokenizer)
    half = boot(mamba_folder, tokenizer=tokenizer, dtype="bfloat16")
    assert {x.dtype for x in half.original_model.parameters()} == {torch.bfloat16}


def test_mamba_ssm_groups_that_transformers_does_not_tell_apart(mamba_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(mamba_ssm, "MambaRMSNormGated", torch.nn.RMSNorm)
    reconfigure(mamba_folder, ssm_cfg={"layer": "Mamba2", "ngroups": 4})
    refuses(mamba_folder, "ngroups = 4", "transformers 5.23", tokenizer=tokenizer)


def test_mamba_ssm_heads_that_contradict_their_tie(mamba_folder, tokenizer):
    rewrite(mamba_folder / "pytorch_model.bin", lambda tensors: tensors["lm_head.weight"].add_(1))
    refuses(mamba_folder, "ties lm_head.weight to backbone.embedding.weight", tokenizer=tokenizer)


# RWKV-7 in BlinkDL's and flash-linear-attention's forms.


# BlinkDL's names of a block's norms and matrices, and flash-linear-attention's.
BLOCK = [("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm")]
BLOCK += [("att.receptance", "attn.r_proj"), ("att.key", "attn.k_proj"), ("att.value", "attn.v_proj")]
BLOCK += [("att.output", "attn.o_proj"), ("ffn.key", "ffn.key"), ("ffn.value", "ffn.value")]


def blinkdl(model: Any) -> Tensors:
    """Written out by hand from what the two projects call things; linear maps of low rank lie transposed."""
    ours, theirs = model.state_dict(), {}
    pairs = [("emb", "model.embeddings"), ("ln_out", "model.norm"), ("head", "lm_head")]
    pairs += [("blocks.0.ln0", "model.layers.0.pre_norm")]
    for n in range(model.config.num_hidden_layers):
        there, here = f"blocks.{n}.", f"model.layers.{n}."
        pairs += [(there + their_name, here + our_name) for their_name, our_name in BLOCK]
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"):
            theirs[f"{there}att.{name}"] = ours[f"{here}attn.{name}"].view(1, 1, -1)
        theirs[f"{there}ffn.x_k"] = ours[f"{here}ffn.x_k"].view(1, 1, -1)
        theirs[f"{there}att.r_k"] = ours[f"{here}attn.r_k"]
        for name in "wag" if n == 0 else "wagv":
            theirs[f"{there}att.{name}1"] = ours[f"{here}attn.{name}_lora.lora.0.weight"].T
            theirs[f"{there}att.{name}2"] = ours[f"{here}attn.{name}_lora.lora.2.weight"].T
            if name != "g":
                theirs[f"{there}att.{name}0"] = ours[f"{here}attn.{name}_lora.lora.2.bias"][None, None]
    for (their_name, our_name), kind in itertools.product(pairs, ("weight", "bias")):
        if f"{our_name}.{kind}" in ours:
            theirs[f"{their_name}.{kind}"] = ours[f"{our_name}.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in theirs.items()}


@pytest.fixture(scope="module")
def rwkv_reference(randomised: Randomised) -> Any:
    """3 layers, 4 heads of 32 x 32, as files of BlinkDL's mean it: these two epsilons."""
    model = rwkv7(hidden_size=128, head_dim=32, value_dim=128)
    return randomised(model, 13)


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory, rwkv_reference: Any) -> Path:
    """With the tensors of the first block that published files have and nothing uses."""
    tensors = blinkdl(rwkv_reference)
    for name in ("v0", "v1", "v2"):
        tensors[f"blocks.0.att.{name}"] = torch.randn(tensors[f"blocks.1.att.{name}"].shape)
    path = tmp_path_factory.mktemp("blinkdl") / "RWKV-x070-Test-0.1B.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def from_pth(pth: Path, tokenizer: Any) -> Any:
    return boot(pth, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rwkv_package(pth: Path) -> Any:
    """The file as the rwkv package loads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_V7_ON", "1")
        patch.setenv("RWKV_JIT_ON", "0")
        patch.setenv("RWKV_CUDA_ON", "0")
        from rwkv.model import RWKV

        return RWKV(str(pth.with_suffix("")), "cpu fp32")


@torch.no_grad()
def test_blinkdl_against_the_rwkv_package(from_pth, rwkv_package):
    tokens = some_tokens(150)
    expected, _ = rwkv_package.forward(tokens.tolist(), None, full_output=True)
    assert_close(from_pth(tokens[None])[0], expected)
    assert {(c.d_k, c.d_v) for c in from_pth.cells} == {(32, 32)}
    assert len(from_pth.cells) == 12


@torch.no_grad()
def test_blinkdl_against_the_rwkv_package_step_by_step(from_pth, rwkv_package):
    """Each with its own cache: a prefill, then greedy steps."""
    tokens, state = some_tokens(20, seed=1).tolist(), None
    logits, state = rwkv_package.forward(tokens, state)
    expected = list(tokens)
    for _ in range(12):
        expected.append(int(logits.argmax()))
        logits, state = rwkv_package.forward([expected[-1]], state)
    assert greedy(from_pth, torch.tensor([tokens]), 12)[0].tolist() == expected
    cached = from_pth.original_model(torch.tensor([expected[:-1]]), use_cache=True)
    step = from_pth.original_model(
        torch.tensor([expected[-1:]]), past_key_values=cached.past_key_values, use_cache=True
    )
    assert_close(step.logits[0, -1], logits)


@torch.no_grad()
def test_a_placement_is_taken(pth, mamba_folder, tokenizer):
    for source in (pth, mamba_folder):
        model = HookedRecurrent.boot_transformers(str(source), device_map="cpu", tokenizer=tokenizer)
        assert model(some_tokens(1, 5)).shape == (1, 5, VOCABULARY)


@pytest.mark.parametrize("zipped", [True, False])
def test_blinkdl_sizes_come_from_the_shapes(randomised, tmp_path, tokenizer, zipped):
    """One layer, wider values than keys, as many numbers in no two places; PyTorch's old format too."""
    reference = randomised(rwkv7(num_hidden_layers=1), 14)
    torch.save(blinkdl(reference), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model = gives(tmp_path / "a.pth", reference, 2, 20, tokenizer=tokenizer)
    assert {(c.d_k, c.d_v) for c in model.cells} == {(16, 24)}


def test_to_blinkdl(rwkv_reference):
    written, expected = to_blinkdl(rwkv_reference), blinkdl(rwkv_reference)
    assert sorted(written) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
        assert written[name].is_contiguous()


def test_to_blinkdl_refuses_a_bridged_model(from_pth):
    """Its modules are other ones, and TransformerLens may have folded some into others."""
    with pytest.raises(HookedModelError, match="bridge"):
        to_blinkdl(from_pth.original_model)


def test_to_blinkdl_refuses_what_the_form_cannot_say():
    fields = {"norm_first": False, "norm_bias": False, "norm_eps": 1e-3, "group_norm_eps": None}
    for field, value in (fields | {"hidden_act": "relu"}).items():
        with pytest.raises(HookedModelError, match=field):
            to_blinkdl(rwkv7(**{field: value}))


MARKER = "remote_code_ran"


def write_fla(folder: Path, model: Any, **changes: Any) -> Path:
    """A folder as the hub has it: its code would leave a file behind."""
    model.save_pretrained(folder)
    code = {"AutoConfig": "code.RWKV7Config", "AutoModelForCausalLM": "code.RWKV7ForCausalLM"}
    reconfigure(folder, **{"auto_map": code, "attn": None, **changes})
    (folder / "code.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nimport triton_only\n")
    remote = {"AutoTokenizer": ["code.RwkvTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": remote, "tokenizer_class": "RwkvTokenizer"})
    )
    return folder


@pytest.fixture
def fla_folder(tmp_path: Path, rwkv_reference: Any) -> Path:
    return write_fla(tmp_path / "fla", rwkv_reference)


@torch.no_grad()
def test_fla_and_blinkdl_give_the_same(fla_folder, from_pth, rwkv_reference, tokenizer):
    """And the folder's code stays unused, even where it is trusted."""
    model, tokens = boot(fla_folder, tokenizer=tokenizer), some_tokens(2, 80)
    assert_close(model(tokens), from_pth(tokens), 1e-6)
    assert_close(model(tokens), rwkv_reference(tokens).logits)
    boot(fla_folder, tokenizer=tokenizer, trust_remote_code=True)
    assert not (fla_folder / MARKER).exists()


@pytest.mark.parametrize("shape", [(6, 128), (6, 1, 1, 128), (1, 1, 6, 128)])
@torch.no_grad()
def test_fla_token_shifts_in_one_tensor(fla_folder, rwkv_reference, tokenizer, shape):
    """The old layout; and the first layer's unused mix of values."""
    tensors = load_file(fla_folder / "model.safetensors")
    for n in range(3):
        factors = [tensors.pop(f"model.layers.{n}.attn.x_{letter}") for letter in "rwkvag"]
        tensors[f"model.layers.{n}.attn.x_x"] = torch.cat([x.flatten() for x in factors]).view(shape)
    for name, tensor in list(tensors.items()):
        if name.startswith("model.layers.1.attn.v_lora"):
            tensors[name.replace("layers.1", "layers.0")] = torch.randn_like(tensor)
    save_file(tensors, fla_folder / "model.safetensors", metadata={"format": "pt"})
    gives(fla_folder, rwkv_reference, 1, 40, tokenizer=tokenizer)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@torch.no_grad()
def test_fla_weights_in_parts(fla_folder, rwkv_reference, tokenizer, kind, parts):
    tensors = load_file(fla_folder / "model.safetensors")
    (fla_folder / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    where: dict[str, str] = {}
    for part in range(parts):
        file = f"{stem}-0000{part + 1}-of-0000{parts}.{kind}" if parts > 1 else f"{stem}.{kind}"
        held = {name: tensors[name] for name in sorted(tensors)[part::parts]}
        save_file(held, fla_folder / file) if kind == "safetensors" else torch.save(held, fla_folder / file)
        where |= dict.fromkeys(held, file)
    if parts > 1:
        index = fla_folder / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    gives(fla_folder, rwkv_reference, 1, 40, tokenizer=tokenizer)
    if parts > 1:
        (fla_folder / file).unlink()
        refuses(fla_folder, "lacks", file, index.name, tokenizer=tokenizer)
        for wrong in ({"weights": 1}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "b", "c": None}}):
            index.write_text(json.dumps(wrong))
            refuses(fla_folder, str(index), "weight_map", tokenizer=tokenizer)


def test_our_class_even_where_another_package_answers_to_the_name(fla_folder, tokenizer, monkeypatch):
    class Foreign(PreTrainedConfig):
        model_type = "rwkv7"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "rwkv7", Foreign)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, Foreign, object)
    assert isinstance(AutoConfig.for_model("rwkv7"), Foreign)
    assert AutoModelForCausalLM._model_mapping[Foreign] is object
    assert isinstance(boot(fla_folder, tokenizer=tokenizer).original_model, RWKV7ForCausalLM)


def test_fla_model_type_of_an_early_revision(fla_folder, tokenizer):
    reconfigure(fla_folder, model_type="rwkv7_fla")
    model = boot(fla_folder, tokenizer=tokenizer)
    assert isinstance(model.original_model, RWKV7ForCausalLM)
    assert model.original_model.config.model_type == "rwkv7"


@torch.no_grad()
def test_fla_ranks_that_the_configuration_leaves_open(fla_folder, rwkv_reference, tokenizer):
    """As null, which the library allows; each of its versions computes them by another rule."""
    reconfigure(fla_folder, **{f"{name}_low_rank_dim": None for name in ("decay", "gate", "a", "v")})
    gives(fla_folder, rwkv_reference, 1, 40, tokenizer=tokenizer)


def test_fla_tied_embeddings(randomised, tmp_path, tokenizer):
    reference = randomised(rwkv7(tie_word_embeddings=True, fuse_norm=True), 15)
    folder = write_fla(tmp_path, reference)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    gives(folder, reference, 1, 20, tokenizer=tokenizer)


def of_ssm(**changes: Any) -> dict[str, Any]:
    return {"ssm_cfg": {"layer": "Mamba2", **changes}}


# A form, what to change in its configuration, and words of the message.
WRONG_CONFIGURATIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("mamba", {"attn_layer_idx": [1]}, ("attn_layer_idx = [1]", "attn_layer_idx = []")),
    ("mamba", {"d_intermediate": 256}, ("d_intermediate = 256",)),
    ("mamba", {"rms_norm": False}, ("rms_norm = False",)),
    ("mamba", {"ssm_cfg": {}}, ("ssm_cfg.layer = 'Mamba1'", "'Mamba2'")),
    ("mamba", {"ssm_cfg": {"layer": "Mamba1"}}, ("ssm_cfg.layer = 'Mamba1'",)),
    ("mamba", of_ssm(D_has_hdim=True), ("ssm_cfg.D_has_hdim = True",)),
    ("mamba", of_ssm(norm_before_gate=True), ("ssm_cfg.norm_before_gate = True",)),
    ("mamba", of_ssm(rmsnorm=False), ("ssm_cfg.rmsnorm = False",)),
    ("mamba", of_ssm(d_ssm=128), ("ssm_cfg.d_ssm = 128",)),
    ("mamba", of_ssm(headdim=48), ("256", "heads of 48")),
    ("mamba", of_ssm(wings=2), ("unknown fields", "wings")),
    ("mamba", of_ssm(d_state="many"), ("config.json", "ssm_cfg.d_state = 'many'")),
    ("mamba", of_ssm(ngroups=0), ("ssm_cfg.ngroups = 0", "above 0")),
    ("mamba", {"pad_vocab_size_multiple": 0}, ("pad_vocab_size_multiple = 0", "above 0")),
    ("mamba", {"n_layer": 2.5}, ("n_layer = 2.5",)),
    ("mamba", {"ssm_cfg": ["Mamba2"]}, ("config.json",)),
    ("mamba", {"d_model": "wide"}, ("config.json",)),
    *(("mamba", {field: Lacking}, ("lacks", field)) for field in ("d_model", "n_layer", "vocab_size")),
    ("fla", {"attn": {"layers": [1], "num_heads": 4}}, ("softmax attention",)),
    ("fla", {"head_dim": 48}, ("heads do not fill",)),
    ("fla", {"value_dim": [128, 64, 128]}, ("value_dim",)),
    ("fla", {"decay_low_rank_dim": -1}, ("config.json",)),
    ("fla", {"hidden_act": "flop"}, ("hidden_act = 'flop'",)),
    ("fla", {"hidden_size": "64"}, ("hidden_size = '64': expected int",)),
    ("fla", {"norm_eps": None}, ("norm_eps = None: expected float",)),
    ("fla", {"norm_eps": "small"}, ("norm_eps = 'small'",)),
    ("fla", {"value_dim": ["wide"]}, ("value_dim = ['wide']: expected int | list[int] | None",)),
    ("fla", {"a_low_rank_dim": "64"}, ("a_low_rank_dim = '64': expected int",)),
    ("fla", {"num_hidden_layers": 4, "value_dim": 128}, ("model.layers.3",)),
    ("fla", {"vocab_size": 300}, ("lm_head.weight [200, 128] instead of [300, 128]",)),
    ("hf", {"num_heads": 7}, ("num_heads",)),
    ("hf", {"time_step_limit": None}, ("time_step_limit",)),
    ("hf", {"hidden_size": "64"}, ("'hidden_size' expected int",)),
    ("hf", {"hidden_act": "nope"}, ("hidden_act = 'nope'",)),
    ("hf", {"n_groups": 0}, ()),  # what it makes of the sizes depends on transformers' version
    ("hf", {"model_type": ["mamba2"]}, ("configuration",)),
]


@pytest.mark.parametrize(("form", "changes", "parts"), WRONG_CONFIGURATIONS)
def test_configurations_that_do_not_fit(request, tokenizer, form, changes, parts):
    folder = request.getfixturevalue(f"{form}_folder")
    reconfigure(folder, **changes)
    refuses(folder, str(folder), *parts, tokenizer=tokenizer)


# Tensors that do not fit, in each form.

Change = Callable[[Tensors], None]


def rewrite(path: Path, change: Change) -> None:
    safe = path.suffix == ".safetensors"
    tensors = load_file(path) if safe else torch.load(path)
    change(tensors)
    save_file(tensors, path) if safe else torch.save(tensors, path)


@pytest.fixture(params=["mamba_ssm", "fla", "blinkdl"])
def a_form(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """A checkpoint, its file of weights, and the name of a matrix in it that gives no size."""
    if request.param == "mamba_ssm":
        folder = request.getfixturevalue("mamba_folder")
        return folder, folder / "pytorch_model.bin", "backbone.layers.1.mixer.out_proj.weight"
    if request.param == "fla":
        folder = request.getfixturevalue("fla_folder")
        return folder, folder / "model.safetensors", "model.layers.1.attn.o_proj.weight"
    copy = shutil.copy(request.getfixturevalue("pth"), tmp_path / "copy.pth")
    return copy, copy, "blocks.1.att.output.weight"


WRONG_SHAPE = "has the wrong shape for 1 tensor(s): {name} {cut} instead of {shape}"


def wings(name: str) -> str:
    return name.replace("weight", "wings")


def numbers(dtype: torch.dtype) -> tuple[Any, str]:
    line = f"needs floating-point numbers in 1 tensor(s): {{name}} ({dtype})"
    return lambda tensors, name: {name: tensors[name].to(dtype)}, line


# What to put into the file in the tensor's place, and the message.
MISFITS: dict[str, tuple[Callable[[Tensors, str], Tensors], str]] = {
    "missing": (lambda t, name: {}, "lacks 1 tensor(s): {name}"),
    "unexpected": (
        lambda t, name: {name: t[name], wings(name): torch.ones(2)},
        "has unexpected 1 tensor(s): {other}",
    ),
    "another shape": (lambda t, name: {name: t[name][:-1].clone()}, WRONG_SHAPE),
    "int64": numbers(torch.int64),
    "bool": numbers(torch.bool),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit(a_form, tokenizer, misfit):
    source, file, name = a_form
    change, line = MISFITS[misfit]
    words: dict[str, Any] = {"name": name, "other": wings(name)}

    def changed(tensors: Tensors) -> None:
        rows, columns = tensors[name].shape
        words.update(shape=[rows, columns], cut=[rows - 1, columns])
        new = change(tensors, name)
        del tensors[name]
        tensors.update(new)

    rewrite(file, changed)
    refuses(source, str(source), line.format(**words), tokenizer=tokenizer)


def test_all_that_is_wrong_in_one_line(a_form, tokenizer):
    source, file, name = a_form
    layer = name.split(".1.")[0] + ".1."

    def rename(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1].clone()
        for held in [x for x in tensors if (x.startswith(layer) and "norm" in x) or ".ln" in x]:
            tensors["x." + held] = tensors.pop(held)

    rewrite(file, rename)
    lines = ("; has unexpected ", f"; has the wrong shape for 1 tensor(s): {name}")
    refuses(source, " lacks ", *lines, "x." + layer[:6], tokenizer=tokenizer)


# A tensor that gives a size, what to put in its place (None: nothing), and words of the message.
BAD_SIZES = [(name, None, ("lacks", name)) for name in ("emb.weight", "blocks.0.att.w1", "blocks.1.att.v1")]
BAD_SIZES += [(name, None, ("lacks", name)) for name in ("blocks.0.att.r_k", "blocks.2.att.value.weight")]
BAD_SIZES += [("blocks.0.att.r_k", torch.ones(4, 33), ("heads do not fill",))]


@pytest.mark.parametrize(("name", "new", "words"), BAD_SIZES)
def test_shapes_that_give_no_size(pth, tmp_path, tokenizer, name, new, words):
    tensors = {**torch.load(pth), name: new}
    torch.save({name: x for name, x in tensors.items() if x is not None}, tmp_path / "copy.pth")
    refuses(tmp_path / "copy.pth", str(tmp_path / "copy.pth"), *words, tokenizer=tokenizer)


# Other versions, other files.

OTHER_VERSIONS = {
    "RWKV-4 (x040)": ("att.time_decay", "att.time_first", "att.time_mix_k", "att.key.weight", "ln1.weight"),
    "RWKV-5": ("att.time_decay", "att.time_faaaa", "att.time_mix_k", "att.gate.weight", "att.ln_x.weight"),
    "RWKV-6 (x060)": ("att.time_decay", "att.time_maa_x", "att.time_maa_w1", "att.ln_x.weight"),
    "RWKV-7 with DeepEmbed": ("att.r_k", "att.x_r", "att.ln_x.weight", "ffn.s_emb.weight", "ffn.s1"),
    "no RWKV checkpoint": ("attention.weight",),
}


@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_another_version(tmp_path, version):
    tensors = {f"blocks.{n}.{name}": torch.ones(2, 2) for n in range(2) for name in OTHER_VERSIONS[version]}
    torch.save({"emb.weight": torch.ones(5, 2), **tensors}, tmp_path / "RWKV.pth")
    refuses(tmp_path / "RWKV.pth", version, "only plain RWKV-7 (x070)")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_forward_module.model."])
def test_names_with_a_prefix(pth, tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in torch.load(pth).items()}
    torch.save(tensors, tmp_path / "RWKV.pth")
    refuses(tmp_path / "RWKV.pth", f"begin with {prefix!r} ({prefix}blocks.0.", "without it")


class Code:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


ONE, ONLY = {"emb.weight": torch.ones(2)}, "tensors by name and nothing else, but "
NESTED = "'state_dict' (dict), 'epoch' (int): save what 'state_dict' holds"
# What a file holds (code would leave a file at ``path``), and words of the message.
BAD_CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda path: {"a": Code(path)}, "wants to run code"),
    "list": (lambda path: [torch.ones(2)], "tensors by name"),
    "nothing": (lambda path: {}, "tensors by name"),
    "nested": (lambda path: {"state_dict": ONE, "epoch": 3}, NESTED),
    "numbers": (lambda path: {"emb.weight": 3}, ONLY + "also holds 'emb.weight' (int)"),
    "keys": (lambda path: {0: torch.ones(2)} | ONE, ONLY + "has keys that are not names: 0"),
}


@pytest.mark.parametrize("kind", [*BAD_CONTENTS, "truncated", "pickle"])
@pytest.mark.parametrize("form", ["pth", "bin"])
def test_a_bad_file(pth, mamba_folder, tmp_path, tokenizer, form, kind):
    """Every other way to be damaged or hostile: test_torch_files.py."""
    source = {"pth": tmp_path / "bad.pth", "bin": mamba_folder}[form]
    file = source if form == "pth" else mamba_folder / "pytorch_model.bin"
    marker = file.parent / MARKER
    if kind == "truncated":
        part = "truncated or damaged"
        file.write_bytes(pth.read_bytes()[:-1000])
    elif kind == "pickle":
        part = "io.open) and was not loaded"
        file.write_bytes(pickle.dumps({"emb.weight": Code(marker)}))
    else:
        content, part = BAD_CONTENTS[kind]
        torch.save(content(marker), file)
    refuses(source, str(file), part, tokenizer=tokenizer)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n" * 20, None])
def test_a_bad_safetensors_file(fla_folder, tokenizer, content):
    file = fla_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    refuses(fla_folder, str(file), "empty" if content == b"" else "truncated", tokenizer=tokenizer)


def test_what_is_no_file(tmp_path):
    (tmp_path / "model.pth").mkdir()
    refuses(tmp_path / "model.pth", "is a folder", ".pth file")
    for name in ("nowhere.pth", "no/where.pth"):
        refuses(name, name, "not a .pth file")


@pytest.mark.parametrize("form", ["fla", "mamba"])
def test_a_folder_without_weights(request, tokenizer, form):
    folder = request.getfixturevalue(f"{form}_folder")
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        file.unlink()
    refuses(folder, "no weights", "model.safetensors", "pytorch_model.bin", tokenizer=tokenizer)


# Hugging Face's form, and what is asked for.


@pytest.fixture
def hf_folder(build_folder: Any) -> Path:
    return build_folder("mamba2", mamba2(num_hidden_layers=1), 17)


def test_a_configuration_that_is_no_object(hf_folder):
    for text in ("[]", '["model_type"]', '"mamba2"', "3", "null"):
        (hf_folder / "config.json").write_text(text)
        refuses(hf_folder, f"the config.json of {hf_folder} does not hold a JSON object")


def test_an_index_that_names_no_files(hf_folder):
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 3, "b": "c"}}))
    refuses(hf_folder, "weight_map", str(hf_folder))


def test_names_and_paths(hf_folder):
    for source in (Path(hf_folder), str(hf_folder)):
        model = HookedRecurrent.boot_transformers(source, device="cpu")
        assert model.cfg.model_name == str(hf_folder)
    for name in (None, 3, b"tiny-gdn", ["tiny-gdn"]):
        with refused(f"must be a str or a pathlib.Path, not {type(name).__name__}"):
            name_of(name)


# The hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """hub(repository, folder, revision) puts a folder where a download would have."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository: str, folder: Path, revision: str = "main") -> None:
        place = tmp_path / "hub" / ("models--" + repository.replace("/", "--"))
        commit = revision.encode().hex().ljust(40, "0")
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)

    return put


@torch.no_grad()
def test_repositories_and_their_revisions(
    hub, mamba_folder, fla_folder, mamba_reference, rwkv_reference, tokenizer_folder, tokenizer
):
    """One repository, which holds another model in its second revision."""
    shutil.copytree(tokenizer_folder, fla_folder, dirs_exist_ok=True)
    hub("someone/model", mamba_folder)
    hub("someone/model", fla_folder, "second")
    model = gives("someone/model", mamba_reference, 1, 20, tokenizer=tokenizer)
    assert model.cfg.model_name == "someone/model"
    model = gives("someone/model", rwkv_reference, 1, 20, revision="second")
    assert model.to_tokens("w9 w150", prepend_bos=False).tolist() == [[9, 150]]
    refuses("someone/model", "someone/model", "configuration", revision="third")


# Tokenizers.


@pytest.mark.parametrize("form", ["fla", "mamba"])
@torch.no_grad()
def test_the_tokenizer_of_a_folder_is_used(request, tokenizer_folder, form):
    folder = request.getfixturevalue(f"{form}_folder")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    model = boot(folder)
    assert model.to_tokens("w9 w150 w4", prepend_bos=False).tolist() == [[9, 150, 4]]
    assert model.to_tokens("w9").tolist() == [[0, 9]]
    (folder / "tokenizer.json").write_text("{}")
    refuses(folder, "could not load the tokenizer", str(folder))


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
@pytest.mark.parametrize("on_hub", [False, True])
def test_hugging_face_form_without_a_tokenizer(hub, hf_folder, tokenizer, kept, on_hub):
    """Transformers would make an empty one up."""
    for file in hf_folder.glob("tokenizer*"):
        if file.name not in kept:
            file.unlink()
    hub("someone/mamba2", hf_folder)
    source = "someone/mamba2" if on_hub else str(hf_folder)
    refuses(source, f"no tokenizer in {source}, none of tokenizer.json", "pass tokenizer=")
    model = boot(source, tokenizer=tokenizer)
    assert model.to_tokens("w9", prepend_bos=False).tolist() == [[9]]


def test_hugging_face_form_with_its_tokenizer_or_a_broken_one(hub, hf_folder):
    hub("someone/mamba2", hf_folder)
    assert boot("someone/mamba2").to_tokens("w9", prepend_bos=False).tolist() == [[9]]
    for text in ("{}", "oops", ""):
        (hf_folder / "tokenizer.json").write_text(text)
        refuses(hf_folder, f"{hf_folder / 'tokenizer.json'} cannot be read as a tokenizer")


def test_mamba_ssm_takes_the_tokenizer_of_its_scripts(hub, mamba_folder, tokenizer_folder):
    refuses(mamba_folder, "no tokenizer in", "EleutherAI/gpt-neox-20b", "pass tokenizer=")
    hub("EleutherAI/gpt-neox-20b", tokenizer_folder)
    assert boot(mamba_folder).to_tokens("w9", prepend_bos=False).tolist() == [[9]]


def test_no_tokenizer(pth, fla_folder, mamba_folder):
    for source in (pth, fla_folder):
        refuses(source, f"no tokenizer in {source}", "vocabulary of 200", "World", "pass tokenizer=")
    (mamba_folder / "tokenizer_config.json").write_text("{}")
    refuses(mamba_folder, "no tokenizer in", "another form", "pass tokenizer=")


@pytest.fixture(scope="module")
def world_reference(randomised: Randomised) -> Any:
    return randomised(rwkv7(vocab_size=65536, hidden_size=32, value_dim=32), 16)


@pytest.fixture(scope="module")
def world_pth(tmp_path_factory: pytest.TempPathFactory, world_reference: Any) -> Path:
    path = tmp_path_factory.mktemp("world") / "RWKV-x070-World.pth"
    torch.save(blinkdl(world_reference), path)
    return path


@pytest.fixture(scope="module")
def world_model(world_pth: Path) -> Any:
    return boot(world_pth)


@pytest.fixture(scope="module")
def trie() -> Any:
    """The rwkv package's own, on its own file."""
    return TRIE_TOKENIZER(str(Path(sys.modules["rwkv"].__path__[0]) / "rwkv_vocab_v20230424.txt"))


def test_rwkv_without_the_package(world_pth, monkeypatch):
    monkeypatch.setitem(sys.modules, "rwkv", None)
    monkeypatch.delitem(sys.modules, "hooked_models.files.world_tokenizer", raising=False)
    refuses(world_pth, "no tokenizer", "rwkv", "not installed", "pass tokenizer=")


@torch.no_grad()
def test_a_folder_takes_the_world_tokenizer(tmp_path, world_reference):
    """Its own vocabulary file and code are not read."""
    folder = write_fla(tmp_path, world_reference)
    (folder / "rwkv_vocab_v20230424.txt").write_text(f"1 open({str(folder / MARKER)!r}, 'w') 1\n")
    model = boot(folder)
    assert isinstance(model.tokenizer, WorldTokenizer)
    assert not (folder / MARKER).exists()


TEXTS = ["The cat sat.\n\n", "  多語 ümlaut 👩‍👩‍👧\t\x00 e\u0301", "x"]


@torch.no_grad()
def test_world_tokens_of_a_model(world_model, world_reference, trie):
    ids = [trie.encode(text) for text in TEXTS]
    for text, expected in zip(TEXTS, ids):
        assert world_model.to_tokens(text, prepend_bos=False).tolist() == [expected]
        assert world_model.to_tokens(text).tolist() == [[0, *expected]]
        assert world_model.to_string(torch.tensor(expected)) == text
    assert world_model.to_str_tokens("The cat", prepend_bos=False) == ["The", " cat"]
    assert world_model.to_str_tokens("The cat") == ["<|endoftext|>", "The", " cat"]
    for side in ("right", "left"):
        rows = world_model.to_tokens(TEXTS, padding_side=side, prepend_bos=False).tolist()
        for row, expected in zip(rows, ids):
            padding = [0] * (len(row) - len(expected))
            assert row == (padding + expected if side == "left" else expected + padding)
    tokens = torch.tensor([[0, *ids[0]]])
    assert_close(world_model(TEXTS[0]), world_reference(tokens).logits)
    expected = world_reference.generate(  # with a mask, or transformers takes the first token for padding
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(greedy(world_model, TEXTS[0], 5), expected)


@torch.no_grad()
def test_world_prompts_in_a_batch(world_model):
    """Padding on the left changes nothing for the shorter ones."""
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    together = world_model.generate(TEXTS, **options)
    assert together == [world_model.generate(text, **options) for text in TEXTS]


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return WorldTokenizer()


@given(text=st.text())
def test_world_round_trip_in_the_packages_tokens(world, trie, text):
    ids = world(text)["input_ids"]
    assert ids == [0, *(trie.encode(text) if text else ())]
    assert world.decode(ids[1:]) == text
    assert world.decode(ids, skip_special_tokens=True) == text.replace("<|endoftext|>", "")


def test_world_reads_surrogates(world):
    texts = {"a\ud800 b": "a\ufffd b", "\udc00": "\ufffd", "\ud83d\ude00": "\U0001f600", "\ufeffa": "\ufeffa"}
    for text, read in texts.items():
        assert world.decode(world(text, add_special_tokens=False)["input_ids"]) == read


def test_world_tokenizer_as_a_tokenizer(tmp_path, world):
    tokenizer = world
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == 65530
    assert tokenizer("a<|endoftext|> b", add_special_tokens=False)["input_ids"][1] == 0
    batch = tokenizer(["one two three", "one"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 2]
    cut = tokenizer("one two three", truncation=True, max_length=2)["input_ids"]
    assert cut == batch["input_ids"][0, :2].tolist()
    words = tokenizer.convert_ids_to_tokens(cut)
    assert words == ["<|endoftext|>", "one"]
    assert tokenizer.convert_tokens_to_ids(words) == cut
    assert tokenizer.convert_tokens_to_ids("多") is None  # its bytes are the token
    assert tokenizer.decode([33, 65535]) == " <|unused 65535|>"
    assert tokenizer.decode([0xE5 + 1]) == "\ufffd"
    assert pickle.loads(pickle.dumps(tokenizer))("one")["input_ids"] == tokenizer("one")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = WorldTokenizer.from_pretrained(tmp_path)
    assert again("one two")["input_ids"] == tokenizer("one two")["input_ids"]
