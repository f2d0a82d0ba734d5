"""The report: which results it shows, and the page in a real browser."""

import base64
import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch

from tests.writesae_lens.cli.command_line import run
from tests.writesae_lens.experiments.truth import make_sae
from tests.writesae_lens.report.conftest import HEAD, LAYER
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import ExperimentResult, replacement_test
from writesae_lens.experiments.catalogue import EXPERIMENTS, experiment, figure
from writesae_lens.figures import new_figure
from writesae_lens.report.page import NEEDED, make_report, saved_results
from writesae_lens.report.sections import (
    about_sae,
    firings_read,
    training_sentence,
    training_settings,
    verdict,
)
from writesae_lens.use.labels import add_labels

LABELLED = 1234
EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">'


@pytest.fixture(scope="module")
def results(model, sae, passages):
    """The results that the page cannot be made without, by name."""
    return {name: EXPERIMENTS[name].function(model, sae, passages, verbose=False) for name in NEEDED}


@pytest.fixture(scope="module")
def passages(model, passages):
    """The passages of the other tests, and one that holds markup."""
    ids = model.to_tokens(EVIL * 4, prepend_bos=False)[:, : passages.shape[1]]
    return torch.cat([passages.as_subclass(torch.Tensor), ids])


@pytest.fixture(scope="module")
def page(model, sae, passages, results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    add_labels(sae, {LABELLED: f"names {EVIL}"})
    return make_report(out, model, sae, passages, list(results.values()), verbose=False)


@pytest.fixture(scope="module")
def data(page):
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(script[1])


@pytest.fixture
def tab(chromium, page, tmp_path):
    """The page, opened; whatever it complains of or asks the network for is an error."""
    complaints = []
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url),
    )
    tab.goto(page.as_uri())
    yield tab
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert complaints == []
    assert tab.title() == "WriteSAE on tiny-gdn"
    tab.close()


def column(tab, name):
    at = tab.locator("#table th").evaluate_all("cells => cells.map(c => c.dataset.key)").index(name)
    return tab.locator("#table tbody tr").evaluate_all(f"rows => rows.map(r => r.cells[{at}].textContent)")


def test_overview_shows_the_figures(tab, results):
    summary = results["replace"].summary
    assert f"{summary['win_rate']:.1%}" in tab.locator(".verdict").inner_text()
    shown = tab.locator("#page-overview h2").all_inner_texts()
    questions = [experiment.question for experiment in EXPERIMENTS.values()]
    assert [question for question in shown if question in questions] == [
        question for name, question in zip(EXPERIMENTS, questions) if name in NEEDED
    ]
    images = tab.locator("#page-overview img")
    assert images.count() == sum(len(EXPERIMENTS[name].figures) for name in NEEDED)
    assert all(images.evaluate_all("all => all.map(i => i.naturalWidth > 400)"))
    assert tab.locator("#map .point").count() == results["replace"].records.atom.nunique()
    assert tab.locator("#page-atoms").is_hidden()


def test_a_point_of_the_map_opens_its_atom(tab):
    tab.locator("#map .point").last.click(force=True)
    tab.wait_for_url(re.compile(r"#atom-\d+$"))
    assert tab.locator("#name").inner_text().startswith(f"Atom {tab.url.rsplit('-', 1)[1]} ")


@pytest.mark.parametrize(
    "key", ["atom", "class", "n_firings", "median_cosine", "recovered", "kl_delete", "nearest"]
)
def test_sorting_by_a_column(tab, key, data):
    tab.click("text=Atoms (2,048)")
    tab.click(f"#table th[data-key={key}] button")
    place = data["columns"].index(key)
    values = [row[place] for row in data["rows"]]
    for _ in range(2):
        direction = tab.locator(f"#table th[data-key={key}]").get_attribute("aria-sort")
        down = direction == "descending"
        known = [n for n, x in enumerate(values) if x is not None]
        known = (
            sorted(known, key=lambda n: values[n], reverse=down)
            if down
            else sorted(known, key=lambda n: values[n])
        )
        expected = known + [n for n, x in enumerate(values) if x is None]
        assert column(tab, "atom") == [str(n) for n in expected[:100]]
        tab.click(f"#table th[data-key={key}] button")
    assert tab.locator("#table th[aria-sort]").count() == 1


