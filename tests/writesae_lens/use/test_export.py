"""The export: lines against a schema and plain encodings, Neuronpedia's layout against its tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import (
    HEAD,
    LAYER,
    atoms_of,
    encoded,
    every_subject,
    make_codes,
    make_sae,
    read_passages,
    silenced,
)
from writesae_lens import WriteSAEError
from writesae_lens.experiments.subjects import find_site
from writesae_lens.report.effects import measure_effects
from writesae_lens.use.exporting import export_features
from writesae_lens.use.exporting import neuronpedia as layout
from writesae_lens.use.labels import add_labels, labels_of

N, LENGTH = 4, 40


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Token(Strict):
    token: int = Field(ge=0)
    text: str
    shift: float
    agreement: float = Field(ge=0, le=1)
    control: float


class Histogram(Strict):
    edges: list[float] = Field(min_length=21, max_length=21)
    counts: list[int] = Field(min_length=20, max_length=20)


class Context(Strict):
    kind: Literal["top", "random", "silent"]
    passage: int = Field(ge=0)
    position: int = Field(ge=0)
    at: int = Field(ge=0)
    coefficient: float = Field(ge=0)
    tokens: list[str] = Field(min_length=1)
    activations: list[float]


class Line(Strict):
    model: str
    hook_name: str
    layer: int
    head: int
    site: Literal["write", "state"]
    sae: str = Field(pattern="^sha256:[0-9a-f]{16}$")
    feature: int = Field(ge=0)
    side: Literal["atom", "key", "value"]
    label: str
    text: str
    version: str
    n_positions: int = Field(gt=0)
    n_active: int = Field(ge=0)
    density: float = Field(ge=0, le=1)
    max_coefficient: float | None
    median_coefficient: float | None
    histogram: Histogram
    decoder_norm: float = Field(gt=0)
    n_measured: int = Field(ge=0)
    promoted: list[Token]
    suppressed: list[Token]
    contexts: list[Context]


def boot(name: str) -> Any:
    return HookedRecurrent.boot_transformers(name, device="cpu")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return boot(request.param)


@pytest.fixture(scope="module")
def gdn() -> Any:
    return boot("tiny-gdn")


def export(model: Any, saes: Any, out: Path, **options: Any) -> list[dict[str, Any]]:
    tokens = read_passages(model, N, LENGTH)
    options = {"n_contexts": 3, "before": 4, "after": 2, "n_tokens": 5, "verbose": False} | options
    path = export_features(model, saes, tokens, out, **options)
    assert path == out / "features.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_line(line: dict[str, Any], acts: torch.Tensor, tokens: torch.Tensor, model: Any) -> None:
    """One line against the coefficients of its feature, [passage, pos]."""
    Line.model_validate(line)
    values = acts[acts > 0].numpy()
    assert (line["n_positions"], line["n_active"]) == (acts.numel(), len(values))
    assert line["density"] == len(values) / acts.numel()
    if not len(values):
        assert line["max_coefficient"] is line["median_coefficient"] is None
    else:
        assert line["max_coefficient"] == pytest.approx(values.max(), rel=1e-3)
        assert line["median_coefficient"] == pytest.approx(np.median(values), rel=1e-3)
    assert sum(line["histogram"]["counts"]) == len(values)
    np.testing.assert_allclose(line["histogram"]["edges"][-1], values.max(initial=0) or 1, rtol=1e-3)
    kinds = [context["kind"] for context in line["contexts"]]
    assert kinds == sorted(kinds, key=["top", "random", "silent"].index)
    places = [(c["passage"], c["position"]) for c in line["contexts"] if c["kind"] != "silent"]
    assert len(set(places)) == len(places)
    for context in line["contexts"]:
        passage, position = context["passage"], context["position"]
        start, end = max(0, position - 4), min(LENGTH, position + 3)
        window = acts[passage, start:end].numpy()
        np.testing.assert_allclose(context["activations"], window, rtol=1e-3, atol=1e-12)
        assert context["at"] == position - start
        assert context["coefficient"] == context["activations"][context["at"]]
        assert context["tokens"] == [model.tokenizer.decode([int(t)]) for t in tokens[passage, start:end]]
        assert (window > 0).any() == (context["kind"] != "silent")
    top = [c["coefficient"] for c in line["contexts"] if c["kind"] == "top"]
    assert top == sorted(top, reverse=True)
    assert not len(values) or top[0] == line["max_coefficient"]


@every_subject
def test_lines_are_what_plain_encodings_say(model, kind, options, tmp_path):
    sae, tokens = make_sae(model, kind, **options), read_passages(model, N, LENGTH)
    silenced(sae, 3)
    lines, acts = export(model, sae, tmp_path), encoded(model, sae, tokens)
    assert [line["feature"] for line in lines] == list(range(32))
    for line, of_feature in zip(lines, acts.unbind(-1), strict=True):
        check_line(line, of_feature, tokens, model)
        assert (line["side"], line["site"]) == ("atom", "state" if kind == "state" else "write")
        assert (line["layer"], line["head"], line["model"]) == (LAYER, HEAD, model.cfg.model_name)
    assert lines[3]["n_active"] == 0
    norms = atoms_of(sae, model).flatten(1).norm(dim=1)
    np.testing.assert_allclose([line["decoder_norm"] for line in lines], norms, rtol=1e-3)


@pytest.mark.parametrize("model", zoo.SHIPPED, indirect=True)
def test_codes_have_sides_and_value_codes_have_effects(model, tmp_path):
    sae, tokens = make_codes(model), read_passages(model, N, LENGTH)
    lines, acts = export(model, sae, tmp_path), encoded(model, sae, tokens)
    for line, of_feature in zip(lines, acts.unbind(-1), strict=True):
        check_line(line, of_feature, tokens, model)
    assert [line["side"] for line in lines] == ["key"] * 16 + ["value"] * 16
    vectors = torch.cat([sae.dec_key.norm(dim=-1), sae.dec_value.norm(dim=-1)]).tolist()
    np.testing.assert_allclose([line["decoder_norm"] for line in lines], vectors, rtol=1e-3)
    effects = measure_effects(model, sae, find_site(model, sae), tokens, 5, verbose=False)
    assert [line["feature"] for line in lines if line["n_measured"]] == effects.atom.tolist()
    for row, code in enumerate(effects.atom.tolist()):
        shown = lines[code]["promoted"] + lines[code]["suppressed"]
        assert [x["token"] for x in shown] == effects.tokens[row].tolist()
        np.testing.assert_allclose([x["shift"] for x in shown], effects.shift[row], rtol=1e-3)
        assert lines[code]["n_measured"] == effects.n[row]
    assert not any(line["promoted"] or line["suppressed"] for line in lines[:16])


def test_the_file_reloads_and_is_the_same_each_time(gdn, tmp_path):
    saes = [make_sae(gdn, layer=0, head=1), make_codes(gdn)]
    add_labels(saes[0], {4: "quotes \"'\n", 5: "naïve"})
    lines = export(gdn, saes, tmp_path / "a")
    assert lines == export(gdn, reversed(saes), tmp_path / "b")
    assert lines != export(gdn, saes, tmp_path / "c", seed=1)
    frame = pd.read_json(tmp_path / "a" / "features.jsonl", lines=True)
    assert list(frame.columns) == list(Line.model_fields)
    assert list(frame.groupby(["layer", "head"]).size()) == [32, 32]
    assert dict(frame.label[frame.label != ""]) == {4: "quotes \"'", 5: "naïve"}
    again = make_sae(gdn, layer=0, head=1), make_codes(gdn)
    add_labels(again, tmp_path / "a" / "features.jsonl")
    assert labels_of(again[0]) == labels_of(saes[0])


def test_text_is_cut_as_in_the_saes_training(gdn, tmp_path):
    sae = make_sae(gdn)
    sae.cfg.metadata.context_size = 16
    path = export_features(gdn, sae, zoo.text("test")[:400], tmp_path, n_contexts=1, verbose=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert max(c["position"] for line in lines for c in line["contexts"]) < 16
    assert lines[0]["n_positions"] % 16 == 0


def test_bad_input_is_refused_and_writes_nothing(gdn, tmp_path):
    sae, tokens = make_sae(gdn), read_passages(gdn)
    out = tmp_path / "out"
    with pytest.raises(WriteSAEError, match="nothing fires in 2 passages"):
        export_features(gdn, silenced(make_sae(gdn)), tokens, out, verbose=False)
    with pytest.raises(WriteSAEError, match="is no name of a source set"):
        export_features(gdn, sae, tokens, out, neuronpedia="My SAE", verbose=False)
    with pytest.raises(WriteSAEError, match="two SAEs belong to the write of layer 1 head 2"):
        export_features(gdn, [sae, sae], tokens, out, verbose=False)
    with pytest.raises(WriteSAEError, match="n_contexts=0 makes no sense"):
        export_features(gdn, sae, tokens, out, n_contexts=0, verbose=False)
    assert not out.exists()
    out.write_text("a file")
    for wrong in (out, out / "below", Path("/proc/none/x")):
        with pytest.raises(WriteSAEError, match=r"cannot be made: .*; give another folder") as error:
            export_features(gdn, sae, tokens, wrong, n_contexts=1, verbose=False)
        assert "\n" not in str(error.value)
    assert out.read_text() == "a file"


def test_what_an_earlier_call_wrote_for_neuronpedia_goes_with_its_features(gdn, tmp_path):
    export(gdn, make_sae(gdn, layer=0, head=1), tmp_path, n_contexts=1, neuronpedia="first")
    folder = tmp_path / "neuronpedia"
    export(gdn, make_sae(gdn), tmp_path, n_contexts=1, neuronpedia="second")
    assert [path.name for path in (folder / "tiny-gdn").iterdir()] == ["1-second__h2"]
    (folder / "notes.txt").write_text("of the user")
    export(gdn, make_sae(gdn), tmp_path, n_contexts=1)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    export(gdn, make_sae(gdn), tmp_path, n_contexts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["features.jsonl"]


# Columns of Neuronpedia's tables that its importer fills from the files, and those that it cannot do without
# (apps/webapp/prisma/schema.prisma: no default there).
TABLES = {
    "features": (
        "modelId layer index sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel "
        "vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices "
        "neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson "
        "correlated_neurons_l1 correlated_features_indices correlated_features_pearson "
        "correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero "
        "freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights "
        "logits_hist_data_bar_values decoder_weights_dist umap_cluster "
        "umap_log_feature_sparsity umap_x umap_y",
        "modelId layer index",
    ),
    "activations": (
        "id tokens dataIndex index layer modelId dataSource maxValue maxValueTokenIndex minValue values "
        "dfaValues dfaTargetIndex dfaMaxValue creatorId createdAt lossValues logitContributions binMin "
        "binMax binContains qualifyingTokenIndex",
        "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId",
    ),
    "explanations": (
        "id modelId layer index embedding description authorId triggeredByUserId notes scoreV1 scoreV2 "
        "umap_x umap_y umap_cluster umap_log_feature_sparsity typeName "
        "explanationModelName createdAt updatedAt",
        "id modelId layer index description authorId updatedAt",
    ),
    "model": (
        "id displayNameShort displayName creatorId tlensId dimension visibility inferenceEnabled instruct "
        "layers neuronsPerLayer createdAt owner updatedAt website",
        "id creatorId layers neuronsPerLayer owner",
    ),
    "release": (
        "name visibility isNewUi featured description descriptionShort urls creatorEmail creatorName "
        "creatorNameShort creatorId createdAt",
        "name description creatorName creatorId urls",
    ),
    "sourceset": (
        "modelId name hasDashboards visibility description type creatorName urls creatorEmail creatorId "
        "releaseName createdAt",
        "modelId name description creatorName creatorId",
    ),
    "source": (
        "id modelId hasDashboards inferenceEnabled saelensConfig saelensRelease saelensSaeId hfRepoId "
        "hfFolderId visibility setName creatorId num_prompts num_tokens_in_prompt dataset notes createdAt",
        "id modelId setName creatorId",
    ),
}


def read_table(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.splitlines()]


def check_table(rows: list[dict[str, Any]], name: str) -> None:
    known, needed = (set(columns.split()) for columns in TABLES[name])
    for row in rows:
        assert set(row) <= known
        assert needed <= set(row)
        assert list(row) == list(rows[0])  # the importer takes the columns from the first line


def test_neuronpedia_gets_folders_of_its_tables(gdn, tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BATCH", 20)
    saes = [make_sae(gdn, layer=0, head=1), make_codes(gdn), make_sae(gdn, "state")]
    add_labels(saes[1], {0: "an address", 31: "a content"})
    lines = export(gdn, saes, tmp_path, neuronpedia="writesae-2k")
    folder = tmp_path / "neuronpedia" / "tiny-gdn"
    sources = ["0-writesae-2k__h1", "1-writesae-2k__h2", "1-writesae-2k__h2-state"]
    assert sorted(path.name for path in folder.iterdir()) == sources
    own = {name: [line for line in lines if line["hook_name"] == sae.cfg.metadata.hook_name]
           for name, sae in zip(sources, saes, strict=True)}  # fmt: skip
    for name in sources:
        for table in ("model", "release", "sourceset", "source"):
            (row,) = read_table(folder / name / f"{table}.jsonl")
            check_table([row], table)
        assert (row["id"], row["modelId"], row["setName"]) == (name, "tiny-gdn", "writesae-2k")
        features = [row for n in (0, 1) for row in read_table(folder / name / f"features/batch-{n}.jsonl.gz")]
        check_table(features, "features")
        assert [row["index"] for row in features] == [str(n) for n in range(32)]
        assert {(row["modelId"], row["layer"]) for row in features} == {("tiny-gdn", name)}
        for row, line in zip(features, own[name], strict=True):
            assert row["frac_nonzero"] == line["density"]
            assert row["pos_str"] == [x["text"] for x in line["promoted"]]
            assert row["neg_values"] == [x["shift"] for x in line["suppressed"]]
            assert row["freq_hist_data_bar_heights"] == line["histogram"]["counts"]
            assert len(row["freq_hist_data_bar_values"]) == 20
        check_activations(folder / name, own[name])
    explained = [
        row for n in (0, 1) for row in read_table(folder / sources[1] / f"explanations/batch-{n}.jsonl.gz")
    ]
    check_table(explained, "explanations")
    assert [(row["index"], row["description"]) for row in explained] == [
        ("0", "an address"),
        ("31", "a content"),
    ]
    assert not (folder / sources[0] / "explanations").exists()


def check_activations(folder: Path, lines: list[dict[str, Any]]) -> None:
    rows = [row for n in (0, 1) for row in read_table(folder / f"activations/batch-{n}.jsonl.gz")]
    check_table(rows, "activations")
    assert len({row["id"] for row in rows}) == len(rows)
    shown = [(line, c) for line in lines for c in line["contexts"] if c["kind"] != "silent"]
    for row, (line, context) in zip(rows, shown, strict=True):
        assert row["index"] == str(line["feature"])
        assert (row["tokens"], row["values"]) == (context["tokens"], context["activations"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert (row["binMin"] == -1) == (context["kind"] == "top")
