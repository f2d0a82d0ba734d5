"""Stand-ins against plain loops: the untrained ones, and what one feature contributes."""

import json

import numpy as np
import pytest
import torch

from hooked_models import zoo
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    encoded,
    make_codes,
    make_sae,
    read_passages,
    writes,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments import compare, replacement_test, swaps
from writesae_lens.experiments.firings import activity, contribution, find_firings, native_of, stand_in
from writesae_lens.experiments.origin import ResultWarning
from writesae_lens.experiments.stand_ins import untrained
from writesae_lens.saes.rank1 import Factors

KINDS = [
    ("write", {}),
    ("write", {"rank": 2}),
    ("write", {"decoder": "dense"}),
    ("flat", {}),
    ("state", {}),
    ("codes", {}),
]


def sae_of(model, kind, options):
    return make_codes(model) if kind == "codes" else make_sae(model, kind, **options)


@pytest.fixture(scope="module")
def native(gdn, passages):
    factors = [gdn.run_with_cache(passages)[1][name] for name in gdn.write_factor_hook_names(LAYER)[:2]]
    return Factors(*(f[0, :, HEAD][:, None].detach() for f in factors))


def test_untrained_stand_ins_are_projections_of_the_native_write(gdn, passages, native):
    train = read_passages(gdn, 6, 40)[3:]
    made = untrained(gdn, gdn.cell(LAYER, HEAD), 50, train, seed=2)
    of_train = writes(gdn, train).flatten(0, 1)
    assert len(made.train.key) == len(of_train) == 120
    norms = made.train.norm().sort().values.double()
    torch.testing.assert_close(norms, of_train.flatten(1).norm(dim=-1).sort().values, rtol=1e-4, atol=1e-6)

    stand_ins = {name: swap.matrix().double() for name, swap in made.of(native).items()}
    matrices = native.matrix().double()
    sides = {"mean_key": made.train.key[:, 0], "mean_value": made.train.value[:, 0]}
    for name, side in sides.items():
        mean = sum(x / x.norm() for x in side.double()) / len(side)
        projector = torch.outer(mean, mean) / mean.dot(mean)
        expected = projector @ matrices if name == "mean_key" else matrices @ projector
        torch.testing.assert_close(stand_ins[name], expected, rtol=1e-4, atol=1e-6)
    atoms = made.lookup.W_dec.detach().double()
    for write, found in zip(matrices.flatten(1), stand_ins["lookup"].flatten(1), strict=True):
        along = atoms @ write
        expected = along.max() * atoms[along.argmax()]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_training_text_is_the_shipped_training_part_or_what_is_given(gdn):
    cell = gdn.cell(LAYER, HEAD)
    first, again, other = (untrained(gdn, cell, 8, seed=seed) for seed in (0, 0, 1))
    assert first.text == zoo.part_name("train")
    assert first.text_hash == again.text_hash != other.text_hash
    assert torch.equal(first.lookup.dec_key, again.lookup.dec_key)
    given = untrained(gdn, cell, 8, zoo.text("validation")[:5000])
    assert given.text == "text"
    with pytest.raises(WriteSAEError, match="too short"):
        untrained(gdn, cell, 8, "a few words")


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_contributions_sum_to_what_the_sae_decodes(gdn, passages, kind, options):
    """Of atoms all of them; of codes those of either side."""
    sae = sae_of(gdn, kind, options)
    site = gdn.site(sae.cfg.metadata.hook_name)
    active = activity(gdn, sae, site, passages[0])
    acts = encoded(gdn, sae, passages)[0].float()
    cell = gdn.cell(LAYER, HEAD)
    with torch.no_grad():
        expected = (sae.decode(acts) - sae.b_dec).view(-1, cell.d_k, cell.d_v)
    sides = [range(32)] if kind != "codes" else [range(16), range(16, 32)]
    for side in sides:
        parts = [contribution(sae, active, feature, cell).matrix() for feature in side]
        torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-5)
        for feature, part in zip(side, parts, strict=True):
            assert not part[acts[:, feature] == 0].any()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_firings_stand_in_is_its_dominant_atom_or_its_codes(gdn, passages, kind, options):
    sae = sae_of(gdn, kind, options)
    site = gdn.site(sae.cfg.metadata.hook_name)
    firings = find_firings(gdn, sae, site, passages[0])
    acts = encoded(gdn, sae, passages)[0, firings.position].float()
    found = stand_in(sae, firings, site.cell).matrix()
    if kind == "codes":
        with torch.no_grad():
            expected = sae.decode(acts).view_as(found)
        assert torch.equal(firings.key_code, acts[:, :16].argmax(-1))
        assert torch.equal(firings.atom, 16 + acts[:, 16:].argmax(-1))
    else:
        expected = (sae.W_dec[firings.atom] * firings.coefficient[:, None]).view_as(found).detach()
        assert torch.equal(firings.atom, acts.argmax(-1))
        assert (firings.key_code == -1).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = writes(gdn, passages[:1])[0, firings.position]
    torch.testing.assert_close(native_of(firings).matrix().double(), whole, rtol=1e-4, atol=1e-6)


