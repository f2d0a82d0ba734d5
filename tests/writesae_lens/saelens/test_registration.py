"""SAELens's own entry points, used as its documentation says, with nothing overridden."""

import importlib
import json

import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class, get_sae_training_class

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saelens import registration as saelens_plugin

HOOK = "blocks.1.linear_attn.hook_write.2"


def runner_config(folder, **options):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    cell = model.cell(1, 2)
    text = zoo.held_out_text()[:60_000]
    rows = [json.dumps({"text": t}) for t in text.split("\n\n")]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    return LanguageModelSAERunnerConfig(
        **(
            {
                "sae": WriteSAETrainingConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=128, k=4),
                "model_class_name": "HookedRecurrent",
                "model_name": "tiny-gdn",
                "hook_name": HOOK,
                "dataset_path": str(folder / "data"),
                "context_size": 64,
                "prepend_bos": False,
                "training_tokens": 16 * 1024,
                "train_batch_size_tokens": 256,
                "store_batch_size_prompts": 8,
                "n_batches_in_buffer": 8,
                "lr": 2e-3,
                "device": "cpu",
                "n_checkpoints": 0,
                "output_path": str(folder / "sae"),
                "logger": LoggingConfig(log_to_wandb=False),
            }
            | options
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner")
    sae = LanguageModelSAETrainingRunner(runner_config(folder)).run()
    return folder, sae


def test_the_stock_runner_trains_saves_and_loads(trained):
    folder, sae = trained
    assert isinstance(sae, WriteTrainingSAE)
    loaded = SAE.load_from_disk(folder / "sae")
    assert isinstance(loaded, WriteSAE)
    assert loaded.cfg.metadata.hook_name == HOOK
    assert loaded.cfg.metadata.model_class_name == "HookedRecurrent"
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    tokens = model.to_tokens(zoo.held_out_text()[100_000:104_000], prepend_bos=False)[:, :512]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
        x = cache[HOOK][0]
        error = (loaded(x) - x).square().sum()
    # Even so little training explains text that it never saw better than nothing does.
    assert error < 0.9 * x.square().sum()


def test_run_with_saes_swaps_the_write_and_puts_everything_back(trained):
    folder, _ = trained
    sae = SAE.load_from_disk(folder / "sae")
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    tokens = model.to_tokens("It is a truth universally acknowledged", prepend_bos=False)
    with torch.no_grad():
        native = model(tokens)
        spliced = model.run_with_saes(tokens, saes=[sae])
        by_hand = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: sae(x))])
        exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
        _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        after = model(tokens)
        _, again = model.run_with_cache(tokens, names_filter=[HOOK])
    assert (spliced - native).abs().max() > 1e-5
    torch.testing.assert_close(spliced, by_hand)
    torch.testing.assert_close(exact, native, atol=1e-4, rtol=1e-4)
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape == (1, tokens.shape[1], 128)
    assert torch.equal(after, native)
    assert list(again) == [HOOK]


def test_hooks_that_match_nothing_are_errors_in_the_runner_too(tmp_path):
    with pytest.raises(HookedModelError, match=r"hook_write\.9"):
        LanguageModelSAETrainingRunner(runner_config(tmp_path, hook_name="blocks.1.linear_attn.hook_write.9"))


def test_a_sae_of_another_size_is_refused(tmp_path):
    """Before the SAE sees anything, in one line that names both widths."""
    config = runner_config(tmp_path, sae=WriteSAETrainingConfig(d_k=8, d_v=8, d_sae=64, k=4))
    with pytest.raises(WriteSAEError, match=r"takes 64 numbers, .* gives 32 x 48 = 1536"):
        LanguageModelSAETrainingRunner(config).run()


def test_registration_is_complete_repeatable_and_refuses_a_rival(monkeypatch):
    assert get_sae_class("writesae")[0] is WriteSAE
    assert get_sae_training_class("writesae")[0] is WriteTrainingSAE
    saelens_plugin.register()
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "writesae", (SAE, object))
    with pytest.raises(WriteSAEError, match="another package"):
        saelens_plugin.register()


@pytest.mark.parametrize("name", saelens_plugin.LOADERS)
def test_every_saelens_module_that_loads_models_knows_ours(name):
    """Fails when SAELens moves or renames ``load_model``: the adapter must follow."""
    module = importlib.import_module(name)
    assert module.load_model.loads_hooked_recurrent
    with pytest.raises(ValueError, match="Unknown model class"):
        module.load_model("NoSuchModel", "x")
