"""Independent truths, written from the equations: plain float64 loops that know nothing of the package.

`loop` is S_t = T_t S_{t-1} + W_t, o_t = S_t^T q_t. `GatedDeltaNetLayer` is the whole layer, from the tensors
of a checkpoint's own file, and `standing_in` puts it, with edits, into a stock transformers model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class Run(NamedTuple):
    """What a loop saw, in float64."""

    outputs: Tensor  # [batch, pos, head, d_v]
    states: Tensor  # [batch, pos, head, d_k, d_v], after the token
    writes: Tensor  # [batch, pos, head, d_k, d_v]

    @property
    def final_state(self) -> Tensor:
        return self.states[:, -1]


def loop(
    q: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    initial: Tensor | None = None,
    writes: Tensor | None = None,
    set_states: tuple[Tensor, Tensor] | None = None,
) -> Run:
    """S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + W_t and o_t = S_t^T q_t, matrix by matrix.

    Args:
        q, g, k, v, a, b: [batch, pos, head, ...]; g without a last axis is a scalar decay, a without one
            the multiple of k.
        initial: S_0, None for zero.
        writes: W_t in the place of k_t v_t^T.
        set_states: (states, mask [batch, pos, head]): where the mask is true S_t is that state instead.
    """
    q, g, k, v = (x.double() for x in (q, g, k, v))
    batch, length, heads, d_k = k.shape
    eye = torch.eye(d_k, dtype=torch.float64)
    decay = (g if g.ndim == 4 else g[..., None].expand(-1, -1, -1, d_k)).exp()
    if a is not None:
        a = a.double() if a.ndim == 4 else a.double()[..., None] * k
    if writes is None:
        writes = torch.einsum("bthk,bthv->bthkv", k, v)
    state = torch.zeros(batch, heads, d_k, v.shape[-1], dtype=torch.float64)
    if initial is not None:
        state = initial.double()
    outputs, states = [], []
    for t in range(length):
        transition = decay[:, t, :, :, None] * eye
        if a is not None and b is not None:
            transition = transition + a[:, t, :, :, None] * b.double()[:, t, :, None, :]
        state = transition @ state + writes[:, t]
        if set_states is not None:
            state = torch.where(set_states[1][:, t, :, None, None], set_states[0][:, t], state)
        states.append(state)
        outputs.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return Run(torch.stack(outputs, 1), torch.stack(states, 1), writes)


Change = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class Edits:
    """What to change in a layer; each a function from the native tensor to the edited one.

    An edited decay moves the erase, as alpha is in both; edited keys, values and writes leave it alone.
    ``states`` gives (states, mask) to set, as in `loop`.
    """

    writes: Change | None = None  # [batch, pos, head, d_k, d_v]
    keys: Change | None = None  # [batch, pos, head, d_k]
    values: Change | None = None  # [batch, pos, head, d_v]
    reads: Change | None = None  # [batch, pos, head, d_k]
    decay: Change | None = None  # [batch, pos, head], alpha
    recurrence_out: Change | None = None  # [batch, pos, head, d_v]
    states: tuple[Tensor, Tensor] | None = None


@dataclasses.dataclass
class Trace:
    """What a layer computed, in float64."""

    keys: Tensor
    values: Tensor
    reads: Tensor
    decay: Tensor
    writes: Tensor
    states: Tensor
    recurrence_out: Tensor
    output: Tensor


class GatedDeltaNetLayer:
    """One Gated DeltaNet layer of a checkpoint folder, of Qwen3.5 or Qwen3-Next."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        prefix = f"model.layers.{layer}.linear_attn."
        held = load_file(folder / "model.safetensors")
        self.weights = {
            name.removeprefix(prefix): x.double() for name, x in held.items() if name.startswith(prefix)
        }
        assert self.weights, f"no {prefix}* in {sorted(held)}"

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Unconvolved q, k [b, t, key head, d_k], v, z [b, t, head, d_v] and b, a [b, t, head]."""
        config, w = self.config, self.weights
        key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        d_k, d_v, n = config["linear_key_head_dim"], config["linear_value_head_dim"], heads // key_heads
        shape = hidden.shape[:2]
        if "in_proj_qkv.weight" in w:
            qkv = hidden @ w["in_proj_qkv.weight"].T
            q, k = (qkv[..., i * key_heads * d_k : (i + 1) * key_heads * d_k] for i in (0, 1))
            v = qkv[..., 2 * key_heads * d_k :]
            z, b, a = (hidden @ w[f"in_proj_{x}.weight"].T for x in "zba")
            return (
                q.reshape(*shape, key_heads, d_k),
                k.reshape(*shape, key_heads, d_k),
                v.reshape(*shape, heads, d_v),
                z.reshape(*shape, heads, d_v),
                b,
                a,
            )
        per_key_head = 2 * d_k + 2 * n * d_v
        qkvz, ba = hidden @ w["in_proj_qkvz.weight"].T, hidden @ w["in_proj_ba.weight"].T
        q, k, v, z, b, a = [], [], [], [], [], []
        for head in range(key_heads):
            here = qkvz[..., head * per_key_head : (head + 1) * per_key_head]
            q.append(here[..., :d_k])
            k.append(here[..., d_k : 2 * d_k])
            v.append(here[..., 2 * d_k : 2 * d_k + n * d_v].reshape(*shape, n, d_v))
            z.append(here[..., 2 * d_k + n * d_v :].reshape(*shape, n, d_v))
            gates = ba[..., 2 * n * head : 2 * n * (head + 1)]
            b.append(gates[..., :n])
            a.append(gates[..., n:])
        return (torch.stack(q, 2), torch.stack(k, 2), *(torch.cat(x, 2) for x in (v, z, b, a)))

    def __call__(self, hidden: Tensor, mask: Tensor | None = None, edits: Edits | None = None) -> Trace:
        config, w = self.config, self.weights
        edits = edits or Edits()
        hidden = hidden.double()
        if mask is not None:
            hidden = hidden * mask[..., None]
        batch, length, _ = hidden.shape
        heads = config["linear_num_value_heads"]
        n = heads // config["linear_num_key_heads"]
        d_k = config["linear_key_head_dim"]
        q, k, v, z, b, a = self.project(hidden)

        flat = torch.cat([x.reshape(batch, length, -1) for x in (q, k, v)], -1)
        taps = w["conv1d.weight"][:, 0]  # [channel, tap], the last tap is the token's own
        convolved = torch.zeros_like(flat)
        for tap in range(taps.shape[1]):
            late = taps.shape[1] - 1 - tap
            earlier = torch.cat([torch.zeros_like(flat[:, :late]), flat[:, : length - late]], 1)[:, :length]
            convolved = convolved + taps[:, tap] * earlier
        convolved = convolved * torch.sigmoid(convolved)
        sizes = [x.shape[2] * x.shape[3] for x in (q, k, v)]
        q, k, v = (y.reshape(x.shape) for x, y in zip((q, k, v), convolved.split(sizes, -1)))

        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / d_k**0.5
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        q, k = (torch.stack([x[:, :, head // n] for head in range(heads)], 2) for x in (q, k))
        beta = 1 / (1 + torch.exp(-b))
        alpha = torch.exp(-torch.exp(w["A_log"]) * torch.log1p(torch.exp(a + w["dt_bias"])))

        alpha = edits.decay(alpha) if edits.decay else alpha
        reads = edits.reads(q) if edits.reads else q
        keys = edits.keys(k) if edits.keys else k
        values = beta[..., None] * v
        values = edits.values(values) if edits.values else values
        writes = torch.einsum("bthk,bthv->bthkv", keys, values)
        writes = edits.writes(writes) if edits.writes else writes
        run = loop(
            reads,
            alpha.log(),
            keys,
            values,
            a=-(alpha * beta)[..., None] * k,
            b=k,
            writes=writes,
            set_states=edits.states,
        )
        out = edits.recurrence_out(run.outputs) if edits.recurrence_out else run.outputs
        normed = out / (out.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        gated = normed * w["norm.weight"] * z * torch.sigmoid(z)
        output = gated.reshape(batch, length, -1) @ w["out_proj.weight"].T
        return Trace(keys, values, reads, alpha, writes, run.states, out, output)


@contextmanager
def standing_in(
    reference: Any, folder: Path, layer: int, edits: Edits | None = None
) -> Iterator[list[Trace]]:
    """While open, the float64 loop stands for one layer of a stock model; yields the traces of its runs."""
    module = reference.model.layers[layer].linear_attn
    truth = GatedDeltaNetLayer(folder, layer)
    traces: list[Trace] = []

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        traces.append(truth(hidden_states, attention_mask, edits))
        return traces[-1].output.to(hidden_states.dtype)

    module.forward = forward
    try:
        yield traces
    finally:
        del module.forward


def at(
    position: int | slice | list[int], head: int, new: Callable[[Tensor], Tensor] | Tensor
) -> Callable[[Tensor], Tensor]:
    """An edit of some positions and heads of [batch, pos, head, ...], out of place."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, position, head] = new(x[:, position, head]) if callable(new) else new.to(x.dtype)
        return x

    return change
