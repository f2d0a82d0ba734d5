"""`train_cells`: an SAE on each of some cells, with their curves and win rates."""

import pandas as pd
import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    TopKTrainingSAEConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.saelens.runs import sae_config
from writesae_lens import RECOMMENDED_SCHEDULE, WriteSAE, WriteSAEError, WriteTrainingSAE
from writesae_lens.experiments import replacement_test
from writesae_lens.saelens.runner import train_cells

QUICK = {
    "training_tokens": 1024,
    "sae": sae_config(),
    "schedule": {"lr": 2e-3, "train_batch_size_tokens": 128},
    "context_size": 32,
    "store_batch_size_prompts": 8,
    "n_batches_in_buffer": 8,
    "verbose": False,
}
LAYER = [(1, head) for head in range(4)]


def train(model, cells, folder, **options):
    return train_cells(model, cells, folder, **(QUICK | options))


def config_of(monkeypatch, *args, **options):
    """The config of the runner that a call makes, which is not run."""
    made = []
    for runner_class in (LanguageModelSAETrainingRunner, MultiSAETrainingRunner):
        monkeypatch.setattr(runner_class, "run", lambda self: made.append(self))
    train_cells(*args, **options)
    return made[0]


def test_all_heads_of_a_layer_train_from_one_forward_pass(model, tmp_path, monkeypatch):
    """Each in a folder of its own, at its own hook; the model runs once a batch of prompts."""
    passes, run_with_cache = [], HookedRecurrent.run_with_cache
    monkeypatch.setattr(
        HookedRecurrent,
        "run_with_cache",
        lambda self, tokens, *a, **k: passes.append(len(tokens)) or run_with_cache(self, tokens, *a, **k),
    )
    folders = train(model, LAYER, tmp_path)
    assert [f.name for f in folders] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert sum(passes) * 32 <= 2 * 1024
    saes = [SAE.load_from_disk(folder) for folder in folders]
    assert [s.cfg.metadata.hook_name for s in saes] == [model.write_hook_name(*cell) for cell in LAYER]
    assert all(isinstance(s, WriteSAE) and (s.cfg.d_k, s.cfg.d_v, s.cfg.d_sae) == (32, 48, 64) for s in saes)
    assert len({float(s.W_dec.detach().sum()) for s in saes}) == 4
    assert {s.cfg.metadata.dataset_path for s in saes} == {zoo.TEXT_NAME}


@pytest.mark.parametrize(
    ("name", "cell", "options", "hook", "d_in"),
    [
        ("tiny-gdn", (3, 1), {"sae": lambda c: TopKTrainingSAEConfig(d_in=c.d_k * c.d_v, d_sae=64, k=4)},
         "blocks.3.linear_attn.hook_write.1", 1536),
        ("tiny-gdn", (0, 2), {"site": "state"}, "blocks.0.linear_attn.hook_state.2", 1536),
        ("tiny-gdn", "blocks.0.linear_attn.hook_write.0", {}, "blocks.0.linear_attn.hook_write.0", 1536),
        ("tiny-mamba2", (4, 4), {"sae": None, "schedule": None, "n_batches_in_buffer": 64},
         "blocks.4.mixer.hook_write.4", 48 * 32),
    ],
    ids=["another architecture", "states", "a hook", "another model and the recommended recipe"],
)  # fmt: skip
def test_sizes_and_hooks_come_from_the_model(tmp_path, name, cell, options, hook, d_in):
    (folder,) = train(name, [cell], tmp_path / "sae", training_tokens=512, **options)
    sae = SAE.load_from_disk(folder)
    assert folder == tmp_path / "sae"
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name, sae.cfg.d_in) == (hook, name, d_in)
    assert sae.cfg.architecture() == ("topk" if hook.startswith("blocks.3") else "writesae")


def test_a_learning_rate_of_ones_own_brings_its_last_one(model, tmp_path, monkeypatch):
    cfg = config_of(monkeypatch, model, [(1, 0)], tmp_path, 20_000, lr=1e-5).cfg
    assert (cfg.lr, cfg.lr_end, cfg.lr_scheduler_name) == (1e-5, pytest.approx(1e-6), "cosineannealing")
    cfg = config_of(monkeypatch, model, [(1, 0)], tmp_path, 20_000, lr=1e-3, lr_end=1e-4).cfg
    assert (cfg.lr, cfg.lr_end) == (1e-3, 1e-4)


