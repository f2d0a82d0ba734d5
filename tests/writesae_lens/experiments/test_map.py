"""The memory map against full hooked passes and plain float64 loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.edited_runs import residual_with_added_writes
from hooked_models.recordings import record_recurrences
from tests.hooked_models.model_classes.case import build
from tests.hooked_models.model_classes.table import MODEL_CLASSES
from tests.hooked_models.oracles import loop
from tests.writesae_lens.experiments.truth import make_sae
from writesae_lens import WriteSAEError
from writesae_lens.experiments import EXPERIMENTS, OF_MODELS, ExperimentResult, memory_map
from writesae_lens.experiments.catalogue import find_experiment
from writesae_lens.experiments.map import PANELS, _lives, _means
from writesae_lens.experiments.result import Progress
from writesae_lens.figures import as_png
from writesae_lens.report import make_report

HORIZON, LENGTH = 4, 12
ALL = 2 * (LENGTH - HORIZON)  # every position of two passages that has a horizon after it
QUICK: dict[str, Any] = {"horizon": HORIZON, "verbose": False}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> HookedRecurrent:
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def passages(model: HookedRecurrent) -> Tensor:
    ids = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)
    return ids[0, : 2 * LENGTH].view(2, LENGTH)


@torch.no_grad()
def full_passes(model: Any, passages: Tensor, layer: int, head: int) -> tuple[float, float]:
    """Mean KL of deleting the write at each position: at the own token, and summed over the horizon."""
    own, later, name = [], [], model.write_hook_name(layer, head)
    for passage in passages:
        native = model(passage[None], use_cache=False)[0].double().log_softmax(-1)
        for t in range(passages.shape[1] - HORIZON):

            def delete(write: Tensor, hook: Any, t: int = t) -> Tensor:
                return torch.where((torch.arange(write.shape[1]) == t)[:, None], 0, write)

            deleted = model.run_with_hooks(passage[None], fwd_hooks=[(name, delete)], use_cache=False)[0]
            deleted = deleted.double().log_softmax(-1)
            kl = (deleted.exp() * (deleted - native)).sum(-1)
            own.append(float(kl[t]))
            later.append(float(kl[t + 1 : t + 1 + HORIZON].sum()))
    return float(np.mean(own)), float(np.mean(later))


def check_effects(model: Any, passages: Tensor, noise: float) -> pd.DataFrame:
    """Effects of the first, a middle and the last cell are those of full passes."""
    result = memory_map(model, passages, max_firings=ALL, **QUICK)
    for cell in (model.cells[0], model.cells[len(model.cells) // 2], model.cells[-1]):
        own, later = full_passes(model, passages, cell.layer, cell.head)
        row = result.records.query(f"layer == {cell.layer} and head == {cell.head}").iloc[0]
        assert row.n_writes == ALL
        assert row.kl_own == pytest.approx(own, rel=1e-3, abs=noise)
        assert row.kl_later == pytest.approx(later, rel=1e-3, abs=noise)
        if not pd.isna(row.own_share):
            assert row.own_share == pytest.approx(row.kl_own / row.kl_both, abs=1e-6)
            assert row.own_share_low <= row.own_share <= row.own_share_high
        assert row.kl_both_low <= row.kl_both <= row.kl_both_high
        assert row.write_norm_low <= row.write_norm <= row.write_norm_high
    assert len(result.records) == len(model.cells) == result.summary["n_cells"]
    assert result.records.share.sum() == pytest.approx(1)
    return result.records


def test_effects_are_those_of_full_passes(model: Any, passages: Tensor) -> None:
    records = check_effects(model, passages, 1e-9)
    free = records[records.note == ""]
    assert records.note[: len(free)].eq("").all()
    assert free.kl_both_low.is_monotonic_decreasing
    assert len(free)
    assert 0 not in set(free.layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["NemotronHForCausalLM", "KimiLinearForCausalLM", "MiniMaxForCausalLM", "GLAForCausalLM"],
)
def test_effects_on_hybrids_and_other_recurrences(name: str, tmp_path: Path) -> None:
    case = build(MODEL_CLASSES[name], tmp_path / "model")
    records = check_effects(case.model, case.tokens(2, LENGTH, seed=5), 1e-7)
    assert records[["kl_both", "write_norm", "reach", "one_key", "one_value"]].notna().all().all()


@torch.no_grad()
def test_lives_of_writes_are_those_of_a_plain_loop(model: HookedRecurrent) -> None:
    tokens = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)[:, :60]
    layer = model.cells[-1].layer
    with record_recurrences([model.mixers[layer]]) as recorded:
        model(tokens, use_cache=False)
    recurrence = recorded[model.mixers[layer]].map(Tensor.double)
    means, norms = _means(model, layer, tokens)
    torch.testing.assert_close(
        means.key.double(), normalize(normalize(recurrence.k[0], dim=-1).mean(0), dim=-1), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        norms[0].double(), recurrence.k[0].norm(dim=-1) * recurrence.v[0].norm(dim=-1), rtol=1e-5, atol=0
    )
    positions, heads = torch.tensor([0, 3, 17, 17, 58]), torch.tensor([0, 1, 2, 0, 3])
    found = _lives(recurrence, positions, heads, means.key, HORIZON)
    vectors = recurrence.with_erase_vector()
    for n, (t, head) in enumerate(zip(positions.tolist(), heads.tolist(), strict=True)):
        q, g, k, v, a, b = (
            None if x is None else x[:, t:, [head]]
            for x in (vectors.q, vectors.g, vectors.k, vectors.v, vectors.a, vectors.b)
        )
        k = torch.cat([k[:, :1], torch.zeros_like(k[:, 1:])], 1)
        alone = loop(q, g, k, v, a, b)
        norms_after = alone.states[0, :, 0].flatten(1).norm(dim=-1)
        below = (norms_after <= norms_after[0] / 2).nonzero()
        assert bool(found["is_halved"][n]) == bool(len(below))
        assert int(found["half_life"][n]) == (int(below[0]) if len(below) else 60 - 1 - t)
        later = alone.outputs[0, 1:, 0].norm(dim=-1).cumsum(0)
        assert int(found["reach"][n]) == int((later < later[-1] / 2).sum()) + 1
        mean = means.key[head].double()
        other = loop(q, g, (k @ mean)[..., None] * mean, v, a, b).outputs[0, : HORIZON + 1, 0]
        native = alone.outputs[0, : HORIZON + 1, 0]
        one_key = 1 - (native - other).square().sum() / native.square().sum()
        assert float(found["one_key"][n]) == pytest.approx(float(one_key), abs=1e-4)


@torch.no_grad()
def test_a_constant_key_and_value_are_noted(model: Any, passages: Tensor) -> None:
    """Hooks put multiples of one key, or of one value, in the place of a head's own."""
    layer, head = model.cells[-1].layer, 2
    rng = torch.Generator().manual_seed(0)

    def constant(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, head] = one * torch.linspace(1, 2, x.shape[1])[:, None]
        return x

    names = model.write_factor_hook_names(layer)
    for name, side in zip(names, ("key", "value"), strict=False):
        one = torch.randn(getattr(model.cells[-1], f"d_{side[0]}"), generator=rng)
        with model.hooks(fwd_hooks=[(name, constant)]):
            records = memory_map(model, passages, max_firings=4, **QUICK).records
        row = records.query(f"layer == {layer} and head == {head}").iloc[0]
        assert row[f"one_{side}"] == pytest.approx(1, abs=1e-4)
        assert f"one {side}" in row.note


