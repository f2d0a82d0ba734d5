"""Selectivity against full edited forward passes, sets and overlaps in plain Python."""

import json
import sys
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import selectivity

LAYER, HEAD = 1, 2
CASES = [
    ("tiny-gdn", "write", 1, 1.0),
    ("tiny-mamba2", "write", 1, 1.0),
    ("tiny-rwkv7", "write", 1, 1.0),
    ("tiny-gdn", "state", 1, 2.0),
    ("tiny-mamba2", "write", 2, 0.5),
    ("tiny-rwkv7", "flat", None, 1.0),
]
HOW = {"n_atoms": 2, "n_positions": 2, "top_k": 5, "verbose": False}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 2 * 20].view(2, 20)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def passages(gdn):
    return gdn.to_tokens(zoo.held_out_text()[:2000], prepend_bos=False, truncate=False)[0, :40].view(2, 20)


def make_sae(model, kind="write", **options):
    torch.manual_seed(0)
    cell = model.cell(LAYER, HEAD)
    if kind == "flat":
        cfg = TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=32, k=2, rescale_acts_by_decoder_norm=False)
        sae, kind = TopKSAE(cfg), "write"
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(LAYER, HEAD)
    return sae


def cached(model, tokens, name):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


def alive(model, sae, tokens):
    """Atoms that are dominant somewhere."""
    with torch.no_grad():
        acts = sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name))
    return {int(a.argmax()) for a in acts.flatten(0, 1) if a.max() > 0}


def edited(model, passage, positions, matrices):
    """Logits at each position after a pass in which a hook adds the matrix to the write, and without."""

    def add(x, hook):
        x = x.clone()
        x[torch.arange(len(positions)), positions] += torch.stack(matrices).flatten(1).to(x)
        return x

    rows = passage.expand(len(positions), -1)
    with torch.no_grad():
        native = model(passage[None])[0, positions]
        changed = model.run_with_hooks(rows, fwd_hooks=[(model.write_hook_name(LAYER, HEAD), add)])
    return changed[torch.arange(len(positions)), positions].double(), native.double()


def spy_on_writes(monkeypatch):
    """What reaches the model: (passage, position, matrix) of every branch."""
    written, swapped = [], HookedRecurrent.run_with_swapped_writes

    def spy(self, passage, layer, head, positions, keys, values, *args):
        matrices = (keys.mT @ values).double()
        written.extend((passage.tolist(), int(p), m) for p, m in zip(positions, matrices, strict=True))
        return swapped(self, passage, layer, head, positions, keys, values, *args)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", spy)
    return written