@pytest.mark.parametrize("cells", [[(1, 0)], LAYER])
def test_the_recommended_recipe_is_the_default(model, tmp_path, monkeypatch, cells):
    runner = config_of(monkeypatch, model, cells, tmp_path, 20_000)
    schedule = RECOMMENDED_SCHEDULE
    assert {name: getattr(runner.cfg, name) for name in schedule} == schedule
    saes = [runner.sae] if len(cells) == 1 else runner.saes.values()
    assert {(sae.cfg.decoder, sae.cfg.d_sae, sae.cfg.k) for sae in saes} == {("codes", 2048, 32)}
    assert (runner.cfg.context_size, runner.cfg.prepend_bos, runner.cfg.checkpoint_path) == (256, False, None)
    assert not runner.cfg.logger.log_to_wandb


def test_the_seed_decides(model, tmp_path):
    saes = [
        SAE.load_from_disk(train(model, [(1, 0)], tmp_path / str(i), seed=seed)[0])
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (sae.W_dec.detach() for sae in saes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_and_folders_may_be_given(model, tmp_path):
    folders = [tmp_path / "a" / "sae", tmp_path / "b" / "sae"]
    text = [zoo.held_out_text()[:20_000]]
    assert train(model, LAYER[:2], folders, text=text, dataset_path="mine", training_tokens=256) == folders
    metadata = [SAE.load_from_disk(folder).cfg.metadata for folder in folders]
    assert [(m.hook_name[-1], m.dataset_path) for m in metadata] == [("0", "mine"), ("1", "mine")]


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (LAYER, {"compile_sae": True}, "compile_sae work for one cell"),
        ([(1, 0)], {"win_rate_passages": 2}, "logged to W&B"),
        ([(1, 0)], {"resume_from_checkpoint": "no/where"}, "no/where is no checkpoint"),
        ([(1, 0)], {"model_name": "mine"}, "mine ships with no text"),
        ([(1, 0)], {"text": ["short"]}, "SAELens: .* Dataset may be too small"),
        ([(1, 0), (1, 0)], {}, "2 cells to train on and 1 folders"),
        ([], {}, "0 cells to train on"),
        ([(2, 0)], {}, "no cell at layer 2"),
        (["blocks.1.foo"], {}, "is not the hook of a cell's write or state"),
    ],
)
def test_calls_that_cannot_work_are_refused(model, tmp_path, cells, options, message):
    with pytest.raises(HookedModelError, match=message):
        train(model, cells, tmp_path, **options)


@pytest.mark.parametrize("cells", [[(1, 0)], LAYER])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(model, tmp_path, monkeypatch, cells):
    step, count = WriteTrainingSAE.training_forward_pass, []

    def interrupted(self, step_input):
        count.append(None)
        if len(count) == 13:
            raise KeyboardInterrupt
        return step(self, step_input)

    monkeypatch.setattr(WriteTrainingSAE, "training_forward_pass", interrupted)
    options = {"training_tokens": 4096, "checkpoint_path": str(tmp_path / "checkpoints")}
    with pytest.raises(WriteSAEError, match="interrupted; go on with the same command and --resume") as error:
        train(model, cells, tmp_path, **options)
    checkpoint = str(error.value).rsplit(" ", 1)[1]
    folders = train(model, cells, tmp_path, resume_from_checkpoint=checkpoint, **options)
    assert all(SAE.load_from_disk(folder).cfg.d_sae == 64 for folder in folders)
    # Both parts together made as many steps as a whole run, give or take the interrupted one.
    assert 31 <= len(count) / len(folders) <= 34