def test_it_resumes_and_has_one_result_a_seed(gdn: Any, tmp_path: Path) -> None:
    model, passages = gdn, torch.arange(100, 100 + 2 * LENGTH).view(2, LENGTH)
    folder, part, computed = str(tmp_path / "progress"), Progress.part, []
    options = QUICK | {"max_firings": 3}

    def interrupted(self: Progress, number: int, compute: Any) -> pd.DataFrame:
        computed.append(number)
        if computed.count(1) == 1 and number == 1:
            raise KeyboardInterrupt
        return part(self, number, compute)

    whole = memory_map(model, passages, **options)
    with mock.patch.object(Progress, "part", interrupted):
        with pytest.raises(KeyboardInterrupt):
            memory_map(model, passages, progress_folder=folder, **options)
        resumed = memory_map(model, passages, progress_folder=folder, **options)
    pd.testing.assert_frame_equal(resumed.records, whole.records, rtol=1e-12)
    assert set(whole.records.n_writes) == {3}
    back = ExperimentResult.load(whole.save(tmp_path / "saved"))
    assert back.headline == whole.headline
    assert as_png(back.plot()) == as_png(whole.plot())
    assert (tmp_path / "saved" / "map.png").stat().st_size > 10_000
    json.loads((tmp_path / "saved" / "summary.json").read_text(), parse_constant=pytest.fail)
    call = whole.summary["call"]
    assert call.startswith(f"memory_map(model='{model.cfg.model_name}', tokens='tokens', max_firings=3")
    with pytest.raises(WriteSAEError, match="progress"):
        memory_map(model, passages, progress_folder=folder, **options | {"max_firings": 2})
    other = memory_map(model, passages, seed=1, **options)
    assert not other.records.equals(whole.records)


