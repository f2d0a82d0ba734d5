"""Installs against full passes without a cache, with a hook that adds what was written."""

import json

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
    is_rank_1,
    make_sae,
    output_weights,
    read_passages,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import install, install_tokens
from writesae_lens.experiments.decoding import Prefix
from writesae_lens.experiments.installs.targets import PAPER, STRATA

CELL = (LAYER, HEAD)
POSITIONS, N_TOKENS = 3, 4
HOW = {"positions": POSITIONS, "n_tokens": N_TOKENS, "direction": "unembedding", "verbose": False}
JACOBIAN = HOW | {"direction": "jacobian", "n_refinements": 2}


def read(model, n, length=17):
    return read_passages(model, n, length)


def full_pass(model, tokens, added=None, first=0):
    """Logits [row, pos, d_vocab] when matrices [row, n, d_k, d_v] are added from position ``first`` on."""

    def add(write, hook):
        write = write.clone()
        write[:, first : first + added.shape[1]] += added.flatten(-2).to(write.dtype)
        return write

    hooks = [] if added is None else [(model.write_hook_name(LAYER, HEAD), add)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)


@torch.no_grad()
def continued(model, prompts, added=None, n=N_TOKENS):
    """First log-probabilities, and the greedy continuation, every token by a pass over all before it."""
    first, sequence, start = None, prompts, prompts.shape[1] - (0 if added is None else added.shape[1])
    for _ in range(n):
        logits = full_pass(model, sequence, added, start)[:, -1].double()
        first = logits.log_softmax(-1) if first is None else first
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    return first, sequence[:, prompts.shape[1] :]


def check_norms(model, prompts, records, added, control):
    """Rank 1, and magnitude x the native write's norm, for the edit and its control."""
    norms = writes(model, prompts)[:, -POSITIONS:].flatten(-2).norm(dim=-1)[column(records, "prompt")]
    expected = column(records, "magnitude")[:, None] * norms
    for matrices in (added, control):
        sizes = matrices.double().flatten(-2).norm(dim=-1)
        torch.testing.assert_close(sizes, expected, rtol=1e-4, atol=1e-6)
        assert is_rank_1(matrices)
    cosine = torch.nn.functional.cosine_similarity(added.flatten(-2), control.flatten(-2), dim=-1)
    assert float(cosine.abs().max()) < 0.5


@pytest.mark.parametrize("direction", ["jacobian", "unembedding"])
def test_every_number_is_that_of_full_passes_with_the_write_added(model, steps, direction):
    prompts = read(model, 3)
    how = JACOBIAN | {"direction": direction, "magnitude": (1.0, 12.0), "seed": 1}
    result = install_tokens(model, CELL, prompts, **how)
    records = result.records
    assert len(records) == 3 * 4 * 2
    of = column(records, "prompt")
    assert of.tolist() == np.repeat([0, 1, 2], 8).tolist()
    (last, _, _), (also_last, _, _) = steps
    added, control = (step.added for step in steps)
    assert torch.equal(last, prompts[of, -POSITIONS:])
    assert torch.equal(also_last, last)
    assert records.magnitude.tolist() == [1.0, 12.0] * 12
    check_norms(model, prompts, records, added, control)
    row, target = np.arange(len(records)), records.target.to_numpy()
    base, native = (x[of] for x in continued(model, prompts))
    own, own_said = continued(model, prompts[of], added)
    other, other_said = continued(model, prompts[of], control)
    base, own, other = (x.numpy() for x in (base, own, other))
    rank = [(p > p[row, target][:, None]).sum(1) + 1 for p in (base, own)]
    np.testing.assert_array_equal(records.native_rank, rank[0])
    np.testing.assert_array_equal(records["rank"], rank[1])
    np.testing.assert_array_equal(records.rank_shift, rank[0] - rank[1])
    np.testing.assert_allclose(records.lift, (own - base)[row, target], atol=1e-4)
    np.testing.assert_allclose(records.control_lift, (other - base)[row, target], atol=1e-4)
    assert records.continuation.map(json.loads).tolist() == own_said.tolist()
    assert records.native_continuation.map(json.loads).tolist() == native.tolist()
    for name, said in (("", own_said), ("native_", native), ("control_", other_said)):
        contained = [t in ids for t, ids in zip(target.tolist(), said.tolist(), strict=True)]
        assert records[f"{name}in_continuation"].tolist() == contained
    if direction == "jacobian":
        assert own_said.tolist() != native.tolist()
    assert float(np.abs(records.lift).max()) > 0.1
    check_summary(result)


