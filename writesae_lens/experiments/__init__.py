"""The paper's experiments, one call each."""

from writesae_lens.experiments.amplify import amplify
from writesae_lens.experiments.compare import compare
from writesae_lens.experiments.contexts import top_contexts
from writesae_lens.experiments.erase import erase_atom
from writesae_lens.experiments.formula import logit_formula_test
from writesae_lens.experiments.inputs import as_passages
from writesae_lens.experiments.install import install_tokens
from writesae_lens.experiments.partition import partition_atoms
from writesae_lens.experiments.population import population_test
from writesae_lens.experiments.replace import replacement_test
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.selectivity import selectivity
from writesae_lens.experiments.sign import sign_test
from writesae_lens.experiments.splice import splice_test
from writesae_lens.experiments.trace import reader_trace

__all__ = [
    "ExperimentResult",
    "amplify",
    "as_passages",
    "compare",
    "erase_atom",
    "install_tokens",
    "logit_formula_test",
    "partition_atoms",
    "population_test",
    "reader_trace",
    "replacement_test",
    "selectivity",
    "sign_test",
    "splice_test",
    "top_contexts",
]
