"""What is active in a passage against the dense coefficients, and what is kept of it."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import encoded, every_subject, make_codes, make_sae, read_passages
from writesae_lens.experiments import firings, top_contexts
from writesae_lens.experiments.features.activity import Activity
from writesae_lens.experiments.firings import activity, find_firings, stand_in

N_KEY = 12


def some_acts(n=40, d_sae=30, seed=0):
    """Sparse coefficients with ties and a negative one; nothing fires at the first positions."""
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randint(1, 6, (n, d_sae), generator=rng) * (torch.rand(n, d_sae, generator=rng) < 0.15)
    acts[:3] = 0
    acts[5, 7] = -2
    return acts.float()


def dense(active):
    """The coefficients of all features again."""
    acts = torch.zeros(len(active), active.d_sae)
    acts[active.position.long(), active.feature.long()] = active.coefficient
    return acts


def active_of(acts, n_key=0, parts=1):
    writes = torch.randn(2, len(acts), 4, generator=torch.Generator().manual_seed(1))
    return Activity.of(acts.chunk(parts), writes[0], writes[1], n_key)


@pytest.mark.parametrize("n_key", [0, N_KEY])
@pytest.mark.parametrize("parts", [1, 3])
def test_entries_are_the_coefficients_that_are_not_zero(n_key, parts):
    acts = some_acts()
    active = active_of(acts, n_key, parts)
    assert len(active.coefficient) == int((acts != 0).sum())
    assert torch.equal(dense(active), acts)
    assert torch.equal(active.uses(), (acts > 0).sum(0))
    for feature in range(30):
        assert torch.equal(active.of_feature(feature), acts[:, feature])
    assert torch.equal(active.greatest(), acts.amax(-1).clamp(min=0))
    sides = [range(N_KEY), range(N_KEY, 30)] if n_key else [range(30)]
    assert list(active.sides.values()) == sides
    for row, found, key in zip(acts, active.dominant.tolist(), active.dominant_key.tolist(), strict=True):
        best = [side[int(row[side.start : side.stop].argmax())] for side in sides]
        fires = all(row[feature] > 0 for feature in best)
        assert found == (best[-1] if fires else -1)
        assert key == (best[0] if fires and n_key else -1)


def test_strongest_are_the_first_positions_of_the_largest_coefficients():
    acts = some_acts()
    feature, position, size = active_of(acts).strongest(3)
    expected = [
        (f, p, float(acts[p, f]))
        for f in range(30)
        for p in sorted(range(40), key=lambda p: (-acts[p, f], p))[:3]
        if acts[p, f] > 0
    ]
    assert list(zip(feature.tolist(), position.tolist(), size.tolist(), strict=True)) == expected


def test_parts_of_a_passage_and_other_coefficients():
    acts = some_acts()
    active, rows = active_of(acts, N_KEY), torch.tensor([2, 5, 11, 39])
    part = active.at(rows)
    assert torch.equal(dense(part), acts[rows])
    assert torch.equal(part.dominant, active.dominant[rows])
    assert torch.equal(part.write_key, active.write_key[rows])
    alone, expected = active.alone(14), acts.clone()
    expected[:, [f for f in range(N_KEY, 30) if f != 14]] = 0
    assert torch.equal(dense(alone), expected)
    sizes, expected = torch.arange(4.0), acts[rows].clone()
    expected[:, 14] = sizes
    changed = part.with_coefficients(14, sizes)
    assert torch.equal(dense(changed), expected)
    features, coefficients = changed.by_position()
    assert (coefficients.diff(dim=-1) <= 0).all()
    again = torch.zeros(4, 30).scatter_add_(1, features, coefficients)
    assert torch.equal(again, expected)


@every_subject
def test_a_passage_is_encoded_some_positions_at_a_time(model, kind, options, monkeypatch):
    sae, tokens = make_sae(model, kind, **options), read_passages(model, 1)
    site = model.site(sae.cfg.metadata.hook_name)
    whole, acts = activity(model, sae, site, tokens[0]), encoded(model, sae, tokens)[0].float()
    monkeypatch.setattr(firings, "NUMBERS_AT_ONCE", 7 * max(sae.cfg.d_sae, sae.cfg.d_in))
    cut = activity(model, sae, site, tokens[0])
    for active in (whole, cut):
        torch.testing.assert_close(dense(active), acts)
        assert torch.equal(active.dominant, torch.where(acts.amax(-1) > 0, acts.argmax(-1), -1))
        # A view would keep the sides of all heads.
        assert active.write_key.untyped_storage().nbytes() == active.write_key.nbytes


def test_stand_ins_of_codes_are_built_some_at_a_time(gdn, monkeypatch):
    sae, tokens = make_codes(gdn), read_passages(gdn, 1)
    site = gdn.site(sae.cfg.metadata.hook_name)
    found = find_firings(gdn, sae, site, tokens[0])
    whole = stand_in(sae, found, site.cell)
    monkeypatch.setattr(firings, "NUMBERS_AT_ONCE", 3 * sae.cfg.d_sae)
    torch.testing.assert_close(stand_in(sae, found, site.cell).matrix(), whole.matrix())
    torch.testing.assert_close(whole.norm(), found.coefficient)


def test_a_dense_sae_keeps_all_that_is_active(gdn):
    """Every feature is active everywhere: experiments still work, on as many entries."""
    sae, tokens = make_sae(gdn, k=32), read_passages(gdn, 2)
    with torch.no_grad():
        sae.b_enc += 10
    active = activity(gdn, sae, gdn.site(sae.cfg.metadata.hook_name), tokens[0])
    assert len(active.coefficient) == 32 * len(active)
    records = top_contexts(gdn, sae, tokens, n_contexts=2, verbose=False).records
    largest = encoded(gdn, sae, tokens).flatten(0, 1).topk(2, dim=0).values.T.flatten()
    np.testing.assert_allclose(records.coefficient, largest, rtol=1e-5)


def test_nothing_of_every_feature_at_every_position_is_kept():
    acts = some_acts(n=200, d_sae=1000)
    active = active_of(acts * (acts == 5), n_key=0)
    kept = [x for x in dataclasses.asdict(active).values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() for x in kept) < 0.15 * acts.numel()
