"""No figure from NaN, and none where nothing moves: every experiment of the catalogue, every architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.contract import Subject, strict_json
from tests.writesae_lens.experiments.truth import HEAD, LAYER, make_sae, read_passages
from writesae_lens import WriteSAEError, measures, statistics
from writesae_lens.experiments import EXPERIMENTS, replacement_test, sign_test, splice_test, swaps

pytestmark = pytest.mark.usefixtures("without_type_checks", "few_resamples")


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def shipped(request: pytest.FixtureRequest) -> Any:
    """Each shipped model in float32."""
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@contextlib.contextmanager
def changed(weight: Tensor, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """While open, a weight of a shared model is another one."""
    before = weight.detach().clone()
    change(weight.data)
    try:
        yield
    finally:
        weight.data.copy_(before)


def last_layer(model: Any) -> Tensor:
    return next(iter(list(model.mixers.values())[-1].parameters()))


def unembedding_row(model: Any) -> Tensor:
    return model.original_model.get_output_embeddings().weight[5]


def last_norm(model: Any) -> Tensor:
    return model.ln_final.original_component.weight


def output_projection(model: Any) -> Tensor:
    mixer = model.mixers[LAYER]
    return getattr(mixer.wrapped, mixer.attribute_names.output_projection).weight


BROKEN = [
    (last_layer, "nan"),
    (unembedding_row, "nan"),
    (unembedding_row, "inf"),
    (last_norm, "inf"),
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_model_or_an_sae_with_nan_is_refused_in_a_line(name, gdn, passages, tmp_path):
    subject = Subject(EXPERIMENTS[name], gdn, passages, tmp_path)
    for weight, value in BROKEN:
        with changed(weight(gdn), lambda x, v=value: x.view(-1)[:1].fill_(float(v))):
            with pytest.raises(WriteSAEError, match="not finite") as caught:
                subject.run()
            assert str(caught.value).isprintable()
    sae = make_sae(gdn)
    with torch.no_grad():
        sae.dec_key[0] = float("nan")
    with pytest.raises(WriteSAEError, match="NaN"):
        subject.run(sae)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nan_at_a_single_position_is_refused(name, gdn, passages, tmp_path):
    def poke(block: Any, given: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        if x.shape[1] > 5:
            x[:, 5] = float("nan")
        return out

    handle = gdn.blocks[-1].register_forward_hook(poke)
    try:
        with pytest.raises(WriteSAEError, match="not finite"):
            Subject(EXPERIMENTS[name], gdn, passages, tmp_path).run()
    finally:
        handle.remove()


def numbers(value: Any) -> Iterator[float]:
    """Every number in a summary."""
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (int, float)):
        yield value


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_where_nothing_moves_a_result_has_no_rates_and_is_saved_and_drawn(name, gdn, passages, tmp_path):
    subject = Subject(EXPERIMENTS[name], gdn, passages, tmp_path)
    with changed(last_norm(gdn), lambda x: x.fill_(-1.0)):  # 1 + weight is the scale: all logits are 0
        if name == "population":  # has no atom to make a row of
            with pytest.raises(WriteSAEError, match="40 more are at the floor"):
                subject.run()
            return
        result = subject.run()
        strict_json(result.save(tmp_path / "nothing"))
    summary = result.summary
    assert all(np.isfinite(x) and abs(x) < 1e15 for x in numbers(summary))
    rates = ("win_rate", "strict_chain_rate", "recovered", "agreement", "median_r2", "own_overlap_atom")
    rates += ("share_of_falls_firing", "median_recovered", "selectivity_atom", "share_of_falls_random")
    assert all(summary[rate] is None for rate in rates if rate in summary)
    assert "100" not in result.headline


def test_a_cell_that_reaches_no_logit_is_at_the_floor_everywhere(shipped):
    sae, passages = make_sae(shipped), read_passages(shipped)
    with changed(output_projection(shipped), lambda x: x.zero_()):
        result = replacement_test(shipped, sae, passages, verbose=False)
        signs = sign_test(shipped, (LAYER, HEAD), passages, n_trials=12, verbose=False)
        spliced = splice_test(shipped, sae, passages, verbose=False)
    summary = result.summary
    assert summary["n_at_floor"] == summary["n_firings"] == len(result.records)
    assert summary["win_rate"] is summary["strict_chain_rate"] is summary["win_rate_ci"] is None
    assert summary["recovered"] is summary["median_recovered"] is None
    assert "win rate none" in result.headline
    assert f"{len(result.records)} at the floor" in result.headline
    assert (signs.summary["agreement"], signs.summary["n_still"]) == (None, 12)
    assert spliced.summary["recovered"] is None


def test_floors_are_of_the_size_of_the_same_sums_in_another_order(shipped):
    """The native write as its own stand-in: the KL is rounding and nothing else."""
    cell, passage = shipped.cell(LAYER, HEAD), read_passages(shipped)[0]
    at = torch.arange(20)
    firings = replacement_test(shipped, make_sae(shipped), passage[None], verbose=False).records
    assert not (firings.kl_delete <= firings.kl_floor).any()
    keys, values = _native(shipped, cell, passage)
    native = swaps.Factors(keys[:, None], values[:, None])
    (kl,), floor = swaps.divergences(shipped, cell, passage, at, [native])
    assert bool((kl <= floor).all())
    assert float((kl / floor).median()) > 0.001
    assert float(floor.max()) < 1e-10


def _native(model: Any, cell: Any, passage: Tensor) -> tuple[Tensor, Tensor]:
    names = model.write_factor_hook_names(cell.layer)[:2]
    with torch.no_grad():
        cache = model.run_with_cache(passage[None], names_filter=list(names))[1]
    key, value = (cache[name][0, :, cell.head] for name in names)
    return key, value


def test_firings_at_the_floor_are_left_out_of_every_rate_and_counted():
    atom, delete = [1.0, 3.0, 9.0, 0.5], [2.0, 2.0, 1e-9, 1.0]
    records = pd.DataFrame({"kl_atom": atom, "kl_delete": delete, "kl_random": [3.0] * 4, "kl_floor": 1e-8})
    records = records.assign(atom=[0, 0, 1, 1], passage=[0, 0, 1, 1], cosine=0.5, write_norm=1.0)
    summary = measures.summarize(records, 0)
    assert (summary["n_at_floor"], summary["n_firings"]) == (1, 4)
    assert summary["win_rate"] == pytest.approx(2 / 3)
    assert summary["win_rate_with_floor"] == pytest.approx(2 / 4)
    assert summary["strict_chain_rate"] == pytest.approx(2 / 3)
    assert summary["recovered"] == pytest.approx(1 - 4.5 / 5)
    assert summary["median_recovered"] == pytest.approx(np.median([0.5, -0.5, 0.5]))
    assert list(swaps.above_floor(records.drop(columns="kl_floor"))) == [True] * 4  # of an earlier version


def test_statistics_of_nothing_are_none():
    assert statistics.rate([]) is statistics.wilson_interval([]) is statistics.cliffs_delta([], []) is None
    assert (
        statistics.paired_wilcoxon([], []) is statistics.ratio(1.0, 0.0) is statistics.ratio(None, 1) is None
    )
    assert statistics.median_and_error([]) == statistics.recovered([1.0], [0.0]) == (None, None)
    assert statistics.cluster_bootstrap([], []) is statistics.median_interval([], []) is None
    assert statistics.share(None) == "none"


@pytest.mark.filterwarnings("ignore::writesae_lens.experiments.origin.ResultWarning")
@pytest.mark.parametrize(("dtype", "of_sae"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_model_and_an_sae_of_different_dtypes_run(dtype, of_sae, tmp_path):
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=dtype)
    for name in ("replace", "selectivity", "splice", "formula"):
        sae = make_sae(model).to(getattr(torch, of_sae))
        result = Subject(EXPERIMENTS[name], model, read_passages(model), tmp_path).run(sae)
        assert len(result.records)
        if name == "replace":
            assert ((result.records.kl_floor > 1e-8) == (dtype == "bfloat16")).all()
