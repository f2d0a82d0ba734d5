"""Attribution: which written features made the model say this, and which earlier features made these fire."""

from writesae_lens.use.attribution import figures
from writesae_lens.use.attribution.attributing import attribute
from writesae_lens.use.attribution.graph import AttributionGraph, attribution_graph

__all__ = ["AttributionGraph", "attribute", "attribution_graph", "figures"]