@pytest.mark.parametrize(("model", "kind", "rank", "magnitude"), CASES, indirect=["model"])
def test_every_row_is_a_full_edited_forward_pass(model, tokens, monkeypatch, kind, rank, magnitude):
    sae = make_sae(model, kind, **({} if rank is None else {"rank": rank}))
    written = spy_on_writes(monkeypatch)
    how = {"n_atoms": 3, "n_positions": 2, "top_k": 7, "magnitude": magnitude, "verbose": False}
    result = selectivity(model, sae, tokens, seed=3, **how)
    monkeypatch.undo()
    records = result.records
    assert list(records.columns) == ["passage", "position", "kind", "atom", "kl", "max_shift", "top"]
    atoms = records.atom[records.kind == "atom"].unique()
    assert len(atoms) == 3
    assert set(atoms) <= alive(model, sae, tokens)
    assert set(records.atom[records.kind == "random"]) == {0, 1, 2}
    places = records[["passage", "position"]].drop_duplicates()
    assert places.passage.tolist() == [0, 0, 1, 1]
    assert len(records) == len(records.drop_duplicates(["passage", "position", "kind", "atom"])) == 4 * 6
    writes = cached(model, tokens, model.write_hook_name(LAYER, HEAD)).double()
    drawn = {0: [], 1: [], 2: []}
    for n, part in records.groupby("passage"):
        matrices = []
        for row in part.itertuples():
            size = magnitude * writes[n, row.position].norm()
            if row.kind == "atom":
                matrix = sae.W_dec[row.atom].detach().double().view(writes_shape(model))
                matrices.append(size * matrix / matrix.norm())
                continue
            found = [
                (m.flatten() - writes[n, row.position]).view(writes_shape(model))
                for passage, position, m in written
                if passage == tokens[n].tolist() and position == row.position
            ]
            assert len(found) == 6
            # The random ones come after the atoms, in the order of their numbers.
            matrices.append(found[3 + row.atom])
            assert float(matrices[-1].norm()) == pytest.approx(float(size), rel=1e-4)
            values = torch.linalg.svdvals(matrices[-1])
            assert values[1] < 1e-4 * values[0]
            drawn[row.atom].append(matrices[-1].flatten() / matrices[-1].norm())
        positions = torch.as_tensor(part.position.to_numpy(copy=True))
        after, before = edited(model, tokens[n], positions, matrices)
        log_after, log_before = after.log_softmax(-1), before.log_softmax(-1)
        kl = (log_after.exp() * (log_after - log_before)).sum(-1)
        np.testing.assert_allclose(part.kl, kl, rtol=1e-3, atol=1e-6)
        shift = after - before
        shift = (shift - shift.mean(-1, keepdim=True)).numpy()
        for row, moved in zip(part.itertuples(), shift, strict=True):
            top = json.loads(row.top)
            assert len(set(top)) == 7
            largest = np.sort(np.abs(moved))[::-1][:7]
            np.testing.assert_allclose(np.abs(moved[top]), largest, rtol=0, atol=1e-5)
            assert row.max_shift == pytest.approx(moved[top[0]], abs=1e-5)
    # Each random matrix is drawn once, and is not another one.
    for own in drawn.values():
        assert len(own) == 4
        assert all(float(a @ own[0]) > 0.999 for a in own)
    assert all(abs(float(a[0] @ b[0])) < 0.5 for a, b in combinations(drawn.values(), 2))
    check_summary(result.summary, records, 7, model.cfg.d_vocab)


def writes_shape(model):
    cell = model.cell(LAYER, HEAD)
    return cell.d_k, cell.d_v


def check_summary(summary, records, top_k, d_vocab):
    """Every figure from the records, by its definition."""
    assert summary["n_writes"] == len(records)
    assert summary["chance_overlap"] == pytest.approx(top_k / d_vocab)
    for kind in ("atom", "random"):
        rows = [r for r in records.itertuples() if r.kind == kind]
        own, other = {}, []
        for a, b in combinations(rows, 2):
            common = len(set(json.loads(a.top)) & set(json.loads(b.top))) / top_k
            same_place = (a.passage, a.position) == (b.passage, b.position)
            if a.atom == b.atom:
                own.setdefault(a.atom, []).append(common)
            elif same_place:
                other.append(common)
        every = [x for overlaps in own.values() for x in overlaps]
        assert summary[f"own_overlap_{kind}"] == pytest.approx(np.mean(every))
        assert summary[f"other_overlap_{kind}"] == pytest.approx(np.mean(other))
        assert summary[f"selectivity_{kind}"] == pytest.approx(np.mean(every) - np.mean(other), abs=1e-9)
        # Of so few matrices all resamples can be told over.
        means = [np.mean(np.concatenate(draw)) for draw in product(own.values(), repeat=len(own))]
        interval = np.quantile(means, [0.025, 0.975], method="inverted_cdf") - np.mean(other)
        assert summary[f"selectivity_ci_{kind}"] == pytest.approx(interval, abs=1e-9)
        assert summary[f"median_kl_{kind}"] == pytest.approx(np.median([r.kl for r in rows]))


def test_a_set_of_all_tokens_is_the_same_for_all(gdn, passages):
    result = selectivity(gdn, make_sae(gdn), passages, **(HOW | {"top_k": 10**6}))
    assert result.summary["top_k"] == gdn.cfg.d_vocab
    assert all(sorted(json.loads(top)) == list(range(gdn.cfg.d_vocab)) for top in result.records.top)
    for name in ("own_overlap_atom", "other_overlap_atom", "own_overlap_random", "chance_overlap"):
        assert result.summary[name] == 1.0
    assert result.summary["selectivity_atom"] == 0.0


