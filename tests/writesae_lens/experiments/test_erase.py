"""Erasure against full edited forward passes of the same model, and its summary against plain statistics."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.writesae_lens.experiments.truth import (
    atoms_of,
    bootstrap_interval,
    column,
    encoded,
    every_subject,
    is_rank_1,
    kl_nats,
    logits_with_added,
    make_sae,
    silenced,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import erase_atom

DOSES = (1.0, 3.0)
HOW = {"doses": (0.5, 1.0), "verbose": False}
pytestmark = pytest.mark.usefixtures("few_resamples")


def check_rows(model, tokens, rows, matrices, token):
    """The rows' delta_logp and kl are those of full passes with these matrices added."""
    for passage in rows.passage.unique():
        here = np.flatnonzero(rows.passage == passage)
        mine = rows.iloc[here]
        positions = column(mine, "position")
        after, before = logits_with_added(model, tokens[passage], positions, [matrices[i] for i in here])
        moved = (after.log_softmax(-1) - before.log_softmax(-1))[:, token]
        np.testing.assert_allclose(mine.delta_logp, moved, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mine.kl, kl_nats(after, before), rtol=1e-3, atol=1e-6)
        assert mine.token.tolist() == tokens[passage, positions].tolist()


def check_summary(summary, records, dose):
    """Every figure from the records, by its definition."""
    assert summary["dose"] == dose
    for condition in ("firing", "elsewhere", "random"):
        part = records[records.condition == condition]
        at = part[part.dose == dose]
        assert summary[f"n_{condition}"] == len(at) > 0
        moved = at.delta_logp.to_numpy()
        assert summary[f"median_delta_logp_{condition}"] == pytest.approx(np.median(moved), abs=1e-12)
        above = moved[at.kl > at.kl_floor]
        assert summary[f"n_at_floor_{condition}"] == len(at) - len(above)
        assert summary[f"share_of_falls_{condition}"] == pytest.approx(np.mean(above < 0))
        assert summary[f"median_kl_{condition}"] == pytest.approx(np.median(at.kl))
        p = stats.wilcoxon(above, alternative="less").pvalue
        assert summary[f"fall_p_{condition}"] == pytest.approx(p)
        by_dose = {f"{d:g}": np.median(part.delta_logp[part.dose == d]) for d in part.dose.unique()}
        assert summary[f"median_delta_logp_by_dose_{condition}"] == pytest.approx(by_dose)
        interval = summary[f"delta_logp_ci_{condition}"]
        if at.passage.nunique() == 1:
            assert interval is None
        else:
            groups = [moved[at.passage == n] for n in at.passage.unique()]
            assert interval == pytest.approx(bootstrap_interval(groups, np.median), abs=1e-9)


@every_subject
def test_every_row_is_a_full_edited_forward_pass(model, tokens, swapped, kind, options):
    sae = make_sae(model, kind, **options)
    result = erase_atom(model, sae, tokens, doses=DOSES, seed=4, verbose=False)
    records, summary = result.records, result.summary
    acts = encoded(model, sae, tokens)
    dominant = acts.argmax(-1).flatten().bincount()
    atom = summary["atom"]
    assert dominant[atom] == dominant.max()
    matrix = atoms_of(sae, model)[atom]
    # The even firings choose the token, the odd ones are tested.
    firings = [(n, t, float(acts[n, t, atom])) for n, t in acts[..., atom].nonzero().tolist()]
    choosing, tested = firings[::2], firings[1::2]
    fall = 0
    for n in range(2):
        here = [(t, -coefficient * matrix) for passage, t, coefficient in choosing if passage == n]
        after, before = logits_with_added(
            model, tokens[n], torch.tensor([t for t, _ in here]), [m for _, m in here]
        )
        fall = fall + (before.log_softmax(-1) - after.log_softmax(-1)).sum(0)
    token = summary["preferred_token"]
    assert token == int(fall.argmax())
    assert summary["preferred_token_text"] == model.tokenizer.decode([token])
    assert summary["n_positions_that_chose_it"] == len(choosing)
    assert summary["n_passages"] == 2
    # At firings.
    rows = records[records.condition == "firing"]
    expected = {(n, t, dose): c for n, t, c in tested for dose in DOSES}
    names = list(rows[["passage", "position", "dose"]].itertuples(index=False, name=None))
    assert sorted(names) == sorted(expected)
    np.testing.assert_allclose(rows.coefficient, [expected[name] for name in names], rtol=1e-5)
    check_rows(model, tokens, rows, [-expected[n] * n[2] * matrix for n in names], token)
    # Elsewhere.
    rows = records[records.condition == "elsewhere"]
    mean = np.mean([c for _, _, c in firings])
    np.testing.assert_allclose(rows.coefficient, mean, rtol=1e-5)
    for n in range(2):
        at = rows.position[(rows.passage == n) & (rows.dose == 1)].tolist()
        active = sum(passage == n for passage, _, _ in firings)
        assert len(set(at)) == len(at) == min(active, 20 - active)
        assert not acts[n, at, atom].any()
    check_rows(model, tokens, rows, [-mean * dose * matrix for dose in rows.dose], token)
    # Random matrices, as they reached the model.
    rows = records[records.condition == "random"]
    assert sorted(rows[["passage", "position", "dose"]].itertuples(index=False, name=None)) == sorted(names)
    native, matrices, directions = writes(model, tokens), [], {}
    for row in rows.itertuples():
        size = row.dose * row.coefficient * matrix.norm()
        (change,) = (
            change
            for edits in swapped
            if edits.passage == tokens[row.passage].tolist()
            for change in edits.matrices[edits.positions == row.position] - native[row.passage, row.position]
            if abs(float(change.norm() / size) - 1) < 1e-3
            and abs(float((change * matrix).sum() / (change.norm() * matrix.norm()))) < 0.5
        )
        assert is_rank_1(change)
        matrices.append(change)
        directions.setdefault((row.passage, row.position), []).append(change.flatten() / change.norm())
    check_rows(model, tokens, rows, matrices, token)
    for own in directions.values():
        assert all(float(a @ own[0]) > 0.999 for a in own)
    firsts = torch.stack([own[0] for own in directions.values()])
    assert float((firsts @ firsts.T).fill_diagonal_(0).abs().max()) < 0.5
    check_summary(summary, records, 1.0)


