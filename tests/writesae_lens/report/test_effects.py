"""What atoms promote and suppress, against full passes with edited writes."""

import pytest
import torch

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    encoded,
    logits_with_swapped,
    make_sae,
    read_passages,
)
from writesae_lens.experiments.subjects import find_site
from writesae_lens.report import effects as module
from writesae_lens.report.effects import measure_effects


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_effects_are_mean_shifts_at_the_atoms_firings(name):
    model = HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.float64)
    sae, tokens = make_sae(model), read_passages(model)
    effects = measure_effects(model, sae, find_site(model, sae), tokens, 4, 10_000, verbose=False)
    acts, atoms = encoded(model, sae, tokens), atoms_of(sae, model)
    strength, dominant = acts.max(-1)
    fires = strength > 0
    assert effects.atom.tolist() == dominant[fires].unique().tolist()
    sums: dict[int, list[torch.Tensor]] = {}
    for passage, where, winner, size in zip(tokens, fires, dominant, strength, strict=True):
        positions = where.nonzero().flatten()
        matrices = atoms[winner[positions]] * size[positions, None, None]
        swapped, _ = logits_with_swapped(model, passage, positions, list(matrices), LAYER, HEAD)
        deleted, _ = logits_with_swapped(model, passage, positions, list(0 * matrices), LAYER, HEAD)
        shift = swapped - deleted
        for atom, row in zip(winner[positions].tolist(), shift - shift.mean(-1, keepdim=True), strict=True):
            sums.setdefault(atom, []).append(row)
    for row, atom in enumerate(effects.atom.tolist()):
        shifts = torch.stack(sums[atom])
        mean = shifts.mean(0)
        assert int(effects.n[row]) == len(shifts)
        expected = torch.cat([mean.topk(4).values, mean.topk(4, largest=False).values])
        torch.testing.assert_close(effects.shift[row].double(), expected, atol=1e-5, rtol=1e-4)
        of_tokens = shifts[:, effects.tokens[row]]
        torch.testing.assert_close(of_tokens.mean(0), expected, atol=1e-5, rtol=1e-4)
        signs = (of_tokens.sign() == expected.sign()).double().mean(0)
        clear = (of_tokens.abs() > 1e-6).all(0)
        torch.testing.assert_close(effects.agreement[row].double()[clear], signs[clear])


def test_a_value_code_is_written_alone_at_its_address():
    model = HookedRecurrent.boot_transformers("tiny-mamba2", device="cpu", dtype=torch.float64)
    sae, tokens = make_sae(model, decoder="codes", k=4), read_passages(model)
    effects = measure_effects(model, sae, find_site(model, sae), tokens, 4, 10_000, verbose=False)
    acts, n_key = encoded(model, sae, tokens), sae.cfg.n_key
    keys, values = sae.dec_key.detach().double(), sae.dec_value.detach().double()
    sums: dict[int, list[torch.Tensor]] = {}
    for passage, of_keys, of_values in zip(tokens, acts[..., :n_key], acts[..., n_key:], strict=True):
        positions = ((of_keys.amax(-1) > 0) & (of_values.amax(-1) > 0)).nonzero().flatten()
        size, winner = of_values[positions].max(-1)
        matrices = (of_keys[positions] @ keys)[:, :, None] * (size[:, None] * values[winner])[:, None]
        swapped, _ = logits_with_swapped(model, passage, positions, list(matrices), LAYER, HEAD)
        deleted, _ = logits_with_swapped(model, passage, positions, list(0 * matrices), LAYER, HEAD)
        shift = swapped - deleted
        for code, row in zip(winner.tolist(), shift - shift.mean(-1, keepdim=True), strict=True):
            sums.setdefault(code + n_key, []).append(row)
    assert effects.atom.tolist() == sorted(sums)
    for row, code in enumerate(effects.atom.tolist()):
        mean = torch.stack(sums[code]).mean(0)
        assert int(effects.n[row]) == len(sums[code])
        expected = torch.cat([mean.topk(4).values, mean.topk(4, largest=False).values])
        torch.testing.assert_close(effects.shift[row].double(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(effects.control, effects.shift)


def test_few_firings_of_an_atom_are_drawn_and_the_control_is_another_atoms():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    sae, tokens = make_sae(model), read_passages(model, 4)
    site = find_site(model, sae)
    one, again = (measure_effects(model, sae, site, tokens, 3, 2, seed=s, verbose=False) for s in (0, 0))
    assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert one.n.max() == 2
    assert one.tokens.shape == (len(one.atom), 6)
    assert not torch.allclose(one.control, one.shift)
    assert one.control.isfinite().all()


def test_a_large_vocabulary_and_many_firings_are_measured_in_pieces(monkeypatch):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.float64)
    sae, tokens = make_sae(model), read_passages(model, 3)
    site = find_site(model, sae)
    whole = measure_effects(model, sae, site, tokens, 4, verbose=False)
    # Blocks of 2 atoms or so, logits of one firing at a time.
    monkeypatch.setattr(module, "_AT_ONCE", 3 * 5 * model.cfg.d_model)
    cut = measure_effects(model, sae, site, tokens, 4, verbose=False)
    assert torch.equal(whole.atom, cut.atom)
    assert torch.equal(whole.n, cut.n)
    torch.testing.assert_close(cut.shift, whole.shift, rtol=1e-4, atol=1e-5)
