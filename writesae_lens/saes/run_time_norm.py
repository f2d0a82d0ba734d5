"""Inputs normalised at run time: scaled on the way in, scaled back on the way out.

SAELens keeps the statistics of the last batch as attributes of the SAE. A zero matrix, which is a possible
write, has no norm to be divided by there, and a reconstruction without a batch before it ends in an
AttributeError. `RunTimeNorm` is what `normalize_activations` names, for a `MatrixSAE`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from writesae_lens.errors import WriteSAEError

# Added to a standard deviation before an input is divided by it, as in SAELens.
_EPSILON = 1e-5


class RunTimeNorm:
    """The pair of functions in front of `encode` and behind `decode`; "none" and the like change nothing.

    Args:
        kind: the config's ``normalize_activations``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind if kind in ("layer_norm", "constant_norm_rescale") else "none"
        self._last: tuple[Tensor, Tensor | None] | None = None  # of the batch encoded last: scale and shift

    def inputs(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The normalised batch. A zero row stays zero."""
        if self.kind == "none":
            return x
        if self.kind == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            x = x - mean
            deviation = x.std(dim=-1, keepdim=True)
            self._last = deviation, mean
            return x / (deviation + _EPSILON)
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        self._last = scale, None
        return x / scale.clamp(min=torch.finfo(scale.dtype).tiny)

    def outputs(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructions in the units of the batch that was encoded last.

        Raises:
            WriteSAEError: no batch was encoded since the last reconstruction, or one of another shape.
        """
        if self.kind == "none":
            return x
        found = "none" if self._last is None else f"one of shape {tuple(self._last[0].shape[:-1])}"
        if self._last is None or self._last[0].shape[:-1] != x.shape[:-1]:
            raise WriteSAEError(
                f"normalize_activations={self.kind!r} scales a reconstruction back by the norms of the batch "
                f"encoded before it; expected one of shape {tuple(x.shape[:-1])}, found {found}: encode first"
            )
        (scale, shift), self._last = self._last, None
        return x * scale if shift is None else x * scale + shift
