"""What a training costs beside the model's forward passes: steps of the SAEs, and memory."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from writesae_lens.reproduce.units import Size, Speeds, seconds
from writesae_lens.saelens.runner import RUNNER_DEFAULTS
from writesae_lens.saes.config import WriteSAETrainingConfig
from writesae_lens.saes.packed import PackedWrites, Write
from writesae_lens.saes.training_sae import WriteTrainingSAE

# Bytes of a trained parameter: itself, its gradient, and Adam's two moments. Gradients, clipping and Adam
# take as long as reading all weights so many times, measured on SAELens's TopK of 1,536 and 16,384 inputs.
_BYTES, _PASSES = 16, 70
# Copies of the shuffled inputs that exist at once while SAELens mixes new ones into its buffer.
_COPIES = 2
# Tensors as wide as the model that a forward pass holds at once, its MLP's and the recurrence's among them.
_WIDE = 24


def n_trained(cfg: TrainingSAEConfig) -> int:
    """Parameters of an SAE in training; a flat one has an encoder and a decoder of d_in x d_sae."""
    if not isinstance(cfg, WriteSAETrainingConfig):
        return 2 * cfg.d_in * cfg.d_sae
    if cfg.decoder == "codes":
        return 2 * (cfg.n_key * cfg.d_k + cfg.n_value * cfg.d_v)
    return 2 * cfg.d_sae * (cfg.d_k + cfg.d_v) + cfg.d_sae


def step_seconds(
    cfg: TrainingSAEConfig, batch: int, site: str, device: str = "cpu", speeds: Speeds | None = None
) -> float:
    """Seconds of a step of one SAE, optimiser included, its inputs at hand.

    A WriteSAE's steps are timed. A flat SAE may be too large to build beside nothing: its step is six dense
    products of inputs and weights, and a dozen passes over the weights.

    Args:
        cfg: of the SAE.
        batch: inputs of a step.
        site: whether they are a cell's writes (``write``) or states (``state``).
        device: of the SAE.
        speeds: of this machine, for a flat SAE.
    """
    if not isinstance(cfg, WriteSAETrainingConfig):
        assert speeds is not None
        n = n_trained(cfg)
        return 6 * batch * n / speeds.wide_product + _PASSES * 4 * n / speeds.read
    sae = WriteTrainingSAE(cfg).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    x = _inputs(cfg, batch, site, device)
    dead = torch.zeros(cfg.d_sae, dtype=torch.bool, device=device)
    coefficients = {name: float(c.value) for name, c in sae.get_coefficients().items()}

    def step() -> None:
        step_input = TrainStepInput(x, coefficients, dead, 1, False)
        sae.training_forward_pass(step_input).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with torch.enable_grad():
        return seconds(step, device)


def _inputs(cfg: WriteSAETrainingConfig, batch: int, site: str, device: str) -> Any:
    if site == "state":
        return torch.randn(batch, cfg.d_in, device=device)
    key, value = (torch.randn(batch, 1, d, device=device) for d in (cfg.d_k, cfg.d_v))
    reads = torch.randn(batch, 1 + len(cfg.later_reads), cfg.d_k, device=device)
    return PackedWrites(Write(key, value, reads, cfg.later_reads))


def training_bytes(
    size: Size,
    cfgs: list[TrainingSAEConfig],
    site: str,
    context: int,
    width: int,
    options: dict[str, Any] | None = None,
) -> int:
    """Bytes of SAEs, optimiser, SAELens's buffer of inputs, and a forward pass of the model.

    Args:
        size: of the model.
        cfgs: of the SAEs that are trained at once.
        site: what they are trained on.
        context: tokens of a passage.
        width: bytes of a number of the model.
        options: of SAELens's runner that differ from `train_cells`'s.
    """
    runner = RUNNER_DEFAULTS | (options or {})
    in_pass = runner["store_batch_size_prompts"] * context
    buffered = runner["n_batches_in_buffer"] * context + in_pass
    rows = sum(_numbers(cfg, site) for cfg in cfgs)
    trained = sum(n_trained(cfg) for cfg in cfgs)
    return _BYTES * trained + 4 * _COPIES * buffered * rows + width * in_pass * size.d_model * _WIDE


def _numbers(cfg: TrainingSAEConfig, site: str) -> int:
    """Numbers that the buffer keeps of an input: a write as its factors and the vectors that read it."""
    if site == "state" or not isinstance(cfg, WriteSAETrainingConfig):
        return cfg.d_in
    return cfg.d_v + (2 + len(cfg.later_reads)) * cfg.d_k
