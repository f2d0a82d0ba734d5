"""Options of ``boot_transformers`` take effect or are refused; models are saved, copied, converted."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hooked_models import HookedRecurrent, upstream, zoo
from tests.conftest import save_tokenizer
from tests.hooked_models.architectures import assert_close, nothing, refused, some_tokens
from tests.hooked_models.model_classes import delta_rules, fla_folders, mamba2_hybrids

TOKENS = torch.arange(20, 40)[None]


def boot(name: str | Path, **options: Any) -> Any:
    return HookedRecurrent.boot_transformers(name, **({"device": "cpu"} | options))


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return boot(name).requires_grad_(False)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo.model_path(name), tmp_path / "model"))


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Options.


def test_options_that_would_have_no_effect_are_refused(name):
    cases: dict[str, tuple[Any, ...]] = {"dtyp": (torch.float16,), "torch_dtype": (torch.float16,)}
    cases |= {"load_in_8bit": (True,), "fold_ln": (True,), "quantization_config": (None,), "token": ("x",)}
    cases |= {"load_weights": ("no", None), "trust_remote_code": ("yes",), "revision": ("other", 3)}
    cases |= {
        "n_ctx": (0, -3, "8"),
        "n_devices": (0, "2"),
        "device_map": ("cpu",),
        "max_memory": ({"cpu": "1GB"},),
    }
    cases |= {"hf_config_overrides": ("x", {"nonsense": 1}), "model_class": (int,), "tokenizer": ("gpt2", 3)}
    cases |= {"hf_model": (3, "x"), "device": ("meta", "nowhere", 3.5), "dtype": ("int8", "x", torch.int64)}
    for argument, values in cases.items():
        for value in values:
            with refused(argument):
                boot(name, **{argument: value})


def test_hints_of_other_names():
    for argument, part in {
        "torch_dtype": "say dtype=",
        "dtyp": "did you mean dtype",
        "load_in_4bit": "hf_model=",
    }.items():
        with refused(argument, part):
            boot("tiny-gdn", **{argument: True})
    assert {"model_name", "dtype", "load_weights", "hf_model"} <= set(upstream.boot_arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fresh_weights(name, model, dtype):
    """Other than the trained ones, finite, of the dtype that is asked for, from torch's generator."""
    torch.manual_seed(3)
    fresh = boot(name, load_weights=False, dtype=dtype)
    assert {x.dtype for x in fresh.parameters()} == {fresh.cfg.dtype} == {dtype}
    assert fresh.cells == model.cells
    logits = fresh(TOKENS)
    assert logits.isfinite().all()
    assert float((logits - model(TOKENS)).abs().max()) > 0.1
    torch.manual_seed(3)
    assert torch.equal(boot(name, load_weights=False, dtype=dtype)(TOKENS), logits)


def test_fresh_weights_of_a_folder_that_has_none(name, folder):
    """Only the reader of flash-linear-attention's form looks at the weights for sizes."""
    (folder / "model.safetensors").unlink()
    with refused("model.safetensors"):
        boot(folder)
    if name == "tiny-rwkv7":
        with refused("no weights"):
            boot(folder, load_weights=False)
    else:
        assert boot(folder, load_weights=False)(TOKENS).isfinite().all()


@torch.no_grad()
def test_overrides_reach_the_model_in_every_form(name, model):
    field = next(
        x
        for x in ("rms_norm_eps", "layer_norm_epsilon", "norm_eps")
        if hasattr(model.original_model.config, x)
    )
    for options in ({}, {"load_weights": False}):
        other = boot(name, hf_config_overrides={field: 0.5}, **options)
        assert getattr(other.original_model.config, field) == 0.5
        assert other.cfg.eps == 0.5
    assert float((boot(name, hf_config_overrides={field: 0.5})(TOKENS) - model(TOKENS)).abs().max()) > 0.1


