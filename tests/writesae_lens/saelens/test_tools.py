"""SAELens's tools on WriteSAEs, one after the other, as its documentation uses them.

Everything is compared with the dense formulas, with plain forward passes of the model, or with a second run
that must agree; never with what a WriteSAE says of itself.
"""

import copy
import json
import math
import signal
from pathlib import Path

import datasets
import jaxtyping
import plotly.graph_objects
import pytest
import torch
import wandb
from sae_lens import (
    SAE,
    ActivationsStore,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    PretokenizeRunner,
    PretokenizeRunnerConfig,
    TrainingSAE,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
    find_best_feature_ordering_from_sae,
    init_sae_to_match_feature_dict,
    plot_sae_feature_similarity,
    train_toy_sae,
)
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE

CONTEXT = 32
BATCH = 128
TOKENS = 4096
EARLY = 1408  # tokens at the first of two checkpoints: in the middle of a buffer
LATE = 2816  # and at the second: where a buffer was used up
CELLS = {"tiny-gdn": (1, 2), "tiny-mamba2": (4, 4), "tiny-rwkv7": (1, 1)}
HOOK = "blocks.1.linear_attn.hook_write.2"
FACTORS = ("dec_key", "dec_value", "enc_key", "enc_value")


@pytest.fixture(autouse=True)
def own_signals():
    """SAELens's runners replace the handlers of interrupts and leave theirs in place."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def models():
    return {name: HookedRecurrent.boot_transformers(name, device="cpu") for name in CELLS}


@pytest.fixture(scope="module")
def model(models):
    return models["tiny-gdn"]


@pytest.fixture(scope="module")
def token_rows(models):
    """Rows [n, CONTEXT] of held-out text for each model, some with <|endoftext|> in them."""
    rows = {}
    for name, model in models.items():
        tokens = model.to_tokens(zoo.held_out_text()[:30_000], prepend_bos=False, truncate=False)[0]
        rows[name] = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return rows


def dataset(rows):
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def text_folder(folder):
    """Documents as a local dataset, which SAELens loads by its path."""
    rows = [json.dumps({"text": t.strip()}) for t in zoo.held_out_text()[:30_000].split("\n\n") if t.strip()]
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    return str(folder / "data")


def sae_config(**options):
    return WriteSAETrainingConfig(**({"d_k": 32, "d_v": 48, "d_sae": 64, "k": 4} | options))


def config(folder, **options):
    """One forward pass of the model gives 256 writes, that is two batches, and no write is kept for later."""
    return LanguageModelSAERunnerConfig(
        **(
            {
                "sae": sae_config(),
                "model_class_name": "HookedRecurrent",
                "model_name": "tiny-gdn",
                "hook_name": HOOK,
                "dataset_path": "held-out text",
                "context_size": CONTEXT,
                "prepend_bos": False,
                "training_tokens": TOKENS,
                "train_batch_size_tokens": BATCH,
                "store_batch_size_prompts": 8,
                "n_batches_in_buffer": 8,
                "activations_mixing_fraction": 0.0,
                "lr": 2e-3,
                "device": "cpu",
                "checkpoint_path": str(folder / "checkpoints"),
                "output_path": str(folder / "sae"),
                "logger": LoggingConfig(log_to_wandb=False),
                "verbose": False,
            }
            | options
        )
    )


def make_runner(folder, rows, seed=0, **options):
    torch.manual_seed(seed)
    data = None if rows is None else dataset(rows)
    return LanguageModelSAETrainingRunner(config(folder, **options), override_dataset=data)


def batches_of(runner):
    """The batches that the SAE is trained on, in a list that fills as the runner runs."""
    seen, step = [], runner.sae.training_forward_pass

    def recorded(step_input):
        seen.append(step_input.sae_in.clone())
        return step(step_input)

    runner.sae.training_forward_pass = recorded
    return seen


def checkpoints(runner):
    return {int(p.name): p for p in Path(runner.cfg.checkpoint_path).iterdir() if p.name.isdigit()}


def same_weights(one, other):
    """Bit for bit, atoms at norm 1 (where saving for inference puts them)."""

    def weights(sae):
        sae = copy.deepcopy(sae)
        norms = sae.W_dec.norm(dim=-1)
        if not torch.isclose(norms, torch.ones_like(norms)).all():
            sae.fold_W_dec_norm()
        return {n: w for n, w in sae.state_dict().items() if n != "progress"}

    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


class Run:
    """A finished run: its runner, SAE and the batches that it was trained on."""

    def __init__(self, folder, rows, **options):
        self.folder = folder
        self.runner = make_runner(folder, rows, **options)
        self.batches = batches_of(self.runner)
        self.sae = self.runner.run()
        self.saved = folder / "sae"


@pytest.fixture(scope="module")
def runs(models, token_rows, tmp_path_factory):
    """runs(model_name) -> one trained SAE, shared by the tests of this file."""
    done = {}

    def get(name="tiny-gdn"):
        if name not in done:
            cell = models[name].cell(*CELLS[name])
            done[name] = Run(
                tmp_path_factory.mktemp(name),
                token_rows[name],
                model_name=name,
                hook_name=models[name].write_hook_name(cell.layer, cell.head),
                sae=sae_config(d_k=cell.d_k, d_v=cell.d_v),
                n_checkpoints=2,
            )
        return done[name]

    return get


@pytest.fixture(scope="module")
def run(runs):
    return runs()


@pytest.fixture(scope="module")
def early(run):
    """The shared SAE as it was at its first checkpoint, for runs that end there."""
    return TrainingSAE.load_from_disk(checkpoints(run.runner)[EARLY])


def writes(model, hook, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[hook], prepend_bos=False)[1][hook]


def dense_encode(sae, x):
    z = x @ sae.W_enc.detach() + sae.b_enc.detach()
    top = (z * sae.W_dec.detach().norm(dim=-1)).topk(sae.cfg.k, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, top, z.gather(-1, top).relu())


def dense_decode(sae, acts):
    return acts @ sae.W_dec.detach() + sae.b_dec.detach()


def dense(sae, x):
    return dense_decode(sae, dense_encode(sae, x))


def unexplained(sae, x):
    """|X - X^|^2 as a share of |X|^2."""
    x = x.reshape(-1, sae.cfg.d_in)
    return float((dense(sae, x) - x).square().sum() / x.square().sum())


# Training and its outputs


def test_the_runner_leaves_an_sae_that_explains_text_it_never_saw(run, model, token_rows):
    x = writes(model, HOOK, token_rows["tiny-gdn"][-16:])
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
        assert sae.cfg == dataclass_with(run.sae.cfg, sae.cfg)
        assert [n for n, p in sae.named_parameters() if p.requires_grad] == list(FACTORS)
        state = torch.load(path / "trainer_state.pt")
        assert state["n_training_samples"] == samples
        assert len(state["optimizer"]["state"]) == len(FACTORS)
        rows_read = int(load_file(path / "activations_store_state.safetensors")["n_dataset_processed"])
        assert rows_read == math.ceil(samples / 256) * 8 - 1  # the last row counts when the next is asked for


def dataclass_with(config, other):
    """``config`` with the fields that loading and training set themselves taken from ``other``."""
    changed = copy.deepcopy(config)
    changed.metadata, changed.device = other.metadata, other.device
    return changed


def test_training_again_gives_the_same_bits(early, token_rows, tmp_path):
    """Atoms start from writes and data come in order: then even the random seed is without effect."""
    again = make_runner(tmp_path, token_rows["tiny-gdn"], seed=5, training_tokens=EARLY).run()
    assert same_weights(again, early)


def test_prefetching_batches_changes_nothing(early, token_rows, tmp_path):
    rows = token_rows["tiny-gdn"]
    again = make_runner(tmp_path, rows, prefetch_llm_batches=2, training_tokens=EARLY).run()
    assert same_weights(again, early)


def test_a_final_checkpoint_is_the_finished_sae(early, token_rows, tmp_path):
    rows = token_rows["tiny-gdn"]
    make_runner(tmp_path, rows, save_final_checkpoint=True, training_tokens=EARLY).run()
    (final,) = (tmp_path / "checkpoints").rglob("final_*")
    assert final.name == f"final_{EARLY}"
    assert same_weights(TrainingSAE.load_from_disk(final), early)


def test_training_goes_on_from_a_pretrained_path(run, token_rows, tmp_path):
    """Learning rate 0 for a batch: the weights stay those of the path, so nothing was started anew."""
    path = checkpoints(run.runner)[EARLY]
    options = {"from_pretrained_path": str(path), "training_tokens": BATCH, "output_path": None}
    before = load_file(path / "sae_weights.safetensors")
    still = make_runner(tmp_path / "still", token_rows["tiny-gdn"], lr=0.0, **options).run()
    assert all(torch.equal(before[n], p) for n, p in still.named_parameters())
    moved = make_runner(tmp_path / "moved", token_rows["tiny-gdn"], lr=1e-3, **options).run()
    for name in FACTORS:
        step = (before[name] - moved.state_dict()[name]).abs().max()
        assert 0 < step < 1.1e-3  # Adam's first step is at most the learning rate
    assert all(torch.equal(before[n], moved.state_dict()[n]) for n in ("b_enc", "b_dec"))


# Interrupted and resumed


def test_resuming_where_the_buffer_was_used_up_gives_the_same_bits(run, token_rows, tmp_path):
    """The one exact setting: rows already tokenised, activations_mixing_fraction=0, and a checkpoint where
    all that the model had been asked for was trained on."""
    resumed = Run(
        tmp_path, token_rows["tiny-gdn"], seed=9, resume_from_checkpoint=str(checkpoints(run.runner)[LATE])
    )
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
def test_optimiser_schedules_and_scalers_resume_exactly(token_rows, tmp_path, options):
    options = {"training_tokens": 3840, "n_batches_for_norm_estimate": 4} | options
    rows = token_rows["tiny-gdn"]
    full = make_runner(tmp_path / "full", rows, n_checkpoints=1, **options)
    step, dead = full.sae.training_forward_pass, []

    def recorded(step_input):
        dead.append(int(step_input.dead_neuron_mask.sum()))
        return step(step_input)

    full.sae.training_forward_pass = recorded
    finished = full.run()
    assert list(checkpoints(full)) == [2048]
    resumed = make_runner(
        tmp_path / "resumed", rows, resume_from_checkpoint=str(checkpoints(full)[2048]), **options
    )
    assert same_weights(resumed.run(), finished)
    if "dead_feature_window" in options:
        assert max(dead[:16]) > 0
        assert max(dead[16:]) > 0


def test_resuming_within_a_buffer_passes_over_what_was_in_it(run, token_rows, tmp_path):
    """SAELens stores how many rows were read, not the writes waiting in the buffer: those are skipped."""
    resumed = Run(
        tmp_path, token_rows["tiny-gdn"], resume_from_checkpoint=str(checkpoints(run.runner)[EARLY])
    )
    served = EARLY // BATCH
    assert len(resumed.batches) == len(run.batches) - served
    assert torch.equal(torch.stack(resumed.batches[:-1]), torch.stack(run.batches[served + 1 :]))
    assert not same_weights(resumed.sae, run.sae)


def distinct(batches):
    return {row.tobytes() for rows in batches for row in rows.numpy()}


@pytest.mark.parametrize(("mixing", "exact"), [(1e-9, True), (0.5, False)])
def test_resuming_a_shuffled_run(model, token_rows, tmp_path, monkeypatch, mixing, exact):
    """Shuffling draws from torch's generator, whose state is not stored. Whoever carries it over resumes
    exactly as long as no write is kept for later; those that are kept are lost."""
    generator = {}
    save = LanguageModelSAETrainingRunner.save_checkpoint

    def saving(self, checkpoint_path):
        generator[int(checkpoint_path.name)] = torch.get_rng_state()
        save(self, checkpoint_path)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_checkpoint", saving)
    full = Run(tmp_path / "full", token_rows["tiny-gdn"], n_checkpoints=2, activations_mixing_fraction=mixing)
    at = LATE
    runner = make_runner(
        tmp_path / "resumed",
        token_rows["tiny-gdn"],
        resume_from_checkpoint=str(checkpoints(full.runner)[at]),
        activations_mixing_fraction=mixing,
    )
    batches = batches_of(runner)
    torch.set_rng_state(generator[at])
    sae = runner.run()
    assert same_weights(sae, full.sae) == exact
    if not exact:
        # 22 batches come from 12 forward passes: one is yet to be served, and as much is always kept.
        rest = token_rows["tiny-gdn"][12 * 8 :].split(8)[:8]
        unread = distinct(writes(model, HOOK, rows).flatten(0, 1) for rows in rest)
        fresh, late = distinct(batches), distinct(full.batches[at // BATCH :])
        assert fresh <= unread
        assert 0.9 * 2 * BATCH < len(late - unread) <= 2 * BATCH  # equal writes count once


def test_resuming_reads_a_long_document_again(model, run, tmp_path):
    """From text, rows are documents: the place within the one in progress is not stored."""
    documents = [d for d in zoo.held_out_text().split("<|endoftext|>") if len(d) > 2000][:4]

    def store():
        data = datasets.Dataset.from_dict({"text": documents})
        return ActivationsStore.from_sae(model, run.sae, dataset=data, store_batch_size_prompts=1)

    first = store()
    contexts = [first.get_batch_tokens() for _ in range(6)]
    assert first.n_dataset_processed == 0
    first.save_to_checkpoint(tmp_path)
    second = store()
    second.load_from_checkpoint(tmp_path)
    assert torch.equal(second.get_batch_tokens(), contexts[0])


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run, token_rows, tmp_path):
    """SAELens writes no weights when interrupted, and its attempt to note the place in the data fails (the
    folder does not exist), which hides the interrupt. What regular checkpoints hold is whole."""
    runner = make_runner(tmp_path / "first", token_rows["tiny-gdn"], n_checkpoints=2)
    step = runner.sae.training_forward_pass

    def interrupted(step_input):
        if step_input.n_training_steps == 25:
            raise KeyboardInterrupt
        return step(step_input)

    runner.sae.training_forward_pass = interrupted
    with pytest.raises(SafetensorError) as caught:
        runner.run()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "first" / "sae").exists()
    found = checkpoints(runner)
    assert sorted(found) == [EARLY, LATE]
    resumed = make_runner(
        tmp_path / "second",
        token_rows["tiny-gdn"],
        n_checkpoints=2,
        resume_from_checkpoint=str(found[LATE]),
    )
    assert same_weights(resumed.run(), run.sae)
    # Thresholds that were passed count once more: the first steps of a resumed run write checkpoints.
    assert sorted(checkpoints(resumed)) == [LATE + BATCH, LATE + 2 * BATCH]


def test_the_step_counter_is_one_behind_in_checkpoints(run):
    """SAELens counts a step after its checkpoint: whoever schedules by n_training_steps is one step late."""
    state = torch.load(checkpoints(run.runner)[LATE] / "trainer_state.pt")
    assert state["n_training_steps"] == LATE // BATCH - 1


def test_resuming_while_atoms_are_still_started_from_writes(token_rows, tmp_path):
    options = {"sae": sae_config(d_sae=1024), "training_tokens": 2048}
    full = Run(tmp_path / "full", token_rows["tiny-gdn"], n_checkpoints=2, **options)
    early = checkpoints(full.runner)[768]  # 768 of the 1,024 atoms are started, and no write is left over
    resumed = make_runner(
        tmp_path / "resumed", token_rows["tiny-gdn"], resume_from_checkpoint=str(early), **options
    )
    assert same_weights(resumed.run(), full.sae)


# Several SAEs at once, caches, tokenised data


def test_heads_trained_together_are_those_trained_alone(early, model, token_rows, tmp_path, monkeypatch):
    """MultiSAETrainingRunner: all four heads of a layer from one forward pass a batch."""
    passes = []
    forward = HookedRecurrent.forward
    monkeypatch.setattr(
        HookedRecurrent, "forward", lambda self, *a, **k: passes.append(1) or forward(self, *a, **k)
    )
    names = {f"head{h}": model.write_hook_name(1, h) for h in range(4)}
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={name: sae_config() for name in names},
            hook_names=names,
            model_class_name="HookedRecurrent",
            model_name="tiny-gdn",
            dataset_path="held-out text",
            context_size=CONTEXT,
            prepend_bos=False,
            training_tokens=EARLY,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=8,
            n_batches_in_buffer=8,
            activations_mixing_fraction=0.0,
            lr=2e-3,
            n_checkpoints=1,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=str(tmp_path / "saes"),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        override_dataset=dataset(token_rows["tiny-gdn"]),
    )
    saes = runner.run()
    assert len(passes) == math.ceil(EARLY / (8 * CONTEXT))
    assert same_weights(saes["head2"], early)
    tokens = token_rows["tiny-gdn"][-16:]
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


def test_training_from_cached_activations_gives_the_same_bits(run, early, token_rows, tmp_path):
    """CacheActivationsRunner writes what the model gives: reading it is as good as asking the model."""
    options = {
        "dataset_path": "held-out text",
        "model_class_name": "HookedRecurrent",
        "model_name": "tiny-gdn",
        "model_batch_size": 8,
        "hook_name": HOOK,
        "d_in": 32 * 48,
        "training_tokens": 2048,
        "context_size": CONTEXT,
        "prepend_bos": False,
        "shuffle": False,
        "device": "cpu",
        "buffer_size_gb": 0.0127,  # 2,048 tokens of 6,144 bytes
        "new_cached_activations_path": str(tmp_path / "cache"),
    }
    rows = token_rows["tiny-gdn"]
    cached = CacheActivationsRunner(CacheActivationsRunnerConfig(**options), dataset(rows)).run()
    assert len(cached) == 2048 // CONTEXT
    from_cache = Run(
        tmp_path,
        rows,
        training_tokens=EARLY,
        use_cached_activations=True,
        cached_activations_path=str(tmp_path / "cache"),
    )
    assert torch.equal(torch.stack(from_cache.batches), torch.stack(run.batches[: EARLY // BATCH]))
    assert same_weights(from_cache.sae, early)


def test_caching_from_a_hook_that_does_not_exist_is_refused(token_rows, tmp_path):
    config = CacheActivationsRunnerConfig(
        dataset_path="held-out text",
        model_class_name="HookedRecurrent",
        model_name="tiny-gdn",
        model_batch_size=8,
        hook_name="blocks.1.linear_attn.hook_write.9",
        d_in=32 * 48,
        training_tokens=256,
        context_size=CONTEXT,
        device="cpu",
        buffer_size_gb=0.0127,
        new_cached_activations_path=str(tmp_path / "cache"),
    )
    with pytest.raises(HookedModelError, match=r"hook_write\.9"):
        CacheActivationsRunner(config, dataset(token_rows["tiny-gdn"]))


def test_training_on_a_pretokenized_dataset(tmp_path):
    """PretokenizeRunner's rows are what the store makes of the text itself, and so is the SAE."""
    PretokenizeRunner(
        PretokenizeRunnerConfig(
            tokenizer_name=str(zoo.model_path("tiny-gdn")),
            dataset_path=text_folder(tmp_path),
            num_proc=1,
            context_size=CONTEXT,
            shuffle=False,
            begin_batch_token=None,
            save_path=str(tmp_path / "tokens"),
        )
    ).run()
    options = {"training_tokens": 2048}
    torch.manual_seed(0)
    tokenised = LanguageModelSAETrainingRunner(
        config(tmp_path / "a", **options), override_dataset=datasets.load_from_disk(str(tmp_path / "tokens"))
    )
    read = batches_of(tokenised)
    from_text = Run(tmp_path / "b", None, **options | {"dataset_path": str(tmp_path / "data")})
    assert same_weights(tokenised.run(), from_text.sae)
    assert torch.equal(torch.stack(read), torch.stack(from_text.batches))
    assert same_weights(SAE.load_from_disk(tmp_path / "a" / "sae"), from_text.sae)


