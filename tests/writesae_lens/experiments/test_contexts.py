"""Top contexts against plain loops over the activation of the SAE's own hook."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import contexts, top_contexts

LAYER, HEAD = 1, 2
COLUMNS = [
    "atom",
    "rank",
    "passage",
    "position",
    "coefficient",
    "dominant",
    "cosine",
    "token",
    "text_before",
    "text",
    "text_after",
]
CASES = [
    ("tiny-gdn", "write", 1),
    ("tiny-mamba2", "write", 1),
    ("tiny-rwkv7", "write", 1),
    ("tiny-gdn", "state", 1),
    ("tiny-mamba2", "write", 2),
    ("tiny-rwkv7", "flat", None),
]


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


def activations(model, sae, tokens):
    """[passage, pos, atom], of the hook's own activation."""
    with torch.no_grad():
        return sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name)).double()


def strongest(acts, n_contexts):
    """{atom: [(coefficient, passage, position), ...]}, strongest first, and at how many positions each is."""
    every = {}
    for n, t, atom in acts.nonzero().tolist():
        every.setdefault(atom, []).append((-float(acts[n, t, atom]), n, t))
    top = {a: [(-c, n, t) for c, n, t in sorted(found)[:n_contexts]] for a, found in every.items()}
    return top, {a: len(found) for a, found in every.items()}


@pytest.mark.parametrize(("model", "kind", "rank"), CASES, indirect=["model"])
@pytest.mark.parametrize("n_contexts", [3, 100])
def test_every_row_is_found_by_plain_loops(model, tokens, kind, rank, n_contexts):
    sae = make_sae(model, kind, **({} if rank is None else {"rank": rank}))
    result = top_contexts(model, sae, tokens, n_contexts=n_contexts, before=3, after=2, verbose=False)
    records = result.records
    assert list(records.columns) == COLUMNS
    acts = activations(model, sae, tokens)
    expected, counts = strongest(acts, n_contexts)
    assert records.atom.drop_duplicates().tolist() == sorted(expected)
    writes = cached(model, tokens, model.write_hook_name(LAYER, HEAD)).double()
    atoms = sae.W_dec.detach().double()
    for atom, part in records.groupby("atom"):
        assert part["rank"].tolist() == list(range(1, len(expected[atom]) + 1))
        np.testing.assert_allclose(part.coefficient, [c for c, _, _ in expected[atom]], rtol=1e-4, atol=1e-6)
        # Where coefficients tie but for rounding, either order will do.
        for row, (c, n, t) in zip(part.itertuples(), expected[atom], strict=True):
            near = {x[1:] for x in expected[atom] if abs(x[0] - c) <= 1e-4 * c + 1e-6}
            assert (row.passage, row.position) in near | {(n, t)}
    for row in records.itertuples():
        here = acts[row.passage, row.position]
        assert row.coefficient == pytest.approx(float(here[row.atom]), rel=1e-4, abs=1e-6)
        others = here.clone()
        others[row.atom] = 0
        assert row.dominant == bool(here[row.atom] > others.max())
        cosine = torch.cosine_similarity(writes[row.passage, row.position], atoms[row.atom], dim=0)
        assert row.cosine == pytest.approx(float(cosine), abs=1e-5)
        passage = tokens[row.passage].tolist()
        assert row.token == passage[row.position]
        assert row.text == model.tokenizer.decode(passage[row.position : row.position + 1])
        assert row.text_before == model.tokenizer.decode(passage[max(0, row.position - 3) : row.position])
        assert row.text_after == model.tokenizer.decode(passage[row.position + 1 : row.position + 3])
    check_summary(result.summary, records, counts)


def check_summary(summary, records, counts):
    """Every figure from the records, by its definition."""
    assert summary["n_atoms_active"] == len(counts)
    assert summary["n_atoms_never_active"] == 32 - len(counts)
    assert summary["positions_per_atom"] == np.median(list(counts.values()))
    shares = []
    for atom in counts:
        tokens = records.token[records.atom == atom].tolist()
        if len(tokens) > 1:
            shares.append(max(map(tokens.count, tokens)) / len(tokens))
    assert summary["token_purity"] == pytest.approx(np.mean(shares))
    assert summary["n_passages"] == records.passage.nunique() == 3


def test_a_single_context_an_atom_has_no_purity(gdn, passages, tmp_path):
    result = top_contexts(gdn, make_sae(gdn), passages, n_contexts=1, before=0, after=0, verbose=False)
    assert result.summary["token_purity"] is None
    assert set(result.records["rank"]) == {1}
    assert set(result.records.text_before) == set(result.records.text_after) == {""}
    json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)


def test_text_stops_at_the_ends_of_the_passage(gdn, passages):
    records = top_contexts(gdn, make_sae(gdn), passages, before=99, after=99, verbose=False).records
    whole = [gdn.tokenizer.decode(passage.tolist()) for passage in passages]
    assert len(records) > 20
    for row in records.itertuples():
        assert row.text_before + row.text + row.text_after == whole[row.passage]


