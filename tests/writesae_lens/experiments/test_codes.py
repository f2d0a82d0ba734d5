"""Every experiment on a dictionary of codes, against full edited passes and plain loops."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    cached,
    column,
    encoded,
    kl_nats,
    logits_with_added,
    make_codes,
    make_sae,
    output_weights,
    read_passages,
    writes,
)
from writesae_lens.experiments import (
    amplify,
    erase_atom,
    logit_formula_test,
    partition_atoms,
    reader_trace,
    selectivity,
    splice_test,
    top_contexts,
)
from writesae_lens.experiments.features.meets import DISTANCES, met_by_distance, promoted_tokens, reads_met
from writesae_lens.experiments.firings import activity

pytestmark = pytest.mark.usefixtures("few_resamples")
N_KEY = 16


def vectors(sae, feature):
    """A code's own vector, and the cell's mean on the other side, in float64."""
    key, value = sae.dec_key.detach().double(), sae.dec_value.detach().double()
    if feature < N_KEY:
        return key[feature], sae.mean_value.double()
    return value[feature - N_KEY], sae.mean_key.double()


def static(sae, feature):
    """The matrix of a code with the other side at the cell's mean."""
    own, mean = vectors(sae, feature)
    return torch.outer(own, mean) if feature < N_KEY else torch.outer(mean, own)


def contributed(sae, acts, feature):
    """What one code adds to the stand-in of one position, summed over pairs of codes."""
    total = torch.zeros(sae.cfg.d_k, sae.cfg.d_v, dtype=torch.float64)
    active = acts.nonzero().flatten().tolist()
    for i in (i for i in active if i < N_KEY):
        for j in (j for j in active if j >= N_KEY):
            if feature in (i, j):
                total += acts[i] * acts[j] * torch.outer(vectors(sae, i)[0], vectors(sae, j)[0])
    return total


def check_erased(model, tokens, rows, matrices, token):
    """The rows' changes and KLs are those of full passes with these matrices subtracted."""
    for passage in rows.passage.unique():
        here = np.flatnonzero(rows.passage == passage)
        mine = rows.iloc[here]
        positions = column(mine, "position")
        after, before = logits_with_added(model, tokens[passage], positions, [-matrices[i] for i in here])
        moved = (after.log_softmax(-1) - before.log_softmax(-1))[:, token]
        np.testing.assert_allclose(mine.delta_logp, moved, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mine.kl, kl_nats(after, before), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["key", "value"])
def test_erasing_a_code_takes_out_what_it_adds_to_the_stand_in(model, tokens, swapped, side):
    sae = make_codes(model)
    acts = encoded(model, sae, tokens)
    first = 0 if side == "key" else N_KEY
    code = first + int((acts[..., first : first + N_KEY] > 0).sum((0, 1)).argmax())
    result = erase_atom(model, sae, tokens, atom=code, token=400, doses=(1.0, 2.0), seed=3, verbose=False)
    records, summary = result.records, result.summary
    assert summary["side"] == side
    assert result.headline.startswith(f"{side} code {code} erased")
    firing = records[records.condition == "firing"]
    assert sorted(zip(firing.passage, firing.position)) == sorted(
        2 * [(n, t) for n, t in acts[..., code].nonzero().tolist()]
    )
    taken = [r.dose * contributed(sae, acts[r.passage, r.position], code) for r in firing.itertuples()]
    check_erased(model, tokens, firing, taken, 400)
    elsewhere = records[records.condition == "elsewhere"]
    mean = float(acts[..., code][acts[..., code] > 0].mean())
    assert len(elsewhere)
    assert not acts[column(elsewhere, "passage"), column(elsewhere, "position"), code].any()
    others = acts.clone()
    others[..., code] = mean
    taken = [r.dose * contributed(sae, others[r.passage, r.position], code) for r in elsewhere.itertuples()]
    check_erased(model, tokens, elsewhere, taken, 400)
    # The control keeps the other side: a random vector stands in the code's place, and nothing else changes.
    native = writes(model, tokens)
    for edits in swapped:
        passage = next(n for n in range(2) if edits.passage == tokens[n].tolist())
        for position, matrix in zip(edits.positions.tolist(), edits.matrices, strict=True):
            change = matrix - native[passage, position]
            own = contributed(sae, others[passage, position], code)
            if change.norm() > 1e-9 and own.norm() > 0:
                fixed, given = (x.T if side == "key" else x for x in (own, change))
                shared = torch.linalg.svd(fixed).U[:, 0]
                assert float((shared @ given).norm()) == pytest.approx(float(given.norm()), rel=1e-3)