def test_random_codes_are_others_of_the_same_side_at_the_same_coefficients(gdn, passages):
    sae = make_codes(gdn)
    site = gdn.site(sae.cfg.metadata.hook_name)
    firings = find_firings(gdn, sae, site, passages[0])
    kept = torch.arange(len(firings.position))[::2]
    drawn = swaps.random_like("atom", sae, firings, kept, site.cell, torch.Generator().manual_seed(0))
    acts = encoded(gdn, sae, passages)[0, firings.position[kept]].float()
    for row, found in zip(acts, drawn.matrix(), strict=True):
        moved = [
            (row[:16].roll(i) @ sae.dec_key)[:, None] * (row[16:].roll(j) @ sae.dec_value)[None]
            for i in range(1, 16)
            for j in range(1, 16)
        ]
        nearest = min(float((found - matrix).norm()) for matrix in moved)
        assert nearest < 1e-4 * float(found.norm())


def test_a_lookup_of_fewer_writes_than_features_says_so(gdn, passages):
    n, sae = passages.numel(), make_sae(gdn, d_sae=64)
    assert n < 64
    with pytest.warns(ResultWarning, match=f"only {n} training writes for 64 features"):
        result = replacement_test(gdn, sae, passages, train_tokens=passages, max_firings=4, verbose=False)
    assert result.summary["n_lookup"] == n
    assert result.summary["n_train_writes"] == n
    assert f"only {n} training writes" in result.summary["warnings"][-1]
    assert f"only {n} training writes" in result.headline


def test_baselines_are_made_from_the_text_that_the_sae_was_trained_on(gdn, passages, tmp_path):
    """Of a file or folder of this machine; else from the shipped text, with a warning that it is another."""
    own = tmp_path / "own.txt"
    own.write_text(zoo.text("validation")[:20_000])
    (tmp_path / "folder").mkdir()
    lines = [json.dumps({"text": part}) for part in (zoo.text("validation")[:20_000],)]
    (tmp_path / "folder" / "a.jsonl").write_text("\n".join(lines))
    options = {"max_firings": 4, "verbose": False}
    given = replacement_test(gdn, make_sae(gdn), passages, train_tokens=own.read_text(), **options)
    for path in (own, tmp_path / "folder"):
        sae = make_sae(gdn)
        sae.cfg.metadata.dataset_path = str(path)
        for result in (
            replacement_test(gdn, sae, passages, **options),
            compare(gdn, {"own": sae}, passages, **options),
        ):
            assert result.summary["train_text"] == path.name
            assert result.summary["train_text_hash"] == given.summary["train_text_hash"]
            assert not any("baselines" in warning for warning in result.summary["warnings"])
    sae.cfg.metadata.dataset_path = "somebody/stories"
    with pytest.warns(ResultWarning, match=r"not from somebody/stories: give train_tokens \(--train-text\)"):
        result = replacement_test(gdn, sae, passages, **options)
    assert result.summary["train_text"] == zoo.part_name("train")
    sae.cfg.metadata.dataset_path = zoo.TEXT_NAME
    result = replacement_test(gdn, sae, passages, **options)
    assert not any("baselines" in warning for warning in result.summary["warnings"])


def test_of_a_model_that_does_not_ship_the_shipped_text_may_be_foreign(gdn, passages, monkeypatch):
    monkeypatch.setattr(gdn.cfg, "model_name", "somebody/model")
    sae = make_sae(gdn)
    with pytest.warns(ResultWarning, match="may be another than the SAE's"):
        replacement_test(gdn, sae, passages, max_firings=4, verbose=False)
    replacement_test(gdn, sae, passages, train_tokens=passages, max_firings=4, verbose=False)
