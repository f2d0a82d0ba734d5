"""Attribution graph: which earlier written features made the features fire that the attribution names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.edits import AddedWrites
from hooked_models.files.whole_files import write_whole
from hooked_models.hooked_recurrent import Cell
from hooked_models.recordings import record_recurrences
from hooked_models.recurrence import Recurrence
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.options import Count, check, shown
from writesae_lens.experiments.origin import fingerprint_model, fingerprint_sae
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.use.attribution.ablations import stacked
from writesae_lens.use.attribution.attributing import ERROR, cells_of, each_row, heads_of, part_of
from writesae_lens.use.attribution.memory import hooked, last_logits
from writesae_lens.use.attribution.parts import CellParts
from writesae_lens.use.prompts import SAEs

LOGIT = "logit"
"""The node that all others lead to: the difference of the two logits."""
_ABOUT = ("model", "prompt", "target_text", "alternative_text", "position", "logit_difference")


@dataclasses.dataclass
class AttributionGraph:
    """Features of single writes, and how much each owes to features of earlier writes in lower layers.

    Args:
        nodes: a row a feature in one write: node (its name), and the columns of the attribution's records.
        edges: a row a pair: source and target (nodes, or "logit" as a target); weight, how much smaller the
            target's coefficient would be without the source, to first order, in units of the coefficient (of
            the logit difference: the source's attribution); share, that over the coefficient (or the logit
            difference); attribution, share times the target's attribution: what the source does to the
            logit difference through the target (of an edge to "logit": all it does). The strongest
            attributions first.
        about: what it is of: model, prompt, the two tokens, position, logit_difference.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    about: dict[str, Any]

    def __repr__(self) -> str:
        sizes = f"{len(self.nodes)} nodes and {len(self.edges)} edges"
        return f"attribution graph: {sizes} [.nodes .edges .plot() .save()]"

    def save(self, path: str | Path) -> Path:
        """Write nodes, edges and what they are of as one JSON file, in a folder that need not be there yet.

        Returns:
            the path.
        """
        path = Path(path)
        tables = {
            name: frame.astype(object).where(frame.notna(), None).to_dict("records")
            for name, frame in (("nodes", self.nodes), ("edges", self.edges))
        }
        text = json.dumps({"about": self.about} | tables, indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda beside: beside.write_text(text + "\n", encoding="utf-8"))
        return path

    def plot(self) -> Figure:
        """Nodes by position and layer, with an arrow for each of the strongest edges."""
        from writesae_lens.use.attribution.graph_figure import plot_graph

        return plot_graph(self)


@torch.inference_mode(False)
@torch.enable_grad()
def attribution_graph(
    model: HookedRecurrent, saes: SAEs, result: ExperimentResult, n_nodes: Count = 24
) -> AttributionGraph:
    """Which features of earlier writes, in lower layers, made the most important features fire.

    The derivative of each node's coefficient, with the features of its write that are active held fixed, by
    the writes of all lower layers: one backward pass a node. An edge counts all ways from its source to its
    target, those through other nodes too. Within a layer no write depends on another one.

    Args:
        model: the model.
        saes: the SAEs of the attribution.
        result: of `attribute`.
        n_nodes: features with the largest attributions that become nodes.

    Raises:
        WriteSAEError: the result is not one of `attribute`, or of another model or other SAEs.
        HookedModelError: anything is hooked in the model.
    """
    check(Count, n_nodes=n_nodes)
    of_cell = cells_of(model, saes)
    _check_result(model, list(of_cell.values()), result)
    nodes: Any = result.records[result.records.feature != ERROR].head(n_nodes).reset_index(drop=True)
    names = [f"L{x.layer}H{x.head}_{x.side}{x.feature}@{x.position}" for x in each_row(nodes)]
    nodes.insert(0, "node", names)
    traced = _Traced.of(model, result, list(heads_of(of_cell)))
    parts = {cell: traced.parts(cell, sae) for cell, sae in of_cell.items() if _nodes_of(nodes, cell).any()}
    contributions = _contributions(model, traced, nodes, parts)
    difference = result.summary["logit_difference"]
    edges = [
        (node, LOGIT, x, x / difference if difference else None, x)
        for node, x in zip(nodes.node, nodes.attribution, strict=True)
    ]
    for target in each_row(nodes):
        sources = nodes[(nodes.layer < target.layer) & (nodes.position <= target.position)]
        gradients = traced.gradients(target, parts) if len(sources) else {}
        for source in each_row(sources):
            by_outputs = gradients[source.layer][:, source.head]
            weight = float((by_outputs * contributions[source.node]).sum())
            share = weight / target.coefficient
            edges.append((source.node, target.node, weight, share, share * target.attribution))
    table = pd.DataFrame(edges, columns=["source", "target", "weight", "share", "attribution"])
    order = table.attribution.abs().sort_values(ascending=False, kind="stable").index
    about = {name: result.summary[name] for name in _ABOUT}
    return AttributionGraph(nodes, table.loc[order].reset_index(drop=True), about)