def test_registers_are_counted_by_each_codes_own_side(gdn):
    sae, tokens = make_codes(gdn), read_passages(gdn, 3, 40)
    result = partition_atoms(gdn, sae, tokens, verbose=False)
    acts, native = encoded(gdn, sae, tokens), writes(gdn, tokens)
    cosines: dict[int, list[float]] = {}
    for passage, position in np.ndindex(*tokens.shape):
        left, _, right = torch.linalg.svd(native[passage, position], full_matrices=False)
        key, value = left[:, 0], right[0]
        if key @ sae.sign_key.double() + value @ sae.sign_value.double() < 0:
            key, value = -key, -value
        at = acts[passage, position]
        key_code, value_code = int(at[:N_KEY].argmax()), N_KEY + int(at[N_KEY:].argmax())
        if at[key_code] > 0 and at[value_code] > 0:
            cosines.setdefault(key_code, []).append(float(vectors(sae, key_code)[0] @ key))
            cosines.setdefault(value_code, []).append(float(vectors(sae, value_code)[0] @ value))
    records = result.records.set_index("atom")
    assert list(records.index) == list(range(32))
    assert list(records.side) == ["key"] * 16 + ["value"] * 16
    for code in range(32):
        assert records.n_firings[code] == len(cosines.get(code, []))
        if code in cosines:
            assert records.median_cosine[code] == pytest.approx(np.median(cosines[code]), abs=1e-4)
    by_side = result.summary["by_side"]
    for side, part in records.groupby("side"):
        assert by_side[side]["n_dead"] == int((part["class"] == "dead").sum())
        assert by_side[side]["n_register"] == int((part["class"] == "register").sum())
    assert result.summary["n_firings"] == records.n_firings[records.side == "value"].sum()
    assert result.summary["n_register"] == by_side["value"]["n_register"]


def met_by_hand(model, passage, position, key, distance):
    """What a write at the address reads h tokens on, from the head's own output in an edited full pass."""
    cell = model.cell(LAYER, HEAD)
    name, out = model.write_hook_name(LAYER, HEAD), model.hook_name(LAYER, "recurrence_out")
    content = torch.ones(cell.d_v, dtype=torch.float64)

    def add(write, hook):
        write = write.clone()
        write[0, position] += torch.outer(key, content).flatten().to(write)
        return write

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, add)]):
        changed = model.run_with_cache(passage[None], names_filter=[out])[1][out]
    change = changed - cached(model, passage[None], out)
    return float(change[0, position + distance, HEAD].mean())


def test_key_codes_meet_the_reads_that_their_writes_reach(model, tokens):
    sae, cell = make_codes(model), model.cell(LAYER, HEAD)
    acts = encoded(model, sae, tokens)[0]
    met = reads_met(
        model, sae, cell, tokens[0], activity(model, sae, model.site(sae.cfg.metadata.hook_name), tokens[0])
    )
    expected = {
        (i, t, h) for t, i in (acts[:, :N_KEY] > 0).nonzero().tolist() for h in DISTANCES if t + h < len(acts)
    }
    assert set(zip(met.code, met.position, met.distance)) == expected
    for row in met.sample(8, random_state=0).itertuples():
        by_hand = met_by_hand(model, tokens[0], row.position, vectors(sae, row.code)[0], row.distance)
        assert row.met == pytest.approx(by_hand, rel=1e-3, abs=1e-5 * met.met.abs().max())
    shares = met_by_distance(met)
    for code, row in shares.iterrows():
        part = met[met.code == code]
        squares = part.assign(square=part.met**2).groupby("distance").square.mean()
        means = squares.reindex(row.index, fill_value=0.0)
        np.testing.assert_allclose(row, means / means.sum(), rtol=1e-6)


