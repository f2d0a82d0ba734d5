"""The configuration of an RWKV-7 model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class RWKV7Config(PreTrainedConfig):
    """Configuration of an RWKV-7 model; fields and defaults are those of flash-linear-attention.

    Args:
        head_dim: d_k of a head; the model has ``hidden_size / head_dim`` heads.
        value_dim: the sum of d_v over the heads: one number, or a list with the same number for every layer
            (None: ``hidden_size``).
        norm_first: whether the embedding passes through a LayerNorm (BlinkDL's ln0) before the first block.
        fuse_norm: how the removal key x is normalised: x / sqrt(|x|^2 + 1e-6) if true, as in
            flash-linear-attention's kernel, else x / max(|x|, 1e-12), as in BlinkDL's code.
        group_norm_eps: epsilon of the norm over each head's outputs (None: ``head_dim * norm_eps``; BlinkDL's
            models have 64e-5).
        **kwargs: as for ``PreTrainedConfig``. Fields that only choose a kernel are stored and have no effect.

    Raises:
        ValueError: the sizes do not divide, or the model is a hybrid with softmax attention (``attn``).
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (the base class declares it so)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        hidden_ratio: int | float | None = 4,
        intermediate_size: int | None = None,
        value_dim: int | list[int] | None = None,
        decay_low_rank_dim: int = 64,
        gate_low_rank_dim: int = 128,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 16,
        hidden_act: str = "sqrelu",
        max_position_embeddings: int = 2048,
        norm_first: bool = True,
        norm_bias: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        group_norm_eps: float | None = None,
        attn: Any = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if attn is not None:
            raise ValueError(
                "RWKV-7 hybrids with softmax attention layers (config field attn) are not supported"
            )
        head_dim = head_dim or hidden_size // (num_heads or 1)
        if hidden_size % head_dim or (num_heads or hidden_size // head_dim) * head_dim != hidden_size:
            raise ValueError(
                f"heads do not fill hidden_size {hidden_size}: num_heads {num_heads}, head_dim {head_dim}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim
        self.num_heads = hidden_size // head_dim
        self.hidden_ratio = hidden_ratio
        if intermediate_size is None:  # rounded up to a multiple of 32
            intermediate_size = -int(-hidden_size * (hidden_ratio or 4) // 32) * 32
        self.intermediate_size = intermediate_size
        widths = set(value_dim) if isinstance(value_dim, list) else {value_dim or hidden_size}
        # Every layer mixes the first layer's values into its own, so all layers need the same width.
        if len(widths) != 1 or any(width % self.num_heads for width in widths):
            raise ValueError(
                f"value_dim must be one multiple of {self.num_heads} heads for all layers: {value_dim}"
            )
        (self.value_dim,) = widths
        self.decay_low_rank_dim = decay_low_rank_dim
        self.gate_low_rank_dim = gate_low_rank_dim
        self.a_low_rank_dim = a_low_rank_dim
        self.v_low_rank_dim = v_low_rank_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.norm_first = norm_first
        self.norm_bias = norm_bias
        self.norm_eps = norm_eps
        self.fuse_norm = fuse_norm
        self.group_norm_eps = head_dim * norm_eps if group_norm_eps is None else group_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs |= {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**kwargs)