def check_summary(result):
    records, summary = result.records, result.summary

    def check(figures, part):
        for name in ("", "native_", "control_"):
            share = part[f"{name}in_continuation"].sum() / len(part)
            assert figures[f"{name}target_in_continuation"] == pytest.approx(share)
        assert figures["first_token"] == pytest.approx((part["rank"] == 1).sum() / len(part))
        assert figures["median_rank_shift"] == np.median(part.rank_shift)
        assert figures["mean_lift"] == pytest.approx(np.mean(part.lift))
        assert figures["mean_control_lift"] == pytest.approx(np.mean(part.control_lift))

    check(summary, records)
    assert summary["n_installs"] == len(records)
    assert summary["n_prompts"] == records.prompt.nunique()
    for name in ("stratum", "magnitude"):
        groups = summary[f"by_{name}"]
        assert set(groups) == {str(x) for x in records[name]}
        for value, figures in groups.items():
            part = records[records[name].astype(str) == value]
            assert figures["n"] == len(part)
            check(figures, part)
    said = [part.in_continuation.to_numpy() for _, part in records.groupby("prompt")]
    interval = bootstrap_interval(said, np.mean) if len(said) > 1 else None
    assert summary["target_in_continuation_ci"] == pytest.approx(interval, abs=1e-9)


# Directions.


def test_the_unembedding_direction_is_native_key_and_the_targets_unembedding(model, steps):
    prompts, targets = read(model, 2), [5, 700, 1999]
    records = install_tokens(model, CELL, prompts, targets, magnitude=2.0, **HOW).records
    assert records.target.tolist() == targets * 2
    assert set(records.stratum) == {"given"}
    w_o, w_u = output_weights(model, *CELL)
    keys = cached(model, prompts, model.write_factor_hook_names(LAYER)[0])[:, -POSITIONS:, HEAD].double()
    values = (w_u[column(records, "target")] @ w_o)[:, None, None]
    expected = keys[column(records, "prompt"), :, :, None] * values
    added = steps[0].added.double()
    units = [x / x.flatten(-2).norm(dim=-1)[..., None, None] for x in (added, expected)]
    torch.testing.assert_close(*units, rtol=0, atol=1e-5)


def objective(model, prompts, targets, native, added):
    """The soft maximum, over the coming steps, of the target's margin over the likeliest other token."""
    along = torch.cat([prompts, native[:, :-1]], dim=1)
    logits = full_pass(model, along, added, prompts.shape[1] - POSITIONS)[:, prompts.shape[1] - 1 :].double()
    steps = []
    for step in range(native.shape[1]):
        rows = []
        for row, target in enumerate(targets):
            now = logits[row, step]
            rows.append(now[target] - torch.cat([now[:target], now[target + 1 :]]).max())
        steps.append(torch.stack(rows))
    return torch.stack(steps).exp().sum(0).log()


def test_without_refinements_the_direction_is_the_leading_pair_of_the_true_gradient(model, steps):
    prompts, targets = read(model, 2), [11, 900]
    of = column(
        install_tokens(model, CELL, prompts, targets, **(JACOBIAN | {"n_refinements": 0})).records, "prompt"
    )
    native, cell = continued(model, prompts)[1][of], model.cell(LAYER, HEAD)
    shape = len(of), POSITIONS, cell.d_k, cell.d_v
    nothing = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    reached = objective(model, prompts[of], targets * 2, native, nothing)
    (gradient,) = torch.autograd.grad(reached.sum(), nothing)
    left, values, right = torch.linalg.svd(gradient)
    assert float((values[..., 1] / values[..., 0]).max()) < 0.99  # else the leading pair means little
    pair = left[..., :, 0, None] * right[..., 0, None, :]
    added = steps[0].added.double()
    unit = added / added.flatten(-2).norm(dim=-1)[..., None, None]
    torch.testing.assert_close(unit, pair, rtol=0, atol=1e-3)


def test_refinements_never_lower_the_objective(model, steps):
    prompts, targets, reached = read(model, 2), [11, 900, 1500], []
    native = continued(model, prompts)[1]
    for n in (0, 1, 6):
        steps.clear()
        how = JACOBIAN | {"n_refinements": n}
        of = column(install_tokens(model, CELL, prompts, targets, **how).records, "prompt")
        with torch.no_grad():
            reached.append(objective(model, prompts[of], targets * 2, native[of], steps[0].added))
    assert float((reached[1] - reached[0]).min()) > -1e-4
    assert float((reached[2] - reached[1]).min()) > -1e-4
    if "mamba2" not in model.cfg.model_name:  # there six steps find nothing better
        assert float((reached[2] - reached[0]).mean()) > 0.05


# Targets.


