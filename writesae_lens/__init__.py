"""WriteSAE: dictionaries of cache writes, as a SAELens architecture. Importing registers it with SAELens.

>>> import writesae_lens
>>> from writesae_lens import WriteSAETrainingConfig
"""

from writesae_lens.errors import WriteSAEError
from writesae_lens.sae import WriteSAE, WriteSAEConfig, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saelens_plugin import register

__all__ = [
    "WriteSAE",
    "WriteSAEConfig",
    "WriteSAEError",
    "WriteSAETrainingConfig",
    "WriteTrainingSAE",
]
__version__ = "0.1.0"

register()
