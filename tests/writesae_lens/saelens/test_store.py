"""SAELens's store on writes: factors that stand for exactly the rows that the stock methods give."""

import itertools

import datasets
import pytest
import torch
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training import mixing_buffer

from hooked_models import HookedModelError, HookedRecurrent
from hooked_models.recordings import later_reads_of_head
from tests.writesae_lens.saelens.runs import HOOK, cache_runner, dataset, sae_config
from tests.writesae_lens.saelens.runs import writes as live
from writesae_lens import WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saes.packed import PackedWrites

CONTEXT = 16
PROMPTS = 4
CELLS = {"tiny-gdn": (1, 2), "tiny-mamba2": (4, 4)}


@pytest.fixture(scope="module")
def short_rows(token_rows):
    """Rows [32, CONTEXT] for each model."""
    return {name: rows.reshape(-1, CONTEXT)[:32] for name, rows in token_rows.items()}


@pytest.fixture(scope="module")
def rows(short_rows):
    return short_rows["tiny-gdn"]


STORE = {
    "streaming": False,
    "context_size": CONTEXT,
    "n_batches_in_buffer": 8,
    "total_training_tokens": 1024,
    "store_batch_size_prompts": PROMPTS,
    "train_batch_size_tokens": 32,
    "prepend_bos": False,
    "normalize_activations": "none",
}


def store_of(model, rows, hook=HOOK, d_in=32 * 48, **options):
    own = {"model": model, "dataset": dataset(rows), "hook_name": hook, "d_in": d_in}
    own |= {"hook_head_index": None, "device": torch.device("cpu"), "dtype": "float32"}
    return ActivationsStore(**(own | STORE | options))


def multi_store(model, rows, widths, **options):
    """A store of several hooks, in the order of ``widths``."""
    own = {"model": model, "dataset": dataset(rows), "hook_names": list(widths), "hook_d_ins": widths}
    return ActivationsStore.from_config_multi_hook(**(own | STORE | options))


def stock(method, *args):
    """What SAELens's own method gives."""
    return getattr(ActivationsStore, method).__wrapped__(*args)


def check_rows(ours, theirs, packed=True):
    assert isinstance(ours, PackedWrites) == packed
    assert not isinstance(theirs, PackedWrites)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(ours.dense() if packed else ours, theirs, rtol=1e-6, atol=1e-9)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("seqpos", [(None,), (2, -3), (1, None, 4)])
def test_rows_of_one_hook_are_those_of_the_stock_store(models, short_rows, name, seqpos):
    model, rows, here = models[name], short_rows[name], slice(*seqpos)
    cell = model.cell(*CELLS[name])
    hook = model.write_hook_name(cell.layer, cell.head)
    store = store_of(model, rows, hook, cell.d_k * cell.d_v, seqpos_slice=seqpos)
    ours = store.get_activations(rows[:3])
    check_rows(ours, stock("get_activations", store, rows[:3]))
    check_rows(ours, live(model, hook, rows[:3])[:, here].float())
    acts, ids = store.get_raw_llm_batch()
    check_rows(acts, live(model, hook, rows[:PROMPTS])[:, here].flatten(0, 1))
    assert torch.equal(ids, rows[:PROMPTS][:, here].flatten())


@pytest.mark.parametrize("name", CELLS)
def test_rows_of_four_heads_are_those_of_the_stock_store(models, short_rows, name):
    model, rows = models[name], short_rows[name]
    cells = [model.cell(CELLS[name][0], head) for head in range(4)]
    widths = {model.write_hook_name(c.layer, c.head): c.d_k * c.d_v for c in cells}
    store = multi_store(model, rows, widths, seqpos_slice=(1, -1))
    ours = store.get_multi_hook_activations(rows[:3])
    theirs = stock("get_multi_hook_activations", store, rows[:3])
    assert list(ours) == list(theirs) == list(widths)
    for hook in widths:
        check_rows(ours[hook], theirs[hook])


