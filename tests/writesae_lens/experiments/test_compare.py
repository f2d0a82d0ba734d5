"""The comparison against full edited forward passes, and its table against plain numpy."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import compare, replacement_test, swaps
from writesae_lens.experiments.firings import Firings

LAYER, HEAD = 1, 2
CONTROLS = ("gaussian", "atom", "orthogonal", "native_marginals")
OPTIONS = [{}, {"scale": "matched_norm"}, {"kl": "base_patched"}]


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    return model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)[0, :40].view(2, 20)


@pytest.fixture
def captured(monkeypatch):
    """What the model was given (keys, values) and what was drawn (kind, firings, factors), call by call."""
    given, drawn = [], []
    run, random_like = HookedRecurrent.run_with_swapped_writes, swaps.random_like

    def spy(self, passage, layer, head, positions, keys, values, *args, **kwargs):
        given.append((positions, keys, values))
        return run(self, passage, layer, head, positions, keys, values, *args, **kwargs)

    def draw(kind, sae, every, kept, cell, rng):
        factors = random_like(kind, sae, every, kept, cell, rng)
        drawn.append((kind, Firings(*(x[kept] for x in every)), factors))
        return factors

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", spy)
    monkeypatch.setattr(swaps, "random_like", draw)
    return given, drawn


def make_sae(model, kind="write", seed=0, head=HEAD, flat=False, **options):
    torch.manual_seed(seed)
    cell = model.cell(LAYER, head)
    if flat:
        sae = TopKSAE(TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=24, k=3))
        with torch.no_grad():
            sae.b_enc.normal_(std=0.05)
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 4} | options)))
        with torch.no_grad():
            sae.b_enc.normal_(std=0.05)
            sae.dec_key.mul_(torch.rand(sae.cfg.d_sae, 1, 1) + 0.5)
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(LAYER, head)
    return sae


def three_saes(model):
    return {
        "ours": make_sae(model),
        "on states": make_sae(model, "state", seed=1, rank=2),
        "flat": make_sae(model, seed=2, flat=True),
    }


def encoded(model, sae, tokens):
    """Coefficients at every position, of the hook's own activations."""
    name = sae.cfg.metadata.hook_name
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[name])
        return sae.encode(cache[name].to(sae.dtype))


def writes_of(model, tokens):
    name = model.write_hook_name(LAYER, HEAD)
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name].double()


