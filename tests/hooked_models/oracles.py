"""Independent truths, written from the equations: plain float64 loops that know nothing of the package.

`loop` is S_t = T_t S_{t-1} + W_t, o_t = S_t^T q_t. A `Layer` is the whole layer of an architecture, from the
tensors of a checkpoint's own file, and `standing_in` puts it, with edits, into a stock transformers model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

Maybe = Tensor | None


class Run(NamedTuple):
    """What a loop saw, in float64."""

    outputs: Tensor  # [batch, pos, head, d_v]
    states: Tensor  # [batch, pos, head, d_k, d_v], after the token
    writes: Tensor  # [batch, pos, head, d_k, d_v]
    erases: Tensor  # [batch, pos, head, d_k, d_v], a_t b_t^T S_{t-1}

    @property
    def final_state(self) -> Tensor:
        return self.states[:, -1]


def loop(
    q: Tensor,
    g: Tensor,
    k: Tensor,
    v: Tensor,
    a: Maybe = None,
    b: Maybe = None,
    initial: Maybe = None,
    writes: Maybe = None,
    set_states: tuple[Tensor, Tensor] | None = None,
    set_erases: tuple[Tensor, Tensor] | None = None,
) -> Run:
    """S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + W_t and o_t = S_t^T q_t, matrix by matrix.

    Args:
        q, g, k, v, a, b: [batch, pos, head, ...]; g without a last axis is a scalar decay, a without one
            the multiple of k.
        initial: S_0, None for zero.
        writes: W_t in the place of k_t v_t^T.
        set_states: (states, mask [batch, pos, head]): where the mask is true S_t is that state instead.
        set_erases: (erases, mask): where the mask is true that is added to diag(exp g_t) S_{t-1} + W_t in the
            place of a_t b_t^T S_{t-1}.
    """
    q, g, k, v = (x.double() for x in (q, g, k, v))
    batch, length, heads, d_k = k.shape
    decay = (g if g.ndim == 4 else g[..., None].expand(-1, -1, -1, d_k)).exp()
    if a is None or b is None:
        a = b = torch.zeros_like(k)
    a, b = a.double() if a.ndim == 4 else a.double()[..., None] * k, b.double()
    if writes is None:
        writes = torch.einsum("bthk,bthv->bthkv", k, v)
    state = torch.zeros(batch, heads, d_k, v.shape[-1], dtype=torch.float64)
    if initial is not None:
        state = initial.double()
    outputs, states, erases = [], [], []
    for t in range(length):
        erase = (a[:, t, :, :, None] * b[:, t, :, None, :]) @ state
        if set_erases is not None:
            erase = torch.where(set_erases[1][:, t, :, None, None], set_erases[0][:, t], erase)
        state = decay[:, t, :, :, None] * state + erase + writes[:, t]
        if set_states is not None:
            state = torch.where(set_states[1][:, t, :, None, None], set_states[0][:, t], state)
        erases.append(erase)
        states.append(state)
        outputs.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return Run(torch.stack(outputs, 1), torch.stack(states, 1), writes, torch.stack(erases, 1))


Change = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass
class Edits:
    """What to change in a layer; each a function from the native tensor to the edited one.

    An edited decay moves the erase where it is a factor of it (Gated DeltaNet); edited keys, values and
    writes leave it alone. ``states`` and ``erases`` give (tensor, mask) to set, as in `loop`.
    """

    writes: Change = same  # [batch, pos, head, d_k, d_v]
    keys: Change = same  # [batch, pos, head, d_k]
    values: Change = same  # [batch, pos, head, d_v]
    reads: Change = same  # [batch, pos, head, d_k]
    decay: Change = same  # [batch, pos, head], or with d_k per channel
    recurrence_out: Change = same  # [batch, pos, head, d_v]
    head_out: Change = same  # [batch, pos, head, d_v]
    states: tuple[Tensor, Tensor] | None = None
    erases: tuple[Tensor, Tensor] | None = None


@dataclasses.dataclass
class Native:
    """What a layer feeds to the loop, and how it goes on from there."""

    reads: Tensor  # these four as the fields of `Edits`
    keys: Tensor
    values: Tensor
    decay: Tensor
    erase: Callable[[Tensor], tuple[Maybe, Maybe]]  # factors a and b, given the decay
    head_outputs: Change  # from the loop's outputs to what W_O reads, [batch, pos, head, d_v]
    v_first: Maybe = None  # the first layer's values, which RWKV-7's later layers mix in


@dataclasses.dataclass
class Trace:
    """What a layer computed, in float64."""

    keys: Tensor
    values: Tensor
    reads: Tensor
    decay: Tensor
    writes: Tensor
    erases: Tensor
    states: Tensor
    recurrence_out: Tensor
    head_out: Tensor
    output: Tensor
    v_first: Maybe

    def hook(self, name: str) -> Tensor:
        """The activation of the hook that has this name after "hook_"."""
        kind, _, head = name.partition(".")
        if head:
            return getattr(self, f"{kind}s")[:, :, int(head)].flatten(-2)
        fields = {"write_key": "keys", "write_value": "values", "read": "reads", "out": "output"}
        return getattr(self, fields.get(name, name))


class Layer:
    """One recurrent layer of a checkpoint folder."""

    path: str
    """Where modules keep it, with a place for the layer's number."""
    checkpoint_path: str | None = None
    """Where checkpoints keep it, if they have another name for it than modules."""
    output_projection = "out_proj"

    def __init__(self, folder: Path, layer: int) -> None:
        text = (folder / "config.json").read_text()
        self.config = json.loads(text, object_hook=lambda x: float(x["__float__"]) if "__float__" in x else x)
        self.name = self.path.format(layer)
        prefix = f"{(self.checkpoint_path or self.path).format(layer)}."
        tensors = load_file(folder / "model.safetensors")
        self.weights = {
            n.removeprefix(prefix): x.double() for n, x in tensors.items() if n.startswith(prefix)
        }
        assert self.weights, f"no {prefix}* in {sorted(tensors)}"

    @abstractmethod
    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        """From the layer's input, zero where mask [batch, pos, 1] is, to what the loop needs."""

    def __call__(
        self, hidden: Tensor, mask: Maybe = None, edits: Edits | None = None, v_first: Maybe = None
    ) -> Trace:
        edits, hidden = edits or Edits(), hidden.double()
        if mask is not None:
            mask = mask.double()[..., None]
            hidden = hidden * mask
        native = self.native(hidden, mask, v_first)
        decay, reads = edits.decay(native.decay), edits.reads(native.reads)
        keys, values = edits.keys(native.keys), edits.values(native.values)
        writes = edits.writes(torch.einsum("bthk,bthv->bthkv", keys, values))
        a, b = native.erase(decay)
        run = loop(reads, decay.log(), keys, values, a, b, None, writes, edits.states, edits.erases)
        out = edits.recurrence_out(run.outputs)
        heads = edits.head_out(native.head_outputs(out))
        weights = (self.weights.get(f"{self.output_projection}.{x}") for x in ("weight", "bias"))
        output = torch.nn.functional.linear(heads.flatten(2), *weights)
        return Trace(
            keys, values, reads, decay, writes, run.erases, run.states, out, heads, output, native.v_first
        )

    def returned(self, trace: Trace, dtype: torch.dtype) -> Any:
        """What the layer's forward returns."""
        output = trace.output.to(dtype)
        return output if trace.v_first is None else (output, trace.v_first.to(dtype))

    def convolved(self, x: Tensor) -> Tensor:
        """SiLU of the depthwise causal convolution of [batch, pos, channel]."""
        length, taps = x.shape[1], self.weights["conv1d.weight"][:, 0]  # the last tap is the token's own
        out = torch.zeros_like(x) + self.weights.get("conv1d.bias", 0)
        for tap in range(taps.shape[1]):
            late = taps.shape[1] - 1 - tap
            earlier = torch.cat([torch.zeros_like(x[:, :late]), x[:, : length - late]], 1)[:, :length]
            out = out + taps[:, tap] * earlier
        return out * torch.sigmoid(out)


