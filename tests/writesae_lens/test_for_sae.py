"""The base model that belongs to an SAE."""

import huggingface_hub
import pytest
import torch

from hooked_models import HookedModelError, HookedRecurrent
from tests.writesae_lens.fla_models import save_model
from tests.writesae_lens.published.made import checkpoint, save
from writesae_lens import WriteSAE


def sae(folder, tag="tiny-gdn", cell="L1_H2", d_k=32, d_v=48, kind="bilinear", **metadata):
    layer, head = (int(part[1:]) for part in cell.split("_"))
    held = checkpoint(kind, d_k=d_k, d_v=d_v, layer=layer, head=head)
    made = WriteSAE.from_checkpoint(save(folder / tag / cell, held))
    for name, value in metadata.items():
        made.cfg.metadata[name] = value
    return made


@pytest.mark.parametrize(
    ("tag", "d_k", "d_v"), [("tiny-gdn", 32, 48), ("tiny-mamba2", 32, 48), ("tiny-rwkv7", 32, 32)]
)
@pytest.mark.parametrize("kind", ["bilinear", "flat"])
def test_it_boots_and_the_sae_runs_on_it(tmp_path, tag, d_k, d_v, kind):
    """On tiny-mamba2 [head_dim, d_state] as published: the loader has turned it."""
    made = sae(tmp_path, tag, "L1_H2", d_k, d_v, kind)
    model = HookedRecurrent.for_sae(made)
    assert model.cfg.model_name == tag
    assert made.cfg.metadata.hook_name == model.state_hook_name(1, 2)
    tokens = model.to_tokens("It is a truth universally acknowledged", prepend_bos=False)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[made])
    found = [name for name in cache if name.endswith("hook_sae_acts_post")]
    assert found
    assert cache[found[0]].shape == (*tokens.shape, 24)


@pytest.mark.parametrize(
    ("kind", "tag", "cell", "sides"),
    [
        ("delta_net", "deltanet-1.3b", "L12_H8", (128, 128)),
        ("gla", "gla-1.3b", "L12_H0", (256, 512)),
    ],
)
def test_published_saes_of_flash_linear_attentions_models(tmp_path, monkeypatch, kind, tag, cell, sides):
    """A narrow model with the published one's cells lies where a download would."""
    made = sae(tmp_path, tag, cell, *sides)
    name = {"delta_net": "fla-hub/delta_net-1.3B-100B", "gla": "fla-hub/gla-1.3B-100B"}[kind]
    assert made.cfg.metadata.model_name == name
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    save_model(place / "snapshots" / "main", kind)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("main")
    model = HookedRecurrent.for_sae(made)
    layer, head = (int(part[1:]) for part in cell.split("_"))
    assert made.cfg.metadata.hook_name == model.state_hook_name(layer, head)
    assert model.cell(layer, head).architecture == kind
    tokens = model.to_tokens("It is a truth", prepend_bos=False)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[made])
    assert any(found.endswith("hook_sae_acts_post") for found in cache)


def test_options_of_the_metadata_and_of_the_caller(tmp_path):
    made = sae(tmp_path, model_from_pretrained_kwargs={"dtype": "bfloat16"})
    assert next(HookedRecurrent.for_sae(made).parameters()).dtype == torch.bfloat16
    assert next(HookedRecurrent.for_sae(made, dtype=torch.float64).parameters()).dtype == torch.float64


def test_the_metadata_has_no_say_in_running_code(tmp_path):
    """A model whose configuration names code, and an SAE that asks for it to be trusted."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    asked = {"trust_remote_code": True, "revision": None}
    made = sae(tmp_path, model_name=str(folder), model_from_pretrained_kwargs=asked)
    with pytest.raises(HookedModelError, match="unknown to transformers"):
        HookedRecurrent.for_sae(made)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"model_name": None}, ["set sae.cfg.metadata.model_name"]),
        ({"hook_name": None}, ["set sae.cfg.metadata.hook_name"]),
        ({"model_name": "tiny-nothing"}, ["no model 'tiny-nothing'", "tiny-gdn"]),
        ({"hook_name": "blocks.1.linear_attn.hook_state.9"}, ["no hook point is named", "hook_state"]),
        ({"model_name": "tiny-rwkv7"}, ["no hook point is named 'blocks.1.linear_attn.hook_state.2'"]),
        ({"hook_name": ["a"]}, ["set sae.cfg.metadata.hook_name"]),
        ({"d_k": 96, "d_v": 16, "kind": "flat"}, ["(96 x 16)", "32 x 48 = 1536"]),
        ({"d_k": 6, "d_v": 4}, ["24 numbers (6 x 4)", "32 x 48 = 1536"]),
    ],
)
def test_an_sae_without_its_model(tmp_path, options, parts):
    with pytest.raises(HookedModelError) as error:
        HookedRecurrent.for_sae(sae(tmp_path, **options))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
