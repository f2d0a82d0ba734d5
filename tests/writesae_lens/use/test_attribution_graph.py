"""Edges of attribution graphs against coefficients in full passes with a changed earlier write."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages
from tests.writesae_lens.use.test_attribution import OTHER, TARGET, part_of, saes_of, site
from writesae_lens import WriteSAEError
from writesae_lens.use.attribution import attribute, attribution_graph

pytestmark = pytest.mark.filterwarnings("ignore::writesae_lens.experiments.origin.ResultWarning")
STEP = 5e-2  # of a part: a smaller step drowns in the norms, which are in float32


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    """Each shipped model in float64."""
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


def coefficients(model, prompt, source, target, part, sae_of):
    """The target's coefficient with a little more and a little less of the source's part in its write."""
    moved = torch.stack([STEP * part, -STEP * part])

    def hook(x, hook):
        x = x.clone()
        x[:, source.position] += moved
        return x

    of_source, of_target = (sae_of[row.layer, row.head] for row in (source, target))
    read = of_target.cfg.metadata.hook_name
    with torch.no_grad(), model.hooks(fwd_hooks=[(of_source.cfg.metadata.hook_name, hook)]):
        changed = model.run_with_cache(prompt.expand(2, -1), names_filter=[read])[1][read]
    wide = copy.deepcopy(of_target).to(torch.float64)
    with torch.no_grad():
        return wide.encode(changed[:, target.position])[:, target.feature]


@pytest.mark.parametrize("kind", ["codes", "rank 2", "flat"])
def test_edges_are_changes_of_coefficients_in_full_passes(model, kind):
    prompt = read_passages(model, n=1, length=12)[0]
    saes = saes_of(model, kind)
    result = attribute(model, saes, prompt, TARGET, OTHER, steps=0, n_check=0)
    graph = attribution_graph(model, saes, result, n_nodes=16)
    top = result.records[result.records.feature >= 0].head(16)
    assert graph.nodes.drop(columns="node").equals(top.reset_index(drop=True))
    node = {row.node: row for row in graph.nodes.itertuples()}
    to_logit = graph.edges[graph.edges.target == "logit"]
    assert dict(zip(to_logit.source, to_logit.attribution)) == {n: x.attribution for n, x in node.items()}
    between = graph.edges[graph.edges.target != "logit"]
    pairs = {
        (s.node, t.node)
        for s in node.values()
        for t in node.values()
        if s.layer < t.layer and s.position <= t.position
    }
    assert set(zip(between.source, between.target)) == pairs
    assert between.attribution.abs().is_monotonic_decreasing
    sae_of = {site(sae): sae for sae in saes}
    for edge in between.head(4).itertuples():
        source, target = node[edge.source], node[edge.target]
        part = part_of(model, sae_of[source.layer, source.head], prompt, source)
        up, down = coefficients(model, prompt, source, target, part, sae_of)
        change = float(up - down) / (2 * STEP)
        assert edge.weight == pytest.approx(change, rel=0.02, abs=2e-5 * target.coefficient)
        assert edge.share == pytest.approx(edge.weight / target.coefficient)
        assert edge.attribution == pytest.approx(edge.share * target.attribution)


def test_the_graph_is_saved_as_json_and_drawn(gdn, tmp_path):
    saes = [make_codes(gdn, layer=0), make_codes(gdn, layer=3, head=1)]
    result = attribute(gdn, saes, "It was late in the evening when Mr. Darcy", " was", steps=0, n_check=0)
    graph = attribution_graph(gdn, saes, result, n_nodes=6)
    saved = json.loads(graph.save(tmp_path / "graph.json").read_text())
    assert [node["node"] for node in saved["nodes"]] == graph.nodes.node.tolist()
    assert [edge["weight"] for edge in saved["edges"]] == pytest.approx(graph.edges.weight.tolist())
    assert saved["nodes"][0]["text"] == graph.nodes.text[0]
    assert saved["about"]["target_text"] == " was"
    graph.plot().savefig(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 10_000
    assert "6 nodes" in repr(graph)
    deeper = graph.save(tmp_path / "new" / "folder" / "graph.json")
    assert json.loads(deeper.read_text()) == saved
    # One from disk is as good.
    again = attribution_graph(gdn, saes, type(result).load(result.save(tmp_path / "result")), n_nodes=6)
    assert again.edges.weight.tolist() == pytest.approx(graph.edges.weight.tolist())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_the_graph_is_the_same_where_the_caller_has_switched_gradients_off(gdn, off):
    saes = [make_codes(gdn, layer=0), make_codes(gdn, layer=3, head=1)]
    result = attribute(gdn, saes, read_passages(gdn)[0], TARGET, steps=0, n_check=0)
    graph = attribution_graph(gdn, saes, result, n_nodes=12)
    with off():
        again = attribution_graph(gdn, saes, result, n_nodes=12)
    assert len(graph.edges) > len(graph.nodes)
    assert again.edges.weight.tolist() == pytest.approx(graph.edges.weight.tolist())


@pytest.mark.usefixtures("without_type_checks")
def test_results_of_something_else_are_refused(gdn):
    sae = make_codes(gdn)
    result = attribute(gdn, sae, read_passages(gdn)[0], TARGET, steps=0, n_check=0)
    with pytest.raises(WriteSAEError, match="made of a result of attribute, got a dict"):
        attribution_graph(gdn, sae, {})
    with pytest.raises(WriteSAEError, match="of other SAEs: give the ones"):
        attribution_graph(gdn, make_sae(gdn), result)
    with pytest.raises(WriteSAEError, match="n_nodes=0 makes no sense"):
        attribution_graph(gdn, sae, result, n_nodes=0)
    result.summary["model_fingerprint"] = "0"
    with pytest.raises(WriteSAEError, match="with other weights than this model's"):
        attribution_graph(gdn, sae, result)


def test_nothing_that_fires_gives_an_empty_graph(gdn, tmp_path):
    sae = make_codes(gdn)
    with torch.no_grad():
        sae.b_enc[:] = -1e3
    result = attribute(gdn, sae, read_passages(gdn)[0], TARGET, steps=0)
    graph = attribution_graph(gdn, sae, result)
    assert (len(graph.nodes), len(graph.edges)) == (0, 0)
    assert json.loads(graph.save(tmp_path / "graph.json").read_text())["edges"] == []
    assert graph.plot().axes
