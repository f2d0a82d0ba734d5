"""The logit formula against full edited forward passes and plain loops."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from hooked_models import HookedModelError
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    cached,
    column,
    make_sae,
    output_weights,
    read_passages,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import logit_formula_test

HOW = {"n_atoms": 3, "n_tokens": 2, "max_horizon": 4, "epsilons": (0.3,), "verbose": False}


@pytest.fixture(scope="module")
def tokens(model):
    return read_passages(model, 3)


def with_added(model, passage, position, matrix, *hooks):
    """Logits at all positions when a hook adds a matrix to the native write."""

    def add(write, hook):
        write = write.clone()
        write[:, position] += matrix.flatten()
        return write

    with torch.no_grad():
        return model.run_with_hooks(
            passage[None], fwd_hooks=[(model.write_hook_name(LAYER, HEAD), add), *hooks]
        )[0]


@pytest.fixture(scope="module")
def rows(model):
    """Some writes to add: positions, keys, values."""
    cell, rng = model.cell(LAYER, HEAD), torch.Generator().manual_seed(1)
    keys = torch.randn(4, cell.d_k, generator=rng, dtype=torch.float64)
    values = torch.randn(4, cell.d_v, generator=rng, dtype=torch.float64)
    return torch.tensor([0, 7, 7, 19]), keys, values


def test_added_writes_are_edits_of_the_write(model, tokens, rows):
    logits = model.run_with_added_writes(tokens[0], LAYER, HEAD, *rows)
    for logit, position, key, value in zip(logits, *rows, strict=True):
        expected = with_added(model, tokens[0], position, key[:, None] * value)
        torch.testing.assert_close(logit, expected, rtol=0, atol=1e-6)  # Mamba-2 gives float32 logits


def test_the_linear_change_is_the_derivative_of_what_comes_after_the_layer(model, tokens, rows):
    changes = model.run_with_added_writes(tokens[0], LAYER, HEAD, *rows, linear=True)
    out = model.hook_name(LAYER, "out")
    native = cached(model, tokens[:1], out)
    # Norms and logits are rounded to float32 whatever the dtype, and a difference divides that by its step.
    step, limit = 1e-2, 1e-3
    for change, position, key, value in zip(changes, *rows, strict=True):
        seen = []
        keep = (out, lambda y, hook, seen=seen: seen.append(y.clone()))
        with_added(model, tokens[0], position, key[:, None] * value, keep)
        moved = seen[0] - native
        with torch.no_grad():
            far, near = (
                model.run_with_hooks(tokens[:1], fwd_hooks=[(out, lambda y, hook, s=s, m=moved: y + s * m)])[
                    0
                ]
                for s in (step, -step)
            )
        difference = (far.double() - near.double()) / (2 * step)
        scale = limit * float(difference.abs().max())
        torch.testing.assert_close(change.double(), difference, rtol=0, atol=scale)


def test_nothing_is_left_behind_and_bad_rows_are_refused(model, tokens, rows):
    positions, keys, values = rows
    with torch.no_grad():
        before = model(tokens[:1])
        model.run_with_added_writes(tokens[0], LAYER, HEAD, *rows, linear=True)
        assert torch.equal(model(tokens[:1]), before)
    run = model.run_with_added_writes
    for wrong in (
        (tokens, LAYER, HEAD, positions, keys, values),
        (tokens[0], LAYER, HEAD, positions, keys[:, :-1], values),
        (tokens[0], LAYER, HEAD, positions, keys[:2], values[:2]),
    ):
        # Shapes are refused here by their annotations, which the tests check, before the method can.
        with pytest.raises((HookedModelError, TypeCheckError)):
            run(*wrong)
    for row, head, message in ((5, HEAD, "positions must lie in 0 .. 19"), (0, 99, "no cell at layer")):
        with pytest.raises(HookedModelError, match=message):
            run(tokens[0], LAYER, head, positions + row, keys, values)


@pytest.mark.parametrize("kind", ["write", "state"])
def test_measured_shifts_are_those_of_edited_passes(model, tokens, kind):
    sae = make_sae(model, kind)
    how = {"n_atoms": 3, "n_tokens": 2, "max_horizon": 4, "epsilons": (0.3, 2.0), "verbose": False}
    result = logit_formula_test(model, sae, tokens, seed=3, **how)
    records = result.records
    unit = float(writes(model, tokens).flatten(2).norm(dim=-1).flatten().median())
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
            edited = with_added(model, tokens[passage], position, eps * matrix / matrix.norm())
            at, token = column(part, "position") + column(part, "horizon"), column(part, "token")
            np.testing.assert_allclose(part.measured, (edited - native)[at, token].numpy(), atol=1e-5)
    # R2 as its definition has it.
    r2 = []
    for _, part in records.groupby(["atom", "epsilon"]):
        m, p = part.measured.to_numpy(), part.predicted.to_numpy()
        r2.append(1 - ((m - p) ** 2).sum() / ((m - m.mean()) ** 2).sum())
    assert result.summary["median_r2"] == pytest.approx(np.median(r2), abs=1e-9)
    assert result.summary["n_cells"] == len(r2) == 6


def test_small_writes_are_predicted_without_a_fitted_number(model, tokens):
    result = logit_formula_test(
        model, make_sae(model), tokens, epsilons=(0.1,), n_atoms=8, max_horizon=8, verbose=False
    )
    assert result.summary["median_r2_by_eps"]["0.1"] > 0.99


def test_gate_product_is_its_formula(model, tokens):
    sae = make_sae(model)
    how = {"n_atoms": 2, "n_tokens": 2, "max_horizon": 5, "verbose": False, "epsilons": (0.5, 1.5)}
    records = logit_formula_test(model, sae, tokens, form="gate_product", **how).records
    reads, decays = (cached(model, tokens, model.hook_name(LAYER, x))[:, :, HEAD] for x in ("read", "decay"))
    w_o, w_u = output_weights(model, LAYER, HEAD)
    key, value = (f.detach().double()[:, 0] for f in sae.decoder_factors())
    for row in records.sample(40, random_state=0).itertuples():
        k, end = key[row.atom] / key[row.atom].norm(), row.position + row.horizon
        for t in range(row.position + 1, end + 1):
            k = k * decays[row.passage, t]
        by_key = float((k * reads[row.passage, end]).sum())
        by_value = float(w_u[row.token] @ w_o @ (value[row.atom] / value[row.atom].norm()))
        assert row.unfitted == pytest.approx(row.eps * by_key * by_value, rel=1e-4, abs=1e-9)
    for _, part in records.groupby(["passage", "atom", "token"]):
        c = np.linalg.lstsq(part[["unfitted"]].to_numpy(), part.measured.to_numpy(), rcond=None)[0][0]
        np.testing.assert_allclose(part.predicted, c * part.unfitted, rtol=1e-6, atol=1e-12)


def test_absolute_sizes_and_a_horizon_longer_than_the_passage(gdn, passages):
    result = logit_formula_test(gdn, make_sae(gdn, rank=2), passages[:1], eps_unit="absolute", **HOW)
    assert set(result.records.eps) == {0.3}
    with pytest.raises(WriteSAEError, match="no room for a horizon of 20"):
        logit_formula_test(gdn, make_sae(gdn), passages, **(HOW | {"max_horizon": 20}))
