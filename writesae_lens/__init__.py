"""WriteSAE: dictionaries of cache writes, as a SAELens architecture. Importing registers it with SAELens.

>>> import writesae_lens
>>> from writesae_lens import WriteSAETrainingConfig
"""

import warnings

with warnings.catch_warnings():
    # SAELens imports a deprecated module of TransformerLens; under -W error that would be ours to explain.
    warnings.simplefilter("ignore", DeprecationWarning)
    import sae_lens as _  # noqa: F401

from hooked_models.moved import keep_old_names
from writesae_lens.errors import WriteSAEError
from writesae_lens.moved import OLD_NAMES
from writesae_lens.saelens.registration import register
from writesae_lens.saes.config import (
    PAPER_SCHEDULE,
    RECOMMENDED_SCHEDULE,
    WriteSAEConfig,
    WriteSAETrainingConfig,
)
from writesae_lens.saes.sae import WriteSAE
from writesae_lens.saes.training_sae import WriteTrainingSAE
from writesae_lens.use.attribution import attribute, attribution_graph
from writesae_lens.use.autolabel import label_features
from writesae_lens.use.direct_effects import head_logit_effects
from writesae_lens.use.exporting import export_features
from writesae_lens.use.labels import add_labels, labels_of
from writesae_lens.use.patching import patch_writes
from writesae_lens.use.reading import read_prompt
from writesae_lens.use.steer import steer
from writesae_lens.use.steering import steering

__all__ = [
    "PAPER_SCHEDULE",
    "RECOMMENDED_SCHEDULE",
    "WriteSAE",
    "WriteSAEConfig",
    "WriteSAEError",
    "WriteSAETrainingConfig",
    "WriteTrainingSAE",
    "add_labels",
    "attribute",
    "attribution_graph",
    "export_features",
    "head_logit_effects",
    "label_features",
    "labels_of",
    "patch_writes",
    "read_prompt",
    "steer",
    "steering",
]
__version__ = "0.1.0"

register()
keep_old_names(OLD_NAMES)