def test_searching_filtering_and_showing_more(tab, data, results):
    tab.click("text=Atoms (2,048)")
    assert tab.locator("#table tbody tr").count() == 100
    tab.click("#more")
    assert tab.locator("#table tbody tr").count() == 200
    word = " the"
    holds = {n for n in range(2048) if any(word in text.lower() for text, _ in contexts(data, n))}
    half = len(data["tokens"][0]) // 2
    holds |= {
        n
        for n, ids in enumerate(data["tokens"])
        if any(word in data["texts"][str(i)].lower() for i in ids[:half])
    }
    tab.fill("#search", word.upper())
    assert tab.locator("#count").inner_text() == f"{len(holds):,} of 2,048 atoms"
    assert {int(n) for n in column(tab, "atom")} <= holds
    tab.fill("#search", "17")
    assert column(tab, "atom")[0] == "17"
    tab.fill("#search", "no text has this")
    assert tab.locator("#table tbody tr").count() == 0
    assert tab.locator("#count").inner_text() == "0 of 2,048 atoms"
    tab.fill("#search", "names </script>")
    assert column(tab, "atom") == [str(LABELLED)]
    assert column(tab, "label") == [f"names {EVIL}"]
    tab.fill("#search", "")
    tab.select_option("#class", "dead")
    dead = results["partition"].summary["n_dead"]
    assert tab.locator("#count").inner_text() == f"{dead:,} of 2,048 atoms"
    assert set(column(tab, "class")) == {"dead"}


def contexts(data, atom):
    """The texts of an atom's contexts as the page's data has them, and of each the token that it is about."""
    text, words = data["text"], np.frombuffer(base64.b64decode(data["text"]["tokens"]), "<u4")
    found = []
    for _, passage, position, *_ in data["samples"].get(str(atom), {"contexts": []})["contexts"]:
        start = max(0, position - text["before"])
        numbers = words[passage * text["length"] :][start : min(text["length"], position + text["after"] + 1)]
        parts = [text["texts"][n] for n in numbers]
        found.append(("".join(parts), parts[position - start]))
    return found


def test_the_page_of_an_atom(tab, data, results):
    tab.click("text=Atoms (2,048)")
    first, second = column(tab, "atom")[:2]
    tab.locator("#table tbody tr").first.press("Enter")
    assert tab.url.endswith(f"#atom-{first}")
    lines, mine = tab.locator("#contexts .context"), contexts(data, first)
    lines.first.wait_for()
    assert lines.count() == len(mine) > 8
    plain = str.maketrans({"\n": "↵", "\t": "⇥", "\r": ""})
    assert tab.locator("#contexts mark").all_text_contents() == [own.translate(plain) for _, own in mine]
    for shown, (text, _) in zip(lines.all_text_contents(), mine, strict=True):
        assert shown.endswith(text.translate(plain))
    assert tab.locator("#contexts h4").all_inner_texts() == data["text"]["groups"]
    assert tab.locator("#activations .bars i").count() == len(data["samples"][first]["bins"])
    assert f"Active at {data['samples'][first]['n']:,} of" in tab.locator("#activations").inner_text()
    ids = data["tokens"][int(first)]
    assert tab.locator("#up .token").count() == tab.locator("#down .token").count() == len(ids) // 2
    assert tab.locator("#near tbody tr").count() == 8
    assert tab.locator("#profile .hm").count() == 1
    assert tab.locator("#profile .bars .point").count() == data["d_k"] + data["d_v"]
    tested = results["replace"].records
    n_tested = min(300, int((tested.atom == int(first)).sum()))
    assert tab.locator("#kls .point").count() == n_tested
    tab.click("#next")
    assert tab.url.endswith(f"#atom-{second}")
    tab.go_back()
    assert tab.locator("#name").inner_text().startswith(f"Atom {first} ")
    other = tab.locator("#near tbody a").first
    number = other.inner_text()
    other.click()
    assert tab.locator("#name").inner_text().startswith(f"Atom {number} ")


