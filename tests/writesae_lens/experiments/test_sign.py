"""The sign test against full edited forward passes, and against gradients through hooks."""

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_models import HookedModelError
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    bootstrap_interval,
    cached,
    column,
    make_sae,
    output_weights,
    read_passages,
    writes,
)
from writesae_lens.experiments import sign_test

CELL = (LAYER, HEAD)
HOW = {"n_trials": 9, "verbose": False}


def followed(model, passage, positions, targets, name, edit):
    """Each row's target logit at its own position, when a hook edits a batch of copies of the passage."""

    def hook(x, hook):
        x = x.clone()
        edit(x, torch.arange(len(positions)))
        return x

    rows = passage.expand(len(positions), -1)
    logits = model.run_with_hooks(rows, fwd_hooks=[(name, hook)])
    return logits[torch.arange(len(positions)), positions, targets].double()


def slopes(model, passage, positions, targets, layer, head):
    """d logit / d (what the head reads from its state), by autograd."""
    leaf = torch.zeros(len(positions), model.cell(layer, head).d_v, dtype=torch.float64, requires_grad=True)

    def edit(x, row):
        x[row, positions, head] += leaf

    name = model.hook_name(layer, "recurrence_out")
    total = followed(model, passage, positions, targets, name, edit).sum()
    return torch.autograd.grad(total, leaf)[0]


def along(model, passage, positions, targets, layer, head, matrices):
    """Measured change of the logits, and their derivative, along matrices added to the write."""
    name = model.write_hook_name(layer, head)
    size = torch.zeros(len(positions), 1, dtype=torch.float64, requires_grad=True)

    def edit(x, row, size=size):
        x[row, positions] += size * matrices.flatten(1)

    at_zero = followed(model, passage, positions, targets, name, edit)
    derivative = torch.autograd.grad(at_zero.sum(), size)[0][:, 0]
    with torch.no_grad():
        there = followed(model, passage, positions, targets, name, lambda x, row: edit(x, row, 1.0))
    return there - at_zero.detach(), derivative