def kl_with_writes(model, passage, positions, matrices, kl="patched_base"):
    """A full pass for each matrix, in the write's place at its position: KL there."""
    rows = torch.arange(len(positions))

    def put(x, hook):
        x = x.clone()
        x[rows, positions] = torch.stack(matrices).flatten(1).to(x.dtype)
        return x

    with torch.no_grad():
        hooks = [(model.write_hook_name(LAYER, HEAD), put)]
        logits = model.run_with_hooks(passage.expand(len(rows), -1), fwd_hooks=hooks)[rows, positions]
        base = model(passage[None])[0, positions].double().log_softmax(-1)
    patched = logits.double().log_softmax(-1)
    p, q = (base, patched) if kl == "base_patched" else (patched, base)
    return (p.exp() * (p - q)).sum(-1).numpy()


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def matrices_given(given, names):
    """Of each call, the matrices by name."""
    for positions, keys, values in given:
        whole = (keys.mT @ values).double().unflatten(0, (len(names), -1))
        yield positions[: whole.shape[1]], dict(zip(names, whole, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_record_is_a_full_edited_forward_pass(model, tokens, captured, options):
    given, _ = captured
    saes = three_saes(model)
    names = [*saes, *CONTROLS, "delete"]
    result = compare(model, saes, tokens, max_firings=8, seed=2, verbose=False, **options)
    records = result.records
    assert len(records) == 8 * len(names) == result.summary["n_firings"] * len(names)
    acts = {name: encoded(model, sae, tokens) for name, sae in saes.items()}
    writes = writes_of(model, tokens)
    calls = iter(list(matrices_given(given, names)))
    for n in sorted(records.passage.unique()):
        positions, controls = next(calls)
        here = records[records.passage == n]
        assert here[here.name == "delete"].position.tolist() == positions.tolist()
        expected = {"delete": [torch.zeros_like(writes[0, 0])] * len(positions)}
        for name in CONTROLS:
            expected[name] = list(controls[name].flatten(1))
        for name, sae in saes.items():
            coefficients, atoms = acts[name][n, positions].max(-1)
            matrices = sae.W_dec[atoms].detach().double()
            mine = here[here.name == name]
            assert mine.atom.tolist() == atoms.tolist()
            np.testing.assert_allclose(mine.coefficient, coefficients.double(), rtol=1e-4)
            size = coefficients.double()
            if options.get("scale") == "matched_norm":
                size = writes[n, positions].norm(dim=-1) / matrices.norm(dim=-1)
            expected[name] = list(matrices * size[:, None])
        delete = kl_with_writes(model, tokens[n], positions, expected["delete"], options.get("kl"))
        for name in names:
            mine = here[here.name == name]
            kl = kl_with_writes(model, tokens[n], positions, expected[name], options.get("kl"))
            np.testing.assert_allclose(mine.kl, kl, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(mine.kl_delete, delete, rtol=1e-4, atol=1e-9)
            assert mine.token.tolist() == tokens[n, positions].tolist()
            if name != "delete":
                found = [cosine(writes[n, p], m) for p, m in zip(positions, expected[name], strict=True)]
                np.testing.assert_allclose(mine.cosine, found, atol=1e-5)
        first = torch.stack(expected["ours"]).norm(dim=-1)
        for name in CONTROLS:
            torch.testing.assert_close(controls[name].flatten(1).norm(dim=-1), first, rtol=1e-4, atol=0)
            values = torch.linalg.svdvals(controls[name])
            assert bool((values[:, 1] < 1e-5 * values[:, 0]).all())
    assert next(calls, None) is None
    nothing = records[records.name.isin([*CONTROLS, "delete"])]
    assert set(nothing.atom) == {-1}
    assert nothing.coefficient.isna().all()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_first_saes_numbers_are_the_replacement_tests(model, tokens, options):
    sae = make_sae(model)
    kept = {"skip_positions": 3, "max_firings": 11, "seed": 4, "verbose": False}
    ours = compare(model, {"a": sae}, tokens, random=("gaussian",), **kept, **options)
    alone = replacement_test(model, sae, tokens, random="gaussian", **kept, **options)
    of = {name: part.reset_index(drop=True) for name, part in ours.records.groupby("name")}
    for column in ("passage", "position", "token", "atom", "coefficient", "cosine"):
        np.testing.assert_allclose(of["a"][column], alone.records[column], rtol=1e-4, atol=1e-6)
    for name, column in (("a", "kl_atom"), ("delete", "kl_delete"), ("gaussian", "kl_random")):
        np.testing.assert_allclose(of[name].kl, alone.records[column], rtol=1e-4, atol=1e-9)
    rows = {row["name"]: row for row in ours.summary["table"]}
    assert rows["a"]["win_rate"] == alone.summary["win_rate"]
    assert rows["a"]["win_rate_ci"] == alone.summary["win_rate_ci"]


def sometimes(model, tokens, seed, share, **options):
    """An SAE that fires at this share of the positions."""
    sae = make_sae(model, seed=seed, **options)
    with torch.no_grad():
        sae.b_enc.zero_()
        strongest = (encoded(model, sae, tokens) * sae.get_W_dec_norm()).amax(-1).flatten().sort().values
        silent = round((1 - share) * len(strongest))
        sae.b_enc.sub_(strongest[silent - 1 : silent + 1].mean() / sae.get_W_dec_norm())
    return sae


def test_only_positions_at_which_all_fire_are_compared(gdn, tokens):
    saes = {
        "all": make_sae(gdn),
        "most": sometimes(gdn, tokens, 1, 0.7),
        "some": sometimes(gdn, tokens, 2, 0.8),
    }
    jumping = make_sae(gdn, seed=3, activation="jumprelu")
    strongest = encoded(gdn, jumping, tokens).amax(-1).flatten()
    with torch.no_grad():
        for name, x in jumping.activation_fn.named_parameters():
            if "threshold" in name:
                x.fill_(float(strongest.quantile(0.3).log() if "log" in name else strongest.quantile(0.3)))
    saes["jumping"] = jumping
    fires = {name: encoded(gdn, sae, tokens).amax(-1) > 0 for name, sae in saes.items()}
    shared = torch.stack(list(fires.values())).all(0)
    counts = sorted(int(f.sum()) for f in fires.values())
    assert 0 < int(shared.sum()) <= counts[0] < counts[-1] == tokens.numel()
    result = compare(gdn, saes, tokens, random=("orthogonal",), verbose=False)
    expected = shared.nonzero().tolist()
    for name in (*saes, "orthogonal", "delete"):
        part = result.records[result.records.name == name]
        assert part[["passage", "position"]].to_numpy().tolist() == expected
    coverage = {row["name"]: row["coverage"] for row in result.summary["table"]}
    assert coverage["all"] == 1
    for name, f in fires.items():
        assert coverage[name] == pytest.approx(float(f.double().mean()))
    assert coverage["orthogonal"] is None
    assert result.summary["n_firings"] == len(expected)


def wilson(wins, z=1.959963984540054):
    n, p = len(wins), np.mean(wins)
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]


def test_the_table_is_what_the_records_say(gdn, tokens):
    saes = three_saes(gdn)
    result = compare(gdn, saes, tokens, random=("atom", "gaussian"), verbose=False)
    table = {row["name"]: row for row in result.summary["table"]}
    assert list(table) == [*saes, "atom", "gaussian", "delete"]
    kl = {name: part.kl.to_numpy() for name, part in result.records.groupby("name")}
    for name, row in table.items():
        assert row["median_kl"] == pytest.approx(np.median(kl[name]))
        assert row["kl_over_delete"] == pytest.approx(np.median(kl[name]) / np.median(kl["delete"]))
        if name == "delete":
            assert row["win_rate"] is row["win_rate_ci"] is row["median_cosine"] is None
        else:
            wins = kl[name] < kl["delete"]
            assert row["win_rate"] == pytest.approx(np.mean(wins))
            assert row["win_rate_ci"] == pytest.approx(wilson(wins))
            cosines = result.records.cosine[result.records.name == name]
            assert row["median_cosine"] == pytest.approx(np.median(cosines))
        if name == "ours":
            assert row["first_is_nearer"] is None
        else:
            assert row["first_is_nearer"] == pytest.approx(np.mean(kl["ours"] < kl[name]))
    assert table["delete"]["kl_over_delete"] == 1
    for name in ("ours", "flat", "atom"):
        assert f"{name} {table[name]['win_rate']:.1%}" in result.headline


def check_kinds(drawn, decoder):
    kinds = set()
    for kind, firings, factors in drawn:
        kinds.add(kind)
        native = firings.write_key.float(), firings.write_value.float()
        if kind == "orthogonal":
            for side, own in zip(factors, native, strict=True):
                angle = torch.nn.functional.cosine_similarity(side[:, 0], own, dim=-1)
                assert float(angle.abs().max()) < 1e-5
                assert side[:, 0].norm(dim=-1).min() > 0
        if kind == "native_marginals":
            for side, own in zip(factors, native, strict=True):
                same = side[:, 0][:, None] == own[None]  # [drawn, firing, coordinate]
                assert bool(same.any(1).all())
                assert not bool(same.all(-1).any())  # coordinates are drawn one by one
        if kind == "atom":
            matrices = (factors.key.mT @ factors.value).flatten(1)
            which = (matrices[:, None] - decoder[None]).abs().amax(-1).argmin(-1)
            torch.testing.assert_close(matrices, decoder[which])
            assert not bool((which == firings.atom).any())
            assert len(set(which.tolist())) > 3
    return kinds


def test_controls_are_of_their_kind(model, tokens, captured):
    _, drawn = captured
    saes = {"a": make_sae(model), "b": make_sae(model, seed=1)}
    compare(model, saes, tokens, verbose=False)
    decoder = saes["a"].W_dec.detach()
    assert check_kinds(drawn, decoder) == set(CONTROLS)
    assert [kind for kind, *_ in drawn] == [*CONTROLS, *CONTROLS]
    for kind in ("orthogonal", "native_marginals"):
        drawn.clear()
        replacement_test(model, saes["a"], tokens, random=kind, verbose=False)
        assert check_kinds(drawn, decoder) == {kind}
        assert len(drawn) == 2


@pytest.mark.parametrize("kind", ["orthogonal", "native_marginals"])
def test_the_replacement_tests_new_controls_are_full_edited_forward_passes(model, tokens, captured, kind):
    given, _ = captured
    records = replacement_test(model, make_sae(model), tokens[:1], random=kind, verbose=False).records
    ((positions, matrices),) = matrices_given(given, ["atom", "delete", "random"])
    norms = {name: m.flatten(1).norm(dim=-1) for name, m in matrices.items()}
    torch.testing.assert_close(norms["random"], norms["atom"], rtol=1e-4, atol=0)
    kl = kl_with_writes(model, tokens[0], positions, list(matrices["random"]))
    np.testing.assert_allclose(records.kl_random, kl, rtol=1e-4, atol=1e-9)
    if kind == "orthogonal":
        native = writes_of(model, tokens)[0, positions].view_as(matrices["random"])
        assert (native.mT @ matrices["random"]).abs().max() < 1e-5 * native.norm() * norms["random"].max()
        assert (native @ matrices["random"].mT).abs().max() < 1e-5 * native.norm() * norms["random"].max()


def test_native_marginals_draw_from_all_of_the_passages_writes(gdn, tokens):
    records = replacement_test(
        gdn, make_sae(gdn), tokens[:1], random="native_marginals", scale="matched_norm", max_firings=1,
        verbose=False,
    ).records  # fmt: skip
    assert records.kl_random[0] > 1e-6


def test_a_control_given_twice_counts_once(gdn, tokens):
    saes = {"a": make_sae(gdn)}
    result = compare(gdn, saes, tokens, random=("gaussian", "gaussian"), verbose=False)
    assert result.summary["n_firings"] == int((result.records.name == "a").sum())


def test_an_atom_of_an_sae_with_rescaling_is_written_as_the_sae_decodes_it(gdn, tokens, captured):
    given, _ = captured
    cell = gdn.cell(LAYER, HEAD)
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=24, k=1, rescale_acts_by_decoder_norm=True))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(24, 1) * 2 + 2)
    sae.cfg.metadata.hook_name = gdn.write_hook_name(LAYER, HEAD)
    compare(gdn, {"flat": sae}, tokens[:1], random=(), verbose=False)
    ((positions, matrices),) = matrices_given(given, ["flat", "delete"])
    with torch.no_grad():
        decoded = sae.decode(encoded(gdn, sae, tokens[:1]))[0, positions].double() - sae.b_dec.double()
    torch.testing.assert_close(matrices["flat"].flatten(1), decoded, rtol=1e-4, atol=1e-6)


