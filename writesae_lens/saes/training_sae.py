"""WriteSAEs in training: a SAELens `TrainingSAE` whose losses are in closed form on writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes import activations
from writesae_lens.saes.config import PLAIN_INPUTS, WriteSAETrainingConfig
from writesae_lens.saes.losses import Step, all_losses
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
    squared_norms,
    tensors,
)
from writesae_lens.saes.sae import MatrixSAE
from writesae_lens.saes.whole import save_whole

# Inputs whose cosine is above this count as one start: equal atoms would fire together.
_SAME = 0.999


class WriteTrainingSAE(MatrixSAE, TrainingSAE[Any]):  # type: ignore[misc]
    """A WriteSAE in training.

    The losses are in `writesae_lens.saes.losses`. Before some steps, atoms start from inputs
    (`init_from_writes`), dead atoms start anew (`resample_every`) and factors return to norm 1
    (`renormalize_every`).
    """

    cfg: WriteSAETrainingConfig
    progress: Tensor

    def __init__(self, cfg: WriteSAETrainingConfig, use_error_term: bool = False) -> None:
        # Runners write an SAE's hook into its config, and several SAEs may be made from one config.
        super().__init__(copy.deepcopy(cfg), use_error_term)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc.requires_grad_(self.cfg.encoder_bias)
        self.b_dec.requires_grad_(self.cfg.decoder_bias)
        # How many atoms have started from inputs, and the number of steps: a resumed run needs both.
        self.register_buffer("progress", torch.zeros(2, device=self.device))
        self.n_resampled = 0

    def _apply(self, *args: Any, **kwargs: Any) -> WriteTrainingSAE:
        progress = self.progress.float()
        super()._apply(*args, **kwargs)
        if not progress.is_meta:  # whole numbers, which half precision would round
            self.progress = progress.to(self.progress.device)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch. The atoms of an SAE saved for inference do not start from inputs again."""
        # SAELens's loaders build the SAE on the meta device; the tensors of the file are on a real one.
        trained = {
            "progress": torch.tensor(
                [self.cfg.d_sae, 0.0], device=next(iter(state_dict.values()), self.b_enc).device
            )
        }
        return super().load_state_dict({**trained, **state_dict}, *args, **kwargs)

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """As in SAELens. The atoms get norm 1 first, so that coefficients are in units of the inputs.

        Raises:
            WriteSAEError: a parameter holds infinite or undefined numbers: training has diverged.
        """
        broken = [name for name, p in self.named_parameters() if not bool(p.isfinite().all())]
        if broken:
            raise WriteSAEError(
                f"the training has diverged: {', '.join(broken)} hold NaN or infinite numbers, and nothing "
                "was saved; train again with a lower learning rate, or in float32"
            )
        if not bool(torch.isclose(self.get_W_dec_norm(), self.b_enc.new_ones(())).all()):
            self.fold_W_dec_norm()
        return save_whole(super().save_inference_model, path)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        del state_dict["progress"]

    # TrainingSAE overrides these two; those of MatrixSAE are wanted.
    encode = MatrixSAE.encode
    decode = MatrixSAE.decode

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return activations.for_training(
            self.cfg, torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {name: TrainCoefficientConfig(*c) for name, c in self.activation_fn.coefficients.items()}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(self.process_sae_in(x))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step. The output's scores and activations are those of atoms of norm 1.

        ``sae_out`` is built on logging steps only and is NaN otherwise, for the losses do not need it.

        Raises:
            WriteSAEError: the batch has another width, or holds infinite or undefined numbers; or the loss is
                infinite or undefined.
        """
        self._check_width(step_input.sae_in)
        if self.cfg.normalize_activations in PLAIN_INPUTS:
            output = self._step_in_closed_form(step_input)
        else:
            rows = self._rows(self.run_time_activation_norm_fn_in(step_input.sae_in))
            self._before_step(rows, step_input.dead_neuron_mask)
            output = super().training_forward_pass(step_input)
        if not bool(torch.isfinite(output.loss)):
            shown = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in output.losses.items())
            raise WriteSAEError(
                f"the loss of step {step_input.n_training_steps} is not finite ({shown}): the training has "
                "diverged; lower the learning rate or train in float32"
            )
        return self._with_metrics(output, step_input)

    def _step_in_closed_form(self, step_input: TrainStepInput) -> TrainStepOutput:
        """A step on inputs as they are."""
        x, dead = step_input.sae_in, step_input.dead_neuron_mask
        # The losses add up products of inner products, which half precision would spoil.
        with torch.autocast(x.device.type, enabled=False):
            rows = self._rows(x)
            if not bool(torch.isfinite(squared_norms(rows)).all()):
                raise WriteSAEError(
                    "the activations of this batch, or their squares, are not finite: check the model's "
                    "dtype and the hook"
                )
            dead = self._before_step(rows, dead)

            # Encode: scores z_i = <X, E_i> + b_i, coefficients a = activation(z)
            atoms = normalized(self.atoms())
            hidden = self.hook_sae_acts_pre(self._scores(rows))
            acts = self.hook_sae_acts_post(self.activation_fn(hidden))
            self.activation_fn.follow(acts)

            # Losses
            read = x.blocks[0].read if isinstance(x, PackedWrites) else None
            read = None if read is None else read.squeeze(-2).to(self.dtype)
            losses = all_losses(self._step(rows, atoms, hidden, acts, dead, read, step_input.coefficients))

        # Reconstruction, for SAELens's logs
        with torch.no_grad():
            if step_input.is_logging_step:
                sae_out = self.decode(acts.detach() / self.get_W_dec_norm())
            else:
                sae_out = torch.full((1, 1), float("nan"), dtype=x.dtype, device=x.device).expand(x.shape)
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=hidden,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The losses beside SAELens's squared error, where inputs are normalised at run time."""
        rows = step_input.sae_in.unflatten(-1, (self.cfg.d_k, self.cfg.d_v))
        atoms, norms = normalized(self.atoms()), self.get_W_dec_norm()
        hidden, acts = hidden_pre * norms, feature_acts * norms
        self.activation_fn.follow(acts)
        step = self._step(
            rows, atoms, hidden, acts, step_input.dead_neuron_mask, None, step_input.coefficients
        )
        return {name: value for name, value in all_losses(step).items() if name != "mse_loss"}

    def _scores(self, rows: Matrices) -> Float[Tensor, "row d_sae"]:
        hidden = scores(rows, self._encoder)
        if self.b_enc.requires_grad or bool(self.b_enc.any()):
            hidden = hidden + self.get_W_dec_norm() * self.b_enc
        return hidden

    def _step(
        self,
        rows: Matrices,
        atoms: Matrices,
        hidden: Tensor,
        acts: Tensor,
        dead: Tensor | None = None,
        read: Tensor | None = None,
        coefficients: dict[str, float] | None = None,
    ) -> Step:
        bias = self.bias_matrix if self.cfg.decoder_bias else None
        return Step(self.cfg, self.activation_fn, rows, atoms, hidden, acts, bias, dead, read, coefficients)

    @torch.no_grad()
    def _with_metrics(self, output: TrainStepOutput, step_input: TrainStepInput) -> TrainStepOutput:
        """Add the metrics that SAELens logs beside its own, on logging steps."""
        if step_input.is_logging_step:
            rows = self._rows(step_input.sae_in.detach())
            dominant = normalized(self.atoms())[output.feature_acts.argmax(-1)]
            fires = output.feature_acts.amax(-1) > 0
            cosine = inner(rows, dominant) / squared_norms(rows).sqrt().clamp(min=1e-30)
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
    def _before_step(self, rows: Matrices, dead: Bool[Tensor, " d_sae"] | None) -> Tensor | None:
        """Start atoms from inputs, put factors back to norm 1 and resample, each at its steps.

        Returns:
            the mask of dead atoms, without those that started anew.
        """
        cfg = self.cfg
        if not self.training:
            return dead
        started, step = (int(n) for n in self.progress)
        if started == 0:
            self.activation_fn.begin(squared_norms(rows).mean().sqrt())
            started = 0 if cfg.init_from_writes else cfg.d_sae
        if started < cfg.d_sae:
            earlier = normalized(self.atoms())[:started]
            starts = _distinct(leading_pairs(rows[squared_norms(rows) > 0]), earlier)[: cfg.d_sae - started]
            slots = torch.arange(started, started + len(starts.key), device=self.b_enc.device)
            # On the first batch all encoders are rescaled, those of atoms that have not started too.
            self._start_atoms(slots, starts, rows, slots if started else torch.arange(cfg.d_sae))
            started += len(slots)
        if step and cfg.renormalize_every and step % cfg.renormalize_every == 0:
            self.fold_W_dec_norm()
        if step and cfg.resample_every and step % cfg.resample_every == 0 and dead is not None:
            dead = dead.index_fill(0, self._resample(rows, dead.nonzero().squeeze(-1)), False)
        self.progress.copy_(torch.tensor([started, step + 1]))
        return dead

    @torch.no_grad()
    def _resample(self, rows: Matrices, dead: Int[Tensor, " dead"]) -> Int[Tensor, " resampled"]:
        """Start dead atoms anew from inputs drawn by their squared error; returns which."""
        hidden = self._scores(rows)
        step = self._step(rows, normalized(self.atoms()), hidden, self.activation_fn(hidden))
        error = step.errors.clamp(min=0)
        n = min(len(dead), int((error > 0).sum()))
        if n == 0:
            return dead[:0]
        starts = _distinct(leading_pairs(rows[torch.multinomial(error, n)]))
        slots = dead[: len(starts.key)]
        self._start_atoms(slots, starts, rows, slots)
        self.n_resampled += len(slots)
        return slots

    @torch.no_grad()
    def _start_atoms(self, slots: Tensor, starts: Factors, rows: Matrices, scaled: Tensor) -> None:
        """Make atoms of rank-1 matrices, and their encoders the same matrices at the size that fits a batch.

        Where k atoms are nearly parallel, encoders of norm 1 would add up to k times the write.

        Args:
            slots: the atoms that start.
            starts: what they start as.
            rows: the batch.
            scaled: the atoms whose encoders, and thresholds with them, get that size.
        """
        cfg = self.cfg
        for side, kind in (("dec", cfg.decoder), ("enc", cfg.encoder)):
            if kind == "tied":
                continue
            raw = self._side(side, kind)
            if not isinstance(raw, Factors):
                raw[slots] = starts.matrix().to(raw.dtype)
                continue
            for parameter, factor in zip(raw, starts):
                # Ranks 2 and above keep their direction and are scaled to norm 0.1.
                parameter[slots] = 0.1 * torch.nn.functional.normalize(parameter[slots], dim=-1)
                parameter[slots, :1] = factor.to(parameter.dtype)
        self.b_enc[slots] = 0
        forget_moments([p for p in self.parameters() if len(p) == cfg.d_sae and p is not self.b_dec], slots)
        share = self._fitting_share(rows)
        if cfg.encoder == "tied":
            share = self.enc_gain.clamp_(max=share).squeeze()
        else:
            sides = tensors(self._side("enc", cfg.encoder))
            for parameter in sides:
                parameter[scaled] *= share ** (1 / len(sides))
        self.activation_fn.reset(scaled, share * squared_norms(rows).mean().sqrt())

    def _fitting_share(self, rows: Matrices) -> Float[Tensor, ""]:
        """The share c <= 1 of the projections at which c sum_i <X, A_i> A_i fits a batch best.

        The sum is over the atoms that the activation function selects by their projections: if every encoder
        were c times its atom, the reconstruction would have least squared error.
        """
        atoms = normalized(self.atoms())
        along = overlaps(rows, atoms)
        acts = self.activation_fn(along)
        step = Step(self.cfg, self.activation_fn, rows, atoms, along, acts)
        explained = (acts * along).sum()
        rebuilt = (step.errors - step.squared).sum() + 2 * explained  # the sum's |X^|^2
        return (explained / rebuilt).clamp(1e-3, 1.0) if bool(rebuilt > 0) else rebuilt.new_ones(())

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Norms of the encoder's rows; the atoms' own norms are 1."""
        return {"weights/encoder_norms": squared_norms(self._encoder).sqrt().float().cpu().numpy()}


def _distinct(starts: Factors, earlier: Matrices | None = None) -> Factors:
    """Those with another direction than all before them and than all earlier atoms."""
    again = (overlaps(starts, starts).abs() > _SAME).tril(-1).any(-1)
    if earlier is not None:
        again |= (overlaps(starts, earlier).abs() > _SAME).any(-1)
    return starts[~again]
