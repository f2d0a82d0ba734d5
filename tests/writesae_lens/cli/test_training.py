"""``writesae-lens train``: SAELens's flags on named cells."""

import pytest
from sae_lens import SAE

from hooked_models import HookedModelError, HookedRecurrent
from tests.writesae_lens.cli.command_line import run
from writesae_lens import RECOMMENDED_SCHEDULE, WriteSAEError, WriteSAETrainingConfig
from writesae_lens.cli.training import parse_cells, run_training
from writesae_lens.saelens import saving

HOOK = "blocks.0.linear_attn.hook_write.0"


def flags(folder, **options):
    options = {
        "model_name": "tiny-gdn",
        "d_sae": 64,
        "k": 4,
        "lr": 2e-3,
        "context_size": 32,
        "training_tokens": 1024,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "output_path": folder / "saes",
        "checkpoint_path": folder / "checkpoints",
        "verbose": "false",
    } | options
    return [x for name, value in options.items() for x in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.mark.parametrize(
    ("options", "cells", "site", "hooks"),
    [
        ({}, "1:*", "write", [f"blocks.1.linear_attn.hook_write.{h}" for h in range(4)]),
        ({"architecture": "topk"}, "3:1", "write", ["blocks.3.linear_attn.hook_write.1"]),
        ({}, "0:2", "state", ["blocks.0.linear_attn.hook_state.2"]),
        ({"hook_name": HOOK}, None, "write", [HOOK]),
    ],
    ids=["a layer", "another architecture", "states", "a hook"],
)  # fmt: skip
def test_the_flags_train_cells(tmp_path, options, cells, site, hooks):
    saes = [SAE.load_from_disk(f) for f in run_training(flags(tmp_path, **options), cells, site)]
    assert [sae.cfg.metadata.hook_name for sae in saes] == hooks
    assert {(sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) for sae in saes} == {(1536, 64, 4)}
    assert {sae.cfg.architecture() for sae in saes} == {options.get("architecture", "writesae")}


def test_flags_that_are_not_given_are_the_recommended_recipe(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(saving.Runner, "run", lambda self: made.append(self.cfg))

    def config(*arguments):
        run_training([*arguments, "--model_name", "tiny-gdn", "--training_tokens", "20000"], "1:0")
        return made[-1]

    monkeypatch.chdir(tmp_path)
    recommended, schedule = config(), RECOMMENDED_SCHEDULE
    assert {name: getattr(recommended, name) for name in schedule} == schedule
    expected = WriteSAETrainingConfig.recommended(d_k=32, d_v=48).to_dict()
    made_by_flags = recommended.sae.to_dict()
    del expected["metadata"], made_by_flags["metadata"]
    assert made_by_flags == expected
    assert recommended.context_size == 256
    assert recommended.checkpoint_path.startswith("checkpoints/")
    own = config("--d_sae", "64", "--k", "6").sae
    assert (own.n_key, own.n_value, own.k_key, own.k_value) == (32, 32, 3, 3)
    own = config("--n_key", "48").sae
    assert (own.n_key, own.d_sae) == (48, 48 + recommended.sae.n_value)
    atoms = WriteSAETrainingConfig.atoms(d_k=32, d_v=48)
    own = config("--decoder", "factored").sae
    assert (own.decoder, own.d_sae, own.k) == ("factored", atoms.d_sae, atoms.k)
    own = config("--lr", "0.002")
    assert (own.lr, own.lr_end) == (0.002, 0.0002)
    assert own.train_batch_size_tokens == schedule["train_batch_size_tokens"]
    own = config("--train_batch_size_tokens", "1024")
    assert (own.lr, own.lr_end) == (schedule["lr"], schedule["lr_end"])
    assert own.train_batch_size_tokens == 1024


def test_cells_are_parsed(model):
    def cells(text):
        return [(c.layer, c.head) for c in parse_cells(model, text)]

    assert cells("1:2") == [(1, 2)]
    assert cells(" 3:1, 0:*,3:1") == [(3, 1), (0, 0), (0, 1), (0, 2), (0, 3)]
    assert cells("*:3") == [(0, 3), (1, 3), (3, 3)]
    assert len(cells("*:*")) == 12


@pytest.mark.parametrize("text", ["", "1", "1:", "a:b", "1:2;3:1", "1:-1", "1:2,", "1:²"])
def test_cells_that_cannot_be_read_are_refused(model, text):
    with pytest.raises(WriteSAEError, match="LAYER:HEAD"):
        parse_cells(model, text)


def test_cells_that_do_not_exist_are_refused(model):
    with pytest.raises(HookedModelError, match="no cell at layer 2"):
        parse_cells(model, "2:0")
    with pytest.raises(WriteSAEError, match="recurrent layers are 0, 1, 3"):
        parse_cells(model, "2:*")


@pytest.mark.parametrize(
    ("options", "cells", "message"),
    [
        ({"use_cached_activations": "true"}, "1:*", "use_cached_activations work for one cell"),
        ({"use_cached_activations": "true"}, "1:0", "say where the cache is"),
        ({"model_class_name": "HookedTransformer"}, "1:0", "llm_sae_training_runner"),
        ({"d_k": 8}, "1:0", "leave --d_k and --d_v out"),
        ({"hook_name": HOOK}, "1:0", "give one of them"),
        ({}, None, "give --cells or --hook_name"),
        (
            {"train_batch_size_tokens": 4096},
            "1:0",
            "Buffer size must be .* are 256 writes.*_in_buffer to 128",
        ),
        ({"training_tokens": 100}, "1:0", "training_tokens=100 is less than one batch"),
        ({"wandb_project": "mine"}, "1:0", "--wandb_project would do nothing: give --log_to_wandb true"),
        ({"context_size": -1}, "1:0", "SAELens refuses these flags .*context_size"),
        ({"dtype": "bfloat16"}, "1:0", "of the runner does not change the SAE.*--sae.dtype"),
        ({"dataset_path": "no/such/text.txt"}, "1:0", "there is no file or folder 'no/such/text.txt'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, options, cells, message):
    with pytest.raises(WriteSAEError, match=message):
        run_training(flags(tmp_path, **options), cells=cells)


def test_help_lists_our_options_and_saelens_flags():
    ours, theirs = run("train", "--help"), run("train", "--saelens-help")
    assert ours.returncode == theirs.returncode == 0
    assert {"--cells", "--saelens-help"} <= set(ours.stdout.split())
    assert "--read_alignment_coefficient" in theirs.stdout
    assert "--training_tokens" in theirs.stdout