@pytest.mark.parametrize("max_firings", [1, 5])
def test_a_single_passage_has_no_intervals(gdn: Any, max_firings: int, tmp_path: Path) -> None:
    tokens = gdn.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)[:, :LENGTH]
    result = memory_map(gdn, tokens, max_firings=max_firings, **QUICK)
    bounds = [name for name in result.records if name.endswith(("_low", "_high"))]
    assert len(bounds) == 2 * 9
    assert result.records[bounds].isna().all().all()
    assert set(result.records.n_writes) == {max_firings}
    assert result.records.kl_both[result.records.note == ""].is_monotonic_decreasing
    assert "nats a write over 5 tokens" in result.headline
    result.save(tmp_path)


def test_a_cell_that_reaches_no_logit_is_at_the_floor(tmp_path: Path) -> None:
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    tokens = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)[:, :24].view(2, 12)
    mixer, d_v = model.mixers[3], model.cells[0].d_v
    with torch.no_grad():
        mixer.output_projection.weight[:, 2 * d_v : 3 * d_v] = 0
    result = memory_map(model, tokens, max_firings=4, **QUICK)
    row = result.records.query("layer == 3 and head == 2").iloc[0]
    assert row.n_at_floor == 4
    assert row.kl_both <= row.kl_floor
    assert pd.isna(row.own_share)
    assert "at the floor" in row.note
    assert result.summary["n_at_floor"] == 1
    assert "3:2" not in result.summary["worth_first"]
    with torch.no_grad():
        for mixer in model.mixers.values():
            mixer.output_projection.weight.zero_()
    nothing = memory_map(model, tokens, max_firings=4, **QUICK)
    assert nothing.summary["worth_first"] == []
    assert "a note speaks against a dictionary in each" in nothing.headline
    nothing.save(tmp_path)


def test_panels_are_drawn_without_numbers_and_for_one_cell(gdn: Any) -> None:
    for values in (np.nan, 0.0, 3.0):
        records = pd.DataFrame({"layer": [0], "head": [0], **{name: [values] for name in PANELS}})
        assert as_png(ExperimentResult("map", records, {"worth_first": ["0:0"]}).plot())


@pytest.mark.usefixtures("without_type_checks")
def test_wrong_input_is_refused(gdn: Any, tmp_path: Path) -> None:
    tokens = torch.arange(24).view(2, 12)
    for arguments, options, message in (
        ((gdn, tokens), {"horizon": 12}, "have no room for a horizon of 12"),
        ((gdn, tokens), {"horizon": 0}, "horizon=0 makes no sense"),
        ((gdn, tokens), {"max_firings": 0}, "max_firings=0 makes no sense"),
        ((gdn, tokens), {"context_size": 8}, "cut into passages already"),
        ((gdn, tokens.float()), {}, "must be a LongTensor"),
        ((gdn, tokens + 3000), {}, "2048 tokens"),
        ((gdn, "too short"), {}, "too short"),
        ((make_sae(gdn), tokens), {}, "must be a HookedRecurrent"),
    ):
        with pytest.raises(WriteSAEError, match=message) as error:
            memory_map(*arguments, verbose=False, **options)
        assert len(str(error.value)) < 300


def test_it_is_no_part_of_an_saes_report(gdn: Any, tmp_path: Path) -> None:
    assert list(OF_MODELS) == ["map"]
    assert "map" not in EXPERIMENTS
    with pytest.raises(WriteSAEError, match="map is about a whole model: there are replace"):
        find_experiment("map")
    tokens = torch.arange(24).view(2, 12)
    result = memory_map(gdn, tokens, max_firings=2, **QUICK)
    with pytest.raises(WriteSAEError, match="map is about a whole model"):
        make_report(tmp_path, gdn, make_sae(gdn), tokens, [result], verbose=False)


@pytest.mark.usefixtures("without_type_checks")
def test_heads_of_added_writes_are_checked(gdn: Any) -> None:
    """Each row writes at its own head; a head that there is not, or one too few, is refused."""
    tokens, cell = torch.arange(10), gdn.cell(1, 0)
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, d, generator=rng) for d in (cell.d_k, cell.d_v))
    positions = torch.tensor([2, 2, 5])
    at = (positions, keys, values)
    together = residual_with_added_writes(gdn, tokens, cell, *at, heads=torch.tensor([3, 0, 1]))
    for row, head in enumerate((3, 0, 1)):
        alone = residual_with_added_writes(gdn, tokens, gdn.cell(1, head), *(x[[row]] for x in at))
        torch.testing.assert_close(together[[row]], alone)
    for heads in (torch.tensor([0, 4, 0]), torch.tensor([-1, 0, 0]), torch.tensor([0]), torch.zeros(3)):
        with pytest.raises(HookedModelError, match=r"heads must be whole numbers in 0 \.\. 3"):
            residual_with_added_writes(gdn, tokens, cell, *at, heads=heads)
