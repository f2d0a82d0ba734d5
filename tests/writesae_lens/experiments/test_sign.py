"""The sign test against full edited forward passes, and against gradients through hooks."""

import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import sign as signs
from writesae_lens.experiments import sign_test

LAYER, HEAD = 1, 2
HOW = {"n_trials": 9, "verbose": False}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 3 * 20].view(3, 20)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def passages(gdn):
    return gdn.to_tokens(zoo.held_out_text()[:2000], prepend_bos=False, truncate=False)[0, :40].view(2, 20)


def make_sae(model, kind="write", layer=LAYER, head=HEAD, **options):
    torch.manual_seed(0)
    cell = model.cell(layer, head)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    return sae


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
    name = model.write_factor_hook_names(layer)[2].replace("hook_read", "hook_recurrence_out")
    leaf = torch.zeros(len(positions), model.cell(layer, head).d_v, dtype=torch.float64, requires_grad=True)

    def edit(x, row):
        x[row, positions, head] += leaf

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
def test_every_trial_is_a_full_edited_forward_pass(model, tokens, direction, magnitude, layer, head):
    result = sign_test(model, (layer, head), tokens, direction, magnitude, n_trials=14, seed=5, verbose=False)
    records, cell = result.records, model.cell(layer, head)
    assert list(records.columns) == [
        "passage",
        "position",
        "token",
        "rank",
        "predicted",
        "linear",
        "measured",
    ]
    assert sorted(records.passage.value_counts()) == [4, 5, 5]
    mixer = model.mixers[layer]._layer
    projection = getattr(mixer, "out_proj", None) or mixer.o_proj
    w_o = projection.weight[:, head * cell.d_v : (head + 1) * cell.d_v].detach().double()
    w_u = model.original_model.get_output_embeddings().weight.detach().double()
    write, (key, _, read) = model.write_hook_name(layer, head), model.write_factor_hook_names(layer)
    for n, part in records.groupby("passage"):
        passage = tokens[n]
        at, target = (torch.as_tensor(part[c].to_numpy(copy=True)) for c in ("position", "token"))
        assert len(set(at.tolist())) == len(at)
        with torch.no_grad():
            logits, cache = model.run_with_cache(passage[None], names_filter=[write, key, read])
        norm = magnitude * cache[write][0, at].norm(dim=-1)
        q = cache[read][0, at, head].double()
        slope = slopes(model, passage, at, target, layer, head)
        if direction == "jacobian":
            left, right = q, slope
            predicted = norm * q.norm(dim=-1) * slope.norm(dim=-1)
        else:
            left = cache[key][0, at, head].double()
            left = left / left.norm(dim=-1, keepdim=True)
            right = w_u[target] @ w_o
            predicted = norm * (left * q).sum(-1) * right.norm(dim=-1)
        matrices = left[:, :, None] * right[:, None, :]
        matrices = matrices * (norm / matrices.flatten(1).norm(dim=-1))[:, None, None]
        measured, linear = along(model, passage, at, target, layer, head, matrices)
        np.testing.assert_allclose(part.predicted, predicted, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(part.linear, linear, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.measured, measured, rtol=0, atol=1e-5)
        native = logits[0, at].double()
        own = native.gather(1, target[:, None])
        least, most = (1 + (native > own + margin).sum(-1).numpy() for margin in (1e-5, -1e-5))
        # The margin above lets the token itself count.
        assert ((least <= part["rank"]) & (part["rank"] <= most)).all()
    check_summary(result.summary, records)
    if direction == "jacobian":
        assert (records.predicted > 0).all()


def check_summary(summary, records):
    """Every figure from the records, by its definition."""
    count, z = len(records), 1.959963984540054
    assert summary["n_trials_done"] == count
    for suffix, column in (("", "predicted"), ("_linear", "linear")):
        share = np.mean(np.sign(records[column]) == np.sign(records.measured))
        assert summary[f"agreement{suffix}"] == pytest.approx(share)
        middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        assert summary[f"agreement{suffix}_ci"] == pytest.approx([middle - half, middle + half], abs=1e-9)
        pearson = np.corrcoef(records[column], records.measured)[0, 1]
        assert summary[f"pearson{suffix}"] == pytest.approx(pearson, abs=1e-9)
    assert summary["median_abs_shift"] == pytest.approx(np.median(np.abs(records.measured)))
    assert summary["mean_shift"] == pytest.approx(np.mean(records.measured))


def test_small_writes_move_logits_as_the_derivative_says(model, tokens):
    records = sign_test(model, (LAYER, HEAD), tokens, magnitude=0.02, n_trials=30, verbose=False).records
    # Rounding of float32 logits is all that may be in the way.
    clear = records[records.linear > 5e-5]
    assert len(clear) > 20
    assert (clear.measured > 0).all()
    assert np.corrcoef(clear.linear, clear.measured)[0, 1] > 0.99


def test_trials_spread_over_passages_and_positions(gdn, passages):
    records = sign_test(gdn, (LAYER, HEAD), passages, n_trials=90, verbose=False).records
    assert records.passage.value_counts().tolist() == [45, 45]
    for _, part in records.groupby("passage"):
        times = part.position.value_counts().reindex(range(20), fill_value=0)
        assert set(times) == {2, 3}
    assert records.token.between(0, gdn.cfg.d_vocab - 1).all()
    assert records.token.nunique() > 80


@pytest.mark.parametrize("n_trials", [1, 2])
def test_fewer_trials_than_passages(gdn, passages, tmp_path, n_trials):
    tokens = torch.cat([passages, passages.flip(1)])
    result = sign_test(gdn, (LAYER, HEAD), tokens, n_trials=n_trials, verbose=False)
    assert len(result.records) == result.summary["n_trials_done"] == n_trials
    assert result.summary["pearson"] is None
    json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)