def test_markup_in_a_text_is_text(tab, data):
    markup = '<img src=x onerror="document'
    atom = next(n for n in range(2048) if any(markup in text for text, _ in contexts(data, n)))
    for shown in (atom, LABELLED):
        tab.goto(f"{tab.url.split('#')[0]}#atom-{shown}")
        assert tab.locator("#page-atom img").count() == 0
        assert markup in tab.locator("#page-atom").inner_text()


def test_how_to_make_it_again(tab, page):
    command, code = tab.locator("#again pre").all_inner_texts()
    assert shlex.split(command) == [
        "writesae-lens", "report", "--sae", "FOLDER", "--text", "FILE", "--max-passages", "25",
        "--out", str(page.parent),
    ]  # fmt: skip
    assert f'make_report("{page.parent}", model, sae, tokens, seed=0)' in code


def test_the_lines_for_a_feature_run(tab, model, sae, passages, tmp_path):
    """What the page of an atom offers to copy, with the folder of the SAE and a text filled in."""
    tab.goto(f"{tab.url.split('#')[0]}#atom-{LABELLED}")
    steer, ablate = tab.locator("#use pre").all_inner_texts()
    assert f"with steering(model, sae, {{{LABELLED}: 3.0}}):" in steer
    assert f"erase_atom(model, sae, tokens, atom={LABELLED})" in ablate
    sae.save_model(tmp_path)
    steer, ablate = (code.replace("FOLDER", str(tmp_path)) for code in (steer, ablate))
    exec(steer.replace("max_new_tokens=40", "max_new_tokens=2, verbose=False"), {})
    exec(re.sub(r"tokens = .*", "", ablate), {"tokens": passages})


def test_terms_are_explained(tab):
    meaning = "the share of the deletion's effect that a stand-in avoids"
    term = tab.locator(".cards .term", has_text="recovered").first
    assert meaning in term.get_attribute("title")
    assert tab.locator("#glossary dd", has_text=meaning).is_hidden()
    tab.click("#glossary summary")
    assert tab.locator("#glossary dd", has_text=meaning).is_visible()


def paper(tab):
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_paper_is_chosen_and_remembered(tab):
    light = paper(tab)
    assert light == "rgb(255, 255, 255)"
    assert tab.locator("img").first.evaluate("i => getComputedStyle(i).filter") == "none"
    tab.click("#theme")
    assert max(int(x) for x in paper(tab)[4:-1].split(",")) < 60
    assert "invert" in tab.locator("img").first.evaluate("i => getComputedStyle(i).filter")
    # Plots are drawn again, in light ink.
    tab.wait_for_function("document.querySelector('#map .xtitle').style.fill === 'rgb(228, 232, 238)'")
    tab.reload()
    assert max(int(x) for x in paper(tab)[4:-1].split(",")) < 60
    assert tab.locator("#theme").inner_text() == "☀ light"
    tab.emulate_media(color_scheme="dark")
    tab.click("#theme")
    assert paper(tab) == light
    tab.emulate_media(media="print")
    assert paper(tab) == light
    tab.emulate_media(media="screen", color_scheme="light")


def test_dead_atoms_and_wrong_addresses(tab, results):
    records = results["partition"].records
    never = min(set(records.atom[records["class"] == "dead"]) - set(results["contexts"].records.atom))
    tab.goto(f"{tab.url.split('#')[0]}#atom-{never}")
    assert "active nowhere" in tab.locator("#contexts").inner_text()
    assert tab.locator("#distributions").is_hidden()
    tab.goto(f"{tab.url.split('#')[0]}#atom-99999")
    assert tab.locator("#page-overview").is_visible()