def test_rows_of_heads_of_two_layers_come_from_one_pass(model, rows, monkeypatch):
    layers = sorted(model.mixers)[:2]
    hooks = [model.write_hook_name(layer, h) for layer in reversed(layers) for h in (3, 1)]
    store = multi_store(model, rows, dict.fromkeys(hooks, 32 * 48))
    expected = {hook: live(model, hook, rows[:2]) for hook in hooks}
    passes, original = [], HookedRecurrent.run_with_cache
    monkeypatch.setattr(
        HookedRecurrent, "run_with_cache", lambda *a, **k: (passes.append(1), original(*a, **k))[1]
    )
    for hook, x in store.get_multi_hook_activations(rows[:2]).items():
        check_rows(x, expected[hook])
    assert len(passes) == 1


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_batches_for_training_are_rows_of_the_model(model, rows, mix):
    """After buffer, shuffle and slices, with the heads still aligned token for token."""
    widths = {model.write_hook_name(1, h): 32 * 48 for h in range(4)}
    known = [live(model, hook, rows).flatten(0, 1) for hook in widths]
    store = multi_store(model, rows, widths, activations_mixing_fraction=mix)
    seen = []
    for batch in itertools.islice(store.get_multi_hook_data_loader(), 6):
        places = []
        for (hook, x), truth in zip(batch.items(), known):
            assert isinstance(x, PackedWrites), hook
            away = torch.cdist(x.dense(), truth, compute_mode="donot_use_mm_for_euclid_dist")
            assert away.amin(1).max() < 1e-5 * truth.norm(dim=1).max()
            places.append(away.argmin(1))
        for other in places[1:]:
            torch.testing.assert_close(known[0][places[0]], known[0][other], rtol=1e-4, atol=1e-5)
        seen.append(places[0])
    if mix == 0:
        assert torch.equal(torch.cat(seen), torch.arange(6 * 32))


def test_a_buffer_of_exactly_one_batch_stays_in_factors(model, rows):
    sizes = {"n_batches_in_buffer": PROMPTS, "train_batch_size_tokens": PROMPTS * CONTEXT}
    store = store_of(model, rows, activations_mixing_fraction=0.0, **sizes)
    check_rows(next(store), live(model, HOOK, rows[:PROMPTS]).flatten(0, 1))


def test_excluded_tokens_are_left_out(model, rows):
    special = rows[:PROMPTS].flatten().bincount().topk(2).indices
    kept = ~torch.isin(rows[:PROMPTS].flatten(), special)
    assert 0 < kept.sum() < kept.numel()
    store = store_of(model, rows, exclude_special_tokens=special)
    check_rows(store.get_filtered_llm_batch(), live(model, HOOK, rows[:PROMPTS]).flatten(0, 1)[kept])
    widths = dict.fromkeys([HOOK, model.write_hook_name(1, 0)], 32 * 48)
    several = multi_store(model, rows, widths, exclude_special_tokens=special)
    for name, x in several._get_filtered_multi_hook_llm_batch().items():
        check_rows(x, live(model, name, rows[:PROMPTS]).flatten(0, 1)[kept])


def test_states_are_left_to_saelens(model, rows):
    hook = model.state_hook_name(1, 2)
    store = store_of(model, rows, hook)
    check_rows(store.get_activations(rows[:2]), live(model, hook, rows[:2]), packed=False)
    several = multi_store(model, rows, dict.fromkeys([hook, HOOK], 32 * 48))
    for name, x in several.get_multi_hook_activations(rows[:2]).items():
        check_rows(x, live(model, name, rows[:2]), packed=False)


def test_a_head_index_is_left_to_saelens(model, rows):
    """The factors of all heads have a head axis, of which SAELens takes one."""
    hook = "blocks.1.linear_attn.hook_write_key"
    store = store_of(model, rows, hook, 32, hook_head_index=2)
    check_rows(store.get_activations(rows[:2]), live(model, hook, rows[:2])[:, :, 2], packed=False)


def test_listening_to_a_write_gives_what_the_listener_returns(model, rows):
    store = store_of(model, rows)
    both = multi_store(model, rows, dict.fromkeys([model.write_hook_name(1, 0), HOOK], 32 * 48))
    native = live(model, HOOK, rows[:2])
    with model.hooks(fwd_hooks=[(HOOK, lambda x, hook: x + 1)]):
        edited = store.get_activations(rows[:2]), both.get_multi_hook_activations(rows[:2])[HOOK]
    for x in edited:
        check_rows(x, native + 1, packed=False)
    check_rows(store.get_activations(rows[:2]), native)  # and packed again afterwards