class GatedDeltaNetLayer(Layer):
    """Gated DeltaNet, of Qwen3.5 or Qwen3-Next."""

    path = "model.layers.{}.linear_attn"

    def project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Unconvolved q, k [b, t, key head, d_k], v, z [b, t, head, d_v] and b, a [b, t, head]."""
        config, w = self.config, self.weights
        key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
        d_k, d_v, n = config["linear_key_head_dim"], config["linear_value_head_dim"], heads // key_heads
        keys, values = (*hidden.shape[:2], key_heads, d_k), (*hidden.shape[:2], heads, d_v)
        if "in_proj_qkv.weight" in w:
            qkv = hidden @ w["in_proj_qkv.weight"].T
            q, k, v = qkv.split([key_heads * d_k, key_heads * d_k, heads * d_v], -1)
            z, b, a = (hidden @ w[f"in_proj_{x}.weight"].T for x in "zba")
        else:  # the parts of one key head, then those of the next
            qkvz, ba = ((hidden @ w[f"in_proj_{x}.weight"].T).chunk(key_heads, -1) for x in ("qkvz", "ba"))
            parts = [x.split([d_k, d_k, n * d_v, n * d_v], -1) + y.chunk(2, -1) for x, y in zip(qkvz, ba)]
            q, k, v, z, b, a = (torch.cat(x, -1) for x in zip(*parts))
        return q.reshape(keys), k.reshape(keys), v.reshape(values), z.reshape(values), b, a

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        batch, length, _ = hidden.shape
        heads = config["linear_num_value_heads"]
        n = heads // config["linear_num_key_heads"]
        d_k = config["linear_key_head_dim"]
        q, k, v, z, b, a = self.project(hidden)
        flat = self.convolved(torch.cat([x.reshape(batch, length, -1) for x in (q, k, v)], -1))
        sizes = [x.shape[2] * x.shape[3] for x in (q, k, v)]
        q, k, v = (y.reshape(x.shape) for x, y in zip((q, k, v), flat.split(sizes, -1)))
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() / d_k**0.5
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        q, k = (torch.stack([x[:, :, head // n] for head in range(heads)], 2) for x in (q, k))
        beta = 1 / (1 + torch.exp(-b))
        alpha = torch.exp(-torch.exp(w["A_log"]) * torch.log1p(torch.exp(a + w["dt_bias"])))

        def head_outputs(out: Tensor) -> Tensor:
            normed = out / (out.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
            return normed * w["norm.weight"] * z * torch.sigmoid(z)

        values = beta[..., None] * v
        return Native(q, k, values, alpha, lambda alpha: (-(alpha * beta)[..., None] * k, k), head_outputs)


class Mamba2Layer(Layer):
    """Mamba-2."""

    path = "backbone.layers.{}.mixer"
    # From transformers 5.23 on Mamba-2's norm is per group; before it was over all channels.
    by_group = "group_size" in inspect.signature(MambaRMSNormGated).parameters

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        shape, heads, groups = hidden.shape[:2], config["num_heads"], config["n_groups"]
        inner, d_k = heads * config["head_dim"], config["state_size"]
        projected = hidden @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
        gate, dt = projected[..., :inner], projected[..., -heads:]
        mixed = self.convolved(projected[..., inner:-heads])
        if mask is not None:
            mixed = mixed * mask
        x = mixed[..., :inner].reshape(*shape, heads, -1)
        b, c = mixed[..., inner:].reshape(*shape, 2, groups, d_k).unbind(2)
        b, c = (torch.stack([y[:, :, head // (heads // groups)] for head in range(heads)], 2) for y in (b, c))
        dt = torch.log1p(torch.exp(dt + w["dt_bias"])).clamp(*config["time_step_limit"])

        def head_outputs(out: Tensor) -> Tensor:
            y = (out + w["D"][:, None] * x).reshape(*shape, -1)
            return self.normed(y, gate).reshape(out.shape)

        decay = torch.exp(-torch.exp(w["A_log"]) * dt)
        return Native(c, b, dt[..., None] * x, decay, lambda decay: (None, None), head_outputs)

    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        """Gate and norm of all heads' outputs [batch, pos, channel]."""
        y = (y * gate * torch.sigmoid(gate)).unflatten(
            -1, (self.config["n_groups"] if self.by_group else 1, -1)
        )
        y = y / (y.square().mean(-1, keepdim=True) + self.config["layer_norm_epsilon"]).sqrt()
        return y.flatten(-2) * self.weights["norm.weight"]


