"""Configurations of the WriteSAE family, for inference and for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, no_type_check

from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.activations import ACTIVATIONS, BATCHWISE

ARCHITECTURE = "writesae"
# Settings of normalize_activations that leave the matrices as they come to the SAE.
PLAIN_INPUTS = ("none", "expected_average_only_in")
# Options of training that count something.
_COUNTS = ("k_aux", "renormalize_every", "resample_every", "l0_warm_up_steps", "l1_warm_up_steps")


def _settle(cfg: Any, allowed_activations: tuple[str, ...] = ACTIVATIONS) -> None:
    """Derive d_in and refuse contradictions; shared by the two config classes."""
    for name in ("d_k", "d_v", "d_sae", "rank", "k"):
        if type(getattr(cfg, name)) is not int:
            raise WriteSAEError(f"{name} must be a whole number, got {getattr(cfg, name)!r:.40}")
    if cfg.d_k < 1 or cfg.d_v < 1 or cfg.rank < 1 or cfg.d_sae < 1:
        raise WriteSAEError(
            f"d_k, d_v, d_sae and rank must be positive, got d_k={cfg.d_k}, d_v={cfg.d_v}, "
            f"d_sae={cfg.d_sae}, rank={cfg.rank}"
        )
    cfg.d_in = cfg.d_k * cfg.d_v
    if cfg.d_in * cfg.d_sae * cfg.rank >= 2**62:
        raise WriteSAEError(
            f"no dictionary has d_sae={cfg.d_sae} atoms of rank {cfg.rank} for {cfg.d_k} x {cfg.d_v} matrices"
        )
    if not 1 <= cfg.k <= cfg.d_sae:
        raise WriteSAEError(
            f"k={cfg.k} atoms cannot be active out of d_sae={cfg.d_sae}: give 1 <= k <= d_sae"
        )
    for name, allowed in (
        ("encoder", ("bilinear", "tied", "dense")),
        ("decoder", ("factored", "dense")),
        ("activation", allowed_activations),
    ):
        if getattr(cfg, name) not in allowed:
            found = str(getattr(cfg, name))[:40]
            raise WriteSAEError(f"{name}={found!r} is unknown: choose {', '.join(allowed)}")
    if cfg.normalize_activations == "covariance_whitening":
        raise WriteSAEError(
            "covariance_whitening would mix matrix entries, and whitened writes are no longer rank 1: "
            "use normalize_activations='none' or 'expected_average_only_in'"
        )
    if cfg.reshape_activations != "none":
        raise WriteSAEError(
            "a WriteSAE takes flattened matrices as they are: leave reshape_activations 'none'"
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
        k: atoms active per input: at most (topk), on average in training (batchtopk, jumprelu).
        rank: rank of the factored encoder and decoder; 1 is the shape of a native write.
        encoder: bilinear (its own factors), tied (the atoms themselves, so a coefficient is the projection on
            its atom) or dense (a linear map of the flattened matrix).
        decoder: factored, or dense (any matrix of unit norm; no longer a stand-in for one write).
        activation: topk, batchtopk (a threshold once trained), jumprelu, gated; or topk_of_batch, batchtopk
            without a threshold as published checkpoints have it: k a row on average over what is encoded at
            once.
        rescale_acts_by_decoder_norm: the norms of atoms are units: atoms are selected by what their
            coefficients would be if all had norm 1. False for published checkpoints, which select by the
            coefficients as they are (as SAELens's TopK does by default).
        gate_temperature: of gated: the gate is a sigmoid of this width (published checkpoints: 0.1); 0 is a
            step.
        d_in: always d_k * d_v; whatever is given is overwritten.

    Raises:
        WriteSAEError: k above d_sae, a size below 1, an unknown member of the family, whitening, or a bias
            subtracted from the input.
    """

    d_k: int
    d_v: int
    k: int = 4
    rank: int = 1
    encoder: Literal["bilinear", "tied", "dense"] = "bilinear"
    decoder: Literal["factored", "dense"] = "factored"
    activation: Literal["topk", "batchtopk", "jumprelu", "gated", "topk_of_batch"] = "topk"
    rescale_acts_by_decoder_norm: bool = True
    gate_temperature: float = 0.0
    d_in: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        _settle(self, (*ACTIVATIONS, BATCHWISE))
        if type(self.rescale_acts_by_decoder_norm) is not bool:
            raise WriteSAEError("rescale_acts_by_decoder_norm must be True or False")
        if not self.rescale_acts_by_decoder_norm and self.normalize_activations != "none":
            raise WriteSAEError(
                f"normalize_activations={self.normalize_activations!r} is for SAEs whose atoms' norms are "
                "units: use 'none' with rescale_acts_by_decoder_norm=False"
            )
        temperature = self.gate_temperature
        if not (isinstance(temperature, (int, float)) and 0 <= temperature < float("inf")):
            raise WriteSAEError(f"gate_temperature must be 0 or more, got {temperature!r}")
        super().__post_init__()