def test_contexts_of_codes_are_of_their_own_side(gdn, passages):
    sae = make_codes(gdn)
    result = top_contexts(gdn, sae, passages, n_contexts=3, verbose=False)
    acts, records = encoded(gdn, sae, passages), result.records
    site = gdn.site(sae.cfg.metadata.hook_name)
    met = [reads_met(gdn, sae, site.cell, p, activity(gdn, sae, site, p)) for p in passages[:2]]
    w_o, w_u = output_weights(gdn, LAYER, HEAD)
    assert set(records.side) == {"key", "value"}
    for code, part in records.groupby("atom"):
        side = "key" if code < N_KEY else "value"
        assert set(part.side) == {side}
        own = acts[..., code].flatten()
        largest = own.sort(descending=True).values[: len(part)]
        np.testing.assert_allclose(part.coefficient, largest, rtol=1e-5)
        assert len(part) == min(3, int((own > 0).sum()))
        for row in part.itertuples():
            at = acts[row.passage, row.position]
            of_side = at[:N_KEY] if side == "key" else at[N_KEY:]
            assert row.dominant == bool(at[code] == of_side.max())
            if side == "key":
                here = met[row.passage].query(f"code == {code} and position == {row.position}")
                assert row.read_at == here.distance[here.met.abs().idxmax()]
                assert pd.isna(row.promoted)
            else:
                along = w_u @ (w_o @ vectors(sae, code)[0])
                ids = json.loads(row.promoted)
                torch.testing.assert_close(along[ids], along.topk(5).values, rtol=1e-4, atol=1e-6)
    alive = {side: part.atom.nunique() for side, part in records.groupby("side")}
    assert {s: found["n_atoms_active"] for s, found in result.summary["by_side"].items()} == alive


def test_promoted_tokens_of_a_large_vocabulary_are_found_in_pieces(gdn, monkeypatch):
    cell, values = gdn.cell(LAYER, HEAD), make_codes(gdn).dec_value.detach()
    whole = promoted_tokens(gdn, cell, values, 7)
    monkeypatch.setattr("writesae_lens.experiments.features.meets.NUMBERS_AT_ONCE", 100 * gdn.cfg.d_model)
    pieces = promoted_tokens(gdn, cell, values, 7)
    assert torch.equal(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1])


def test_selectivity_writes_contents_at_the_mean_key(model, tokens, swapped):
    sae = make_codes(model)
    result = selectivity(model, sae, tokens, n_atoms=3, n_positions=2, verbose=False)
    records, native = result.records, writes(model, tokens)
    own = records[records.kind == "atom"]
    assert (own.atom >= N_KEY).all()
    for passage, part in own.groupby("passage"):
        at = column(part, "position")
        matrices = [static(sae, code) for code in part.atom]
        sizes = native[passage, at].flatten(1).norm(dim=-1)
        added = [m / m.norm() * size for m, size in zip(matrices, sizes, strict=True)]
        after, before = logits_with_added(model, tokens[passage], at, added)
        np.testing.assert_allclose(part.kl, kl_nats(after, before), rtol=1e-3, atol=1e-6)
    mean = sae.mean_key.double()
    for edits in swapped:  # random ones too
        passage = next(n for n in range(2) if edits.passage == tokens[n].tolist())
        change = edits.matrices - native[passage, edits.positions]
        assert torch.allclose((mean @ change).norm(dim=-1), change.flatten(1).norm(dim=-1), rtol=1e-3)


