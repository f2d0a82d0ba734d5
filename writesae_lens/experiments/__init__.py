"""The paper's experiments, one call each.

One module an experiment, named like its command; each declares itself in `catalogue.EXPERIMENTS`, and is
imported here whatever its name. Where a module and its function have one name (``amplify``, ``compare``,
``selectivity``, ``stability``), the name in this package is the function.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS, Experiment
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.result import ExperimentResult

for _module in iter_modules(__path__, prefix=f"{__name__}."):
    import_module(_module.name)
globals().update({entry.function.__name__: entry.function for entry in (EXPERIMENTS | OF_MODELS).values()})

if TYPE_CHECKING:  # the lines above are the real imports; these are for type checkers and editors
    from writesae_lens.experiments.amplify import amplify as amplify
    from writesae_lens.experiments.compare import compare as compare
    from writesae_lens.experiments.contexts import top_contexts as top_contexts
    from writesae_lens.experiments.erase import erase_atom as erase_atom
    from writesae_lens.experiments.formula import logit_formula_test as logit_formula_test
    from writesae_lens.experiments.install import install_tokens as install_tokens
    from writesae_lens.experiments.map import memory_map as memory_map
    from writesae_lens.experiments.partition import partition_atoms as partition_atoms
    from writesae_lens.experiments.population import population_test as population_test
    from writesae_lens.experiments.replace import replacement_test as replacement_test
    from writesae_lens.experiments.selectivity import selectivity as selectivity
    from writesae_lens.experiments.sign import sign_test as sign_test
    from writesae_lens.experiments.splice import splice_test as splice_test
    from writesae_lens.experiments.stability import stability as stability
    from writesae_lens.experiments.trace import reader_trace as reader_trace

__all__ = ["EXPERIMENTS", "OF_MODELS", "Experiment", "ExperimentResult", "as_passages"]