def native_order(model, prompts):
    with torch.no_grad():
        return model(prompts, use_cache=False)[:, -1].argsort(dim=-1, descending=True).tolist()


def test_every_drawn_target_lies_in_its_stratum(gdn):
    prompts = read(gdn, 16)
    order, half = native_order(gdn, prompts), gdn.cfg.d_vocab // 2
    for seed in (0, 1):
        records = install_tokens(gdn, CELL, prompts, **(HOW | {"n_tokens": 1, "seed": seed})).records
        assert records.groupby("stratum").size().to_dict() == dict.fromkeys(PAPER, 16)
        for row in records.itertuples():
            rank = order[row.prompt].index(row.target) + 1
            assert abs(rank - row.native_rank) <= 1  # equal logits
            if row.stratum == "out_of_context":
                assert rank > half
                assert row.target not in prompts[row.prompt].tolist()
            else:
                low, high = {"frequent": (2, 99), "rank_100_1000": (100, 999), "rare": (1000, 2048)}[
                    row.stratum
                ]
                assert low <= rank <= high


def test_strata_begin_and_end_at_their_ranks(gdn, monkeypatch):
    """With a single rank in each there is no chance in it."""
    ranks = {"frequent": (2, 3), "rank_100_1000": (100, 101), "rare": (2048, None)}
    for name, bounds in ranks.items():
        monkeypatch.setitem(STRATA, name, bounds)
    prompts = read(gdn, 3)
    records = install_tokens(gdn, CELL, prompts, strata=tuple(ranks), **HOW).records
    expected = [order[rank - 1] for order in native_order(gdn, prompts) for rank in (2, 100, 2048)]
    assert records.target.tolist() == expected
    assert records.stratum.tolist() == list(ranks) * 3
    monkeypatch.setitem(STRATA, "rare", (2049, None))
    records = install_tokens(gdn, CELL, prompts, strata=("frequent", "rare"), **HOW).records
    assert records.stratum.tolist() == ["frequent"] * 3


def test_tokens_of_the_prompt_are_never_out_of_context(gdn):
    """All but three of the less likely half are in the prompt, so one of these is drawn."""
    prompt = torch.arange(2045)[None]
    left = set(native_order(gdn, prompt)[0][1024:]) - set(prompt[0].tolist())
    if not left:
        prompt = prompt + 3
        left = set(native_order(gdn, prompt)[0][1024:]) - set(prompt[0].tolist())
    records = install_tokens(gdn, CELL, prompt, strata=("out_of_context",), **HOW).records
    assert set(records.target) <= left


def test_strata_that_the_vocabulary_has_not_are_left_out(gdn_model):
    prompts = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    result = install_tokens(gdn_model, CELL, prompts, **JACOBIAN)
    assert result.records.stratum.tolist() == ["frequent", "rank_100_1000", "out_of_context"] * 2
    assert "rare" not in result.summary["by_stratum"]


def test_targets_are_given_by_id_and_by_text(gdn):
    text = gdn.tokenizer.decode([700])
    assert gdn.tokenizer.encode(text, add_special_tokens=False) == [700]
    by_text = install_tokens(gdn, CELL, read(gdn, 2), [5, text], **HOW).records
    assert by_text.target.tolist() == [5, 700] * 2
    by_id = install_tokens(gdn, CELL, read(gdn, 2), [5, 700], **HOW).records
    pd.testing.assert_frame_equal(by_text, by_id)


@pytest.mark.usefixtures("without_type_checks")
def test_targets_of_numpy_are_whole_numbers_too(gdn):
    prompts = read(gdn, 2)
    expected = install_tokens(gdn, CELL, prompts, [5, 7], **HOW)
    for targets in (np.array([5, 7]), [np.int64(5), 7]):
        result = install_tokens(gdn, CELL, prompts, targets, **HOW)
        assert result.records.equals(expected.records)
        assert result.summary["call"] == expected.summary["call"]
    assert set(install_tokens(gdn, CELL, prompts, np.int64(7), **HOW).records.target) == {7}


def test_a_cell_is_given_as_itself_its_place_or_an_sae(gdn):
    subjects = (gdn.cell(LAYER, HEAD), CELL, make_sae(gdn), make_sae(gdn, "state"))
    first, *others = (install_tokens(gdn, subject, read(gdn, 2), [5], **HOW).records for subject in subjects)
    for other in others:
        pd.testing.assert_frame_equal(first, other)
    elsewhere = install_tokens(gdn, (LAYER, HEAD + 1), read(gdn, 2), [5], **HOW).records
    assert not np.allclose(first.lift, elsewhere.lift)
    with pytest.raises(HookedModelError, match="no cell at layer 2, head 0"):
        install_tokens(gdn, (2, 0), read(gdn, 2), **HOW)


