"""The page of two SAEs: an SAE beside its own features in another order, some of them replaced."""

import copy
import json

import pytest
import torch

from tests.writesae_lens.cli.command_line import run
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages
from writesae_lens import WriteSAEError
from writesae_lens.experiments import compare, replacement_test
from writesae_lens.report import make_side_by_side
from writesae_lens.use.labels import add_labels

N, REPLACED = 32, [3, 8, 20]
LABEL = "dates <b>"


@pytest.fixture(scope="module")
def tokens(model):
    return read_passages(model, 6, 70)


@pytest.fixture(scope="module")
def order():
    return torch.randperm(N, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saes(model, order):
    """Feature n of the second SAE is feature order[n] of the first; those of REPLACED are others."""
    first = make_sae(model)
    second, third = copy.deepcopy(first), make_sae(model, seed=5)
    with torch.no_grad():
        for own, new in zip(second.parameters(), third.parameters(), strict=True):
            if own.ndim and len(own) == N:
                own.copy_(own[order])
                own[REPLACED] = new[REPLACED]
    add_labels(first, {int(order[0]): LABEL})
    return {"one": first, "other": second}


@pytest.fixture(scope="module")
def page(model, saes, tokens, tmp_path_factory):
    return make_side_by_side(tmp_path_factory.mktemp("page"), model, saes, tokens, verbose=False)


@pytest.fixture
def tab(chromium, page):
    complaints = []
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    tab.goto(page.as_uri())
    yield tab
    assert complaints == []
    tab.close()


def rows(tab):
    return tab.locator("#pairs tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_features_are_beside_their_copies(tab, order):
    back = {int(order[n]): n for n in range(N) if n not in REPLACED}
    shown = rows(tab)
    active = {int(row[5]) for row in shown if row[5] != "–"}
    assert len(active) > 20
    for cosine, one, _, _, _, other, _, _, _ in shown:
        if one != "–" and back.get(int(one)) in active:
            assert (float(cosine), int(other)) == (1.0, back[int(one)])
    low = [row for row in shown if row[0] == "–" or float(row[0]) <= 0.7]
    tab.select_option("#which", "low")
    assert rows(tab) == low
    tab.select_option("#which", "high")
    assert {row[0] for row in rows(tab)} == {"1.00"}
    assert tab.locator("#count").inner_text() == f"{len(rows(tab))} of {len(shown)} rows"


def test_a_pair_is_shown_with_both_contexts(tab, order):
    tab.fill("#search", LABEL.upper())
    (row,) = rows(tab)
    assert row[1:3] == [str(int(order[0])), LABEL]
    tab.locator("#pairs tbody tr").press("Enter")
    tab.wait_for_url(f"**#a{int(order[0])}-b0")
    assert tab.locator("#one h3").inner_text() == f"A Atom {int(order[0])} · {LABEL}"
    assert tab.locator("#other h3").inner_text() == "B Atom 0"
    one, other = (tab.locator(f"#{side} .context").all_text_contents() for side in ("one", "other"))
    assert one[0] == other[0]  # the same atom, of which others leave a little more or less
    assert len(one) > 3
    assert tab.locator("#one .bars i").count() == tab.locator("#other .bars i").count() == 24
    assert tab.locator("#one .token").count() == tab.locator("#other .token").count() == 6
    assert tab.locator("main b").count() == 0
    tab.go_back()
    tab.locator("#both").wait_for(state="hidden")


def test_sorting(tab):
    for name, numbers in (("active", True), ("label or token", False)):
        header = tab.locator("#pairs th button", has_text=name).first
        header.click()
        at = 3 if numbers else 2
        values = [row[at] for row in rows(tab) if row[at] != "–"]
        if numbers:
            values = [int(value.replace(",", "")) for value in values]
            assert values == sorted(values, reverse=True)
        assert tab.locator("#pairs th[aria-sort]").all_inner_texts() == [name]


def test_measures_are_those_of_the_comparison(tab, saes, page):
    summary = json.loads((page.parent / "results" / "compare" / "summary.json").read_text())
    table = {row["name"]: row for row in summary["table"]}
    shown = {
        name: values
        for name, *values in tab.locator("#measures tbody tr").evaluate_all(
            "rows => rows.map(row => Array.from(row.cells, cell => cell.textContent))"
        )
    }
    both = shown["recovered in the median, own and later"]
    for text, name in zip(both, ("one", "other", "lookup"), strict=True):
        assert text.startswith(f"{table[name]['median_recovered_both']:.1%}")
    assert shown["atoms"] == ["32", "32", "–"]
    assert f"{table['one']['median_recovered_both']:.1%}" in tab.locator(".verdict").inner_text()
    images = tab.locator("img")
    assert images.count() >= 2
    assert all(images.evaluate_all("all => all.map(i => i.naturalWidth > 300)"))


def test_dark_and_narrow(chromium, page):
    tab = chromium.new_page(viewport={"width": 380, "height": 800}, color_scheme="dark")
    tab.goto(page.as_uri())
    tab.locator("#pairs tbody tr").first.click()
    assert tab.evaluate("document.documentElement.scrollWidth") == 380
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(x) for x in paper[4:-1].split(",")) < 60
    tab.close()


def test_codes_of_both_sides(model, chromium, tokens, tmp_path):
    saes = {"one": make_codes(model), "other": make_codes(model, seed=1, k_value=3)}
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(make_side_by_side(tmp_path, model, saes, tokens[:3], verbose=False).as_uri())
    sides = {row[0] for row in rows(tab)}
    assert sides == {"key", "value"}
    tab.select_option("#side", "key")
    assert {row[0] for row in rows(tab)} == {"key"}
    tab.locator("#pairs tbody tr").first.click()
    assert tab.locator("#one h3").inner_text().startswith("A Key code ")
    assert complaints == []
    tab.close()


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(model, saes, tokens, tmp_path):
    def refused(message, saes=saes, *results):
        with pytest.raises(WriteSAEError, match=message) as error:
            make_side_by_side(tmp_path, model, saes, tokens, results, verbose=False)
        assert len(str(error.value)) < 300

    one = saes["one"]
    refused("a page compares two SAEs, .* got 1", {"one": one})
    refused("a page compares two SAEs, .* got no mapping", [one, one])
    refused("belong to another cell", {"one": one, "far": make_sae(model, head=0)})
    refused("features of different kinds", {"one": one, "codes": make_codes(model)})
    tested = replacement_test(model, one, tokens[:1], verbose=False)
    refused("results of compare and stability, and this is one of replace", saes, tested)
    turned = compare(model, dict(reversed(saes.items())), tokens[:2], random=("atom",), verbose=False)
    refused("of other SAEs, or they stand in another order", saes, turned)


def test_the_command(saes, tmp_path):
    for name, sae in saes.items():
        sae.save_model(tmp_path / name)
    one, other = tmp_path / "one", tmp_path / "other"
    out = tmp_path / "out"
    how = ("--max-passages", 2, "--context-size", 32, "--out", out)
    done = run("report", "--sae", one, "--sae", other, *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {out}/side_by_side.html"
    text = (out / "side_by_side.html").read_text("utf-8")
    assert f"writesae-lens report --sae {one} --sae {other} --context-size 32 --max-passages 2" in text
    for saes_given, message in (
        ((one, one), "a page is of one SAE or of two different ones"),
        ((one, other, tmp_path), "a page is of one SAE or of two different ones"),
    ):
        done = run("report", *(part for sae in saes_given for part in ("--sae", sae)))
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
