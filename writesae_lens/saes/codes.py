"""Dictionaries of codes: a write is an address times a content, and each side has a dictionary of its own.

A write X = k v^T is split into a unit key k and a value v that carries the norm. Key codes u_i and value
codes w_j have norm 1, and X's stand-in is

    X^ = k^ v^^T,    k^ = sum_i a_i u_i,    v^ = sum_j b_j w_j,

of rank 1 whatever the numbers of active codes are: one write for one write. Features are the codes, first the
n_key key codes, then the n_value value codes. Key coefficients a have no unit; value coefficients b have that
of the writes. Codes are chosen by their scores on unit key and unit value, so that no choice depends on a
write's size.

A write has no sign on either side: (-k)(-v)^T is the same matrix. The model's own k and v mostly have one
sign, which a linear function of both unit vectors predicts (`sign_directions`); a write is coded with the
signs for which that function is not negative, so the codes depend on the matrix alone.
Matrices of higher rank (states) are coded by their leading singular pair. Nothing of size n_key x n_value is
built, and in training neither X nor X^.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from writesae_lens.saes.code_losses import CodeStep, Side, Split
from writesae_lens.saes.optimizer import forget_moments
from writesae_lens.saes.rank1 import Factors, Matrices, linear_scores

if TYPE_CHECKING:
    from writesae_lens.saes.sae import MatrixSAE

# Inputs whose cosine is above this count as one start: equal codes would fire together.
_SAME = 0.999
# Steps after which the gain of a tied encoder is measured again.
_GAIN_EVERY = 10
# Steps that bring the signs of a batch without signs of its own, as states, into agreement.
_SIGN_STEPS = 10
Hook = Callable[[Tensor], Tensor]


class Codes:
    """The dictionary of an SAE whose decoder is codes; the methods are those of `Atoms`.

    The norm of a code is the unit of its coefficient: scores are those of codes of norm 1, coefficients are
    scores divided by the norms.

    Args:
        sae: holds the parameters ``dec_key``, ``dec_value``, ``enc_key`` and ``enc_value`` (tied: a gain a
            side in the buffer ``enc_gain``), and the buffers ``sign_key`` and ``sign_value``
            (`sign_directions`) and ``mean_key`` and ``mean_value``, unit vectors.
    """

    def __init__(self, sae: MatrixSAE) -> None:
        self.sae: Any = sae
        self.cfg: Any = sae.cfg

    # Parameters

    def initialize(self) -> None:
        """Give the SAE its parameters, at random."""
        cfg, sae = self.cfg, self.sae
        if cfg.encoder == "tied":
            sae.register_buffer("enc_gain", torch.ones(2, dtype=sae.dtype, device=sae.device))
        for side, n, d in (("key", cfg.n_key, cfg.d_k), ("value", cfg.n_value, cfg.d_v)):
            code = functional.normalize(torch.randn(n, d, dtype=sae.dtype, device=sae.device), dim=-1)
            setattr(sae, f"dec_{side}", nn.Parameter(code))
            if cfg.encoder != "tied":
                setattr(sae, f"enc_{side}", nn.Parameter(code.clone()))
            for buffer in ("mean", "sign"):
                sae.register_buffer(f"{buffer}_{side}", torch.full_like(code[0], d**-0.5))

    def matrices(self) -> Factors:
        """Each code with the other side at the cell's mean: u_i mean_value^T and mean_key w_j^T."""
        return self._beside_means(self.sae.dec_key, self.sae.dec_value)

    def encoder(self) -> Factors:
        """The matrices whose inner products with mean_key v^T, or k mean_value^T, are the scores."""
        return self._beside_means(*self._encoders())

    def _beside_means(self, key: Tensor, value: Tensor) -> Factors:
        means = self.sae.mean_key.expand(len(value), -1), self.sae.mean_value.expand(len(key), -1)
        return Factors(torch.cat([key, means[0]])[:, None], torch.cat([means[1], value])[:, None])

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Both sides' codes at norm 1."""
        key, value = (x / _norms(x)[:, None] for x in (self.sae.dec_key, self.sae.dec_value))
        return key, value

    def _encoders(self) -> tuple[Tensor, Tensor]:
        if self.cfg.encoder != "tied":
            return self.sae.enc_key, self.sae.enc_value
        key, value = self._codes()
        return self.sae.enc_gain[0] * key, self.sae.enc_gain[1] * value

    @torch.no_grad()
    def norms(self) -> Float[Tensor, " d_sae"]:
        """|u_i| and |w_j|, at least 1e-8."""
        return torch.cat([_norms(self.sae.dec_key), _norms(self.sae.dec_value)])

    units = norms

    def normalize(self) -> None:
        """Give all codes norm 1, in place."""
        for side in (self.sae.dec_key, self.sae.dec_value):
            side.div_(_norms(side)[:, None])

    def divide(self, factor: float) -> None:
        """Make all writes smaller by a factor, in place: value codes, for keys have no unit.

        Codes are chosen by scores without unit, of which b_enc times a code's norm is a part: it stays.
        """
        self.sae.dec_value.div_(factor)
        self.sae.b_enc[self.cfg.n_key :].mul_(factor)

    # Encode and decode

    def encode(self, rows: Matrices, hook: Hook) -> tuple[Tensor, Tensor]:
        """Coefficients and pre-activations ``[row, d_sae]``; ``hook`` sees the latter."""
        write, norms = self._split(rows), self.units()
        hidden, scores = self._scores(write, hook, norms)
        acts = self._join(self.sae.activation_fn.of_sides(*scores), write.norm, norms)
        return acts * (write.norm > 0)[:, None], hidden

    def rebuild(self, acts: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d_in"]:
        """k^ v^^T, flattened."""
        return self.stand_in(acts).matrix().flatten(-2)

    def stand_in(self, acts: Float[Tensor, "row d_sae"]) -> Factors:
        """k^ and v^."""
        key, value = self._sides(acts)
        return Factors((key @ self.sae.dec_key)[:, None], (value @ self.sae.dec_value)[:, None])

    def _split(self, rows: Matrices) -> Split:
        return split(rows, self.sae.sign_key, self.sae.sign_value)

    def _sides(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[..., : self.cfg.n_key], features[..., self.cfg.n_key :]

    def _scores(self, write: Split, hook: Hook, norms: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pre-activations in units of the coefficients, and each side's scores at norm 1, without unit."""
        scores = [linear_scores(x, e) for x, e in zip(write[:2], self._encoders())]
        b_enc = self.sae.b_enc
        if b_enc.requires_grad or bool(b_enc.any()):
            scores = [z + b for z, b in zip(scores, self._sides(self.norms() * b_enc))]
        hidden = self._join(scores, write.norm, norms)
        seen = hook(hidden)
        if seen is not hidden:
            key, value = self._sides(seen if norms is None else seen * norms)
            scores = [key, value / write.norm.clamp(min=_tiny(value))[:, None]]
        return seen, (scores[0], scores[1])

    def _join(self, sides: Any, norm: Float[Tensor, " row"], norms: Tensor | None) -> Tensor:
        """Both sides' numbers in one row, value codes in units of the write, all in units of the codes."""
        joined = torch.cat([sides[0], sides[1] * norm[:, None]], dim=-1)
        return joined if norms is None else joined / norms

    # Training

    @property
    def sizes(self) -> list[int]:
        """How many codes of each side start from inputs."""
        return [self.cfg.n_key, self.cfg.n_value]

    def train(
        self,
        rows: Matrices,
        dead: Bool[Tensor, " d_sae"] | None,
        reads: Float[Tensor, "row n_reads d_k"] | None,
        coefficients: dict[str, float],
    ) -> CodeStep:
        """Scores and coefficients of a batch, with hooks, at norm 1."""
        sae, write = self.sae, self._split(rows)
        if sae.training and self.cfg.encoder == "tied" and int(sae.progress[1]) % _GAIN_EVERY == 0:
            self._follow_gain(write)
        hidden, scores = self._scores(write, sae.hook_sae_acts_pre, None)
        acts = sae.activation_fn.of_sides(*scores)
        joined = self._join(acts, write.norm, None)
        seen = sae.hook_sae_acts_post(joined)
        if seen is not joined:
            key, value = self._sides(seen)
            acts = key, value / write.norm.clamp(min=_tiny(value))[:, None]
        sae.activation_fn.follow_sides(*acts)
        key, value = self._of_batch(write, scores, acts, dead)
        return CodeStep(self.cfg, write.norm, key, value, hidden, seen, reads, coefficients)

    def _of_batch(
        self, write: Split, scores: Any, acts: Any, dead: Bool[Tensor, " d_sae"] | None
    ) -> tuple[Side, Side]:
        gone = (None, None) if dead is None else self._sides(dead)
        parts = zip(self.sae.activation_fn.sides, write[:2], self._codes(), scores, acts, gone)
        key, value = (Side(*part) for part in parts)
        return key, value

    @torch.no_grad()
    def _follow_gain(self, write: Split) -> None:
        """Give the gain of a tied encoder the size at which each side of a batch has least squared error.

        It is at most 1. Biases and thresholds follow, so that the same codes are active. The gain of the
        first batch would be too small once fewer codes are active, as with JumpReLU, or they differ more.
        """
        _, scores = self._scores(write, lambda hidden: hidden, None)
        acts = self.sae.activation_fn.of_sides(*scores)
        parts = zip(self._of_batch(write, scores, acts, None), self._sides(self.sae.b_enc), self.sae.enc_gain)
        for side, bias, gain in parts:
            power = side.coded.square().sum()
            if bool(power > 0):
                change = ((side.coded * side.target).sum() / power * gain).clamp(1e-3, 1.0) / gain
                bias *= change
                gain *= change
                side.activation.fold(1 / float(change))

    def begin(self, rows: Matrices) -> None:
        """Take the rule for signs, mean key and mean value from the first batch."""
        sae = self.sae
        for side, direction in zip(("key", "value"), sign_directions(rows)):
            getattr(sae, f"sign_{side}").copy_(direction)
        write = self._split(rows)
        for buffer, sums in (
            (sae.mean_key, write.key.sum(0)),
            (sae.mean_value, (write.value * write.norm[:, None]).sum(0)),
        ):
            if bool(sums.norm() > 0):
                buffer.copy_(sums / sums.norm())
        sae.activation_fn.begin(torch.ones_like(write.norm[:1]).squeeze())

    def start(self, rows: Matrices, started: list[int]) -> list[int]:
        """Start codes that have not yet from sides of inputs in new directions; how many a side have then."""
        write, after = self._split(rows), []
        for side, (n, size, codes) in enumerate(zip(started, self.sizes, self._codes())):
            if n < size:
                targets = write[side][write.norm > 0]
                starts = _distinct(targets, codes[:n])[: size - n]
                slots = torch.arange(n, n + len(starts), device=targets.device)
                scaled = slots if n else torch.arange(size, device=targets.device)
                self._start_codes(side, slots, starts, targets, scaled)
                n += len(slots)
            after.append(n)
        return after

    def resample(self, rows: Matrices, dead: Int[Tensor, " dead"]) -> Int[Tensor, " resampled"]:
        """Start each side's dead codes anew from inputs drawn by that side's squared error; returns which."""
        write, resampled = self._split(rows), []
        write = Split(*(part[write.norm > 0] for part in write))
        _, scores = self._scores(write, lambda hidden: hidden, None)
        sides = self._of_batch(write, scores, self.sae.activation_fn.of_sides(*scores), None)
        for number, side in enumerate(sides):
            first = number * self.cfg.n_key
            slots = dead[(dead >= first) & (dead < first + self.sizes[number])] - first
            n = min(len(slots), int((side.errors > 0).sum()))
            if n:
                starts = _distinct(side.target[torch.multinomial(side.errors, n)], side.target[:0])
                slots = slots[: len(starts)]
                self._start_codes(number, slots, starts, side.target, slots)
                resampled.append(slots + first)
        return torch.cat(resampled) if resampled else dead[:0]

    def _start_codes(
        self, side: int, slots: Tensor, starts: Tensor, targets: Float[Tensor, "row d"], scaled: Tensor
    ) -> None:
        """Make codes of unit vectors, and their encoders the same vectors at the size that fits a batch.

        Args:
            side: 0 for key codes, 1 for value codes.
            slots: the codes that start, by their number on their side.
            starts: what they start as.
            targets: that side of the batch.
            scaled: the codes whose encoders, and thresholds with them, get that size.
        """
        sae, name = self.sae, ("key", "value")[side]
        tied, activation = self.cfg.encoder == "tied", sae.activation_fn.sides[side]
        parameters = [getattr(sae, f"{part}_{name}") for part in (("dec",) if tied else ("dec", "enc"))]
        for parameter in parameters:
            parameter[slots] = starts.to(parameter.dtype)
        features = slots + side * self.cfg.n_key
        sae.b_enc[features] = 0
        forget_moments([sae.b_enc], features)
        forget_moments([*parameters, *activation.parameters()], slots)
        share = self._fitting_share(side, targets)
        if tied:
            share = sae.enc_gain[side].clamp_(max=share)
        else:
            parameters[1][scaled] *= share
        activation.reset(scaled, share)

    def _fitting_share(self, side: int, targets: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
        """The share c <= 1 of the projections at which c sum_i <x, c_i> c_i fits a side of a batch best.

        The sum is over the codes that the activation function selects by their projections. Where k codes are
        nearly parallel, encoders of norm 1 would add up to k times the input.
        """
        codes, along = self._codes()[side], self._along(side, targets)
        acts = self.sae.activation_fn.sides[side](along)
        rebuilt = (acts @ codes).square().sum()
        explained = (acts * along).sum()
        return (explained / rebuilt).clamp(1e-3, 1.0) if bool(rebuilt > 0) else rebuilt.new_ones(())

    def _along(self, side: int, targets: Float[Tensor, "row d"]) -> Float[Tensor, "row code"]:
        """Projections on the codes of a side; of BatchTopK without those of inputs on codes that they are.

        BatchTopK compares inputs with each other: among the inputs that codes start as, each takes its own
        code and nothing else, which says nothing of other inputs.
        """
        along = targets @ self._codes()[side].T
        return along.masked_fill(along > _SAME, 0) if self.cfg.activation == "batchtopk" else along

    def main_part(self, acts: Float[Tensor, "row d_sae"]) -> Factors:
        """Each input's stand-in, of coefficients at norm 1."""
        return self.stand_in(acts / self.norms())


def split(rows: Matrices, sign_key: Float[Tensor, " d_k"], sign_value: Float[Tensor, " d_v"]) -> Split:
    """Unit key k, unit value v and norm of each matrix, with <k, sign_key> + <v, sign_value> >= 0.

    Of built matrices these are of the leading singular pair (u, w), with gradients: of key X w and value
    X^T u at the present pair, which is right to first order where X is of rank 1.
    """
    if isinstance(rows, Factors):
        key, value = rows.key[:, 0], rows.value[:, 0]
        norm = key.norm(dim=-1) * value.norm(dim=-1)
    else:
        left, right = leading_vectors(rows.detach())
        key, value = (rows @ right[..., None]).squeeze(-1), (left[:, None] @ rows).squeeze(1)
        norm = value.norm(dim=-1)
    key, value = (x / x.norm(dim=-1, keepdim=True).clamp(min=_tiny(x)) for x in (key, value))
    negative = key.detach() @ sign_key + value.detach() @ sign_value < 0
    sign = torch.where(negative, -1.0, 1.0).to(key)[:, None]
    return Split(key * sign, value * sign, norm)


def leading_vectors(rows: Float[Tensor, "row d_k d_v"]) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors."""
    left, _, right = torch.linalg.svd(
        rows.to(torch.promote_types(rows.dtype, torch.float32)), full_matrices=False
    )
    return left[..., 0].to(rows.dtype), right[..., 0, :].to(rows.dtype)


def sign_directions(rows: Matrices) -> tuple[Float[Tensor, " d_k"], Float[Tensor, " d_v"]]:
    """The linear function of unit key and unit value that tells the signs of a batch best.

    It is the ridge regression of the constant 1 on x = (k, v), d = (E[x x^T] + l I)^-1 E[x], with l the trace
    of E[x x^T] over the number of rows. It is odd: it gives the two signs of a write opposite numbers. It
    turns 0 to 6% of a shipped head's writes against the model's own signs; the sign of <k, mean key> would
    turn up to 22%. Matrices without factors have no signs: theirs are first made to agree.
    """
    has_signs = isinstance(rows, Factors)
    key, value = (rows.key[:, 0], rows.value[:, 0]) if isinstance(rows, Factors) else leading_vectors(rows)
    wide = torch.promote_types(key.dtype, torch.float32)
    x = torch.cat([functional.normalize(side.to(wide), dim=-1) for side in (key, value)], dim=-1)
    if not has_signs:
        x = _agreeing(x)
    moments = x.T @ x / len(x)
    ridge = (moments.trace() / len(x)).clamp(min=_tiny(x)) * torch.eye(x.shape[1]).to(x)
    direction = torch.linalg.solve(moments + ridge, x.mean(0))
    d_k, d_v = key.shape[-1], value.shape[-1]
    return direction[:d_k], direction[d_k : d_k + d_v]


def _agreeing(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The same vectors or their negatives, on one side of the direction that most of them lie along."""
    mean = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    for _ in range(_SIGN_STEPS):
        x = torch.where(x @ mean < 0, -1.0, 1.0)[:, None] * x
        mean = x.mean(0)
    return x


def _distinct(starts: Float[Tensor, "start d"], earlier: Float[Tensor, "code d"]) -> Tensor:
    """Those unit vectors with another direction than all before them and than all earlier codes."""
    again = (starts @ starts.T > _SAME).tril(-1).any(-1) | (starts @ earlier.T > _SAME).any(-1)
    return starts[~again]


def _norms(codes: Float[Tensor, "code d"]) -> Float[Tensor, " code"]:
    return codes.norm(dim=-1).clamp(min=1e-8)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
