"""Installs in several cells at once against full passes without a cache, with hooks by hand."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_models import HookedModelError
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    column,
    is_rank_1,
    make_sae,
    read_passages,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import ExperimentResult, install_tokens
from writesae_lens.experiments.installs.fluency import repetition
from writesae_lens.experiments.installs.targets import draw_targets

POSITIONS, N_TOKENS, AHEAD = 3, 4, 3
HOW = {
    "positions": POSITIONS,
    "n_tokens": N_TOKENS,
    "n_ahead": AHEAD,
    "direction": "greedy",
    "verbose": False,
}


def full_pass(model, tokens, added=None, first=0):
    """Logits [row, pos, d_vocab] with matrices [row, n, d_k, d_v] of each cell added from ``first`` on."""

    def adding(matrices):
        def add(write, hook):
            write = write.clone()
            write[:, first : first + matrices.shape[1]] += matrices.flatten(-2).to(write.dtype)
            return write

        return add

    hooks = [(model.write_hook_name(c.layer, c.head), adding(x)) for c, x in (added or {}).items()]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)


@torch.no_grad()
def continued(model, prompts, added=None, n=N_TOKENS):
    """First log-probabilities, and the greedy continuation, every token by a pass over all before it."""
    first, sequence = None, prompts
    for _ in range(n):
        logits = full_pass(model, sequence, added, prompts.shape[1] - POSITIONS)[:, -1].double()
        first = logits.log_softmax(-1) if first is None else first
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    return first, sequence[:, prompts.shape[1] :]


def native_norms(model, prompts, cells):
    """[cell, prompt, pos], from the writes at their hooks."""
    matrices = [writes(model, prompts, c.layer, c.head)[:, -POSITIONS:] for c in cells]
    return torch.stack([x.flatten(-2).norm(dim=-1) for x in matrices])


def perplexity(model, prompts, said):
    """Of each continuation under the unedited model, token by token."""
    with torch.no_grad():
        log_p = full_pass(model, torch.cat([prompts, said], dim=1)).double().log_softmax(-1)
    found = []
    for row, ids in enumerate(said.tolist()):
        surprise = [-float(log_p[row, prompts.shape[1] - 1 + n, token]) for n, token in enumerate(ids)]
        found.append(np.exp(np.mean(surprise)))
    return found


def last_layer(model):
    return max(model.mixers)


def test_every_number_is_that_of_full_passes_with_the_writes_added(model, steps):
    prompts, last = read_passages(model, 2, 17), last_layer(model)
    cells = [model.cell(*place) for place in ((1, 0), (1, 3), (last, 1))]
    how = HOW | {"magnitude": (1.0, 3.0), "n_cells": (1, 3), "n_refinements": 2}
    result = install_tokens(model, f"1:0,1:3,{last}:1", prompts, [11, 900], **how)
    records = result.records
    assert records.prompt.tolist() == [0] * 8 + [1] * 8
    assert records.target.tolist() == ([11] * 4 + [900] * 4) * 2
    assert records.magnitude.tolist() == [1.0, 1.0, 3.0, 3.0] * 4
    assert records.n_cells.tolist() == [1, 3] * 8
    of = column(records, "prompt")
    own, control = (step.added_in for step in steps)
    expected = native_norms(model, prompts, cells)[:, of] * column(records, "magnitude")[:, None]
    for added in (own, control):
        assert list(added) == cells
        sizes = torch.stack([x.double().flatten(-2).norm(dim=-1) for x in added.values()])
        is_written = (sizes > 0).all(-1)
        assert is_written.sum(0).tolist() == records.n_cells.tolist()
        torch.testing.assert_close(sizes, expected * is_written[..., None], rtol=1e-4, atol=1e-6)
        assert all(is_rank_1(x[is_written[n]]) for n, x in enumerate(added.values()))
    texts = {
        "": continued(model, prompts[of], own),
        "native_": continued(model, prompts[of]),
        "control_": continued(model, prompts[of], control),
    }
    row, target = np.arange(len(records)), records.target.to_numpy()
    log_p = {name: first.numpy()[row, target] for name, (first, _) in texts.items()}
    np.testing.assert_allclose(records.lift, log_p[""] - log_p["native_"], atol=1e-4)
    np.testing.assert_allclose(records.control_lift, log_p["control_"] - log_p["native_"], atol=1e-4)
    for name, (_, said) in texts.items():
        if name != "control_":
            assert records[f"{name}continuation"].map(json.loads).tolist() == said.tolist()
        contained = [t in ids for t, ids in zip(target.tolist(), said.tolist(), strict=True)]
        assert records[f"{name}in_continuation"].tolist() == contained
        own_perplexity = perplexity(model, prompts[of], said)
        np.testing.assert_allclose(records[f"{name}perplexity"], own_perplexity, rtol=1e-4)
    check_summary(result)


def check_summary(result):
    summary, records = result.summary, result.records
    assert len(summary["curve"]) == 4
    for point in [*summary["curve"], summary]:
        part = records
        if point is not summary:
            part = records[(records.magnitude == point["magnitude"]) & (records.n_cells == point["n_cells"])]
            assert point["n"] == len(part) == 4
        for name in ("", "native_", "control_"):
            rate = part[f"{name}in_continuation"].sum() / len(part)
            assert point[f"{name}target_in_continuation"] == pytest.approx(rate)
            logs = [np.log(x) for x in part[f"{name}perplexity"]]
            assert point[f"{name}perplexity"] == pytest.approx(np.exp(sum(logs) / len(logs)))
            assert point[f"{name}repetition"] == pytest.approx(sum(part[f"{name}repetition"]) / len(part))
    assert summary["n_cells"] == [1, 3]
    assert set(summary["by_n_cells"]) == {"1", "3"}
    assert len(summary["hook_name"]) == 3
    earlier = {k: v for k, v in summary.items() if k not in ("curve", "perplexity")}
    panels = [len(ExperimentResult("install", records, x).plot().axes) for x in (summary, earlier)]
    assert panels == [3, 1]


def score(model, prompts, targets, native, added):
    """The soft maximum over steps of the smallest margin on the way: native tokens, then the target."""
    along = torch.cat([prompts, native[:, : AHEAD - 1]], dim=1)
    logits = full_pass(model, along, added, prompts.shape[1] - POSITIONS)[:, prompts.shape[1] - 1 :].double()

    def margin(row, step, token):
        now = logits[row, step]
        return now[token] - torch.cat([now[:token], now[token + 1 :]]).max()

    rows = []
    for row, target in enumerate(targets):
        path = [margin(row, step, int(native[row, step])) for step in range(AHEAD - 1)]
        ways = [torch.stack([*path[:n], margin(row, n, target)]).min() for n in range(AHEAD)]
        rows.append(torch.stack(ways).exp().sum().log())
    return torch.stack(rows)


def test_cells_and_directions_are_those_of_the_true_gradient_through_all_of_them(model, steps):
    prompts, targets, last = read_passages(model, 2, 17), [11, 900], last_layer(model)
    cells = [model.cell(1, 0), model.cell(last, 1), model.cell(last, 2)]
    how = HOW | {"n_refinements": 0, "n_cells": (2, 3)}
    records = install_tokens(model, cells, prompts, targets, **how).records
    of = column(records, "prompt")
    native = continued(model, prompts)[1][of]
    added = {
        c: torch.zeros(len(of), POSITIONS, c.d_k, c.d_v, dtype=torch.float64, requires_grad=True)
        for c in cells
    }
    found = score(model, prompts[of], records.target.tolist(), native, added)
    gradients = torch.autograd.grad(found.sum(), list(added.values()))
    norms, gains = 3 * native_norms(model, prompts, cells)[:, of], []
    for cell, gradient, norm in zip(cells, gradients, norms, strict=True):
        left, values, right = torch.linalg.svd(gradient)
        gains.append((values[..., 0] * norm).sum(-1))
        pair = left[..., :, 0, None] * right[..., 0, None, :]
        written = steps[0].added_in[cell].double()
        is_written = written.flatten(1).norm(dim=-1) > 0
        cosine = torch.nn.functional.cosine_similarity(written.flatten(-2), pair.flatten(-2), dim=-1)
        clear = values[..., 1] < 0.98 * values[..., 0]  # else the leading pair means little
        assert float(cosine[is_written[:, None] & clear].min()) > 0.999
    is_written = torch.stack([steps[0].added_in[c].flatten(1).norm(dim=-1) > 0 for c in cells])
    assert is_written[:, 1::2].all()
    left_out = (~is_written[:, ::2]).double()
    assert (left_out.sum(0) == 1).all()
    assert torch.equal(left_out.argmax(0), torch.stack(gains)[:, ::2].argmin(0))


def test_refinements_of_all_cells_raise_the_score(model, steps):
    prompts, targets = read_passages(model, 2, 17), [11, 900]
    native, reached = continued(model, prompts)[1], []
    for n in (0, 3):
        steps.clear()
        how = HOW | {"n_refinements": n}
        of = column(install_tokens(model, f"{LAYER}:*", prompts, targets, **how).records, "prompt")
        with torch.no_grad():
            reached.append(score(model, prompts[of], targets * 2, native[of], steps[0].added_in))
    assert float((reached[1] - reached[0]).min()) > -1e-4
    assert float((reached[1] - reached[0]).max()) > 0.05


@pytest.mark.usefixtures("few_resamples")
def test_one_cell_is_the_same_however_it_is_given(gdn):
    how = HOW | {"direction": "jacobian", "n_refinements": 1}
    prompts, sae = read_passages(gdn, 2, 17), make_sae(gdn)
    expected = install_tokens(gdn, (LAYER, HEAD), prompts, [5], **how).records
    for subject in (f"{LAYER}:{HEAD}", [(LAYER, HEAD)], [sae]):
        pd.testing.assert_frame_equal(install_tokens(gdn, subject, prompts, [5], **how).records, expected)
    both = install_tokens(gdn, [sae, make_sae(gdn, head=0)], prompts, [5], **how)
    assert both.summary["sae_fingerprints"] == []  # of SAEs only the cells count
    assert both.summary["hook_name"] == [gdn.write_hook_name(LAYER, head) for head in (HEAD, 0)]
    text = gdn.tokenizer.decode(prompts.flatten().tolist())
    sae.cfg.metadata.context_size = 17
    of_text = install_tokens(gdn, [sae], text, [5], **how)
    assert of_text.summary["text_tokens"] == of_text.summary["n_prompts"] * 17


@pytest.mark.usefixtures("few_resamples")
def test_one_in_three_targets_of_third_native_is_said_natively(gdn):
    prompts = read_passages(gdn, 16, 17)
    how = HOW | {"direction": "unembedding", "n_tokens": 20}
    records = install_tokens(gdn, (LAYER, HEAD), prompts, strata=("third_native",), **how).records
    assert records.native_rank.between(99, 1000).all()
    assert 4 <= records.native_in_continuation.sum() <= 6


def test_targets_of_third_native_where_nothing_fitting_is_said():
    """Of 400 tokens with falling logits the continuations say 0, or for the last prompt 150 and 399."""
    logits = -torch.arange(400.0).expand(5, -1)
    said = torch.zeros(5, 2, dtype=torch.long)
    said[4] = torch.tensor([150, 399])
    rng = torch.Generator().manual_seed(0)
    prompts = torch.zeros(5, 3, dtype=torch.long)
    names, drawn = draw_targets(["third_native"], prompts, logits, said, 0, rng)
    assert names == ["third_native"]
    assert ((drawn >= 99) & (drawn < 400)).all()
    assert drawn[4, 0] in (150, 399)
    others = draw_targets(["third_native"], prompts, logits, said, 1, rng)[1]
    assert others[4, 0] not in (150, 399)


def test_repetition_is_the_share_of_runs_of_three_that_came_before():
    said = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3], [7, 7, 7, 7, 7, 7]])
    assert repetition(said) == [0, 0.25, 0.75]
    assert repetition(said[:, :2]) == [0, 0, 0]


@pytest.mark.usefixtures("without_type_checks")
def test_cells_that_do_not_fit_are_refused(gdn):
    prompts = read_passages(gdn, 2, 17)
    for subject, options, message in (
        (
            "1:*",
            {"n_cells": (5,)},
            r"n_cells=\(5,\) makes no sense: 4 cells are given to write in, so give 1 to 4",
        ),
        ((1, 0), {"n_cells": [1, 2]}, r"n_cells=\[1, 2\] makes no sense: 1 cells"),
        ("1:*", {"n_cells": 2}, "n_cells must be a list or tuple, got 2: put it into brackets"),
        ("1:*", {"strata": ()}, "there are no targets"),
        ("1:*", {"n_cells": (2, 2)}, "n_cells has 2 twice"),
        ("layer 1", {}, "an SAE, a cell or .layer, head. is wanted, got 'layer 1'; as text, cells are LAYER"),
        ("1:*:", {}, "cells are written LAYER:HEAD"),
        ("2:*", {}, "'2:\\*' names no cell"),
        ([], {}, "there are no cells"),
        ([(1, 0), (1, 0)], {}, "layer 1 head 0 is given twice"),
        ([(1, 0), "1:1"], {}, "an SAE, a cell or .layer, head. is wanted, got '1:1'"),
        ([(1, 0), (2, 0)], {}, "no cell at layer 2, head 0"),
    ):
        with pytest.raises(HookedModelError, match=message) as caught:
            install_tokens(gdn, subject, prompts, **(HOW | options))
        assert len(str(caught.value)) < 300
    with pytest.raises(WriteSAEError, match="'middle' is unknown"):
        install_tokens(gdn, "1:*", prompts, strata=("middle",), **HOW)
