"""Training that goes on from the folder that a runner leaves, and from checkpoints: of the same SAE only."""

import json

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig

from tests.writesae_lens.saelens.runs import (
    BATCH,
    CELLS,
    EARLY,
    FACTORS,
    HOOK,
    checkpoints,
    make_multi_runner,
    make_runner,
    sae_config,
    same_weights,
    writes,
)
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, WriteTrainingSAE

SHORT = {"training_tokens": BATCH, "output_path": None}


def going_on(folder, rows, path, **options):
    return make_runner(folder, rows, from_pretrained_path=str(path), **(SHORT | options)).run()


@pytest.mark.parametrize("name", CELLS)
def test_training_goes_on_from_the_folder_that_the_runner_leaves(runs, models, token_rows, tmp_path, name):
    """At learning rate 0 the SAE that was saved; at another its weights, moved by one step of Adam."""
    run, cell, rows = runs(name), models[name].cell(*CELLS[name]), token_rows[name]
    own = {"model_name": name, "hook_name": models[name].write_hook_name(cell.layer, cell.head)}
    own["sae"] = sae_config(d_k=cell.d_k, d_v=cell.d_v)
    saved = SAE.load_from_disk(run.saved)
    still = going_on(tmp_path / "still", rows, run.saved, lr=0.0, **own)
    assert type(still) is WriteTrainingSAE
    assert same_weights(still, saved)
    x = writes(models[name], own["hook_name"], rows[-4:])
    torch.testing.assert_close(still(x), saved(x))
    moved = going_on(tmp_path / "moved", rows, run.saved, lr=1e-3, output_path=str(tmp_path / "out"), **own)
    for factor in FACTORS:
        step = (saved.state_dict()[factor] - moved.state_dict()[factor]).abs().max()
        assert 0 < step < 2e-3  # one step of Adam, and the atoms back at norm 1
    assert same_weights(SAE.load_from_disk(tmp_path / "out"), moved)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "gated"])
def test_trained_thresholds_and_gates_go_on(rows, model, tmp_path, activation):
    sae = sae_config(activation=activation, encoder_bias=True, decoder_bias=True)
    first = make_runner(tmp_path, rows, sae=sae, training_tokens=4 * BATCH).run()
    saved = SAE.load_from_disk(tmp_path / "sae")
    x = writes(model, HOOK, rows[-4:])
    still = going_on(tmp_path / "still", rows, tmp_path / "sae", lr=0.0, sae=sae)
    for name, trained in first.activation_fn.named_parameters():
        parameter = still.activation_fn.get_parameter(name)
        assert bool((parameter != 0).any())
        # A threshold of BatchTopK goes a hundredth of the way to the next batch's.
        assert float((parameter - trained).detach().abs().max()) <= 0.1 * (activation == "batchtopk")
    if activation != "batchtopk":
        torch.testing.assert_close(still(x), saved(x))


