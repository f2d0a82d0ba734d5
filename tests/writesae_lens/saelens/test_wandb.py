"""What SAELens logs to Weights & Biases, offline."""

import copy
import math

import pytest
import torch
import wandb
from sae_lens import LoggingConfig

from hooked_models import zoo
from tests.writesae_lens.saelens.runs import (
    BATCH,
    HOOK,
    dense_decode,
    dense_encode,
    make_multi_runner,
    make_runner,
    sae_config,
    watch_steps,
)
from writesae_lens import WriteSAEError, WriteTrainingSAE
from writesae_lens.experiments.result import read_table
from writesae_lens.saelens.runner import train_cells
from writesae_lens.saelens.win_rate import log_win_rate


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B without a network, all of it under the test's folder; gives what is logged, by step."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb").mkdir()
    logged, log = [], wandb.Run.log

    def recording(self, data, step=None, **options):
        logged.append((step, data))
        return log(self, data, step=step, **options)

    monkeypatch.setattr(wandb.Run, "log", recording)
    yield logged
    wandb.teardown()  # it keeps settings for as long as it lives


def logger():
    return LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=2)


def test_what_is_logged_to_wandb(model, rows, tmp_path, offline):
    """Losses and metrics of logging steps and evaluations are those of the dense computation."""
    runner = make_runner(
        tmp_path,
        rows,
        training_tokens=40 * BATCH,
        n_checkpoints=1,
        n_eval_batches=1,
        eval_batch_size_prompts=4,
        feature_sampling_window=25,
        logger=logger(),
    )
    saes, inputs, tokens = {}, {}, {}
    batch = runner.activations_store.get_batch_tokens

    def record(step_input):
        saes[step_input.n_training_steps] = copy.deepcopy(runner.sae.state_dict())
        inputs[step_input.n_training_steps] = step_input.sae_in

    def drawn(*args, **options):
        out = batch(*args, **options)
        if len(out) == 4:
            tokens.setdefault(max(inputs), []).append(out)
        return out

    watch_steps(runner.sae, record)
    runner.activations_store.get_batch_tokens = drawn
    runner.run()

    training = {n: row for n, row in offline if "losses/overall_loss" in row}
    assert sorted(training) == [9, 19, 29, 39]
    sae = WriteTrainingSAE(copy.deepcopy(runner.sae.cfg))
    for n, row in training.items():
        sae.load_state_dict(saes[n])
        x = inputs[n]
        acts = dense_encode(sae, x)
        squared = (dense_decode(sae, acts) - x).square().sum(-1)
        variance = (x - x.mean(0)).square().sum(-1)
        losses = {key: value for key, value in row.items() if key.startswith("losses/")}
        assert losses.pop("losses/overall_loss") == pytest.approx(sum(losses.values()), rel=1e-4)
        assert row["losses/mse_loss"] == pytest.approx(float(squared.mean()), rel=1e-3)
        explained = float(1 - squared.mean() / variance.mean())
        assert row["metrics/explained_variance"] == pytest.approx(explained, abs=1e-3)
        assert row["metrics/l0"] == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-3)
        assert row["details/n_training_samples"] == (n + 1) * BATCH
        assert all(math.isfinite(value) for value in row.values())

    evaluations = {n: row for n, row in offline if "model_performance_preservation" in row}
    assert sorted(evaluations) == [19, 39]
    for n, row in evaluations.items():
        first = tokens[n][0]
        with torch.no_grad():
            native = model(first, return_type="loss")
            zeros = [(HOOK, lambda x, hook: torch.zeros_like(x))]
            zeroed = model.run_with_hooks(first, return_type="loss", fwd_hooks=zeros)
        ce = row["model_performance_preservation"]
        assert ce["ce_loss_without_sae"] == pytest.approx(float(native), rel=1e-4)
        assert ce["ce_loss_with_ablation"] == pytest.approx(float(zeroed), rel=1e-4)
        assert isinstance(row["weights/encoder_norms"], wandb.Histogram)
    sparsity = {n: row for n, row in offline if "sparsity/below_1e-5" in row}
    assert sorted(sparsity) == [25]

    (file,) = (tmp_path / "wandb").rglob("*.wandb")
    stored = file.read_bytes()
    name = f"sae_tiny-gdn_{HOOK}_64"
    for text in (
        "losses/mse_loss",
        "ce_loss_with_sae",
        "weights/encoder_norms",
        f"{name}_log_feature_sparsity",
    ):
        assert text.encode() in stored


