"""The reader trace against full edited forward passes: what every head reads, with and without the write."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import reader_trace
from writesae_lens.experiments import trace as readers

LAYER, HEAD = 1, 2
COLUMNS = ["passage", "position", "kind", "atom", "layer", "head", "horizon", "change"]
HOW = {"n_atoms": 2, "max_horizon": 3, "verbose": False}
CASES = [
    ("tiny-gdn", "write", 1, 1.0),
    ("tiny-mamba2", "write", 1, 1.0),
    ("tiny-rwkv7", "write", 1, 1.0),
    ("tiny-gdn", "state", 1, 2.0),
    ("tiny-mamba2", "write", 2, 0.5),
    ("tiny-rwkv7", "flat", None, 1.0),
]


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


def make_sae(model, kind="write", layer=LAYER, head=HEAD, **options):
    torch.manual_seed(0)
    cell = model.cell(layer, head)
    if kind == "flat":
        cfg = TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=32, k=2, rescale_acts_by_decoder_norm=False)
        sae, kind = TopKSAE(cfg), "write"
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    return sae


def cached(model, tokens, name):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


def alive(model, sae, tokens):
    """Atoms that are dominant somewhere."""
    with torch.no_grad():
        acts = sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name))
    return {int(a.argmax()) for a in acts.flatten(0, 1) if a.max() > 0}


def reads(model, passage, position=None, matrices=None):
    """{layer: [row, pos, head, d_v]} of this and later layers, natively or with each matrix added."""
    found = {}

    def keep(layer):
        def hook(x, hook):
            found[layer] = x.double().clone()

        return hook

    def add(x, hook):
        x = x.clone()
        x[:, position] += matrices.flatten(1)
        return x

    layers = [n for n in model.mixers if n >= LAYER]
    names = {
        n: model.write_factor_hook_names(n)[2].replace("hook_read", "hook_recurrence_out") for n in layers
    }
    hooks = [(names[n], keep(n)) for n in layers]
    if matrices is not None:
        hooks.append((model.write_hook_name(LAYER, HEAD), add))
    rows = passage.expand(1 if matrices is None else len(matrices), -1)
    with torch.no_grad():
        model.run_with_hooks(rows, fwd_hooks=hooks)
    return found


def leading_pair(matrix):
    left, _, right = torch.linalg.svd(matrix)
    return left[:, :1] * right[:1]


@pytest.mark.parametrize(("model", "kind", "rank", "magnitude"), CASES, indirect=["model"])
def test_every_change_is_that_of_a_full_edited_forward_pass(
    model, tokens, monkeypatch, kind, rank, magnitude
):
    written, run = [], HookedRecurrent.run_with_added_writes

    def spy(self, passage, layer, head, positions, keys, values, *args, **more):
        matrices = (keys[:, :, None] * values[:, None, :]).double()
        written.append((passage.tolist(), set(positions.tolist()), matrices))
        return run(self, passage, layer, head, positions, keys, values, *args, **more)

    monkeypatch.setattr(HookedRecurrent, "run_with_added_writes", spy)
    sae = make_sae(model, kind, **({} if rank is None else {"rank": rank}))
    how = {"n_atoms": 3, "magnitude": magnitude, "max_horizon": 5, "verbose": False}
    result = reader_trace(model, sae, tokens, seed=3, **how)
    records, cell = result.records, model.cell(LAYER, HEAD)
    assert list(records.columns) == COLUMNS
    layers = [n for n in model.mixers if n >= LAYER]
    n_heads = len([c for c in model.cells if c.layer == LAYER])
    assert len(records) == 2 * 6 * len(layers) * n_heads * 6
    atoms = records.atom[records.kind == "atom"].unique().tolist()
    assert len(atoms) == 3
    assert set(atoms) <= alive(model, sae, tokens)
    size = magnitude * float(
        cached(model, tokens, model.write_hook_name(LAYER, HEAD)).norm(dim=-1).flatten().median()
    )
    assert result.summary["write_norm"] == pytest.approx(size, rel=1e-5)
    mine = [leading_pair(sae.W_dec[a].detach().double().view(cell.d_k, cell.d_v)) * size for a in atoms]
    drawn = []
    for n, part in records.groupby("passage"):
        (position,) = part.position.unique()
        assert 0 <= position <= 14
        (random,) = (
            m[3:]
            for passage, positions, m in written
            # The rows go on from a cache of what comes before t0.
            if positions == {0} and tokens[n].tolist()[position : position + 6] == passage
        )
        values = torch.linalg.svdvals(random)
        np.testing.assert_allclose(values[:, 0], size, rtol=1e-4)
        assert (values[:, 1] < 1e-4 * size).all()
        drawn.append(random.flatten(1) / size)
        native = reads(model, tokens[n])
        moved = reads(model, tokens[n], position, torch.cat([torch.stack(mine), random]))
        names = [("atom", atom) for atom in atoms] + [("random", number) for number in range(3)]
        for row in part.itertuples():
            number, t = names.index((row.kind, row.atom)), position + row.horizon
            before = native[row.layer][0, t, row.head]
            change = (moved[row.layer][number, t, row.head] - before).norm() / before.norm()
            assert row.change == pytest.approx(float(change), rel=1e-4, abs=1e-5)
    # No random write is another one, in this or another passage.
    every = torch.cat(drawn)
    assert float((every @ every.T).fill_diagonal_(0).abs().max()) < 0.5
    beside = records[(records.layer == LAYER) & (records["head"] != HEAD)]
    assert len(beside)
    assert beside.change.max() < 1e-6
    check_summary(result.summary, records)


def check_summary(summary, records):
    """Every figure from the records, by its definition."""
    atoms = [r for r in records.itertuples() if r.kind == "atom"]

    def mean(kept, by):
        groups = {}
        for r in kept:
            groups.setdefault(by(r), []).append(r.change)
        return {name: np.mean(x) for name, x in groups.items()}

    own = [r for r in atoms if (r.layer, r.head) == (LAYER, HEAD)]
    later = [r for r in atoms if r.layer > LAYER]
    assert summary["own_change_by_horizon"] == pytest.approx(mean(own, lambda r: str(r.horizon)))
    assert summary["change_by_horizon"] == pytest.approx(mean(later, lambda r: str(r.horizon)))
    assert summary["change_by_layer"] == pytest.approx(mean(later, lambda r: str(r.layer)))
    heads = mean(later, lambda r: (r.layer, r.head))
    best = sorted(heads, key=lambda head: -heads[head])[:10]
    assert [(r["layer"], r["head"]) for r in summary["top_readers"]] == best
    assert [r["change"] for r in summary["top_readers"]] == pytest.approx([heads[head] for head in best])
    random = [r.change for r in records.itertuples() if r.kind == "random" and r.layer > LAYER]
    ratio = np.mean([r.change for r in later]) / np.mean(random)
    assert summary["ratio_to_random"] == pytest.approx(ratio)
    assert summary["n_passages"] == records.passage.nunique()


def test_a_cell_of_the_last_layer_has_no_later_readers(gdn, passages, tmp_path):
    result = reader_trace(gdn, make_sae(gdn, layer=3, head=0), passages, **HOW)
    assert set(result.records.layer) == {3}
    assert result.summary["top_readers"] == []
    assert result.summary["ratio_to_random"] is None
    assert result.summary["change_by_layer"] == {}
    assert set(result.summary["own_change_by_horizon"]) == {"0", "1", "2", "3"}
    json.loads((result.save(tmp_path) / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("max_horizon", [0, 19])
def test_horizons_from_none_to_the_whole_passage(gdn, passages, max_horizon):
    result = reader_trace(gdn, make_sae(gdn), passages[:1], **(HOW | {"max_horizon": max_horizon}))
    assert sorted(result.records.horizon.unique()) == list(range(max_horizon + 1))
    if max_horizon == 19:
        assert set(result.records.position) == {0}
    assert result.summary["n_passages"] == 1
    assert isinstance(result.plot(), Figure)


def test_more_atoms_than_there_are_means_all(gdn, passages):
    sae = make_sae(gdn)
    result = reader_trace(gdn, sae, passages, n_atoms=99, max_horizon=1, verbose=False)
    living = alive(gdn, sae, passages)
    assert set(result.records.atom[result.records.kind == "atom"]) == living
    assert result.summary["n_atoms"] == len(living)


def test_text_is_cut_into_passages(gdn):
    text = zoo.held_out_text()[:200]
    cut = len(gdn.to_tokens(text, prepend_bos=False)[0]) // 20
    result = reader_trace(gdn, make_sae(gdn), text, context_size=20, **HOW)
    assert sorted(result.records.passage.unique()) == list(range(cut))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_atoms": 0}, "n_atoms=0"),
        ({"max_horizon": -1}, "max_horizon=-1"),
        ({"max_horizon": 20}, "passages of 20 tokens have no room for a horizon of 20"),
        ({"magnitude": 0.0}, "magnitude must be positive"),
        ({"magnitude": -1.0}, "magnitude must be positive"),
        ({"magnitude": float("nan")}, "magnitude must be positive"),
        ({"seed": -1}, "seed=-1"),
        ({"context_size": 10}, "cut into passages already"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        reader_trace(gdn, make_sae(gdn), passages, **(HOW | options))


def test_no_atom_fires(gdn, passages):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(WriteSAEError, match="no atom fires in 2 passages of 20 tokens"):
        reader_trace(gdn, sae, passages, **HOW)


def test_one_seed_gives_one_result_and_another_other_choices(gdn, passages):
    first, again, other = (reader_trace(gdn, make_sae(gdn), passages, seed=s, **HOW) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary
    assert set(first.records.atom) != set(other.records.atom)
    assert first.records.position.tolist() != other.records.position.tolist()


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    sae = make_sae(gdn)
    whole = reader_trace(gdn, sae, passages, **HOW)
    trace, calls = readers._trace, []

    def interrupted(*args):
        length = int(args[3]) + HOW["max_horizon"] + 1
        calls.append([n for n in range(2) if passages[n, :length].tolist() == args[2].tolist()])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trace(*args)

    monkeypatch.setattr(readers, "_trace", interrupted)
    folder = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        reader_trace(gdn, sae, passages, progress_folder=folder, **HOW)
    resumed = reader_trace(gdn, sae, passages, progress_folder=folder, **HOW)
    assert calls == [[0], [1], [1]]
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"magnitude": 2.0}, {"n_atoms": 3}, {"max_horizon": 2}):
        with pytest.raises(WriteSAEError, match="other settings"):
            reader_trace(gdn, sae, passages, progress_folder=folder, **(HOW | other))
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "readers.png"}
    kept = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert kept["top_readers"] == whole.summary["top_readers"]
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), whole.records)
    assert isinstance(resumed.plot(), Figure)