def test_an_sae_of_states_trains_and_splices(model, token_rows, tmp_path):
    """States are of full rank: the same runner, the dense path."""
    hook = model.state_hook_name(1, 2)
    rows = token_rows["tiny-gdn"]
    make_runner(tmp_path, rows, hook_name=hook, training_tokens=2048, sae=sae_config(decoder_bias=True)).run()
    sae = SAE.load_from_disk(tmp_path / "sae")
    tokens = rows[-4:]
    with torch.no_grad():
        spliced = model.run_with_saes(tokens, saes=[sae])
        by_hand = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: dense(sae, x))])
        native = model(tokens)
    torch.testing.assert_close(spliced, by_hand, atol=1e-4, rtol=1e-4)
    assert (spliced - native).abs().max() > 1e-3
    assert torch.isfinite(spliced).all()


def test_several_saes_resume_and_keep_their_weights_when_interrupted(run, model, token_rows, tmp_path):
    """Here SAELens does write a whole checkpoint at an interrupt, and goes on from it."""
    names = {"a": model.write_hook_name(1, 0), "b": HOOK}

    def runner(folder, **options):
        return MultiSAETrainingRunner(
            MultiSAETrainingRunnerConfig(
                saes={name: sae_config() for name in names},
                hook_names=names,
                model_class_name="HookedRecurrent",
                model_name="tiny-gdn",
                dataset_path="held-out text",
                context_size=CONTEXT,
                prepend_bos=False,
                training_tokens=TOKENS,
                train_batch_size_tokens=BATCH,
                store_batch_size_prompts=8,
                n_batches_in_buffer=8,
                activations_mixing_fraction=0.0,
                lr=2e-3,
                checkpoint_path=str(folder / "checkpoints"),
                output_path=str(folder / "saes"),
                logger=LoggingConfig(log_to_wandb=False),
                **options,
            ),
            override_dataset=dataset(token_rows["tiny-gdn"]),
        )

    first = runner(tmp_path / "first")
    step = first.saes["a"].training_forward_pass

    def interrupted(step_input):
        if step_input.n_training_steps == 20:
            raise KeyboardInterrupt
        return step(step_input)

    first.saes["a"].training_forward_pass = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    (path,) = checkpoints(first).values()
    assert path.name == str(20 * BATCH)
    # The batch of the interrupt counts as trained on, and the other half of its forward pass is lost.
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["a", "b"]
    second = runner(tmp_path / "second", resume_from_checkpoint=str(path))
    seen, go_on = [], second.saes["b"].training_forward_pass

    def recorded(step_input):
        seen.append(step_input.sae_in.clone())
        return go_on(step_input)

    second.saes["b"].training_forward_pass = recorded
    saes = second.run()
    assert torch.equal(torch.stack(seen[:-1]), torch.stack(run.batches[22:]))
    assert unexplained(saes["b"], torch.cat(run.batches[-8:])) < 0.8