class RWKV7Layer(Layer):
    """RWKV-7's time mixing."""

    path, output_projection = "model.layers.{}.attn", "o_proj"

    def low_rank(self, name: str, x: Tensor, activation: Change = same) -> Tensor:
        down, up = (self.weights[f"{name}_lora.lora.{i}.weight"] for i in (0, 2))
        return activation(x @ down.T) @ up.T + self.weights.get(f"{name}_lora.lora.2.bias", 0)

    def native(self, hidden: Tensor, mask: Maybe, v_first: Maybe) -> Native:
        config, w = self.config, self.weights
        d_k = config["head_dim"]
        heads = config["hidden_size"] // d_k
        shape = (*hidden.shape[:2], heads, -1)
        earlier = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        shifted = {name: hidden + (earlier - hidden) * w[f"x_{name}"] for name in "rwkvag"}
        r, k, v = (shifted[name] @ w[f"{name}_proj.weight"].T for name in "rkv")
        decay = torch.exp(-(math.e**-0.5) * torch.sigmoid(self.low_rank("w", shifted["w"], torch.tanh)))
        rate = torch.sigmoid(self.low_rank("a", shifted["a"]))
        gate = self.low_rank("g", shifted["g"], torch.sigmoid)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first.double() - v) * torch.sigmoid(self.low_rank("v", shifted["v"]))
        removal = (k * w["k_k"]).reshape(shape)
        if config["fuse_norm"]:
            removal = removal / (removal.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        else:
            removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        k = k * (1 + (rate - 1) * w["k_a"])
        r, k, v, decay, rate = (x.reshape(shape) for x in (r, k, v, decay, rate))

        def head_outputs(out: Tensor) -> Tensor:
            centred = out - out.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + d_k * config["norm_eps"]).sqrt()
            normed = normed.flatten(2) * w["g_norm.weight"] + w["g_norm.bias"]
            bonus = (r * k * w["r_k"]).sum(-1, keepdim=True) * v
            return ((normed + bonus.flatten(2)) * gate).reshape(out.shape)

        return Native(r, k, v, decay, lambda decay: (removal * rate, -removal), head_outputs, v_first)


LAYERS: dict[str, type[Layer]] = {"mamba2": Mamba2Layer, "rwkv7": RWKV7Layer}
LAYERS |= {"qwen3_5_text": GatedDeltaNetLayer, "qwen3_next": GatedDeltaNetLayer}


@contextmanager
def standing_in(
    reference: Any, folder: Path, layer: int, edits: Edits | None = None
) -> Iterator[list[Trace]]:
    """While open, the float64 loop stands for one layer of a stock model; yields the traces of its runs."""
    truth = LAYERS[reference.config.model_type](folder, layer)
    module = reference.get_submodule(truth.name)
    traces: list[Trace] = []

    def forward(hidden_states: Tensor, attention_mask: Maybe = None, v_first: Maybe = None, **_: Any) -> Any:
        traces.append(truth(hidden_states, attention_mask, edits, v_first))
        return truth.returned(traces[-1], hidden_states.dtype)

    module.forward = forward
    try:
        yield traces
    finally:
        del module.forward


def at(position: int | slice | list[int], head: int, new: Change | Tensor) -> Change:
    """An edit of some positions and heads of [batch, pos, head, ...], out of place."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, position, head] = new(x[:, position, head]) if callable(new) else new.to(x.dtype)
        return x

    return change