def test_an_edit_elsewhere_reaches_the_packed_writes(model, rows):
    """A hook on an earlier layer, or on the factors, changes the writes that the store packs."""
    store = store_of(model, rows)
    for where in ("blocks.0.hook_resid_post", "blocks.1.linear_attn.hook_write_key"):
        with model.hooks(fwd_hooks=[(where, lambda x, hook: x * 1.5 + 0.1)]):
            expected = stock("get_activations", store, rows[:2])
            check_rows(store.get_activations(rows[:2]), expected)
        assert (expected - live(model, HOOK, rows[:2])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("hook", "d_in", "error", "message"),
    [
        (HOOK, 1000, WriteSAEError, r"the SAE takes 1000 numbers, but .*hook_write\.2 gives 32 x 48 = 1536"),
        ("blocks.1.linear_attn.hook_write.99", 1536, HookedModelError, r"hook_write\.99"),
    ],
    ids=["another width", "no such cell"],
)
def test_what_does_not_fit_the_model_is_named(model, rows, hook, d_in, error, message):
    with pytest.raises(error, match=message):
        store_of(model, rows, hook, d_in).get_activations(rows[:2])
    with pytest.raises(error, match=message):
        multi_store(model, rows, {hook: d_in}).get_multi_hook_activations(rows[:2])


def test_packed_and_flat_batches_train_the_same(model, rows):
    """One optimiser step from the store's packed batch and from the numbers that it stands for."""
    batch = next(store_of(model, rows))
    outcomes = []
    for x in (batch, batch.dense()):
        torch.manual_seed(0)
        sae = WriteTrainingSAE(sae_config(read_alignment_coefficient=0.0))  # only packed writes have reads
        step = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=True
        )
        output = sae.training_forward_pass(step)
        output.loss.backward()
        # The signs of an atom's two factors are free; those of the atom itself are not.
        outcomes.append((output.loss.detach(), sae.W_dec.detach(), output.sae_out))
    for packed, flat in zip(*outcomes):
        torch.testing.assert_close(packed, flat, rtol=1e-4, atol=1e-5)


def cache(folder, rows, hook=HOOK, n_tokens=16 * CONTEXT, **options):
    """A runner that caches in two shards of two model batches, 6,144 bytes a token."""
    options = {"buffer_size_gb": n_tokens / 2 * 6144 / 1e9} | options
    return cache_runner(folder, rows, hook, n_tokens, CONTEXT, PROMPTS, **options)


def reader(model, folder, hook=HOOK, **options):
    return store_of(model, None, hook, cached_activations_path=str(folder / "cache"), **options)


def first_rows(model, rows, hook=HOOK):
    return live(model, hook, rows[:PROMPTS]).flatten(0, 1)


@pytest.fixture(scope="module")
def cached(rows, tmp_path_factory):
    """A folder with 16 rows of cached writes."""
    folder = tmp_path_factory.mktemp("cached")
    cache(folder, rows).run()
    return folder


def test_cached_writes_lie_on_disk_as_their_parts(cached, model, rows):
    held = datasets.load_from_disk(str(cached / "cache")).with_format("torch")
    later = WriteSAETrainingConfig.later_reads  # those on which SAEs train unless told otherwise
    width = 32 + 48 + (1 + len(later)) * 32
    assert len(held) == 16
    assert held.features[HOOK].shape == (CONTEXT, width)
    names = list(model.write_factor_hook_names(1))
    assert [name.rsplit("_", 1)[1] for name in names[:2]] == ["key", "value"]
    parts = torch.cat([live(model, name, rows[:16])[:, :, 2] for name in names], dim=-1)  # key, value, read
    torch.testing.assert_close(held[:][HOOK][..., : 32 + 48 + 32], parts, rtol=1e-5, atol=1e-7)
    reads = later_reads_of_head(model, rows[:16], 1, 2, later).flatten(-2)
    torch.testing.assert_close(held[:][HOOK][..., 32 + 48 + 32 :], reads, rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.as_tensor(held[:]["token_ids"]).long(), rows[:16].cpu())
    size = sum(f.stat().st_size for f in (cached / "cache").rglob("*.arrow"))
    assert size < 2 * 16 * CONTEXT * width * 4


