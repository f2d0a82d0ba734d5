"""The paper's runs by name."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.cli.command_line import run as run_command
from tests.writesae_lens.fla_models import save_model
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, WriteSAETrainingConfig
from writesae_lens.experiments.catalogue import EXPERIMENTS, Experiment
from writesae_lens.experiments.result import value_at
from writesae_lens.published import releases
from writesae_lens.reproduce import CONFIGS, estimate, reproduce, run
from writesae_lens.reproduce.paper import SIZES

MAIN, ALL = "qwen3.5-0.8b-L9H4", "qwen3.5-0.8b-L9-all"
DELTANET, GLA = "deltanet-1.3b-L12H8", "gla-1.3b-L12H0"
# Every figure by "experiment.path value": arXiv:2605.12770 v4, text, tables and appendices.
PAPER = {
    "qwen3.5-0.8b-L1H4": "replace.win_rate 0.939 replace.median_kl_atom 2.07 replace.median_kl_delete 2.82",
    MAIN: "replace.win_rate 0.912 replace.median_kl_atom 0.40 replace.median_kl_delete 1.09"
    " replace.strict_chain_rate 0.895 replace.cliffs_delta 0.825 population.mean_win_rate 0.8980"
    " population.win_rate_register 0.9136 population.win_rate_bundle 0.8898 partition.n_register 222"
    " partition.n_bundle 94 partition.n_dead 1732 partition.delta_bic -296"
    " partition.register_median_cosine 0.262 formula.median_r2 0.983 erase.median_delta_logp_firing -0.116"
    " sign.agreement 0.846 sign.pearson 0.162 install.by_stratum.rank_100_1000.target_in_continuation 1.0"
    " install.by_stratum.rank_100_1000.native_target_in_continuation 0.333"
    " install.target_in_continuation 0.25 install.native_target_in_continuation 0.083"
    " splice.increase_percent 0.58 compare.writesae 0.9125 compare.flat_svd 0.9136",
    "qwen3.5-0.8b-L17H4": "replace.win_rate 0.923 replace.median_kl_atom 1.82 replace.median_kl_delete 2.58",
    ALL: "replace.win_rate 0.8929 splice.increase_percent 0.76",
    "qwen3.5-4b-L12H8": "replace.win_rate 0.48 formula.median_r2 -0.05 partition.register_median_cosine 0.152"
    " amplify.by_condition.native.newlines_per_400 16.8 amplify.by_condition.5x.newlines_per_400 11.2"
    " amplify.by_condition.random.newlines_per_400 19.0",
    "qwen3.5-27b-L32H16": "partition.register_median_cosine 0.085",
    "mamba2-370m-L24H0": "replace.win_rate 0.8808 replace.median_kl_atom 0.97 replace.median_kl_delete 1.62"
    " formula.median_r2 -0.07 partition.register_median_cosine 0.0575 compare.writesae 0.8285"
    " compare.flat_svd 0.7630",
    "rwkv7-1.5b-L12H0": "replace.win_rate 0.453 partition.register_median_cosine 0.180 compare.writesae 0.453"
    " compare.flat_svd 0.478",
    DELTANET: "replace.win_rate 0.483 replace.strict_chain_rate 0.177 partition.register_median_cosine 0.997",
    GLA: "partition.register_median_cosine 0.110",
}


def figures(name):
    words = PAPER[name].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


@pytest.fixture
def small(monkeypatch):
    """Dictionaries of 32 features, and experiments on two passages, without untrained stand-ins."""
    recommended = classmethod(lambda cls, **sides: cls(d_sae=32, **sides))
    monkeypatch.setattr(WriteSAETrainingConfig, "recommended", recommended)
    monkeypatch.setitem(run.OPTIONS, "replace", {"horizon": 4, "max_firings": 16, "baselines": False})
    for name, entry in EXPERIMENTS.items():
        monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(entry, max_passages=2, context_size=64))


@pytest.fixture
def untrained(monkeypatch):
    """Random SAEs in the place of trained ones; how they were to be trained."""
    asked = []

    def train(model, cells, folders, tokens, sae_of, site, **options):
        asked.append((site, [sae_of(cell) for cell in cells]))
        for cell, folder in zip(cells, folders, strict=True):
            torch.manual_seed(0)
            sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=16, k=2))
            name_of = model.state_hook_name if site == "state" else model.write_hook_name
            metadata = sae.cfg.metadata
            metadata.model_name, metadata.hook_name = options["model_name"], name_of(cell.layer, cell.head)
            metadata.context_size = 64
            folder.mkdir(parents=True)
            sae.save_model(folder)

    monkeypatch.setattr(run, "train_cells", train)
    return asked


def replace_experiment(monkeypatch, name, function):
    monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(EXPERIMENTS[name], function=function))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_the_papers_figures_and_an_estimate_mentions_sizes(name):
    assert set(CONFIGS) == set(PAPER)
    paper = CONFIGS[name]
    assert {f"{of}.{path}": value for (of, path), value in paper.figures.items()} == figures(name)
    assert {of for of, _ in paper.figures} <= set(EXPERIMENTS)
    layer, head = re.fullmatch(r".*-L(\d+)(?:H(\d+)|-all)", name).groups()
    assert (paper.layer, paper.head) == (int(layer), None if head is None else int(head))
    base, text = releases.BASE_MODELS[paper.base], estimate(name)
    assert "/" in base.name
    assert f"{base.name}: {SIZES[paper.base].n_parameters / 1e6:,.1f} M parameters" in text
    assert f"{base.d_k} x {base.d_v}" in text
    assert "GiB" in text
    assert re.search(r"time: about [\d,.]+ (minutes|hours|days) on this machine", text)
    assert f"training: {paper.training_tokens:,} tokens" in text


def test_estimates_for_a_shipped_model_are_its_own():
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    n_parameters = sum(p.numel() for p in model.original_model.parameters())
    for name in (MAIN, ALL):
        text = estimate(name, "tiny-gdn", experiments=("replace", "splice", "partition"))
        assert f"tiny-gdn: {n_parameters / 1e6:,.1f} M parameters" in text
        assert "32 x 48" in text
        assert f"training: {zoo.TRAINING_TOKENS:,} tokens" in text
        assert ("partition" in text) == (name == MAIN)  # the paper has no such figure of all heads


def test_estimates_name_the_features_of_each_recipe():
    recipe = WriteSAETrainingConfig.recommended(d_k=128, d_v=128)
    text = estimate(MAIN)
    assert f"{recipe.n_key:,} key codes and {recipe.n_value:,} value codes" in text
    assert f"{recipe.k_key} and {recipe.k_value} active, {2 * 128 * recipe.d_sae / 1e6:,.2f} M para" in text
    assert "dictionary: 2,048 rank-1 atoms, 32 active, 1.05 M parameters" in estimate(MAIN, recipe="paper")


def test_a_small_run_from_training_to_table_and_again_without_training(small, tmp_path, monkeypatch):
    monkeypatch.setitem(run.OPTIONS, "replace", {"horizon": 4, "max_firings": 16})

    def go():
        return reproduce(
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
        assert row.ours == pytest.approx(value_at(summary.to_dict(), row.figure))
        expected = figures(MAIN).get(f"{row.experiment}.{row.figure}")
        assert pd.isna(row.paper) if expected is None else row.paper == expected
    of_replace = table.figure[table.experiment == "replace"].tolist()
    recovered = [f"{name}{where}" for where in ("", "_later") for name in ("recovered", "median_recovered")]
    n_own = sum("." not in figure for figure in of_replace[: of_replace.index("win_rate")])
    assert set(recovered) <= set(of_replace[:n_own])  # what is recovered stands first, then the baselines
    assert {f"baselines.lookup.{name}" for name in recovered} <= set(of_replace[n_own:])
    assert of_replace.index("baselines.lookup.recovered") < of_replace.index("win_rate")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), table)
    page = (tmp_path / "table.md").read_text()
    assert page.startswith(f"# {MAIN}: tiny-gdn, recipe recommended")
    assert "over the next 4 tokens" in page
    win_rate = table.ours[table.figure == "win_rate"].iloc[0]
    assert re.search(rf"\| replace \| win_rate \| \d:\d \| 0.912 \| {win_rate:.4g} \|", page)
    monkeypatch.setattr(run, "train_cells", lambda *args, **options: pytest.fail("it trained again"))
    monkeypatch.setattr(
        HookedRecurrent, "run_with_swapped_writes", lambda *args: pytest.fail("it replaced again")
    )
    pd.testing.assert_frame_equal(go().drop(columns="seconds"), table.drop(columns="seconds"))


def test_all_heads_are_trained_at_once_and_have_a_mean(small, tmp_path):
    table = reproduce(ALL, tmp_path, "tiny-gdn", training_tokens=10_000, experiments=("replace",))
    means, heads = table[table.cell == "mean"], table[table.cell != "mean"]
    assert heads.cell.nunique() == 4
    for row in means.itertuples():
        of_heads = heads[heads.figure == row.figure]
        assert len(of_heads) == 4
        assert row.ours == pytest.approx(np.mean(of_heads.ours))
    assert means.paper[means.figure == "win_rate"].tolist() == [0.8929]
    assert set(means.figure) == set(heads.figure)
    hooks = {SAE.load_from_disk(p.parent).cfg.metadata.hook_name for p in tmp_path.glob("*/sae/cfg.json")}
    assert len(hooks) == 4


def test_an_experiment_that_reproduce_does_not_know_runs_like_any_other(
    small, untrained, tmp_path, monkeypatch
):
    """Its table has the figures that it declares; one that takes several SAEs gets a list."""

    def toy(model, saes, tokens, seed=0, progress_folder=None):
        (sae,) = saes
        result = EXPERIMENTS["splice"].function(model, sae, tokens, seed=seed)
        return dataclasses.replace(
            result, name="toy", summary=result.summary | {"answer": {"0.1": len(tokens)}}
        )

    entry = Experiment("toy", toy, "Why?", "a passage", table=("answer.0.1",), max_passages=2)
    monkeypatch.setitem(EXPERIMENTS, "toy", entry)
    table = reproduce(MAIN, tmp_path, "tiny-gdn", experiments=("toy",))
    assert table[["experiment", "figure", "ours"]].to_numpy().tolist() == [["toy", "answer.0.1", 2]]
    assert (tmp_path / "toy" / "summary.json").exists()


@pytest.mark.parametrize(("name", "kind", "cell"), [(DELTANET, "delta_net", "12:8"), (GLA, "gla", "12:0")])
@pytest.mark.filterwarnings("error::writesae_lens.experiments.origin.ResultWarning")
def test_models_of_flash_linear_attentions_folders(small, untrained, tmp_path, monkeypatch, name, kind, cell):
    folder = str(save_model(tmp_path / "model", kind))
    texts = (zoo.documents("train")[:2], zoo.text("test")[:4000])
    monkeypatch.setattr(run, "texts", lambda source: texts)
    table = reproduce(name, tmp_path / "out", folder, experiments=("replace", "partition"))
    assert set(table.cell) == {cell}
    assert table.ours[table.figure == "win_rate"].notna().all()
    assert "another recurrence" not in (tmp_path / "out" / "table.md").read_text()


def test_the_table_says_where_the_recurrence_is_of_another_kind(small, untrained, tmp_path):
    """A model that ships in the place of the paper's."""
    words = "another recurrence (gated_delta_net) than the paper's fla-hub/delta_net-1.3B-100B (delta_net)"
    with pytest.warns(UserWarning, match=re.escape(words)):
        reproduce(DELTANET, tmp_path / "delta", "tiny-gdn", experiments=("partition",))
    assert words in (tmp_path / "delta" / "table.md").read_text()
    reproduce(MAIN, tmp_path / "main", "tiny-gdn", experiments=("partition",))
    assert "another recurrence" not in (tmp_path / "main" / "table.md").read_text()


