"""The atlas: what it reads of a sweep's folder, and the page in a real browser."""

import json
import shlex
import time

import numpy as np
import pandas as pd
import pytest

from tests.writesae_lens.cli.command_line import run
from tests.writesae_lens.report.sweep_folders import figures, write_map, write_sweep
from writesae_lens.report.atlas import make_atlas
from writesae_lens.report.cell_table import CellTable

FIRST, LOOKUP = "replace_median_recovered", "replace_lookup_median_recovered"
LAYERS, HEADS = [n for n in range(24) if n % 4 != 3], range(16)
CELLS = [(layer, head) for layer in LAYERS for head in HEADS]
REASON = "RuntimeError: out of memory"
EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = 1">'


def name_of(cell):
    return "L{}H{}".format(*cell)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 288 cells: 2 failed, 10 without a row, and its table indexed by the cells' names."""
    folder = tmp_path_factory.mktemp("sweeps") / "large"
    failed = [(22, 14, "training", REASON), (22, 15, "training", REASON)]
    table = write_sweep(folder, CELLS[:276], failed=failed)
    write_map(folder, CELLS)
    (folder / "reports" / "L0H1").mkdir(parents=True)
    (folder / "reports" / "L0H1" / "report.html").write_text("<title>the report</title>")
    result = folder / "results" / "L0H1" / "replace"
    result.mkdir(parents=True)
    (result / "replace.png").write_bytes(b"")
    (result / "summary.json").write_text("{}")
    make_atlas(folder)
    return folder, table.set_index(table.apply(lambda row: f"L{row.layer}H{row['head']}", axis=1))


@pytest.fixture
def open_page(chromium):
    """Opens pages; whatever one complains of or asks the network for is an error."""
    complaints, tabs = [], []

    def open_page(page, address="", **options):
        tab = chromium.new_page(**({"viewport": {"width": 1400, "height": 900}} | options))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url)
        )
        tab.goto(page.as_uri() + address)
        tab.locator("#grid .cell").first.wait_for()
        tabs.append(tab)
        return tab

    yield open_page
    assert complaints == []
    for tab in tabs:
        tab.close()


@pytest.fixture
def tab(open_page, large):
    return open_page(large[0] / "atlas.html")


def arrived(tab, address):
    tab.wait_for_url(lambda url: url.endswith(address), timeout=5000)


def left(tab):
    tab.wait_for_url(lambda url: "#" not in url, timeout=5000)


def shown(tab):
    return tab.locator("#table tbody tr").evaluate_all("rows => rows.map(row => row.dataset.name)")


def button(tab, cell):
    return tab.locator(f"#grid [data-name={name_of(cell)}]")


def test_288_cells_open_at_once(open_page, large):
    start = time.perf_counter()
    tab = open_page(large[0] / "atlas.html")
    assert time.perf_counter() - start < 10  # on a busy machine; 1 s where nothing else runs
    assert tab.locator("#grid .cell").count() == tab.locator("#table tbody tr").count() == 288
    assert tab.locator("#plot circle").count() == 276
    assert (large[0] / "atlas.html").stat().st_size < 500_000


def test_headline_and_notices(tab, large):
    _, table = large
    values, lookup = table[FIRST], table[LOOKUP]
    worst, best = values.idxmin(), values.idxmax()
    assert tab.locator(".verdict").inner_text() == (
        f"276 of 288 cells of tiny-gdn have results (2 failed). Recovered, median: {values.median():.1%} in "
        f"the median cell, worst {values[worst]:.1%} ({worst}), best {values[best]:.1%} ({best}); the "
        f"untrained lookup of equal size {lookup.median():.1%}, beaten in {(values > lookup).sum()} of 276 "
        "cells."
    )
    assert tab.locator(".notice").all_inner_texts() == [
        f"2 cells failed: L22H14 at training ({REASON}); L22H15 at training ({REASON}). The same sweep tries "
        "them again."
    ]


