"""``writesae-lens train``: SAELens's flags on named cells, several from one forward pass."""

import sys

import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens.training.activation_scaler import ActivationScaler
from typer.testing import CliRunner

from hooked_models import HookedModelError, HookedRecurrent
from writesae_lens import WriteSAE, WriteSAEError, WriteTrainingSAE
from writesae_lens.cli import app, main
from writesae_lens.experiments import replacement_test
from writesae_lens.saelens import runner as train
from writesae_lens.saelens.runner import parse_cells, run_training


def concat_passages(model, documents, size, count):
    """The first passages of the text as SAELens cuts them: documents one after another, BOS between."""
    ids = []
    for document in documents:
        ids += [] if not ids else [model.tokenizer.bos_token_id]
        ids += model.to_tokens(document, prepend_bos=False, truncate=False)[0].tolist()
        if len(ids) >= size * count:
            break
    return torch.tensor(ids[: size * count]).view(count, size)


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


def test_all_heads_of_a_layer_train_from_one_command(tmp_path, monkeypatch):
    """Each in a folder of its own, at its own hook; the model runs once a batch of prompts."""
    passes = []
    run_with_cache = HookedRecurrent.run_with_cache
    monkeypatch.setattr(
        HookedRecurrent,
        "run_with_cache",
        lambda self, tokens, *a, **k: passes.append(len(tokens)) or run_with_cache(self, tokens, *a, **k),
    )
    folders = run_training(flags(tmp_path), cells="1:*")
    assert [f.name for f in folders] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert sum(passes) * 32 <= 2 * 1024
    saes = [SAE.load_from_disk(folder) for folder in folders]
    assert [s.cfg.metadata.hook_name for s in saes] == [
        f"blocks.1.linear_attn.hook_write.{h}" for h in range(4)
    ]
    assert all(isinstance(s, WriteSAE) and (s.cfg.d_k, s.cfg.d_v, s.cfg.d_sae) == (32, 48, 64) for s in saes)
    assert len({float(s.W_dec.detach().sum()) for s in saes}) == 4


@pytest.mark.parametrize(
    ("options", "how", "hook", "d_in"),
    [
        ({"architecture": "topk"}, {"cells": "3:1"}, "blocks.3.linear_attn.hook_write.1", 1536),
        ({}, {"cells": "0:2", "site": "state"}, "blocks.0.linear_attn.hook_state.2", 1536),
        ({"hook_name": "blocks.0.linear_attn.hook_write.0"}, {}, "blocks.0.linear_attn.hook_write.0", 1536),
        ({"model_name": "tiny-mamba2"}, {"cells": "4:4"}, "blocks.4.mixer.hook_write.4", 48 * 32),
    ],
    ids=["another architecture", "states", "a hook", "another model"],
)
def test_sizes_and_hooks_come_from_the_model(tmp_path, options, how, hook, d_in):
    (folder,) = run_training(flags(tmp_path, training_tokens=256, **options), **how)
    sae = SAE.load_from_disk(folder)
    assert (sae.cfg.metadata.hook_name, sae.cfg.d_in) == (hook, d_in)
    assert sae.cfg.architecture() == options.get("architecture", "writesae")


def test_the_seed_decides(tmp_path):
    saes = [
        SAE.load_from_disk(run_training(flags(tmp_path / str(i), seed=seed), cells="1:0")[0])
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (sae.W_dec.detach() for sae in saes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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
        ({"model_class_name": "HookedTransformer"}, "1:0", "llm_sae_training_runner"),
        ({"d_k": 8}, "1:0", "leave --d_k and --d_v out"),
        ({"hook_name": "blocks.1.linear_attn.hook_write.0"}, "1:0", "give one of them"),
        ({}, None, "give --cells or --hook_name"),
        ({"use_cached_activations": "true"}, "1:0", "say where the cache is"),
        ({"train_batch_size_tokens": 4096}, "1:0", "Buffer size must be"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, options, cells, message):
    with pytest.raises(WriteSAEError, match=message):
        run_training(flags(tmp_path, **options), cells=cells)


@pytest.mark.parametrize("cells", ["1:0", "1:*"])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tmp_path, monkeypatch, cells):
    step, count = WriteTrainingSAE.training_forward_pass, []

    def interrupted(self, step_input):
        count.append(None)
        if len(count) == 13:
            raise KeyboardInterrupt
        return step(self, step_input)

    monkeypatch.setattr(WriteTrainingSAE, "training_forward_pass", interrupted)
    with pytest.raises(WriteSAEError, match="interrupted; go on with the same command") as error:
        run_training(flags(tmp_path, training_tokens=4096), cells=cells)
    checkpoint = str(error.value).rsplit(" ", 1)[1]
    folders = run_training(
        flags(tmp_path, training_tokens=4096, resume_from_checkpoint=checkpoint), cells=cells
    )
    assert all(SAE.load_from_disk(folder).cfg.d_sae == 64 for folder in folders)
    # Both parts together made as many steps as a whole run, give or take the interrupted one.
    per_sae = len(count) / len(folders)
    assert 31 <= per_sae <= 34


@pytest.mark.parametrize("runner_class", [LanguageModelSAETrainingRunner, MultiSAETrainingRunner])
def test_the_win_rate_is_measured_on_demand(tmp_path, monkeypatch, model, runner_class):
    """As `replacement_test` gives it on the same passages, beside SAELens's own evaluations."""
    made = []
    monkeypatch.setattr(runner_class, "run", lambda self: made.append(self))
    cells = "1:0" if runner_class is LanguageModelSAETrainingRunner else "1:0,1:1"
    run_training(flags(tmp_path, n_eval_batches=1, log_to_wandb="true"), cells=cells, win_rate_passages=2)
    (runner,) = made
    single = runner_class is LanguageModelSAETrainingRunner
    saes = {"": runner.sae} if single else {f"{name}/": sae for name, sae in runner.saes.items()}
    runner._set_sae_metadata()
    if single:
        metrics = runner.evaluator(runner.sae, iter(()), ActivationScaler())
    else:
        scalers = {name: ActivationScaler() for name in runner.saes}
        metrics = runner.evaluator(
            saes=runner.saes, data_provider=iter(()), activation_scalers=scalers, hook_names={}
        )
    text = train.shipped_text()[0]
    passages = concat_passages(model, text, 32, 2)
    for prefix, sae in saes.items():
        expected = replacement_test(model, sae, passages, verbose=False).summary
        assert metrics[f"{prefix}replacement/win_rate"] == pytest.approx(expected["win_rate"])
        assert metrics[f"{prefix}replacement/median_cosine"] == pytest.approx(expected["median_cosine"])
    assert any(key.endswith("model_performance_preservation") for key in metrics)


def test_help_lists_our_options_and_where_saelens_flags_are():
    ours = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert ours.exit_code == 0
    assert "--cells" in ours.stdout
    assert "--saelens-help" in ours.stdout


def test_saelens_flags_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["writesae-lens", "train", "--saelens-help"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    listed = capsys.readouterr().out
    assert "--read_alignment_coefficient" in listed
    assert "--training_tokens" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to train"),
        (["--cells", "1:0", "--site", "read"], "'read' is not one of 'write', 'state'"),
        (["--model_name", "tiny-gdn", "--cells", "9:9", "--k", "4"], "no cell at layer 9"),
        (["--model_name", "tiny-gdn", "--cells", "1:0", "--no_such_flag", "4"], "no_such_flag"),
        (["--model_name", "tiny-gdn", "--cells", "1:0", "--k", "many"], "many"),
    ],
)
def test_bad_command_lines_get_one_line_and_status_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["writesae-lens", "train", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