def test_a_set_of_one_token(gdn, passages):
    result = selectivity(gdn, make_sae(gdn), passages, **(HOW | {"top_k": 1}))
    assert all(len(json.loads(top)) == 1 for top in result.records.top)
    assert result.summary["own_overlap_atom"] in {n / 12 for n in range(13)}


def test_one_passage_and_one_position_leave_no_own_overlap(gdn, passages, tmp_path):
    result = selectivity(gdn, make_sae(gdn), passages[:1], **(HOW | {"n_positions": 1}))
    assert result.summary["own_overlap_atom"] is None
    assert result.summary["selectivity_ci_atom"] is None
    assert result.summary["other_overlap_atom"] is not None
    json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)


def test_a_single_living_atom_leaves_no_other_overlap(gdn, passages, tmp_path):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc[7] = 10.0
    result = selectivity(gdn, sae, passages, **HOW)
    assert set(result.records.atom[result.records.kind == "atom"]) == {7}
    assert result.summary["other_overlap_atom"] is None
    assert result.summary["own_overlap_atom"] is not None
    json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)


def test_more_positions_and_atoms_than_there_are_means_all(gdn, passages):
    sae = make_sae(gdn)
    result = selectivity(gdn, sae, passages[:1, :5], n_atoms=99, n_positions=99, top_k=5, verbose=False)
    atoms = result.records[result.records.kind == "atom"]
    living = alive(gdn, sae, passages[:1, :5])
    assert set(atoms.atom) == living
    assert result.summary["n_atoms"] == len(living)
    assert sorted(atoms.position.unique()) == [0, 1, 2, 3, 4]


def test_text_is_cut_into_passages(gdn):
    text = zoo.held_out_text()[:200]
    cut = len(gdn.to_tokens(text, prepend_bos=False)[0]) // 20
    records = selectivity(gdn, make_sae(gdn), text, context_size=20, **HOW).records
    assert sorted(records.passage.unique()) == list(range(cut))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_atoms": 1}, "n_atoms=1 makes no sense: give 2 or more"),
        ({"n_positions": 0}, "n_positions=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"magnitude": 0.0}, "magnitude must be positive"),
        ({"magnitude": -1.0}, "magnitude must be positive"),
        ({"magnitude": float("nan")}, "magnitude must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"context_size": 10}, "cut into passages already"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        selectivity(gdn, make_sae(gdn), passages, **(HOW | options))


def test_no_atom_fires(gdn, passages):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(WriteSAEError, match="no atom fires in 2 passages of 20 tokens"):
        selectivity(gdn, sae, passages, **HOW)


def test_one_seed_gives_one_result_and_another_other_choices(gdn, passages):
    first, again, other = (selectivity(gdn, make_sae(gdn), passages, seed=s, **HOW) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary
    assert first.records.position.tolist() != other.records.position.tolist()
    assert set(first.records.atom) != set(other.records.atom)
    random = (r.records.kl[r.records.kind == "random"].to_numpy() for r in (first, other))
    assert not np.allclose(*random, rtol=1e-3, atol=0)


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    module = sys.modules[selectivity.__module__]  # the function hides it in the package
    sae = make_sae(gdn)
    whole = selectivity(gdn, sae, passages, **HOW)
    push, calls = module._push, []

    def interrupted(*args):
        calls.append(args[2].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return push(*args)

    monkeypatch.setattr(module, "_push", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        selectivity(gdn, sae, passages, progress_folder=folder, **HOW)
    resumed = selectivity(gdn, sae, passages, progress_folder=folder, **HOW)
    assert calls == [passages[0].tolist()] + [passages[1].tolist()] * 2
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"magnitude": 2.0}, {"n_atoms": 3}, {"n_positions": 3}, {"top_k": 4}):
        with pytest.raises(WriteSAEError, match="other settings"):
            selectivity(gdn, sae, passages, progress_folder=folder, **(HOW | other))
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "selectivity.png"}
    kept = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["own_overlap_atom"] == whole.summary["own_overlap_atom"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), whole.records)
    assert isinstance(resumed.plot(), Figure)
