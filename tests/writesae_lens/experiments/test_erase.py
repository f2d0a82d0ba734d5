"""Erasure against full edited forward passes of the same model, and its summary against plain statistics."""

import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens import TopKSAE, TopKSAEConfig
from scipy import stats

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, statistics
from writesae_lens.experiments import erase as erasure
from writesae_lens.experiments import erase_atom

LAYER, HEAD = 1, 2
DOSES = (1.0, 3.0)
CASES = [
    ("tiny-gdn", "write", 1),
    ("tiny-mamba2", "write", 1),
    ("tiny-rwkv7", "write", 1),
    ("tiny-gdn", "state", 1),
    ("tiny-mamba2", "write", 2),
    ("tiny-rwkv7", "flat", None),
]
HOW = {"doses": (0.5, 1.0), "verbose": False}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """Of two passages there are four resamples."""
    monkeypatch.setattr(statistics, "N_RESAMPLES", 200)


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
        sae = TopKSAE(
            TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=32, k=2, rescale_acts_by_decoder_norm=False)
        )
        kind = "write"
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(LAYER, HEAD)
    return sae


def cached(model, tokens, name):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


def activations(model, sae, tokens):
    """[passage, pos, atom], of the hook's own activation."""
    with torch.no_grad():
        return sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name)).double()


def edited(model, passage, positions, matrices):
    """log p at each position after a pass in which a hook adds the matrix to the write there, and without."""

    def add(x, hook):
        x = x.clone()
        x[torch.arange(len(positions)), positions] += torch.stack(matrices).flatten(1).to(x)
        return x

    rows = passage.expand(len(positions), -1)
    with torch.no_grad():
        native = model(passage[None])[0, positions]
        changed = model.run_with_hooks(rows, fwd_hooks=[(model.write_hook_name(LAYER, HEAD), add)])
    changed = changed[torch.arange(len(positions)), positions]
    return changed.double().log_softmax(-1), native.double().log_softmax(-1)


def check_rows(model, tokens, rows, matrices, token):
    """The rows' delta_logp and kl are those of full passes with these matrices added."""
    for passage in rows.passage.unique():
        here = np.flatnonzero(rows.passage == passage)
        mine = rows.iloc[here]
        positions = torch.as_tensor(mine.position.to_numpy(copy=True))
        after, before = edited(model, tokens[passage], positions, [matrices[i] for i in here])
        np.testing.assert_allclose(mine.delta_logp, (after - before)[:, token], rtol=0, atol=1e-5)
        kl = (after.exp() * (after - before)).sum(-1)
        np.testing.assert_allclose(mine.kl, kl, rtol=1e-3, atol=1e-6)
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
        assert summary[f"share_of_falls_{condition}"] == pytest.approx(np.mean(moved < 0))
        assert summary[f"median_kl_{condition}"] == pytest.approx(np.median(at.kl))
        p = stats.wilcoxon(moved, alternative="less").pvalue
        assert summary[f"fall_p_{condition}"] == pytest.approx(p)
        by_dose = {f"{d:g}": np.median(part.delta_logp[part.dose == d]) for d in part.dose.unique()}
        assert summary[f"median_delta_logp_by_dose_{condition}"] == pytest.approx(by_dose)
        if at.passage.nunique() == 1:
            assert summary[f"delta_logp_ci_{condition}"] is None
            continue
        # Of so few passages all resamples can be told over.
        groups = [moved[at.passage == n] for n in at.passage.unique()]
        medians = [np.median(np.concatenate(draw)) for draw in product(groups, repeat=len(groups))]
        interval = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
        assert summary[f"delta_logp_ci_{condition}"] == pytest.approx(interval, abs=1e-9)