def test_the_command_runs_what_is_missing_and_takes_what_is_there(sae, results, tmp_path):
    sae.save_model(tmp_path / "sae")
    results["replace"].save(tmp_path / "saved" / "one")
    results["contexts"].save(tmp_path / "saved" / "two")
    pd.DataFrame({"step": [0, 10], "loss": [2.0, 1.0], "l0": [4, 4]}).to_csv(
        tmp_path / "sae" / "training.csv"
    )
    (tmp_path / "sae" / "runner_cfg.json").write_text('{"training_tokens": 1234, "lr": 0.004}')
    out = tmp_path / "out"
    done = run(
        "report",
        "--sae",
        tmp_path / "sae",
        "--results",
        tmp_path / "saved",
        "--max-passages",
        4,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {out}/report.html"
    assert {p.name for p in out.iterdir()} == {"report.html", "results"}
    assert {p.name for p in (out / "results").iterdir()} == {"partition"}
    assert {p.name for p in (out / "results" / "partition").iterdir()} == {
        "records.csv",
        "summary.json",
        "partition.png",
    }
    text = (out / "report.html").read_text("utf-8")
    assert "trained on 1,234 inputs" in text
    n_figures = sum(len(EXPERIMENTS[name].figures) for name in NEEDED)
    assert text.count('<img src="data:image/png') == n_figures + 1  # and the training's curves


def test_results_that_do_not_fit_are_refused(model, sae, passages, results, tmp_path):
    def refused(message, *given):
        with pytest.raises(WriteSAEError, match=message):
            make_report(tmp_path, model, sae, passages, given, verbose=False)

    good = results["replace"]
    elsewhere = model.write_hook_name(0, 0)
    refused(
        f"of {elsewhere}",
        ExperimentResult("replace", good.records, good.summary | {"hook_name": elsewhere}),
    )
    refused(
        "of other-model",
        ExperimentResult("replace", good.records, good.summary | {"model": "other-model"}),
    )
    refused("of another SAE", ExperimentResult("replace", good.records.assign(atom=9999), good.summary))
    refused("of another SAE", ExperimentResult("partition", results["partition"].records[:7], good.summary))
    refused("no experiment is called 'x'", ExperimentResult("x", good.records, good.summary))
    with pytest.raises(WriteSAEError, match="holds no results of experiments"):
        saved_results(tmp_path)
    with pytest.raises(WriteSAEError, match=r"records\.csv and summary\.json not found"):
        saved_results(tmp_path / "nowhere")
    folder = good.save(tmp_path / "broken")
    (folder / "summary.json").write_text("[]")
    with pytest.raises(WriteSAEError, match="does not read"):
        saved_results(folder)


RATES = {"win_rate": 0.219, "win_rate_ci": [0.156, 0.281], "recovered": 0.3, "architecture": "mamba2"}


def test_the_words_of_a_verdict():
    no = RATES | {"median_recovered": -0.2, "median_recovered_ci": [-0.3, -0.1]}
    assert verdict(no) == (
        "No: at most firings deleting the write does less harm than the stand-in. Recovered in the median at "
        "the write's own position -20.0% (-30.0% to -10.0%); pooled 30.0%. Stand-ins, also small ones, do "
        "less harm than the deletion at 21.9% of firings (15.6% to 28.1%); this is the measure of the "
        "WriteSAE paper (arXiv:2605.12770), which reports 88.1% on Mamba-2-370M."
    )
    undecided = no | {"median_recovered": 0.1, "median_recovered_ci": [-0.1, 0.2]}
    assert verdict(undecided).startswith("Undecided: ")
    one_passage = RATES | {"median_recovered": 0.5, "win_rate_ci": None, "median_recovered_ci": None}
    assert verdict(one_passage).startswith(
        "Yes: half of the stand-ins recover 50.0% or more of what deleting"
    )
    later = {"median_recovered_later": 0.25, "horizon": 32}
    assert "50.0%, over the next 32 tokens 25.0%; pooled" in verdict(one_passage | later)
    # Of an architecture that the paper does not have, nothing is said of the paper.
    assert "paper" not in verdict(one_passage | {"architecture": "kda"})
    assert verdict(RATES | {"median_recovered": None}).startswith("No answer")


@pytest.mark.parametrize(
    ("lookup", "pursuit", "expected"),
    [
        (0.25, 0.75, "beat {lookup} (25.0%), not {pursuit} (75.0%)"),
        (0.75, 0.25, "beat {pursuit} (25.0%), not {lookup} (75.0%)"),
        (0.25, 0.125, "beat {lookup} (25.0%) and {pursuit} (12.5%)"),
        (0.75, 0.5, "do not beat {lookup} (75.0%) or {pursuit} (50.0%)"),
        (0.25, None, "beat {lookup} (25.0%)"),
        (0.75, None, "do not beat {lookup} (75.0%)"),
    ],
)
def test_a_verdict_compares_with_each_untrained_baseline(lookup, pursuit, expected):
    given = {"lookup": lookup, "pursuit": pursuit, "mean_key": 0.9}
    rows = [{"name": name, "median_recovered": value} for name, value in given.items() if value is not None]
    words = expected.format(
        lookup="an untrained lookup of equal size", pursuit="untrained codes chosen by matching pursuit"
    )
    said = verdict(RATES | {"median_recovered": 0.5, "win_rate_ci": None, "baselines": rows})
    assert said.startswith(
        f"Stand-ins {words}: half of the stand-ins recover 50.0% or more of what deleting the write"
    )


def test_training_tokens_given_as_a_float_are_read(sae, tmp_path):
    (tmp_path / "runner_cfg.json").write_text('{"training_tokens": 1e6, "lr": 0.0005}')
    settings = training_settings(sae, tmp_path)
    assert settings["training tokens"] == "1000000"
    assert settings["lr"] == "0.0005"
    assert about_sae("an SAE", settings) == "SAE an SAE; trained on 1,000,000 tokens"
    assert training_sentence(sae, settings).endswith("trained on 1,000,000 inputs.")


def test_the_head_names_the_sae_its_training_and_the_firings(results):
    assert about_sae("my_saes/L1H1", {"training tokens": "350000"}) == (
        "SAE my_saes/L1H1; trained on 350,000 tokens"
    )
    assert about_sae(None, {}) == "SAE from memory, no folder given; training tokens not recorded"
    tested = results["replace"]
    n_passages = len(set(tested.records.passage))
    plain = f"Stand-ins tested at {len(tested.records):,} firings in {n_passages} passages"
    assert firings_read(ExperimentResult("replace", tested.records, {"n_at_floor": 0})) == plain
    assert firings_read(ExperimentResult("replace", tested.records, {"n_at_floor": 3})).startswith(
        f"{plain}, 3 of them left out"
    )


@pytest.fixture(scope="module")
def of_codes(model):
    cell = model.cell(LAYER, HEAD)
    torch.manual_seed(0)
    sizes = {"n_key": 24, "n_value": 40, "k_key": 2, "k_value": 3}
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, decoder="codes", encoder="tied", **sizes))
    sae.cfg.metadata.model_name = model.cfg.model_name
    sae.cfg.metadata.hook_name = model.write_hook_name(LAYER, HEAD)
    return sae


