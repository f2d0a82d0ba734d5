"""WriteSAE: a sparse autoencoder whose atoms are rank-1 matrices shaped like a model's cache writes.

For a matrix X of shape [d_k, d_v] (arriving flattened), with encoder factors (P_i, Q_i) and unit-norm
decoder atoms A_i = v_i w_i^T::

    z_i = P_i^T X Q_i + b_i        a = ReLU(TopK(z))        X^ = sum_i a_i A_i + B

(paper, section "The dictionary"). Rank-1 inputs, that is native writes, are taken apart into their
factors, and neither X nor its reconstruction is built in training; inputs of any rank (states) take the
dense encoder and still decode sparsely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from writesae_lens.errors import WriteSAEError
from writesae_lens.rank1 import (
    Factors,
    combine,
    factor_rank1,
    inner_with_matrix,
    overlaps,
    overlaps_dense,
    squared_errors,
)

ARCHITECTURE = "writesae"
# Settings of normalize_activations that leave the matrices as they come to the SAE.
PLAIN_INPUTS = ("none", "expected_average_only_in")


def _settle(cfg: Any) -> None:
    """Derive d_in and refuse contradictions; shared by the two config classes."""
    if cfg.d_k < 1 or cfg.d_v < 1 or cfg.rank < 1 or cfg.d_sae < 1:
        raise WriteSAEError(
            f"d_k, d_v, d_sae and rank must be positive, got d_k={cfg.d_k}, d_v={cfg.d_v}, "
            f"d_sae={cfg.d_sae}, rank={cfg.rank}"
        )
    cfg.d_in = cfg.d_k * cfg.d_v
    if not 1 <= cfg.k <= cfg.d_sae:
        raise WriteSAEError(
            f"k={cfg.k} atoms cannot be active out of d_sae={cfg.d_sae}: give 1 <= k <= d_sae"
        )
    if cfg.normalize_activations == "covariance_whitening":
        raise WriteSAEError(
            "covariance_whitening would mix matrix entries, and whitened writes are no longer rank 1: "
            "use normalize_activations='none' or 'expected_average_only_in'"
        )
    if cfg.apply_b_dec_to_input:
        raise WriteSAEError(
            "a WriteSAE adds its decoder bias at decode and does not subtract it before encoding: "
            "leave apply_b_dec_to_input False"
        )


# SAELens fills configs from dictionaries, metadata last: run-time type checks would refuse that.
@no_type_check
@dataclass(kw_only=True)
class WriteSAEConfig(SAEConfig):
    """A WriteSAE for inference.

    Args:
        d_k: key side of the cell (rows of the matrix).
        d_v: value side of the cell (columns).
        k: atoms active per input, at most; TopK then ReLU.
        rank: rank of an atom; 1 is the shape of a native write.
        d_in: always d_k * d_v; whatever is given is overwritten.

    Raises:
        WriteSAEError: k above d_sae, a size below 1, whitening, or a bias subtracted from the input.
    """

    d_k: int
    d_v: int
    k: int = 32
    rank: int = 1
    d_in: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        _settle(self)
        super().__post_init__()


@no_type_check
@dataclass(kw_only=True)
class WriteSAETrainingConfig(TrainingSAEConfig):
    """A WriteSAE in training; the first five arguments are those of `WriteSAEConfig`.

    Args:
        d_k, d_v, k, rank, d_in: as in `WriteSAEConfig`.
        init_from_writes: start the atoms as writes of the first batches rather than at random; then few
            die. Inputs that are not rank 1 (states) start at random all the same.
        encoder_bias: learn a threshold for each atom. Without it (TopK needs none) the SAE is as good on
            writes of norm 0.01 as of norm 10; with it atoms of small writes die, for a step of the
            optimiser is large against their coefficients.
        decoder_bias: learn the matrix B that is added at decode. Atoms stand in for writes better without
            it: with a bias they learn differences from the mean write.
        aux_loss_coefficient: weight of the dead-atom loss, the squared error with which dead atoms
            reconstruct what the live ones left over.
        k_aux: dead atoms that take part in it, by pre-activation.
        write_alignment_coefficient: weight of 1 - cos(X, A) of each input's dominant atom, in units of
            the batch's mean |X|^2; 0 is the paper's recipe (MSE alone).
    """

    d_k: int
    d_v: int
    k: int = 32
    rank: int = 1
    d_in: int = 0
    apply_b_dec_to_input: bool = False
    init_from_writes: bool = True
    encoder_bias: bool = False
    decoder_bias: bool = False
    aux_loss_coefficient: float = 1e-2
    k_aux: int = 256
    write_alignment_coefficient: float = 2.0

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        _settle(self)
        negative = [
            name
            for name in ("aux_loss_coefficient", "k_aux", "write_alignment_coefficient")
            if getattr(self, name) < 0
        ]
        if negative:
            raise WriteSAEError(f"{' and '.join(negative)} must not be negative")
        if self.aux_loss_coefficient and self.normalize_activations not in PLAIN_INPUTS:
            raise WriteSAEError(
                f"the dead-atom loss compares coefficients with what is left of the raw input, which "
                f"normalize_activations={self.normalize_activations!r} puts in other units: set "
                "aux_loss_coefficient=0 or normalize_activations='none'"
            )
        super().__post_init__()


# SAELens's command line reads the annotations of configs, which the mark would hide.
for _config in (WriteSAEConfig, WriteSAETrainingConfig):
    delattr(_config, "__no_type_check__")


class _FactoredSAE(SAE[Any]):
    """What inference and training share: parameters in factors, encode, decode, and matrix views."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        cfg = self.cfg

        def unit(*shape: int) -> Tensor:
            x = torch.randn(shape, dtype=self.dtype, device=self.device)
            return x / x.norm(dim=-1, keepdim=True)

        self.dec_key = nn.Parameter(unit(cfg.d_sae, cfg.rank, cfg.d_k))
        self.dec_value = nn.Parameter(unit(cfg.d_sae, cfg.rank, cfg.d_v))
        self.enc_key = nn.Parameter(self.dec_key.detach().clone())
        self.enc_value = nn.Parameter(self.dec_value.detach().clone())
        zeros = torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros)
        self.b_dec = nn.Parameter(zeros.new_zeros(cfg.d_in))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k)

    def decoder_factors(
        self,
    ) -> tuple[Float[Tensor, "d_sae rank d_k"], Float[Tensor, "d_sae rank d_v"]]:
        """Key and value factors of the atoms; each atom sum_r key_r value_r^T has Frobenius norm 1."""
        key, value = self.atoms()
        return key, value

    def atoms(self) -> Factors:
        """The decoder atoms, normalised."""
        return Factors(self.dec_key, self.dec_value).normalized()

    @property
    def _encoder(self) -> Factors:
        return Factors(self.enc_key, self.enc_value)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # type: ignore[override]
        """The atoms as flat rows. Built anew at each access: d_sae * d_k * d_v numbers."""
        return self.atoms().matrix().flatten(-2)

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """The encoder as a flat matrix. Built anew at each access."""
        return self._encoder.matrix().flatten(-2).T

    @property
    def bias_matrix(self) -> Float[Tensor, "d_k d_v"]:
        """The decoder bias in the shape of a write."""
        return self.b_dec.view(self.cfg.d_k, self.cfg.d_v)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Coefficients of the atoms, at most k nonzero.

        Args:
            x: flattened matrices. Rank-1 rows that need no gradient take the factored path.
        """
        hidden = self.hook_sae_acts_pre(self._pre_activations(self.process_sae_in(x)))
        return self.hook_sae_acts_post(self.activation_fn(hidden))

    def encode_factors(
        self, key: Float[Tensor, "row d_k"], value: Float[Tensor, "row d_v"]
    ) -> Float[Tensor, "row d_sae"]:
        """`encode` of key value^T, without hooks and without building it.

        Raises:
            WriteSAEError: the SAE normalises its inputs at run time, which needs the matrices.
        """
        if self.cfg.normalize_activations not in PLAIN_INPUTS:
            raise WriteSAEError(
                f"normalize_activations={self.cfg.normalize_activations!r} needs whole matrices: use encode"
            )
        rows = Factors(key[:, None].to(self.dtype), value[:, None].to(self.dtype))
        return self.activation_fn(overlaps(rows, self._encoder) + self.b_enc)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.cfg.d_in:
            raise WriteSAEError(
                f"expected flattened {self.cfg.d_k} x {self.cfg.d_v} matrices, last axis {self.cfg.d_in}, "
                f"got shape {tuple(x.shape)}: is this the SAE's own cell?"
            )

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        self._check_width(sae_in)
        # The base class subtracts a bias here, which a WriteSAE never does: that would cost a copy.
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def _pre_activations(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.cfg.d_in)
        rows = None if x.requires_grad else factor_rank1(flat, self.cfg.d_k, self.cfg.d_v)
        if rows is None:
            hidden = overlaps_dense(flat.unflatten(-1, (self.cfg.d_k, -1)), self._encoder)
        else:
            hidden = overlaps(Factors(*(f.to(self.dtype) for f in rows)), self._encoder)
        return (hidden + self.b_enc).view(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction sum_i a_i A_i + B, flattened."""
        flat = feature_acts.reshape(-1, feature_acts.shape[-1])
        if torch.is_grad_enabled() and feature_acts.requires_grad:
            # Inactive atoms have gradients too, which a sparse product would drop.
            out = flat @ self.W_dec
        else:
            active = int((flat != 0).sum(-1).max()) if len(flat) else 0
            values, indices = _largest(flat, active)
            out = combine(self.atoms(), indices, values).flatten(-2)
        out = self.hook_sae_recons((out + self.b_dec).view(*feature_acts.shape[:-1], self.cfg.d_in))
        out = self.run_time_activation_norm_fn_out(out)
        return self.reshape_fn_out(out, self.d_head)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Absorb a factor that inputs were multiplied by in training; coefficients are in raw units after."""
        # z(s X) / s is z(X) with a smaller bias, and TopK and ReLU commute with the division.
        self.b_enc.data /= scaling_factor
        self.b_dec.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    @torch.no_grad()
    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Ones: atoms are normalised by construction."""
        return torch.ones(self.cfg.d_sae, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Nothing to fold: atoms have norm 1 already."""
        return self.get_W_dec_norm()


class WriteSAE(_FactoredSAE):
    """A trained WriteSAE: SAELens's ``SAE.load_from_disk`` and ``from_pretrained`` return one."""

    cfg: WriteSAEConfig


class WriteTrainingSAE(_FactoredSAE, TrainingSAE[Any]):  # type: ignore[misc]
    """A WriteSAE in training: squared error, dead-atom loss and write alignment, in closed form on writes."""

    cfg: WriteSAETrainingConfig

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(self.cfg.encoder_bias)
        self.b_dec.requires_grad_(self.cfg.decoder_bias)
        self._n_from_writes = 0 if self.cfg.init_from_writes else self.cfg.d_sae

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; loaded atoms are not started anew from writes."""
        self._n_from_writes = self.cfg.d_sae
        return super().load_state_dict(*args, **kwargs)

    # TrainingSAE overrides these in the base class; here they are the shared ones.
    encode = _FactoredSAE.encode
    decode = _FactoredSAE.decode

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hook_sae_acts_pre(self._pre_activations(self.process_sae_in(x)))
        return self.hook_sae_acts_post(self.activation_fn(hidden)), hidden

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The losses beside the squared error, from matrices (`training_forward_pass` needs none)."""
        atoms, shape = self.atoms(), (self.cfg.d_k, self.cfg.d_v)
        losses = {"auxiliary_reconstruction_loss": hidden_pre.new_zeros(())}
        dead = self._dead(step_input.dead_neuron_mask, hidden_pre)
        if dead is not None:
            pool, weights, scale = dead
            residual = (step_input.sae_in - sae_out).detach().unflatten(-1, shape)
            losses["auxiliary_reconstruction_loss"] = scale * self._dead_error(
                atoms[pool],
                weights,
                overlaps_dense(residual, atoms[pool]),
                residual.square().sum((-1, -2)),
            )
        if self.cfg.write_alignment_coefficient:
            matrices = step_input.sae_in.unflatten(-1, shape)
            best = atoms[feature_acts.argmax(-1)]
            overlap = torch.einsum("nrk,nkv,nrv->n", best.key, matrices, best.value)
            losses["write_alignment_loss"] = self._alignment(
                overlap, matrices.square().sum((-1, -2)), feature_acts.amax(-1)
            )
        return losses

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses. On rank-1 inputs ``sae_out`` is built for logging steps only, else it is NaN.

        Raises:
            WriteSAEError: the batch has another width, or holds infinite or undefined numbers.
        """
        x = step_input.sae_in
        self._check_width(x)
        rows = None
        if self.cfg.normalize_activations in PLAIN_INPUTS:
            rows = factor_rank1(x, self.cfg.d_k, self.cfg.d_v)
        if rows is None:
            if not bool(torch.isfinite(x).all()):
                raise WriteSAEError(
                    "the activations of this batch are not finite: check the model's dtype and the hook"
                )
            return super().training_forward_pass(step_input)
        # Sums of products of inner products: not for half precision, nor slow at single.
        with torch.autocast(x.device.type, enabled=False):
            rows = Factors(*(f.to(self.dtype) for f in rows))
            if self._n_from_writes < self.cfg.d_sae:
                self._start_from(rows)
            hidden = self.hook_sae_acts_pre(overlaps(rows, self._encoder) + self.b_enc)
            acts = self.hook_sae_acts_post(self.activation_fn(hidden))
            losses = self._factored_losses(rows, hidden, acts, step_input.dead_neuron_mask)
        with torch.no_grad():
            built = step_input.is_logging_step
            nothing = x.new_full((1, 1), float("nan")).expand_as(x)
            sae_out = self.decode(acts.detach()) if built else nothing
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=hidden,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    @torch.no_grad()
    def _start_from(self, rows: Factors) -> None:
        """Make the next atoms, decoder and encoder alike, the directions of this batch's nonzero writes."""
        rows = rows[rows.norm() > 0][: self.cfg.d_sae - self._n_from_writes].normalized()
        slots = slice(self._n_from_writes, self._n_from_writes + len(rows.key))
        for parameters, factor in (
            ((self.dec_key, self.enc_key), rows.key),
            ((self.dec_value, self.enc_value), rows.value),
        ):
            for parameter in parameters:
                parameter[slots] *= 0.1  # further ranks keep their random direction, at little weight
                parameter[slots, :1] = factor
        self._n_from_writes += len(rows.key)

    def _factored_losses(
        self, rows: Factors, hidden: Tensor, acts: Tensor, dead_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """|X - X^|^2 and the other losses, from inner products of factors alone."""
        atoms, bias = self.atoms(), self.bias_matrix
        values, indices = acts.topk(self.cfg.k, dim=-1)
        error = squared_errors(rows, atoms, indices, values)
        if self.cfg.decoder_bias:
            on_bias = (values * inner_with_matrix(atoms, bias)[indices]).sum(-1)
            error = error + 2 * (on_bias - inner_with_matrix(rows, bias)) + bias.square().sum()
        losses = {"mse_loss": error.mean(), "auxiliary_reconstruction_loss": error.new_zeros(())}
        dead = self._dead(dead_mask, hidden)
        if dead is not None:
            pool, weights, scale = dead
            # What the live atoms left over is given: no gradient flows into it.
            fixed = Factors(atoms.key.detach(), atoms.value.detach())
            left_over = overlaps(rows, atoms[pool]) - acts.detach() @ overlaps(fixed, atoms[pool])
            if self.cfg.decoder_bias:
                left_over = left_over - inner_with_matrix(atoms[pool], bias.detach())
            losses["auxiliary_reconstruction_loss"] = scale * self._dead_error(
                atoms[pool], weights, left_over, error.detach()
            )
        if self.cfg.write_alignment_coefficient:
            best = atoms[indices[:, 0]]
            overlap = ((best.key @ rows.key.mT) * (best.value @ rows.value.mT)).sum((-1, -2))
            losses["write_alignment_loss"] = self._alignment(overlap, rows.norm().square(), values[:, 0])
        return losses

    def _alignment(self, overlap: Tensor, squared_norm: Tensor, coefficient: Tensor) -> Tensor:
        """Weighted mean of 1 - cos(X, A) over the inputs that fire an atom, in units of mean |X|^2."""
        cosine = overlap / squared_norm.sqrt().clamp(min=1e-12)
        fires = (coefficient > 0).to(cosine)
        mean = ((1 - cosine) * fires).sum() / fires.sum().clamp(min=1)
        return self.cfg.write_alignment_coefficient * squared_norm.mean().detach() * mean

    def _dead(self, mask: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """Indices of the dead atoms, their weights in each row and the loss's scale; None if none is dead.

        The weights are the pre-activations of the k_aux strongest, elsewhere zero.
        """
        n_dead = 0 if mask is None else int(mask.sum())
        if mask is None or n_dead == 0 or not (self.cfg.aux_loss_coefficient and self.cfg.k_aux):
            return None
        pool = mask.nonzero().squeeze(-1)
        weights = hidden[:, pool]
        if n_dead > self.cfg.k_aux:
            values, indices = weights.topk(self.cfg.k_aux, dim=-1, sorted=False)
            weights = torch.zeros_like(weights).scatter(-1, indices, values)
        return pool, weights, self.cfg.aux_loss_coefficient * min(1.0, n_dead / self.cfg.k_aux)

    @staticmethod
    def _dead_error(atoms: Factors, weights: Tensor, along: Tensor, squared_residual: Tensor) -> Tensor:
        """Mean |E_n - sum_j weight_nj A_j|^2, given <E_n, A_j> and |E_n|^2."""
        reconstruction = ((weights @ overlaps(atoms, atoms)) * weights).sum(-1)
        return (squared_residual - 2 * (weights * along).sum(-1) + reconstruction).mean()

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Norms of the encoder's factors; the atoms' own norms are 1."""
        return {"weights/encoder_norms": self._encoder.norm().float().cpu().numpy()}


def _largest(acts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the ``count`` entries largest in magnitude of each row."""
    indices = acts.abs().topk(count, dim=-1).indices
    return acts.gather(-1, indices), indices
