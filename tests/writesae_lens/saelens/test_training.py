"""SAELens's runners on WriteSAEs: outputs, resumed runs, several SAEs at once, caches, other settings."""

import copy
import json
import math

import datasets
import pytest
import torch
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    PretokenizeRunner,
    PretokenizeRunnerConfig,
    TrainingSAE,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.saelens.runs import (
    BATCH,
    CONTEXT,
    EARLY,
    FACTORS,
    HOOK,
    LATE,
    Run,
    batches_of,
    cache_runner,
    checkpoints,
    dense,
    dense_decode,
    dense_encode,
    interrupt_at,
    make_multi_runner,
    make_runner,
    run_with_dense,
    sae_config,
    same_weights,
    unexplained,
    watch_steps,
    writes,
)
from writesae_lens import WriteSAE, WriteTrainingSAE


def test_the_runner_leaves_an_sae_that_explains_text_it_never_saw(run, model, rows):
    x = writes(model, HOOK, rows[-16:])
    loaded = SAE.load_from_disk(run.saved)
    assert isinstance(loaded, WriteSAE)
    assert unexplained(loaded, x) < 0.7
    assert same_weights(loaded, run.sae)
    raw = load_file(run.saved / "sae_weights.safetensors")
    atoms = torch.einsum("fk,fv->fkv", raw["dec_key"][:, 0], raw["dec_value"][:, 0]).flatten(1)
    torch.testing.assert_close(loaded.W_dec, atoms / atoms.norm(dim=1, keepdim=True))
    encoder = torch.einsum("fk,fv->fkv", raw["enc_key"][:, 0], raw["enc_value"][:, 0]).flatten(1)
    torch.testing.assert_close(loaded.W_enc, encoder.T)
    torch.testing.assert_close(loaded(x), dense(loaded, x), atol=1e-5, rtol=1e-4)


