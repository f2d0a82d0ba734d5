"""From scores to coefficients: the activation functions of the WriteSAE family.

Each is a module with four parts: the function itself, the number of atoms that it lets through, its own
losses in training, and its reaction to a change of the inputs' scale. Parameters that are compared with
scores have the units of the inputs. They are stored as logarithms where possible, so that a step of the
optimiser means the same for writes of norm 0.01 as for writes of norm 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "gated")
# For inference only: the BatchTopK of published SAEs, which have no threshold.
BATCHWISE = "topk_of_batch"
# BatchTopK's threshold moves this share of the way to the newest batch's in each step (as in SAELens).
_THRESHOLD_RATE = 0.01


class Activation(nn.Module):
    """The base class: no losses of its own, and no parameters that depend on the inputs' scale."""

    coefficients: dict[str, tuple[float, int]]  # name: value and warm-up steps, for SAELens's trainer

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = {}

    def count(self, acts: Float[Tensor, "*batch d_sae"]) -> int:
        """The most atoms that are active in any row."""
        return int((acts != 0).sum(-1).max()) if acts.numel() else 0

    def chosen(self, acts: Float[Tensor, "row d_sae"]) -> tuple[Tensor, Tensor]:
        """Values and indices of the active atoms, as many for each row as the fullest one has."""
        return acts.topk(self.count(acts), dim=-1, sorted=False)

    def begin(self, unit: Float[Tensor, ""]) -> None:
        """Called once, before training, with the root mean square norm of a batch's inputs."""

    def losses(
        self,
        scores: Float[Tensor, "row d_sae"],
        unit: Float[Tensor, ""],
        coefficients: dict[str, float],
    ) -> dict[str, Tensor]:
        """Sparsity losses, in units of the squared error (``unit``: as in `begin`)."""
        return {}

    def coefficients_of(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Each atom's coefficient if it is active."""
        return scores.relu()

    def gate_codes(self, scores: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d_sae"] | None:
        """The codes that must reconstruct the input by themselves in Gated SAEs; None for others."""
        return None

    def follow(self, acts: Float[Tensor, "*batch d_sae"]) -> None:
        """Called with the coefficients of each training step, at norm 1."""

    def reset(self, slots: Int[Tensor, " slot"], unit: Float[Tensor, ""]) -> None:
        """First parameters of atoms that start anew; ``unit`` as in `begin`, times their encoders' norm."""

    def fold(self, scale: float) -> None:
        """Adapt to inputs that were multiplied by ``scale`` in training and no longer are."""


class TopK(Activation):
    """The k largest scores of a row, then ReLU."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        values, indices = scores.topk(self.k, dim=-1, sorted=False)
        self._indices = indices
        return torch.zeros_like(scores).scatter_(-1, indices, values.relu())

    def chosen(self, acts: Float[Tensor, "row d_sae"]) -> tuple[Tensor, Tensor]:
        # The indices of the last call, unless a hook has changed the coefficients since.
        values = acts.gather(-1, self._indices) if self._indices.shape[:-1] == acts.shape[:-1] else None
        if values is None or int(acts.count_nonzero()) != int(values.count_nonzero()):
            return acts.topk(self.k, dim=-1, sorted=False)
        return values, self._indices

    def count(self, acts: Float[Tensor, "*batch d_sae"]) -> int:
        return self.k


class JumpReLU(Activation):
    """A score passes where it exceeds its atom's threshold (Rajamanoharan et al., 2024).

    The thresholds learn through straight-through estimates: the step's derivative is a box of width
    ``bandwidth * threshold`` around it. Their loss pulls the mean number of active atoms to k.
    """

    log_threshold: nn.Parameter

    def __init__(
        self,
        shape: Tensor,
        k: int,
        bandwidth: float = 0.5,
        init_threshold: float = 0.1,
        l0_coefficient: float = 1.0,
        l0_warm_up_steps: int = 0,
    ) -> None:
        super().__init__()
        self.k, self.bandwidth, self.init_threshold = k, bandwidth, init_threshold
        self.coefficients = {"l0": (l0_coefficient, l0_warm_up_steps)}
        self.log_threshold = nn.Parameter(torch.full_like(shape, math.log(init_threshold)))

    def count(self, acts: Float[Tensor, "*batch d_sae"]) -> int:
        # An atom just below its threshold is silent but has a gradient.
        return acts.shape[-1] if self._learns else super().count(acts)

    @torch.no_grad()
    def begin(self, unit: Float[Tensor, ""]) -> None:
        self.reset(torch.arange(len(self.log_threshold), device=self.log_threshold.device), unit)

    @torch.no_grad()
    def reset(self, slots: Int[Tensor, " slot"], unit: Float[Tensor, ""]) -> None:
        self.log_threshold[slots] = math.log(self.init_threshold * max(float(unit), 1e-30))

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        threshold = self.log_threshold.exp()
        passed = scores * (scores > threshold)
        if not self._learns:
            return passed
        # The subtracted term is zero; its derivative is that of the jump from 0 to the threshold.
        jump = threshold.detach().where(self._near(scores, threshold), 0)
        return passed - jump * self._box(scores, threshold)

    def losses(
        self, scores: Float[Tensor, "row d_sae"], unit: Float[Tensor, ""], coefficients: dict[str, float]
    ) -> dict[str, Tensor]:
        threshold = self.log_threshold.exp()
        active = (scores > threshold).to(scores) - self._box(scores, threshold)
        surplus = active.sum(-1).mean() / self.k - 1
        return {"l0_loss": coefficients["l0"] * unit.square() * surplus.square()}

    @property
    def _learns(self) -> bool:
        return torch.is_grad_enabled() and self.log_threshold.requires_grad

    def _near(self, scores: Tensor, threshold: Tensor) -> Tensor:
        return (scores.detach() - threshold.detach()).abs() < self.bandwidth * threshold.detach() / 2

    def _box(self, scores: Tensor, threshold: Tensor) -> Tensor:
        # Computed from the threshold's logarithm, which is finite where the threshold overflows.
        by_log = (self.log_threshold - self.log_threshold.detach()) / self.bandwidth
        return self._near(scores, threshold) * by_log

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        self.log_threshold.sub_(math.log(scale))


class TopKOfBatch(Activation):
    """The k largest scores per row on average over the batch: a row's atoms depend on the other rows.

    A row with undefined scores takes no atoms from the others and is undefined itself.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        undefined = scores.isnan().any(-1, keepdim=True)
        some = bool(undefined.any())
        acts = scores.relu().masked_fill(undefined, 0) if some else scores.relu()
        flat = acts.flatten()
        values, indices = flat.topk(min(self.k * int((~undefined).sum()), flat.numel()), sorted=False)
        kept = torch.zeros_like(flat).scatter(-1, indices, values).view_as(acts)
        return kept.masked_fill(undefined, float("nan")) if some else kept


class BatchTopK(JumpReLU):
    """k atoms per row on average over the batch in training, later a threshold (Bussmann et al., 2024).

    The threshold is a running mean of the smallest score that passed. It is stored as a `JumpReLU` stores its
    own, so that inference is a `JumpReLU`.
    """

    def __init__(self, shape: Tensor, k: int) -> None:
        super().__init__(shape, k, init_threshold=torch.finfo(torch.float32).tiny)
        self.coefficients = {}
        self.log_threshold.requires_grad_(False)
        self.of_batch = TopKOfBatch(k)

    def reset(self, slots: Int[Tensor, " slot"], unit: Float[Tensor, ""]) -> None:
        """All atoms share the threshold, which follows the batches."""

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return self.of_batch(scores)

    def losses(
        self, scores: Float[Tensor, "row d_sae"], unit: Float[Tensor, ""], coefficients: dict[str, float]
    ) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def follow(self, acts: Float[Tensor, "*batch d_sae"]) -> None:
        least = acts.masked_fill(acts <= 0, float("inf")).min()
        if not self.training or not bool(torch.isfinite(least)):
            return
        before, least = self.log_threshold[:1].cpu().double().exp(), least.cpu()  # MPS has no float64
        started = before > 2 * torch.finfo(torch.float32).tiny
        rate = torch.where(started, _THRESHOLD_RATE, 1.0)
        self.log_threshold.copy_(((1 - rate) * before + rate * least).log().expand_as(self.log_threshold))


class Gated(Activation):
    """A gate decides which atoms are active, a rescaled score how much (Rajamanoharan et al., 2024).

    gate = score + gate_bias > 0; magnitude = ReLU(exp(log_gain) score + magnitude_bias). Given a temperature,
    the gate is sigmoid((score + gate_bias) / temperature), as in published checkpoints.
    """

    def __init__(
        self,
        shape: Tensor,
        l1_coefficient: float = 0.1,
        l1_warm_up_steps: int = 0,
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.coefficients = {"l1": (l1_coefficient, l1_warm_up_steps)}
        self.gate_bias, self.log_gain, self.magnitude_bias = (
            nn.Parameter(torch.zeros_like(shape)) for _ in range(3)
        )

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        opened = scores + self.gate_bias
        gate = (opened / self.temperature).sigmoid() if self.temperature else opened > 0
        return self.coefficients_of(scores) * gate

    def coefficients_of(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return (self.log_gain.exp() * scores + self.magnitude_bias).relu()

    def gate_codes(self, scores: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d_sae"]:
        return (scores + self.gate_bias).relu()

    def losses(
        self, scores: Float[Tensor, "row d_sae"], unit: Float[Tensor, ""], coefficients: dict[str, float]
    ) -> dict[str, Tensor]:
        return {"l1_loss": coefficients["l1"] * unit * self.gate_codes(scores).sum(-1).mean()}

    @torch.no_grad()
    def reset(self, slots: Int[Tensor, " slot"], unit: Float[Tensor, ""]) -> None:
        for parameter in self.parameters():
            parameter[slots] = 0

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        self.gate_bias /= scale
        self.magnitude_bias /= scale


class PerSide(Activation):
    """An activation function for key codes and one for value codes, on scores without unit."""

    def __init__(self, key: Activation, value: Activation, n_key: int) -> None:
        super().__init__()
        self.key, self.value, self.n_key = key, value, n_key
        self.coefficients = key.coefficients

    @property
    def sides(self) -> tuple[Activation, Activation]:
        return self.key, self.value

    def of_sides(
        self, key: Float[Tensor, "*batch n_key"], value: Float[Tensor, "*batch n_value"]
    ) -> tuple[Tensor, Tensor]:
        """Coefficients of each side's scores."""
        return self.key(key), self.value(value)

    def follow_sides(
        self, key: Float[Tensor, "*batch n_key"], value: Float[Tensor, "*batch n_value"]
    ) -> None:
        """`follow`, of each side's coefficients."""
        self.key.follow(key)
        self.value.follow(value)

    def forward(self, scores: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.cat(self.of_sides(scores[..., : self.n_key], scores[..., self.n_key :]), dim=-1)

    def begin(self, unit: Float[Tensor, ""]) -> None:
        """Both sides are of norm 1, whatever the inputs' unit."""
        for side in self.sides:
            side.begin(torch.ones_like(unit))


def for_inference(cfg: Any, shape: Tensor) -> Activation:
    """The activation of a trained SAE; ``shape`` is a tensor [d_sae] of the SAE's dtype and device."""
    return _of_each_side(_for_inference, cfg, shape)


def for_training(cfg: Any, shape: Tensor) -> Activation:
    """The activation of an SAE in training, with its losses."""
    return _of_each_side(_for_training, cfg, shape)


def _of_each_side(make: Callable[[Any, Tensor, int], Activation], cfg: Any, shape: Tensor) -> Activation:
    if cfg.decoder != "codes":
        return make(cfg, shape, cfg.k)
    key, value = make(cfg, shape[: cfg.n_key], cfg.k_key), make(cfg, shape[cfg.n_key :], cfg.k_value)
    return PerSide(key, value, cfg.n_key)


def _for_inference(cfg: Any, shape: Tensor, k: int) -> Activation:
    if cfg.activation == "topk":
        return TopK(k)
    if cfg.activation == BATCHWISE:
        return TopKOfBatch(k)
    if cfg.activation == "gated":
        return Gated(shape, temperature=cfg.gate_temperature)
    return JumpReLU(shape, k)


def _for_training(cfg: Any, shape: Tensor, k: int) -> Activation:
    if cfg.activation == "batchtopk":
        return BatchTopK(shape, k)
    if cfg.activation == "jumprelu":
        return JumpReLU(
            shape,
            k,
            cfg.jumprelu_bandwidth,
            cfg.jumprelu_init_threshold,
            cfg.l0_coefficient,
            cfg.l0_warm_up_steps,
        )
    if cfg.activation == "gated":
        return Gated(shape, cfg.l1_coefficient, cfg.l1_warm_up_steps)
    return TopK(k)
