"""WriteSAEs in training: a SAELens `TrainingSAE` whose losses are in closed form on writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes import activations
from writesae_lens.saes.atoms import Atoms
from writesae_lens.saes.config import PLAIN_INPUTS, WriteSAETrainingConfig
from writesae_lens.saes.packed import PackedWrites
from writesae_lens.saes.rank1 import (
    Matrices,
    inner,
    squared_norms,
)
from writesae_lens.saes.sae import MatrixSAE
from writesae_lens.saes.whole import save_whole


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
        # How many features have started from inputs, and the number of steps: a resumed run needs both.
        progress = torch.zeros(1 + len(self.dictionary.sizes), device=self.device)
        self.register_buffer("progress", progress)
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
        device = next(iter(state_dict.values()), self.b_enc).device
        trained = {"progress": _progress(self.dictionary.sizes, 0).to(device)}
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

            reads = x.blocks[0].reads_at(self.cfg.later_reads) if isinstance(x, PackedWrites) else None
            reads = None if reads is None else reads.to(self.dtype)
            step = self.dictionary.train(rows, dead, reads, step_input.coefficients)
            losses = step.losses()

        # Reconstruction, for SAELens's logs
        with torch.no_grad():
            if step_input.is_logging_step:
                sae_out = self.decode(step.acts.detach() / self.get_W_dec_norm())
            else:
                sae_out = torch.full((1, 1), float("nan"), dtype=x.dtype, device=x.device).expand(x.shape)
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=step.acts,
            hidden_pre=step.scores,
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
        dictionary = self.dictionary
        if not isinstance(dictionary, Atoms):
            raise WriteSAEError("codes are trained on inputs as they are")  # the config refuses others
        return dictionary.losses_at_run_time_norms(
            rows, hidden_pre, feature_acts, step_input.dead_neuron_mask, step_input.coefficients
        )

    @torch.no_grad()
    def _with_metrics(self, output: TrainStepOutput, step_input: TrainStepInput) -> TrainStepOutput:
        """Add the metrics that SAELens logs beside its own, on logging steps."""
        if step_input.is_logging_step:
            rows = self._rows(step_input.sae_in.detach())
            main_part = self.dictionary.main_part(output.feature_acts)
            fires = output.feature_acts.amax(-1) > 0
            sizes = (squared_norms(rows) * squared_norms(main_part)).sqrt()
            cosine = inner(rows, main_part) / sizes.clamp(min=1e-30)
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
        dictionary, step = self.dictionary, int(self.progress[1])
        started = [int(n) for n in self.progress[::2]]
        if not any(started):
            dictionary.begin(rows)
            started = started if cfg.init_from_writes else dictionary.sizes
        started = dictionary.start(rows, started)
        if step and cfg.renormalize_every and step % cfg.renormalize_every == 0:
            self.fold_W_dec_norm()
        if step and cfg.resample_every and step % cfg.resample_every == 0 and dead is not None:
            resampled = dictionary.resample(rows, dead.nonzero().squeeze(-1))
            self.n_resampled += len(resampled)
            dead = dead.index_fill(0, resampled, False)
        self.progress.copy_(_progress(started, step + 1))
        return dead

    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """Norms of the encoder's rows; the atoms' own norms are 1."""
        return {
            "weights/encoder_norms": squared_norms(self.dictionary.encoder()).sqrt().float().cpu().numpy()
        }


def _progress(started: list[int], step: int) -> Tensor:
    """The step in second place, the numbers of atoms, or of key and value codes, around it."""
    return torch.tensor([started[0], step, *started[1:]], dtype=torch.float32)