def test_the_runner_notes_where_the_sae_belongs(run):
    metadata = SAE.load_from_disk(run.saved).cfg.metadata
    assert (metadata.hook_name, metadata.model_name) == (HOOK, "tiny-gdn")
    assert (metadata.context_size, metadata.prepend_bos) == (CONTEXT, False)
    assert metadata.training_architecture == "writesae"
    assert metadata.model_class_name == "HookedRecurrent"
    fired = torch.stack([(dense_encode(run.sae, b) > 0).any(0) for b in run.batches[-10:]]).any(0)
    sparsity = load_file(run.saved / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (64,)
    assert (sparsity[fired] > -10).all()
    saved = json.loads((run.saved / "runner_cfg.json").read_text())
    assert LanguageModelSAERunnerConfig.from_dict(saved).sae == run.runner.cfg.sae


def test_checkpoints_load_as_training_saes(run):
    """n_checkpoints=2 writes two; each holds weights, optimiser, scaler, sparsity and place in the data."""
    found = checkpoints(run.runner)
    assert sorted(found) == [EARLY, LATE]
    for samples, path in found.items():
        sae = TrainingSAE.load_from_disk(path)
        assert isinstance(sae, WriteTrainingSAE)
        expected = copy.deepcopy(run.sae.cfg)
        expected.metadata, expected.device = sae.cfg.metadata, sae.cfg.device
        assert sae.cfg == expected
        assert [n for n, p in sae.named_parameters() if p.requires_grad] == list(FACTORS)
        state = torch.load(path / "trainer_state.pt")
        assert state["n_training_samples"] == samples
        # SAELens counts a step after its checkpoint: whoever schedules by n_training_steps is one step late.
        assert state["n_training_steps"] == samples // BATCH - 1
        assert len(state["optimizer"]["state"]) == len(FACTORS)
        rows_read = int(load_file(path / "activations_store_state.safetensors")["n_dataset_processed"])
        assert rows_read == math.ceil(samples / 256) * 8 - 1  # the last row counts when the next is asked for


@pytest.mark.parametrize(
    "options",
    [{"seed": 5}, {"prefetch_llm_batches": 2}, {"save_final_checkpoint": True}, {"autocast": True}],
    ids=lambda options: next(iter(options)),
)
def test_training_again_gives_the_same_bits(early, rows, tmp_path, options):
    """Atoms start from writes and data come in order: the random seed is without effect, and so are threads;
    a final checkpoint is the finished SAE; autocast leaves the factored step alone."""
    assert same_weights(make_runner(tmp_path, rows, training_tokens=EARLY, **options).run(), early)
    final = list((tmp_path / "checkpoints").rglob("final_*"))
    assert [path.name for path in final] == [f"final_{EARLY}"] * ("save_final_checkpoint" in options)
    assert all(same_weights(TrainingSAE.load_from_disk(path), early) for path in final)


def test_training_goes_on_from_a_pretrained_path(run, rows, tmp_path):
    """Learning rate 0 for a batch: the weights stay those of the path, so nothing was started anew."""
    path = checkpoints(run.runner)[EARLY]
    options = {"from_pretrained_path": str(path), "training_tokens": BATCH, "output_path": None}
    before = load_file(path / "sae_weights.safetensors")
    still = make_runner(tmp_path / "still", rows, lr=0.0, **options).run()
    assert all(torch.equal(before[n], p) for n, p in still.named_parameters())
    moved = make_runner(tmp_path / "moved", rows, lr=1e-3, **options).run()
    for name in FACTORS:
        step = (before[name] - moved.state_dict()[name]).abs().max()
        assert 0 < step < 1.1e-3  # Adam's first step is at most the learning rate
    assert all(torch.equal(before[n], moved.state_dict()[n]) for n in ("b_enc", "b_dec"))


# Interrupted and resumed


def resume(run, samples):
    return {"resume_from_checkpoint": str(checkpoints(run.runner)[samples])}


def test_resuming_where_the_buffer_was_used_up_gives_the_same_bits(run, rows, tmp_path):
    """The one exact setting: rows already tokenised, activations_mixing_fraction=0, and a checkpoint where
    all that the model had been asked for was trained on."""
    resumed = Run(tmp_path, rows, seed=9, **resume(run, LATE))
    assert torch.equal(torch.stack(resumed.batches), torch.stack(run.batches[22:]))
    assert same_weights(resumed.sae, run.sae)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_warm_up_steps": 8, "lr_decay_steps": 30, "dead_feature_window": 4},
        {"sae": sae_config(normalize_activations="expected_average_only_in", encoder_bias=True)},
        {"sae": sae_config(decoder_bias=True, rank=2), "autocast": True},
    ],
    ids=["schedule and dead atoms", "scaled inputs", "bias and rank 2"],
)
def test_optimiser_schedules_and_scalers_resume_exactly(rows, tmp_path, options):
    options = {"training_tokens": 3840, "n_batches_for_norm_estimate": 4} | options
    full, dead = make_runner(tmp_path / "full", rows, n_checkpoints=1, **options), []
    watch_steps(full.sae, lambda step_input: dead.append(int(step_input.dead_neuron_mask.sum())))
    finished = full.run()
    assert list(checkpoints(full)) == [2048]
    options["resume_from_checkpoint"] = str(checkpoints(full)[2048])
    assert same_weights(make_runner(tmp_path / "resumed", rows, **options).run(), finished)
    if "dead_feature_window" in options:
        assert max(dead[:16]) > 0
        assert max(dead[16:]) > 0


def test_resuming_within_a_buffer_passes_over_what_was_in_it(run, rows, tmp_path):
    """SAELens stores how many rows were read, not the writes waiting in the buffer: those are skipped."""
    resumed = Run(tmp_path, rows, **resume(run, EARLY))
    served = EARLY // BATCH
    assert len(resumed.batches) == len(run.batches) - served
    assert torch.equal(torch.stack(resumed.batches[:-1]), torch.stack(run.batches[served + 1 :]))
    assert not same_weights(resumed.sae, run.sae)


def distinct(batches):
    return {row.tobytes() for batch in batches for row in batch.numpy()}