@pytest.mark.parametrize("model", ["tiny-mamba2"], indirect=True)
def test_a_given_atom_and_token_are_tested_at_every_firing(model, tokens):
    sae = make_sae(model)
    acts = encoded(model, sae, tokens)
    atom = int((acts > 0).sum((0, 1)).argsort()[-2])
    texts = {i: model.tokenizer.decode([i]) for i in range(300, 2048)}
    token = next(i for i, text in texts.items() if pieces(model, text) == [text])
    result = erase_atom(model, sae, tokens, atom=atom, token=texts[token], doses=(0.5, 3.0), verbose=False)
    assert result.summary["preferred_token"] == token
    assert result.summary["preferred_token_text"] == texts[token]
    assert result.summary["atom"] == atom
    assert result.summary["n_positions_that_chose_it"] == 0
    firings = acts[..., atom].nonzero().tolist()
    rows = result.records[result.records.condition == "firing"]
    assert rows[rows.dose == 3][["passage", "position"]].to_numpy().tolist() == firings
    matrix = atoms_of(sae, model)[atom]
    check_rows(model, tokens, rows, [-r.dose * r.coefficient * matrix for r in rows.itertuples()], token)
    check_summary(result.summary, result.records, 0.5)
    assert result.summary["n_elsewhere"] == result.summary["n_firing"] == len(firings)


def pieces(model, text):
    return [model.tokenizer.decode([i]) for i in model.tokenizer.encode(text, add_special_tokens=False)]


def test_a_lone_firing_chooses_the_token_and_is_tested(gdn, passages, tmp_path):
    sae = make_sae(gdn, k=32)
    strengths = encoded(gdn, sae, passages)[..., 5]
    top = strengths.flatten().sort(descending=True).values
    with torch.no_grad():
        sae.b_enc[5] = -float(top[:2].mean())
    result = erase_atom(gdn, sae, passages, atom=5, **HOW)
    firing = result.records[(result.records.condition == "firing") & (result.records.dose == 1)]
    assert firing[["passage", "position"]].to_numpy().tolist() == [list(divmod(int(strengths.argmax()), 20))]
    assert result.summary["n_firing"] == result.summary["n_positions_that_chose_it"] == 1
    passage, position, coefficient = firing[["passage", "position", "coefficient"]].iloc[0]
    matrix = -coefficient * atoms_of(sae, gdn)[5]
    after, before = logits_with_added(gdn, passages[int(passage)], torch.tensor([int(position)]), [matrix])
    fall = before.log_softmax(-1) - after.log_softmax(-1)
    assert result.summary["preferred_token"] == int(fall[0].argmax())
    result.save(tmp_path)  # the figure too


def test_an_atom_that_is_active_everywhere_has_no_control_elsewhere(gdn, passages, tmp_path):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc[7] = 1.0
    result = erase_atom(gdn, sae, passages, **HOW)
    assert result.summary["atom"] == 7
    assert result.summary["n_elsewhere"] == 0
    assert result.summary["n_firing"] == 20
    result.save(tmp_path)  # the figure too


def test_one_passage_has_no_interval(gdn, passages):
    result = erase_atom(gdn, make_sae(gdn), passages[:1], **HOW)
    assert result.summary["delta_logp_ci_firing"] is None
    assert "(" not in result.headline.split("moves by")[1]


def test_atoms_and_tokens_that_do_not_exist_are_refused(gdn, passages):
    text = "unquestionably strange"
    parts = pieces(gdn, text)
    assert len(parts) > 1
    for options, message in (
        ({"atom": 32}, "atom 32 does not exist: the SAE has atoms 0 to 31"),
        ({"atom": -1}, "atom -1 does not exist"),
        ({"token": 2048}, "token 2048 does not exist: ids run from 0 to 2047"),
        ({"token": -1}, "token -1 does not exist"),
        ({"token": text}, rf"not one token but {len(parts)} \({', '.join(map(repr, parts))}\)"),
        ({"atom": 9}, "atom 9 is active at no position of these 2 passages"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            erase_atom(gdn, silenced(make_sae(gdn), 9), passages, **(HOW | options))


def test_seeds_change_the_controls_and_nothing_else(gdn, passages):
    one, other = (erase_atom(gdn, make_sae(gdn), passages, seed=s, **HOW).records for s in (1, 2))
    for condition, part in one.groupby("condition"):
        same = np.array_equal(part.delta_logp, other.delta_logp[other.condition == condition])
        assert same == (condition == "firing")
