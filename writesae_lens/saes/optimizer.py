"""Clearing an optimiser's moments of atoms that start anew.

SAELens's trainer owns the optimiser and gives the SAE no access to it. torch calls a hook before the steps of
all optimisers (`writesae_lens.saelens.upstream`); `clear_moments` acts on the one that holds the parameters
in question.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

# Parameter: the rows to forget before its next step.
_PENDING: Any = WeakIdKeyDictionary()


def forget_moments(parameters: list[nn.Parameter], rows: Int[Tensor, " row"]) -> None:
    """Zero the state of some rows, before the next step of the optimiser that holds these parameters."""
    for parameter in (p for p in parameters if p.requires_grad):
        _PENDING[parameter] = torch.cat([_PENDING.get(parameter, rows[:0]), rows])


def clear_moments(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Zero what `forget_moments` was asked to, in the optimiser that is about to step."""
    if not _PENDING:
        return
    for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
        rows = _PENDING.pop(parameter, None)
        for state in optimizer.state.get(parameter, {}).values() if rows is not None else ():
            if torch.is_tensor(state) and state.shape == parameter.shape:
                state[rows] = 0
