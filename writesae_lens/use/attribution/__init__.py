"""Attribution: which written features made the model say this, and which earlier features made these fire."""

from writesae_lens.use.attribution.attributing import attribute

__all__ = ["attribute"]
