"""Training curves on disk: rows as they come, of every type of SAE, and over an interruption."""

import pandas as pd
import pytest

from writesae_lens.saelens.runner import run_training

FLAGS = ["--model_name", "tiny-gdn", "--d_sae", "32", "--k", "2", "--context_size", "32", "--training_tokens",
         "1280", "--train_batch_size_tokens", "64", "--store_batch_size_prompts", "4",
         "--n_batches_in_buffer", "4", "--lr", "1e-3", "--device", "cpu"]  # fmt: skip
STEPS = 20


def rows(folder):
    return pd.read_csv(folder / "training.csv")


def test_every_step_of_a_short_run_has_its_row(tmp_path):
    (folder,) = run_training([*FLAGS, "--n_checkpoints", "0", "--output_path", str(tmp_path / "sae")], "1:3")
    found = rows(folder)
    assert found.step.tolist() == list(range(STEPS))
    assert (found.l0 <= 2).all()
    assert found.dead.iloc[0] == 0
    assert found.unexplained.between(0, 10).all()
    assert found.cosine.between(-1, 1).all()
    terms = [name for name in found if name.endswith("_loss")]
    assert found[terms].sum(axis=1).to_numpy() == pytest.approx(found.loss.to_numpy(), rel=1e-5)
    # A second run into the same folder begins a file of its own.
    run_training([*FLAGS, "--n_checkpoints", "0", "--output_path", str(tmp_path / "sae")], "1:3")
    assert len(rows(folder)) == STEPS


@pytest.mark.parametrize("cells", ["1:3", "1:2,1:3"])
def test_a_resumed_run_goes_on_in_its_file(cells, tmp_path):
    flags = [*FLAGS, "--n_checkpoints", "1", "--checkpoint_path", str(tmp_path / "ck")]
    flags += ["--output_path", str(tmp_path / "sae")]
    folders = run_training(flags, cells)
    before = rows(folders[-1])
    checkpoint = min((tmp_path / "ck").glob("*/*"), key=lambda p: int(p.name.removeprefix("final_")))
    steps = int(checkpoint.name) // 64
    assert 0 < steps < STEPS
    folders = run_training([*flags, "--resume_from_checkpoint", str(checkpoint)], cells)
    after = rows(folders[-1])
    assert after.step.tolist() == list(range(STEPS))
    pd.testing.assert_frame_equal(after[: steps - 1], before[: steps - 1])


def test_saelens_own_types_are_recorded_too(tmp_path):
    flags = [*FLAGS, "--architecture", "topk", "--n_checkpoints", "0", "--output_path", str(tmp_path / "sae")]
    (folder,) = run_training(flags, "1:3")
    found = rows(folder)
    assert found.step.tolist() == list(range(STEPS))
    assert found.unexplained.notna().all()
    assert "cosine" not in found
