"""Matrices that are built when somebody asks for them, and say so when somebody wants to change them.

``sae.W_dec`` of a WriteSAE is made of the atoms' factors at each access. A number written into it would be
lost without a word; `BuiltMatrix` refuses that and is an ordinary tensor in every other respect.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from writesae_lens.errors import WriteSAEError

_DATA: Any = torch.Tensor.data
_HARMLESS = {"requires_grad_", "retain_grad", "rename_", "share_memory_"}


class BuiltMatrix(torch.Tensor):
    """A tensor computed from parameters. Results of operations on it are plain tensors.

    Raises:
        WriteSAEError: it, or its ``.data``, is to be changed in place: the change would reach no parameter.
    """

    @classmethod
    @torch.compiler.disable
    def __torch_function__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        changed = [kwargs.get("out")]
        if _changes(func):  # its first argument, or its only one by name
            changed += args[:1] or [kwargs.get("tensor")]
        if any(isinstance(x, cls) for x in changed):
            raise WriteSAEError(LOST)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if func == _DATA.__get__ else result


LOST = (
    "W_dec and W_enc of a WriteSAE are built anew at each access, so that a change of them would be lost: "
    "change the parameters (dec_key, dec_value, enc_key, enc_value, dec_matrix, enc_matrix), or a .clone()"
)


def read_only(matrix: Tensor) -> Tensor:
    """The same numbers, as a `BuiltMatrix`, which compiled code, unable to trace it, does not get."""
    return matrix if torch.compiler.is_compiling() else matrix.as_subclass(BuiltMatrix)


def _changes(func: Any) -> bool:
    """Whether a function of torch changes its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    operator = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return in_place or operator or name == "__setitem__" or func == _DATA.__set__
