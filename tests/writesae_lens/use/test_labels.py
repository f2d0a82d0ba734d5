"""Labels: kept with the SAE wherever it goes, and files that do not fit refused in one line."""

import json

import jaxtyping
import pandas as pd
import pytest
from sae_lens import SAE

from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments.origin import fingerprint_sae
from writesae_lens.use.labels import add_labels, labels_of


def make_sae(layer=1, head=2, d_sae=12):
    sae = WriteSAE(WriteSAEConfig(d_k=6, d_v=9, d_sae=d_sae, k=2))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.linear_attn.hook_write.{head}"
    return sae


def test_labels_of_a_new_sae_are_none_and_later_ones_take_the_place_of_earlier_ones():
    sae = make_sae()
    assert labels_of(sae) == {}
    add_labels(sae, {3: "names", 1: " a\nline "})
    add_labels(sae, {3: "family names", 5: ""})
    assert labels_of(sae) == {1: "a line", 3: "family names"}


def test_saving_and_loading_keep_labels_and_leave_the_weights_what_they_were(tmp_path):
    sae = make_sae()
    before = fingerprint_sae(sae)
    add_labels(sae, {0: 'dates, "1984"', 11: "été <b>"})
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert labels_of(loaded) == {0: 'dates, "1984"', 11: "été <b>"}
    assert fingerprint_sae(loaded) == before


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_files_for_several_saes_go_by_layer_and_head(tmp_path, ending):
    rows = pd.DataFrame(
        {
            "layer": [1, 1, 0],
            "head": [2, 2, 3],
            "feature": [4, 5, 4],
            "label": ["one", "", "three"],
            "score": [0.5, 0.7, 1.0],
        }
    )
    path = tmp_path / f"labels.{ending}"
    if ending == "csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=ending == "jsonl")
    saes = [make_sae(), make_sae(0, 3)]
    add_labels(saes, path)
    assert [labels_of(sae) for sae in saes] == [{4: "one"}, {4: "three"}]
    again = [make_sae(), make_sae(0, 3)]
    add_labels(again, rows)
    assert [labels_of(sae) for sae in again] == [{4: "one"}, {4: "three"}]


def test_files_for_one_sae_need_no_cell(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"7": "seven"}))
    (tmp_path / "b.csv").write_text("label,feature\n007,2\n")
    (tmp_path / "c.csv").write_text("\ufefffeature,label\n3,1984\n")
    sae = make_sae()
    for name in "a.json", "b.csv", "c.csv":
        add_labels(sae, tmp_path / name)
    assert labels_of(sae) == {2: "007", 3: "1984", 7: "seven"}


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "layer,head,feature,label\n1,2,5,\n", {}),
        ("a.csv", "layer,head,feature,label\n", {}),
        ("a.csv", "feature,label\n", {}),
        ("a.jsonl", '{"layer": 1, "head": 2, "feature": 0, "label": ""}\n', {}),
        ("a.jsonl", '\n{"feature": 4, "label": "x"}\n\n', {4: "x"}),
        # A row without a feature makes fractions of the numbers of the others.
        ("a.csv", "layer,head,feature,label\n1,2,5,x\n,,,\n1,2,,\n", {5: "x"}),
        ("a.csv", "feature,label\n,\n1,x\n", {1: "x"}),
    ],
)
def test_rows_without_a_label_are_passed_over(tmp_path, name, content, found):
    (tmp_path / name).write_text(content)
    sae = make_sae()
    add_labels(sae, tmp_path / name)
    assert labels_of(sae) == found
    assert all(type(feature) is int for feature in labels_of(sae))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "feature,name\n1,x\n", "lacks the column label: it has feature, name"),
        ("a.csv", "feature,label\n12,x\n", "feature 12 does not exist: the SAE has 0 to 11"),
        ("a.csv", "feature,label\n-1,x\n", "feature -1 does not exist"),
        ("a.csv", "feature,label\n1.5,x\n", "feature 1.5 does not exist"),
        ("a.csv", "feature,label\n,x\n", "a row with a label that lacks its feature"),
        ("a.csv", "feature,label\n1,x\n1,y\n", "has feature 1 twice"),
        ("a.csv", "layer,feature,label\n1,1,x\n", "lacks the column head"),
        ("a.csv", "layer,head,feature,label\n1,3,1,x\n", "labels of layer 1 head 3, which none"),
        ("a.csv", "", "does not read as a table of labels"),
        ("a.json", "[1]", "does not read as a table of labels"),
        ("a.json", '{"one": "x"}', "does not read as a table of labels"),
        ("a.json", '{"1": "x", "1": "y"}', "stands twice"),
        ("a.json", '{"1": "x", "01": "y"}', "feature 1 stands twice"),
        ("a.json", '{"one": "x"}', "feature 'one' must be a whole number"),
        ("a.json", '[{"layer": "1", "head": 2, "feature": 1, "label": "x"}]', "layer '1' must be a whole"),
        ("a.csv", "feature,label\n1,x\ntwo,y\n", "feature 'two' must be a whole number, not a text"),
        ("a.csv", "number,name\n1,x\n", "lacks the columns feature and label: it has number, name"),
        ("a.json", '{"1": ["x"]}', "the label of feature 1 is no text"),
        ("a.jsonl", "{", "does not read as a table of labels"),
        ("a.txt", "", "has no ending that says what it is"),
        ("none.csv", None, "does not read as a table of labels"),
    ],
)
def test_bad_files_are_refused_in_one_line_and_change_nothing(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    sae = make_sae()
    add_labels(sae, {0: "kept"})
    with pytest.raises(WriteSAEError, match=said) as error:
        add_labels(sae, tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert labels_of(sae) == {0: "kept"}


def test_what_is_no_labels_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    one, two = make_sae(), make_sae()
    with pytest.raises(WriteSAEError, match="two SAEs are on layer 1 head 2"):
        add_labels([one, two], pd.DataFrame({"layer": [1], "head": [2], "feature": [0], "label": ["x"]}))
    with pytest.raises(WriteSAEError, match="name no cells: for several SAEs"):
        add_labels([one, make_sae(0, 0)], {1: "x"})
    with pytest.raises(WriteSAEError, match="labels of 3,000,0"):
        add_labels(one, {1: "x" * 3_000_000})
    with pytest.raises(WriteSAEError, match="feature '1' must be a whole number, not a text"):
        add_labels(one, {"1": "x"})
    with pytest.raises(WriteSAEError, match="feature True does not exist"):
        add_labels(one, {True: "x"})
    with pytest.raises(WriteSAEError, match="a mapping, a table or a file, got 3"):
        add_labels(one, 3)
    one.cfg.metadata.feature_labels = [1]
    with pytest.raises(WriteSAEError, match=r"expected \{feature: label\}"):
        labels_of(one)