def _check_result(model: HookedRecurrent, saes: list[SAE[Any]], result: Any) -> None:
    """Refuse what is no attribution, or one of another model or of other SAEs."""
    if not isinstance(result, ExperimentResult) or result.name != "attribute":
        what = result.name if isinstance(result, ExperimentResult) else shown(result)
        raise WriteSAEError(f"the graph is made of a result of attribute, got {what}: call attribute first")
    if result.summary["model_fingerprint"] != fingerprint_model(model):
        raise WriteSAEError(
            f"the attribution is of {result.summary['model']} with other weights than this model's: give the "
            "model that attribute was called with"
        )
    if result.summary["sae_fingerprints"] != [fingerprint_sae(sae) for sae in saes]:
        raise WriteSAEError("the attribution is of other SAEs: give the ones that attribute was called with")


def _nodes_of(nodes: pd.DataFrame, cell: Cell) -> pd.Series:
    return (nodes.layer == cell.layer) & (nodes["head"] == cell.head)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A native pass whose writes can be differentiated by the outputs of the memories below them.

    Args:
        recurrences: of each layer, with gradients.
        zeros: added to each layer's outputs S_t^T q_t.
    """

    recurrences: dict[int, Recurrence]
    zeros: dict[int, Float[Tensor, "one pos head d_v"]]

    @classmethod
    def of(cls, model: HookedRecurrent, result: ExperimentResult, layers: list[int]) -> _Traced:
        """Run the prompt of an attribution."""
        device = next(model.original_model.parameters()).device
        tokens = torch.tensor(result.summary["tokens"][: result.summary["position"] + 1], device=device)
        zeros: dict[int, Tensor] = {}

        def listen(layer: int) -> Any:
            def hook(x: Tensor, hook: Any) -> Tensor:
                zeros[layer] = torch.zeros_like(x, requires_grad=True)
                return x + zeros[layer]

            return hook

        hooks = {layer: {"recurrence_out": listen(layer)} for layer in layers}
        with hooked(model, hooks), record_recurrences([model.mixers[n] for n in layers]) as recorded:
            last_logits(model, tokens[None])
        return cls({n: recorded[model.mixers[n]] for n in layers}, zeros)

    def parts(self, cell: Cell, sae: SAE[Any]) -> CellParts:
        """What the features of a cell's SAE have in its writes."""
        sides = self.recurrences[cell.layer].k, self.recurrences[cell.layer].v
        return CellParts.of(sae, cell, *(x[0, :, cell.head].detach().float() for x in sides))

    def gradients(self, node: Any, parts: dict[Cell, CellParts]) -> dict[int, Float[Tensor, "pos head d_v"]]:
        """The gradient of a node's coefficient by the outputs of each layer below it."""
        sae = next(x.sae for c, x in parts.items() if (c.layer, c.head) == (node.layer, node.head))
        recurrence = self.recurrences[node.layer]
        key, value = (x[0, node.position, node.head] for x in (recurrence.k, recurrence.v))
        # By the matrix first: its derivatives are those of the encoder at the features active here.
        write = (key[:, None] * value).detach().flatten()[None].requires_grad_()
        (by_write,) = torch.autograd.grad(sae.encode(write)[0, node.feature], write)
        by_write = by_write.view(len(key), len(value)).to(key)
        moved = key @ (by_write @ value.detach()) + (key.detach() @ by_write) @ value
        below = [layer for layer in self.zeros if layer < node.layer]
        grads = torch.autograd.grad(moved, [self.zeros[n] for n in below], retain_graph=True)
        return {layer: grad[0] for layer, grad in zip(below, grads, strict=True)}


@torch.no_grad()
def _contributions(
    model: HookedRecurrent, traced: _Traced, nodes: pd.DataFrame, parts: dict[Cell, CellParts]
) -> dict[str, Float[Tensor, "pos d_v"]]:
    """What each node's part adds to the outputs S_t^T q_t of its head."""
    found: dict[str, Tensor] = {}
    of_layer: dict[Any, Any] = dict(iter(nodes.groupby("layer")))
    for layer, rows in of_layer.items():
        native, n_rows = traced.recurrences[layer], len(rows)
        recurrence = native.map(lambda x, n=n_rows: x.detach().expand(n, *x.shape[1:]))
        key, value = stacked([part_of(parts, row) for row in each_row(rows)])
        heads, positions = (torch.tensor(rows[n].tolist(), device=key.device) for n in ("head", "position"))
        edit = AddedWrites(model.mixers[layer], heads, positions, key, value, linear=False)
        outputs = edit.added_to(torch.zeros_like(recurrence.v), recurrence)
        found |= {node: outputs[n, :, heads[n]] for n, node in enumerate(rows.node)}
    return found
