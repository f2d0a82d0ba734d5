"""The paper's runs by name."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE

from hooked_models import HookedModelError, HookedRecurrent
from tests.writesae_lens.cli.command_line import run
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.cli import experiments as commands
from writesae_lens.published import releases
from writesae_lens.reproduce import run as reproduce
from writesae_lens.reproduce.run import CONFIGS, estimate

MAIN, ALL, DELTANET = "qwen3.5-0.8b-L9H4", "qwen3.5-0.8b-L9-all", "deltanet-1.3b-L12H8"
COSINE = "partition.register_median_cosine"
# arXiv:2605.12770 v4, text, tables and appendices.
PAPER = {
    "qwen3.5-0.8b-L1H4": {
        "replace.win_rate": 0.939, "replace.median_kl_atom": 2.07, "replace.median_kl_delete": 2.82,
    },
    MAIN: {
        "replace.win_rate": 0.912, "replace.median_kl_atom": 0.40, "replace.median_kl_delete": 1.09,
        "replace.strict_chain_rate": 0.895, "replace.cliffs_delta": 0.825,
        "population.mean_win_rate": 0.8980, "population.win_rate_register": 0.9136,
        "population.win_rate_bundle": 0.8898, "partition.n_register": 222, "partition.n_bundle": 94,
        "partition.n_dead": 1732, "partition.delta_bic": -296, COSINE: 0.262, "formula.median_r2": 0.983,
        "erase.median_delta_logp_firing": -0.116, "sign.agreement": 0.846, "sign.pearson": 0.162,
        "install.by_stratum.rank_100_1000.target_in_continuation": 1.0,
        "install.by_stratum.rank_100_1000.native_target_in_continuation": 0.333,
        "install.target_in_continuation": 0.25, "install.native_target_in_continuation": 0.083,
        "splice.increase_percent": 0.58, "compare.writesae": 0.9125, "compare.flat_svd": 0.9136,
    },
    "qwen3.5-0.8b-L17H4": {
        "replace.win_rate": 0.923, "replace.median_kl_atom": 1.82, "replace.median_kl_delete": 2.58,
    },
    ALL: {"replace.win_rate": 0.8929, "splice.increase_percent": 0.76},
    "qwen3.5-4b-L12H8": {
        "replace.win_rate": 0.48, "formula.median_r2": -0.05, COSINE: 0.152,
        "amplify.by_condition.native.newlines_per_400": 16.8,
        "amplify.by_condition.5x.newlines_per_400": 11.2,
        "amplify.by_condition.random.newlines_per_400": 19.0,
    },
    "qwen3.5-27b-L32H16": {COSINE: 0.085},
    "mamba2-370m-L24H0": {
        "replace.win_rate": 0.8808, "replace.median_kl_atom": 0.97, "replace.median_kl_delete": 1.62,
        "formula.median_r2": -0.07, COSINE: 0.0575, "compare.writesae": 0.8285,
        "compare.flat_svd": 0.7630,
    },
    "rwkv7-1.5b-L12H0": {
        "replace.win_rate": 0.453, COSINE: 0.180, "compare.writesae": 0.453, "compare.flat_svd": 0.478,
    },
    DELTANET: {"replace.win_rate": 0.483, "replace.strict_chain_rate": 0.177, COSINE: 0.997},
    "gla-1.3b-L12H0": {COSINE: 0.110},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Dictionaries of 32 atoms, and experiments on two passages."""
    monkeypatch.setattr(reproduce, "N_ATOMS", 32)
    for name, command in commands.COMMANDS.items():
        monkeypatch.setitem(commands.COMMANDS, name, command._replace(max_passages=2, context_size=64))


@pytest.fixture
def untrained(monkeypatch):
    """Random SAEs in the place of trained ones; how they were to be trained."""
    asked = []

    def train(model, source, folders, sae_of, site, *rest):
        asked.append((site, {cell: sae_of(cell) for cell in folders}))
        for cell, folder in folders.items():
            torch.manual_seed(0)
            sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=16, k=2))
            name_of = model.state_hook_name if site == "state" else model.write_hook_name
            metadata = sae.cfg.metadata
            metadata.model_name, metadata.hook_name = source, name_of(cell.layer, cell.head)
            metadata.context_size = 64
            folder.mkdir(parents=True)
            sae.save_model(folder)

    monkeypatch.setattr(reproduce, "_train", train)
    return asked


def test_every_config_has_a_base_model_and_the_papers_figures():
    assert set(CONFIGS) == set(PAPER)
    for name, paper in CONFIGS.items():
        figures = {f"{of}.{path}": value for (of, path), value in paper.figures.items()}
        assert figures == PAPER[name], name
        assert {of for of, _ in paper.figures} <= set(commands.COMMANDS)
        base = releases.BASE_MODELS[paper.base]
        assert "/" in base.name
        layer, head = re.fullmatch(r".*-L(\d+)(?:H(\d+)|-all)", name).groups()
        assert (paper.layer, paper.head) == (int(layer), None if head is None else int(head))
    assert [name for name, paper in CONFIGS.items() if not paper.decay] == [DELTANET]