@pytest.mark.parametrize(("mixing", "exact"), [(1e-9, True), (0.5, False)])
def test_resuming_a_shuffled_run(model, rows, tmp_path, monkeypatch, mixing, exact):
    """Shuffling draws from torch's generator, whose state is not stored. Whoever carries it over resumes
    exactly as long as no write is kept for later; those that are kept are lost."""
    generator, save = {}, LanguageModelSAETrainingRunner.save_checkpoint

    def saving(self, checkpoint_path):
        generator[int(checkpoint_path.name)] = torch.get_rng_state()
        save(self, checkpoint_path)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_checkpoint", saving)
    full = Run(tmp_path / "full", rows, n_checkpoints=2, activations_mixing_fraction=mixing)
    runner = make_runner(tmp_path / "resumed", rows, activations_mixing_fraction=mixing, **resume(full, LATE))
    batches = batches_of(runner.sae)
    torch.set_rng_state(generator[LATE])
    assert same_weights(runner.run(), full.sae) == exact
    if not exact:
        # 22 batches come from 12 forward passes: one is yet to be served, and as much is always kept.
        rest = rows[12 * 8 :].split(8)[:8]
        unread = distinct(writes(model, HOOK, part).flatten(0, 1) for part in rest)
        fresh, late = distinct(batches), distinct(full.batches[LATE // BATCH :])
        assert fresh <= unread
        assert 0.9 * 2 * BATCH < len(late - unread) <= 2 * BATCH  # equal writes count once


def test_resuming_reads_a_long_document_again(model, run, tmp_path):
    """From text, rows are documents: the place within the one in progress is not stored."""
    documents = [d for d in zoo.held_out_text().split("<|endoftext|>") if len(d) > 2000][:4]

    def store():
        data = datasets.Dataset.from_dict({"text": documents})
        return ActivationsStore.from_sae(model, run.sae, dataset=data, store_batch_size_prompts=1)

    first, second = store(), store()
    contexts = [first.get_batch_tokens() for _ in range(6)]
    assert first.n_dataset_processed == 0
    first.save_to_checkpoint(tmp_path)
    second.load_from_checkpoint(tmp_path)
    assert torch.equal(second.get_batch_tokens(), contexts[0])


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run, rows, tmp_path):
    """SAELens writes no weights when interrupted, and its attempt to note the place in the data fails (the
    folder does not exist), which hides the interrupt. What regular checkpoints hold is whole."""
    runner = make_runner(tmp_path / "first", rows, n_checkpoints=2)
    interrupt_at(runner.sae, 25)
    with pytest.raises(SafetensorError) as caught:
        runner.run()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "first" / "sae").exists()
    found = checkpoints(runner)
    assert sorted(found) == [EARLY, LATE]
    resumed = make_runner(tmp_path / "second", rows, n_checkpoints=2, resume_from_checkpoint=str(found[LATE]))
    assert same_weights(resumed.run(), run.sae)
    # Thresholds that were passed count once more: the first steps of a resumed run write checkpoints.
    assert sorted(checkpoints(resumed)) == [LATE + BATCH, LATE + 2 * BATCH]


def test_resuming_while_atoms_are_still_started_from_writes(rows, tmp_path):
    """At 768 tokens 768 of the 1,024 atoms are started, and no write is left over."""
    options = {"sae": sae_config(d_sae=1024), "training_tokens": 2048}
    full = Run(tmp_path / "full", rows, n_checkpoints=2, **options)
    resumed = make_runner(tmp_path / "resumed", rows, **options, **resume(full, 768))
    assert same_weights(resumed.run(), full.sae)


# Several SAEs at once, caches, tokenised data


