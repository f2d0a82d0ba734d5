"""Later reads on their way from the model to a training step: through buffers, several hooks and caches."""

import json
import logging
from types import SimpleNamespace

import datasets
import pytest
import torch

from hooked_models.recordings import later_reads_of_head
from tests.writesae_lens.saelens.runs import (
    HOOK,
    cache_runner,
)
from tests.writesae_lens.saelens.test_store import CELLS, CONTEXT, PROMPTS, multi_store, store_of
from writesae_lens.saelens.store import keep_reads
from writesae_lens.saes.packed import PackedWrites

DISTANCES = (1, 3, 8)


@pytest.fixture(scope="module")
def short_rows(token_rows):
    return {name: rows.reshape(-1, CONTEXT)[:32] for name, rows in token_rows.items()}


@pytest.fixture(scope="module")
def rows(short_rows):
    return short_rows["tiny-gdn"]


def trained_on(*distances, weight=1.0):
    """What the store looks at in an SAE's config."""
    return SimpleNamespace(later_reads=distances, read_alignment_coefficient=weight)


def expected(model, tokens, cell, distances):
    """Own and later reads ``[row, 1 + distance, d_k]`` of all tokens."""
    return later_reads_of_head(model, tokens, cell.layer, cell.head, (0, *distances)).flatten(0, 1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("seqpos", [(None,), (2, -3)])
def test_writes_come_with_the_reads_that_were_asked_for(models, short_rows, name, seqpos):
    model, rows, cell = models[name], short_rows[name], models[name].cell(*CELLS[name])
    hook = model.write_hook_name(cell.layer, cell.head)
    store = store_of(model, rows, hook, cell.d_k * cell.d_v, seqpos_slice=seqpos)
    keep_reads(store, {hook: [trained_on(8, 1), trained_on(3), trained_on(5, weight=0.0)]})
    (write,) = store.get_activations(rows[:3]).blocks
    assert write.distances == DISTANCES
    all_reads = expected(model, rows[:3], cell, DISTANCES).unflatten(0, (3, CONTEXT))
    close(write.reads, all_reads[:, slice(*seqpos)])
    close(write.reads_at((8,)), all_reads[:, slice(*seqpos), [0, 3]])
    close(write.reads_at(()), all_reads[:, slice(*seqpos), :1])
    keep_reads(store, {hook: [trained_on()]})
    assert store.get_activations(rows[:1]).blocks[0].reads.shape[-2] == 1


def test_reads_stay_with_their_writes_through_buffer_shuffle_and_slices(model, rows):
    cell = model.cell(1, 2)
    store = store_of(model, rows)
    keep_reads(store, {HOOK: [trained_on(*DISTANCES)]})
    known = store_of(model, rows).get_activations(rows).reshape(-1, 32 * 48).blocks[0]
    reads = expected(model, rows, cell, DISTANCES)
    for _ in range(4):
        (write,) = next(store).blocks
        places = torch.cdist(write.key[:, 0], known.key[:, 0]).argmin(1)
        close(write.value, known.value[places])
        close(write.reads, reads[places])


def test_each_hook_has_the_reads_of_its_own_saes(model, rows):
    hooks = {model.write_hook_name(1, 0): (2, 4), HOOK: (), model.write_hook_name(0, 3): (1,)}
    store = multi_store(model, rows, dict.fromkeys(hooks, 32 * 48))
    keep_reads(store, {hook: [trained_on(*distances)] for hook, distances in hooks.items()})
    for hook, x in store.get_multi_hook_activations(rows[:2]).items():
        close(x.blocks[0].reads.flatten(0, 1), expected(model, rows[:2], model.site(hook).cell, hooks[hook]))
    for batch in [next(store.get_multi_hook_data_loader())]:
        assert [x.blocks[0].distances for x in batch.values()] == list(hooks.values())


def test_under_autocast_reads_are_float32(model, rows):
    store = store_of(model, rows, autocast_lm=True)
    keep_reads(store, {HOOK: [trained_on(*DISTANCES)]})
    (write,) = store.get_activations(rows[:2]).blocks
    wanted = expected(model, rows[:2], model.cell(1, 2), DISTANCES)
    assert write.reads.dtype == torch.float32
    assert (write.reads.flatten(0, 1) - wanted).norm() < 0.05 * wanted.norm()


# Caches on disk


def cache(folder, rows, distances, hook=HOOK):
    """A cache of 16 rows as the runner makes it when SAEs train on these distances."""
    runner = cache_runner(folder, rows, hook, 16 * CONTEXT, CONTEXT, PROMPTS)
    keep_reads(runner.activations_store, {hook: [trained_on(*distances)]})
    runner.run()
    return str(folder / "cache")


@pytest.fixture(scope="module")
def cached(rows, tmp_path_factory):
    return cache(tmp_path_factory.mktemp("cached"), rows, (1, 2, 8))


def reader(model, path, *distances, **options):
    store = store_of(model, None, cached_activations_path=path, **options)
    keep_reads(store, {HOOK: [trained_on(*distances)]})
    return store


def test_a_cache_holds_later_reads_and_gives_those_that_are_asked_for(cached, model, rows, caplog):
    held = datasets.load_from_disk(cached)
    assert held.features[HOOK].shape == (CONTEXT, 32 + 48 + 4 * 32)
    assert json.loads(held.info.description) == {"later_reads": [1, 2, 8]}
    wanted = expected(model, rows[:PROMPTS], model.cell(1, 2), (1, 2, 8))
    for distances, places in (((1, 2, 8), [0, 1, 2, 3]), ((8,), [0, 3]), ((), [0])):
        acts, _ = reader(model, cached, *distances).get_raw_llm_batch()
        assert acts.blocks[0].distances == distances
        close(acts.blocks[0].reads, wanted[:, places])
        assert acts.shape == (PROMPTS * CONTEXT, 32 * 48)
    assert not caplog.records


def test_reads_that_a_cache_does_not_hold_are_named_once(cached, model, rows, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store = reader(model, cached, 1, 4, 8)
        keep_reads(store, {HOOK: [trained_on(8, 4, 1)]})
        acts, _ = store.get_raw_llm_batch()
    (record,) = caplog.records
    assert "no reads of tokens at distance 4, " in record.getMessage()
    assert "on the own read and those at 1, 8;" in record.getMessage()
    close(acts.blocks[0].reads, expected(model, rows[:PROMPTS], model.cell(1, 2), (1, 8)))


def test_a_cache_of_an_earlier_version_trains_with_the_own_read(model, rows, tmp_path, caplog):
    """[key, value, own read], without a note."""
    path = cache(tmp_path, rows, ())
    held = datasets.load_from_disk(path)
    held.info.description = ""
    held.save_to_disk(str(tmp_path / "old"))
    with caplog.at_level(logging.WARNING):
        acts, _ = reader(model, str(tmp_path / "old"), 1, 2).get_raw_llm_batch()
    assert isinstance(acts, PackedWrites)
    close(acts.blocks[0].reads, expected(model, rows[:PROMPTS], model.cell(1, 2), ()))
    (record,) = caplog.records
    assert "at distance 1, 2, " in record.getMessage()
    assert "on the own read only;" in record.getMessage()
