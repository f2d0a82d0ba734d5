"""Amplified atoms against full passes without a cache, with a hook that adds the atom at every said token."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import amplify
from writesae_lens.experiments import amplify as amplification
from writesae_lens.experiments.decoding import Prefix

LAYER, HEAD = 1, 2
STATISTICS = ("newlines_per_400", "distinct_tokens", "repeated_4grams", "characters_per_token")
HOW = {"n_tokens": 4, "temperature": 0.0, "verbose": False}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


def read(model, n, length=16):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : n * length].view(n, length)


def make_sae(model, kind="write", **options):
    torch.manual_seed(0)
    cell = model.cell(LAYER, HEAD)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 24, "k": 3} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(LAYER, HEAD)
    return sae


@torch.no_grad()
def encoded(model, sae, prompts):
    """Coefficients at every position of all prompts, [position, atom]."""
    name = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(prompts, names_filter=[name])
    return sae.encode(cache[name].flatten(0, 1)).double()


@torch.no_grad()
def say(model, prompt, matrix, n):
    """Greedy, a full pass for every token, the matrix added at the said ones; text and last logits."""

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
        for name, value in counted(model, json.loads(row.continuation)).items():
            assert getattr(row, name) == pytest.approx(value)


def check_summary(result):
    records, by = result.records, result.summary["by_condition"]
    assert list(by) == list(records.condition.unique())
    for name, found in by.items():
        part, native = (records[records.condition == x] for x in (name, "native"))
        for statistic in STATISTICS:
            x, y = part[statistic].to_numpy(), native[statistic].to_numpy()
            assert found[statistic] == pytest.approx(sum(x) / len(x))
            if name == "native":
                assert f"{statistic}_p" not in found
                continue
            pooled = (np.var(x) * len(x) + np.var(y) * len(y)) / max(1, len(x) + len(y) - 2)
            d = (x.mean() - y.mean()) / np.sqrt(pooled) if pooled > 1e-20 else None
            assert found[f"{statistic}_cohens_d"] == (None if d is None else pytest.approx(d))
            alike = len(set(x) | set(y)) == 1
            p = 1.0 if alike else stats.mannwhitneyu(x, y, alternative="two-sided").pvalue
            assert found[f"{statistic}_p"] == pytest.approx(p)


@pytest.mark.parametrize(("kind", "rank"), [("write", 1), ("state", 2)])
def test_greedy_texts_are_those_of_full_passes_with_the_atom_added(model, kind, rank, monkeypatch):
    seen, go_on = [], Prefix.go_on

    def spy(self, *args):
        seen.append(go_on(self, *args))
        return seen[-1]

    monkeypatch.setattr(Prefix, "go_on", spy)
    sae, prompts, factors = make_sae(model, kind, rank=rank), read(model, 2), (2.0, 5000.0)
    result = amplify(model, sae, prompts, factors=factors, **HOW)
    acts, summary = encoded(model, sae, prompts), result.summary
    dominant = acts.argmax(-1)[acts.amax(-1) > 0].bincount(minlength=24)
    atom, control = summary["atom"], summary["control_atom"]
    assert dominant[atom] == dominant.max()
    mean = acts[:, atom][acts[:, atom] > 0].mean()
    assert summary["mean_coefficient"] == pytest.approx(float(mean), rel=1e-4)
    assert control != atom
    assert (acts[:, control] > 0).any()
    own, other = (sae.W_dec[x].detach().double() for x in (atom, control))
    random = other / other.norm() * own.norm() * mean * max(factors)
    matrices = {"native": own * 0, "2x": 2 * mean * own, "5000x": 5000 * mean * own, "random": random}
    assert result.records.condition.tolist() == list(matrices) * 2
    assert result.records.prompt.tolist() == [0] * 4 + [1] * 4
    for row in result.records.itertuples():
        said, last = say(model, prompts[row.prompt], matrices[row.condition], HOW["n_tokens"])
        assert json.loads(row.continuation) == said
        torch.testing.assert_close(seen[-1][row.Index, -1], last, rtol=0, atol=1e-3)
    assert len(seen) == HOW["n_tokens"]
    assert float((seen[-1][2] - seen[-1][0]).abs().max()) > 0.01  # a text may stay, its logits do not
    check_statistics(model, result.records)
    check_summary(result)


def test_what_is_added_has_its_size_and_its_controls_norm(gdn, monkeypatch):
    seen, decode = [], amplification._decode

    def spy(model, cell, prompts, writes, *rest):
        seen.append(writes)
        return decode(model, cell, prompts, writes, *rest)

    monkeypatch.setattr(amplification, "_decode", spy)
    sae, prompts = make_sae(gdn), read(gdn, 2)
    atom = 1 + amplify(gdn, sae, prompts, **HOW).summary["atom"]
    acts = encoded(gdn, sae, prompts)
    atom = next(i for i in range(atom, 99) if (acts[:, i % 24] > 0).any()) % 24
    summary = amplify(gdn, sae, prompts, atom, factors=(3.0, 0.5), **HOW).summary
    assert summary["atom"] == atom
    assert list(summary["by_condition"]) == ["native", "3x", "0.5x", "random"]
    own, other = (sae.W_dec[x].detach().double() for x in (atom, summary["control_atom"]))
    mean = float(acts[:, atom][acts[:, atom] > 0].mean())
    native, large, small, random = seen[-1].double().flatten(1)
    assert not native.any()
    torch.testing.assert_close(large, 3 * mean * own.flatten(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small, mean * own.flatten() / 2, rtol=1e-4, atol=1e-6)
    assert float(random.norm()) == pytest.approx(float(large.norm()), rel=1e-4)
    assert float(torch.cosine_similarity(random, other.flatten(), dim=0)) == pytest.approx(1, abs=1e-5)


def test_texts_are_drawn_with_the_same_random_numbers(gdn):
    sae, prompts = make_sae(gdn), read(gdn, 3)
    how = HOW | {"n_tokens": 16, "temperature": 1.0, "factors": (1e-6, 1e3)}
    result = amplify(gdn, sae, prompts, **how)
    texts = {name: part.continuation.tolist() for name, part in result.records.groupby("condition")}
    assert texts["1e-06x"] == texts["native"]
    assert texts["1000x"] != texts["native"]
    # The first token is said before anything is added.
    first = result.records.continuation.map(lambda ids: json.loads(ids)[0])
    assert (first.groupby(result.records.prompt).nunique() == 1).all()
    greedy = amplify(gdn, sae, prompts, **(how | {"temperature": 0.0})).records
    assert greedy.continuation.tolist() != result.records.continuation.tolist()
    check_statistics(gdn, result.records)
    check_summary(result)
    pd.testing.assert_frame_equal(result.records, amplify(gdn, sae, prompts, **how).records)
    other = amplify(gdn, sae, prompts, seed=1, **how).records
    assert other[other.condition == "native"].continuation.tolist() != texts["native"]


def test_text_statistics_are_counts(gdn):
    newline = gdn.tokenizer.encode("\n", add_special_tokens=False)
    for ids in (newline * 6, [5, 6, 7, 8] * 3 + newline, [700], [1, 2, 3]):
        found = amplification._count(gdn, ids)
        assert json.loads(found.pop("continuation")) == ids
        assert found == pytest.approx(counted(gdn, ids))
    assert counted(gdn, newline * 6)["newlines_per_400"] == pytest.approx(400 / len(newline))


def test_a_single_prompt_and_a_single_token_are_saved_without_nan(gdn, tmp_path):
    result = amplify(gdn, make_sae(gdn), read(gdn, 1, 2), **(HOW | {"n_tokens": 1}))
    assert len(result.records) == 5
    assert result.records.continuation.nunique() == 1
    check_statistics(gdn, result.records)
    saved = json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)
    assert saved == result.summary
    assert saved["by_condition"]["2x"]["distinct_tokens_p"] == 1


def test_without_another_active_atom_there_is_no_control(gdn):
    sae = make_sae(gdn, d_sae=1, k=1)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)
    result = amplify(gdn, sae, read(gdn, 2), **HOW)
    assert result.summary["control_atom"] is None
    assert set(result.records.condition) == {"native", "2x", "5x", "10x"}
    assert isinstance(result.plot(), Figure)


def test_atoms_that_do_not_fire_are_refused(gdn):
    sae, prompts = make_sae(gdn), read(gdn, 2)
    with torch.no_grad():
        sae.b_enc[7] = -1e3
    with pytest.raises(WriteSAEError, match="atom 7 is active at no position of these 2 prompts"):
        amplify(gdn, sae, prompts, 7, **HOW)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(WriteSAEError, match="no atom fires in 2 passages of 16 tokens"):
        amplify(gdn, sae, prompts, **HOW)


def test_bad_input_is_answered_in_one_line(gdn):
    sae = make_sae(gdn)
    nameless = make_sae(gdn)
    nameless.cfg.metadata.hook_name = None
    small = WriteSAE(WriteSAEConfig(d_k=4, d_v=5, d_sae=8, k=2))
    small.cfg.metadata.hook_name = sae.cfg.metadata.hook_name
    prompts = read(gdn, 2)
    for given, tokens, options, message in (
        (sae, prompts, {"factors": ()}, "factors must be positive"),
        (sae, prompts, {"factors": (0.0,)}, "factors must be positive"),
        (sae, prompts, {"factors": (2.0, -1.0)}, "factors must be positive"),
        (sae, prompts, {"factors": (float("nan"),)}, "factors must be positive"),
        (sae, prompts, {"n_tokens": 0}, "n_tokens=0"),
        (sae, prompts, {"temperature": -0.5}, "temperature=-0.5"),
        (sae, prompts, {"temperature": float("nan")}, "temperature=nan"),
        (sae, prompts, {"temperature": float("inf")}, "temperature=inf"),
        (sae, prompts, {"seed": -1}, "seed=-1"),
        (sae, prompts, {"atom": 24}, "atom 24 does not exist: the SAE has atoms 0 to 23"),
        (sae, prompts, {"atom": -1}, "atom -1 does not exist"),
        (sae, prompts, {"context_size": 8}, "cut into passages already"),
        (sae, prompts[:, :1], {}, "prompts of one token are too short"),
        (sae, prompts[:0], {}, "must be a LongTensor"),
        (sae, "short", {}, "too short"),
        (nameless, prompts, {}, "does not say which hook"),
        (small, prompts, {}, "made for 4 x 5 matrices"),
    ):
        with pytest.raises(HookedModelError, match=message) as caught:
            amplify(gdn, given, tokens, **(HOW | options))
        assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(gdn, monkeypatch):
    prompts = read(gdn, 1)
    monkeypatch.setattr(gdn, "tokenizer", None)
    with pytest.raises(WriteSAEError, match="no tokenizer"):
        amplify(gdn, make_sae(gdn), prompts, **HOW)


def test_factors_that_would_bear_one_name_are_refused(gdn):
    with pytest.raises(WriteSAEError, match="factors must differ"):
        amplify(gdn, make_sae(gdn), read(gdn, 1), factors=(2.0, 2.0000001), **HOW)


def test_an_interrupted_run_resumes_and_is_saved_and_drawn(gdn, tmp_path, monkeypatch):
    monkeypatch.setattr(amplification, "batches", lambda n, _: [slice(i, i + 1) for i in range(n)])
    sae, prompts, one, calls = make_sae(gdn), read(gdn, 3), amplification._decode, []
    how = HOW | {"temperature": 1.0}
    whole = amplify(gdn, sae, prompts, **how)
    assert whole.records.prompt.tolist() == [0] * 5 + [1] * 5 + [2] * 5

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(amplification, "_decode", interrupted)
    how["progress_folder"] = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        amplify(gdn, sae, prompts, **how)
    resumed = amplify(gdn, sae, prompts, **how)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.records, whole.records, check_dtype=False)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"factors": (2.0,)}, {"n_tokens": 5}, {"temperature": 0.5}):
        with pytest.raises(WriteSAEError, match="other settings"):
            amplify(gdn, sae, prompts, **(how | other))
    with pytest.raises(WriteSAEError, match="other settings"):
        amplify(gdn, sae, prompts[:2], **how)
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "amplification.png"}
    assert json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail) == resumed.summary
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), resumed.records, check_dtype=False)
    assert (out / "amplification.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(resumed.plot(), Figure)
