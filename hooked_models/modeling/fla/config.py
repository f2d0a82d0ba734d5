"""The configurations of flash-linear-attention's DeltaNet, GLA and Gated DeltaNet."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

FEATURE_MAPS = ("relu", "sigmoid", "logsigmoid", "silu", "swish", "sqrelu", "gelu")
"""Activations of GLA's queries and keys, by flash-linear-attention's names."""
_ATTENTION_FIELDS = {"layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}


class FLAConfig(PreTrainedConfig):
    """Fields that the three have in common; names and defaults are flash-linear-attention's.

    Args:
        hidden_ratio: width of the MLP where ``intermediate_size`` is None: two thirds of ``hidden_ratio *
            hidden_size``, rounded up to a multiple of 256.
        attn: of a hybrid, an object or a list of them: ``layers`` with softmax attention in the recurrence's
            place, their ``num_heads``, ``num_kv_heads``, ``qkv_bias`` and ``rope_theta``.
        **kwargs: as for ``PreTrainedConfig``. Fields that choose a kernel (``attn_mode``, ``fuse_...``) or
            concern flash-linear-attention's own training loop (``use_l2warp``) are stored and have no effect.

    Raises:
        ValueError: sizes do not divide, or a field asks for something that is not supported.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (the base class declares it so)
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    fixed: ClassVar[dict[str, Any]] = {"attnres_block_size": None, "hidden_act": "swish"}
    """Fields with one possible value: another is not implemented here, or has no effect in the original."""

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_heads: int = 16,
        hidden_ratio: int | float | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        max_position_embeddings: int = 2048,
        norm_eps: float = 1e-6,
        use_short_conv: bool = True,
        conv_size: int = 4,
        fuse_norm: bool = True,
        attn: Any = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.hidden_ratio = hidden_ratio
        if intermediate_size is None:
            intermediate_size = -(-int(hidden_size * (hidden_ratio or 4) * 2 / 3) // 256) * 256
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.norm_eps = norm_eps
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.fuse_norm = fuse_norm
        self.attn = _checked_attention(attn, hidden_size, num_hidden_layers)
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        given = kwargs | {"hidden_act": hidden_act}
        for field, value in self.fixed.items():
            if given.get(field, value) != value:
                raise ValueError(
                    f"{self.model_type} models with {field} = {given[field]!r} are not supported: it must be "
                    f"{value!r}"
                )
        if use_short_conv and conv_size < 1:
            raise ValueError(f"conv_size must be 1 at least, got {conv_size}")
        self.head_sizes()  # raises where they do not divide
        kwargs |= {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**kwargs)

    def head_sizes(self) -> tuple[int, int]:
        """d_k and d_v of a head.

        Raises:
            ValueError: the heads do not fill the layer.
        """
        config: Any = self
        wide = (self.hidden_size * config.expand_k, self.hidden_size * config.expand_v)
        d_k, d_v = (round(x) // max(self.num_heads, 1) for x in wide)
        if min(d_k, d_v) < 1 or any(
            abs(self.num_heads * size - x) > 1e-6 * x for size, x in zip((d_k, d_v), wide)
        ):
            raise ValueError(
                f"{self.num_heads} heads do not divide the keys' {wide[0]:g} and the values' {wide[1]:g} "
                "channels, hidden_size times expand_k and expand_v"
            )
        return d_k, d_v

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, in the words of transformers."""
        return ["linear_attention" if self.attention(i) is None else "full_attention" for i in self._layers]

    @property
    def _layers(self) -> range:
        return range(self.num_hidden_layers)

    def attention(self, layer: int) -> dict[str, Any] | None:
        """The softmax attention of a layer (None: it is recurrent)."""
        specs = [] if self.attn is None else self.attn if isinstance(self.attn, list) else [self.attn]
        return next((spec for spec in specs if layer in spec["layers"]), None)


def _checked_attention(attn: Any, hidden_size: int, n_layers: int) -> Any:
    """The field ``attn``, as it is.

    Raises:
        ValueError: it is no object or list of objects, a field is missing, unknown, of another type or out
            of range, or the attention has a window.
    """
    if attn is None:
        return None
    specs = attn if isinstance(attn, list) else [attn]
    seen: set[int] = set()
    for spec in specs:
        if not isinstance(spec, dict) or not {"layers", "num_heads"} <= spec.keys() <= _ATTENTION_FIELDS:
            raise ValueError(
                "attn needs layers and num_heads, and may have num_kv_heads, qkv_bias, rope_theta and "
                f"window_size: got {spec!r:.80}"
            )
        if spec.get("window_size") is not None:
            raise ValueError(
                f"softmax attention with a window (attn.window_size = {spec['window_size']!r:.20}) is not "
                "supported"
            )
        layers, heads, key_heads = spec["layers"], spec["num_heads"], spec.get("num_kv_heads")
        key_heads, bias, theta = (
            heads if key_heads is None else key_heads,
            spec.get("qkv_bias", False),
            spec.get("rope_theta", 1e4),
        )
        is_whole = isinstance(layers, list) and all(type(x) is int for x in [*layers, heads, key_heads])
        if not is_whole or type(bias) is not bool or type(theta) not in (int, float) or not 0 < theta < 1e30:
            raise ValueError(f"attn has a field of a wrong type: {spec!r:.120}")
        if not all(0 <= layer < n_layers and layer not in seen for layer in layers):
            raise ValueError(f"attn names layers twice, or outside 0 .. {n_layers - 1}: {layers!r:.80}")
        seen.update(layers)
        if min(heads, key_heads) < 1 or heads % key_heads or hidden_size % (2 * heads):
            raise ValueError(
                f"attn's {heads} heads over {key_heads} key heads do not divide hidden_size {hidden_size} "
                "into heads of even size"
            )
    return attn


class DeltaNetConfig(FLAConfig):
    """Configuration of a DeltaNet; see `FLAConfig`.

    Args:
        expand_k, expand_v: channels of all keys and of all values, as multiples of ``hidden_size``.
        use_beta: whether a write has a size beta, a sigmoid (else 1), doubled by ``allow_neg_eigval``.
        use_gate: whether the heads' outputs are gated after their norm.
        qk_activation: of queries and keys: silu, relu, elu (plus 1) or identity.
        qk_norm: whether queries and keys are divided by their length (``l2``) or by the sum of their entries'
            sizes (``sum``).
        **kwargs: as for `FLAConfig`.
    """

    model_type = "delta_net"
    fixed: ClassVar[dict[str, Any]] = FLAConfig.fixed | {"use_output_norm": True, "conv_bias": False}

    def __init__(
        self,
        expand_k: int | float = 1.0,
        expand_v: int | float = 1.0,
        use_beta: bool = True,
        use_gate: bool = False,
        allow_neg_eigval: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        **kwargs: Any,
    ) -> None:
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.use_beta = use_beta
        self.use_gate = use_gate
        self.allow_neg_eigval = allow_neg_eigval
        self.qk_activation = qk_activation
        self.qk_norm = qk_norm
        _check_choice("qk_activation", qk_activation, ("silu", "relu", "elu", "identity"))
        _check_choice("qk_norm", qk_norm, ("l2", "sum"))
        super().__init__(**kwargs)


class GLAConfig(FLAConfig):
    """Configuration of a gated linear attention (GLA) model; see `FLAConfig`.

    Args:
        expand_k, expand_v: channels of all keys and of all values, as multiples of ``hidden_size``.
        num_kv_heads: heads of keys, values and decays, each shared by several heads (None: ``num_heads``).
        feature_map: an activation of queries and keys, by a name in `FEATURE_MAPS` (None: none).
        use_output_gate: whether the heads' outputs are gated after their norm.
        clamp_min: the lowest log decay of a step (None: no bound).
        elementwise_affine: whether the norm of the heads' outputs has weights.
        **kwargs: as for `FLAConfig`.
    """

    model_type = "gla"
    fixed: ClassVar[dict[str, Any]] = FLAConfig.fixed | {"use_gk": True, "use_gv": False, "conv_bias": False}
    fixed |= {"gate_low_rank_dim": 16, "gate_logit_normalizer": 16}

    def __init__(
        self,
        expand_k: int | float = 0.5,
        expand_v: int | float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        use_output_gate: bool = True,
        clamp_min: float | None = None,
        elementwise_affine: bool = True,
        **kwargs: Any,
    ) -> None:
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.feature_map = feature_map
        self.use_output_gate = use_output_gate
        self.clamp_min = clamp_min
        self.elementwise_affine = elementwise_affine
        if feature_map is not None:
            _check_choice("feature_map", feature_map, FEATURE_MAPS)
        if not 0 < self.num_kv_heads <= num_heads or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {num_heads}")
        super().__init__(num_heads=num_heads, use_short_conv=use_short_conv, **kwargs)


class GatedDeltaNetConfig(FLAConfig):
    """Configuration of a Gated DeltaNet; see `FLAConfig`.

    Args:
        head_dim: d_k.
        expand_v: d_v as a multiple of ``head_dim``.
        num_v_heads: heads of values, several of which share a head of queries and keys (None: ``num_heads``).
        use_gate: whether the heads' outputs are gated after their norm.
        allow_neg_eigval: whether the size of a write, a sigmoid, is doubled.
        output_gate_activation: swish (silu is the same) or sigmoid.
        **kwargs: as for `FLAConfig`.
    """

    model_type = "gated_deltanet"
    fixed: ClassVar[dict[str, Any]] = FLAConfig.fixed | {"conv_bias": False}

    def __init__(
        self,
        head_dim: int = 256,
        expand_v: int | float = 2.0,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        num_hidden_layers: int = 21,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        output_gate_activation: str = "swish",
        **kwargs: Any,
    ) -> None:
        self.head_dim = head_dim
        self.expand_v = expand_v
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.use_gate = use_gate
        self.allow_neg_eigval = allow_neg_eigval
        self.output_gate_activation = output_gate_activation
        _check_choice("output_gate_activation", output_gate_activation, ("swish", "silu", "sigmoid"))
        if not 0 < num_heads <= self.num_v_heads or self.num_v_heads % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide num_v_heads {self.num_v_heads}")
        super().__init__(num_heads=num_heads, num_hidden_layers=num_hidden_layers, **kwargs)

    def head_sizes(self) -> tuple[int, int]:
        d_v = round(self.head_dim * self.expand_v)
        if min(self.head_dim, d_v) < 1 or abs(d_v - self.head_dim * self.expand_v) > 1e-5 * d_v:
            raise ValueError(
                f"head_dim {self.head_dim} times expand_v {self.expand_v} is no whole number from 1"
            )
        return self.head_dim, d_v


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r:.40}")