def test_the_page_of_codes(model, of_codes, passages, chromium, tmp_path):
    some = passages[:4]
    tested = replacement_test(model, of_codes, some, horizon=8, max_firings=40, verbose=False)
    page = make_report(tmp_path, model, of_codes, some, [tested], verbose=False)
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    complaints = []
    tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    rows = tab.locator("#standings tbody tr")
    assert rows.count() == 1 + len(tested.summary["baselines"])
    shown = rows.first.locator("td").all_inner_texts()
    figures = [f"{name}{when}" for when in ("", "_later", "_both") for name in
               ("median_recovered", "recovered", "win_rate")]  # fmt: skip
    assert shown == [f"{tested.summary[name]:.1%}" for name in figures]
    guards = tab.locator("#guards").inner_text()
    assert f"{tested.summary['bits']:.1f}" in guards
    assert "bits to name the features of a write" in guards
    tab.click("text=Codes (64)")
    for side, number, title in (("key", 24, "Key code"), ("value", 40, "Value code")):
        tab.select_option("#side", side)
        assert tab.locator("#count").inner_text() == f"{number} of 64 codes"
        assert set(column(tab, "side")) == {side}
        atom = int(column(tab, "atom")[0])
        assert (atom < 24) == (side == "key")
        tab.locator("#table tbody tr").first.press("Enter")
        assert tab.locator("#name").inner_text().startswith(f"{title} {atom} ")
        is_key = side == "key"
        assert tab.locator("#up-title").inner_text() == ("Read by" if is_key else "Promotes")
        assert tab.locator("#suppressed").is_visible() != is_key
        assert ("own token" in tab.locator("#read").inner_text()) == is_key
        near = [int(text) for text in tab.locator("#near tbody a").all_inner_texts()]
        assert all((n < 24) == is_key for n in near)
        firings = tested.records.key_code if is_key else tested.records.atom
        if n_tested := int((firings == atom).sum()):
            assert tab.locator("#kls .point").count() == n_tested
        tab.go_back()
    assert complaints == []
    tab.close()