def test_resuming_from_cached_activations_starts_at_their_beginning(run, token_rows, tmp_path):
    """The place in a cache is not stored: a resumed run reads the first writes again."""
    x = torch.cat(run.batches).view(-1, CONTEXT, 32 * 48)
    features = datasets.Features({HOOK: datasets.Array2D(shape=(CONTEXT, 32 * 48), dtype="float32")})
    cache = datasets.Dataset.from_dict({HOOK: x[:128].numpy()}, features=features)
    cache.save_to_disk(str(tmp_path / "cache"))
    resumed = Run(
        tmp_path,
        token_rows["tiny-gdn"],
        training_tokens=LATE + 8 * BATCH,
        use_cached_activations=True,
        cached_activations_path=str(tmp_path / "cache"),
        resume_from_checkpoint=str(checkpoints(run.runner)[LATE]),
    )
    assert torch.equal(torch.stack(resumed.batches), torch.stack(run.batches[:8]))


def test_positions_and_special_tokens_are_left_out_of_training(model, token_rows, tmp_path):
    rows = token_rows["tiny-gdn"]
    end = model.tokenizer.eos_token_id
    rows = torch.cat([rows[(rows == end).any(1)], rows])[:80]
    trained = Run(
        tmp_path,
        rows,
        seqpos_slice=(4, None),
        exclude_special_tokens=True,
        training_tokens=8 * BATCH,
        n_batches_in_buffer=10,
    )
    keep = (rows != end) & (torch.arange(CONTEXT) >= 4)
    expected = torch.cat(
        [writes(model, HOOK, part)[kept] for part, kept in zip(rows.split(8), keep.split(8))]
    )
    assert not keep[:, 4:].all()
    assert torch.equal(torch.cat(trained.batches), expected[: 8 * BATCH])


