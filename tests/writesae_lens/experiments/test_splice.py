"""The splice against one full hooked pass without a cache."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.writesae_lens.experiments.truth import make_sae, read_passages
from writesae_lens import WriteSAE, WriteSAEError
from writesae_lens.experiments import splice_test


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
    into_writes = [(n, put(s, slice(half))) for n, s in zip(names, saes, strict=True) if "hook_write" in n]
    into_states = [
        (n, put(s, slice(half - 1, half))) for n, s in zip(names, saes, strict=True) if "hook_state" in n
    ]
    # The state is replaced after the first half: what its last token reads of it is as it was.
    native, outs = {}, {n.split("hook_")[0] + "hook_recurrence_out" for n, _ in into_states}
    if into_states:

        def keep(x, hook):
            native[hook.name] = x.clone()

        def restore(x, hook):
            x = x.clone()
            x[:, half - 1] = native[hook.name][:, half - 1]
            return x

        model.run_with_hooks(
            passage[None], fwd_hooks=into_writes + [(n, keep) for n in outs], use_cache=False
        )
        into_states += [(n, restore) for n in outs]
        errors.clear()
        powers.clear()
    logits = model.run_with_hooks(passage[None], fwd_hooks=into_writes + into_states, use_cache=False)[0]
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
    passages = read_passages(model, 2, 19)
    saes = [make_sae(model, *head, seed=10 * head[1] + head[2], k=3) for head in HEADS[heads]]
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
    drawn = rng.choice(rises, (4000, len(rises))).mean(1)
    bounds = 100 * (np.exp(np.quantile(drawn, [0.025, 0.975])) - 1)
    spread = 100 * (np.exp(rises.max()) - np.exp(rises.min()))
    np.testing.assert_allclose(summary["increase_percent_ci"], bounds, atol=0.08 * spread + 1e-9)


def test_only_the_interval_depends_on_the_seed_and_is_that_of_a_bootstrap_over_passages(gdn):
    inputs = gdn, make_sae(gdn), read_passages(gdn, 12, 16)
    result, other = (splice_test(*inputs, verbose=False, seed=seed) for seed in (4, 5))
    check_summary(result, 1, seed=4)
    low, high = result.summary["increase_percent_ci"]
    assert low < result.summary["increase_percent"] < high
    pd.testing.assert_frame_equal(result.records, other.records)
    assert result.summary["increase_percent_ci"] != other.summary["increase_percent_ci"]


@pytest.mark.parametrize("kind", ["write", "state"])
def test_a_perfect_sae_loses_nothing_and_an_empty_one_everything(gdn, kind, monkeypatch):
    sae, passages = make_sae(gdn, kind), read_passages(gdn, 2, 16)
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


def test_recovered_is_none_where_deletion_costs_nothing(gdn, tmp_path):
    passages, how = read_passages(gdn, 2, 16), {"verbose": False, "progress_folder": str(tmp_path / "p")}
    splice_test(gdn, make_sae(gdn), passages, **how)
    for part in (tmp_path / "p").glob("part_*.csv"):
        table = pd.read_csv(part, comment="#").assign(nll_native=2.0, nll_spliced=2.1, nll_deleted=1.9)
        part.write_text(table.to_csv(index=False) + f"# {len(table)} rows\n")
    result = splice_test(gdn, make_sae(gdn), passages, **how)
    assert result.summary["recovered"] is None
    assert result.summary["increase_percent"] == pytest.approx(100 * (np.exp(0.1) - 1))
    assert result.summary["increase_percent_deleted"] == pytest.approx(100 * (np.exp(-0.1) - 1))
    result.save(tmp_path)  # the figure too, and no NaN


@pytest.mark.parametrize(("length", "half"), [(4, 2), (5, 2)])
@pytest.mark.parametrize("kind", ["write", "state"])
def test_the_shortest_passages_have_halves(gdn, kind, length, half):
    sae, passages = make_sae(gdn, kind), read_passages(gdn, 2, length)
    records = splice_test(gdn, sae, passages, verbose=False).records
    for row, passage in zip(records.itertuples(), passages, strict=True):
        assert row.n_tokens == length - half - 1
        for name in ("spliced", "deleted"):
            expected = full_pass(gdn, passage, [sae], half, name == "deleted")[0]
            assert getattr(row, f"nll_{name}") == pytest.approx(expected, abs=1e-4)


def test_saes_and_passages_that_cannot_be_spliced_are_refused(gdn, passages):
    sae = make_sae(gdn)
    for saes, tokens, message in (
        ([], passages, "there are no SAEs"),
        ([sae, make_sae(gdn)], passages, "two SAEs are on one cell"),
        ([sae, make_sae(gdn, "state")], passages, "two SAEs are on one cell"),
        (sae, passages[:, :3], "passages of 3 tokens have no halves: give 4"),
        (sae, passages[:, :1], "passages of 1 tokens have no halves"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            splice_test(gdn, saes, tokens, verbose=False)


def test_the_native_model_is_left_as_it_was_and_finished_parts_are_of_all_saes(gdn, passages, tmp_path):
    saes, how = [make_sae(gdn, "write", 0, 1), make_sae(gdn, "state")], {"progress_folder": str(tmp_path)}
    with torch.no_grad():
        before = gdn(passages)
        splice_test(gdn, saes, passages, verbose=False, **how)
        assert torch.equal(gdn(passages), before)
    with pytest.raises(WriteSAEError, match="other settings"):
        splice_test(gdn, [*saes, make_sae(gdn, head=1)], passages, verbose=False, **how)
