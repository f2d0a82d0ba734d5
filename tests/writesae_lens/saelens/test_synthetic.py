"""SAELens's tools for synthetic data, on features of rank 1."""

import json

import plotly.graph_objects
import pytest
import torch
from sae_lens import SAE, LoggingConfig, TrainingSAE
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

from tests.writesae_lens.saelens.runs import dense_decode, dense_encode, same_weights, unexplained
from writesae_lens import WriteSAE, WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE


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


def test_an_sae_is_not_set_to_a_feature_dictionary_in_appearance_only():
    """SAELens assigns W_enc.data and W_dec.data, which here are built at each access."""
    dictionary, _ = synthetic()
    with pytest.raises(WriteSAEError, match="change of them would be lost"):
        init_sae_to_match_feature_dict(toy_sae(), dictionary)


def synthetic_runner(folder, width, **options):
    cfg = {
        "synthetic_model": SyntheticModelConfig(num_features=24, hidden_dim=width, seed=0),
        "sae": WriteSAETrainingConfig(d_k=6, d_v=9, d_sae=24, k=4, rank=2),
        "batch_size": 512,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "out"),
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SyntheticSAERunner(SyntheticSAERunnerConfig(**(cfg | options)))


def test_the_synthetic_runner_trains_evaluates_and_saves(tmp_path):
    runner = synthetic_runner(
        tmp_path, 54, training_samples=20_480, lr=3e-3, eval_samples=2000, n_checkpoints=1
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
    with pytest.raises(WriteSAEError, match="6 x 9"):
        synthetic_runner(tmp_path, 60, training_samples=512).run()