@no_type_check
@dataclass(kw_only=True)
class WriteSAETrainingConfig(TrainingSAEConfig):
    """A WriteSAE in training; the first arguments are those of `WriteSAEConfig`.

    Args:
        d_k, d_v, k, rank, encoder, decoder, activation, d_in: as in `WriteSAEConfig`.
        init_from_writes: start the atoms as writes of the first batches (of states: their leading singular
            pairs) rather than at random; then few die.
        encoder_bias: learn a threshold for each atom. Without it (TopK needs none) the SAE is as good on
            writes of norm 0.01 as of norm 10; with it atoms of small writes die, for a step of the
            optimiser is large against their coefficients.
        decoder_bias: learn the matrix B that is added at decode. Atoms stand in for writes better without
            it: with a bias they learn differences from the mean write.
        aux_loss_coefficient: weight of the dead-atom loss, the squared error with which dead atoms
            reconstruct what the live ones left over.
        k_aux: dead atoms that take part in it for an input, by pre-activation, out of the 4 * k_aux that the
            batch excites most.
        write_alignment_coefficient: weight of 1 - cos(X, A) of each input's dominant atom, in units of
            the batch's mean |X|^2; 0 is the paper's recipe (MSE alone).
        read_alignment_coefficient: weight, in the same units, of what the dominant atom gets wrong about the
            write as its own token reads it: r / (1 + r) with r = |c A^T q / s - X^T q|^2 / |X^T q|^2, c its
            coefficient. For writes of a `HookedRecurrent`, whose read vectors q the activation store
            brings along; other inputs train without it.
        dominant_share: s above, the share of a write that its dominant atom is to take; the other atoms
            complete the reconstruction. At 0.5 an atom in the write's place beats deletion more often, at
            1 it comes nearer to the native output. A tied encoder, whose coefficients are projections, has
            share 1.
        renormalize_every: steps after which the raw factors are put back to norm 1. The norms are units
            and change no loss; this keeps the optimiser's steps as large as the learning rate says.
        resample_every: steps after which atoms still dead start anew as the leading singular pairs of
            badly reconstructed inputs, with the optimiser's moments cleared; 0 for never.
        jumprelu_init_threshold: first threshold, in units of the inputs' root mean square norm.
        jumprelu_bandwidth: width of the straight-through estimate, in units of the threshold.
        l0_coefficient, l0_warm_up_steps: weight of JumpReLU's (L0 / k - 1)^2, in units of mean |X|^2.
        l1_coefficient, l1_warm_up_steps: weight of Gated's sum of gate activations, in units of the root
            mean square norm.
    """

    d_k: int
    d_v: int
    k: int = 4
    rank: int = 1
    encoder: Literal["bilinear", "tied", "dense"] = "bilinear"
    decoder: Literal["factored", "dense"] = "factored"
    activation: Literal["topk", "batchtopk", "jumprelu", "gated"] = "topk"
    # SAELens copies every field of the inference config from here.
    rescale_acts_by_decoder_norm: ClassVar[bool] = True
    gate_temperature: ClassVar[float] = 0.0
    d_in: int = 0
    apply_b_dec_to_input: bool = False
    init_from_writes: bool = True
    encoder_bias: bool = False
    decoder_bias: bool = False
    aux_loss_coefficient: float = 1e-2
    k_aux: int = 256
    write_alignment_coefficient: float = 2.0
    read_alignment_coefficient: float = 6.0
    dominant_share: float = 0.5
    renormalize_every: int = 100
    resample_every: int = 250
    jumprelu_init_threshold: float = 0.1
    jumprelu_bandwidth: float = 0.5
    l0_coefficient: float = 1.0
    l0_warm_up_steps: int = 0
    l1_coefficient: float = 0.1
    l1_warm_up_steps: int = 0

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @classmethod
    def recommended(cls, **options: Any) -> WriteSAETrainingConfig:
        """The recipe of the documentation's figures: 2,048 atoms, 4 active per input, and the defaults.

        Its schedule belongs to the runner: ``LanguageModelSAERunnerConfig(sae=..., **RECOMMENDED_SCHEDULE)``.

        Args:
            **options: d_k and d_v, and any other field that should differ.
        """
        return cls(**({"d_sae": 2048} | options))

    @classmethod
    def paper(cls, **options: Any) -> WriteSAETrainingConfig:
        """The paper's recipe (section "Training"): squared error and dead-atom loss on k = 32 of 2,048 atoms.

        Its schedule belongs to the runner: ``LanguageModelSAERunnerConfig(sae=..., **PAPER_SCHEDULE)``.

        Args:
            **options: d_k and d_v, and whatever else is to differ.
        """
        recipe: dict[str, Any] = {
            "d_sae": 2048,
            "k": 32,
            "init_from_writes": False,
            "encoder_bias": True,
            "decoder_bias": True,
            "write_alignment_coefficient": 0.0,
            "read_alignment_coefficient": 0.0,
            "renormalize_every": 100,
            "resample_every": 250,
        }
        return cls(**(recipe | options))

    def __post_init__(self) -> None:
        _settle(self)
        least = {
            "jumprelu_init_threshold": 1e-9,
            "dominant_share": 1e-9,
            "jumprelu_bandwidth": 1e-9,
        } | dict.fromkeys(
            (
                *_COUNTS,
                "aux_loss_coefficient",
                "write_alignment_coefficient",
                "read_alignment_coefficient",
                "l0_coefficient",
                "l1_coefficient",
            ),
            0,
        )
        for name in least:
            value, kind = getattr(self, name), int if name in _COUNTS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or value == float("inf"):
                what = "whole" if kind is int else "finite"
                raise WriteSAEError(f"{name} must be a {what} number, got {value!r:.40}")
        for name in ("init_from_writes", "encoder_bias", "decoder_bias"):
            if type(getattr(self, name)) is not bool:
                raise WriteSAEError(f"{name} must be True or False, got {getattr(self, name)!r:.40}")
        too_low = [name for name, value in least.items() if not getattr(self, name) >= value]
        if too_low:
            raise WriteSAEError(
                f"{' and '.join(too_low)} must not be negative (dominant_share and JumpReLU's threshold and "
                "bandwidth: nor zero)"
            )
        if self.activation == "gated" and self.normalize_activations not in PLAIN_INPUTS:
            raise WriteSAEError(
                f"the gate's own reconstruction is compared with the raw input, which "
                f"normalize_activations={self.normalize_activations!r} puts in other units: use 'none' or "
                "'expected_average_only_in'"
            )
        if self.aux_loss_coefficient and self.normalize_activations not in PLAIN_INPUTS:
            raise WriteSAEError(
                f"the dead-atom loss compares coefficients with what is left of the raw input, which "
                f"normalize_activations={self.normalize_activations!r} puts in other units: set "
                "aux_loss_coefficient=0 or normalize_activations='none'"
            )
        super().__post_init__()


# What the paper's recipe sets in SAELens's runner config (paper, section "Training").
PAPER_SCHEDULE: dict[str, Any] = {
    "lr": 3e-4,
    "lr_end": 3e-5,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}

# The part of the recommended recipe that is the same at any length (`recommended_schedule` adds the decay).
RECOMMENDED_SCHEDULE: dict[str, Any] = {
    "lr": 4e-3,
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 512,
    "dead_feature_window": 100,
}


def recommended_schedule(training_tokens: int) -> dict[str, Any]:
    """`RECOMMENDED_SCHEDULE`, with a linear decay over the last half of a training on so many writes."""
    steps = training_tokens // RECOMMENDED_SCHEDULE["train_batch_size_tokens"]
    return RECOMMENDED_SCHEDULE | {"lr_decay_steps": steps // 2}


# SAELens's command line reads the annotations of configs, which the mark would hide.
for _config in (WriteSAEConfig, WriteSAETrainingConfig):
    delattr(_config, "__no_type_check__")
