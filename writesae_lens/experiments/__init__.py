"""The paper's experiments, one call each."""

from writesae_lens.experiments.replacement import replacement_test
from writesae_lens.experiments.result import ExperimentResult

__all__ = ["ExperimentResult", "replacement_test"]
