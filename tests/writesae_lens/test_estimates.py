"""The dry runs: counts of what experiments run, unit costs, and estimates beside what is measured."""

import re
import time

import pytest
import torch

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run as run_command
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAETrainingConfig
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.reproduce import estimate
from writesae_lens.reproduce.paper import CONFIGS, SIZES
from writesae_lens.reproduce.training_costs import n_trained, step_seconds, training_bytes
from writesae_lens.reproduce.units import Size, Speeds, Units
from writesae_lens.reproduce.work import Text, Work, work_of
from writesae_lens.saelens.runner import train_cells

MAIN = "qwen3.5-0.8b-L9H4"


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def units(model):
    return Units.of_model(model, 1)


def counted(model, run):
    """Tokens through the first layer's mixer and through the last layer, of a call."""
    seen = {"below": 0, "above": 0}

    def count(name):
        def hook(module, given, options):
            x = given[0] if given else next(iter(options.values()))
            seen[name] += x.shape[:-1].numel()

        return hook

    layers = {"below": model.mixers[0], "above": model.blocks[-1]}
    handles = [m.register_forward_pre_hook(count(name), with_kwargs=True) for name, m in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("replace", {"max_firings": 16, "baselines": False}),
        ("formula", {"n_atoms": 4, "max_horizon": 4}),
        ("sign", {"n_trials": 16}),
        ("splice", {}),
        ("selectivity", {"n_atoms": 4, "n_positions": 2}),
        ("contexts", {}),
    ],
)
def test_counts_are_near_what_an_experiment_runs(model, name, options):
    cell = model.cell(1, 1)
    torch.manual_seed(0)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=64, k=2))
    sae.cfg.metadata.hook_name = model.write_hook_name(1, 1)
    tokens = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)[:, :96].view(2, 48)
    run = EXPERIMENTS[name].function
    seen = counted(model, lambda: run(model, sae, tokens, verbose=False, **options))
    work = work_of(EXPERIMENTS[name], Text(2, 48, 64, codes=False), options)
    # Rows with a derivative pass once forward and are counted twice.
    derived = {"formula": 1.6, "sign": 1.5}.get(name, 1.0)
    assert work.above == pytest.approx(seen["above"] * derived, rel=0.5)
    assert work.below == pytest.approx(seen["below"], rel=0.5)


def test_every_declared_experiment_is_counted_by_its_own_options():
    text = Text(8, 64, 128)
    for entry in EXPERIMENTS.values():
        work = work_of(entry, text)
        assert work.below >= text.positions / 2, entry.name
        assert all(count >= 0 for count in work)
    more = {"replace": {"horizon": 8}, "formula": {"n_atoms": 100}, "install": {"n_refinements": 40}}
    more |= {"erase": {"doses": (1.0,) * 8}, "amplify": {"n_tokens": 400}, "sign": {"n_trials": 9000}}
    for name, options in more.items():
        assert work_of(EXPERIMENTS[name], text, options).above > work_of(EXPERIMENTS[name], text).above


def test_unit_costs_of_a_model_predict_its_passes(model, units):
    tokens = torch.randint(0, model.cfg.d_vocab, (2, 256))
    start = time.process_time()
    with torch.no_grad():
        for _ in range(4):
            model(tokens, use_cache=False)
    spent = (time.process_time() - start) / torch.get_num_threads()
    expected = units.seconds(Work(2048, 2048, 2048, 0, 4))
    assert spent / 4 < expected < spent * 4  # the machine may be busy


def test_unit_costs_of_published_sizes_are_operations_over_speed():
    speeds = Speeds(product=1e12, wide_product=5e11, compared=1e9, read=1e10)
    size = Size(1e9, n_layers=10, d_model=1000, d_vocab=100_000, tied=True)
    units = Units.of_size(size, 3, speeds, 2)
    assert units.below + units.above == pytest.approx(2 * 0.9e9 / 1e12 / 0.67)
    assert units.below / (units.below + units.above) == pytest.approx(0.4)
    assert units.unembedded == pytest.approx(2 * 1e8 / 5e11 / 0.67)
    assert units.compared == pytest.approx(1e-4)
    assert units.call == pytest.approx(0.2)
    untied = Units.of_size(size._replace(tied=False), 3, speeds, 2)
    assert untied.below + untied.above == pytest.approx(2 * 0.8e9 / 1e12 / 0.67)


def test_this_machines_speeds_are_measured(model):
    speeds = Speeds.of()
    assert all(1e6 < speed < 1e15 for speed in speeds)
    size = Size.of(model)
    assert (size.n_layers, size.d_model, size.d_vocab) == (4, model.cfg.d_model, model.cfg.d_vocab)
    assert size.n_parameters == sum(p.numel() for p in model.original_model.parameters())
    assert set(SIZES) >= {paper.base for paper in CONFIGS.values()}


def test_training_costs(model):
    speeds = Speeds(1e11, 1e11, 1e8, 1e10)
    codes = WriteSAETrainingConfig.recommended(d_k=32, d_v=48)
    assert n_trained(codes) == 2 * (1024 * 32 + 1024 * 48)
    assert 1e-4 < step_seconds(codes, 256, "write") < 10
    paper = WriteSAETrainingConfig.paper(d_k=8, d_v=8, d_sae=64, k=4)
    assert 1e-5 < step_seconds(paper, 16, "state", speeds=speeds) < 10
    size = Size.of(model)
    one, four = (training_bytes(size, [codes] * n, "write", 256, 4) for n in (1, 4))
    assert one < four < 4 * one
    assert training_bytes(size, [paper], "state", 256, 4) > 16 * n_trained(paper)


def seconds_in(text):
    number, unit = re.search(r"time: about ([\d.,]+) (\w+)", text).groups()
    return float(number.replace(",", "")) * {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}[unit]


def test_a_dry_run_of_train_is_near_the_training(model, tmp_path):
    text = run_command(
        "train", "--model_name", "tiny-gdn", "--cells", "1:1", "--training_tokens", "8192", "--dry-run",
        cwd=tmp_path,
    ).stdout  # fmt: skip
    assert "model tiny-gdn: 1.2 M parameters; 1 cell, up to layer 1" in text
    assert "1,024 key codes and 1,024 value codes, 16 and 16 active" in text
    assert "training: 8,192 tokens" in text
    assert re.search(r"memory: at most \d\.\d\d GiB", text)
    assert not list(tmp_path.iterdir())
    start = time.perf_counter()
    train_cells(model, [(1, 1)], tmp_path / "sae", 8192)
    spent = time.perf_counter() - start
    assert spent / 10 < seconds_in(text) < spent * 10  # a short training is mostly its start


def test_estimates_follow_options():
    few = estimate(MAIN, "tiny-gdn", 50_000, experiments=("splice",))
    assert "training: 50,000 tokens" in few
    assert "replace" not in few
    assert seconds_in(few) < seconds_in(
        estimate(MAIN, "tiny-gdn", 500_000, experiments=("splice", "replace"))
    )
    with pytest.raises(HookedModelError, match="'dance'"):
        estimate(MAIN, experiments=("dance",))
    with pytest.raises(HookedModelError, match="'tiny-gdnn'"):
        estimate(MAIN, "tiny-gdnn")