def test_the_options_of_the_run_hold_for_the_saved_sae(run, rows, tmp_path):
    """k, losses and dtype are those of the run, which SAELens would forget; where it was trained is new."""
    options = {"k": 2, "write_alignment_coefficient": 0.0, "resample_every": 7, "dtype": "float64"}
    runner = make_runner(tmp_path, rows, sae=sae_config(**options), from_pretrained_path=str(run.saved))
    assert {name: getattr(runner.sae.cfg, name) for name in options} == options
    assert runner.sae.activation_fn.k == 2
    assert runner.sae.dec_key.dtype == torch.float64
    assert same_weights(runner.sae.to(dtype=torch.float32), SAE.load_from_disk(run.saved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_sae": 128}, "d_sae=64 there and 128 here"),
        ({"rank": 2}, "rank=1 there and 2 here"),
        ({"encoder": "dense"}, "encoder='bilinear' there and 'dense' here"),
        ({"activation": "jumprelu"}, "activation='topk' there and 'jumprelu' here"),
        ({"d_k": 48, "d_v": 32}, "d_k=32 there and 48 here"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations='none' there"),
    ],
)
def test_a_saved_sae_of_another_form_is_refused(run, rows, tmp_path, options, message):
    with pytest.raises(WriteSAEError, match=f"an SAE of another form: .*{message}"):
        going_on(tmp_path, rows, run.saved, sae=sae_config(**options))


def test_a_saved_sae_of_another_type_is_refused(run, rows, tmp_path):
    flat = TopKTrainingSAEConfig(d_in=1536, d_sae=64, k=4)
    with pytest.raises(WriteSAEError, match="architecture='writesae' there and 'topk' here"):
        going_on(tmp_path, rows, run.saved, sae=flat)
    published = WriteSAEConfig(d_k=32, d_v=48, d_sae=64, k=4, rescale_acts_by_decoder_norm=False)
    WriteSAE(published).save_model(tmp_path / "published")
    with pytest.raises(WriteSAEError, match="such as a published checkpoint, cannot be trained on"):
        going_on(tmp_path, rows, tmp_path / "published")
    (tmp_path / "published" / "cfg.json").write_text("[")
    with pytest.raises(WriteSAEError, match="cannot be read as JSON"):
        going_on(tmp_path, rows, tmp_path / "published")


# Checkpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sae": sae_config(d_sae=128)}, "is of another SAE: d_sae=64 there and 128 here"),
        ({"sae": sae_config(k=2)}, "is of another SAE: k=4 there and 2 here"),
        ({"hook_name": HOOK[:-1] + "3"}, "is of another SAE: hook_name='.*2' there and '.*3' here"),
        ({"sae": sae_config(activation="batchtopk")}, "activation='topk' there"),
        ({"lr": 5e-3}, "would override the new settings: lr=0.002 there and 0.005 here"),
        ({"lr_scheduler_name": "cosineannealing"}, "lr_scheduler_name='constant' there"),
        ({"adam_beta1": 0.5}, "adam_beta1=0.9 there and 0.5 here"),
        ({"model_name": "tiny-rwkv7"}, "on other data: model_name='tiny-gdn' there and 'tiny-rwkv7'"),
        ({"dataset_path": "other/text.txt"}, "on other data: dataset_path='.*' there and 'text.txt'"),
        ({"prepend_bos": True}, "on other data: prepend_bos=False there and True here"),
    ],
)
def test_a_run_resumes_with_the_settings_of_its_checkpoint(run, rows, tmp_path, options, message):
    path = checkpoints(run.runner)[EARLY]
    with pytest.raises(WriteSAEError, match=message):
        make_runner(tmp_path, rows, resume_from_checkpoint=str(path), **options)
    several = dict(options)
    saes, hooks = {"a": several.pop("sae", sae_config())}, {"a": several.pop("hook_name", HOOK)}
    (tmp_path / "of several").mkdir()
    (tmp_path / "of several" / "a").symlink_to(path)
    (tmp_path / "of several" / "runner_cfg.json").symlink_to(path / "runner_cfg.json")
    with pytest.raises(WriteSAEError, match=message):
        make_multi_runner(
            tmp_path, rows, hooks, saes=saes, resume_from_checkpoint=str(tmp_path / "of several"), **several
        )


def test_more_tokens_need_a_schedule_that_has_no_end(run, rows, tmp_path):
    """A constant learning rate goes on for ever; an annealed one would rise again behind its end."""
    path = checkpoints(run.runner)[EARLY]
    make_runner(tmp_path, rows, resume_from_checkpoint=str(path), training_tokens=8192)
    annealed = json.loads((path / "runner_cfg.json").read_text()) | {"lr_scheduler_name": "cosineannealing"}
    (tmp_path / "cfg.json").write_text((path / "cfg.json").read_text())
    (tmp_path / "runner_cfg.json").write_text(json.dumps(annealed))
    with pytest.raises(WriteSAEError, match="training_tokens=4096 there and 8192 here"):
        make_runner(
            tmp_path / "out",
            rows,
            resume_from_checkpoint=str(tmp_path),
            training_tokens=8192,
            lr_scheduler_name="cosineannealing",
        )
