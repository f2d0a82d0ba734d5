"""Reading a prompt against encodings of each cell's own activations, and how the result is shown."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import HookedModelError
from tests.writesae_lens.experiments.truth import encoded, make_codes, make_sae, output_weights
from writesae_lens import WriteSAEError
from writesae_lens.use.labels import add_labels
from writesae_lens.use.reading import Reading, read_prompt

PROMPT = 'She said </script> "no"\nand\x1b[2J left, for\u202e the house was old.'
LABEL = "a <b>label</b>"


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def saes(model):
    """Codes and atoms on writes, SAELens's own kind, atoms on states: each of a cell of its own."""
    return [
        make_codes(model, layer=1, head=2),
        make_sae(model, layer=1, head=0, k=3),
        make_sae(model, "flat", layer=max(model.mixers), head=1),
        make_sae(model, "state", layer=1, head=1),
    ]


@pytest.fixture(scope="module")
def result(model, saes):
    return read_prompt(model, saes, PROMPT, n_features=2)


def cell_of(model, sae):
    return model.site(sae.cfg.metadata.hook_name).cell


def test_records_are_the_largest_coefficients_at_each_token(model, saes, result):
    tokens = model.to_tokens(PROMPT, prepend_bos=False)
    assert result.summary["tokens"] == tokens[0].tolist()
    for sae in saes:
        cell, acts = cell_of(model, sae), encoded(model, sae, tokens)[0]
        records = result.records
        records = records[(records.layer == cell.layer) & (records["head"] == cell.head)]
        sides = {"key": range(16), "value": range(16, 32)} if sae is saes[0] else {"atom": range(32)}
        for side, features in sides.items():
            mine = records[records.side == side]
            for position in range(len(acts)):
                found = mine[mine.position == position]
                own = sorted(((float(acts[position, f]), f) for f in features), reverse=True)[:2]
                own = [(size, feature) for size, feature in own if size > 0]
                assert found.feature.tolist() == [feature for _, feature in own]
                assert found.coefficient.tolist() == pytest.approx([size for size, _ in own], rel=1e-4)
                assert set(found.token) <= {tokens[0, position].item()}
                assert set(found.text) <= {result.summary["texts"][position]}


def test_active_features_are_counted_whether_they_are_shown_or_not(model, saes, result):
    tokens = model.to_tokens(PROMPT, prepend_bos=False)
    active = sum(int((encoded(model, sae, tokens)[0] > 0).any(0).sum()) for sae in saes)
    shown = len(result.records[["layer", "head", "feature"]].drop_duplicates())
    assert (result.summary["n_active_features"], result.summary["n_shown_features"]) == (active, shown)
    assert (
        f"{active} features active in 4 cells; {shown} shown, at most 2 a token and side" in result.headline
    )


def test_contents_promote_the_tokens_that_they_point_along(model, saes, result):
    """Of codes by their own sign; of atoms by that of the reads where they are active."""
    tokens = model.to_tokens(PROMPT, prepend_bos=False)
    for sae in saes[:2]:
        cell, acts = cell_of(model, sae), encoded(model, sae, tokens)[0]
        w_o, w_u = output_weights(model, cell.layer, cell.head)
        name = model.hook_name(cell.layer, "read")
        reads = model.run_with_cache(tokens, names_filter=[name])[1][name][0, :, cell.head].double()
        records = result.records
        records = records[(records.layer == cell.layer) & (records["head"] == cell.head)]
        for row in records.drop_duplicates("feature").itertuples():
            if row.side == "key":
                assert row.promotes == ""
                continue
            if row.side == "value":
                content = sae.dec_value[row.feature - 16].detach().double()
            else:
                content = sae.dec_value[row.feature, 0].detach().double()
                met = (acts[:, row.feature] * (reads @ sae.dec_key[row.feature, 0].detach().double())).sum()
                content = content * (-1 if met < 0 else 1)
            best = (w_u @ w_o @ content).topk(5).indices.tolist()
            texts = [model.tokenizer.decode([t]) for t in best]
            texts = [x if x and "\ufffd" not in x else f"token {t}" for x, t in zip(texts, best)]
            assert json.loads(row.promotes) == texts


def test_one_pass_reads_all_cells(model, saes, monkeypatch):
    passes = []
    layer = model.mixers[1]
    handle = layer.register_forward_hook(lambda *_: passes.append(1))
    read_prompt(model, saes[1], PROMPT)
    one = len(passes)
    read_prompt(model, saes, PROMPT)
    handle.remove()
    assert len(passes) - one == one