def test_the_grid_has_a_colour_a_value(tab, large):
    _, table = large
    labels = tab.locator("#grid .cell").evaluate_all("all => all.map(b => [b.dataset.name, b.title])")
    for name, label in labels:
        value = f"{table[FIRST][name]:.1%}" if name in table.index else "no value"
        assert f"recovered, median {value}" in label
    colours = dict(tab.locator("#grid .cell").evaluate_all(
        "all => all.map(b => [b.dataset.name, getComputedStyle(b).backgroundColor])"))  # fmt: skip
    assert colours[table[FIRST].idxmax()] == "rgb(253, 231, 37)"  # viridis's end
    assert tab.locator("#n-empty").inner_text() == "no value: 12 cells"
    assert tab.locator("#n-failed").inner_text() == "failed: 2 cells"
    assert tab.locator("#grid .cell.failed").count() == 2
    gaps = tab.locator("#grid .gap").all_inner_texts()
    assert gaps == [f"layer {n}: no recurrent head" for n in (3, 7, 11, 15, 19)]


def test_colours_follow_the_chosen_figure(tab, large):
    _, table = large
    tab.select_option("#measure", label="two kinds: delta BIC")
    # Values of both signs: a scale with two hues around zero.
    limit = table.partition_delta_bic.abs().max()
    ticks = tab.locator("#ticks span").all_inner_texts()
    assert ticks[1] == "0"
    assert float(ticks[2]) == -float(ticks[0]) == float(f"{limit:.3g}")
    tab.select_option("#measure", label="KL, own token, nats")
    assert "logarithmic" in tab.locator("#about").inner_text()
    assert tab.locator("#n-empty").is_hidden()  # the map has all cells, also those without an SAE
    assert tab.locator("#grid .cell.empty").count() == 0


def test_sorting(tab, large):
    _, table = large
    assert shown(tab) == [name_of(cell) for cell in CELLS]
    header = tab.locator("#table th button", has_text="win rate")
    header.click()
    missing = [name_of(cell) for cell in CELLS[276:]]
    order = table.replace_win_rate.sort_values(ascending=False).index.tolist()
    assert shown(tab) == order + missing
    header.press("Enter")
    assert shown(tab) == order[::-1] + missing
    assert tab.locator("#table th[aria-sort]").all_inner_texts() == ["win rate"]
    assert tab.locator("#table th[aria-sort=ascending]").count() == 1
    tab.locator("#table th button", has_text="cell").click()
    assert shown(tab) == [name_of(cell) for cell in CELLS]
    tab.locator("#table th button", has_text="cell").click()
    assert shown(tab) == [name_of(cell) for cell in CELLS[::-1]]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (f"{FIRST} > 0.8", lambda row: row[FIRST] > 0.8),
        (f"{FIRST}>80%", lambda row: row[FIRST] > 0.8),
        (f"layer 1 and {FIRST} <= 0.7", lambda row: row.layer == 1 and row[FIRST] <= 0.7),
        ("head 3 layer >= 8", lambda row: row["head"] == 3 and row.layer >= 8),
        ("L1", lambda row: row.layer == 1),
        ("l1h3", lambda row: (row.layer, row["head"]) == (1, 3)),
        ("*:3", lambda row: row["head"] == 3),
        ("layer != 1 architecture = gated_delta_net", lambda row: row.layer != 1),
        ("partition_n_dead == 7", lambda row: row.partition_n_dead == 7),
        ("partition_delta_bic < -1e1", lambda row: row.partition_delta_bic < -10),
    ],
)
def test_filters(tab, large, text, holds):
    tab.fill("#filter", text)
    expected = [name for name, row in large[1].iterrows() if holds(row)]
    cells = [name for name in shown(tab) if name in large[1].index]
    assert cells == expected
    assert tab.locator("#answer").inner_text() == f"{len(shown(tab))} of 288 cells"
    faded = tab.locator("#grid .cell.off").count()
    assert faded == 288 - len(shown(tab))
    assert tab.locator("#plot circle").count() == len(expected)


