"""WriteSAEs in training: SAELens's trainer sees a `TrainingSAE`, the losses are in closed form on writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes import activations
from writesae_lens.saes.config import PLAIN_INPUTS, WriteSAETrainingConfig
from writesae_lens.saes.optimizer import forget_moments
from writesae_lens.saes.packed import PackedWrites
from writesae_lens.saes.rank1 import (
    Factors,
    Matrices,
    inner,
    leading_pairs,
    normalized,
    overlaps,
    scores,
    squared_errors,
    squared_errors_of_codes,
    squared_norms,
)
from writesae_lens.saes.sae import MatrixSAE

# Dead atoms that take part in one step's loss, in units of k_aux; it costs their number squared.
_POOL = 4
# Read alignment looks at so many of an input's strongest atoms, weighted by a softmax of their coefficients
# in units of this share of the input's norm.
_CANDIDATES, _TEMPERATURE = 4, 0.1
# Cosine from which on two inputs start one atom.
_SAME = 0.999
# Of an atom that starts anew: at full size it would add to what living atoms say of its inputs already, and a
# run that ends soon after would be spoilt (400,000 writes: 1.4 of |X|^2 unexplained, not 0.2).
_ENCODER_SHARE = 0.25


class WriteTrainingSAE(MatrixSAE, TrainingSAE[Any]):  # type: ignore[misc]
    """A WriteSAE in training: squared error, dead-atom loss and write alignment, in closed form on writes."""

    cfg: WriteSAETrainingConfig
    progress: Tensor

    def __init__(self, cfg: WriteSAETrainingConfig, use_error_term: bool = False) -> None:
        # Several SAEs may be made from one config, and runners write each one's hook into its own.
        super().__init__(copy.deepcopy(cfg), use_error_term)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(self.cfg.encoder_bias)
        self.b_dec.requires_grad_(self.cfg.decoder_bias)
        # Atoms started from inputs, and steps made: what a resumed run must know beside the weights.
        self.register_buffer("progress", torch.zeros(2, device=self.device))
        self.n_resampled = 0

    def _apply(self, *args: Any, **kwargs: Any) -> WriteTrainingSAE:
        progress = self.progress.float()
        super()._apply(*args, **kwargs)
        if not progress.is_meta:  # whole numbers, which half precision would round
            self.progress = progress.to(self.progress.device)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; the atoms of an SAE saved for inference are not started anew from inputs."""
        trained = {"progress": torch.tensor([self.cfg.d_sae, 0], device=self.device)}
        return super().load_state_dict({**trained, **state_dict}, *args, **kwargs)

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """As in SAELens; the atoms get norm 1 first, so that coefficients are in units of the inputs."""
        if not bool(torch.isclose(self.get_W_dec_norm(), self.b_enc.new_ones(())).all()):
            self.fold_W_dec_norm()
        return super().save_inference_model(path)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        del state_dict["progress"]

    # TrainingSAE overrides these in the base class; here they are the shared ones.
    encode = MatrixSAE.encode
    decode = MatrixSAE.decode

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return activations.for_training(
            self.cfg, torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {n: TrainCoefficientConfig(*c) for n, c in self.activation_fn.coefficients.items()}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(self.process_sae_in(x))

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The losses beside the squared error, where inputs are normalised at run time."""
        rows = step_input.sae_in.unflatten(-1, (self.cfg.d_k, self.cfg.d_v))
        atoms, norms = normalized(self.atoms()), self.get_W_dec_norm()
        dead = step_input.dead_neuron_mask
        return self._losses(rows, atoms, hidden_pre * norms, feature_acts * norms, dead, step_input)[1]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses, activations being coefficients of atoms of norm 1.

        ``sae_out`` is built for logging steps only, else it is NaN.

        Raises:
            WriteSAEError: the batch has another width, or holds infinite or undefined numbers.
        """
        x = step_input.sae_in
        self._check_width(x)
        if self.cfg.normalize_activations not in PLAIN_INPUTS:
            self._prepare(self._rows(self.run_time_activation_norm_fn_in(x)), step_input.dead_neuron_mask)
            return self._with_metrics(super().training_forward_pass(step_input), step_input)
        # Sums of products of inner products: not for half precision, nor slow at single.
        with torch.autocast(x.device.type, enabled=False):
            rows = self._rows(x)
            if not bool(torch.isfinite(squared_norms(rows)).all()):
                raise WriteSAEError(
                    "the activations of this batch, or their squares, are not finite: check the model's "
                    "dtype and the hook"
                )
            dead = self._prepare(rows, step_input.dead_neuron_mask)
            atoms = normalized(self.atoms())
            hidden = scores(rows, atoms if self.cfg.encoder == "tied" else self._encoder)
            if self.b_enc.requires_grad or bool(self.b_enc.any()):
                hidden = hidden + self.get_W_dec_norm() * self.b_enc
            hidden = self.hook_sae_acts_pre(hidden)
            acts = self.hook_sae_acts_post(self.activation_fn(hidden))
            read = x.blocks[0].read if isinstance(x, PackedWrites) else None
            error, others = self._losses(rows, atoms, hidden, acts, dead, step_input, read)
            losses = {"mse_loss": error.mean(), **others}
        with torch.no_grad():
            if step_input.is_logging_step:
                sae_out = self.decode(acts.detach() / self.get_W_dec_norm())
            else:
                sae_out = torch.full((1, 1), float("nan"), dtype=x.dtype, device=x.device).expand(x.shape)
        output = TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=hidden,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )
        return self._with_metrics(output, step_input)

    @torch.no_grad()
    def _with_metrics(self, output: TrainStepOutput, step_input: TrainStepInput) -> TrainStepOutput:
        """What SAELens logs beside its own metrics, on logging steps."""
        if step_input.is_logging_step:
            rows = self._rows(step_input.sae_in.detach())
            best = normalized(self.atoms())[output.feature_acts.argmax(-1)]
            fires = output.feature_acts.amax(-1) > 0
            cosine = inner(rows, best) / squared_norms(rows).sqrt().clamp(min=1e-30)
            dead = step_input.dead_neuron_mask
            n_dead = 0 if dead is None else int(dead.sum())
            output.metrics |= {
                "write_cosine": float(cosine[fires].mean()) if bool(fires.any()) else 0.0,
                "alive_atoms": self.cfg.d_sae - n_dead,
                "dead_atoms": n_dead,
                "resampled_atoms": self.n_resampled,
            }
        return output

    @torch.no_grad()
    def _prepare(self, rows: Matrices, dead: Tensor | None) -> Tensor | None:
        """What happens between steps: the start from inputs, renormalisation, resampling.

        Returns:
            the mask of dead atoms, less those that started anew.
        """
        cfg = self.cfg
        if not self.training:
            return dead
        started, step = (int(n) for n in self.progress)
        if started == 0:
            self.activation_fn.begin(squared_norms(rows).mean().sqrt())
            started = 0 if cfg.init_from_writes else cfg.d_sae
        if started < cfg.d_sae:
            known = normalized(self.atoms())[:started]
            starts = _distinct(leading_pairs(rows[squared_norms(rows) > 0]), known)[: cfg.d_sae - started]
            slots = torch.arange(started, started + len(starts.key), device=self.b_enc.device)
            self._set_atoms(slots, starts)
            started += len(slots)
        if step and cfg.renormalize_every and step % cfg.renormalize_every == 0:
            self.fold_W_dec_norm()
        if step and cfg.resample_every and step % cfg.resample_every == 0 and dead is not None:
            anew = self._resample(rows, dead.nonzero().squeeze(-1))
            dead = dead.index_fill(0, anew, False)
        self.progress.copy_(torch.tensor([started, step + 1]))
        return dead

    @torch.no_grad()
    def _resample(self, rows: Matrices, dead: Tensor) -> Tensor:
        """Start dead atoms anew from inputs drawn by their squared error; returns which."""
        acts = self.activation_fn(overlaps(rows, self._encoder) + self.get_W_dec_norm() * self.b_enc)
        error = self._squared_error(rows, normalized(self.atoms()), acts).clamp(min=0)
        n = min(len(dead), int((error > 0).sum()))
        if n:
            starts = _distinct(leading_pairs(rows[torch.multinomial(error, n)]))
            n = len(starts.key)
            self._set_atoms(dead[:n], starts, _ENCODER_SHARE)
            self.activation_fn.reset(dead[:n], squared_norms(rows).mean().sqrt())
            self.n_resampled += n
        return dead[:n]

    def _per_atom(self) -> list[nn.Parameter]:
        """The parameters with a row for each atom."""
        return [p for p in self.parameters() if len(p) == self.cfg.d_sae and p is not self.b_dec]

    @torch.no_grad()
    def _set_atoms(self, slots: Tensor, rows: Factors, share: float = 1.0) -> None:
        """Make these atoms rank-1 matrices of norm 1, and their encoders (but a tied one) a share of them."""
        for side in ("dec", "enc"):
            if side == "enc" and self.cfg.encoder == "tied":
                continue
            raw = self._side(side, self.cfg.decoder if side == "dec" else self.cfg.encoder)
            size = 1.0 if side == "dec" else share
            if not isinstance(raw, Factors):
                raw[slots] = size * rows.matrix().to(raw.dtype)
                continue
            for parameter, factor in zip(raw, rows):
                # Further ranks keep their direction, at little weight.
                parameter[slots] = 0.1 * torch.nn.functional.normalize(parameter[slots], dim=-1)
                parameter[slots, :1] = size**0.5 * factor.to(parameter.dtype)
        self.b_enc[slots] = 0
        forget_moments(self._per_atom(), slots)

    def _squared_error(self, rows: Matrices, atoms: Matrices, acts: Tensor) -> Tensor:
        """|X - X^|^2 of each input."""
        count = self.activation_fn.count(acts)
        if count > self.cfg.d_sae // 8:
            along = overlaps(rows, atoms)
            error = squared_errors_of_codes(along, squared_norms(rows), atoms, acts)
        else:
            values, indices = self.activation_fn.chosen(acts)
            error = squared_errors(rows, atoms, indices, values)
        return error + self._on_bias(rows, atoms, acts, self.bias_matrix)

    def _on_bias(self, rows: Matrices, atoms: Matrices, codes: Tensor, bias: Tensor) -> Tensor | float:
        """What the decoder bias adds to |X - sum_i codes_i A_i|^2."""
        if not self.cfg.decoder_bias:
            return 0.0
        return 2 * ((codes * inner(atoms, bias)).sum(-1) - inner(rows, bias)) + bias.square().sum()

    def _losses(
        self,
        rows: Matrices,
        atoms: Matrices,
        hidden: Tensor,
        acts: Tensor,
        dead: Tensor | None,
        step_input: TrainStepInput,
        read: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of each input, and the losses beside it, from inner products."""
        squared = squared_norms(rows)
        unit = squared.mean().sqrt().detach()
        error = self._squared_error(rows, atoms, acts)
        losses = {"auxiliary_reconstruction_loss": self._dead_loss(rows, atoms, hidden, acts, error, dead)}
        codes = self.activation_fn.gate_codes(hidden)
        if codes is not None:
            # The scores learn from this; the decoder does not.
            fixed, bias = atoms.detach(), self.bias_matrix.detach()
            via_gate = squared_errors_of_codes(overlaps(rows, fixed), squared, fixed, codes)
            losses["gate_reconstruction_loss"] = (via_gate + self._on_bias(rows, fixed, codes, bias)).mean()
        if self.cfg.write_alignment_coefficient:
            cosine = inner(rows, atoms[acts.argmax(-1)]) / squared.sqrt().clamp(min=1e-30)
            fires = (acts.amax(-1) > 0).to(cosine)
            misaligned = ((1 - cosine) * fires).sum() / fires.sum().clamp(min=1)
            losses["write_alignment_loss"] = self.cfg.write_alignment_coefficient * unit.square() * misaligned
        if self.cfg.read_alignment_coefficient and read is not None:
            losses["read_alignment_loss"] = (
                self.cfg.read_alignment_coefficient
                * unit.square()
                * self._misread(rows, atoms, hidden, squared, read.squeeze(-2).to(self.dtype)).mean()
            )
        losses |= self.activation_fn.losses(hidden, unit, step_input.coefficients)
        return error, losses

    def _misread(
        self,
        rows: Matrices,
        atoms: Matrices,
        hidden: Tensor,
        squared: Float[Tensor, " row"],
        read: Float[Tensor, "row d_k"],
    ) -> Float[Tensor, " row"]:
        """How far the strongest atoms are from the write where its own token reads it, 0 to 1.

        r = |c A^T q / s - X^T q|^2 / |X^T q|^2, at the share s of a write that its dominant atom is meant
        to take, counts as r / (1 + r), so that every write counts alike; the strongest atoms count by a
        softmax of their coefficients, so that the encoder learns which to prefer.
        """
        indices = hidden.topk(min(_CANDIDATES, hidden.shape[-1]), dim=-1).indices
        share = 1.0 if self.cfg.encoder == "tied" else self.cfg.dominant_share
        values = self.activation_fn.coefficients_of(hidden).gather(-1, indices) / share
        weights = (values / (_TEMPERATURE * squared.sqrt().clamp(min=1e-30)[:, None])).softmax(-1)
        native = _read_out(rows[:, None], read)[:, 0]
        by_atoms = _read_out(atoms[indices], read) * values[..., None]
        power = native.square().sum(-1).clamp(min=1e-30)[:, None]
        ratio = (by_atoms - native[:, None]).square().sum(-1) / power
        return (weights * ratio / (1 + ratio)).sum(-1)

    def _dead_loss(
        self,
        rows: Matrices,
        atoms: Matrices,
        hidden: Tensor,
        acts: Tensor,
        error: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """How well the strongest dead atoms reconstruct what the live ones left over.

        The weights are the scores of the k_aux strongest of a row, elsewhere zero.
        """
        cfg = self.cfg
        n_dead = 0 if mask is None else int(mask.sum())
        if mask is None or n_dead == 0 or not (cfg.aux_loss_coefficient and cfg.k_aux):
            return hidden.new_zeros(())
        pool = mask.nonzero().squeeze(-1)
        if n_dead > _POOL * cfg.k_aux:
            pool = pool[hidden.detach()[:, pool].amax(0).topk(_POOL * cfg.k_aux).indices]
        weights = hidden[:, pool]
        if len(pool) > cfg.k_aux:
            values, indices = weights.topk(cfg.k_aux, dim=-1, sorted=False)
            weights = torch.zeros_like(weights).scatter(-1, indices, values)
        dead, fixed = atoms[pool], atoms.detach()
        # What the live atoms left over is given: no gradient flows into it.
        left_over = overlaps(rows, dead) - acts.detach() @ overlaps(fixed, dead)
        if cfg.decoder_bias:
            left_over = left_over - inner(dead, self.bias_matrix.detach())
        loss = squared_errors_of_codes(left_over, error.detach(), dead, weights).mean()
        return cfg.aux_loss_coefficient * min(1.0, n_dead / cfg.k_aux) * loss

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Norms of the encoder's rows; the atoms' own norms are 1."""
        return {"weights/encoder_norms": squared_norms(self._encoder).sqrt().float().cpu().numpy()}


def _distinct(starts: Factors, known: Matrices | None = None) -> Factors:
    """Those with another direction than all earlier ones: equal atoms would fire together."""
    again = (overlaps(starts, starts).abs() > _SAME).tril(-1).any(-1)
    if known is not None:
        again |= (overlaps(starts, known).abs() > _SAME).any(-1)
    return starts[~again]


def _read_out(matrices: Matrices, read: Float[Tensor, "row d_k"]) -> Float[Tensor, "row atom d_v"]:
    """X^T q for matrices ``[row, atom]`` and one read vector a row."""
    if isinstance(matrices, Factors):
        return ((matrices.key @ read[:, None, :, None]).mT @ matrices.value).squeeze(-2)
    return (read[:, None, None] @ matrices).squeeze(-2)
