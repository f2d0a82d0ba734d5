"""The paper's experiments, one call each."""

from writesae_lens.experiments.formula import logit_formula_test
from writesae_lens.experiments.partition import partition_atoms
from writesae_lens.experiments.population import population_test
from writesae_lens.experiments.replacement import replacement_test
from writesae_lens.experiments.result import ExperimentResult

__all__ = ["ExperimentResult", "logit_formula_test", "partition_atoms", "population_test", "replacement_test"]