def test_the_failed_ones_and_texts_of_the_map(tab, large):
    tab.fill("#filter", "failed")
    assert shown(tab) == ["L22H14", "L22H15"]
    notes = pd.read_csv(large[0] / "map" / "records.csv").note
    n = notes.fillna("").str.split(", ").map(lambda each: "one key" in each).sum()
    assert n > (notes == "one key").sum() > 0  # beside another note too
    for text, expected in [
        ('map_note = "one key"', n),
        ('map_note != "one key"', 288 - n),  # with those that have no note
        ('map_note = ""', notes.isna().sum()),
        ('map_note = "one"', 0),
    ]:
        tab.fill("#filter", text)
        assert len(shown(tab)) == expected, text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (
            "nonsense",
            "'nonsense' is no cell and no comparison: write for example L9H4, layer 9, or NAME > 0.8",
        ),
        ("bits > 3", "No column is called 'bits': is it replace_bits?"),
        ("zzz > 3", "No column is called 'zzz'; the names are listed below the table."),
        (f"{FIRST} > high", f"'high' is no number: write {FIRST} > 0.8"),
        (f"{FIRST} > %", f"'%' is no number: write {FIRST} > 0.8"),
        ("architecture > 3", "architecture is a text: compare it by = or !="),
    ],
)
def test_wrong_filters_say_so(tab, text, answer):
    tab.fill("#filter", "layer 1")
    tab.fill("#filter", text)
    assert tab.locator("#answer").inner_text() == answer
    assert tab.locator("#filter").get_attribute("aria-invalid") == "true"
    assert len(shown(tab)) == 16  # what was there stays
    tab.fill("#filter", "")
    assert tab.locator("#filter").get_attribute("aria-invalid") == "false"
    assert len(shown(tab)) == 288


def test_the_panel_of_a_cell(tab, large):
    folder, table = large
    assert tab.locator("#name").inner_text() == "No cell chosen"
    button(tab, (0, 1)).click()
    arrived(tab, "#L0H1")
    assert tab.locator("#name").inner_text() == "Layer 0, head 1"
    panel = tab.locator("#body")
    report, picture = panel.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert (folder / report).read_text() == "<title>the report</title>"
    assert (folder / picture).is_file()
    text = panel.inner_text()
    row = table.loc["L0H1"]
    for value in (
        f"{row[FIRST]:.1%}",
        f"{row.replace_bits:.3g} bits",
        f"{row.training_seconds:.3g} s",
        "128",
    ):
        assert value in text
    records = pd.read_csv(folder / "map" / "records.csv", index_col=["layer", "head"])
    mapped = records.loc[(0, 1)]
    assert f"{mapped.half_life:.3g} tokens" in text
    low, high = (float(x) for x in panel.locator("small").first.inner_text().split(" to "))
    assert (low, high) == tuple(float(f"{mapped[f'kl_own_{end}']:.3g}") for end in ("low", "high"))
    tab.click("text=Open its report")
    assert tab.title() == "the report"
    tab.go_back()
    assert tab.locator("#name").inner_text() == "Layer 0, head 1"
    tab.click("#close")
    left(tab)
    assert tab.locator("#name").inner_text() == "No cell chosen"


def test_the_command_that_makes_a_report(tab, large):
    folder, _ = large
    tab.locator("#table tr[data-name=L5H3]").click()
    command = shlex.split(tab.locator("#body pre").inner_text())
    assert command == [
        "writesae-lens",
        "report",
        "--sae",
        f"{folder}/L5H3",
        "--out",
        f"{folder}/reports/L5H3",
    ]
    tab.goto(tab.url.split("#")[0] + "#L22H14")
    assert tab.locator("#body .notice").inner_text() == f"Failed at training: {REASON}"
    assert "There is no SAE of this cell" in tab.locator("#body").inner_text()
    tab.goto(tab.url.split("#")[0] + "#L99H0")
    assert "There is no cell L99H0 here" in tab.locator("#body").inner_text()


