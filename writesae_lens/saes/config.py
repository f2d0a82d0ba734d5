"""Configurations of the WriteSAE family, for inference and for training, and the named recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, no_type_check

from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.activations import ACTIVATIONS, BATCHWISE

ARCHITECTURE = "writesae"
# Settings of normalize_activations under which an SAE receives the matrices as they are.
PLAIN_INPUTS = ("none", "expected_average_only_in")
_OF_CODES = ("n_key", "n_value", "k_key", "k_value")


# SAELens fills configs from dictionaries and sets their metadata last, which run-time type checks refuse.
@no_type_check
@dataclass(kw_only=True)
class MatrixSAEConfig:
    """The fields that `WriteSAEConfig` and `WriteSAETrainingConfig` share.

    Args:
        d_k: key side of the cell: rows of a write.
        d_v: value side of the cell: columns of a write.
        k: features active per input: at most so many with topk, so many on average with batchtopk and
            jumprelu.
        rank: rank of the factored encoder and decoder. 1 is the shape of a native write.
        encoder: bilinear: a pair of factors per atom. tied: the atoms themselves times one gain, so that a
            coefficient is the gain times the input's projection on its atom; of codes one gain a side, which
            is measured again every few steps. dense: any linear map of the flattened matrix.
        decoder: factored: atoms of the given rank. dense: any matrix of norm 1, which can no longer stand in
            for one write. codes: two dictionaries, of keys and of values; a write's stand-in is a sum of key
            codes times a sum of value codes, of rank 1 always (`writesae_lens.saes.codes`). Encoders of
            codes are bilinear (an untied linear encoder a side) or tied, and their rank is 1.
        n_key, n_value: of codes: how many there are a side. Given neither, each side has half of d_sae.
        k_key, k_value: of codes: how many are active a side, as k. Given neither, each side has half of k, 1
            at least.
        d_sae: how many features there are: atoms, or n_key + n_value codes. Of codes, any value given beside
            n_key and n_value is overwritten, and so is k.
        d_in: Always d_k * d_v. Any value given is overwritten.
        apply_b_dec_to_input: Always False: a WriteSAE adds its decoder bias at decode and does not subtract
            it before encoding.
    """

    d_k: int
    d_v: int
    k: int = 4
    rank: int = 1
    encoder: Literal["bilinear", "tied", "dense"] = "bilinear"
    decoder: Literal["factored", "dense", "codes"] = "factored"
    n_key: int = 0
    n_value: int = 0
    k_key: int = 0
    k_value: int = 0
    d_sae: int = 0
    d_in: int = 0
    apply_b_dec_to_input: bool = False

    def _check_family(self: Any, activations: tuple[str, ...]) -> None:
        """Derive d_in; refuse sizes, members of the family and SAELens options that cannot be."""
        for name in ("d_k", "d_v", "d_sae", "rank", "k", *_OF_CODES):
            if type(getattr(self, name)) is not int:
                raise WriteSAEError(f"{name} must be a whole number, got {getattr(self, name)!r:.40}")
        self._share_out()
        d_sae = self.d_sae
        if self.d_k < 1 or self.d_v < 1 or self.rank < 1 or d_sae < 1:
            raise WriteSAEError(
                f"d_k, d_v, d_sae and rank must be positive, got d_k={self.d_k}, d_v={self.d_v}, "
                f"d_sae={d_sae}, rank={self.rank}"
            )
        self.d_in = self.d_k * self.d_v
        if self.d_in * d_sae * self.rank >= 2**62:
            raise WriteSAEError(
                f"no dictionary has d_sae={d_sae} atoms of rank {self.rank} for "
                f"{self.d_k} x {self.d_v} matrices"
            )
        if not 1 <= self.k <= d_sae:
            raise WriteSAEError(
                f"k={self.k} features cannot be active out of d_sae={d_sae}: give 1 <= k <= d_sae"
            )
        for name, allowed in (
            ("encoder", ("bilinear", "tied", "dense")),
            ("decoder", ("factored", "dense", "codes")),
            ("activation", activations),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise WriteSAEError(f"{name}={str(value)[:40]!r} is unknown: choose {', '.join(allowed)}")
        if self.decoder == "codes":
            self._check_codes()
        if self.normalize_activations == "covariance_whitening":
            raise WriteSAEError(
                "covariance_whitening would mix matrix entries, and whitened writes are no longer rank 1: "
                "use normalize_activations='none' or 'expected_average_only_in'"
            )
        if self.reshape_activations != "none":
            raise WriteSAEError(
                "a WriteSAE takes flattened matrices as they are: leave reshape_activations 'none'"
            )
        if self.apply_b_dec_to_input:
            raise WriteSAEError(
                "a WriteSAE adds its decoder bias at decode and does not subtract it before encoding: "
                "leave apply_b_dec_to_input False"
            )

    def _share_out(self: Any) -> None:
        """Derive the sizes of codes: a side's from the whole's where they are not given, or the reverse."""
        if self.decoder != "codes":
            given = [f"{name}={getattr(self, name)}" for name in _OF_CODES if getattr(self, name)]
            if given:
                raise WriteSAEError(
                    f"{' and '.join(given)} are sizes of codes, and decoder={str(self.decoder)[:40]!r} has "
                    "atoms: give d_sae and k, or decoder='codes'"
                )
            return
        for whole, key, value in (("d_sae", "n_key", "n_value"), ("k", "k_key", "k_value")):
            sides = [getattr(self, key), getattr(self, value)]
            if not any(sides):
                half = getattr(self, whole) // 2
                sides = [max(1, half), max(1, getattr(self, whole) - half)]
            if min(sides) < 1:
                raise WriteSAEError(
                    f"codes have two sides, got {key}={sides[0]} and {value}={sides[1]}: give both, of 1 at "
                    f"least, or neither, and {whole}"
                )
            setattr(self, key, sides[0])
            setattr(self, value, sides[1])
            setattr(self, whole, sum(sides))

    def _check_codes(self: Any) -> None:
        """Refuse what a dictionary of codes cannot be."""
        for side in ("key", "value"):
            k, n = getattr(self, f"k_{side}"), getattr(self, f"n_{side}")
            if k > n:
                raise WriteSAEError(f"k_{side}={k} codes cannot be active out of n_{side}={n}")
        cannot = {
            "encoder='dense'": (self.encoder == "dense", "choose bilinear or tied"),
            f"rank={self.rank}": (self.rank != 1, "a stand-in of codes is of rank 1: leave rank 1"),
            "activation='gated'": (self.activation == "gated", "choose topk, batchtopk or jumprelu"),
            f"normalize_activations={str(self.normalize_activations)!r}": (
                self.normalize_activations in ("layer_norm", "constant_norm_rescale"),
                "codes are chosen on keys and values of norm 1 as it is: use 'none' or "
                "'expected_average_only_in'",
            ),
            "rescale_acts_by_decoder_norm=False": (
                not self.rescale_acts_by_decoder_norm,
                "the norm of a code is the unit of its coefficient: leave it True",
            ),
            "decoder_bias=True": (
                getattr(self, "decoder_bias", False),
                "a sum with a bias is no longer of rank 1: leave it False",
            ),
        }
        for what, (found, advice) in cannot.items():
            if found:
                raise WriteSAEError(f"decoder='codes' has no {what}: {advice}")


@no_type_check
@dataclass(kw_only=True)
class WriteSAEConfig(MatrixSAEConfig, SAEConfig):
    """A WriteSAE for inference.

    Args:
        activation: topk; batchtopk, which is a threshold once trained; jumprelu; gated; or topk_of_batch, the
            BatchTopK of published checkpoints, which has no threshold: k per row on average over the rows
            encoded at once.
        rescale_acts_by_decoder_norm: True: an atom's norm is only the unit of its coefficient, and atoms are
            selected by the coefficients that they would have at norm 1. False, in published checkpoints: they
            are selected by the coefficients as they are.
        gate_temperature: of gated: the gate is a sigmoid of this width (0.1 in published checkpoints); 0 is a
            step.

    Raises:
        WriteSAEError: k above d_sae, a size below 1, an unknown member of the family, whitening, or a bias
            subtracted from the input.
    """

    activation: Literal["topk", "batchtopk", "jumprelu", "gated", "topk_of_batch"] = "topk"
    rescale_acts_by_decoder_norm: bool = True
    gate_temperature: float = 0.0

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        self._check_family((*ACTIVATIONS, BATCHWISE))
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
class WriteSAETrainingConfig(MatrixSAEConfig, TrainingSAEConfig):
    """A WriteSAE in training. `recommended`, `atoms` and `paper` are three recipes by name.

    Args:
        activation: topk, batchtopk, jumprelu or gated.
        init_from_writes: atoms start as writes of the first batches (of states: their leading singular
            pairs), which keeps most of them alive. Their encoders get the size at which the first
            reconstruction has least squared error. False: atoms and encoders start at random.
        encoder_bias: learn a threshold for each atom. TopK needs none, and the atoms of small writes die: a
            step of the optimiser is large beside their coefficients.
        decoder_bias: learn a matrix that is added at decode. Atoms then learn differences from the mean
            write, and stand in for whole writes less well.
        aux_loss_coefficient: weight of the dead-atom loss: the squared error with which dead atoms
            reconstruct what the live ones miss.
        k_aux: dead atoms in that loss per input: those with the largest scores, out of the 4 * k_aux dead
            atoms that the batch excites most.
        write_alignment_coefficient: of atoms: weight, in units of the batch's mean |X|^2, of 1 - cos(X, A),
            where A is the input's dominant atom.
        read_alignment_coefficient: weight, in the same units, of the stand-in's error as tokens read it:
            e / (1 + e) with e = sum_r |Y^T r - X^T r|^2 / sum_r |X^T r|^2, where Y is the stand-in X^ of
            codes, or c A / s of atoms, c the coefficient of the dominant one and s the dominant_share. The
            reads r are the own token's and those of `later_reads`. The activation store brings them along
            with writes of a `HookedRecurrent`; other inputs train without this term.
        later_reads: how many tokens after a write the later reads are that the store keeps, pulled back to
            the write, and that term adds up; () for the own token's alone.
        dominant_share: of atoms: the share s of a write that its dominant atom should take; the others
            complete the reconstruction. At 0.5 an atom in the write's place beats deletion more often, at 1
            it comes nearer to the native output. With a tied encoder the share is always 1.
        renormalize_every: steps between resets of the atoms' raw factors to norm 1 (0: never). No loss
            depends on these norms, but the relative size of an optimiser's step does.
        resample_every: steps after which dead atoms start anew as the leading singular pairs of badly
            reconstructed inputs, with the optimiser's moments cleared (0: never).
        jumprelu_init_threshold: first threshold of an atom whose encoder has norm 1, in units of the inputs'
            root mean square norm.
        jumprelu_bandwidth: width of the straight-through estimate, in units of the threshold.
        l0_coefficient: weight of JumpReLU's (L0 / k - 1)^2, in units of mean |X|^2.
        l0_warm_up_steps: steps in which that weight rises from 0.
        l1_coefficient: weight of Gated's sum of gate activations, in units of the inputs' root mean square
            norm.
        l1_warm_up_steps: steps in which that weight rises from 0.

    Raises:
        WriteSAEError: as for `WriteSAEConfig`; a negative or undefined number; losses that compare the raw
            input with coefficients of an input normalised at run time; float16, in which Adam divides zero by
            zero; or a ``decoder_init_norm`` of SAELens, for atoms start with norm 1.
    """

    activation: Literal["topk", "batchtopk", "jumprelu", "gated"] = "topk"
    # SAELens copies every field of the inference config from here.
    rescale_acts_by_decoder_norm: ClassVar[bool] = True
    gate_temperature: ClassVar[float] = 0.0

    init_from_writes: bool = True
    encoder_bias: bool = False
    decoder_bias: bool = False
    aux_loss_coefficient: float = 1e-2
    k_aux: int = 256
    write_alignment_coefficient: float = 2.0
    read_alignment_coefficient: float = 6.0
    later_reads: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
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
        """The recipe of the documentation's figures: 1,024 key and 1,024 value codes, 16 of each active.

        Unused codes are left alone: in the sweep that chose the recipe, starting them anew lowered what is
        recovered or left it as it was (docs/measured.md).

        The runner's part of it: ``LanguageModelSAERunnerConfig(sae=..., **RECOMMENDED_SCHEDULE)``.

        Args:
            **options: d_k and d_v, and any other field that should differ. Another d_sae, or k, is halved
                between the sides.
        """
        recipe: dict[str, Any] = {
            "decoder": "codes",
            "d_sae": 2048,
            "k": 32,
            "encoder_bias": True,
            "aux_loss_coefficient": 0.0,
            "read_alignment_coefficient": 4.0,
            "resample_every": 0,
        }
        return cls(**(recipe | options))

    @classmethod
    def atoms(cls, **options: Any) -> WriteSAETrainingConfig:
        """2,048 atoms, 4 active per input, one of which is to stand in for the write; the own read alone.

        The recommended recipe before there were codes. The runner's part of it:
        ``LanguageModelSAERunnerConfig(sae=..., **RECOMMENDED_SCHEDULE | {"train_batch_size_tokens": 512})``.

        Args:
            **options: d_k and d_v, and any other field that should differ.
        """
        recipe: dict[str, Any] = {"d_sae": 2048, "k": 4, "later_reads": ()}
        return cls(**(recipe | options))

    @classmethod
    def paper(cls, **options: Any) -> WriteSAETrainingConfig:
        """The paper's recipe (section "Training"): squared error and dead-atom loss on k = 32 of 2,048 atoms.

        The runner's part of it: ``LanguageModelSAERunnerConfig(sae=..., **PAPER_SCHEDULE)``.

        Args:
            **options: d_k and d_v, and any other field that should differ.
        """
        recipe: dict[str, Any] = {
            "d_sae": 2048,
            "k": 32,
            "init_from_writes": False,
            "encoder_bias": True,
            "decoder_bias": True,
            "write_alignment_coefficient": 0.0,
            "read_alignment_coefficient": 0.0,
            "later_reads": (),
            "renormalize_every": 100,
            "resample_every": 250,
        }
        return cls(**(recipe | options))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """As in SAELens; also from the configuration of an SAE saved for inference, to train it on.

        Raises:
            WriteSAEError: as the constructor; or the SAE is of a form that has no training: published
                checkpoints select their atoms by other scores.
        """
        untrainable = [
            f"{name}={config_dict[name]!r:.40}"
            for name, trained in (("rescale_acts_by_decoder_norm", True), ("gate_temperature", 0))
            if config_dict.get(name, trained) != trained
        ]
        untrainable += [f"activation={BATCHWISE!r}"] * (config_dict.get("activation") == BATCHWISE)
        if untrainable:
            raise WriteSAEError(
                f"an SAE with {' and '.join(untrainable)}, such as a published checkpoint, cannot be "
                "trained on: a training WriteSAE selects its atoms in another way; train a new one"
            )
        return super().from_dict(config_dict)

    def __post_init__(self) -> None:
        self._check_family(ACTIVATIONS)
        self._check_numbers()
        if self.decoder_init_norm not in (None, 0.1):  # SAELens's default, which its command line passes on
            raise WriteSAEError(
                f"decoder_init_norm={self.decoder_init_norm!r:.40} would have no effect: the atoms "
                "start with norm 1, and no loss depends on it; leave it out"
            )
        if str(self.dtype).removeprefix("torch.") == "float16":
            raise WriteSAEError(
                "in float16 Adam divides zero by zero: train in float32 or bfloat16, and convert the result"
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

    def _check_numbers(self) -> None:
        """Refuse weights, counts, sizes and switches of a wrong kind, and negative ones."""
        counts = ("k_aux", "renormalize_every", "resample_every", "l0_warm_up_steps", "l1_warm_up_steps")
        weights = (
            *("aux_loss_coefficient", "write_alignment_coefficient", "read_alignment_coefficient"),
            *("l0_coefficient", "l1_coefficient"),
        )
        sizes = ("jumprelu_init_threshold", "dominant_share", "jumprelu_bandwidth")
        for name in (*sizes, *counts, *weights):
            value, kind = getattr(self, name), int if name in counts else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or value == float("inf"):
                what = "whole" if kind is int else "finite"
                raise WriteSAEError(f"{name} must be a {what} number, got {value!r:.40}")
        for name in ("init_from_writes", "encoder_bias", "decoder_bias"):
            if type(getattr(self, name)) is not bool:
                raise WriteSAEError(f"{name} must be True or False, got {getattr(self, name)!r:.40}")
        given: Any = self.later_reads  # a list, from JSON
        self.later_reads = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        wrong = [h for h in self.later_reads if type(h) is not int or h < 1]
        if wrong or len(set(self.later_reads)) < len(self.later_reads):
            raise WriteSAEError(
                f"later_reads={str(self.later_reads)[:60]} must be different whole numbers of tokens, each 1 "
                "or more: give () for the own token's read alone"
            )
        least = dict.fromkeys(sizes, 1e-9) | dict.fromkeys((*counts, *weights), 0)
        too_low = [name for name, value in least.items() if not getattr(self, name) >= value]  # NaN too
        if too_low:
            raise WriteSAEError(
                f"{' and '.join(too_low)} must not be negative (dominant_share and JumpReLU's threshold and "
                "bandwidth: nor zero)"
            )


# The paper's part of SAELens's runner config (paper, section "Training").
PAPER_SCHEDULE: dict[str, Any] = {
    "lr": 3e-4,
    "lr_end": 3e-5,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 50,
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}

# The recommended recipe's part of SAELens's runner config, for any length. It has no warm-up: no
# number of steps fits every length, and SAELens's cosine annealing divides by zero in a run as long as its
# warm-up.
RECOMMENDED_SCHEDULE: dict[str, Any] = {
    "lr": 4e-3,
    "lr_end": 4e-5,
    "lr_scheduler_name": "cosineannealing",
    "train_batch_size_tokens": 256,
    "dead_feature_window": 100,
}

# SAELens's command line reads the annotations of configs, which the mark of no_type_check would hide.
for _config in (MatrixSAEConfig, WriteSAEConfig, WriteSAETrainingConfig):
    delattr(_config, "__no_type_check__")