# Evaluation


@pytest.mark.parametrize(("name", "special"), [("tiny-gdn", False), *((name, True) for name in CELLS)])
def test_run_evals_measures_what_can_be_computed_by_hand(models, runs, token_rows, name, special):
    """Every metric of get_eval_everything_config, special tokens left out (the default) or not."""
    model, sae = models[name], SAE.load_from_disk(runs(name).saved)
    hook, rows = sae.cfg.metadata.hook_name, token_rows[name]
    ends = (rows == model.tokenizer.eos_token_id).any(1)
    rows = torch.cat([rows[ends], rows[~ends][-24:]])[:16]
    assert ends.any()
    store = ActivationsStore.from_sae(model, sae, dataset=dataset(rows), context_size=CONTEXT)
    metrics, features = run_evals(
        sae,
        store,
        model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(4, n_eval_reconstruction_batches=2),
        exclude_special_tokens=special,
    )
    ids = {t for t in model.tokenizer.all_special_ids if t is not None}
    keep = torch.tensor([[not special or int(t) not in ids for t in row] for row in rows])

    first, kept = rows[:8], keep[:8]
    replace = [(hook, lambda x, hook: torch.where(kept[..., None], dense(sae, x), x))]
    ablate = [(hook, lambda x, hook: torch.zeros_like(x))]
    with torch.no_grad():
        logits = {
            "without_sae": model(first).log_softmax(-1),
            "with_sae": model.run_with_hooks(first, fwd_hooks=replace).log_softmax(-1),
            "with_ablation": model.run_with_hooks(first, fwd_hooks=ablate).log_softmax(-1),
        }
    native, expected = logits["without_sae"], {}
    for run_name, values in logits.items():
        surprise = -values[:, :-1].gather(-1, first[:, 1:, None])[..., 0]
        expected[f"ce_loss_{run_name}"] = surprise[kept[:, :-1]].mean()
        expected[f"kl_div_{run_name}"] = (native.exp() * (native - values)).sum(-1)[kept].mean()
    ce = [expected[f"ce_loss_{n}"] for n in ("with_ablation", "with_sae", "without_sae")]
    kl = [expected[f"kl_div_{n}"] for n in ("with_ablation", "with_sae")]
    expected["ce_loss_score"] = (ce[0] - ce[1]) / (ce[0] - ce[2])
    expected["kl_div_score"] = (kl[0] - kl[1]) / kl[0]

    second, kept = rows[8:12], keep[8:12]  # the store goes on from where the first metrics left it
    x = writes(model, hook, second)[kept]
    acts = dense_encode(sae, x)
    recons = dense_decode(sae, acts)
    squared = (recons - x).square().sum(-1)
    variance = (x - x.mean(0)).square().sum(-1)
    expected |= {
        "l2_norm_in": x.norm(dim=-1).mean(),
        "l2_norm_out": recons.norm(dim=-1).mean(),
        "relative_reconstruction_bias": recons.square().sum(-1).mean() / (recons * x).sum(-1).mean(),
        "l0": (acts > 0).sum(-1).float().mean(),
        "l1": acts.sum(-1).mean(),
        "mse": squared.mean(),
        "explained_variance": 1 - squared.mean() / variance.mean(),
        "explained_variance_legacy": (1 - squared / variance).mean(),
        "cossim": torch.nn.functional.cosine_similarity(x, recons).mean(),
    }
    norms = x.norm(dim=-1)
    expected["l2_ratio"] = (recons.norm(dim=-1) / torch.where(norms < 1e-4, 1.0, norms)).mean()
    found = {k: v for group, values in metrics.items() if group != "token_stats" for k, v in values.items()}
    expected.pop("kl_div_without_sae")
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert math.isfinite(found[key])
        # Scores are ratios of small differences.
        rel = 2e-2 if key.endswith("score") else 2e-3
        assert found[key] == pytest.approx(float(value), rel=rel, abs=1e-6), key
    assert found["explained_variance"] > 0.1
    assert found["kl_div_with_sae"] < found["kl_div_with_ablation"]

    fires = torch.zeros(4, CONTEXT, sae.cfg.d_sae, dtype=torch.bool)
    fires[kept] = acts > 0
    density = fires.flatten(0, 1).sum(0) / kept.sum()
    torch.testing.assert_close(torch.tensor(features["feature_density"]), density)
    per_passage = fires.flatten(0, 1).sum(0) / fires.any(1).sum(0)  # 0 / 0 for atoms that never fire
    found = torch.tensor(features["consistent_activation_heuristic"])
    torch.testing.assert_close(found, per_passage, equal_nan=True)
    encoder, atoms = sae.W_enc.T.detach(), sae.W_dec.detach()
    torch.testing.assert_close(torch.tensor(features["encoder_norm"]), encoder.norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(encoder, atoms)
    torch.testing.assert_close(torch.tensor(features["encoder_decoder_cosine_sim"]), cosine)
    assert features["encoder_bias"] == sae.b_enc.tolist()


def test_run_evals_leaves_the_model_as_it_was(model, run, token_rows):
    """A second evaluation of the same rows gives the same numbers."""
    sae = SAE.load_from_disk(run.saved)
    results = []
    for _ in range(2):
        data = dataset(token_rows["tiny-gdn"][-16:])
        store = ActivationsStore.from_sae(model, sae, dataset=data, context_size=CONTEXT)
        evals = get_eval_everything_config(4, n_eval_reconstruction_batches=2)
        results.append(run_evals(sae, store, model, activation_scaler=ActivationScaler(), eval_config=evals))
    assert results[0][0] == results[1][0]


# Splicing into the model


@pytest.fixture(params=list(CELLS))
def spliced(request, models, runs, token_rows):
    """Model, its WriteSAE, passages; and afterwards a check that the model is as if nothing had been."""
    model, name = models[request.param], request.param
    sae = SAE.load_from_disk(runs(name).saved)
    tokens = token_rows[name][-3:]
    hook = sae.cfg.metadata.hook_name
    names = {key: point.name for key, point in model.hook_dict.items()}
    with torch.no_grad():
        native = model(tokens)
    yield model, sae, hook, tokens, native
    assert model.acts_to_saes == {}
    assert {key: point.name for key, point in model.hook_dict.items()} == names
    fired = []
    with torch.no_grad():
        assert torch.equal(model(tokens), native)
        again = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: fired.append(hook.name))])
        zeroed = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: torch.zeros_like(x))])
        _, cache = model.run_with_cache(tokens, names_filter=[hook])
    assert fired == [hook]
    assert torch.equal(again, native)
    assert not torch.equal(zeroed, native)
    assert list(cache) == [hook]
    with pytest.raises(HookedModelError, match="hook_sae_acts_post"):
        model.run_with_hooks(tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", lambda x, hook: x)])


def by_hand(model, sae, hook, tokens):
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: dense(sae, x))])


