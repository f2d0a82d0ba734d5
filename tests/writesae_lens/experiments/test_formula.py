"""The logit formula against full edited forward passes and plain loops."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import formula, logit_formula_test

LAYER, HEAD = 1, 2


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 3 * 20].view(3, 20)


def make_sae(model, kind="write", **options):
    torch.manual_seed(0)
    cell = model.cell(LAYER, HEAD)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(LAYER, HEAD)
    return sae


def added(model, passage, position, matrix):
    """Logits when a hook adds a matrix to the native write."""

    def add(x, hook):
        x = x.clone()
        x[:, position] += matrix.flatten()
        return x

    with torch.no_grad():
        return model.run_with_hooks(passage[None], fwd_hooks=[(model.write_hook_name(LAYER, HEAD), add)])[0]


@pytest.fixture(scope="module")
def rows(model):
    """Some writes to add, and where."""
    cell, rng = model.cell(LAYER, HEAD), torch.Generator().manual_seed(1)
    keys = torch.randn(4, cell.d_k, generator=rng, dtype=torch.float64)
    values = torch.randn(4, cell.d_v, generator=rng, dtype=torch.float64)
    return torch.tensor([0, 7, 7, 19]), keys, values


def test_added_writes_are_edits_of_the_write(model, tokens, rows):
    positions, keys, values = rows
    found = model.run_with_added_writes(tokens[0], LAYER, HEAD, positions, keys, values)
    for row, position in enumerate(positions.tolist()):
        expected = added(model, tokens[0], position, keys[row, :, None] * values[row])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)  # Mamba-2 gives float32 logits


def test_the_linear_change_is_the_derivative_of_what_comes_after_the_layer(model, tokens, rows):
    positions, keys, values = rows
    found = model.run_with_added_writes(tokens[0], LAYER, HEAD, positions, keys, values, linear=True)
    out = model.write_hook_name(LAYER, HEAD).rsplit(".hook_write", 1)[0] + ".hook_out"
    write = model.write_hook_name(LAYER, HEAD)
    # Norms and logits are rounded to float32 whatever the dtype, and a difference divides that by its step.
    step, limit = 1e-2, 1e-3
    with torch.no_grad():
        for row, position in enumerate(positions.tolist()):
            kept = {}

            def keep(y, hook, name="native", kept=kept):
                kept[name] = y.clone()

            def add(x, hook, row=row, position=position):
                x = x.clone()
                x[:, position] += (keys[row, :, None] * values[row]).flatten()
                return x

            passage = tokens[:1]
            model.run_with_hooks(passage, fwd_hooks=[(out, keep)])
            edits = [(write, add), (out, lambda y, hook, keep=keep: keep(y, hook, "moved"))]
            model.run_with_hooks(passage, fwd_hooks=edits)
            moved = kept["moved"] - kept["native"]
            far, near = (
                model.run_with_hooks(passage, fwd_hooks=[(out, lambda y, hook, s=s, m=moved: y + s * m)])[0]
                for s in (step, -step)
            )
            difference = (far.double() - near.double()) / (2 * step)
            scale = limit * float(difference.abs().max())
            torch.testing.assert_close(found[row].double(), difference, rtol=0, atol=scale)


def test_nothing_is_left_behind_and_bad_rows_are_refused(model, tokens, rows):
    positions, keys, values = rows
    with torch.no_grad():
        before = model(tokens[:1])
    model.run_with_added_writes(tokens[0], LAYER, HEAD, positions, keys, values, linear=True)
    with torch.no_grad():
        assert torch.equal(model(tokens[:1]), before)
    run = model.run_with_added_writes
    for wrong in (
        (tokens, LAYER, HEAD, positions, keys, values),
        (tokens[0], LAYER, 99, positions, keys, values),
        (tokens[0], LAYER, HEAD, positions + 5, keys, values),
        (tokens[0], LAYER, HEAD, positions, keys[:, :-1], values),
        (tokens[0], LAYER, HEAD, positions, keys[:2], values[:2]),
    ):
        # Shapes are refused here by their annotations, which the tests check, before the method can.
        with pytest.raises((HookedModelError, TypeCheckError)):
            run(*wrong)
    for row, cell, message in ((25, HEAD, "positions must lie in 0 .. 19"), (0, 99, "no cell at layer")):
        with pytest.raises(HookedModelError, match=message):
            run(tokens[0], LAYER, cell, positions + row, keys, values)


def write_norms(model, tokens):
    names = model.write_factor_hook_names(LAYER)[:2]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(names))
    key, value = (cache[name][:, :, HEAD] for name in names)
    return (key[..., :, None] * value[..., None, :]).flatten(2).norm(dim=-1)


@pytest.mark.parametrize("kind", ["write", "state"])
def test_measured_shifts_are_those_of_edited_passes(model, tokens, kind):
    sae = make_sae(model, kind)
    how = {"n_atoms": 3, "n_tokens": 2, "max_horizon": 4, "epsilons": (0.3, 2.0), "verbose": False}
    result = logit_formula_test(model, sae, tokens, seed=3, **how)
    records = result.records
    unit = float(write_norms(model, tokens).flatten().median())
    assert result.summary["unit"] == pytest.approx(unit, rel=1e-5)
    np.testing.assert_allclose(records.eps, records.epsilon * unit, rtol=1e-5)
    assert len(records) == 3 * 3 * 2 * 5 * 2
    key, value = (f.double() for f in sae.decoder_factors())
    for passage, position in records[["passage", "position"]].drop_duplicates().to_numpy():
        with torch.no_grad():
            native = model(tokens[passage, None])[0]
        mine = records[records.passage == passage]
        assert list(mine.token.unique()) == native[position].topk(2).indices.tolist()
        for (atom, eps), part in mine.groupby(["atom", "eps"]):
            matrix = key[atom].T @ value[atom]
            edited = added(model, tokens[passage], position, eps * matrix / matrix.norm())
            at = torch.as_tensor((part.position + part.horizon).to_numpy(copy=True))
            token = torch.as_tensor(part.token.to_numpy(copy=True))
            np.testing.assert_allclose(part.measured, (edited - native)[at, token].numpy(), atol=1e-5)
    # R2 as its definition has it.
    cells = []
    for _, part in records.groupby(["atom", "epsilon"]):
        m, p = part.measured.to_numpy(), part.predicted.to_numpy()
        cells.append(1 - ((m - p) ** 2).sum() / ((m - m.mean()) ** 2).sum())
    assert result.summary["median_r2"] == pytest.approx(np.median(cells), abs=1e-9)
    assert result.summary["n_cells"] == len(cells) == 6


def test_small_writes_are_predicted_without_a_fitted_number(model, tokens):
    result = logit_formula_test(
        model, make_sae(model), tokens, epsilons=(0.1,), n_atoms=8, max_horizon=8, verbose=False
    )
    assert result.summary["median_r2_by_eps"]["0.1"] > 0.99


def test_gate_product_is_its_formula(model, tokens):
    sae = make_sae(model)
    how = {"n_atoms": 2, "n_tokens": 2, "max_horizon": 5, "verbose": False, "epsilons": (0.5, 1.5)}
    records = logit_formula_test(model, sae, tokens, form="gate_product", **how).records
    read = model.write_factor_hook_names(LAYER)[2]
    decay = read.replace("hook_read", "hook_decay")
    cell = model.cell(LAYER, HEAD)
    layer = model.mixers[LAYER]._layer
    projection = getattr(layer, "out_proj", None) or layer.o_proj
    w_o = projection.weight[:, HEAD * cell.d_v : (HEAD + 1) * cell.d_v].double()
    w_u = model.original_model.get_output_embeddings().weight.double()
    key, value = (f.double()[:, 0] for f in sae.decoder_factors())
    for row in records.sample(40, random_state=0).itertuples():
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens[row.passage, None], names_filter=[read, decay])
        k = key[row.atom] / key[row.atom].norm()
        for t in range(row.position + 1, row.position + row.horizon + 1):
            k = k * cache[decay][0, t, HEAD]
        by_key = float((k * cache[read][0, row.position + row.horizon, HEAD]).sum())
        by_value = float(w_u[row.token] @ w_o @ (value[row.atom] / value[row.atom].norm()))
        assert row.unfitted == pytest.approx(row.eps * by_key * by_value, rel=1e-4, abs=1e-9)
    for _, part in records.groupby(["passage", "atom", "token"]):
        c = np.linalg.lstsq(part[["unfitted"]].to_numpy(), part.measured.to_numpy(), rcond=None)[0][0]
        np.testing.assert_allclose(part.predicted, c * part.unfitted, rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def passages(gdn):
    return gdn.to_tokens(zoo.held_out_text()[:2000], prepend_bos=False, truncate=False)[0, :40].view(2, 20)


HOW = {"n_atoms": 3, "n_tokens": 2, "max_horizon": 4, "epsilons": (0.3,), "verbose": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_atoms": 0}, "n_atoms=0"),
        ({"max_horizon": 20}, "no room for a horizon of 20"),
        ({"epsilons": ()}, "epsilons must be positive"),
        ({"epsilons": (0.1, -1.0)}, "epsilons must be positive"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input(gdn, passages, options, message):
    with pytest.raises(WriteSAEError, match=message):
        logit_formula_test(gdn, make_sae(gdn), passages, **(HOW | options))


def test_no_atom_fires(gdn, passages):
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    with pytest.raises(WriteSAEError, match="no atom fires"):
        logit_formula_test(gdn, sae, passages, **HOW)


def test_resumed_saved_and_drawn(gdn, passages, tmp_path, monkeypatch):
    sae = make_sae(gdn, rank=2)
    whole = logit_formula_test(gdn, sae, passages, **HOW)
    passage = formula._passage
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return passage(*args)

    monkeypatch.setattr(formula, "_passage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logit_formula_test(gdn, sae, passages, progress_folder=str(tmp_path / "p"), **HOW)
    resumed = logit_formula_test(gdn, sae, passages, progress_folder=str(tmp_path / "p"), **HOW)
    assert len(calls) == 3
    np.testing.assert_allclose(resumed.records, whole.records, rtol=1e-12)
    assert resumed.summary["median_r2"] == pytest.approx(whole.summary["median_r2"])
    assert {p.name for p in resumed.save(tmp_path / "out").iterdir()} == {
        "records.csv",
        "summary.json",
        "formula.png",
    }


def test_one_passage_and_absolute_sizes(gdn, passages):
    result = logit_formula_test(gdn, make_sae(gdn), passages[:1], eps_unit="absolute", **HOW)
    assert set(result.records.eps) == {0.3}
    assert result.summary["n_passages"] == 1