@pytest.mark.parametrize(
    ("model", "direction", "magnitude", "layer", "head"),
    [
        ("tiny-gdn", "jacobian", 1.0, 1, 2),
        ("tiny-gdn", "unembedding", 2.0, 3, 0),
        ("tiny-mamba2", "jacobian", 0.3, 0, 3),
        ("tiny-mamba2", "unembedding", 1.0, 1, 9),
        ("tiny-rwkv7", "jacobian", 1.0, 0, 0),
        ("tiny-rwkv7", "unembedding", 1.0, 3, 1),
    ],
    indirect=["model"],
)
def test_every_trial_is_a_full_edited_forward_pass(model, direction, magnitude, layer, head):
    tokens = read_passages(model, 3)
    result = sign_test(model, (layer, head), tokens, direction, magnitude, n_trials=14, seed=5, verbose=False)
    records = result.records
    assert list(records.columns) == [
        "passage", "position", "token", "rank", "predicted", "linear", "measured",
    ]  # fmt: skip
    assert sorted(records.passage.value_counts()) == [4, 5, 5]
    w_o, w_u = output_weights(model, layer, head)
    key_name, _, read_name = model.write_factor_hook_names(layer)
    for n, part in records.groupby("passage"):
        at, target = column(part, "position"), column(part, "token")
        assert len(set(at.tolist())) == len(at)
        norm = magnitude * writes(model, tokens[n, None], layer, head)[0, at].flatten(1).norm(dim=-1)
        q = cached(model, tokens[n, None], read_name)[0, at, head].double()
        slope = slopes(model, tokens[n], at, target, layer, head)
        if direction == "jacobian":
            left, right = q, slope
            predicted = norm * q.norm(dim=-1) * slope.norm(dim=-1)
        else:
            left = cached(model, tokens[n, None], key_name)[0, at, head].double()
            left = left / left.norm(dim=-1, keepdim=True)
            right = w_u[target] @ w_o
            predicted = norm * (left * q).sum(-1) * right.norm(dim=-1)
        matrices = left[:, :, None] * right[:, None, :]
        matrices = matrices * (norm / matrices.flatten(1).norm(dim=-1))[:, None, None]
        measured, linear = along(model, tokens[n], at, target, layer, head, matrices)
        np.testing.assert_allclose(part.predicted, predicted, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(part.linear, linear, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.measured, measured, rtol=0, atol=1e-5)
        with torch.no_grad():
            native = model(tokens[n, None])[0, at].double()
        own = native.gather(1, target[:, None])
        # The margin of rounding above lets the token itself count.
        least, most = (1 + (native > own + margin).sum(-1).numpy() for margin in (1e-5, -1e-5))
        assert ((least <= part["rank"]) & (part["rank"] <= most)).all()
    check_summary(result.summary, records)
    if direction == "jacobian":
        assert (records.predicted > 0).all()


def check_summary(summary, records):
    """Every figure from the records, by its definition."""
    assert summary["n_trials_done"] == len(records)
    for suffix, name in (("", "predicted"), ("_linear", "linear")):
        agree = np.sign(records[name]) == np.sign(records.measured)
        assert summary[f"agreement{suffix}"] == pytest.approx(agree.mean())
        groups = [agree[records.passage == n] for n in records.passage.unique()]
        interval = bootstrap_interval(groups, np.mean)
        assert summary[f"agreement{suffix}_ci"] == pytest.approx(interval, abs=1e-9)
        pearson = np.corrcoef(records[name], records.measured)[0, 1]
        assert summary[f"pearson{suffix}"] == pytest.approx(pearson, abs=1e-9)
    rises = np.mean(records.measured > 0)
    assert summary["majority_sign"] == pytest.approx(max(rises, 1 - rises))
    assert summary["median_abs_shift"] == pytest.approx(np.median(np.abs(records.measured)))
    assert summary["mean_shift"] == pytest.approx(np.mean(records.measured))


def test_small_writes_move_logits_as_the_derivative_says(model):
    tokens = read_passages(model, 3)
    records = sign_test(model, CELL, tokens, "jacobian", magnitude=0.02, n_trials=30, verbose=False).records
    # Rounding of float32 logits is all that may be in the way.
    clear = records[records.linear > 5e-5]
    assert len(clear) > 20
    assert (clear.measured > 0).all()
    assert np.corrcoef(clear.linear, clear.measured)[0, 1] > 0.99


def test_trials_spread_over_passages_and_positions(gdn, passages):
    records = sign_test(gdn, CELL, passages, n_trials=90, verbose=False).records
    assert records.passage.value_counts().tolist() == [45, 45]
    for _, part in records.groupby("passage"):
        times = part.position.value_counts().reindex(range(20), fill_value=0)
        assert set(times) == {2, 3}
    assert records.token.between(0, gdn.cfg.d_vocab - 1).all()
    assert records.token.nunique() > 80


@pytest.mark.parametrize("n_trials", [1, 2])
def test_fewer_trials_than_passages(gdn, passages, tmp_path, n_trials):
    tokens = torch.cat([passages, passages.flip(1)])
    result = sign_test(gdn, CELL, tokens, n_trials=n_trials, verbose=False)
    assert len(result.records) == result.summary["n_trials_done"] == n_trials
    assert result.summary["pearson"] is None
    result.save(tmp_path)  # the figure too, and no NaN


def test_only_the_cell_of_an_sae_counts(gdn, passages):
    subjects = (CELL, gdn.cell(*CELL), make_sae(gdn, "state"))
    first, *others = (sign_test(gdn, subject, passages, **HOW) for subject in subjects)
    for other in others:
        pd.testing.assert_frame_equal(other.records, first.records)
    another = sign_test(gdn, (LAYER, HEAD + 1), passages, **HOW)
    assert not np.allclose(another.records.measured, first.records.measured)
    for cell in ((LAYER, 4), (2, 0), (-1, 0)):
        with pytest.raises(HookedModelError, match="no cell at layer"):
            sign_test(gdn, cell, passages, **HOW)


def test_another_seed_draws_other_positions_and_tokens(gdn, passages):
    one, other = (sign_test(gdn, CELL, passages, seed=s, **HOW).records for s in (1, 2))
    assert one.position.tolist() != other.position.tolist()
    assert one.token.tolist() != other.token.tolist()


def test_no_movement_is_no_agreement():
    """Two zeros have no sign in common, and a guess that always says "up" is measured by its own share."""
    from writesae_lens.experiments.sign import _summarize

    predicted, measured = [1.0, 0.0, -1.0, 2.0, 0.0], [3.0, 0.0, 1.0, 1.0, -2.0]
    records = pd.DataFrame({"predicted": predicted, "linear": measured, "measured": measured, "passage": 0})
    summary = _summarize(records, 0)
    assert (summary["agreement"], summary["n_still"]) == (pytest.approx(2 / 3), 2)
    assert (summary["agreement_linear"], summary["n_still_linear"]) == (1.0, 1)
    assert summary["majority_sign"] == pytest.approx(3 / 4)


def test_the_headline_names_the_papers_prediction_and_the_derivative_apart(gdn, passages):
    found = {d: sign_test(gdn, CELL, passages, d, **HOW) for d in ("unembedding", "jacobian")}
    assert sign_test(gdn, CELL, passages, **HOW).headline == found["unembedding"].headline
    summary = found["unembedding"].summary
    shares = (f"{summary[name]:.1%}" for name in ("agreement", "agreement_linear", "majority_sign"))
    places = [found["unembedding"].headline.index(share) for share in shares]
    assert places == sorted(places)
    assert "as the paper predicts" in found["unembedding"].headline
    assert "a check of the derivative" in found["jacobian"].headline
