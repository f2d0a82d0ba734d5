"""The splice against one full hooked pass without a cache."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import splice, splice_test


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


def read(model, n, length):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : n * length].view(n, length)


def make_sae(model, kind, layer, head, scale=1.0, **options):
    torch.manual_seed(10 * layer + head)
    cell = model.cell(layer, head)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 3} | options)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(scale)
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    return sae


@torch.no_grad()
def full_pass(model, passage, saes, half, deleted):
    """Nats a token of the second half, squared errors and squared norms of what was replaced."""
    errors, powers = [], []

    def rebuilt(sae, native):
        new = torch.zeros_like(native) if deleted else sae(native).to(native.dtype)
        errors.append(float((new - native).square().sum()))
        powers.append(float(native.square().sum()))
        return new

    def put(sae, where):
        def hook(x, hook):
            x = x.clone()
            x[0, where] = rebuilt(sae, x[0, where])
            return x

        return hook

    names = [sae.cfg.metadata.hook_name for sae in saes]
    writes = [(n, put(s, slice(half))) for n, s in zip(names, saes, strict=True) if "hook_write" in n]
    states = [
        (n, put(s, slice(half - 1, half))) for n, s in zip(names, saes, strict=True) if "hook_state" in n
    ]
    # The state is replaced after the first half: what its last token reads of it is as it was.
    kept, outs = {}, {n.split("hook_")[0] + "hook_recurrence_out" for n, _ in states}
    if states:

        def keep(x, hook):
            kept[hook.name] = x.clone()

        def restore(x, hook):
            x = x.clone()
            x[:, half - 1] = kept[hook.name][:, half - 1]
            return x

        model.run_with_hooks(passage[None], fwd_hooks=writes + [(n, keep) for n in outs], use_cache=False)
        states += [(n, restore) for n in outs]
        errors.clear()
        powers.clear()
    logits = model.run_with_hooks(passage[None], fwd_hooks=writes + states, use_cache=False)[0]
    log_p = logits.double().log_softmax(-1)
    nll = [-float(log_p[t - 1, passage[t]]) for t in range(half + 1, len(passage))]
    return np.mean(nll), sum(errors), sum(powers)


HEADS = {
    "a write": [("write", 1, 2)],
    "a state": [("state", 1, 2)],
    "all writes of a layer": [("write", 1, head) for head in range(4)],
    "all states of a layer": [("state", 1, head) for head in range(4)],
    "a write below a state and a state of its layer": [("write", 0, 1), ("state", 1, 2), ("write", 1, 3)],
}


@pytest.mark.parametrize("heads", HEADS)
def test_the_losses_are_those_of_one_full_hooked_pass(model, heads):
    passages = read(model, 2, 19)
    saes = [make_sae(model, *head) for head in HEADS[heads]]
    given = saes[0] if len(saes) == 1 else saes
    result = splice_test(model, given, passages, verbose=False)
    assert list(result.records.passage) == [0, 1]
    for row, passage in zip(result.records.itertuples(), passages, strict=True):
        with torch.no_grad():
            log_p = model(passage[None], use_cache=False)[0].double().log_softmax(-1)
        native = -np.mean([float(log_p[t - 1, passage[t]]) for t in range(10, 19)])
        spliced, error, power = full_pass(model, passage, saes, 9, deleted=False)
        deleted, _, _ = full_pass(model, passage, saes, 9, deleted=True)
        assert row.n_tokens == 9
        assert row.nll_native == pytest.approx(native, abs=5e-6)
        assert row.nll_spliced == pytest.approx(spliced, abs=5e-6)
        assert row.nll_deleted == pytest.approx(deleted, abs=5e-6)
        assert row.error == pytest.approx(error / power, rel=1e-4)
        assert min(abs(spliced - native), abs(deleted - native)) > 2e-5  # else it would say nothing
    check_summary(result, len(saes), seed=0)


def check_summary(result, n_heads, seed):
    records, summary = result.records, result.summary
    mean = {name: records[f"nll_{name}"].mean() for name in ("native", "spliced", "deleted")}
    for name, nll in mean.items():
        assert summary[f"perplexity_{name}"] == pytest.approx(np.exp(nll))
    ratio = np.exp(mean["spliced"]) / np.exp(mean["native"])
    assert summary["increase_percent"] == pytest.approx(100 * (ratio - 1))
    ratio = np.exp(mean["deleted"]) / np.exp(mean["native"])
    assert summary["increase_percent_deleted"] == pytest.approx(100 * (ratio - 1))
    rise, worst = mean["spliced"] - mean["native"], mean["deleted"] - mean["native"]
    assert summary["recovered"] == (pytest.approx((worst - rise) / worst) if worst > 0 else None)
    assert summary["error"] == pytest.approx(records.error.mean())
    assert (summary["n_passages"], summary["n_heads"]) == (len(records), n_heads)
    assert summary["n_tokens"] == records.n_tokens.sum()
    # The interval, as a bootstrap of its own.
    rises, rng = (records.nll_spliced - records.nll_native).to_numpy(), np.random.default_rng(seed + 99)
    drawn = [rng.choice(rises, len(rises)).mean() for _ in range(4000)]
    bounds = 100 * (np.exp(np.quantile(drawn, [0.025, 0.975])) - 1)
    spread = 100 * (np.exp(rises.max()) - np.exp(rises.min()))
    np.testing.assert_allclose(summary["increase_percent_ci"], bounds, atol=0.08 * spread + 1e-9)


def test_the_interval_is_that_of_a_bootstrap_over_passages(gdn):
    result = splice_test(gdn, make_sae(gdn, "write", 1, 2), read(gdn, 12, 16), verbose=False, seed=4)
    check_summary(result, 1, seed=4)
    low, high = result.summary["increase_percent_ci"]
    assert low < result.summary["increase_percent"] < high


@pytest.mark.parametrize("kind", ["write", "state"])
def test_a_perfect_sae_loses_nothing_and_an_empty_one_everything(gdn, kind, monkeypatch):
    sae, passages = make_sae(gdn, kind, 1, 2), read(gdn, 2, 16)
    monkeypatch.setattr(WriteSAE, "encode", lambda self, x: x)
    monkeypatch.setattr(WriteSAE, "decode", lambda self, x: x)
    result = splice_test(gdn, sae, passages, verbose=False)
    np.testing.assert_allclose(result.records.nll_spliced, result.records.nll_native, atol=1e-6)
    assert (np.abs(result.records.nll_deleted - result.records.nll_native) > 1e-4).all()
    assert (result.records.error == 0).all()
    assert result.summary["increase_percent"] == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(WriteSAE, "decode", lambda self, x: torch.zeros_like(x))
    result = splice_test(gdn, sae, passages, verbose=False)
    np.testing.assert_allclose(result.records.nll_spliced, result.records.nll_deleted, atol=1e-6)
    np.testing.assert_allclose(result.records.error, 1)


def test_recovered_is_none_where_deletion_costs_nothing(gdn, tmp_path, monkeypatch):
    passages = read(gdn, 2, 16)
    zero = pd.DataFrame(
        {"n_tokens": [7], "nll_native": 2.0, "nll_spliced": 2.1, "nll_deleted": 1.9, "error": 0.5}
    )
    monkeypatch.setattr(splice, "_splice", lambda *args: zero.copy())
    result = splice_test(gdn, make_sae(gdn, "write", 1, 2), passages, verbose=False)
    assert result.summary["recovered"] is None
    assert result.summary["increase_percent"] == pytest.approx(100 * (np.exp(0.1) - 1))
    assert result.summary["increase_percent_deleted"] == pytest.approx(100 * (np.exp(-0.1) - 1))
    saved = json.loads((result.save(tmp_path) / "summary.json").read_text())
    assert saved["recovered"] is None


@pytest.mark.parametrize(("length", "half"), [(4, 2), (5, 2)])
@pytest.mark.parametrize("kind", ["write", "state"])
def test_the_shortest_passages_have_halves(gdn, kind, length, half):
    sae, passages = make_sae(gdn, kind, 1, 2), read(gdn, 2, length)
    records = splice_test(gdn, sae, passages, verbose=False).records
    for row, passage in zip(records.itertuples(), passages, strict=True):
        assert row.n_tokens == length - half - 1
        for name in ("spliced", "deleted"):
            expected = full_pass(gdn, passage, [sae], half, name == "deleted")[0]
            assert getattr(row, f"nll_{name}") == pytest.approx(expected, abs=1e-4)


def test_text_is_cut_as_the_first_sae_was_trained_or_as_asked(gdn):
    sae, text = make_sae(gdn, "write", 1, 2), zoo.held_out_text()[:600]
    sae.cfg.metadata.context_size = 20
    n = gdn.to_tokens(text, prepend_bos=False, truncate=False).shape[1]
    assert splice_test(gdn, sae, text, verbose=False).records.n_tokens.tolist() == [9] * (n // 20)
    fewer = splice_test(gdn, sae, text, context_size=40, verbose=False).records
    assert fewer.n_tokens.tolist() == [19] * (n // 40)


def test_bad_input_is_answered_in_one_line(gdn):
    sae, passages = make_sae(gdn, "write", 1, 2), read(gdn, 2, 12)
    foreign = make_sae(gdn, "write", 1, 2)
    foreign.cfg.metadata.hook_name = "blocks.9.linear_attn.hook_write.0"
    nameless = make_sae(gdn, "write", 1, 2)
    nameless.cfg.metadata.hook_name = None
    for given, tokens, options, message in (
        ([], passages, {}, "there are no SAEs"),
        ([sae, make_sae(gdn, "write", 1, 2)], passages, {}, "two SAEs are on one cell"),
        ([sae, make_sae(gdn, "state", 1, 2)], passages, {}, "two SAEs are on one cell"),
        (sae, passages[:, :3], {}, "passages of 3 tokens have no halves: give 4"),
        (sae, passages[:, :1], {}, "passages of 1 tokens have no halves"),
        (sae, passages[:0], {}, "must be a LongTensor"),
        (sae, passages + 5000, {}, "another tokenizer"),
        (sae, "short", {}, "too short"),
        (sae, "short", {"context_size": 0}, "context_size=0"),
        (sae, passages, {"context_size": 6}, "cut into passages already"),
        (sae, passages, {"seed": -1}, "seed=-1"),
        (nameless, passages, {}, "does not say which hook"),
        (foreign, passages, {}, "no cell|is not the hook"),
    ):
        with pytest.raises(HookedModelError, match=message) as caught:
            splice_test(gdn, given, tokens, verbose=False, **options)
        assert "\n" not in str(caught.value)


def test_the_native_model_is_left_as_it_was(gdn):
    passages = read(gdn, 1, 16)
    with torch.no_grad():
        before = gdn(passages)
        splice_test(
            gdn, [make_sae(gdn, "write", 0, 1), make_sae(gdn, "state", 1, 2)], passages, verbose=False
        )
        assert torch.equal(gdn(passages), before)


def test_the_records_do_not_depend_on_the_seed_and_the_interval_does(gdn):
    sae, passages = make_sae(gdn, "state", 1, 2), read(gdn, 8, 12)
    first, again, other = (
        splice_test(gdn, sae, passages, seed=seed, verbose=False) for seed in (1, 1, 2)
    )  # fmt: skip
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary
    pd.testing.assert_frame_equal(first.records, other.records)
    assert first.summary["increase_percent_ci"] != other.summary["increase_percent_ci"]


def test_an_interrupted_run_resumes_and_is_saved_and_drawn(gdn, tmp_path, monkeypatch):
    sae, passages = make_sae(gdn, "write", 1, 2), read(gdn, 3, 12)
    whole = splice_test(gdn, sae, passages, verbose=False)
    one, calls = splice._splice, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(splice, "_splice", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        splice_test(gdn, sae, passages, verbose=False, progress_folder=folder)
    resumed = splice_test(gdn, sae, passages, verbose=False, progress_folder=folder)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.records, whole.records, check_dtype=False)
    assert resumed.summary == whole.summary
    for other, saes, tokens in ((1, sae, passages), (0, sae, passages[:2]), (0, [sae] * 0, passages)):
        wanted = "other settings" if saes else "there are no SAEs"
        with pytest.raises(WriteSAEError, match=wanted):
            splice_test(gdn, saes, tokens, seed=other, verbose=False, progress_folder=folder)
    with pytest.raises(WriteSAEError, match="other settings"):
        splice_test(
            gdn,
            [sae, make_sae(gdn, "write", 1, 1)],
            passages,
            verbose=False,
            progress_folder=folder,
        )
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "splice.png"}
    read_back = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert read_back == resumed.summary
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), resumed.records, check_dtype=False)
    assert (out / "splice.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(resumed.plot(), Figure)