def test_run_with_saes_writes_the_reconstruction(spliced):
    model, sae, hook, tokens, native = spliced
    with torch.no_grad():
        logits = model.run_with_saes(tokens, saes=[sae])
        exact = model.run_with_saes(tokens, saes=sae, use_error_term=True)
        loss = model.run_with_saes(tokens, saes=sae, return_type="loss")
    expected = by_hand(model, sae, hook, tokens)
    assert (expected - native).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact, native, atol=1e-4, rtol=1e-4)
    logprobs = expected.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(loss, -logprobs.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error_term", [False, True])
def test_the_cache_of_a_spliced_run_is_the_dense_computation(spliced, error_term):
    model, sae, hook, tokens, _native = spliced
    x = writes(model, hook, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error_term)
    acts = dense_encode(sae, x)
    recons = dense_decode(sae, acts)
    expected = {
        "hook_sae_input": x,
        "hook_sae_acts_post": acts,
        "hook_sae_recons": recons,
        "hook_sae_output": x if error_term else recons,
    }
    if error_term:
        expected["hook_sae_error"] = x - recons
    for name, value in expected.items():
        torch.testing.assert_close(cache[f"{hook}.{name}"], value, atol=1e-5, rtol=1e-4)
    kept = cache[f"{hook}.hook_sae_acts_pre"].topk(sae.cfg.k).values.relu()
    torch.testing.assert_close(kept, acts.topk(sae.cfg.k).values, atol=1e-5, rtol=1e-4)
    assert sum(key.startswith(f"{hook}.") for key in cache) == len(expected) + 1
    assert hook not in cache


def test_features_are_edited_while_spliced(spliced):
    """Ablating one feature takes coefficient times atom from the write; the error term keeps the rest."""
    model, sae, hook, tokens, native = spliced
    acts = dense_encode(sae, writes(model, hook, tokens))
    feature = int(acts.sum((0, 1)).argmax())
    atom = sae.W_dec[feature].detach()

    def ablate(acts, hook):
        acts[..., feature] = 0
        return acts

    with torch.no_grad(), model.saes(saes=[sae], use_error_term=True):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", ablate)])
        again = model.run_with_hooks_with_saes(
            tokens, saes=[sae], fwd_hooks=[(f"{hook}.hook_sae_acts_post", ablate)]
        )
    change = -acts[..., feature, None] * atom
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: x + change)])
        without = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: dense(sae, x) + change)])
    assert (expected - native).abs().max() > 1e-4
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, without, atol=1e-4, rtol=1e-4)


def test_steering_with_a_row_of_w_dec(spliced):
    """Adding c * W_dec[f] to the write is raising f's coefficient by c under the error term."""
    model, sae, hook, tokens, native = spliced
    feature, size = 3, 0.7
    key, value = sae.decoder_factors()
    atom = torch.outer(key[feature, 0], value[feature, 0]).flatten().detach()
    torch.testing.assert_close(sae.W_dec[feature].detach(), atom)

    def raise_coefficient(acts, hook):
        acts[..., feature] += size
        return acts

    with torch.no_grad():
        steered = model.run_with_hooks(
            tokens, fwd_hooks=[(hook, lambda x, hook: x + size * sae.W_dec[feature])]
        )
        with model.saes(saes=[sae], use_error_term=True):
            raised = model.run_with_hooks(
                tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", raise_coefficient)]
            )
    assert (steered - native).abs().max() > 1e-3
    torch.testing.assert_close(raised, steered, atol=1e-4, rtol=1e-4)


def test_added_saes_stay_until_reset(spliced):
    model, sae, hook, tokens, native = spliced
    expected = by_hand(model, sae, hook, tokens)
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.dec_value.neg_()
    opposite = by_hand(model, other, hook, tokens)
    model.add_sae(sae)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
        inner = model.run_with_saes(tokens, saes=[other])
        torch.testing.assert_close(inner, opposite, atol=1e-4, rtol=1e-4)
        assert model.acts_to_saes == {hook: sae}
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
        assert f"{hook}.hook_sae_acts_post" in model.hook_dict
        model.reset_saes(hook)
        assert torch.equal(model(tokens), native)
        model.add_sae(sae, use_error_term=True)
        torch.testing.assert_close(model(tokens), native, atol=1e-4, rtol=1e-4)
    model.reset_saes()


def test_saes_at_several_heads_at_once(spliced):
    model, sae, hook, tokens, _native = spliced
    layer, head = model.site(hook).cell.layer, model.site(hook).cell.head
    second = copy.deepcopy(sae)
    second.cfg.metadata.hook_name = model.write_hook_name(layer, head + 1)
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae, second])
        expected = model.run_with_hooks(
            tokens,
            fwd_hooks=[(s.cfg.metadata.hook_name, lambda x, hook, s=s: dense(s, x)) for s in (sae, second)],
        )
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for s in (sae, second):
        assert cache[f"{s.cfg.metadata.hook_name}.hook_sae_acts_post"].shape == (3, CONTEXT, 64)


def test_generation_with_an_sae_is_that_of_whole_forward_passes(spliced):
    model, sae, hook, tokens, _native = spliced
    prompt = tokens[:1, :8]
    expected = prompt
    for _ in range(6):
        best = by_hand(model, sae, hook, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    seen = []
    with torch.no_grad(), model.saes(saes=[sae]):
        with model.hooks(fwd_hooks=[(f"{hook}.hook_sae_acts_post", lambda x, hook: seen.append(x.shape[1]))]):
            generated = model.generate(prompt, return_type="tokens", **options)
        uncached = model.generate(prompt, return_type="tokens", use_past_kv_cache=False, **options)
    assert generated.tolist() == expected.tolist()
    assert uncached.tolist() == expected.tolist()
    assert len(seen) == 6  # one pass a token


def test_errors_while_spliced_leave_nothing_behind(spliced):
    model, sae, hook, tokens, _native = spliced

    def fails(x, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f"{hook}.hook_sae_acts_post", fails)])
    lost = copy.deepcopy(sae)
    lost.cfg.metadata.hook_name = hook.replace("write", "wrote")
    with pytest.raises(HookedModelError, match="wrote"):
        model.run_with_saes(tokens, saes=[sae, lost])
    for call in (
        lambda: model.run_with_saes(tokens, saes=lost),
        lambda: model.run_with_cache_with_saes(tokens, saes=[lost]),
        lambda: model.add_sae(lost),
    ):
        with pytest.raises(HookedModelError, match="wrote"):
            call()
    inner = f"{hook}.hook_sae_nothing"
    with model.saes(saes=[sae]):
        with pytest.raises(HookedModelError, match="hook_sae_nothing"):
            model.run_with_hooks(tokens, fwd_hooks=[(inner, lambda x, hook: x)])
        with pytest.raises(HookedModelError, match="hook_sae_nothing"):
            model.run_with_cache(tokens, names_filter=[inner])
        with pytest.raises(HookedModelError, match="hook_sae_nothing"):
            model.add_hook(inner, lambda x, hook: x)