@pytest.mark.parametrize(("model", "kind", "rank"), CASES, indirect=["model"])
def test_every_row_is_a_full_edited_forward_pass(model, tokens, monkeypatch, kind, rank):
    written = []
    swapped = HookedRecurrent.run_with_swapped_writes

    def spy(self, passage, layer, head, positions, keys, values, *args):
        matrices = (keys.mT @ values).double()
        written.extend((passage.tolist(), int(p), m) for p, m in zip(positions, matrices, strict=True))
        return swapped(self, passage, layer, head, positions, keys, values, *args)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", spy)
    sae = make_sae(model, kind, **({} if rank is None else {"rank": rank}))
    result = erase_atom(model, sae, tokens, doses=DOSES, seed=4, verbose=False)
    records, summary = result.records, result.summary
    acts = activations(model, sae, tokens)
    dominant = acts.argmax(-1).flatten().bincount()
    atom = summary["atom"]
    assert dominant[atom] == dominant.max()
    matrix = sae.W_dec[atom].detach().double()
    # The even firings choose the token, the odd ones are tested.
    firings = [(n, t, float(acts[n, t, atom])) for n, t in acts[..., atom].nonzero().tolist()]
    choosing, tested = firings[::2], firings[1::2]
    fall = 0
    for n in range(2):
        here = [(t, -coefficient * matrix) for passage, t, coefficient in choosing if passage == n]
        after, before = edited(model, tokens[n], torch.tensor([t for t, _ in here]), [m for _, m in here])
        fall = fall + (before - after).sum(0)
    token = summary["preferred_token"]
    assert token == int(fall.argmax())
    assert summary["preferred_token_text"] == model.tokenizer.decode([token])
    assert summary["n_positions_that_chose_it"] == len(choosing)
    assert summary["n_passages"] == 2
    assert (summary["doses"], summary["seed"]) == (list(DOSES), 4)
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
    writes = cached(model, tokens, model.write_hook_name(LAYER, HEAD)).double()
    matrices, directions = [], {}
    for row in rows.itertuples():
        passage = tokens[row.passage].tolist()
        changes = [
            (m.flatten() - writes[row.passage, row.position]).unflatten(0, m.shape)
            for p, t, m in written
            if p == passage and t == row.position
        ]
        size = row.dose * row.coefficient * matrix.norm()
        same = [
            c
            for c in changes
            if abs(float(c.norm() / size) - 1) < 1e-3
            and abs(float((c.flatten() @ matrix.flatten()) / (c.norm() * matrix.norm()))) < 0.5
        ]
        assert len(same) == 1
        values = torch.linalg.svdvals(same[0])
        assert values[1] < 1e-4 * values[0]
        matrices.append(same[0])
        directions.setdefault((row.passage, row.position), []).append(same[0].flatten() / same[0].norm())
    check_rows(model, tokens, rows, matrices, token)
    for own in directions.values():
        assert all(float(a @ own[0]) > 0.999 for a in own)
    firsts = torch.stack([own[0] for own in directions.values()])
    assert float((firsts @ firsts.T).fill_diagonal_(0).abs().max()) < 0.5
    check_summary(summary, records, 1.0)


@pytest.mark.parametrize("model", ["tiny-mamba2"], indirect=True)
def test_a_given_atom_and_token_are_tested_at_every_firing(model, tokens):
    sae = make_sae(model)
    acts = activations(model, sae, tokens)
    atom = int((acts > 0).sum((0, 1)).argsort()[-2])
    token = next(i for i in range(300, 2048) if len(encode(model, model.tokenizer.decode([i]))) == 1)
    text = model.tokenizer.decode([token])
    result = erase_atom(model, sae, tokens, atom=atom, token=text, doses=(0.5, 3.0), verbose=False)
    assert result.summary["preferred_token"] == token
    assert result.summary["preferred_token_text"] == text
    assert result.summary["atom"] == atom
    assert result.summary["n_positions_that_chose_it"] == 0
    firings = acts[..., atom].nonzero().tolist()
    rows = result.records[result.records.condition == "firing"]
    assert rows[rows.dose == 3][["passage", "position"]].to_numpy().tolist() == firings
    matrix = sae.W_dec[atom].detach().double()
    check_rows(model, tokens, rows, [-r.dose * r.coefficient * matrix for r in rows.itertuples()], token)
    check_summary(result.summary, result.records, 0.5)
    assert result.summary["n_elsewhere"] == result.summary["n_firing"] == len(firings)


