"""SAELens's store on writes: factors that stand for exactly the rows that the stock methods give."""

import inspect
import itertools

import datasets
import pytest
import torch
from sae_lens import (
    ActivationsStore,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training import mixing_buffer

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saelens import store as saelens_store
from writesae_lens.saes.packed import PackedWrites

CONTEXT = 16
PROMPTS = 4
CELLS = {"tiny-gdn": (1, 2), "tiny-mamba2": (4, 4)}
# Every method that the package wraps, and the arguments that its wrapper passes on.
WRAPPED = {
    (ActivationsStore, "get_activations"): ["self", "batch_tokens"],
    (ActivationsStore, "get_multi_hook_activations"): ["self", "batch_tokens"],
    (ActivationsStore, "load_cached_activation_dataset"): ["self"],
    (ActivationsStore, "_load_raw_llm_batch_from_cached"): ["self", "raise_on_epoch_end"],
    (CacheActivationsRunner, "_create_shard"): ["self", "buffer"],
}


@pytest.fixture(scope="module")
def models():
    return {name: HookedRecurrent.boot_transformers(name, device="cpu") for name in CELLS}


@pytest.fixture(scope="module")
def token_rows(models):
    """Rows [32, CONTEXT] of held-out text for each model."""
    rows = {}
    for name, model in models.items():
        tokens = model.to_tokens(zoo.held_out_text()[:6000], prepend_bos=False, truncate=False)[0]
        rows[name] = tokens[: 32 * CONTEXT].view(32, CONTEXT)
    return rows


def dataset(rows):
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


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


def store_of(model, hook, d_in, rows, **options):
    return ActivationsStore(
        **(
            {"model": model, "dataset": dataset(rows), "hook_name": hook, "d_in": d_in}
            | {"hook_head_index": None, "device": torch.device("cpu"), "dtype": "float32"}
            | STORE
            | options
        )
    )


def multi_store(model, hooks, widths, rows, **options):
    return ActivationsStore.from_config_multi_hook(
        **(
            {"model": model, "dataset": dataset(rows), "hook_names": hooks, "hook_d_ins": widths}
            | STORE
            | options
        )
    )


def stock(method, *args):
    """What SAELens's own method gives."""
    return getattr(ActivationsStore, method).__wrapped__(*args)


def live(model, hook, tokens):
    """The hook's activations, from the model itself."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[hook], prepend_bos=False)[1][hook]


def check_rows(ours, theirs, packed=True):
    assert isinstance(ours, PackedWrites) == packed
    assert not isinstance(theirs, PackedWrites)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(ours.dense() if packed else ours, theirs, rtol=1e-6, atol=1e-9)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize(("owner", "name"), WRAPPED, ids=[name for _, name in WRAPPED])
def test_the_wrapped_methods_are_where_saelens_has_them(owner, name):
    """Fails when SAELens renames, moves or re-signs a method: the wrapper must follow."""
    method = inspect.getattr_static(owner, name)
    assert method.keeps_writes_packed
    original = method.__wrapped__
    assert not getattr(original, "keeps_writes_packed", False)
    assert original.__module__ == owner.__module__
    assert original.__qualname__ == f"{owner.__name__}.{name}"
    assert list(inspect.signature(original).parameters) == WRAPPED[owner, name]


def test_saelens_still_calls_the_wrapped_methods():
    """Fails when the store or the runner takes another way past a wrapped method."""
    for caller, called in (
        (ActivationsStore.get_raw_llm_batch, "get_activations"),
        (ActivationsStore.get_raw_llm_batch, "_load_raw_llm_batch_from_cached"),
        (ActivationsStore._get_filtered_multi_hook_llm_batch, "get_multi_hook_activations"),
        (ActivationsStore.__init__, "load_cached_activation_dataset"),
        (CacheActivationsRunner.run, "_create_shard"),
    ):
        assert f"self.{called}(" in inspect.getsource(caller)


def test_wrapping_twice_changes_nothing():
    before = {(owner, name): inspect.getattr_static(owner, name) for owner, name in WRAPPED}
    saelens_store.keep_writes_packed()
    assert before == {(owner, name): inspect.getattr_static(owner, name) for owner, name in WRAPPED}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("seqpos", [(None,), (2, -3), (1, None, 4)])
def test_rows_of_one_hook_are_those_of_the_stock_store(models, token_rows, name, seqpos):
    model = models[name]
    cell = model.cell(*CELLS[name])
    hook = model.write_hook_name(cell.layer, cell.head)
    store = store_of(model, hook, cell.d_k * cell.d_v, token_rows[name], seqpos_slice=seqpos)
    tokens = token_rows[name][:3]
    ours = store.get_activations(tokens)
    check_rows(ours, stock("get_activations", store, tokens))
    check_rows(ours, live(model, hook, tokens)[:, slice(*seqpos)].float())
    acts, ids = store.get_raw_llm_batch()
    expected = live(model, hook, token_rows[name][:PROMPTS])[:, slice(*seqpos)]
    check_rows(acts, expected.flatten(0, 1))
    assert torch.equal(ids, token_rows[name][:PROMPTS][:, slice(*seqpos)].flatten())


@pytest.mark.parametrize("name", CELLS)
def test_rows_of_four_heads_are_those_of_the_stock_store(models, token_rows, name):
    model = models[name]
    cells = [model.cell(CELLS[name][0], head) for head in range(4)]
    widths = {model.write_hook_name(c.layer, c.head): c.d_k * c.d_v for c in cells}
    store = multi_store(model, list(widths), widths, token_rows[name], seqpos_slice=(1, -1))
    tokens = token_rows[name][:3]
    ours, theirs = (
        store.get_multi_hook_activations(tokens),
        stock("get_multi_hook_activations", store, tokens),
    )
    assert list(ours) == list(theirs) == list(widths)
    for hook in widths:
        check_rows(ours[hook], theirs[hook])


def test_rows_of_heads_of_two_layers_come_from_one_pass(models, token_rows, monkeypatch):
    model = models["tiny-gdn"]
    layers = sorted(model.mixers)[:2]
    cell = model.cell(layers[0], 0)
    widths = {model.write_hook_name(layer, h): cell.d_k * cell.d_v for layer in layers for h in (1, 3)}
    store = multi_store(model, list(reversed(widths)), widths, token_rows["tiny-gdn"])
    tokens = token_rows["tiny-gdn"][:2]
    expected = {hook: live(model, hook, tokens) for hook in widths}
    passes = []
    original = HookedRecurrent.run_with_cache
    monkeypatch.setattr(
        HookedRecurrent, "run_with_cache", lambda *a, **k: (passes.append(1), original(*a, **k))[1]
    )
    for hook, rows in store.get_multi_hook_activations(tokens).items():
        check_rows(rows, expected[hook])
    assert len(passes) == 1


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_batches_for_training_are_rows_of_the_model(models, token_rows, mix):
    """After buffer, shuffle and slices, with the heads still aligned token for token."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    cell = model.cell(1, 0)
    widths = {model.write_hook_name(1, h): cell.d_k * cell.d_v for h in range(4)}
    known = [live(model, hook, rows).flatten(0, 1) for hook in widths]
    store = multi_store(model, list(widths), widths, rows, activations_mixing_fraction=mix)
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


def test_a_buffer_of_exactly_one_batch_stays_in_factors(models, token_rows):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    store = store_of(
        model,
        hook,
        32 * 48,
        rows,
        n_batches_in_buffer=PROMPTS,
        train_batch_size_tokens=PROMPTS * CONTEXT,
        activations_mixing_fraction=0.0,
    )
    check_rows(next(store), live(model, hook, rows[:PROMPTS]).flatten(0, 1))


def test_excluded_tokens_are_left_out(models, token_rows):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    special = rows[:PROMPTS].flatten().bincount().topk(2).indices
    kept = ~torch.isin(rows[:PROMPTS].flatten(), special)
    assert 0 < kept.sum() < kept.numel()
    store = store_of(model, hook, 32 * 48, rows, exclude_special_tokens=special)
    check_rows(store.get_filtered_llm_batch(), live(model, hook, rows[:PROMPTS]).flatten(0, 1)[kept])
    both = [hook, model.write_hook_name(1, 0)]
    several = multi_store(model, both, dict.fromkeys(both, 32 * 48), rows, exclude_special_tokens=special)
    for name, x in several._get_filtered_multi_hook_llm_batch().items():
        check_rows(x, live(model, name, rows[:PROMPTS]).flatten(0, 1)[kept])


def test_states_are_left_to_saelens(models, token_rows):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.state_hook_name(1, 2)
    store = store_of(model, hook, 32 * 48, rows)
    check_rows(store.get_activations(rows[:2]), live(model, hook, rows[:2]), packed=False)
    both = [hook, model.write_hook_name(1, 2)]
    several = multi_store(model, both, dict.fromkeys(both, 32 * 48), rows)
    for name, x in several.get_multi_hook_activations(rows[:2]).items():
        check_rows(x, live(model, name, rows[:2]), packed=False)


def test_a_head_index_is_left_to_saelens(models, token_rows):
    """The factors of all heads have a head axis, of which SAELens takes one."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = "blocks.1.linear_attn.hook_write_key"
    store = store_of(model, hook, 32, rows, hook_head_index=2)
    check_rows(store.get_activations(rows[:2]), live(model, hook, rows[:2])[:, :, 2], packed=False)


def test_listening_to_a_write_gives_what_the_listener_returns(models, token_rows):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook, other = model.write_hook_name(1, 2), model.write_hook_name(1, 0)
    store = store_of(model, hook, 32 * 48, rows)
    both = multi_store(model, [other, hook], {hook: 32 * 48, other: 32 * 48}, rows)
    native = live(model, hook, rows[:2])
    with model.hooks(fwd_hooks=[(hook, lambda x, hook: x + 1)]):
        edited = store.get_activations(rows[:2])
        edited_too = both.get_multi_hook_activations(rows[:2])[hook]
    check_rows(edited, native + 1, packed=False)
    check_rows(edited_too, native + 1, packed=False)
    check_rows(store.get_activations(rows[:2]), native)  # and packed again afterwards


def test_an_edit_elsewhere_reaches_the_packed_writes(models, token_rows):
    """A hook on an earlier layer, or on the factors, changes the writes that the store packs."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    store = store_of(model, hook, 32 * 48, rows)
    for where in ("blocks.0.hook_resid_post", "blocks.1.linear_attn.hook_write_key"):
        with model.hooks(fwd_hooks=[(where, lambda x, hook: x * 1.5 + 0.1)]):
            expected = stock("get_activations", store, rows[:2])
            check_rows(store.get_activations(rows[:2]), expected)
        assert (expected - live(model, hook, rows[:2])).abs().max() > 1e-3


def test_a_width_that_is_not_the_cells_is_named(models, token_rows):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    message = r"the SAE takes 1000 numbers, but blocks\.1\.linear_attn\.hook_write\.2 gives 32 x 48 = 1536"
    with pytest.raises(WriteSAEError, match=message):
        store_of(model, hook, 1000, rows).get_activations(rows[:2])
    with pytest.raises(WriteSAEError, match=message):
        multi_store(model, [hook], {hook: 1000}, rows).get_multi_hook_activations(rows[:2])


@pytest.mark.parametrize("multi", [False, True])
def test_a_cell_that_does_not_exist_is_named(models, token_rows, multi):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = "blocks.1.linear_attn.hook_write.99"

    def read():
        if multi:
            return multi_store(model, [hook], {hook: 1536}, rows).get_multi_hook_activations(rows[:2])
        return store_of(model, hook, 1536, rows).get_activations(rows[:2])

    with pytest.raises(HookedModelError, match=r"hook_write\.99"):
        read()


def test_packed_and_flat_batches_train_the_same(models, token_rows):
    """One optimiser step from the store's packed batch and from the numbers that it stands for."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    batch = next(store_of(model, model.write_hook_name(1, 2), 32 * 48, rows))
    outcomes = []
    for x in (batch, batch.dense()):
        torch.manual_seed(0)
        # Read vectors come with packed writes only.
        options = {"d_k": 32, "d_v": 48, "d_sae": 64, "k": 4, "read_alignment_coefficient": 0.0}
        sae = WriteTrainingSAE(WriteSAETrainingConfig(**options))
        step = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=True
        )
        output = sae.training_forward_pass(step)
        output.loss.backward()
        # The signs of an atom's two factors are free; those of the atom itself are not.
        outcomes.append((output.loss.detach(), sae.W_dec.detach(), output.sae_out))
    for packed, flat in zip(*outcomes):
        torch.testing.assert_close(packed, flat, rtol=1e-4, atol=1e-5)


def cache_config(folder, hook, **options):
    return CacheActivationsRunnerConfig(
        **(
            {
                "dataset_path": "held-out text",
                "model_class_name": "HookedRecurrent",
                "model_name": "tiny-gdn",
                "model_batch_size": PROMPTS,
                "hook_name": hook,
                "d_in": 32 * 48,
                "training_tokens": 16 * CONTEXT,
                "context_size": CONTEXT,
                "prepend_bos": False,
                "shuffle": False,
                "device": "cpu",
                # 8 prompts of 16 tokens of 6,144 bytes: two shards of two model batches.
                "buffer_size_gb": 8 * CONTEXT * 6144 / 1e9,
                "new_cached_activations_path": str(folder / "cache"),
            }
            | options
        )
    )


def reader(model, hook, folder, d_in=32 * 48, **options):
    return ActivationsStore(
        **(
            {"model": model, "dataset": None, "hook_name": hook, "d_in": d_in}
            | {"hook_head_index": None, "device": torch.device("cpu"), "dtype": "float32"}
            | STORE
            | {"cached_activations_path": str(folder / "cache")}
            | options
        )
    )


@pytest.fixture(scope="module")
def cached(models, token_rows, tmp_path_factory):
    """A folder with 16 rows of cached writes, and the hook that they are of."""
    folder, hook = tmp_path_factory.mktemp("cached"), models["tiny-gdn"].write_hook_name(1, 2)
    CacheActivationsRunner(cache_config(folder, hook), dataset(token_rows["tiny-gdn"])).run()
    return folder, hook


def test_cached_writes_lie_on_disk_as_their_parts(cached, models, token_rows):
    folder, hook = cached
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    held = datasets.load_from_disk(str(folder / "cache")).with_format("torch")
    assert len(held) == 16
    assert held.features[hook].shape == (CONTEXT, 32 + 48 + 32)
    tokens = rows[:16]
    names = list(model.write_factor_hook_names(1))
    assert [name.rsplit("_", 1)[1] for name in names[:2]] == ["key", "value"]
    with torch.no_grad():
        cache = model.run_with_cache(tokens, names_filter=names, prepend_bos=False)[1]
    parts = torch.cat([cache[name][:, :, 2] for name in names], dim=-1)  # key, value, read
    torch.testing.assert_close(held[:][hook], parts, rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.as_tensor(held[:]["token_ids"]).long(), tokens.cpu())
    size = sum(f.stat().st_size for f in (folder / "cache").rglob("*.arrow"))
    assert size < 2 * 16 * CONTEXT * (32 + 48 + 32) * 4


def test_cached_writes_are_read_as_the_live_ones(cached, models, token_rows):
    folder, hook = cached
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    store = reader(model, hook, folder)
    for n in range(4):
        tokens = rows[n * PROMPTS : (n + 1) * PROMPTS]
        acts, ids = store.get_raw_llm_batch()
        check_rows(acts, live(model, hook, tokens).flatten(0, 1))
        assert torch.equal(ids.long().cpu(), tokens.flatten().cpu())
    with pytest.raises(StopIteration):
        store.get_raw_llm_batch(raise_on_epoch_end=True)
    check_rows(store.get_raw_llm_batch()[0], live(model, hook, rows[:PROMPTS]).flatten(0, 1))
    check_rows(next(reader(model, hook, folder, activations_mixing_fraction=0.0)), acts_of(model, hook, rows))


def acts_of(model, hook, rows):
    return live(model, hook, rows[:PROMPTS]).flatten(0, 1)[:32]


def test_a_cache_is_read_while_somebody_listens_to_the_live_hook(cached, models, token_rows):
    """What lies on disk does not depend on who listens to the model."""
    folder, hook = cached
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    expected = live(model, hook, rows[:PROMPTS]).flatten(0, 1)
    before = reader(model, hook, folder)
    with model.hooks(fwd_hooks=[(hook, lambda x, hook: x + 1)]):
        check_rows(before.get_raw_llm_batch()[0], expected)
        check_rows(reader(model, hook, folder).get_raw_llm_batch()[0], expected)


def test_the_stock_runner_config_reads_packed_writes(cached, models, token_rows):
    folder, hook = cached
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    config = LanguageModelSAERunnerConfig(
        sae=WriteSAETrainingConfig(d_k=32, d_v=48, d_sae=64, k=4),
        model_class_name="HookedRecurrent",
        model_name="tiny-gdn",
        hook_name=hook,
        dataset_path="held-out text",
        use_cached_activations=True,
        cached_activations_path=str(folder / "cache"),
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
    check_rows(next(store), acts_of(model, hook, rows))


def test_a_cache_of_another_width_is_refused(cached, models):
    folder, hook = cached
    with pytest.raises(WriteSAEError, match=r"32 x 48 = 1536"):
        reader(models["tiny-gdn"], hook, folder, d_in=1000).get_raw_llm_batch()
    with pytest.raises(ValueError, match="does not match context_size"):
        reader(models["tiny-gdn"], hook, folder, context_size=8)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        reader(models["tiny-gdn"], hook, folder / "nowhere")


def test_cached_slices_of_the_context(models, token_rows, tmp_path):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 0)
    config = cache_config(
        tmp_path, hook, seqpos_slice=(2, 10), buffer_size_gb=8 * 8 * 6144 / 1e9, training_tokens=16 * 8
    )
    CacheActivationsRunner(config, dataset(rows)).run()
    store = reader(model, hook, tmp_path, context_size=8)
    check_rows(store.get_raw_llm_batch()[0], live(model, hook, rows[:PROMPTS])[:, 2:10].flatten(0, 1))


def test_cached_states_are_left_to_saelens(models, token_rows, tmp_path):
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.state_hook_name(1, 2)
    CacheActivationsRunner(cache_config(tmp_path, hook), dataset(rows)).run()
    store = reader(model, hook, tmp_path)
    assert store.cached_activation_dataset.features[hook].shape == (CONTEXT, 32 * 48)
    expected = live(model, hook, rows[:PROMPTS]).flatten(0, 1)
    check_rows(store.get_raw_llm_batch()[0], expected, packed=False)


def test_a_cache_of_flat_writes_is_read_as_it_lies(models, token_rows, tmp_path):
    """Caches that were made while somebody listened, or without this package."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    runner = CacheActivationsRunner(cache_config(tmp_path, hook), dataset(rows))
    with runner.model.hooks(fwd_hooks=[(hook, lambda x, hook: 2 * x)]):
        runner.run()
    store = reader(model, hook, tmp_path)
    assert store.cached_activation_dataset.features[hook].shape == (CONTEXT, 32 * 48)
    expected = 2 * live(model, hook, rows[:PROMPTS]).flatten(0, 1)
    check_rows(store.get_raw_llm_batch()[0], expected, packed=False)


def test_the_mixing_buffer_is_the_one_that_packed_writes_were_made_for(models, token_rows):
    """Fails when SAELens's buffer takes to an operation that builds the matrices."""
    model, rows = models["tiny-gdn"], token_rows["tiny-gdn"]
    hook = model.write_hook_name(1, 2)
    store = store_of(model, hook, 32 * 48, rows)
    served = mixing_buffer.mixing_buffer(128, 32, iter([store.get_raw_llm_batch()[0] for _ in range(5)]))
    batches = list(served)
    assert len(batches) == 10
    assert all(isinstance(batch, PackedWrites) for batch in batches)