@pytest.mark.parametrize("name", CONFIGS)
def test_estimates_mention_sizes(name):
    paper = CONFIGS[name]
    base = releases.BASE_MODELS[paper.base]
    text = estimate(name)
    assert f"{base.name}: {paper.n_parameters / 1e6:,.1f} M parameters" in text
    assert f"{base.d_k} x {base.d_v}" in text
    assert "GiB" in text
    assert "minutes on an H100" in text
    assert f"training: {paper.training_tokens:,} tokens" in text
    assert "training: 12,345 tokens" in estimate(name, training_tokens=12_345)


def test_estimates_for_a_shipped_model_are_its_own():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    n_parameters = sum(p.numel() for p in model.original_model.parameters())
    for name in CONFIGS:
        text = estimate(name, "tiny-gdn")
        assert f"tiny-gdn: {n_parameters / 1e6:,.1f} M parameters" in text
        assert "32 x 48" in text
        assert "training: 600,000 tokens" in text


def test_estimates_do_not_speak_of_another_model_than_asked():
    try:
        text = estimate(MAIN, "tiny-gdnn")
    except HookedModelError:
        return
    assert "base model Qwen/Qwen3.5-0.8B" not in text


def test_estimates_for_all_heads_count_the_models_own():
    def operations(name):
        text = estimate(name, "tiny-gdn", 10**10)
        return float(re.search(r"\(([\d.,]+) PFLOP\)", text)[1].replace(",", ""))

    one, every = operations(MAIN), operations(ALL)
    step = 6 * 2048 * (32 + 48) * 10**10 / 1e15
    assert every - one == pytest.approx(3 * step, rel=0.01)


def test_a_small_run_from_training_to_table_and_again_without_training(small, tmp_path, monkeypatch):
    def go():
        return reproduce.reproduce(
            MAIN, tmp_path, "tiny-gdn", training_tokens=10_000, experiments=("replace", "splice")
        )

    table = go()
    assert list(table) == ["experiment", "figure", "cell", "paper", "ours", "seconds"]
    assert set(table.experiment) == {"replace", "splice"}
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.d_sae == 32
    assert "hook_write" in sae.cfg.metadata.hook_name
    for row in table.itertuples():
        summary = pd.read_json(tmp_path / row.experiment / "summary.json", typ="series")
        assert row.ours == pytest.approx(summary[row.figure])
        expected = PAPER[MAIN].get(f"{row.experiment}.{row.figure}")
        assert pd.isna(row.paper) if expected is None else row.paper == expected
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), table)
    page = (tmp_path / "table.md").read_text()
    assert page.startswith(f"# {MAIN}: tiny-gdn, recipe default")
    win_rate = table.ours[table.figure == "win_rate"].iloc[0]
    assert re.search(rf"\| replace \| win_rate \| \d:\d \| 0.912 \| {win_rate:.4g} \|", page)
    monkeypatch.setattr(reproduce, "_train", lambda *args: pytest.fail("it trained again"))
    monkeypatch.setattr(
        HookedRecurrent, "run_with_swapped_writes", lambda *args: pytest.fail("it replaced again")
    )
    again = go()
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))


def test_all_heads_are_trained_at_once_and_have_a_mean(small, tmp_path):
    table = reproduce.reproduce(ALL, tmp_path, "tiny-gdn", training_tokens=10_000, experiments=("replace",))
    means, heads = table[table.cell == "mean"], table[table.cell != "mean"]
    assert heads.cell.nunique() == 4
    for row in means.itertuples():
        mine = heads[heads.figure == row.figure]
        assert len(mine) == 4
        assert row.ours == pytest.approx(np.mean(mine.ours))
    assert means.paper[means.figure == "win_rate"].tolist() == [0.8929]
    assert set(means.figure) == set(heads.figure)
    hooks = {SAE.load_from_disk(p.parent).cfg.metadata.hook_name for p in tmp_path.glob("*/sae/cfg.json")}
    assert len(hooks) == 4


def decays_of_run(name, model_name, out, monkeypatch):
    """Decays and logits of the model that the experiments get."""
    seen = {}

    def look(model, sae, passages, **options):
        names = [n for n in model.hook_dict if n.endswith("hook_decay")]
        with torch.no_grad():
            logits, cache = model.run_with_cache(passages[:1], names_filter=names)
        seen.update({n: cache[n] for n in names}, logits=logits)
        return commands.experiments.replacement_test(model, sae, passages, **options)

    monkeypatch.setitem(commands.COMMANDS, "replace", commands.COMMANDS["replace"]._replace(function=look))
    reproduce.reproduce(name, out, model_name, experiments=("replace",))
    logits = seen.pop("logits")
    return torch.stack([x.exp() if bool((x <= 0).all()) else x for x in seen.values()]), logits


