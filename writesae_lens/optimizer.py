"""Clearing an optimiser's memory of atoms that start anew, wherever that optimiser lives.

SAELens's trainer owns the optimiser and gives the SAE no access to it. torch lets anyone watch the steps of
all optimisers; the watch set here acts on the first one that holds the parameters, and ends.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


def forget_moments(parameters: list[nn.Parameter], rows: Int[Tensor, " row"]) -> None:
    """Zero the state of some rows, before the next step of the optimiser that holds these parameters."""

    def clear(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        mine = [p for p in parameters if id(p) in held]
        if mine:
            watch.remove()
        for parameter in mine:
            for state in optimizer.state[parameter].values():
                if torch.is_tensor(state) and state.shape == parameter.shape:
                    state[rows] = 0

    watch = register_optimizer_step_pre_hook(clear)
