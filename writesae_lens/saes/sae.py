"""WriteSAE: a sparse autoencoder whose atoms are rank-1 matrices shaped like a model's cache writes.

For a matrix X of shape [d_k, d_v] (arriving flattened), with encoder factors (P_i, Q_i) and unit-norm
decoder atoms A_i = v_i w_i^T::

    z_i = P_i^T X Q_i + b_i        a = ReLU(TopK(z))        X^ = sum_i a_i A_i + B

(paper, section "The dictionary"). The family around it varies the encoder (bilinear as above, tied to the
atoms, or a dense linear map), the decoder (atoms of rank 1, of rank r, or dense) and the activation function
(`writesae_lens.saes.activations`).

Native writes are of rank 1 and are encoded from their factors; training builds neither X nor its
reconstruction. Inputs of higher rank (states) are encoded as built matrices and still decoded sparsely.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAE
from sae_lens.util import dtype_to_str
from torch import Tensor, nn

from writesae_lens.errors import WriteSAEError
from writesae_lens.saes import activations
from writesae_lens.saes.atoms import Atoms
from writesae_lens.saes.codes import Codes
from writesae_lens.saes.config import PLAIN_INPUTS, WriteSAEConfig
from writesae_lens.saes.packed import PackedWrites
from writesae_lens.saes.rank1 import (
    Factors,
    Matrices,
    built,
    factor_rank1,
)
from writesae_lens.saes.run_time_norm import RunTimeNorm
from writesae_lens.saes.views import LOST, read_only
from writesae_lens.saes.whole import save_whole

# W&B's 128 characters, less what SAELens appends ("_log_feature_sparsity").
_NAME_LENGTH = 100
# Entries of a state dict that only training needs.
_OF_TRAINING = {"progress"}


class MatrixSAE(SAE[Any]):
    """The part that `WriteSAE` and `WriteTrainingSAE` share: parameters, encode, decode and matrix views."""

    b_enc: nn.Parameter
    enc_gain: Tensor  # of a tied encoder
    activation_fn: activations.Activation

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("W_dec", "W_enc"):
            raise WriteSAEError(LOST)
        super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in SAELens; where torch cannot (no such device), the SAE stays as it is, its config too."""
        before = self.device, self.dtype, self.cfg.device, self.cfg.dtype
        try:
            return super().to(*args, **kwargs)
        except BaseException:
            self.device, self.dtype, self.cfg.device, self.cfg.dtype = before
            raise

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What moves the tensors (``half()``, ``cpu()``, a model's ``to``) moves the SAE's record of them."""
        super()._apply(*args, **kwargs)
        if self.b_dec.dtype != self.dtype:
            self.dtype, self.cfg.dtype = self.b_dec.dtype, dtype_to_str(self.b_dec.dtype)
        if self.b_dec.device != torch.empty(0, device=self.device).device:  # "cuda" is "cuda:0" or another
            self.device, self.cfg.device = self.b_dec.device, str(self.b_dec.device)
        return self

    def _setup_activation_normalization(self) -> None:
        norm = RunTimeNorm(self.cfg.normalize_activations)
        self.run_time_activation_norm_fn_in, self.run_time_activation_norm_fn_out = norm.inputs, norm.outputs

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        super().turn_off_forward_pass_hook_z_reshaping()
        self.reshape_fn_in, self.reshape_fn_out = _as_it_is, _as_it_is  # functions that can be pickled

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Not for matrices.

        Raises:
            WriteSAEError: always: a write has no head axis that could be flattened.
        """
        raise WriteSAEError(
            "a WriteSAE takes flattened matrices as they are: hook_z reshaping is for SAEs on attention heads"
        )

    @property
    def is_codes(self) -> bool:
        """Whether the features are codes, of keys and of values, rather than atoms."""
        return self.cfg.decoder == "codes"

    @property
    def key_codes(self) -> range:
        """The features that are key codes, none where the features are atoms."""
        return range(self.cfg.n_key)

    @property
    def value_codes(self) -> range:
        """The features that are value codes, none where the features are atoms."""
        return range(self.cfg.n_key, self.cfg.n_key + self.cfg.n_value)

    @property
    def dictionary(self) -> Atoms | Codes:
        """What depends on the features being atoms or codes."""
        return Codes(self) if self.is_codes else Atoms(self)

    def initialize_weights(self) -> None:
        self.dictionary.initialize()
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros)
        self.b_dec = nn.Parameter(zeros.new_zeros(self.cfg.d_in))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return activations.for_inference(
            self.cfg, torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    def decoder_factors(
        self,
    ) -> tuple[Float[Tensor, "d_sae rank d_k"], Float[Tensor, "d_sae rank d_v"]]:
        """Key and value factors of the atoms sum_r key_r value_r^T; after training atoms have norm 1.

        Of codes: each code with the other side at the cell's mean, as in `W_dec`.

        Raises:
            WriteSAEError: the decoder is dense.
        """
        atoms = self.atoms()
        if not isinstance(atoms, Factors):
            raise WriteSAEError("the atoms of a dense decoder have no factors: use W_dec")
        return atoms.key, atoms.value

    def atoms(self) -> Matrices:
        """The decoder atoms, as `decode` adds them up; of codes what `W_dec` is."""
        return self.dictionary.matrices()

    @torch.no_grad()
    def get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Norms of the atoms, at least 1e-8."""
        return self.dictionary.norms()

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # type: ignore[override]
        """The atoms as flat rows. Built anew at each access: d_sae * d_k * d_v numbers, for reading only.

        A code is one side of a write: its row is the write of it with the other side at the cell's mean,
        u_i mean_value^T or mean_key w_j^T.
        """
        return read_only(built(self.atoms()).flatten(-2))

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """The encoder as a flat matrix. Built anew at each access, for reading only."""
        dictionary = self.dictionary
        return read_only(built(dictionary.encoder()).flatten(-2).T / dictionary.units())

    @property
    def bias_matrix(self) -> Float[Tensor, "d_k d_v"]:
        """The decoder bias in the shape of a write."""
        return self.b_dec.view(self.cfg.d_k, self.cfg.d_v)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As in SAELens; both files take their places together."""
        return save_whole(super().save_model, path)

    def get_name(self) -> str:
        """SAELens's name for W&B artifacts, within W&B's limits: letters, digits, ``-_.``, 128 characters."""
        name = re.sub(r"[^\w.-]+", "__", super().get_name(), flags=re.ASCII)
        if len(name) <= _NAME_LENGTH:
            return name
        return f"{hashlib.sha256(name.encode()).hexdigest()[:8]}_{name[9 - _NAME_LENGTH :]}"

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Coefficients of the atoms.

        Args:
            x: flattened matrices. Rank-1 rows that need no gradient take the factored path.
        """
        return self._encode(self.process_sae_in(x))[0]

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients and pre-activations of processed inputs."""
        rows = self._rows(x.reshape(-1, x.shape[-1]))
        shape = (*x.shape[:-1], self.cfg.d_sae)

        def hook(hidden: Tensor) -> Tensor:
            shaped = hidden.view(shape)
            seen = self.hook_sae_acts_pre(shaped)
            return hidden if seen is shaped else seen.view(hidden.shape)

        acts, hidden = (a.view(shape) for a in self.dictionary.encode(rows, hook))
        return self.hook_sae_acts_post(acts), hidden

    def encode_factors(
        self, key: Float[Tensor, "row d_k"], value: Float[Tensor, "row d_v"]
    ) -> Float[Tensor, "row d_sae"]:
        """`encode` of key value^T, without hooks and without building it.

        Raises:
            WriteSAEError: sides other than the SAE's; or it normalises its inputs at run time, which needs
                the matrices.
        """
        self._check_plain("encode")
        found, expected = (key.shape, value.shape), ((len(key), self.cfg.d_k), (len(key), self.cfg.d_v))
        if found != expected:
            raise WriteSAEError(
                f"expected keys and values of {self.cfg.d_k} x {self.cfg.d_v} writes, as many of the one as "
                f"of the other, got shapes {tuple(key.shape)} and {tuple(value.shape)}"
            )
        rows = Factors(key[:, None].to(self.dtype), value[:, None].to(self.dtype))
        return self.dictionary.encode(rows, lambda hidden: hidden)[0]

    def _check_width(self, x: Tensor) -> None:
        width = self.cfg.d_k * self.cfg.d_v
        if not isinstance(x, Tensor) or x.shape[-1:] != (width,) or x.is_complex():
            found = _named(x)
            raise WriteSAEError(
                f"expected a tensor, flat {self.cfg.d_k} x {self.cfg.d_v} matrices, last axis {width}, got "
                f"{found}: is this the SAE's own cell?"
            )

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        self._check_width(sae_in)
        # The base class's method also subtracts a bias that a WriteSAE does not have, at the cost of a copy.
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def _rows(self, x: Float[Tensor, "row d_in"]) -> Matrices:
        """Flattened matrices as factors where they are rank 1 and need no gradient, else as they are."""
        sides = (self.cfg.d_k, self.cfg.d_v)
        packed = [block.sides for block in x.blocks] if isinstance(x, PackedWrites) else []
        if isinstance(x, PackedWrites) and packed == [sides]:
            rows = x.blocks[0].factors
        elif len(packed) == 1:
            raise WriteSAEError(
                f"this SAE is for {sides[0]} x {sides[1]} matrices, these writes are {packed[0][0]} x "
                f"{packed[0][1]}"
            )
        else:
            rows = None if x.requires_grad else factor_rank1(x, self.cfg.d_k, self.cfg.d_v)
        if rows is None:
            return x.unflatten(-1, sides).to(self.dtype)
        return Factors(*(f.to(self.dtype) for f in rows))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction sum_i a_i A_i + B, flattened.

        Raises:
            WriteSAEError: coefficients of another number of atoms; or none were encoded before, where inputs
                are normalised at run time.
        """
        if not isinstance(feature_acts, Tensor) or feature_acts.shape[-1:] != (self.cfg.d_sae,):
            raise WriteSAEError(
                f"expected coefficients of {self.cfg.d_sae} atoms, got {_named(feature_acts)}: are they this "
                "SAE's own?"
            )
        feature_acts = feature_acts.to(self.dtype)
        flat = feature_acts.reshape(-1, feature_acts.shape[-1])
        out = self.dictionary.rebuild(flat)
        out = self.hook_sae_recons((out + self.b_dec).view(*feature_acts.shape[:-1], self.cfg.d_in))
        out = self.run_time_activation_norm_fn_out(out)
        return self.reshape_fn_out(out, self.d_head)

    def stand_in_of(self, acts: Float[Tensor, "*batch d_sae"]) -> Factors:
        """The rank-1 matrix that coefficients put in a write's place: ``[..., 1, d_k]``, ``[..., 1, d_v]``.

        Of codes the sum of the key codes times the sum of the value codes, which is what `decode` builds. Of
        atoms the largest coefficient times its atom (of higher rank or dense: the atom's leading singular
        pair). Zero where nothing is active.
        """
        factors = self.dictionary.stand_in(acts.reshape(-1, acts.shape[-1]).to(self.dtype))
        key, value = (f.view(*acts.shape[:-1], *f.shape[-2:]) for f in factors)
        return Factors(key, value)

    def stand_in(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_k"], Float[Tensor, "*batch d_v"]]:
        """Key and value of the rank-1 matrix that takes each input's place (`stand_in_of`).

        Args:
            x: flattened matrices.

        Raises:
            WriteSAEError: the SAE normalises its inputs at run time, so that coefficients have no units.
        """
        self._check_plain("encode, and decode")
        key, value = self.stand_in_of(self.encode(x))
        return key.squeeze(-2), value.squeeze(-2)

    def _check_plain(self, instead: str) -> None:
        if self.cfg.normalize_activations not in PLAIN_INPUTS:
            raise WriteSAEError(
                f"normalize_activations={self.cfg.normalize_activations!r} needs whole matrices: "
                f"use {instead}"
            )

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Refuse weights that are not those of the configuration, in one line.

        Raises:
            WriteSAEError: tensors are missing, misshapen, unexpected or not finite.
        """
        super().process_state_dict_for_loading(state_dict)
        if self.cfg.encoder == "tied" and "b_enc" in state_dict:
            # Published checkpoints, and SAEs that version 0.1.0 saved, have no gain.
            state_dict.setdefault("enc_gain", torch.ones_like(state_dict["b_enc"][:1]))
        shapes = ({n: list(x.shape) for n, x in d.items()} for d in (self.state_dict(), state_dict))
        expected, found = ({n: s for n, s in d.items() if n not in _OF_TRAINING} for d in shapes)
        wrong = [
            f"{name} of shape {found.get(name, 'missing')} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name) != shape
        ]
        wrong += [f"an unexpected {name[:40]!r}" for name in found if name not in expected]
        wrong += [
            f"{name} with NaN or infinite numbers" for name, x in state_dict.items() if not x.isfinite().all()
        ]
        wrong += [f"{name} of {x.dtype}" for name, x in state_dict.items() if not x.is_floating_point()]
        if wrong:
            raise WriteSAEError(f"the weights are not those of the configuration: {'; '.join(wrong[:4])}")

    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        """Not for matrices.

        Raises:
            NotImplementedError: always: whitening mixes the entries of a matrix, and rank-1 atoms whitened
                back are no longer of rank 1. A training config refuses ``covariance_whitening`` for that.
        """
        raise NotImplementedError(
            "a WriteSAE cannot absorb whitening: it mixes the entries of a matrix, and atoms whitened back "
            "are no longer of rank 1; train with normalize_activations='none' or 'expected_average_only_in'"
        )

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Absorb the factor that inputs were multiplied by in training into the atoms, as SAELens does.

        Raises:
            WriteSAEError: the factor is not a positive finite number.
            NotImplementedError: the SAE normalises its inputs at run time, or (with
                rescale_acts_by_decoder_norm=False) not at all.
        """
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError("an SAE with rescale_acts_by_decoder_norm=False has no scale to absorb")
        if self.cfg.normalize_activations not in PLAIN_INPUTS:
            raise NotImplementedError(
                f"an SAE with normalize_activations={self.cfg.normalize_activations!r} normalises each input "
                "at run time and has no scale to absorb"
            )
        if not 0 < float(scaling_factor) < math.inf:
            raise WriteSAEError(f"the scaling factor must be positive and finite, got {scaling_factor!r}")
        self.dictionary.divide(scaling_factor)
        self.b_dec.div_(scaling_factor)
        self.activation_fn.fold(scaling_factor)
        self.cfg.normalize_activations = "none"

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Float[Tensor, " d_sae"]:
        """Give all atoms norm 1 and return their former norms, by which coefficients and b_enc grow.

        Raises:
            NotImplementedError: with rescale_acts_by_decoder_norm=False, where norms decide what is active.
        """
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "with rescale_acts_by_decoder_norm=False, folding the norms may change which atoms are active"
            )
        norms = self.get_W_dec_norm()
        self.dictionary.normalize()
        self.b_enc.mul_(norms)
        return norms


class WriteSAE(MatrixSAE):
    """A trained WriteSAE: SAELens's ``SAE.load_from_disk`` and ``from_pretrained`` return one."""

    cfg: WriteSAEConfig

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        model_name: str | None = None,
        layer: int | None = None,
        head: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> SAE[Any]:
        """Load a published checkpoint: a ``best.pt`` of any type, or a folder with one. No code in it runs.

        ``cfg.metadata`` records its source and SHA-256 (``provenance``) and how its matrices lay in the file
        (``orientation``).

        Args:
            path: the file or folder.
            model_name: its base model, where the path does not tell (``.../qwen0p8b/L9_H4/best.pt``).
            layer, head: its cell, where neither the file nor the path tells.
            device, dtype: of the SAE, by name.

        Returns:
            a `WriteSAE`; of type ``flat``, SAELens's ``TopKSAE``.

        Raises:
            WriteSAEError: it is no such checkpoint, wants code to be run, contradicts itself, its path or
                a ``manifest.json`` above it, or has tensors that are missing, misshapen or not finite.
        """
        from writesae_lens.published import checkpoints  # here, for `published` is built on `saes`

        source = checkpoints.Source(model_name, layer, head)

        def converted(path: str | Path, device: str | None, cfg_overrides: dict[str, Any] | None) -> Any:
            cfg, weights = checkpoints.load(path, source)
            return cfg | {"device": device} | (cfg_overrides or {}), weights

        return SAE.load_from_disk(path, device=device, dtype=dtype, converter=converted)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in torch; entries that only training needs are left out."""
        weights = {name: value for name, value in state_dict.items() if name not in _OF_TRAINING}
        return super().load_state_dict(weights, *args, **kwargs)


def _named(x: Any) -> str:
    """What was given in place of the expected tensor."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{x.dtype} of shape {tuple(x.shape)}" if x.is_complex() else f"shape {tuple(x.shape)}"


def _as_it_is(x: Tensor, *_: Any) -> Tensor:
    """What SAELens's reshaping does to inputs and reconstructions that are flat already."""
    return x