def test_of_two_equally_active_atoms_one_is_dominant(gdn, passages):
    sae = make_sae(gdn)
    with torch.no_grad():
        for parameter in sae.parameters():
            if len(parameter) == 32:
                parameter[4] = parameter[7]
        sae.b_enc[[4, 7]] = 1.0
    acts = activations(gdn, sae, passages)
    assert torch.equal(acts[..., 4], acts[..., 7])
    records = top_contexts(gdn, sae, passages, verbose=False).records
    assert set(records.atom) == {4, 7}
    assert (records.groupby(["passage", "position"]).dominant.sum() <= 1).all()
    assert set(records.atom[records.dominant]) == {4}


def test_a_passage_in_which_nothing_is_active(gdn, passages, tmp_path):
    sae = make_sae(gdn, k=32)
    strongest_of = activations(gdn, sae, passages).amax((1, 2))
    loud = int(strongest_of.argmax())
    with torch.no_grad():
        sae.b_enc.fill_(-float(strongest_of.mean()))
    for _ in range(2):  # computed, then read back
        result = top_contexts(gdn, sae, passages, progress_folder=str(tmp_path / "p"), verbose=False)
        assert set(result.records.passage) == {loud}
        assert len(result.records) == int((activations(gdn, sae, passages) > 0).sum())
        assert result.records.dominant.dtype == bool
    assert result.summary["n_passages"] == 2


def test_one_passage_is_enough(gdn, passages):
    result = top_contexts(gdn, make_sae(gdn), passages[:1], verbose=False)
    assert set(result.records.passage) == {0}
    assert result.summary["n_passages"] == 1


def test_a_model_without_a_tokenizer_shows_no_text(gdn, passages, tmp_path, monkeypatch):
    monkeypatch.setattr(gdn, "tokenizer", None)
    result = top_contexts(gdn, make_sae(gdn), passages, verbose=False)
    assert result.records[["text_before", "text", "text_after"]].isna().all(axis=None)
    assert (result.save(tmp_path) / "contexts.png").exists()


def test_text_is_cut_into_passages(gdn):
    text = zoo.held_out_text()[:300]
    ids = gdn.to_tokens(text, prepend_bos=False)[0]
    cut = ids[: len(ids) // 20 * 20].view(-1, 20)
    result = top_contexts(gdn, make_sae(gdn), text, context_size=20, verbose=False)
    assert result.summary["n_passages"] == len(cut)
    records = result.records
    assert records.token.tolist() == [int(cut[r.passage, r.position]) for r in records.itertuples()]
    sae = make_sae(gdn)
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = 11, True
    records = top_contexts(gdn, sae, text, verbose=False).records
    cut = ids[: len(ids) // 10 * 10].view(-1, 10)
    later = records[records.position > 0]
    assert later.token.tolist() == [int(cut[r.passage, r.position - 1]) for r in later.itertuples()]
    with pytest.raises(WriteSAEError, match="the text is too short"):
        top_contexts(gdn, make_sae(gdn), text, verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_contexts": 0}, "n_contexts=0"),
        ({"n_contexts": -1}, "n_contexts=-1"),
        ({"before": -1}, "before=-1"),
        ({"after": -1}, "after=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"context_size": 10}, "cut into passages already"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        top_contexts(gdn, make_sae(gdn), passages, verbose=False, **options)


def test_no_atom_fires(gdn, passages, tmp_path):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    for folder in (None, str(tmp_path), str(tmp_path)):
        with pytest.raises(WriteSAEError, match="no atom fires in 2 passages of 20 tokens"):
            top_contexts(gdn, sae, passages, progress_folder=folder, verbose=False)


def test_nothing_depends_on_the_seed(gdn, passages):
    first, other = (top_contexts(gdn, make_sae(gdn), passages, seed=s, verbose=False) for s in (1, 2))
    pd.testing.assert_frame_equal(first.records, other.records)
    assert first.summary == other.summary


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    sae = make_sae(gdn)
    whole = top_contexts(gdn, sae, passages, verbose=False)
    read, calls = contexts._strongest, []

    def interrupted(*args):
        calls.append(args[3].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(contexts, "_strongest", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        top_contexts(gdn, sae, passages, progress_folder=folder, verbose=False)
    resumed = top_contexts(gdn, sae, passages, progress_folder=folder, verbose=False)
    assert calls == [passages[0].tolist()] + [passages[1].tolist()] * 2
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    with pytest.raises(WriteSAEError, match="other settings"):
        top_contexts(gdn, sae, passages, n_contexts=3, progress_folder=folder, verbose=False)
    with pytest.raises(WriteSAEError, match="other settings"):
        top_contexts(gdn, sae, passages.flip(0), progress_folder=folder, verbose=False)
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "contexts.png"}
    kept = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["token_purity"] == whole.summary["token_purity"]
    saved = pd.read_csv(out / "records.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(saved, whole.records)
    assert isinstance(resumed.plot(), Figure)