def test_cached_writes_are_read_as_the_live_ones(cached, model, rows):
    store = reader(model, cached)
    for tokens in rows[:16].split(PROMPTS):
        acts, ids = store.get_raw_llm_batch()
        check_rows(acts, first_rows(model, tokens))
        assert torch.equal(ids.long().cpu(), tokens.flatten().cpu())
    with pytest.raises(StopIteration):
        store.get_raw_llm_batch(raise_on_epoch_end=True)
    check_rows(store.get_raw_llm_batch()[0], first_rows(model, rows))
    check_rows(next(reader(model, cached, activations_mixing_fraction=0.0)), first_rows(model, rows)[:32])


def test_a_cache_is_read_while_somebody_listens_to_the_live_hook(cached, model, rows):
    """What lies on disk does not depend on who listens to the model."""
    expected, before = first_rows(model, rows), reader(model, cached)
    with model.hooks(fwd_hooks=[(HOOK, lambda x, hook: x + 1)]):
        check_rows(before.get_raw_llm_batch()[0], expected)
        check_rows(reader(model, cached).get_raw_llm_batch()[0], expected)


def test_the_stock_runner_config_reads_packed_writes(cached, model, rows):
    config = LanguageModelSAERunnerConfig(
        sae=sae_config(),
        model_class_name="HookedRecurrent",
        model_name="tiny-gdn",
        hook_name=HOOK,
        dataset_path="held-out text",
        use_cached_activations=True,
        cached_activations_path=str(cached / "cache"),
        context_size=CONTEXT,
        prepend_bos=False,
        training_tokens=256,
        train_batch_size_tokens=32,
        store_batch_size_prompts=PROMPTS,
        n_batches_in_buffer=8,
        activations_mixing_fraction=0.0,
        device="cpu",
    )
    store = ActivationsStore.from_config(model, config, override_dataset=dataset(rows))
    check_rows(next(store), first_rows(model, rows)[:32])


def test_a_cache_of_another_width_is_refused(cached, model):
    with pytest.raises(WriteSAEError, match=r"32 x 48 = 1536"):
        reader(model, cached, d_in=1000).get_raw_llm_batch()
    with pytest.raises(ValueError, match="does not match context_size"):
        reader(model, cached, context_size=8)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        reader(model, cached / "nowhere")


def test_cached_slices_of_the_context(model, rows, tmp_path):
    hook = model.write_hook_name(1, 0)
    cache(tmp_path, rows, hook, 16 * 8, seqpos_slice=(2, 10)).run()
    store = reader(model, tmp_path, hook, context_size=8)
    check_rows(store.get_raw_llm_batch()[0], live(model, hook, rows[:PROMPTS])[:, 2:10].flatten(0, 1))


@pytest.mark.parametrize("kind", ["state", "write"])
def test_caches_of_flat_rows_are_left_to_saelens(model, rows, tmp_path, kind):
    """States; and writes cached while somebody listened, or without this package."""
    hook = model.state_hook_name(1, 2) if kind == "state" else HOOK
    runner = cache(tmp_path, rows, hook)
    with runner.model.hooks(fwd_hooks=[(HOOK, lambda x, hook: 2 * x)] if kind == "write" else []):
        runner.run()
    store = reader(model, tmp_path, hook)
    assert store.cached_activation_dataset.features[hook].shape == (CONTEXT, 32 * 48)
    expected = first_rows(model, rows, hook) * (2 if kind == "write" else 1)
    check_rows(store.get_raw_llm_batch()[0], expected, packed=False)


def test_the_mixing_buffer_is_the_one_that_packed_writes_were_made_for(model, rows):
    """Fails when SAELens's buffer takes to an operation that builds the matrices."""
    store = store_of(model, rows)
    served = mixing_buffer.mixing_buffer(128, 32, iter([store.get_raw_llm_batch()[0] for _ in range(5)]))
    batches = list(served)
    assert len(batches) == 10
    assert all(isinstance(batch, PackedWrites) for batch in batches)