def test_gradients_reach_features_through_a_spliced_run(spliced):
    """d loss / d coefficient, from autograd, against central differences of plain edited forward passes."""
    model, sae, hook, tokens, _native = spliced
    acts = dense_encode(sae, writes(model, hook, tokens))
    gradients = {}
    with model.saes(saes=[sae], use_error_term=True):
        bwd = [(f"{hook}.hook_sae_acts_post", lambda g, hook: gradients.update(acts=g))]
        with model.hooks(bwd_hooks=bwd):
            model(tokens, return_type="loss").backward()
    active = gradients["acts"] * (acts > 0)
    passage, position, feature = (int(i) for i in (active.abs() == active.abs().max()).nonzero()[0])
    found = active[passage, position, feature]
    model.zero_grad()

    def loss(change):
        def edit(x, hook):
            x = x.clone()
            x[passage, position] += change * sae.W_dec[feature].detach()
            return x

        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, edit)]).double().log_softmax(-1)
        return -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean()

    step = 0.2 * float(acts[passage, position, feature])
    slope = (loss(step) - loss(-step)) / (2 * step)
    assert abs(slope) > 1e-6
    assert float(found) == pytest.approx(float(slope), rel=0.1, abs=1e-6)
    with model.saes(saes=[sae]):
        model(tokens, return_type="loss").backward()
    assert all(getattr(sae, name).grad.abs().sum() > 0 for name in FACTORS)
    assert all(torch.isfinite(getattr(sae, name).grad).all() for name in FACTORS)
    model.zero_grad()


# Weights & Biases


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B without a network, all of it under the test's folder; gives what is logged, by step."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb").mkdir()
    logged, log = [], wandb.Run.log

    def recording(self, data, step=None, **options):
        logged.append((step, data))
        return log(self, data, step=step, **options)

    monkeypatch.setattr(wandb.Run, "log", recording)
    yield logged
    wandb.teardown()  # it keeps settings for as long as it lives


def test_what_is_logged_to_wandb(model, token_rows, tmp_path, offline):
    """Losses and metrics of logging steps and evaluations are those of the dense computation."""
    runner = make_runner(
        tmp_path,
        token_rows["tiny-gdn"],
        training_tokens=40 * BATCH,
        n_checkpoints=1,
        n_eval_batches=1,
        eval_batch_size_prompts=4,
        feature_sampling_window=25,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=2),
    )
    saes, inputs, tokens = {}, {}, {}
    step, batch = runner.sae.training_forward_pass, runner.activations_store.get_batch_tokens

    def recorded(step_input):
        saes[step_input.n_training_steps] = copy.deepcopy(runner.sae.state_dict())
        inputs[step_input.n_training_steps] = step_input.sae_in
        return step(step_input)

    def drawn(*args, **options):
        out = batch(*args, **options)
        if len(out) == 4:
            tokens.setdefault(max(inputs), []).append(out)
        return out

    runner.sae.training_forward_pass = recorded
    runner.activations_store.get_batch_tokens = drawn
    runner.run()

    training = {n: row for n, row in offline if "losses/overall_loss" in row}
    assert sorted(training) == [9, 19, 29, 39]
    sae = WriteTrainingSAE(copy.deepcopy(runner.sae.cfg))
    for n, row in training.items():
        sae.load_state_dict(saes[n])
        x = inputs[n]
        acts = dense_encode(sae, x)
        squared = (dense_decode(sae, acts) - x).square().sum(-1)
        variance = (x - x.mean(0)).square().sum(-1)
        losses = {key: value for key, value in row.items() if key.startswith("losses/")}
        assert losses.pop("losses/overall_loss") == pytest.approx(sum(losses.values()), rel=1e-4)
        assert row["losses/mse_loss"] == pytest.approx(float(squared.mean()), rel=1e-3)
        explained = float(1 - squared.mean() / variance.mean())
        assert row["metrics/explained_variance"] == pytest.approx(explained, abs=1e-3)
        assert row["metrics/l0"] == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-3)
        assert row["details/n_training_samples"] == (n + 1) * BATCH
        assert all(math.isfinite(value) for value in row.values())

    evaluations = {n: row for n, row in offline if "model_performance_preservation" in row}
    assert sorted(evaluations) == [19, 39]
    for n, row in evaluations.items():
        first = tokens[n][0]
        with torch.no_grad():
            native = model(first, return_type="loss")
            zeroed = model.run_with_hooks(
                first, return_type="loss", fwd_hooks=[(HOOK, lambda x, hook: torch.zeros_like(x))]
            )
        ce = row["model_performance_preservation"]
        assert ce["ce_loss_without_sae"] == pytest.approx(float(native), rel=1e-4)
        assert ce["ce_loss_with_ablation"] == pytest.approx(float(zeroed), rel=1e-4)
        assert isinstance(row["weights/encoder_norms"], wandb.Histogram)
    sparsity = {n: row for n, row in offline if "sparsity/below_1e-5" in row}
    assert sorted(sparsity) == [25]

    (file,) = (tmp_path / "wandb").rglob("*.wandb")
    stored = file.read_bytes()
    name = f"sae_tiny-gdn_{HOOK}_64"
    for text in (
        "losses/mse_loss",
        "ce_loss_with_sae",
        "weights/encoder_norms",
        f"{name}_log_feature_sparsity",
    ):
        assert text.encode() in stored


def test_several_saes_log_under_their_own_names(model, token_rows, tmp_path, offline):
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={"a": sae_config(), "b": sae_config()},
            hook_names={"a": model.write_hook_name(1, 0), "b": HOOK},
            model_class_name="HookedRecurrent",
            model_name="tiny-gdn",
            dataset_path="held-out text",
            context_size=CONTEXT,
            prepend_bos=False,
            training_tokens=20 * BATCH,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=8,
            n_batches_in_buffer=8,
            n_eval_batches=1,
            checkpoint_path=None,
            output_path=str(tmp_path / "saes"),
            logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=2),
        ),
        override_dataset=dataset(token_rows["tiny-gdn"]),
    )
    runner.run()
    rows = {n: row for n, row in offline if "a/losses/mse_loss" in row}
    assert sorted(rows) == [9, 19]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert any("b/model_performance_preservation" in row for _, row in offline)
    assert any("b/weights/encoder_norms" in row for _, row in offline)


@pytest.mark.parametrize("model_name", ["Qwen/Qwen3.5-397B-A17B-Instruct", "fla-hub/rwkv7-2.9B-world3-g1"])
def test_artifact_names_of_hub_models_fit(model_name):
    """W&B takes 128 characters."""
    sae = WriteTrainingSAE(sae_config(d_sae=131_072, d_k=2, d_v=2))
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = "blocks.63.linear_attn.hook_write.127"
    name = sae.get_name().replace("/", "__") + "_log_feature_sparsity"
    assert len(name) <= 128
    wandb.Artifact(name, type="model")


def test_wandb_takes_a_model_from_a_long_local_path(token_rows, tmp_path, offline):
    folder = tmp_path / ("a-long-folder-name-" * 4) / "models" / "tiny-gdn"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(zoo.model_path("tiny-gdn"))
    make_runner(
        tmp_path,
        token_rows["tiny-gdn"],
        model_name=str(folder),
        training_tokens=512,
        logger=LoggingConfig(log_to_wandb=True),
    ).run()


# Normalised inputs