def test_bad_input(gdn, tokens):
    sae, how = make_sae(gdn), {"verbose": False}
    silent = make_sae(gdn, seed=1)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    here = sometimes(gdn, tokens, 1, 0.5)
    cases = [
        (lambda: compare(gdn, {}, tokens, **how), "no SAEs to compare"),
        (lambda: compare(gdn, {"a": sae, "b": make_sae(gdn, head=1)}, tokens, **how), "^b belong to another"),
        (lambda: compare(gdn, {"gaussian": sae}, tokens, **how), "gaussian are names of controls"),
        (lambda: compare(gdn, {"a": sae, "delete": here}, tokens, **how), "delete are names of controls"),
        (lambda: compare(gdn, {"a": sae}, tokens, random=("gauss",), **how), "random='gauss' is unknown"),
        (lambda: compare(gdn, {"a": sae, "b": silent}, tokens, **how), "no atom fires"),
        (lambda: compare(gdn, {"a": sae}, tokens, max_firings=0, **how), "max_firings=0"),
        (lambda: compare(gdn, {"a": sae}, tokens, skip_positions=20, **how), "left none"),
        (lambda: compare(gdn, {"a": sae}, tokens, context_size=5, **how), "cut into passages already"),
        (lambda: compare(gdn, {"a": sae}, "short", **how), "the text is too short"),
    ]
    for call, message in cases:
        with pytest.raises(WriteSAEError, match=message):
            call()


