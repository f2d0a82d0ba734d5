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

__all__ = [
    "PAPER_SCHEDULE",
    "RECOMMENDED_SCHEDULE",
    "WriteSAE",
    "WriteSAEConfig",
    "WriteSAEError",
    "WriteSAETrainingConfig",
    "WriteTrainingSAE",
]
__version__ = "0.1.0"

register()
keep_old_names(OLD_NAMES)