def test_expected_average_norm_is_folded_into_raw_units(model, token_rows, tmp_path):
    """After training on inputs times s, coefficients and reconstructions are those of the raw inputs."""
    runner = make_runner(
        tmp_path,
        token_rows["tiny-gdn"],
        sae=sae_config(
            normalize_activations="expected_average_only_in", encoder_bias=True, decoder_bias=True
        ),
        n_batches_for_norm_estimate=4,
        n_checkpoints=1,
        training_tokens=4096,
    )
    folded = runner.sae.fold_activation_norm_scaling_factor
    kept = {}

    def recorded(factor):
        kept.update(sae=copy.deepcopy(runner.sae), factor=factor)
        folded(factor)

    runner.sae.fold_activation_norm_scaling_factor = recorded
    sae = runner.run()
    first = [writes(model, HOOK, rows) for rows in token_rows["tiny-gdn"][:16].split(8)]
    norms = torch.cat(first).norm(dim=-1)
    s = math.sqrt(32 * 48) / float(norms.mean())
    assert kept["factor"] == pytest.approx(s, rel=1e-4)
    (saved,) = checkpoints(runner).values()
    assert json.loads((saved / "activation_scaler.json").read_text())["scaling_factor"] == kept["factor"]

    x = writes(model, HOOK, token_rows["tiny-gdn"][-8:]).flatten(0, 1)
    scaled = dense_encode(kept["sae"], s * x)
    acts = scaled * kept["sae"].W_dec.detach().norm(dim=-1) / s
    recons = dense_decode(kept["sae"], scaled) / s
    assert kept["sae"].b_enc.abs().max() > 1e-4
    for finished in (sae, SAE.load_from_disk(tmp_path / "sae")):
        assert finished.cfg.normalize_activations == "none"
        torch.testing.assert_close(finished.encode(x), acts, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(finished(x), recons, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert (recons - x).square().sum() < 0.9 * x.square().sum()


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_inputs_normalised_at_run_time(model, token_rows, tmp_path, kind):
    rows = token_rows["tiny-gdn"]
    options = {
        "normalize_activations": kind,
        "aux_loss_coefficient": 0.0,
        "decoder_bias": True,
        "init_from_writes": False,
    }
    runner = make_runner(tmp_path, rows, sae=sae_config(**options), training_tokens=2048)
    first = {}
    step = runner.sae.training_forward_pass

    def recorded(step_input):
        before = copy.deepcopy(runner.sae.state_dict()) if not first else None
        output = step(step_input)
        if before is not None:
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
        hooks = [(HOOK, lambda x, hook: expected(sae, x)[1])]
        by_hand = model.run_with_hooks(rows[-8:], fwd_hooks=hooks)
    torch.testing.assert_close(spliced, by_hand, atol=1e-3, rtol=1e-3)
    start = WriteTrainingSAE(sae_config(**options))
    start.load_state_dict(first["weights"])
    squared = (expected(start, first["x"])[1] - first["x"]).square().sum(-1).mean()
    assert first["mse"] == pytest.approx(float(squared), rel=1e-3)


def test_settings_that_would_break_rank_1_are_refused_before_training(tmp_path):
    with pytest.raises(WriteSAEError, match="covariance_whitening"):
        sae_config(normalize_activations="covariance_whitening")
    with pytest.raises(WriteSAEError, match="dead-atom loss"):
        sae_config(normalize_activations="layer_norm")


# Precision and compilation


def test_autocast_leaves_the_factored_step_alone(early, token_rows, tmp_path):
    sae = make_runner(tmp_path, token_rows["tiny-gdn"], autocast=True, training_tokens=EARLY).run()
    assert same_weights(sae, early)


def test_autocast_of_the_model_keeps_the_sae_good(early, model, token_rows, tmp_path):
    sae = make_runner(tmp_path, token_rows["tiny-gdn"], autocast_lm=True, training_tokens=EARLY).run()
    x = writes(model, HOOK, token_rows["tiny-gdn"][-16:])
    assert unexplained(sae, x) < 1.1 * unexplained(early, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_saes_in_other_precisions_train_load_and_splice(early, model, token_rows, tmp_path, dtype):
    rows = token_rows["tiny-gdn"]
    runner = make_runner(tmp_path, rows, sae=sae_config(dtype=dtype), training_tokens=EARLY)
    sae = runner.run()
    kind = getattr(torch, dtype)
    assert {p.dtype for p in sae.parameters()} == {kind}
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert (loaded.dtype, loaded.W_dec.dtype, loaded.cfg.dtype) == (kind, kind, dtype)
    assert same_weights(loaded, sae)
    wide = SAE.load_from_disk(tmp_path / "sae", dtype="float64")
    assert wide.dec_key.dtype == torch.float64
    x = writes(model, HOOK, rows[-16:]).double()
    limit = 1.3 if dtype == "bfloat16" else 1.05
    assert unexplained(wide, x) < limit * unexplained(copy.deepcopy(early).to(dtype=torch.float64), x)
    with torch.no_grad():
        native = model(rows[-2:])
        exact = model.run_with_saes(rows[-2:], saes=[loaded], use_error_term=True)
        logits = model.run_with_saes(rows[-2:], saes=[loaded])
        hooks = [(HOOK, lambda x, hook: dense(wide, x.double()).to(x.dtype))]
        by_hand = model.run_with_hooks(rows[-2:], fwd_hooks=hooks)
    assert logits.dtype == native.dtype
    tolerance = 0.05 if dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(exact, native, atol=tolerance, rtol=tolerance)
    if dtype == "float64":
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)


@pytest.fixture
def unchecked():
    """Without the suite's run-time type checks, which the compiler cannot trace."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"compile_sae": True}, {"compile_llm": True}], ids=["SAE", "model"])
def test_compiled_training_is_the_same_training(early, model, token_rows, tmp_path, unchecked, options):
    sae = make_runner(tmp_path, token_rows["tiny-gdn"], training_tokens=EARLY, **options).run()
    x = writes(model, HOOK, token_rows["tiny-gdn"][-16:])
    assert unexplained(sae, x) == pytest.approx(unexplained(early, x), rel=0.02)
    for name in FACTORS:
        torch.testing.assert_close(getattr(sae, name), getattr(early, name), atol=5e-3, rtol=0)
    assert same_weights(SAE.load_from_disk(tmp_path / "sae"), sae)


# Synthetic data


def synthetic(n_features=24):
    """A feature dictionary of rank-1 matrices, 6 x 9, and what fires of it."""
    torch.manual_seed(3)
    key, value = torch.randn(n_features, 6, 1), torch.randn(n_features, 1, 9)
    features = (key * value).flatten(1)
    dictionary = FeatureDictionary(num_features=n_features, hidden_dim=54)
    dictionary.feature_vectors.data = features / features.norm(dim=1, keepdim=True)
    return dictionary, ActivationGenerator(n_features, firing_probabilities=0.06)


def toy_sae(**options):
    torch.manual_seed(4)
    options = {"d_k": 6, "d_v": 9, "d_sae": 24, "k": 3} | options
    return WriteTrainingSAE(WriteSAETrainingConfig(**options))


def test_a_toy_sae_finds_rank_1_features():
    """Features are matrices of rank 1; sums of a few of them are not, and take the dense path."""
    dictionary, generator = synthetic()
    sae, snapshots = toy_sae(), []
    start = sae.W_dec.detach()
    train_toy_sae(
        sae,
        dictionary,
        generator,
        training_samples=100_000,
        batch_size=512,
        lr=5e-3,
        n_snapshots=2,
        snapshot_fn=lambda trainer: snapshots.append(trainer.n_training_samples),
    )
    features = dictionary.feature_vectors.detach()

    def found(atoms):
        return (atoms @ features.T).abs().amax(0).mean()

    assert found(start) < 0.5
    assert found(sae.W_dec.detach()) > 0.85
    assert len(snapshots) == 2

    torch.manual_seed(0)
    result = eval_sae_on_synthetic_data(sae, dictionary, generator, num_samples=2000)
    torch.manual_seed(0)
    acts = generator.sample(2000)
    x = acts @ features
    latents = dense_encode(sae, x)
    recons = dense_decode(sae, latents)
    explained = 1 - (recons - x).square().sum(-1).mean() / (x - x.mean(0)).square().sum(-1).mean()
    assert result.explained_variance == pytest.approx(float(explained), abs=1e-4)
    assert result.sae_l0 == pytest.approx(float((latents > 0).sum(-1).float().mean()), rel=1e-3)
    assert result.true_l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()), rel=1e-5)
    assert result.explained_variance > 0.5
    assert result.mcc > 0.8


def test_plots_of_synthetic_features_show_the_dense_cosines(monkeypatch):
    dictionary, _ = synthetic()
    sae, figures = toy_sae(), []
    monkeypatch.setattr(plotly.graph_objects.Figure, "show", lambda self: figures.append(self))
    plot_sae_feature_similarity(sae, dictionary)
    features = dictionary.feature_vectors.detach()
    for trace, directions in zip(figures[0].data, (sae.W_enc.T, sae.W_dec), strict=True):
        expected = torch.nn.functional.cosine_similarity(directions.detach()[:, None], features[None], dim=-1)
        torch.testing.assert_close(torch.tensor(trace.z), expected, atol=0.0051, rtol=0)
    order = find_best_feature_ordering_from_sae(sae, dictionary)
    assert sorted(order.tolist()) == list(range(24))
    plot_sae_feature_similarity(sae, dictionary, reorder_features=order, decoder_only=True)
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec.detach()[:, None], features[None], dim=-1)
    best = cosines.abs().argmax(1)[order]
    assert best.tolist() == sorted(best.tolist())


@pytest.mark.xfail(
    strict=True, reason="SAELens assigns W_enc.data and W_dec.data, which here are built at each access"
)
def test_an_sae_is_set_to_a_feature_dictionary():
    dictionary, _ = synthetic()
    sae = toy_sae()
    init_sae_to_match_feature_dict(sae, dictionary)
    torch.testing.assert_close(sae.W_dec.detach(), dictionary.feature_vectors.detach())


def test_the_synthetic_runner_trains_evaluates_and_saves(tmp_path):
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=54, seed=0),
            sae=WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=24, k=4, rank=2),
            training_samples=20_480,
            batch_size=512,
            lr=3e-3,
            eval_samples=2000,
            n_checkpoints=1,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=str(tmp_path / "out"),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    result = runner.run()
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert isinstance(loaded, WriteSAE)
    assert same_weights(loaded, result.sae)
    saved = json.loads((tmp_path / "out" / "runner_config.json").read_text())
    assert SyntheticSAERunnerConfig.from_dict(saved).sae == runner.cfg.sae
    features = result.synthetic_model.feature_dict.feature_vectors.detach()
    cosines = torch.nn.functional.cosine_similarity(loaded.W_dec.detach()[:, None], features[None], dim=-1)
    assert result.final_eval.mcc <= float(cosines.abs().amax(1).mean()) + 1e-4
    x = result.synthetic_model.sample(2000)
    assert unexplained(loaded, x.detach()) < 1
    assert TrainingSAE.load_from_disk(tmp_path / "checkpoints" / "10752").cfg.rank == 2


def test_synthetic_data_of_another_width_are_refused(tmp_path):
    """SAELens overwrites d_in of a config that does not fit; a WriteSAE of another shape cannot follow."""
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=60, seed=0),
        sae=WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=24, k=4),
        training_samples=512,
        batch_size=512,
        output_path=None,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with pytest.raises(WriteSAEError, match="6 x 9"):
        SyntheticSAERunner(cfg).run()


# Objects and files


def test_from_dict_builds_the_same_kind_of_sae(run):
    sae = SAE.load_from_disk(run.saved)
    for original, kind in ((sae, WriteSAE), (run.sae, WriteTrainingSAE)):
        base = SAE if kind is WriteSAE else TrainingSAE
        built = base.from_dict(original.cfg.to_dict())
        assert type(built) is kind
        assert built.cfg.to_dict() == original.cfg.to_dict()
        stored = base.from_dict(json.loads(json.dumps(original.cfg.to_dict())))
        assert json.dumps(stored.cfg.to_dict()) == json.dumps(original.cfg.to_dict())
        assert {n: p.shape for n, p in built.named_parameters()} == {
            n: p.shape for n, p in original.named_parameters()
        }


def test_copies_are_independent_and_conversions_complete(run, model, token_rows):
    sae = SAE.load_from_disk(run.saved)
    x = writes(model, HOOK, token_rows["tiny-gdn"][-4:])
    expected = dense(sae, x)
    twin = copy.deepcopy(sae)
    with torch.no_grad():
        twin.dec_key.zero_()
    torch.testing.assert_close(sae(x), expected, atol=1e-5, rtol=1e-4)
    wide = copy.deepcopy(sae).to(dtype=torch.float64)
    assert (wide.cfg.dtype, wide.dtype) == ("float64", torch.float64)
    torch.testing.assert_close(wide(x.double()), dense(wide, x.double()))
    torch.testing.assert_close(wide(x.double()).float(), expected, atol=1e-5, rtol=1e-4)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    error = (dense(half.to(torch.float32), x) - x).square().sum()
    assert error < 1.1 * (expected - x).square().sum() + 1e-3


@pytest.mark.parametrize("cls", [SAE, TrainingSAE])
def test_loading_fills_every_tensor(run, tmp_path, cls):
    """SAELens builds on the meta device and then assigns: nothing may be left behind there."""
    run.sae.save_model(tmp_path / "sae") if cls is TrainingSAE else run.sae.save_inference_model(
        tmp_path / "sae"
    )
    sae = cls.load_from_disk(tmp_path / "sae", device="cpu")
    tensors = dict(sae.named_parameters()) | dict(sae.named_buffers())
    tensors |= {n: v for n, v in vars(sae).items() if isinstance(v, torch.Tensor)}
    assert all(v.device.type == "cpu" and torch.isfinite(v).all() for v in tensors.values())
    assert (sae.cfg.device, sae.device) == ("cpu", torch.device("cpu"))
    assert same_weights(sae, run.sae)


def test_folding_decoder_norms_on_loading_changes_nothing(run, model, token_rows):
    x = writes(model, HOOK, token_rows["tiny-gdn"][-4:])
    plain = SAE.load_from_disk(run.saved)
    folded = SAE.load_from_disk(run.saved, fold_W_dec_norm=True)
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(64))
    torch.testing.assert_close(folded(x), dense(plain, x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(folded.encode(x), dense_encode(plain, x), atol=1e-5, rtol=1e-4)


def test_an_sae_runs_with_its_own_hooks_and_cache(run, model, token_rows):
    sae = SAE.load_from_disk(run.saved)
    x = writes(model, HOOK, token_rows["tiny-gdn"][-4:])
    acts = dense_encode(sae, x)
    out, cache = sae.run_with_cache(x)
    torch.testing.assert_close(cache["hook_sae_acts_post"], acts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache["hook_sae_output"], out)
    off = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda a, hook: 0 * a)])
    torch.testing.assert_close(off, sae.b_dec.detach().expand_as(x))


def test_a_training_step_of_the_stock_interface(run, model, token_rows):
    """training_forward_pass on one batch: every loss is the dense one."""
    x = writes(model, HOOK, token_rows["tiny-gdn"][-4:]).flatten(0, 1)
    output = run.sae.training_forward_pass(
        step_input=TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=torch.zeros(64, dtype=torch.bool),
            n_training_steps=0,
            is_logging_step=True,
        )
    )
    acts = dense_encode(run.sae, x)
    recons = dense_decode(run.sae, acts)
    best = run.sae.W_dec[acts.argmax(-1)]
    cosine = torch.nn.functional.cosine_similarity(best, x)[acts.amax(-1) > 0]
    squared = x.square().sum(-1).mean()
    assert output.losses["mse_loss"].item() == pytest.approx(
        float((recons - x).square().sum(-1).mean()), rel=1e-3
    )
    alignment = run.sae.cfg.write_alignment_coefficient * squared * (1 - cosine).mean()
    assert output.losses["write_alignment_loss"].item() == pytest.approx(alignment.item(), rel=1e-3)
    torch.testing.assert_close(output.sae_out, recons, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.feature_acts, acts, atol=1e-5, rtol=1e-4)


def test_an_sae_has_its_own_hook_names_again_after_a_spliced_run(run, model, token_rows):
    sae = SAE.load_from_disk(run.saved)
    tokens = token_rows["tiny-gdn"][-2:]
    with torch.no_grad():
        model.run_with_saes(tokens, saes=[sae])
        _, cache = sae.run_with_cache(writes(model, HOOK, tokens))
    assert "hook_sae_acts_post" in cache