def test_the_papers_recipe_trains_on_states(small, untrained, tmp_path, monkeypatch):
    options = {}

    def look(model, sae, passages, **given):
        options.update(given)
        raise WriteSAEError("seen")

    for name in ("formula", "install"):
        replace_experiment(monkeypatch, name, look)
        with pytest.raises(WriteSAEError, match="seen"):
            reproduce(MAIN, tmp_path, "tiny-gdn", "paper", experiments=(name,))
    ((site, (cfg,)),) = untrained
    assert site == "state"
    assert (cfg.d_sae, cfg.k, cfg.encoder_bias, cfg.decoder_bias) == (2048, 32, True, True)
    assert cfg.write_alignment_coefficient == cfg.read_alignment_coefficient == 0
    assert (options["form"], options["direction"]) == ("gate_product", "unembedding")
    assert "hook_state" in SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name


def test_the_folder_of_another_run_is_refused(small, untrained, tmp_path):
    options = {"training_tokens": 10_000, "experiments": ("splice",)}
    reproduce(MAIN, tmp_path, "tiny-gdn", **options)
    options["experiments"] = ("partition",)
    for other in ({"recipe": "paper"}, {"training_tokens": 20_000}, {"seed": 1}):
        with pytest.raises(WriteSAEError, match="other settings"):
            reproduce(MAIN, tmp_path, "tiny-gdn", **(options | other))