def encode(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def test_a_lone_firing_chooses_the_token_and_is_tested(gdn, passages):
    sae = make_sae(gdn, k=32)
    strengths = activations(gdn, sae, passages)[..., 5]
    top = strengths.flatten().sort(descending=True).values
    with torch.no_grad():
        sae.b_enc[5] = -float(top[:2].mean())
    result = erase_atom(gdn, sae, passages, atom=5, **HOW)
    firing = result.records[(result.records.condition == "firing") & (result.records.dose == 1)]
    assert firing[["passage", "position"]].to_numpy().tolist() == [list(divmod(int(strengths.argmax()), 20))]
    assert result.summary["n_firing"] == result.summary["n_positions_that_chose_it"] == 1
    matrix = -float(firing.coefficient.iloc[0]) * sae.W_dec[5].detach()
    passage, position = firing.passage.iloc[0], firing.position.iloc[0]
    after, before = edited(gdn, passages[passage], torch.tensor([position]), [matrix])
    assert result.summary["preferred_token"] == int((before - after)[0].argmax())
    assert isinstance(result.plot(), Figure)


def test_an_atom_that_is_active_everywhere_has_no_control_elsewhere(gdn, passages, tmp_path):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc[7] = 1.0
    result = erase_atom(gdn, sae, passages, **HOW)
    assert result.summary["atom"] == 7
    assert result.summary["n_elsewhere"] == 0
    assert result.summary["n_firing"] == 20
    assert (tmp_path / "out" / "erasure.png") in set(result.save(tmp_path / "out").iterdir())


def test_one_passage_is_enough(gdn, passages):
    result = erase_atom(gdn, make_sae(gdn), passages[:1], **HOW)
    assert result.summary["n_passages"] == 1
    assert result.summary["delta_logp_ci_firing"] is None
    assert "(" not in result.headline.split("moves by")[1]


def test_text_is_cut_into_passages(gdn):
    text = zoo.held_out_text()[:300]
    result = erase_atom(gdn, make_sae(gdn), text, context_size=20, **HOW)
    ids = gdn.to_tokens(text, prepend_bos=False)[0]
    cut = ids[: len(ids) // 20 * 20].view(-1, 20)
    assert result.summary["n_passages"] == len(cut)
    records = result.records
    assert records.token.tolist() == [int(cut[r.passage, r.position]) for r in records.itertuples()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doses": ()}, "doses must be positive"),
        ({"doses": (1.0, 0.0)}, "doses must be positive"),
        ({"doses": (-1.0,)}, "doses must be positive"),
        ({"doses": (float("nan"),)}, "doses must be positive"),
        ({"doses": (float("inf"),)}, "doses must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"atom": 32}, "atom 32 does not exist: the SAE has atoms 0 to 31"),
        ({"atom": -1}, "atom -1 does not exist"),
        ({"token": 2048}, "token 2048 does not exist: ids run from 0 to 2047"),
        ({"token": -1}, "token -1 does not exist"),
        ({"context_size": 10}, "cut into passages already"),
        ({"context_size": 0}, "context_size=0"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        erase_atom(gdn, make_sae(gdn), passages, **(HOW | options))


def test_a_text_of_several_tokens_is_refused_with_its_pieces(gdn, passages):
    text = "unquestionably strange"
    pieces = [gdn.tokenizer.decode([i]) for i in encode(gdn, text)]
    assert len(pieces) > 1
    with pytest.raises(WriteSAEError, match=f"not one token but {len(pieces)}") as caught:
        erase_atom(gdn, make_sae(gdn), passages, token=text, **HOW)
    assert all(repr(piece) in str(caught.value) for piece in pieces)


def test_silent_atoms_are_refused(gdn, passages):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc[9] = -1e3
    with pytest.raises(WriteSAEError, match="atom 9 is active at no position of these 2 passages"):
        erase_atom(gdn, sae, passages, atom=9, **HOW)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(WriteSAEError, match="no atom fires in 2 passages of 20 tokens"):
        erase_atom(gdn, sae, passages, **HOW)


def test_one_seed_gives_one_result_and_another_other_controls(gdn, passages):
    first, again, other = (erase_atom(gdn, make_sae(gdn), passages, seed=s, **HOW) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary

    def moved(result, condition):
        return result.records.delta_logp[result.records.condition == condition].to_numpy()

    assert np.array_equal(moved(first, "firing"), moved(other, "firing"))
    assert not np.array_equal(moved(first, "random"), moved(other, "random"))
    assert not np.array_equal(moved(first, "elsewhere"), moved(other, "elsewhere"))


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    sae = make_sae(gdn)
    whole = erase_atom(gdn, sae, passages, **HOW)
    erase, calls = erasure._erase, []

    def interrupted(*args):
        calls.append(args[3].tolist())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return erase(*args)

    monkeypatch.setattr(erasure, "_erase", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        erase_atom(gdn, sae, passages, progress_folder=folder, **HOW)
    resumed = erase_atom(gdn, sae, passages, progress_folder=folder, **HOW)
    assert calls == [passages[0].tolist()] * 3 + [passages[1].tolist()] * 4
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"doses": (0.5,)}, {"token": 3}):
        with pytest.raises(WriteSAEError, match="other settings"):
            erase_atom(gdn, sae, passages, progress_folder=folder, **(HOW | other))
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "erasure.png"}
    kept = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["preferred_token"] == whole.summary["preferred_token"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), whole.records)
    assert isinstance(resumed.plot(), Figure)