def test_several_saes_log_under_their_own_names(model, rows, tmp_path, offline):
    options = {"training_tokens": 20 * BATCH, "n_eval_batches": 1, "checkpoint_path": None}
    hooks = {"a": model.write_hook_name(1, 0), "b": HOOK}
    make_multi_runner(tmp_path, rows, hooks, logger=logger(), **options).run()
    logged = {n: row for n, row in offline if "a/losses/mse_loss" in row}
    assert sorted(logged) == [9, 19]
    assert all(math.isfinite(value) for row in logged.values() for value in row.values())
    assert any("b/model_performance_preservation" in row for _, row in offline)
    assert any("b/weights/encoder_norms" in row for _, row in offline)


def test_codes_are_logged(rows, tmp_path, offline):
    """Their losses, evaluations and counts, with the replacement test's figures."""
    sizes = {"n_key": 300, "n_value": 40, "k_key": 2, "k_value": 3}
    runner = make_runner(
        tmp_path,
        rows,
        sae=sae_config(decoder="codes", **sizes),
        training_tokens=10 * BATCH,
        n_eval_batches=1,
        eval_batch_size_prompts=4,
        dead_feature_window=3,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=2),
    )
    log_win_rate(runner, 1)
    runner.run()
    rows_of_steps = {n: row for n, row in offline if "losses/overall_loss" in row}
    assert sorted(rows_of_steps) == [4, 9]
    for row in rows_of_steps.values():
        losses = {key: value for key, value in row.items() if key.startswith("losses/")}
        assert losses.pop("losses/overall_loss") == pytest.approx(sum(losses.values()), rel=1e-4)
        assert set(losses) == {
            f"losses/{name}_loss" for name in ("mse", "auxiliary_reconstruction", "read_alignment")
        }
        assert 2 < row["metrics/l0"] <= 5
        assert all(math.isfinite(value) for value in row.values())
    last = rows_of_steps[9]
    assert 0 < last["sparsity/dead_features"] <= 340
    assert 0.3 < last["metrics/write_cosine"] <= 1
    (evaluation,) = [row for _, row in offline if "replacement/median_recovered" in row]
    assert isinstance(evaluation["weights/encoder_norms"], wandb.Histogram)


@pytest.mark.parametrize("model_name", ["Qwen/Qwen3.5-397B-A17B-Instruct", "fla-hub/rwkv7-2.9B-world3-g1"])
def test_artifact_names_of_hub_models_fit(model_name):
    """W&B takes 128 characters."""
    sae = WriteTrainingSAE(sae_config(d_sae=131_072, d_k=2, d_v=2))
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = "blocks.63.linear_attn.hook_write.127"
    name = sae.get_name().replace("/", "__") + "_log_feature_sparsity"
    assert len(name) <= 128
    wandb.Artifact(name, type="model")


def test_wandb_takes_a_model_from_a_long_local_path(rows, tmp_path, offline):
    folder = tmp_path / ("a-long-folder-name-" * 4) / "models" / "tiny-gdn"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(zoo.model_path("tiny-gdn"))
    make_runner(tmp_path, rows, model_name=str(folder), training_tokens=512, logger=logger()).run()


def test_a_run_for_each_cell_when_asked(tmp_path, offline, monkeypatch):
    """The rows of each cell's training.csv, in runs of their own beside the one of the training."""
    names, init = [], wandb.init

    def recording(*args, **options):
        names.append((options.get("name"), options.get("group")))
        return init(*args, **options)

    monkeypatch.setattr(wandb, "init", recording)
    log = LoggingConfig(log_to_wandb=True, run_name="both", eval_every_n_wandb_logs=1000)
    options = {"training_tokens": 8_000, "context_size": 64, "n_batches_in_buffer": 4}
    train_cells("tiny-gdn", [(1, 0), (1, 1)], tmp_path, **options, logger=log, wandb_run_per_cell=True)
    assert names == [("both", None), ("L1H0", "both"), ("L1H1", "both")]
    for name in ("L1H0", "L1H1"):
        rows = read_table(tmp_path / name / "training.csv")
        losses = [(step, data["loss"]) for step, data in offline if "unexplained" in data]
        assert set(zip(rows.step, rows.loss)) <= set(losses)
    assert len(losses) == 2 * len(rows)
    with pytest.raises(WriteSAEError, match=r"--log_to_wandb true"):
        train_cells("tiny-gdn", [(1, 0), (1, 1)], tmp_path, **options, wandb_run_per_cell=True)
