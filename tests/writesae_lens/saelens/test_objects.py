"""WriteSAEs as SAELens objects: built, copied, loaded, folded, run with their own hooks."""

import copy
import json

import pytest
import torch
from sae_lens import SAE, TrainingSAE

from tests.writesae_lens.saelens.runs import HOOK, dense, dense_encode, same_weights, writes
from writesae_lens import WriteSAE, WriteTrainingSAE


def test_from_dict_builds_the_same_kind_of_sae(run):
    sae = SAE.load_from_disk(run.saved)
    for original, kind, base in ((sae, WriteSAE, SAE), (run.sae, WriteTrainingSAE, TrainingSAE)):
        built = base.from_dict(original.cfg.to_dict())
        assert type(built) is kind
        assert built.cfg.to_dict() == original.cfg.to_dict()
        stored = base.from_dict(json.loads(json.dumps(original.cfg.to_dict())))
        assert json.dumps(stored.cfg.to_dict()) == json.dumps(original.cfg.to_dict())
        shapes = [{n: p.shape for n, p in x.named_parameters()} for x in (built, original)]
        assert shapes[0] == shapes[1]


def test_copies_are_independent_and_conversions_complete(run, model, rows):
    sae = SAE.load_from_disk(run.saved)
    x = writes(model, HOOK, rows[-4:])
    expected = dense(sae, x)
    twin = copy.deepcopy(sae)
    with torch.no_grad():
        twin.dec_key.zero_()
    torch.testing.assert_close(sae(x), expected, atol=1e-5, rtol=1e-4)
    wide = copy.deepcopy(sae).to(dtype=torch.float64)
    assert (wide.cfg.dtype, wide.dtype) == ("float64", torch.float64)
    torch.testing.assert_close(wide(x.double()), dense(wide, x.double()))
    torch.testing.assert_close(wide(x.double()).float(), expected, atol=1e-5, rtol=1e-4)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    error = (dense(half.to(torch.float32), x) - x).square().sum()
    assert error < 1.1 * (expected - x).square().sum() + 1e-3


@pytest.mark.parametrize("cls", [SAE, TrainingSAE])
def test_loading_fills_every_tensor(run, tmp_path, cls):
    """SAELens builds on the meta device and then assigns: nothing may be left behind there."""
    (run.sae.save_model if cls is TrainingSAE else run.sae.save_inference_model)(tmp_path / "sae")
    sae = cls.load_from_disk(tmp_path / "sae", device="cpu")
    tensors = dict(sae.named_parameters()) | dict(sae.named_buffers())
    tensors |= {n: v for n, v in vars(sae).items() if isinstance(v, torch.Tensor)}
    assert all(v.device.type == "cpu" and torch.isfinite(v).all() for v in tensors.values())
    assert (sae.cfg.device, sae.device) == ("cpu", torch.device("cpu"))
    assert same_weights(sae, run.sae)


def test_folding_decoder_norms_on_loading_changes_nothing(run, model, rows):
    x = writes(model, HOOK, rows[-4:])
    plain = SAE.load_from_disk(run.saved)
    folded = SAE.load_from_disk(run.saved, fold_W_dec_norm=True)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(64))
    torch.testing.assert_close(folded(x), dense(plain, x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(folded.encode(x), dense_encode(plain, x), atol=1e-5, rtol=1e-4)


def test_an_sae_runs_with_its_own_hooks_and_cache(run, model, rows):
    sae = SAE.load_from_disk(run.saved)
    x = writes(model, HOOK, rows[-4:])
    acts = dense_encode(sae, x)
    out, cache = sae.run_with_cache(x)
    torch.testing.assert_close(cache["hook_sae_acts_post"], acts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache["hook_sae_output"], out)
    off = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda a, hook: 0 * a)])
    torch.testing.assert_close(off, sae.b_dec.detach().expand_as(x))


def test_an_sae_has_its_own_hook_names_again_after_a_spliced_run(run, model, rows):
    sae = SAE.load_from_disk(run.saved)
    tokens = rows[-2:]
    with torch.no_grad():
        model.run_with_saes(tokens, saes=[sae])
        _, cache = sae.run_with_cache(writes(model, HOOK, tokens))
    assert "hook_sae_acts_post" in cache