def test_only_the_cell_of_an_sae_counts(gdn, passages):
    subjects = (
        (LAYER, HEAD),
        gdn.cell(LAYER, HEAD),
        make_sae(gdn, "state"),
    )
    first, *others = (sign_test(gdn, subject, passages, **HOW) for subject in subjects)
    for other in others:
        pd.testing.assert_frame_equal(other.records, first.records)
    another = sign_test(gdn, (LAYER, HEAD + 1), passages, **HOW)
    assert not np.allclose(another.records.measured, first.records.measured)


def test_one_passage_is_enough(gdn, passages):
    result = sign_test(gdn, (LAYER, HEAD), passages[:1], **HOW)
    assert set(result.records.passage) == {0}
    assert len(result.records) == 9


def test_text_is_cut_into_passages(gdn):
    text = zoo.held_out_text()[:300]
    cut = len(gdn.to_tokens(text, prepend_bos=False)[0]) // 20
    records = sign_test(gdn, (LAYER, HEAD), text, n_trials=4 * cut, context_size=20, verbose=False).records
    assert records.passage.value_counts().to_dict() == dict.fromkeys(range(cut), 4)
    with pytest.raises(WriteSAEError, match="the text is too short"):
        sign_test(gdn, (LAYER, HEAD), text, **HOW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_trials": -3}, "n_trials=-3"),
        ({"magnitude": 0.0}, "magnitude must be positive"),
        ({"magnitude": -1.0}, "magnitude must be positive"),
        ({"magnitude": float("nan")}, "magnitude must be positive"),
        ({"magnitude": float("inf")}, "magnitude must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"context_size": 10}, "cut into passages already"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        sign_test(gdn, (LAYER, HEAD), passages, **(HOW | options))


def test_a_direction_that_is_none_is_refused(gdn, passages):
    # The annotation, which the tests check, would refuse it before the function does.
    plain = inspect.unwrap(sign_test)
    with pytest.raises(
        WriteSAEError, match="direction='gradient' is unknown: choose jacobian or unembedding"
    ):
        plain(gdn, (LAYER, HEAD), passages, direction="gradient", **HOW)


def test_cells_that_do_not_exist_are_refused(gdn, passages):
    for cell in ((LAYER, 4), (2, 0), (-1, 0)):
        with pytest.raises(HookedModelError, match="no cell at layer"):
            sign_test(gdn, cell, passages, **HOW)
    small = WriteSAE(WriteSAEConfig(d_k=4, d_v=5, d_sae=8, k=2))
    small.cfg.metadata.hook_name = gdn.write_hook_name(LAYER, HEAD)
    with pytest.raises(WriteSAEError, match="made for 4 x 5 matrices"):
        sign_test(gdn, small, passages, **HOW)


def test_one_seed_gives_one_result_and_another_other_trials(gdn, passages):
    first, again, other = (sign_test(gdn, (LAYER, HEAD), passages, seed=s, **HOW) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary
    assert first.records.position.tolist() != other.records.position.tolist()
    assert first.records.token.tolist() != other.records.token.tolist()


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    whole = sign_test(gdn, (LAYER, HEAD), passages, **HOW)
    trials, calls = signs._trials, []

    def interrupted(*args):
        calls.append(args[2].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trials(*args)

    monkeypatch.setattr(signs, "_trials", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        sign_test(gdn, (LAYER, HEAD), passages, progress_folder=folder, **HOW)
    resumed = sign_test(gdn, (LAYER, HEAD), passages, progress_folder=folder, **HOW)
    assert calls == [passages[0].tolist()] + [passages[1].tolist()] * 2
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"magnitude": 2.0}, {"n_trials": 8}, {"direction": "unembedding"}):
        with pytest.raises(WriteSAEError, match="other settings"):
            sign_test(gdn, (LAYER, HEAD), passages, progress_folder=folder, **(HOW | other))
    for cell in ((LAYER, HEAD + 1), (0, HEAD)):
        with pytest.raises(WriteSAEError, match="other settings"):
            sign_test(gdn, cell, passages, progress_folder=folder, **HOW)
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "signs.png"}
    kept = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["agreement"] == pytest.approx(whole.summary["agreement"])
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), whole.records)
    assert isinstance(resumed.plot(), Figure)