def test_by_keyboard(tab):
    button(tab, (0, 0)).focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown"):  # over the layer without cells
        tab.keyboard.press(key)
    tab.keyboard.press("Enter")
    arrived(tab, "#L4H1")
    assert tab.locator("#grid .cell.current").get_attribute("data-name") == "L4H1"
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    arrived(tab, "#L2H15")
    tab.keyboard.press("Escape")
    left(tab)
    assert tab.locator("#grid .cell[tabindex='0']").count() == 1
    tab.locator("#table tbody tr[tabindex='0']").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    arrived(tab, "#L0H1")
    tab.locator("#plot").focus()
    tab.keyboard.press("ArrowRight")
    first = tab.locator("#plot circle.near").get_attribute("data-name")
    tab.keyboard.press("Enter")
    arrived(tab, f"#{first}")


def test_the_scatter_plot(tab, large):
    _, table = large
    tab.select_option("#x", label="win rate")
    tab.select_option("#y", label="KL of the deletion, nats")
    places = pd.DataFrame(
        tab.locator("#plot circle").evaluate_all(
            "all => all.map(c => [c.dataset.name, c.cx.baseVal.value, c.cy.baseVal.value])"
        ),
        columns=["name", "x", "y"],
    ).set_index("name")
    table = table.loc[places.index]
    for place, values in (
        (places.x, table.replace_win_rate),
        (-places.y, np.log10(table.replace_median_kl_delete)),
    ):
        assert np.corrcoef(place, values)[0, 1] > 1 - 1e-9
    assert "log scale" in tab.locator("#plot").text_content()
    first = table.replace_win_rate.idxmin()
    tab.locator("#caption").scroll_into_view_if_needed()
    box = tab.locator("#plot").bounding_box()
    tab.mouse.move(box["x"] + places.x[first] + 2, box["y"] + places.y[first] + 2)
    tip = tab.locator("#tip").inner_text()
    assert f"win rate: {table.replace_win_rate[first]:.1%}" in tip
    tab.mouse.click(box["x"] + places.x[first] + 2, box["y"] + places.y[first] + 2)
    arrived(tab, f"#{first}")
    assert tab.locator("#plot circle.current").get_attribute("data-name") == first


def test_values_far_outside_take_the_ends_colour(tmp_path, open_page):
    cells = [(0, head) for head in range(12)]
    table = figures(12).assign(**{FIRST: np.linspace(0.5, 0.8, 12)})
    table.loc[4, FIRST] = -42.0
    write_sweep(tmp_path / "sweep", cells, table)
    tab = open_page(make_atlas(tmp_path / "sweep"))
    assert tab.locator("#ticks span").all_inner_texts()[0] == "≤ 50.0%"
    assert "-4200%" in button(tab, (0, 4)).inner_text()
    assert tab.locator("#plot circle.beyond").count() == 1
    assert "1 cell far outside" in tab.locator("#caption").inner_text()


def test_values_a_little_outside_are_on_the_scale(tmp_path, open_page):
    table = figures(12).assign(**{FIRST: np.linspace(0.7, 0.8, 12)})
    table.loc[4, FIRST] = 0.4
    write_sweep(tmp_path / "sweep", [(0, head) for head in range(12)], table)
    tab = open_page(make_atlas(tmp_path / "sweep"))
    assert tab.locator("#ticks span").all_inner_texts() == ["40.0%", "60.0%", "80.0%"]
    assert tab.locator("#plot circle").count() == 12
    assert tab.locator("#plot circle.beyond").count() == 0


def test_one_cell_without_map(tmp_path, open_page):
    write_sweep(tmp_path / "sweep", [(2, 5)])
    tab = open_page(make_atlas(tmp_path / "sweep"), "#L2H5")
    assert tab.locator("#grid .cell").count() == tab.locator("#plot circle").count() == 1
    assert tab.locator("#name").inner_text() == "Layer 2, head 5"
    assert tab.locator("#grid .gap").all_inner_texts() == ["layers 0 to 1: no cell in this folder"]
    assert "map_" not in tab.content()
    assert "1 of 1 cells of tiny-gdn has results." in tab.locator(".verdict").inner_text()