def test_a_cell_of_the_first_layer_is_marked_and_steps_are_numbered(model, passages, tmp_path, capsys):
    sae = make_sae(model, layer=0)
    page = make_report(tmp_path, model, sae, passages[:2], reference="saes/L0").read_text("utf-8")
    assert "32 atoms, n-gram tables by construction" in page
    assert '<p class="soft" id="about-sae">SAE saes/L0; training tokens not recorded</p>' in page
    said, steps = capsys.readouterr(), [*NEEDED, "the browser of features"]
    for number, step in enumerate(steps, 1):
        assert f"Step {number} of {len(steps)}: {step}\n" in said.err
    assert not said.out


def test_a_declared_experiment_is_shown_like_any_other(model, sae, passages, results, tmp_path):
    """Nothing but its declaration names it: question, place, what a record is, figures."""
    before = dict(EXPERIMENTS)

    @experiment("toy", question="How long are the passages?", row="a passage")
    def toy_experiment(model, sae, tokens, context_size=None, seed=0, progress_folder=None, verbose=True):
        """Measure passages."""

    @figure("toy")
    def plot_toy(result):
        drawn, (axis,) = new_figure(4.0, 3.0, 1)
        axis.plot(result.records.length)
        return drawn

    try:
        about = {n: results["replace"].summary[n] for n in ("model", "hook_name", "sae_fingerprints")}
        toy = ExperimentResult(
            "toy", pd.DataFrame({"length": [64, 64]}), about | {"headline": "64 tokens", "n": 2}
        )
        text = make_report(tmp_path, model, sae, passages, [toy, *results.values()], verbose=False).read_text(
            "utf-8"
        )
    finally:
        EXPERIMENTS.clear()
        EXPERIMENTS.update(before)
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings.index("How long are the passages?") > headings.index(EXPERIMENTS["contexts"].question)
    section = text.split("<h2>How long are the passages?</h2>")[1]
    assert '<p class="headline" data-explain>64 tokens</p>' in section
    assert "2 records, each of them a passage" in section
    assert section.count("<img ") == 1


def test_two_results_of_one_experiment_both_show(model, sae, passages, results, tmp_path):
    twice = [*results.values(), results["partition"]]
    text = make_report(tmp_path, model, sae, passages, twice, verbose=False).read_text("utf-8")
    assert text.count(f"<h2>{EXPERIMENTS['partition'].question}</h2>") == 2


def test_counts_are_whole(tab, data, results):
    tab.click("text=Atoms (2,048)")
    most = results["partition"].records.n_firings.max()
    assert column(tab, "n_firings")[0] == f"{most:,}"
    atom = int(column(tab, "atom")[0])
    tested = int((results["replace"].records.atom == atom).sum())
    assert column(tab, "n_tested")[0] == f"{tested:,}"