def test_an_interrupted_run_without_checkpoints_is_just_interrupted(model, tmp_path, monkeypatch):
    def interrupted(self, step_input):
        raise KeyboardInterrupt

    monkeypatch.setattr(WriteTrainingSAE, "training_forward_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, [(1, 0)], tmp_path)


def first_passages(model, size, count):
    """The first passages of the text as SAELens cuts them: documents one after another, BOS between."""
    ids = []
    for document in zoo.shipped_text()[0]:
        ids += [] if not ids else [model.tokenizer.bos_token_id]
        ids += model.to_tokens(document, prepend_bos=False, truncate=False)[0].tolist()
        if len(ids) >= size * count:
            break
    return torch.tensor(ids[: size * count]).view(count, size)


@pytest.mark.parametrize(
    ("cells", "own_text"), [([(1, 0)], False), ([(1, 0)], True), ([(1, 0), (1, 1)], False)]
)
def test_the_win_rate_is_measured_on_demand(model, tmp_path, monkeypatch, cells, own_text):
    """As `replacement_test` gives it on the same passages, beside SAELens's own evaluations.

    Of the shipped text they are the first of its validation part, of another text its own first ones.
    """
    options = QUICK | {"n_eval_batches": 1, "logger": LoggingConfig(), "win_rate_passages": 2}
    options |= {"text": zoo.shipped_text()[0], "dataset_path": "mine"} if own_text else {}
    validation = model.to_tokens(zoo.text("validation"), prepend_bos=False, truncate=False)[0, :64]
    passages = first_passages(model, 32, 2) if own_text else validation.view(2, 32)
    runner = config_of(monkeypatch, model, cells, tmp_path, **options)
    runner._set_sae_metadata()
    if len(cells) == 1:
        saes = {"": runner.sae}
        metrics = runner.evaluator(runner.sae, iter(()), ActivationScaler())
    else:
        saes = {f"{name}/": sae for name, sae in runner.saes.items()}
        scalers = {name: ActivationScaler() for name in runner.saes}
        metrics = runner.evaluator(
            saes=runner.saes, data_provider=iter(()), activation_scalers=scalers, hook_names={}
        )
    for prefix, sae in saes.items():
        expected = replacement_test(model, sae, passages, baselines=False, verbose=False).summary
        for name in ("median_recovered", "recovered", "win_rate", "median_cosine"):
            assert metrics[f"{prefix}replacement/{name}"] == pytest.approx(expected[name]), name
    assert any(key.endswith("model_performance_preservation") for key in metrics)


# Training curves on disk: rows as they come, of every type of SAE, and over an interruption.

STEPS = 8


def rows_of(folder):
    return pd.read_csv(folder / "training.csv")


def test_every_step_of_a_short_run_has_its_row(model, tmp_path):
    for _ in range(2):  # a second run into the same folder begins a file of its own
        (folder,) = train(model, [(1, 3)], tmp_path / "sae")
        rows = rows_of(folder)
        assert rows.step.tolist() == list(range(STEPS))
    assert (rows.l0 <= 4).all()
    assert rows.dead.iloc[0] == 0
    assert rows.unexplained.between(0, 10).all()
    assert rows.cosine.between(-1, 1).all()
    terms = [name for name in rows if name.endswith("_loss")]
    assert rows[terms].sum(axis=1).to_numpy() == pytest.approx(rows.loss.to_numpy(), rel=1e-5)


@pytest.mark.parametrize("cells", [[(1, 3)], [(1, 2), (1, 3)]])
def test_a_resumed_run_goes_on_in_its_file(model, cells, tmp_path):
    options = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path / "ck")}
    before = rows_of(train(model, cells, tmp_path / "sae", **options)[-1])
    checkpoint = min((tmp_path / "ck").glob("*/*"), key=lambda p: int(p.name.removeprefix("final_")))
    steps = int(checkpoint.name) // 128
    assert 0 < steps < STEPS
    folders = train(model, cells, tmp_path / "sae", resume_from_checkpoint=checkpoint, **options)
    after = rows_of(folders[-1])
    assert after.step.tolist() == list(range(STEPS))
    pd.testing.assert_frame_equal(after[: steps - 1], before[: steps - 1])


def test_saelens_own_types_are_recorded_too(model, tmp_path):
    sae = TopKTrainingSAEConfig(d_in=1536, d_sae=64, k=4)
    rows = rows_of(train(model, [(1, 3)], tmp_path / "sae", sae=sae)[0])
    assert rows.step.tolist() == list(range(STEPS))
    assert rows.unexplained.notna().all()
    assert "cosine" not in rows