def test_missing_values_only(tmp_path, open_page):
    cells = [(0, 0), (0, 1)]
    table = figures(2).assign(**{FIRST: [np.nan, np.inf], LOOKUP: np.nan})
    write_sweep(tmp_path / "sweep", cells, table)
    tab = open_page(make_atlas(tmp_path / "sweep"))
    assert tab.locator(".verdict").inner_text() == "2 of 2 cells of tiny-gdn have results."
    assert tab.locator("#n-empty").inner_text() == "no value: 2 cells"
    assert tab.locator("#caption").inner_text() == "No cell has both figures."
    tab.fill("#filter", f"{FIRST} < 9")
    assert shown(tab) == []


def test_no_figures_at_all(tmp_path, open_page):
    write_sweep(tmp_path / "sweep", [(0, 0)], figures(1)[["architecture", "d_k", "d_v"]])
    tab = open_page(make_atlas(tmp_path / "sweep"), "#L0H0")
    assert tab.locator("#about").inner_text() == "No figure has been measured."
    assert tab.locator("#measure").is_disabled()
    assert "gated_delta_net" in tab.locator("#body").inner_text()


def test_hostile_texts_are_texts(tmp_path, open_page):
    table = figures(2).assign(architecture=EVIL, **{EVIL: [1.0, 2.0], "__proto__": [3.0, 4.0]})
    write_sweep(tmp_path / "sweep", [(0, 0), (0, 1)], table, [(0, 2, EVIL, EVIL)], model=EVIL)
    tab = open_page(make_atlas(tmp_path / "sweep"), "#L0H2")
    assert EVIL in tab.locator("#body .notice").inner_text()
    tab.select_option("#measure", label=EVIL.replace("_", " "))
    button(tab, (0, 1)).click()
    assert EVIL in tab.locator("#body").inner_text()
    tab.fill("#filter", EVIL)
    assert tab.locator("#filter").get_attribute("aria-invalid") == "true"
    tab.fill("#filter", "__proto__ > 3")
    assert shown(tab) == ["L0H1"]
    assert tab.title() == f"Atlas of {EVIL}"
    assert tab.locator("img, script[src]").count() == 0


def test_narrow_and_dark(open_page, large):
    dark = {"color_scheme": "dark", "viewport": {"width": 380, "height": 800}}
    tab = open_page(large[0] / "atlas.html", **dark)
    assert tab.locator("#panel").is_hidden()
    button(tab, (1, 1)).click()
    assert tab.locator("#panel").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") == 380  # nothing sticks out sideways
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(x) for x in paper[4:-1].split(",")) < 60


def test_a_page_elsewhere_links_to_the_folder(tmp_path, large):
    page = make_atlas(large[0], tmp_path / "pages" / "of mine")
    assert page == tmp_path / "pages" / "of mine" / "atlas.html"
    data = json.loads(page.read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    cell = next(each for each in data["cells"] if each["name"] == "L0H1")
    assert (page.parent / cell["report"]).resolve() == (large[0] / "reports/L0H1/report.html").resolve()


def test_the_command(tmp_path, large):
    done = run("report", "--sae", large[0], "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    page, headline = done.stdout.splitlines()
    assert page == f"atlas: {tmp_path}/atlas.html"
    assert headline == CellTable.read(large[0]).headline
    assert run("report", "--sae", large[0]).stdout.startswith(f"atlas: {large[0]}/atlas.html\n")
    for option in (("--text", "x"), ("--results", "y"), ("--max-passages", "64"), ("--seed", "0")):
        done = run("report", "--sae", large[0], *option)
        assert done.returncode == 2
        assert f"is the folder of a sweep, and {option[0]} does not apply to it" in done.stderr
    done = run("report", "--sae", tmp_path)
    assert done.returncode == 2
    assert "is no SAE folder" in done.stderr
