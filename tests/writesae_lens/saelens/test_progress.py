"""What a run of SAELens's own runners shows and keeps: a bar with the loss, training.csv beside each SAE."""

import pandas as pd
import pytest
from sae_lens import TopKTrainingSAEConfig

from tests.writesae_lens.saelens.runs import BATCH, HOOK, TOKENS, batches_of, make_multi_runner, make_runner
from writesae_lens.saelens import progress
from writesae_lens.saelens.history import reached

STEPS = TOKENS // BATCH


def test_a_stock_run_leaves_its_curves_and_says_what_it_reached(rows, tmp_path):
    runner = make_runner(tmp_path, rows)
    seen = batches_of(runner.sae)
    runner.run()
    curves = pd.read_csv(tmp_path / "sae" / "training.csv")
    assert curves.step.tolist() == list(range(STEPS))
    assert len(seen) == STEPS
    last = curves.tail(20)
    assert reached(tmp_path / "sae") == (
        f"loss {last.loss.mean():.3g}, {last.unexplained.mean():.1%} of |X|² unexplained, "
        f"{last.l0.mean():.1f} features a write, {curves.dead.iloc[-1]:.0f} dead features"
    )


def test_a_stock_run_of_several_leaves_the_curves_of_each(rows, tmp_path):
    make_multi_runner(tmp_path, rows, {"a": HOOK, "b": HOOK.replace("write.2", "write.3")}).run()
    curves = [pd.read_csv(tmp_path / "saes" / name / "training.csv") for name in "ab"]
    assert [len(curve) for curve in curves] == [STEPS, STEPS]
    assert curves[0].loss.iloc[-1] != curves[1].loss.iloc[-1]


def test_other_types_leave_their_curves_too(rows, tmp_path):
    make_runner(tmp_path, rows, sae=TopKTrainingSAEConfig(d_in=1536, d_sae=64, k=4)).run()
    assert len(pd.read_csv(tmp_path / "sae" / "training.csv")) == STEPS
    assert reached(tmp_path / "sae").startswith("loss ")


def test_the_bar_shows_loss_and_rate_and_ends_full(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0)
    make_runner(tmp_path, rows).run()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    shown = [line for line in lines if "Training SAE" in line and "loss" in line]
    assert len(shown) >= STEPS // 4
    assert all("tokens/s" in line and "% unexplained" in line for line in shown)
    assert "100%" in shown[-1]
    curves = pd.read_csv(tmp_path / "sae" / "training.csv")
    end = f"loss {curves.loss.iloc[-1]:.3g}, {curves.unexplained.iloc[-1]:.1%} unexplained"
    assert end in shown[-1]


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_checkpoints_of_a_stock_run_have_its_curves(rows, tmp_path, checkpoints):
    make_runner(tmp_path, rows, n_checkpoints=checkpoints).run()
    assert (tmp_path / "sae" / "training.csv").is_file()
    kept = list((tmp_path / "checkpoints").glob("*/*/training.csv"))
    assert len(kept) == checkpoints