@torch.no_grad()
def test_a_loaded_model_keeps_its_dtype_and_device(name):
    loaded = boot(name, load_weights=False, dtype=torch.bfloat16).original_model
    fresh = type(loaded)(loaded.config).to(torch.bfloat16)
    bridge = boot(name, hf_model=fresh)
    assert (bridge.cfg.dtype, bridge.cfg.device) == (torch.bfloat16, "cpu")
    refusals: dict[str, Any] = {
        "load_weights": False,
        "dtype": torch.float32,
        "n_ctx": 4,
        "checkpoint_index": 1,
    }
    refusals |= {"hf_config_overrides": {"vocab_size": 3}, "device_map": "cpu", "revision": "x"}
    for argument, value in refusals.items():
        other = {"device": None} if argument == "device_map" else {}
        with refused(argument):
            boot(name, hf_model=type(loaded)(loaded.config).to(torch.bfloat16), **other, **{argument: value})


def test_weights_that_were_offloaded(model, name):
    """accelerate leaves them on the device meta, and loads them in hooks that a bridge's layers pass by."""
    with torch.device("meta"):
        offloaded = type(model.original_model)(model.original_model.config)
    with refused("meta"):
        boot(name, hf_model=offloaded, device=None)


# What another package would have to be there for.

METHODS = "bitsandbytes gptq awq compressed-tensors hqq aqlm quanto torchao eetq vptq auto-round nonsense"


@pytest.mark.parametrize("method", METHODS.split())
def test_quantised_checkpoints_without_their_package(folder, method):
    reconfigure(
        folder,
        quantization_config={"quant_method": method, "load_in_4bit": method == "bitsandbytes", "bits": 4},
    )
    with refused(str(folder)) as error:
        boot(folder)
    assert not isinstance(error.value, ImportError)


@pytest.mark.parametrize("quantised", [{}, "x", [], 3, {"quant_method": 3}, {"quant_method": None}])
def test_quantisation_that_is_no_method(folder, quantised):
    reconfigure(folder, quantization_config=quantised)
    with refused(str(folder)):
        boot(folder)