def test_heads_trained_together_are_those_trained_alone(early, model, rows, tmp_path, monkeypatch):
    """MultiSAETrainingRunner: all four heads of a layer from one forward pass a batch."""
    passes, forward = [], HookedRecurrent.forward
    monkeypatch.setattr(
        HookedRecurrent, "forward", lambda self, *a, **k: passes.append(1) or forward(self, *a, **k)
    )
    names = {f"head{h}": model.write_hook_name(1, h) for h in range(4)}
    saes = make_multi_runner(tmp_path, rows, names, training_tokens=EARLY, n_checkpoints=1).run()
    assert len(passes) == math.ceil(EARLY / (8 * CONTEXT))
    assert same_weights(saes["head2"], early)
    tokens = rows[-16:]
    for name, hook in names.items():
        loaded = SAE.load_from_disk(tmp_path / "saes" / name)
        assert isinstance(loaded, WriteSAE)
        assert same_weights(loaded, saes[name])
        assert loaded.cfg.metadata.hook_name == hook
        x = writes(model, hook, tokens)
        torch.testing.assert_close(loaded(x), dense(loaded, x), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            model.run_with_saes(tokens, saes=[loaded])
    assert not same_weights(saes["head0"], saes["head1"])


def test_several_saes_resume_and_keep_their_weights_when_interrupted(run, model, rows, tmp_path):
    """Here SAELens does write a whole checkpoint at an interrupt, and goes on from it."""
    names = {"a": model.write_hook_name(1, 0), "b": HOOK}
    first = make_multi_runner(tmp_path / "first", rows, names)
    interrupt_at(first.saes["a"], 20)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    (path,) = checkpoints(first).values()
    assert path.name == str(20 * BATCH)
    # The batch of the interrupt counts as trained on, and the other half of its forward pass is lost.
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["a", "b"]
    second = make_multi_runner(tmp_path / "second", rows, names, resume_from_checkpoint=str(path))
    batches = batches_of(second.saes["b"])
    saes = second.run()
    assert torch.equal(torch.stack(batches[:-1]), torch.stack(run.batches[22:]))
    assert unexplained(saes["b"], torch.cat(run.batches[-8:])) < 0.8


def test_training_from_cached_activations_gives_the_same_bits(run, early, rows, tmp_path):
    """CacheActivationsRunner writes what the model gives: reading it is as good as asking the model."""
    with pytest.raises(HookedModelError, match=r"hook_write\.9"):
        cache_runner(tmp_path, rows, "blocks.1.linear_attn.hook_write.9", 256)
    assert len(cache_runner(tmp_path, rows, HOOK, 2048).run()) == 2048 // CONTEXT
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    from_cache = Run(tmp_path, rows, training_tokens=EARLY, **cached)
    assert torch.equal(torch.stack(from_cache.batches), torch.stack(run.batches[: EARLY // BATCH]))
    assert same_weights(from_cache.sae, early)


def test_resuming_from_cached_activations_starts_at_their_beginning(run, rows, tmp_path):
    """The place in a cache is not stored: a resumed run reads the first writes again."""
    x = torch.cat(run.batches).view(-1, CONTEXT, 32 * 48)
    features = datasets.Features({HOOK: datasets.Array2D(shape=(CONTEXT, 32 * 48), dtype="float32")})
    cache = datasets.Dataset.from_dict({HOOK: x[:128].numpy()}, features=features)
    cache.save_to_disk(str(tmp_path / "cache"))
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    resumed = Run(tmp_path, rows, training_tokens=LATE + 8 * BATCH, **cached, **resume(run, LATE))
    assert torch.equal(torch.stack(resumed.batches), torch.stack(run.batches[:8]))


def test_training_on_a_pretokenized_dataset(tmp_path):
    """PretokenizeRunner's rows are what the store makes of the text itself, and so is the SAE."""
    text = [{"text": t.strip()} for t in zoo.held_out_text()[:30_000].split("\n\n") if t.strip()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, text)))
    PretokenizeRunner(
        PretokenizeRunnerConfig(
            tokenizer_name=str(zoo.model_path("tiny-gdn")),
            dataset_path=str(tmp_path / "data"),
            num_proc=1,
            context_size=CONTEXT,
            shuffle=False,
            begin_batch_token=None,
            save_path=str(tmp_path / "tokens"),
        )
    ).run()
    tokens = datasets.load_from_disk(str(tmp_path / "tokens"))
    tokenised = Run(tmp_path / "a", None, data=tokens, training_tokens=2048)
    from_text = Run(tmp_path / "b", None, dataset_path=str(tmp_path / "data"), training_tokens=2048)
    assert same_weights(tokenised.sae, from_text.sae)
    assert torch.equal(torch.stack(tokenised.batches), torch.stack(from_text.batches))
    assert same_weights(SAE.load_from_disk(tokenised.saved), from_text.sae)


def test_an_sae_of_states_trains_and_splices(model, rows, tmp_path):
    """States are of full rank: the same runner, the dense path."""
    hook = model.state_hook_name(1, 2)
    make_runner(tmp_path, rows, hook_name=hook, training_tokens=2048, sae=sae_config(decoder_bias=True)).run()
    sae, tokens = SAE.load_from_disk(tmp_path / "sae"), rows[-4:]
    with torch.no_grad():
        spliced, native = model.run_with_saes(tokens, saes=[sae]), model(tokens)
    torch.testing.assert_close(spliced, run_with_dense(model, sae, hook, tokens), atol=1e-4, rtol=1e-4)
    assert (spliced - native).abs().max() > 1e-3
    assert torch.isfinite(spliced).all()


def test_positions_and_special_tokens_are_left_out_of_training(model, rows, tmp_path):
    end = model.tokenizer.eos_token_id
    rows = torch.cat([rows[(rows == end).any(1)], rows])[:80]
    options = {"seqpos_slice": (4, None), "exclude_special_tokens": True, "n_batches_in_buffer": 10}
    trained = Run(tmp_path, rows, training_tokens=8 * BATCH, **options)
    keep = (rows != end) & (torch.arange(CONTEXT) >= 4)
    parts = zip(rows.split(8), keep.split(8))
    expected = torch.cat([writes(model, HOOK, part)[kept] for part, kept in parts])
    assert not keep[:, 4:].all()
    assert torch.equal(torch.cat(trained.batches), expected[: 8 * BATCH])


# Normalised inputs


def test_expected_average_norm_is_folded_into_raw_units(model, rows, tmp_path):
    """After training on inputs times s, coefficients and reconstructions are those of the raw inputs."""
    cfg = sae_config(normalize_activations="expected_average_only_in", encoder_bias=True, decoder_bias=True)
    runner = make_runner(tmp_path, rows, sae=cfg, n_batches_for_norm_estimate=4, n_checkpoints=1)
    fold, before = runner.sae.fold_activation_norm_scaling_factor, {}

    def recorded(factor):
        before.update(sae=copy.deepcopy(runner.sae), factor=factor)
        fold(factor)

    runner.sae.fold_activation_norm_scaling_factor = recorded
    sae = runner.run()
    first = [writes(model, HOOK, part) for part in rows[:16].split(8)]
    s = math.sqrt(32 * 48) / float(torch.cat(first).norm(dim=-1).mean())
    assert before["factor"] == pytest.approx(s, rel=1e-4)
    (saved,) = checkpoints(runner).values()
    assert json.loads((saved / "activation_scaler.json").read_text())["scaling_factor"] == before["factor"]

    x = writes(model, HOOK, rows[-8:]).flatten(0, 1)
    scaled = dense_encode(before["sae"], s * x)
    acts = scaled * before["sae"].W_dec.detach().norm(dim=-1) / s
    recons = dense_decode(before["sae"], scaled) / s
    assert before["sae"].b_enc.abs().max() > 1e-4
    for finished in (sae, SAE.load_from_disk(tmp_path / "sae")):
        assert finished.cfg.normalize_activations == "none"
        torch.testing.assert_close(finished.encode(x), acts, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(finished(x), recons, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert (recons - x).square().sum() < 0.9 * x.square().sum()


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_inputs_normalised_at_run_time(model, rows, tmp_path, kind):
    options = {"normalize_activations": kind, "aux_loss_coefficient": 0.0, "decoder_bias": True}
    options["init_from_writes"] = False
    runner = make_runner(tmp_path, rows, sae=sae_config(**options), training_tokens=2048)
    first, step = {}, runner.sae.training_forward_pass

    def recorded(step_input):
        before = copy.deepcopy(runner.sae.state_dict())
        output = step(step_input)
        if not first:
            first.update(x=step_input.sae_in, mse=output.losses["mse_loss"].item(), weights=before)
        return output

    def expected(sae, x):
        if kind == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            acts = dense_encode(sae, (x - mean) / (std + 1e-5))
            return acts, dense_decode(sae, acts) * std + mean
        scale = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
        acts = dense_encode(sae, x * scale)
        return acts, dense_decode(sae, acts) / scale

    runner.sae.training_forward_pass = recorded
    runner.run()
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.normalize_activations == kind
    x = writes(model, HOOK, rows[-8:])
    acts, recons = expected(sae, x)
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sae(x), recons, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        spliced = model.run_with_saes(rows[-8:], saes=[sae])
    by_hand = run_with_dense(model, sae, HOOK, rows[-8:], lambda sae, x: expected(sae, x)[1])
    torch.testing.assert_close(spliced, by_hand, atol=1e-3, rtol=1e-3)
    start = WriteTrainingSAE(sae_config(**options))
    start.load_state_dict(first["weights"])
    squared = (expected(start, first["x"])[1] - first["x"]).square().sum(-1).mean()
    assert first["mse"] == pytest.approx(float(squared), rel=1e-3)


# Precision and compilation


def test_autocast_of_the_model_keeps_the_sae_good(early, model, rows, tmp_path):
    sae, x = Run(tmp_path, rows, autocast_lm=True, training_tokens=EARLY).sae, writes(model, HOOK, rows[-16:])
    assert unexplained(sae, x) < 1.1 * unexplained(early, x)


@pytest.mark.parametrize(("dtype", "limit", "tolerance"), [("bfloat16", 1.3, 0.05), ("float64", 1.05, 1e-4)])
def test_saes_in_other_precisions_train_load_and_splice(
    early, model, rows, tmp_path, dtype, limit, tolerance
):
    kind = getattr(torch, dtype)
    sae = make_runner(tmp_path, rows, sae=sae_config(dtype=dtype), training_tokens=EARLY).run()
    assert {p.dtype for p in sae.parameters()} == {kind}
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert (loaded.dtype, loaded.W_dec.dtype, loaded.cfg.dtype) == (kind, kind, dtype)
    assert same_weights(loaded, sae)
    wide = SAE.load_from_disk(tmp_path / "sae", dtype="float64")
    assert wide.dec_key.dtype == torch.float64
    x = writes(model, HOOK, rows[-16:]).double()
    assert unexplained(wide, x) < limit * unexplained(copy.deepcopy(early).to(dtype=torch.float64), x)
    with torch.no_grad():
        native = model(rows[-2:])
        exact = model.run_with_saes(rows[-2:], saes=[loaded], use_error_term=True)
        logits = model.run_with_saes(rows[-2:], saes=[loaded])
    assert logits.dtype == native.dtype
    torch.testing.assert_close(exact, native, atol=tolerance, rtol=tolerance)
    if dtype == "float64":
        by_hand = run_with_dense(model, wide, HOOK, rows[-2:], lambda s, x: dense(s, x.double()).to(x.dtype))
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compile_sae": True}, {"compile_llm": True}], ids=["SAE", "model"])
def test_compiled_training_is_the_same_training(early, model, rows, tmp_path, unchecked, options):
    sae = make_runner(tmp_path, rows, training_tokens=EARLY, **options).run()
    x = writes(model, HOOK, rows[-16:])
    assert unexplained(sae, x) == pytest.approx(unexplained(early, x), rel=0.02)
    for name in FACTORS:
        torch.testing.assert_close(getattr(sae, name), getattr(early, name), atol=5e-3, rtol=0)
    assert same_weights(SAE.load_from_disk(tmp_path / "sae"), sae)