def test_saes_that_fire_but_never_together_are_refused(gdn, tokens):
    a, b = make_sae(gdn), make_sae(gdn, seed=1)
    with torch.no_grad():
        strengths = encoded(gdn, a, tokens)
        a.b_enc.fill_(-1e6)
        b.b_enc.fill_(-1e6)
        # One atom each, which looks for one side and for the other: their signs are opposite.
        b.enc_key[0], b.enc_value[0] = -a.enc_key[0], a.enc_value[0]
        a.b_enc[0] = b.b_enc[0] = 0
    assert strengths.shape[-1] == 32
    for sae in (a, b):
        assert bool((encoded(gdn, sae, tokens) > 0).any())
    with pytest.raises(WriteSAEError) as caught:
        compare(gdn, {"a": a, "b": b}, tokens, verbose=False)
    assert "fire" in str(caught.value)


def test_an_interrupted_run_goes_on_and_is_saved_and_drawn(gdn, tokens, tmp_path, monkeypatch):
    saes = {"a": make_sae(gdn), "b": make_sae(gdn, seed=1)}
    whole = compare(gdn, saes, tokens, verbose=False)
    run, calls = HookedRecurrent.run_with_swapped_writes, []

    def stops(self, *args, **kwargs):
        calls.append(args[0].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", stops)
    folder = str(tmp_path / "progress")
    with pytest.raises(KeyboardInterrupt):
        compare(gdn, saes, tokens, verbose=False, progress_folder=folder)
    resumed = compare(gdn, saes, tokens, verbose=False, progress_folder=folder)
    assert calls == [tokens[0].tolist(), tokens[1].tolist(), tokens[1].tolist()]
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary == whole.summary
    for other in ({"seed": 1}, {"random": ("atom",)}, {"scale": "matched_norm"}, {"max_firings": 3}):
        with pytest.raises(WriteSAEError, match="other settings"):
            compare(gdn, saes, tokens, verbose=False, progress_folder=folder, **other)
    swapped = {"b": saes["a"], "a": saes["b"]}
    with pytest.raises(WriteSAEError, match="other settings"):
        compare(gdn, swapped, tokens, verbose=False, progress_folder=folder)
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "comparison.png"}
    assert json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail) == whole.summary
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), whole.records)
    assert isinstance(resumed.plot(), Figure)
    said = [x.get_text() for axis in resumed.plot().axes for x in [*axis.get_yticklabels(), *axis.texts]]
    said += [x.get_text() for axis in resumed.plot().axes for x in axis.get_xticklabels()]
    assert any(text == "a" or "native_marginals" in text or "native marginals" in text for text in said)


def test_seeds_change_the_controls_and_nothing_else(gdn, tokens):
    saes = {"a": make_sae(gdn)}
    first, again, other = (compare(gdn, saes, tokens, seed=s, verbose=False).records for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    for name, part in first.groupby("name"):
        same = np.allclose(part.kl, other.kl[other.name == name], rtol=1e-9)
        assert same == (name in ("a", "delete")), name