@pytest.mark.parametrize("model", ["tiny-rwkv7"], indirect=True)
def test_traced_and_predicted_codes_have_the_mean_beside_them(model, tokens, added):
    sae = make_codes(model)
    traced = reader_trace(model, sae, tokens, n_atoms=4, max_horizon=3, verbose=False)
    chosen = sorted(set(traced.records.atom[traced.records.kind == "atom"]))
    for edits in added:
        own, random = edits.matrices.split(len(chosen))
        for code, matrix, other in zip(chosen, own, random, strict=True):
            expected = static(sae, code) * traced.summary["write_norm"]
            torch.testing.assert_close(matrix, expected, rtol=1e-3, atol=1e-6)
            assert float(other.norm()) == pytest.approx(traced.summary["write_norm"], rel=1e-3)
            mean = vectors(sae, code)[1]
            kept = other @ mean if code < N_KEY else mean @ other
            assert float(kept.norm()) == pytest.approx(float(other.norm()), rel=1e-3)
    predicted = logit_formula_test(
        model, sae, tokens, epsilons=(0.1,), n_atoms=4, n_tokens=2, max_horizon=2, verbose=False
    )
    for (passage, code), part in predicted.records.groupby(["passage", "atom"]):
        start = int(part.position.iloc[0])
        matrix = (static(sae, code) * part.eps.iloc[0]).flatten()

        def add(write, hook, start=start, matrix=matrix):
            write = write.clone()
            write[:, start] += matrix.to(write)
            return write

        with torch.no_grad():
            name = model.write_hook_name(LAYER, HEAD)
            moved = model.run_with_hooks(tokens[passage, None], fwd_hooks=[(name, add)])
            moved = (moved - model(tokens[passage, None]))[0]
        measured = [float(moved[start + r.horizon, r.token]) for r in part.itertuples()]
        np.testing.assert_allclose(part.measured, measured, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["key", "value"])
def test_amplified_codes_are_written_at_the_norm_that_they_have(gdn, passages, steps, side):
    sae = make_codes(gdn)
    acts = encoded(gdn, sae, passages)
    first = 0 if side == "key" else N_KEY
    code = first + int((acts[..., first : first + N_KEY] > 0).sum((0, 1)).argmax())
    result = amplify(gdn, sae, passages, atom=code, factors=(2.0,), n_tokens=3, verbose=False)
    at = (acts[..., code] > 0).nonzero().tolist()
    norm = np.mean([float(contributed(sae, acts[n, t], code).norm()) for n, t in at])
    assert result.summary["mean_norm"] == pytest.approx(norm, rel=1e-4)
    control = result.summary["control_atom"]
    assert (control < N_KEY) == (side == "key")
    assert steps
    for step in steps:
        native, own, random = step.added[:3, 0].double()
        assert not native.any()
        torch.testing.assert_close(own, 2 * norm * static(sae, code), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(random, 2 * norm * static(sae, control), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["write", "state"])
def test_spliced_codes_are_the_stand_ins_of_writes_or_states(gdn, passages, kind):
    sae = make_codes(gdn, kind)
    result = splice_test(gdn, sae, passages, verbose=False)
    if kind == "state":  # spliced as any other SAE's: their own tests follow the state
        assert result.summary["n_passages"] == 2
        return
    name = gdn.write_hook_name(LAYER, HEAD)
    for n, passage in enumerate(passages):
        native = writes(gdn, passages)[n]
        acts = encoded(gdn, sae, passages)[n]
        rebuilt = torch.stack([sum_of_pairs(sae, acts[t]) for t in range(10)])

        def edit(write, hook, rebuilt=rebuilt):
            write = write.clone()
            write[0, :10] = rebuilt.flatten(1).to(write)
            return write

        with torch.no_grad():
            logits = gdn.run_with_hooks(passage[None], fwd_hooks=[(name, edit)])[0, 10:-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), passage[11:])
        row = result.records.iloc[n]
        assert row.nll_spliced == pytest.approx(float(loss), abs=1e-4)
        error = (rebuilt - native[:10]).square().sum() / native[:10].square().sum()
        assert row.error == pytest.approx(float(error), rel=1e-4)


def sum_of_pairs(sae, acts):
    """The stand-in by its definition."""
    key = sum(acts[i] * vectors(sae, i)[0] for i in range(N_KEY))
    value = sum(acts[j] * vectors(sae, j)[0] for j in range(N_KEY, sae.cfg.d_sae))
    return torch.outer(key, value)


def test_atoms_have_one_side(gdn, passages):
    result = top_contexts(gdn, make_sae(gdn), passages, verbose=False)
    assert set(result.records.side) == {"atom"}
    assert "promoted" not in result.records
    assert set(partition_atoms(gdn, make_sae(gdn), passages, verbose=False).records.side) == {"atom"}