def test_a_missing_package_is_one_line(monkeypatch):
    def load(*_: Any, **__: Any) -> None:
        raise ImportError("needs a package\nthat is not there: `pip install package`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with refused("could not load tiny-gdn", "pip install package"):
        boot("tiny-gdn")


def in_memory(**tokens: str) -> Any:
    words = {"<unk>": 0, "it": 1, "is": 2, "<s>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **tokens)


@torch.no_grad()
def test_a_tokenizer_made_in_memory(name, model):
    tokenizer = in_memory(bos_token="<s>", eos_token="<s>")
    before = dict(tokenizer.init_kwargs)
    other = boot(name, tokenizer=tokenizer)
    assert other.to_tokens("it is", prepend_bos=False).tolist() == [[1, 2]]
    assert other.to_tokens("it is", prepend_bos=True).tolist() == [[3, 1, 2]]
    assert_close(other("it is", prepend_bos=True), model(torch.tensor([[3, 1, 2]])))
    assert tokenizer.init_kwargs == before


def test_tokens_beyond_the_vocabulary():
    bridge = boot("tiny-gdn", tokenizer=in_memory())
    bridge.tokenizer.add_tokens([f"w{n}" for n in range(3000)])
    with refused("vocabulary ends at 2047"):
        bridge.to_tokens("it w2999", prepend_bos=False)


# Saved, copied, converted.


@torch.no_grad()
def test_saved_models_are_the_same(name, model, tmp_path):
    model.save_pretrained(tmp_path / "bridge")
    model.original_model.save_pretrained(tmp_path / "inner")
    expected = model(TOKENS)
    assert torch.equal(boot(tmp_path / "bridge")(TOKENS), expected)
    assert torch.equal(boot(tmp_path / "inner", tokenizer=model.tokenizer)(TOKENS), expected)
    text = "It is a truth"
    assert torch.equal(boot(tmp_path / "bridge").to_tokens(text, prepend_bos=False), model.to_tokens(text))
    if name != "tiny-rwkv7":  # transformers has no class for it
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bridge", attn_implementation="eager")
        assert_close(loaded(TOKENS).logits, expected)


def test_copies_are_apart(name):
    """Also after passes with gradients, which leave tensors of their graph in modules."""
    bridge = boot(name)
    expected = bridge(TOKENS).detach()
    twin = copy.deepcopy(bridge)
    twin(TOKENS).sum().backward()
    again = copy.deepcopy(bridge)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        hook = [(bridge.write_hook_name(0, 0), lambda x, hook: 0 * x)]
        assert torch.equal(bridge(TOKENS), expected)
        assert torch.equal(twin(TOKENS), expected)
        assert torch.equal(
            twin.run_with_hooks(TOKENS, fwd_hooks=hook), bridge.run_with_hooks(TOKENS, fwd_hooks=hook)
        )
        assert not bridge.busy_hooks
        assert not twin.busy_hooks


@torch.no_grad()
def test_a_pickled_model_is_the_same_or_refused(name, model, tmp_path):
    expected = model(TOKENS)
    if name == "tiny-gdn":  # into whose modules transformers and TransformerLens put functions without a name
        with refused("cannot be pickled", "save_pretrained"):
            pickle.dumps(model)
    else:
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(TOKENS), expected)
        again.original_model.save_pretrained(tmp_path)
        assert torch.equal(boot(tmp_path, tokenizer=model.tokenizer)(TOKENS), expected)
    model.add_hook(model.write_hook_name(0, 0), nothing)
    with refused("cannot be pickled"):
        pickle.dumps(model)
    model.reset_hooks()


@torch.no_grad()
def test_the_configuration_goes_with_the_weights(name):
    bridge = boot(name)
    for convert, dtype in (
        (lambda: bridge.double(), torch.float64),
        (lambda: bridge.half(), torch.float16),
        (lambda: bridge.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
        (lambda: bridge.type("float32"), torch.float32),
        (lambda: bridge.to("cpu", torch.bfloat16), torch.bfloat16),
        (lambda: bridge.float(), torch.float32),
    ):
        assert convert() is bridge
        assert {x.dtype for x in bridge.parameters()} == {bridge.cfg.dtype} == {dtype}
        assert bridge.generate(TOKENS, max_new_tokens=2, verbose=False).shape == (1, 22)
    for place in ("meta", "nowhere", "cuda:99", "bfloat16", torch.int64, 10**6):
        with refused("device" if place != torch.int64 else "dtype"):
            bridge.to(place)
        assert (bridge.cfg.device, bridge.cfg.dtype) == ("cpu", torch.float32)


@torch.no_grad()
def test_compatibility_mode_keeps_writes_and_probabilities(name, model, tmp_path):
    other, hook = boot(name), [(model.write_hook_name(0, 0), lambda x, hook: 0 * x)]
    other.enable_compatibility_mode()
    for run in (lambda m: m(TOKENS), lambda m: m.run_with_hooks(TOKENS, fwd_hooks=hook)):
        assert_close(run(other).log_softmax(-1), run(model).log_softmax(-1))
    with refused("compatibility"):
        other.save_pretrained(tmp_path)
    if name == "tiny-gdn":
        with refused("fold_ln"):
            boot(name).enable_compatibility_mode(fold_ln=True)


@pytest.mark.parametrize("build", [mamba2_hybrids.nemotron_h, delta_rules.kimi_linear, fla_folders.gla])
@torch.no_grad()
def test_a_configuration_that_does_not_name_the_models_class(build: Any, tmp_path: Path):
    """That of a model which was never saved; and of a folder, where the model type is enough."""
    torch.manual_seed(0)
    model, tokens = build().eval(), some_tokens(2, 9)
    expected = model(tokens, use_cache=False).logits
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    reconfigure(tmp_path, architectures=None)
    model.config.architectures = None
    for options in ({"hf_model": copy.deepcopy(model)}, {"device": "cpu"}):
        hooked = HookedRecurrent.boot_transformers(tmp_path, **options)
        assert_close(hooked(tokens, use_cache=False), expected)