def test_one_prompt_of_the_least_length_and_one_token(gdn, steps):
    prompt = read(gdn, 1, POSITIONS + 1)
    (record,) = install_tokens(gdn, CELL, prompt, [5], **(HOW | {"n_tokens": 1})).records.itertuples()
    first, said = continued(gdn, prompt, steps[0].added, n=1)
    native = continued(gdn, prompt, n=1)[0]
    assert json.loads(record.continuation) == said[0].tolist()
    assert record.lift == pytest.approx(float(first[0, 5] - native[0, 5]), abs=1e-4)


# Draws.


def test_drawn_continuations_share_their_noise_with_the_native_one(gdn):
    prompts, how = read(gdn, 3), HOW | {"n_tokens": 12, "temperature": 1.0}
    records, other = (
        install_tokens(gdn, CELL, prompts, [5, 900], (1e-6, 50.0), seed=s, **how).records for s in (3, 4)
    )
    small = records[records.magnitude < 1]
    assert small.continuation.tolist() == small.native_continuation.tolist()
    large = records[records.magnitude > 1]
    assert large.continuation.tolist() != large.native_continuation.tolist()
    assert small.native_continuation.nunique() == 3
    assert other.native_continuation.tolist() != records.native_continuation.tolist()
    greedy = install_tokens(gdn, CELL, prompts, [5], **(how | {"temperature": 0.0})).records
    expected = continued(gdn, prompts, n=12)[1].tolist()
    assert greedy.native_continuation.map(json.loads).tolist() == expected


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(gdn, temperature):
    n = 2000
    prefix = Prefix(gdn, LAYER, torch.zeros(n, 1, dtype=torch.long))
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
    drawn = prefix.decode(logits.expand(n, -1), None, 1, temperature, seed=0)[:, 0]
    expected = n * (logits / temperature).softmax(-1).numpy()
    counts = drawn.bincount(minlength=5).numpy()
    assert counts.sum() == n
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected) + 1).all()


def test_another_seed_draws_other_targets_and_controls(gdn, steps):
    one, other = (install_tokens(gdn, CELL, read(gdn, 2), seed=seed, **HOW).records for seed in (1, 2))
    assert one.target.tolist() != other.target.tolist()
    assert not torch.allclose(steps[1].added, steps[3].added)


def test_greedy_records_do_not_depend_on_how_prompts_are_batched(gdn, monkeypatch):
    prompts = read(gdn, 3)
    together = install_tokens(gdn, CELL, prompts, [5, 900], **JACOBIAN).records
    monkeypatch.setattr(install, "batches", lambda n, _: [slice(0, 2), slice(2, 4)])
    apart = install_tokens(gdn, CELL, prompts, [5, 900], **JACOBIAN).records
    for name in ("prompt", "target", "native_rank", "continuation", "native_continuation"):
        assert together[name].tolist() == apart[name].tolist()
    np.testing.assert_allclose(together.lift, apart.lift, atol=1e-3)


# Bad input.


def test_targets_and_positions_that_do_not_fit_are_refused(gdn, monkeypatch):
    text = "Chapter and verse"
    ids = gdn.tokenizer.encode(text, add_special_tokens=False)
    pieces = ", ".join(repr(gdn.tokenizer.decode([i])) for i in ids)
    for options, message in (
        ({"targets": [text]}, rf"not one token but {len(ids)} \({pieces}\)"),
        ({"targets": [""]}, "is not one token"),
        ({"targets": [2048]}, "token 2048 does not exist: ids run from 0 to 2047"),
        ({"targets": [-1]}, "token -1 does not exist"),
        ({"targets": []}, "there are no targets"),
        ({"targets": [5, 5]}, "targets has 5 twice: give each once"),
        ({"targets": [True]}, "not True"),
        ({"targets": [5], "magnitude": (3.0, 3.0)}, "magnitude has 3.0 twice"),
        ({"strata": ("rare", "rare")}, "strata has rare twice"),
        ({"positions": 17}, "prompts of 17 tokens are too short to write at their last 17"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            install_tokens(gdn, CELL, read(gdn, 2), **(HOW | options))
    prompts = read(gdn, 1)
    monkeypatch.setattr(gdn, "tokenizer", None)
    assert install_tokens(gdn, CELL, prompts, [5], **HOW).records.target.tolist() == [5]
    with pytest.raises(WriteSAEError, match="no tokenizer to read text with"):
        install_tokens(gdn, CELL, prompts, [" the"], **HOW)
