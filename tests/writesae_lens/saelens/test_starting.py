"""How a run begins: settings that cannot be followed, the model class, sizes, and text on this machine."""

import json

import datasets
import numpy as np
import pytest
from sae_lens import (
    CacheActivationsRunner,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.training.activations_store import ActivationsStore

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.saelens.runs import (
    CONTEXT,
    HOOK,
    SETTINGS,
    cache_runner,
    dataset,
    make_multi_runner,
    make_runner,
    sae_config,
)
from writesae_lens import WriteSAEError
from writesae_lens.saelens import starting, upstream
from writesae_lens.saelens.texts import local_text

SCALED = sae_config(normalize_activations="expected_average_only_in")
COSINE = {"lr_scheduler_name": "cosineannealing"}
REFUSED = [
    (
        {"training_tokens": 100},
        "less than one batch of train_batch_size_tokens=128: nothing would",
    ),
    ({"training_tokens": 0}, "nothing would be trained"),
    ({"training_tokens": 1000.5}, "training_tokens must be a whole number"),
    ({"train_batch_size_tokens": -1}, "train_batch_size_tokens must be a whole number of at least 1, got -1"),
    ({"train_batch_size_tokens": 128.0}, "train_batch_size_tokens must be a whole number"),
    ({"store_batch_size_prompts": 0}, "store_batch_size_prompts must be"),
    (
        {"n_batches_in_buffer": 3},
        "Buffer size must be .*=3 times context_size=32 are 96 writes, less.*_in_buffer to 4 or more",
    ),
    ({"seqpos_slice": (0, 8)}, "=8 times 8 positions are 64 writes, less"),
    ({"lr": -1.0}, "lr must be a finite number"),
    ({"lr": float("nan")}, "lr must be a finite number"),
    ({"lr": float("inf")}, "lr must be a finite number"),
    (COSINE | {"lr_end": 1.0}, "lr_end=1.0 is above lr=0.002"),
    (COSINE | {"lr_warm_up_steps": 32}, "leave 0 to cosineannealing, which needs 1"),
    (COSINE | {"lr_warm_up_steps": 99}, "leave -67 to cosineannealing"),
    ({"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 99}, "needs 99"),
    ({"lr_scheduler_name": "cosine"}, "'cosine' is unknown: choose constant"),
    ({"lr_warm_up_steps": 2.5}, "lr_warm_up_steps must be a whole number"),
    (COSINE | {"lr_decay_steps": 32}, "lr_decay_steps=32, leave 0 to cosineannealing"),
    ({"dead_feature_window": -1}, "dead_feature_window must be"),
    ({"feature_sampling_window": 0}, "feature_sampling_window must be"),
    ({"activations_mixing_fraction": float("nan")}, "activations_mixing_fraction must be between 0 and 1"),
    ({"n_checkpoints": 2, "checkpoint_path": None}, "n_checkpoints=2 but no place for checkpoints"),
    ({"save_final_checkpoint": True, "checkpoint_path": None}, "no place for checkpoints"),
    ({"n_checkpoints": -1}, "n_checkpoints must be"),
    ({"dtype": "bfloat16"}, "dtype='bfloat16' of the runner does not change the SAE, which is in float32"),
    ({"dtype": "flaot32"}, "Invalid dtype"),
    ({"device": "gpu"}, "device: device 'gpu' cannot be used"),
    ({"act_store_device": "no"}, "act_store_device: device 'no' cannot be used"),
    ({"resume_from_checkpoint": "no/where"}, "no/where is no checkpoint"),
]
OF_ONE = [
    ({"from_pretrained_path": "no/where"}, "from_pretrained_path='no/where' holds no SAE"),
    (
        {
            "sae": sae_config(normalize_activations="expected_average_only_in"),
            "n_batches_for_norm_estimate": 0,
        },
        "n_batches_for_norm_estimate=0",
    ),
]


def message_of(value):
    return value if isinstance(value, str) else None


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded: what is wrong is wrong before that."""

    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(HookedRecurrent, "boot_transformers", loads)


@pytest.mark.parametrize(("options", "message"), REFUSED + OF_ONE, ids=message_of)
def test_settings_that_cannot_be_followed_are_refused_before_a_model_is_loaded(
    unloaded, rows, tmp_path, options, message
):
    with pytest.raises(WriteSAEError, match=message):
        make_runner(tmp_path, rows, **options)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=message_of)
def test_the_runner_for_several_refuses_the_same(unloaded, rows, tmp_path, options, message):
    with pytest.raises(WriteSAEError, match=message):
        make_multi_runner(tmp_path, rows, {"a": HOOK}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"training_tokens": 256.0, "n_checkpoints": 1},
        {"lr": 0.0},
        {"lr_warm_up_steps": 99},
        {"dead_feature_window": 0},
        {"seqpos_slice": (2, 20)},
        {"activations_mixing_fraction": 0.9},
        COSINE | {"lr_warm_up_steps": 1},
        {"training_tokens": 128},
    ],
    ids=str,
)
def test_settings_that_can_be_followed_are(model, rows, tmp_path, options):
    options = {"training_tokens": 256, "sae": sae_config(), "hook_name": HOOK, "verbose": False} | options
    options |= {"checkpoint_path": str(tmp_path / "ck"), "output_path": None}
    cfg = LanguageModelSAERunnerConfig(**(SETTINGS | options))
    cfg.logger.log_to_wandb = False
    sae = LanguageModelSAETrainingRunner(cfg, dataset(rows), override_model=model).run()
    assert all(bool(p.isfinite().all()) for p in sae.parameters())
    assert len(list((tmp_path / "ck").rglob("cfg.json"))) == options.get("n_checkpoints", 0)


# The model class


@pytest.mark.parametrize(
    "given", ["HookedTransformer", "HookedMamba", "AutoModelForCausalLM", "HookedRecurent"]
)
@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7", "some/model"])
def test_a_forgotten_model_class_is_named(models, rows, tmp_path, name, given):
    """For the writes of any model, also one that is not here; for an SAE of SAELens; in all three runners."""
    model = models.get(name, models["tiny-gdn"])
    hook = model.hook_name(model.cells[0].layer, "state", 0)
    options = {"model_name": name, "model_class_name": given}
    message = (
        f'{hook} is a hook of a recurrent model: set model_class_name="HookedRecurrent" .found {given!r}'
    )
    flat = TopKTrainingSAEConfig(d_in=1536, d_sae=64, k=4)
    for call in (
        lambda: make_runner(tmp_path, rows, hook_name=hook, **options),
        lambda: make_runner(tmp_path, rows, hook_name=hook, sae=flat, **options),
        lambda: make_multi_runner(tmp_path, rows, {"a": hook}, **options),
        lambda: cache_runner(tmp_path, rows, hook, 2048, **options),
    ):
        with pytest.raises(WriteSAEError, match=message) as caught:
            call()
        assert len(str(caught.value)) < 200


def test_a_model_that_saelens_does_not_know_is_told_in_one_line(rows, tmp_path):
    options = {"model_class_name": "HookedTransformer", "model_name": "Qwen/Qwen3.5-0.8B"}
    hook = "blocks.0.hook_resid_post"
    with pytest.raises(WriteSAEError, match='set model_class_name="HookedRecurrent"') as caught:
        make_runner(tmp_path, rows, hook_name=hook, **options)
    assert len(str(caught.value)) < 400
    # A run that has nothing to do with this package is left to SAELens.
    flat = TopKTrainingSAEConfig(d_in=1024, d_sae=64, k=4)
    with pytest.raises(ValueError, match="not found") as caught:
        make_runner(tmp_path, rows, hook_name=hook, sae=flat, **options)
    assert not isinstance(caught.value, HookedModelError)


# Sizes


def config(**options):
    options = {"sae": sae_config(), "hook_name": HOOK, "verbose": False} | options
    cfg = LanguageModelSAERunnerConfig(**(SETTINGS | options))
    cfg.logger.log_to_wandb = False
    return cfg


STATE = "blocks.1.linear_attn.hook_state.2"
FLAT = TopKTrainingSAEConfig(d_in=1500, d_sae=64, k=4)
EXCHANGED = sae_config(d_k=48, d_v=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sae": EXCHANGED}, "48 x 32, but .* gives 32 x 48 = 1536: set d_k=32, d_v=48"),
        ({"sae": EXCHANGED, "hook_name": STATE}, "hook_state.2 gives 32 x 48"),
        ({"sae": EXCHANGED, "hook_name": STATE.replace("state", "erase")}, "hook_erase.2 gives 32 x 48"),
        ({"sae": FLAT}, "the SAE takes 1500 numbers, but .* set d_in=1536"),
        ({"sae": FLAT, "hook_name": STATE}, "set d_in=1536"),
        ({"hook_head_index": 1}, "hook_head_index=1 at .* leave hook_head_index out"),
        ({"sequence_separator_token": 9999}, "the model has 2048 tokens and none of the number 9999"),
        ({"exclude_special_tokens": [1, 2048]}, "exclude_special_tokens: .* none of the number 2048"),
        ({"hook_name": "blocks.2.linear_attn.hook_write.0"}, "no hook point is named"),
    ],
)
def test_an_sae_that_does_not_fit_its_hook_is_refused_by_both_runners(model, rows, options, message):
    with pytest.raises(HookedModelError, match=message):
        LanguageModelSAETrainingRunner(config(**options), dataset(rows), override_model=model)
    several = {"saes": {"a": options.pop("sae", sae_config())}, "hook_names": options.pop("hook_name", HOOK)}
    if "hook_head_index" in options:
        several["hook_head_indices"] = options.pop("hook_head_index")
    cfg = MultiSAETrainingRunnerConfig(**(SETTINGS | several | options))
    with pytest.raises(HookedModelError, match=message):
        MultiSAETrainingRunner(cfg, dataset(rows), override_model=model)


@pytest.mark.parametrize(
    ("hook", "options", "message"),
    [
        (STATE, {"d_in": 1500}, "set d_in=1536"),
        (HOOK, {"buffer_size_gb": 1e-4}, "buffer_size_gb=0.0001 is less than one batch"),
        (HOOK, {"prompts": 0}, "model_batch_size must be a whole number of at least 1"),
        (HOOK, {"device": "gpu"}, "device: device 'gpu' cannot be used"),
    ],
)
def test_a_cache_that_cannot_be_written_is_refused(rows, tmp_path, hook, options, message):
    with pytest.raises(WriteSAEError, match=message):
        cache_runner(tmp_path, rows, hook, 2048, **options)


def test_excluding_every_token_is_no_endless_loop(model, rows, monkeypatch):
    monkeypatch.setattr(starting, "_TOKENS", 1000)
    cfg = config(exclude_special_tokens=list(range(2048)), store_batch_size_prompts=4)
    runner = LanguageModelSAETrainingRunner(cfg, dataset(rows), override_model=model)
    with pytest.raises(WriteSAEError, match="exclude_special_tokens leaves none of 2560 tokens"):
        next(runner.activations_store)


# Text


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The same two documents in every form, and forms that are none."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [zoo.held_out_text()[:3000], zoo.held_out_text()[3000:6000]]
    data = datasets.Dataset.from_dict({"text": documents})
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in documents]))
    (folder / "folder").mkdir()
    (folder / "folder" / "part.jsonl").write_text(lines)
    data.to_csv(folder / "a.csv")
    data.to_csv(folder / "a.tsv", sep="\t")
    data.to_parquet(folder / "a.parquet")
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(folder / "dict")
    (folder / "one.txt").write_text(documents[0] + documents[1])
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00" * 100)
    (folder / "bad.jsonl").write_text("{not json")
    (folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    (folder / "numbers.jsonl").write_text('{"text": 3}\n')
    (folder / "other.jsonl").write_text('{"story": "a"}\n')
    (folder / "a.pdf").write_text("a")
    (folder / "empty").mkdir()
    (folder / "no lines.jsonl").write_text("")
    return folder, documents


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "folder", "saved", "dict", "one.txt"]
)
def test_a_file_or_folder_is_a_text(model, texts, name, streaming):
    folder, documents = texts
    store = ActivationsStore.from_config(
        model, config(dataset_path=str(folder / name), streaming=streaming, prepend_bos=False)
    )
    text = "".join(documents) if name == "one.txt" else documents[0]
    expected = model.to_tokens(text, prepend_bos=False, truncate=False)[0, : 4 * CONTEXT].view(4, CONTEXT)
    assert store.get_batch_tokens(4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "there is no file or folder"),
        ("bad.txt", "cannot be read .UnicodeDecodeError"),
        ("bad.jsonl", "cannot be read"),
        ("bad.parquet", "cannot be read"),
        ("numbers.jsonl", "the column 'text' of .* holds int, not text"),
        ("other.jsonl", "has columns story: it needs one of text or tokens"),
        ("a.pdf", "is no text file: give .txt"),
        ("empty", "cannot be read"),
        ("no lines.jsonl", "cannot be read|is empty"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_in_one_line(model, texts, name, message):
    with pytest.raises(WriteSAEError, match=message) as caught:
        ActivationsStore.from_config(model, config(dataset_path=str(texts[0] / name)))
    assert len(str(caught.value)) < 800


def test_a_name_on_the_hub_is_left_to_saelens():
    assert local_text("monology/pile-uncopyrighted", True) is None


def test_every_replacement_has_its_line_among_the_dependencies():
    places = [d.where.replace(":", ".") for d in upstream.DEPENDENCIES if d.replaced]
    assert all(any(place.endswith(f".{name}") for place in places) for name in starting.REPLACEMENTS)
    assert hasattr(CacheActivationsRunner.__init__, "replaced_by_writesae_lens")


def test_whole_numbers_and_rates_of_numpy_and_whole_steps_worked_out_with_a_slash_are_taken(tmp_path, rows):
    """Settings that were worked out: SAELens trains with them, but cannot save some of them as JSON."""
    options = {"lr_warm_up_steps": 4 / 2, "lr_decay_steps": 1e0, "lr": np.float32(1e-3)}
    cfg = make_runner(tmp_path, rows, train_batch_size_tokens=np.int64(128), **options).cfg
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps, cfg.train_batch_size_tokens) == (2, 1, 128)
    assert json.loads(json.dumps([cfg.train_batch_size_tokens, cfg.lr])) == [128, float(np.float32(1e-3))]
