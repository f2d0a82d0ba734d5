"""Dictionaries of atoms: a reconstruction is a sum of matrices, X^ = sum_i a_i A_i + B.

What a `MatrixSAE` does that depends on its dictionary being one of atoms: parameters, scores,
reconstruction, starts. `writesae_lens.saes.codes.Codes` has the same methods for the other kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from writesae_lens.saes.losses import Step
from writesae_lens.saes.optimizer import forget_moments
from writesae_lens.saes.rank1 import (
    Factors,
    Matrices,
    built,
    inner,
    leading_pairs,
    normalized,
    overlaps,
    scores,
    squared_norms,
    tensors,
    weighted_sums,
)

if TYPE_CHECKING:
    from writesae_lens.saes.sae import MatrixSAE

# Inputs whose cosine is above this count as one start: equal atoms would fire together.
SAME = 0.999


class Atoms:
    """The dictionary of an SAE whose decoder is factored or dense.

    The norm of an atom is the unit of its coefficient: scores are those of atoms of norm 1, coefficients are
    scores divided by the norms, and neither selection nor reconstruction depends on the norms. In SAEs with
    rescale_acts_by_decoder_norm=False the scores are the coefficients themselves.

    Args:
        sae: holds the parameters, and the buffer ``enc_gain`` of a tied encoder.
    """

    def __init__(self, sae: MatrixSAE) -> None:
        self.sae: Any = sae
        self.cfg: Any = sae.cfg

    # Parameters

    def initialize(self) -> None:
        """Give the SAE its parameters, at random."""
        cfg, sae = self.cfg, self.sae

        def unit(*shape: int) -> Tensor:
            x = torch.randn(shape, dtype=sae.dtype, device=sae.device)
            return x / x.norm(dim=-1, keepdim=True)

        start = Factors(unit(cfg.d_sae, cfg.rank, cfg.d_k), unit(cfg.d_sae, cfg.rank, cfg.d_v))
        for side, kind in (("dec", cfg.decoder), ("enc", cfg.encoder)):
            if kind == "dense":
                setattr(sae, f"{side}_matrix", nn.Parameter(start.normalized().matrix()))
            elif kind == "tied":
                sae.register_buffer("enc_gain", torch.ones(1, dtype=sae.dtype, device=sae.device))
            else:
                setattr(sae, f"{side}_key", nn.Parameter(start.key.clone()))
                setattr(sae, f"{side}_value", nn.Parameter(start.value.clone()))

    def matrices(self) -> Matrices:
        """The atoms A_i, as `rebuild` adds them up."""
        return self._side("dec", self.cfg.decoder)

    def encoder(self) -> Matrices:
        """The matrices E_i whose inner products with an input are its scores."""
        if self.cfg.encoder != "tied":
            return self._side("enc", self.cfg.encoder)
        atoms = self.matrices()
        atoms = normalized(atoms) if self.cfg.rescale_acts_by_decoder_norm else atoms
        if isinstance(atoms, Factors):
            return Factors(atoms.key * self.sae.enc_gain, atoms.value)
        return atoms * self.sae.enc_gain

    def _side(self, side: str, kind: str) -> Matrices:
        if kind == "dense":
            return getattr(self.sae, f"{side}_matrix")
        return Factors(getattr(self.sae, f"{side}_key"), getattr(self.sae, f"{side}_value"))

    @torch.no_grad()
    def norms(self) -> Float[Tensor, " d_sae"]:
        """|A_i|, at least 1e-8."""
        return squared_norms(self.matrices()).sqrt().clamp(min=1e-8)

    def units(self) -> Float[Tensor, " d_sae"]:
        """The numbers that scores are divided by to give coefficients."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return self.norms()
        return self.sae.b_enc.new_ones(self.cfg.d_sae)

    def normalize(self) -> None:
        """Give all atoms norm 1, in place."""
        for parameter, unit in zip(tensors(self.matrices()), tensors(normalized(self.matrices()))):
            parameter.copy_(unit)

    def divide(self, factor: float) -> None:
        """Make all atoms smaller by a factor, in place."""
        tensors(self.matrices())[0].div_(factor)

    # Encode and decode

    def encode(
        self, rows: Matrices, hook: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "row d_sae"], Float[Tensor, "row d_sae"]]:
        """Coefficients and pre-activations; ``hook`` sees the latter."""
        norms = self.units()
        hidden = hook(overlaps(rows, self.encoder()) / norms + self.sae.b_enc)
        return self.sae.activation_fn(hidden * norms) / norms, hidden

    def rebuild(self, acts: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d_in"]:
        """sum_i a_i A_i, flattened."""
        return weighted_sums(acts, self.matrices()).flatten(-2)

    def stand_in(self, acts: Float[Tensor, "row d_sae"]) -> Factors:
        """The largest coefficient times its atom, or times the atom's leading singular pair."""
        coefficient, atom = acts.max(dim=-1)
        coefficient = coefficient.clamp(min=0)[:, None, None]
        fires = (coefficient > 0).to(coefficient)
        atoms = self.matrices()
        if isinstance(atoms, Factors) and self.cfg.rank == 1:
            return Factors(atoms.key[atom] * fires, atoms.value[atom] * coefficient)
        used, which = atom.unique(return_inverse=True)
        chosen = atoms[used]
        whole = built(chosen).to(torch.promote_types(acts.dtype, torch.float32))
        pairs = leading_pairs(whole)
        size = inner(pairs, whole)[which, None, None]
        key, value = (x[which].to(acts.dtype) for x in pairs)
        return Factors(key * fires, value * (size.to(acts.dtype) * coefficient))

    # Training

    @property
    def sizes(self) -> list[int]:
        """How many atoms start from inputs, in one number."""
        return [self.cfg.d_sae]

    def train(
        self,
        rows: Matrices,
        dead: Bool[Tensor, " d_sae"] | None,
        reads: Float[Tensor, "row n_reads d_k"] | None,
        coefficients: dict[str, float],
    ) -> Step:
        """Scores and coefficients of a batch, with hooks, at norm 1: scores <X, E_i> + b_i."""
        sae = self.sae
        atoms = normalized(self.matrices())
        hidden = sae.hook_sae_acts_pre(self._scores(rows))
        acts = sae.hook_sae_acts_post(sae.activation_fn(hidden))
        sae.activation_fn.follow(acts)
        return self._step(rows, atoms, hidden, acts, dead, reads, coefficients)

    def losses_at_run_time_norms(
        self,
        rows: Matrices,
        hidden: Float[Tensor, "row d_sae"],
        acts: Float[Tensor, "row d_sae"],
        dead: Bool[Tensor, " d_sae"] | None,
        coefficients: dict[str, float],
    ) -> dict[str, Tensor]:
        """The losses beside the squared error, where SAELens encodes inputs that it has normalised."""
        norms = self.norms()
        self.sae.activation_fn.follow(acts * norms)
        atoms = normalized(self.matrices())
        step = self._step(rows, atoms, hidden * norms, acts * norms, dead, None, coefficients)
        return {name: value for name, value in step.losses().items() if name != "mse_loss"}

    def _scores(self, rows: Matrices) -> Float[Tensor, "row d_sae"]:
        hidden = scores(rows, self.encoder())
        b_enc = self.sae.b_enc
        if b_enc.requires_grad or bool(b_enc.any()):
            hidden = hidden + self.norms() * b_enc
        return hidden

    def _step(
        self,
        rows: Matrices,
        atoms: Matrices,
        hidden: Float[Tensor, "row d_sae"],
        acts: Float[Tensor, "row d_sae"],
        dead: Bool[Tensor, " d_sae"] | None = None,
        reads: Float[Tensor, "row n_reads d_k"] | None = None,
        coefficients: dict[str, float] | None = None,
    ) -> Step:
        bias = self.sae.bias_matrix if self.cfg.decoder_bias else None
        return Step(
            self.cfg, self.sae.activation_fn, rows, atoms, hidden, acts, bias, dead, reads, coefficients
        )

    def begin(self, rows: Matrices) -> None:
        """Take the inputs' units from the first batch."""
        self.sae.activation_fn.begin(squared_norms(rows).mean().sqrt())

    def start(self, rows: Matrices, started: list[int]) -> list[int]:
        """Start atoms that have not yet from inputs of new directions; how many have then."""
        n, cfg = started[0], self.cfg
        if n < cfg.d_sae:
            earlier = normalized(self.matrices())[:n]
            starts = distinct(leading_pairs(rows[squared_norms(rows) > 0]), earlier)[: cfg.d_sae - n]
            slots = torch.arange(n, n + len(starts.key), device=self.sae.b_enc.device)
            # On the first batch all encoders are rescaled, those of atoms that have not started too.
            self._start_atoms(slots, starts, rows, slots if n else torch.arange(cfg.d_sae))
            n += len(slots)
        return [n]

    def resample(self, rows: Matrices, dead: Int[Tensor, " dead"]) -> Int[Tensor, " resampled"]:
        """Start dead atoms anew from inputs drawn by their squared error; returns which."""
        hidden = self._scores(rows)
        step = self._step(rows, normalized(self.matrices()), hidden, self.sae.activation_fn(hidden))
        error = step.errors.clamp(min=0)
        n = min(len(dead), int((error > 0).sum()))
        if n == 0:
            return dead[:0]
        starts = distinct(leading_pairs(rows[torch.multinomial(error, n)]))
        slots = dead[: len(starts.key)]
        self._start_atoms(slots, starts, rows, slots)
        return slots

    def _start_atoms(self, slots: Tensor, starts: Factors, rows: Matrices, scaled: Tensor) -> None:
        """Make atoms of rank-1 matrices, and their encoders the same matrices at the size that fits a batch.

        Where k atoms are nearly parallel, encoders of norm 1 would add up to k times the write.

        Args:
            slots: the atoms that start.
            starts: what they start as.
            rows: the batch.
            scaled: the atoms whose encoders, and thresholds with them, get that size.
        """
        cfg, sae = self.cfg, self.sae
        for side, kind in (("dec", cfg.decoder), ("enc", cfg.encoder)):
            if kind == "tied":
                continue
            raw = self._side(side, kind)
            if not isinstance(raw, Factors):
                raw[slots] = starts.matrix().to(raw.dtype)
                continue
            for parameter, factor in zip(raw, starts):
                # Ranks 2 and above keep their direction and are scaled to norm 0.1.
                parameter[slots] = 0.1 * nn.functional.normalize(parameter[slots], dim=-1)
                parameter[slots, :1] = factor.to(parameter.dtype)
        sae.b_enc[slots] = 0
        forget_moments([p for p in sae.parameters() if len(p) == cfg.d_sae and p is not sae.b_dec], slots)
        share = self._fitting_share(rows)
        if cfg.encoder == "tied":
            share = sae.enc_gain.clamp_(max=share).squeeze()
        else:
            sides = tensors(self._side("enc", cfg.encoder))
            for parameter in sides:
                parameter[scaled] *= share ** (1 / len(sides))
        sae.activation_fn.reset(scaled, share * squared_norms(rows).mean().sqrt())

    def _fitting_share(self, rows: Matrices) -> Float[Tensor, ""]:
        """The share c <= 1 of the projections at which c sum_i <X, A_i> A_i fits a batch best.

        The sum is over the atoms that the activation function selects by their projections: if every encoder
        were c times its atom, the reconstruction would have least squared error.
        """
        atoms = normalized(self.matrices())
        along = overlaps(rows, atoms)
        acts = self.sae.activation_fn(along)
        step = self._step(rows, atoms, along, acts)
        explained = (acts * along).sum()
        rebuilt = (step.errors - step.squared).sum() + 2 * explained  # the sum's |X^|^2
        return (explained / rebuilt).clamp(1e-3, 1.0) if bool(rebuilt > 0) else rebuilt.new_ones(())

    def main_part(self, acts: Float[Tensor, "row d_sae"]) -> Matrices:
        """Each input's dominant atom, at norm 1."""
        return normalized(self.matrices())[acts.argmax(-1)]


def distinct(starts: Factors, earlier: Matrices | None = None) -> Factors:
    """Those with another direction than all before them and than all earlier atoms."""
    again = (overlaps(starts, starts).abs() > SAME).tril(-1).any(-1)
    if earlier is not None:
        again |= (overlaps(starts, earlier).abs() > SAME).any(-1)
    return starts[~again]
