"""Gated linear attention (GLA) of flash-linear-attention's folders with hook points on its cache writes."""

from __future__ import annotations

from hooked_models.architectures.delta_net import HookedDeltaNet
from hooked_models.mixers import HookedMixer


class HookedGLA(HookedDeltaNet):
    __doc__ = f"""Wraps the GLA layer of `hooked_models.modeling.fla`.

    Per head, with a decay alpha of each key channel::

        S_t = diag(alpha_t) S_{{t-1}} + k_t v_t^T        o_t = d_k^-1/2 S_t^T q_t

    So the native write has key k and value v, which several heads share where ``num_kv_heads`` says so, and
    the transition only decays.

    {HookedMixer.__doc__}"""

    architecture = "gla"
    erases = False
    decay_per_channel = True
