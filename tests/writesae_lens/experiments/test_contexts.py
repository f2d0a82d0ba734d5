"""Top contexts against plain loops over the activation of the SAE's own hook."""

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_models import zoo
from tests.writesae_lens.experiments.truth import (
    atoms_of,
    encoded,
    every_subject,
    make_codes,
    make_sae,
    read_passages,
    silenced,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import top_contexts


def strongest(acts, n_contexts):
    """{atom: [(coefficient, passage, position), ...]}, strongest first, and at how many positions each is."""
    every = {}
    for n, t, atom in acts.nonzero().tolist():
        every.setdefault(atom, []).append((-float(acts[n, t, atom]), n, t))
    top = {a: [(-c, n, t) for c, n, t in sorted(contexts)[:n_contexts]] for a, contexts in every.items()}
    return top, {a: len(contexts) for a, contexts in every.items()}


@every_subject
@pytest.mark.parametrize("n_contexts", [3, 100])
def test_every_row_is_found_by_plain_loops(model, kind, options, n_contexts):
    sae, tokens = make_sae(model, kind, **options), read_passages(model, 3)
    result = top_contexts(model, sae, tokens, n_contexts=n_contexts, before=3, after=2, verbose=False)
    records = result.records
    assert list(records.columns) == [
        "atom", "rank", "passage", "position", "coefficient", "dominant", "cosine", "token", "text_before",
        "text", "text_after", "side",
    ]  # fmt: skip
    acts = encoded(model, sae, tokens)
    expected, counts = strongest(acts, n_contexts)
    assert records.atom.drop_duplicates().tolist() == sorted(expected)
    native, atoms = writes(model, tokens).flatten(2), atoms_of(sae, model).flatten(1)
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
        cosine = torch.cosine_similarity(native[row.passage, row.position], atoms[row.atom], dim=0)
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


@pytest.mark.parametrize("kind", ["atoms", "codes"])
def test_chosen_features_have_the_rows_that_they_have_among_all(gdn, passages, kind):
    sae = make_sae(gdn) if kind == "atoms" else make_codes(gdn)
    every = top_contexts(gdn, sae, passages, verbose=False).records
    silent = next(n for n in range(sae.cfg.d_sae) if n not in set(every.atom))
    first, *_, last = every.atom.unique().tolist()
    for atom, kept in ((last, [last]), ((last, first, silent), [first, last]), ([first], [first])):
        result = top_contexts(gdn, sae, passages, atom=atom, verbose=False)
        expected = every[every.atom.isin(kept)].reset_index(drop=True)
        # A column of which some entries are missing has another type than a whole one.
        ours, theirs = (x.astype(object).where(x.notna(), None) for x in (result.records, expected))
        pd.testing.assert_frame_equal(ours, theirs)
        n_silent = 1 if isinstance(atom, tuple) else 0
        assert result.summary["n_atoms_active"] == len(kept)
        assert result.summary["n_atoms_never_active"] == n_silent
        if kind == "codes":
            sides = result.summary["by_side"].values()
            assert sum(side["n_atoms_active"] for side in sides) == len(kept)
            assert sum(side["n_atoms_never_active"] for side in sides) == n_silent
    what = "atom" if kind == "atoms" else "code"
    for atom, message in (
        (silent, f"{what} {silent} is active at no position of these 2 passages"),
        ([silent], f"{what} \\[{silent}\\] is active at no position of these 2 passages"),
        ((0, 9999), f"{what} 9999 does not exist"),
        (True, "atom must be a list or tuple"),
        ((), "atom=\\[\\] gives contexts of nothing"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            top_contexts(gdn, sae, passages, atom=atom, verbose=False)


def test_a_single_context_an_atom_has_no_purity(gdn, passages, tmp_path):
    result = top_contexts(gdn, make_sae(gdn), passages, n_contexts=1, before=0, after=0, verbose=False)
    assert result.summary["token_purity"] is None
    assert set(result.records["rank"]) == {1}
    assert set(result.records.text_before) == set(result.records.text_after) == {""}
    result.save(tmp_path)  # the figure too, and no NaN


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
    acts = encoded(gdn, sae, passages)
    assert torch.equal(acts[..., 4], acts[..., 7])
    records = top_contexts(gdn, sae, passages, verbose=False).records
    assert set(records.atom) == {4, 7}
    assert (records.groupby(["passage", "position"]).dominant.sum() <= 1).all()
    assert set(records.atom[records.dominant]) == {4}


def test_a_passage_in_which_nothing_is_active(gdn, passages, tmp_path):
    sae = make_sae(gdn, k=32)
    strongest_of = encoded(gdn, sae, passages).amax((1, 2))
    loud = int(strongest_of.argmax())
    with torch.no_grad():
        sae.b_enc.fill_(-float(strongest_of.mean()))
    for _ in range(2):  # computed, then read back
        result = top_contexts(gdn, sae, passages, progress_folder=str(tmp_path / "p"), verbose=False)
        assert set(result.records.passage) == {loud}
        assert len(result.records) == int((encoded(gdn, sae, passages) > 0).sum())
        assert result.records.dominant.dtype == bool
    assert result.summary["n_passages"] == 2


def test_where_no_atom_fires_the_error_is_the_same_after_a_resume(gdn, passages, tmp_path):
    for _ in range(2):
        with pytest.raises(WriteSAEError, match="nothing fires in 2 passages of 20 tokens"):
            top_contexts(gdn, silenced(make_sae(gdn)), passages, progress_folder=str(tmp_path), verbose=False)


def test_a_model_without_a_tokenizer_shows_no_text(gdn, passages, tmp_path, monkeypatch):
    monkeypatch.setattr(gdn, "tokenizer", None)
    result = top_contexts(gdn, make_sae(gdn), passages, verbose=False)
    assert result.records[["text_before", "text", "text_after"]].isna().all(axis=None)
    assert (result.save(tmp_path) / "contexts.png").exists()


def test_text_is_cut_with_the_bos_token_of_the_saes_training(gdn):
    sae, text = make_sae(gdn), zoo.held_out_text()[:300]
    ids = gdn.to_tokens(text, prepend_bos=False)[0]
    cut = ids[: len(ids) // 10 * 10].view(-1, 10)
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = 11, True
    records = top_contexts(gdn, sae, text, verbose=False).records
    assert sorted(records.passage.unique()) == list(range(len(cut)))
    assert set(records.token[records.position == 0]) == {gdn.tokenizer.bos_token_id}
    later = records[records.position > 0]
    assert later.token.tolist() == [int(cut[r.passage, r.position - 1]) for r in later.itertuples()]


def test_nothing_depends_on_the_seed(gdn, passages):
    one, other = (top_contexts(gdn, make_sae(gdn), passages, seed=s, verbose=False) for s in (1, 2))
    pd.testing.assert_frame_equal(one.records, other.records)
    of_the_run = {name: other.summary[name] for name in ("seed", "call", "date")}
    assert one.summary | of_the_run == other.summary