def test_token_ids_read_as_the_text_does(model, saes, result):
    ids = model.to_tokens(PROMPT, prepend_bos=False)
    for given in (ids, ids[0], ids[0].tolist(), ids.tolist(), np.asarray(ids[0].tolist(), dtype=np.int16)):
        again = read_prompt(model, saes, given, n_features=2)
        assert again.records.equals(result.records)
    assert again.summary["prompt"] == model.tokenizer.decode(ids[0].tolist())


def test_a_saved_result_is_the_same_and_has_its_page(model, saes, result, tmp_path):
    add_labels(saes[0], {20: LABEL})
    labelled = read_prompt(model, saes, PROMPT, n_features=16)
    assert set(labelled.records[labelled.records.feature == 20].label) >= {LABEL}
    folder = labelled.save(tmp_path / "out")
    assert {"records.csv", "summary.json", "read.png", "read.html"} <= {x.name for x in folder.iterdir()}
    again = Reading.load(folder)
    assert again.page() == labelled.page()
    assert again._repr_html_() == labelled._repr_html_()
    add_labels(saes[0], {20: ""})


def test_shells_and_notebooks_show_the_text_and_no_markup_of_it(result, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    result.show()
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert '"no"\nand[2J left' in plain
    assert "value code" in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    result.show()
    coloured = capsys.readouterr().out
    assert re.search(r"\x1b\[48;5;\d+;38;5;\d+m", coloured)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    result.show()
    assert capsys.readouterr().out == plain
    html = result._repr_html_()
    assert "</script>" not in html
    assert html.count("<span title=") == len(result.summary["tokens"]) * 4


def test_the_page_shows_cells_features_and_tokens(model, saes, chromium, tmp_path):
    add_labels(saes[0], {20: LABEL})
    result = read_prompt(model, saes, PROMPT, n_features=16)
    page = result.save(tmp_path / "out") / "read.html"
    complaints = []
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
    tab.goto(page.as_uri())
    texts = tab.locator("#text [role=button]").all_text_contents()
    assert len(texts) == len(result.summary["tokens"])
    assert tab.locator("#cell option").all_text_contents()[1] == "1:1 (states)"
    tab.select_option("#cell", label="1:2")
    token = tab.locator("#text [role=button]").nth(3)
    token.click()
    records = result.records[result.records.position == 3]
    assert tab.locator("#here tbody tr").count() == len(records)
    assert "position 3" in tab.locator("#token-title").text_content()
    row = tab.locator("#features tbody tr", has=tab.get_by_text("20", exact=True)).first
    assert LABEL in row.text_content()
    row.press("Enter")
    assert LABEL in tab.locator("#shown").text_content()
    shaded = tab.locator("#text [role=button]").evaluate_all(
        "all => all.map((x, i) => x.style.background.startsWith('rgb') ? i : -1).filter((i) => i >= 0)"
    )
    mine = result.records[(result.records["head"] == 2) & (result.records.layer == 1)]
    assert shaded == mine[mine.feature == 20].position.tolist()
    tab.click("#all")
    assert tab.locator("#all").is_disabled()
    assert complaints == []
    tab.close()
    add_labels(saes[0], {20: ""})


def test_wrong_input_is_one_line(gdn, without_type_checks):
    sae = make_sae(gdn, layer=1, head=2)
    for saes, prompt, message in (
        ([], PROMPT, "there are no SAEs"),
        ([sae, sae], PROMPT, "two SAEs belong to"),
        (sae, "", "the prompt is empty"),
        (sae, torch.zeros(2, 3, dtype=torch.long), "one prompt is wanted, got 2"),
        ("sae", PROMPT, "an SAE is wanted"),
        ([sae, make_sae(gdn, "state", layer=1, head=2)], PROMPT, "two SAEs belong to layer 1 head 2"),
        (sae, ["hello"], "a prompt is a text, or token ids"),
        (sae, None, "a prompt is a text, or token ids .* got None"),
        (sae, [], "a prompt is a text, or token ids"),
        (sae, [[1], [2, 3]], "a prompt is a text, or token ids"),
        (sae, np.array([1.5]), "a prompt is a text, or token ids"),
        (sae, torch.tensor([1.5]), "a prompt is a text, or token ids"),
        (sae, [5, 99999], "token ids run from 5 to 99999"),
    ):
        with pytest.raises(WriteSAEError, match=message) as caught:
            read_prompt(gdn, saes, prompt)
        assert "\n" not in str(caught.value)
    with pytest.raises(WriteSAEError, match="n_features=0"):
        read_prompt(gdn, sae, PROMPT, n_features=0)
    with (
        gdn.hooks([("hook_embed", lambda x, hook: None)]),
        pytest.raises(HookedModelError, match="is hooked"),
    ):
        read_prompt(gdn, sae, PROMPT)
