"""Amplified atoms against full passes without a cache, with a hook that adds the atom at decoded tokens."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    encoded,
    make_sae,
    read_passages,
    silenced,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import amplify

STATISTICS = ("newlines_per_400", "distinct_tokens", "repeated_4grams", "characters_per_token")
HOW = {"n_tokens": 4, "temperature": 0.0, "verbose": False}


@torch.no_grad()
def continued(model, prompt, matrix, n):
    """Greedy, a full pass for every token, the matrix added at the decoded ones; ids and last logits."""

    def add(write, hook):
        write = write.clone()
        write[:, len(prompt) :] += matrix.flatten().to(write.dtype)
        return write

    sequence, name = prompt[None], model.write_hook_name(LAYER, HEAD)
    for _ in range(n):
        logits = model.run_with_hooks(sequence, fwd_hooks=[(name, add)], use_cache=False)
        sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return sequence[0, len(prompt) :].tolist(), logits[0, -1]


def counted(model, ids):
    """The four statistics of a text, by loops."""
    text, seen, repeats, grams = model.tokenizer.decode(ids), set(), 0, 0
    for start in range(len(ids) - 3):
        gram = tuple(ids[start : start + 4])
        repeats += gram in seen
        seen.add(gram)
        grams += 1
    newlines = sum(character == "\n" for character in text)
    return {
        "newlines_per_400": newlines / len(ids) * 400,
        "distinct_tokens": len(np.unique(ids)) / len(ids),
        "repeated_4grams": repeats / grams if grams else 0,
        "characters_per_token": len(text) / len(ids),
    }


def check_statistics(model, records):
    for row in records.itertuples():
        ids = json.loads(row.continuation)
        assert row.text == "".join(model.tokenizer.batch_decode([[i] for i in ids]))
        for name, value in counted(model, ids).items():
            assert getattr(row, name) == pytest.approx(value)


def check_summary(result):
    records, by = result.records, result.summary["by_condition"]
    assert list(by) == list(records.condition.unique())
    for name, figures in by.items():
        part, native = (records[records.condition == x] for x in (name, "native"))
        for statistic in STATISTICS:
            x, y = part[statistic].to_numpy(), native[statistic].to_numpy()
            assert figures[statistic] == pytest.approx(sum(x) / len(x))
            if name == "native":
                assert f"{statistic}_p" not in figures
                continue
            pooled = (np.var(x) * len(x) + np.var(y) * len(y)) / max(1, len(x) + len(y) - 2)
            d = (x.mean() - y.mean()) / np.sqrt(pooled) if pooled > 1e-20 else None
            assert figures[f"{statistic}_cohens_d"] == (None if d is None else pytest.approx(d))
            alike = len(set(x) | set(y)) == 1
            p = 1.0 if alike else stats.mannwhitneyu(x, y, alternative="two-sided").pvalue
            assert figures[f"{statistic}_p"] == pytest.approx(p)


@pytest.mark.parametrize(("kind", "rank"), [("write", 1), ("state", 2)])
def test_greedy_texts_are_those_of_full_passes_with_the_atom_added(model, steps, kind, rank):
    sae, prompts, factors = make_sae(model, kind, rank=rank), read_passages(model, 2, 16), (2.0, 5000.0)
    result = amplify(model, sae, prompts, factors=factors, **HOW)
    acts, summary = encoded(model, sae, prompts).flatten(0, 1), result.summary
    dominant = acts.argmax(-1)[acts.amax(-1) > 0].bincount(minlength=32)
    atom, control = summary["atom"], summary["control_atom"]
    assert dominant[atom] == dominant.max()
    mean = acts[:, atom][acts[:, atom] > 0].mean()
    assert summary["mean_coefficient"] == pytest.approx(float(mean), rel=1e-4)
    assert control != atom
    assert (acts[:, control] > 0).any()
    own, other = atoms_of(sae, model)[[atom, control]]
    random = other / other.norm() * own.norm() * mean * max(factors)
    matrices = {"native": own * 0, "2x": 2 * mean * own, "5000x": 5000 * mean * own, "random": random}
    assert result.records.condition.tolist() == list(matrices) * 2
    assert result.records.prompt.tolist() == [0] * 4 + [1] * 4
    assert len(steps) == HOW["n_tokens"] - 1  # the first token is decoded before anything is added
    last = steps[-1].logits
    for row in result.records.itertuples():
        ids, expected = continued(model, prompts[row.prompt], matrices[row.condition], HOW["n_tokens"])
        assert json.loads(row.continuation) == ids
        torch.testing.assert_close(last[row.Index].to(expected), expected, rtol=0, atol=1e-3)
    assert float((last[2] - last[0]).abs().max()) > 0.01  # a text may stay, its logits do not
    check_statistics(model, result.records)
    check_summary(result)


def test_what_is_added_has_its_size_and_its_controls_norm(gdn, steps):
    sae, prompts = make_sae(gdn), read_passages(gdn, 2, 16)
    acts = encoded(gdn, sae, prompts).flatten(0, 1)
    atom = int((acts > 0).sum(0).argsort()[-2])  # not the one that would be chosen
    summary = amplify(gdn, sae, prompts, atom, factors=(3.0, 0.5), **HOW).summary
    assert summary["atom"] == atom
    assert list(summary["by_condition"]) == ["native", "3x", "0.5x", "random"]
    own, other = atoms_of(sae, gdn)[[atom, summary["control_atom"]]]
    mean = float(acts[:, atom][acts[:, atom] > 0].mean())
    assert torch.equal(steps[0].added[:4], steps[0].added[4:])  # the same for both prompts
    native, large, small, random = steps[0].added[:4, 0].double()
    assert not native.any()
    torch.testing.assert_close(large, 3 * mean * own, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small, mean * own / 2, rtol=1e-4, atol=1e-6)
    assert float(random.norm()) == pytest.approx(float(large.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(random.flatten(), other.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_texts_are_drawn_with_the_same_random_numbers(gdn):
    inputs = gdn, make_sae(gdn), read_passages(gdn, 3, 16)
    how = HOW | {"n_tokens": 16, "temperature": 1.0, "factors": (1e-6, 1e3)}
    result = amplify(*inputs, **how)
    texts = {name: part.continuation.tolist() for name, part in result.records.groupby("condition")}
    assert texts["1e-06x"] == texts["native"]
    assert texts["1000x"] != texts["native"]
    # The first token is decoded before anything is added.
    first = result.records.continuation.map(lambda ids: json.loads(ids)[0])
    assert (first.groupby(result.records.prompt).nunique() == 1).all()
    greedy = amplify(*inputs, **(how | {"temperature": 0.0})).records
    assert greedy.continuation.tolist() != result.records.continuation.tolist()
    check_statistics(gdn, result.records)
    check_summary(result)
    other = amplify(*inputs, seed=1, **how).records
    assert other[other.condition == "native"].continuation.tolist() != texts["native"]


def test_text_statistics_are_counts(gdn, monkeypatch):
    newline = gdn.tokenizer.encode("\n", add_special_tokens=False)
    texts = [newline * 6, [5, 6, 7, 8] * 3, [1, 2, 3, 4] * 2 + newline * 2]
    for ids in texts:
        rows = torch.tensor([ids]).expand(5, -1)
        monkeypatch.setattr(
            "writesae_lens.experiments.decoding.Prefix.decode", lambda *args, rows=rows, **options: rows
        )
        records = amplify(gdn, make_sae(gdn), read_passages(gdn, 1, 16), **HOW).records
        assert records.continuation.map(json.loads).tolist() == rows.tolist()
        check_statistics(gdn, records)
    assert counted(gdn, newline * 6)["newlines_per_400"] == pytest.approx(400 / len(newline))


def test_a_single_prompt_and_a_single_token_are_saved_without_nan(gdn, tmp_path):
    result = amplify(gdn, make_sae(gdn), read_passages(gdn, 1, 2), **(HOW | {"n_tokens": 1}))
    assert len(result.records) == 5
    assert result.records.continuation.nunique() == 1
    check_statistics(gdn, result.records)
    assert result.summary["by_condition"]["2x"]["distinct_tokens_p"] == 1
    result.save(tmp_path)


def test_without_another_active_atom_there_is_no_control(gdn, passages):
    sae = make_sae(gdn, d_sae=1, k=1)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
    result = amplify(gdn, sae, passages, **HOW)
    assert result.summary["control_atom"] is None
    assert set(result.records.condition) == {"native", "2x", "5x", "10x"}
    result.plot()


def test_atoms_factors_and_prompts_that_do_not_fit_are_refused(gdn, passages, monkeypatch):
    sae = silenced(make_sae(gdn), 7)
    for tokens, options, message in (
        (passages, {"atom": 7}, "atom 7 is active at no position of these 2 passages"),
        (passages, {"atom": 32}, "atom 32 does not exist: the SAE has atoms 0 to 31"),
        (passages, {"atom": -1}, "atom -1 does not exist"),
        (passages, {"factors": (2.0, 2.0000001)}, "factors must differ"),
        (passages[:, :1], {}, "prompts of one token are too short"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            amplify(gdn, sae, tokens, **(HOW | options))
    monkeypatch.setattr(gdn, "tokenizer", None)
    with pytest.raises(WriteSAEError, match="no tokenizer"):
        amplify(gdn, sae, passages, **HOW)