def test_what_is_refused_leaves_no_folder(tmp_path):
    for name, model_name, experiments in (
        ("gpt2", "tiny-gdn", None),
        (MAIN, "tiny-gdn", ("replace", "dance")),
        (MAIN, "no-such-model", None),
    ):
        with pytest.raises(HookedModelError, match=r"'gpt2'|'dance'|'no-such-model'"):
            reproduce(name, tmp_path, model_name, experiments=experiments)
    assert not list(tmp_path.iterdir())


def test_the_command_lists_estimates_and_runs(small, untrained, tmp_path):
    listed = run_command("reproduce").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(CONFIGS)
    here = ("reproduce", "--config", MAIN, "--model", "tiny-gdn")
    dry = run_command(*here, "--experiments", "splice", "--dry-run", cwd=tmp_path).stdout.strip()
    same = estimate(MAIN, "tiny-gdn", experiments=("splice",))
    assert dry.splitlines()[:-1] == same.splitlines()[:-1]  # the last line is of times
    assert not list(tmp_path.iterdir())
    done = run_command(*here, "--experiments", "splice", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"saved: reproduce-{MAIN}/table.md"
    assert "| splice | increase_percent |" in (tmp_path / f"reproduce-{MAIN}" / "table.md").read_text()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("a.0.1", 2), ("a.b.c", 3), ("d", 4), ("rows.one.y", 5)),
        *(
            ("a.0.2", None),
            ("d.x", None),
            ("x", None),
            ("rows.two.y", None),
            ("rows", [{"name": "one", "y": 5}]),
        ),
    ],
)
def test_a_path_reaches_names_that_have_dots(path, value):
    summary = {"a": {"0.1": 2, "b": {"c": 3}}, "d": 4, "rows": [{"name": "one", "y": 5}]}
    assert value_at(summary, path) == value


@pytest.mark.parametrize("damage", [("cfg.json", 0), ("sae_weights.safetensors", 0.9)], ids=str)
def test_a_damaged_sae_is_trained_again(tmp_path, damage):
    file, kept = damage
    WriteSAE(WriteSAEConfig(d_k=4, d_v=4, d_sae=8, k=2)).save_model(tmp_path)
    assert isinstance(run._load(tmp_path, "cpu"), WriteSAE)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(kept * len(content))])
    assert run._load(tmp_path, "cpu") is None
