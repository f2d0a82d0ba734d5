"""Features for other tools: JSON lines, and Neuronpedia's layout."""

from writesae_lens.use.exporting.features import export_features

__all__ = ["export_features"]