def test_the_stand_in_for_deltanet_does_not_decay(small, untrained, tmp_path, monkeypatch):
    decays, logits = decays_of_run(DELTANET, "tiny-gdn", tmp_path / "delta", monkeypatch)
    assert len(decays)
    assert (decays == 1).all()
    assert logits.isfinite().all()


def test_other_runs_decay(small, untrained, tmp_path, monkeypatch):
    decays, _ = decays_of_run(MAIN, "tiny-gdn", tmp_path, monkeypatch)
    assert float(decays.min()) < 0.99


@pytest.mark.parametrize("model_name", ["tiny-mamba2"])
def test_a_stand_in_whose_decay_cannot_be_stopped_is_refused(
    model_name, small, untrained, tmp_path, monkeypatch
):
    try:
        decays, _ = decays_of_run(DELTANET, model_name, tmp_path, monkeypatch)
    except HookedModelError:
        return
    assert (decays == 1).all()


def test_stopped_decay_is_another_model_with_finite_logits():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    tokens = torch.arange(5, 35)[None]
    with torch.no_grad():
        before = model(tokens)
        for mixer in model.mixers.values():
            mixer.stop_decay()
        after = model(tokens)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 0.1


def test_the_papers_recipe_trains_on_states(small, untrained, tmp_path, monkeypatch):
    options = {}

    def look(model, sae, passages, **given):
        options.update(given)
        raise WriteSAEError("seen")

    for name in ("formula", "sign"):
        replaced = commands.COMMANDS[name]._replace(function=look)
        monkeypatch.setitem(commands.COMMANDS, name, replaced)
        with pytest.raises(WriteSAEError, match="seen"):
            reproduce.reproduce(MAIN, tmp_path, "tiny-gdn", "paper", experiments=(name,))
    ((site, saes),) = untrained
    (cfg,) = saes.values()
    assert site == "state"
    assert (cfg.d_sae, cfg.k, cfg.encoder_bias, cfg.decoder_bias) == (2048, 32, True, True)
    assert cfg.write_alignment_coefficient == cfg.read_alignment_coefficient == 0
    assert (options["form"], options["direction"]) == ("gate_product", "unembedding")
    assert "hook_state" in SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name


@pytest.mark.parametrize("other", [{"recipe": "paper"}, {"training_tokens": 20_000}, {"seed": 1}])
def test_the_folder_of_another_run_is_refused(other, small, untrained, tmp_path):
    how = {"training_tokens": 10_000, "experiments": ("splice",)}
    reproduce.reproduce(MAIN, tmp_path, "tiny-gdn", **how)
    with pytest.raises(WriteSAEError):
        reproduce.reproduce(MAIN, tmp_path, "tiny-gdn", **(how | {"experiments": ("partition",)} | other))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(WriteSAEError, match=r"no configuration 'gpt2': there are qwen3\.5-0\.8b-L1H4"):
        reproduce.reproduce("gpt2", tmp_path)
    with pytest.raises(WriteSAEError, match="no configuration 'gpt2'"):
        estimate("gpt2")
    with pytest.raises(WriteSAEError, match="no experiment dance: there are replace"):
        reproduce.reproduce(MAIN, tmp_path, "tiny-gdn", experiments=("replace", "dance"))
    with pytest.raises(HookedModelError, match="no model 'no-such-model'"):
        reproduce.reproduce(MAIN, tmp_path, "no-such-model")
    assert not list(tmp_path.iterdir())


def test_the_command_lists_and_estimates_and_refuses(tmp_path):
    done = run("reproduce")
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(CONFIGS)
    done = run("reproduce", "--config", MAIN, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.strip() == estimate(MAIN)
    here = ("reproduce", "--config", MAIN, "--model", "tiny-gdn")
    assert run(*here, "--dry-run", cwd=tmp_path).stdout.strip() == estimate(MAIN, "tiny-gdn")
    cases = [
        ((*here, "--recipe", "mine"), "--recipe is default or paper, got 'mine'"),
        ((*here, "--experiments", "dance"), "no experiment dance"),
        (("reproduce", "--config", "gpt2"), "no configuration 'gpt2'"),
    ]
    for arguments, message in cases:
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith(f"writesae-lens: {message}")
    assert not list(tmp_path.iterdir())


def test_the_command_runs(small, untrained, tmp_path):
    done = run("reproduce", "--config", MAIN, "--model", "tiny-gdn", "--experiments", "splice", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = f"reproduce-{MAIN}"
    assert done.stdout.splitlines()[-1] == f"saved: {folder}/table.md"
    assert "| splice | increase_percent |" in (tmp_path / folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("path", "found"), [("a.0.1", 2), ("a.b.c", 3), ("d", 4), ("a.0.2", None), ("d.x", None), ("x", None)]
)
def test_a_path_reaches_names_that_have_dots(path, found):
    assert reproduce._at({"a": {"0.1": 2, "b": {"c": 3}}, "d": 4}, path) == found
