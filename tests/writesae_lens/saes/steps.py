"""Inputs of one training step, shared by the tests of the SAEs."""

import torch
from sae_lens.saes.sae import TrainStepInput

from writesae_lens.saes.packed import PackedWrites, Write

D_K, D_V = 6, 9
COEFFICIENTS = {"l0": 0.7, "l1": 0.3}


def packed(x):
    """Flattened rank-1 rows as the activation store hands them over."""
    left, size, right = torch.linalg.svd(x.unflatten(-1, (D_K, D_V)), full_matrices=False)
    return PackedWrites(Write((left[..., :1] * size[:, None, :1]).mT.contiguous(), right[:, :1].contiguous()))


def step_input(x, step=0, dead=None, logging=False):
    return TrainStepInput(
        sae_in=x,
        coefficients=COEFFICIENTS,
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=logging,
    )
