"""The engine: one linear recurrence for Gated DeltaNet, Mamba-2, RWKV-7, DeltaNet and GLA.

Per batch row and head, with a state S of shape [d_k, d_v] (key side by value side)::

    S_t = T_t S_{t-1} + W_t      T_t = diag(exp g_t) + a_t b_t^T      W_t = k_t v_t^T      o_t = S_t^T q_t

Inside a chunk of C tokens let G_t be the running sum of g, and w_s = S_{s-1}^T b_s the vector that the erase
reads. The recurrence unrolls to

    S_t = exp(G_t) S_0 + sum_{s<=t} exp(G_t - G_s) (a_s w_s^T + k_s v_s^T)

so the w of a chunk solve one unit-triangular system whose right-hand side is affine in S_0, and every
read or state of the chunk is a few matrix products. Only the chunk-to-chunk carry is sequential.
Everything is computed in float32 at least, and exponents are differences of float64 sums: no
factor overflows, however strong the decay.

Axis letters: B batch, T position, H head, N chunk, C position in a chunk, K = d_k, V = d_v.
This module knows tensors only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK_SIZE = 64
# Tokens that share one reference point of the exponents when the decay is per channel and strong.
SUB_CHUNK_SIZE = 16
# Log decay that a chunk may lose in any channel to have a single reference point: exp(+-MILD / 2)
# leaves the factors half the exponents of float32.
MILD = 60.0
# Stands in for log 0: exp(-1e4) is exactly 0, and float64 sums of it lose no other digit that matters.
LOG_ZERO = -1e4

_F = TypeVar("_F", bound=Callable[..., Any])


def full_precision(function: _F) -> _F:
    """Run ``function`` outside autocast, so that "float32 at least" holds under mixed precision."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Only autocast's own device types matter, and disabling an inactive one is free.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The inputs of the recurrence: every token's read, decay, erase factors and write factors.

    Args:
        q: read vectors, ``[batch, pos, head, d_k]`` (any scale folded in).
        g: log decay, ``[batch, pos, head]``, or ``[batch, pos, head, d_k]`` per key channel; <= 0.
        k: key factor of the write, ``[batch, pos, head, d_k]``.
        v: value factor of the write, ``[batch, pos, head, d_v]``.
        a, b: factors of the rank-1 part of the transition, ``[batch, pos, head, d_k]`` each, or
            both None for a recurrence that does not erase (Mamba-2, GLA). Where a is a multiple of
            k, as in the delta rules, give that number, ``[batch, pos, head]``: it halves the work.
    """

    q: Float[Tensor, "batch pos head d_k"]
    g: Float[Tensor, "batch pos head"] | Float[Tensor, "batch pos head d_k"]
    k: Float[Tensor, "batch pos head d_k"]
    v: Float[Tensor, "batch pos head d_v"]
    a: Float[Tensor, "batch pos head d_k"] | Float[Tensor, "batch pos head"] | None = None
    b: Float[Tensor, "batch pos head d_k"] | None = None

    def __post_init__(self) -> None:
        if (self.a is None) != (self.b is None):
            raise ValueError("a Recurrence takes both erase factors a and b, or neither")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in: float32 at least."""
        return functools.reduce(
            torch.promote_types, (self.q.dtype, self.k.dtype, self.v.dtype), torch.float32
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Recurrence:
        """Apply ``function`` to every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {n: x if x is None else function(x) for n, x in tensors.items()}
        return Recurrence(**changed)

    def heads(self, *heads: int) -> Recurrence:
        """The recurrence of some heads only; the head axis stays."""
        return self.map(lambda x: x[:, :, list(heads)])

    def positions(self, window: slice) -> Recurrence:
        """The recurrence over a window of positions."""
        return self.map(lambda x: x[:, window])

    def with_erase_vector(self) -> Recurrence:
        """The same recurrence with a as vectors, so that k can change without it."""
        if self.a is None or self.a.ndim == 4:
            return self
        return dataclasses.replace(self, a=self.a[..., None] * self.k)

    def without_erase(self, where: Bool[Tensor, "batch pos head"]) -> Recurrence:
        """The same recurrence with a transition that only decays at some positions and heads."""
        if self.a is None:
            return self
        return dataclasses.replace(
            self, a=self.a.masked_fill(where if self.a.ndim == 3 else where[..., None], 0)
        )

    def idle_at(self, where: Bool[Tensor, "batch pos"] | None) -> Recurrence:
        """The same recurrence with positions that read nothing and leave the state as it is."""
        if where is None:
            return self
        return self.map(lambda x: x.masked_fill(where.view(*where.shape, *(1,) * (x.ndim - 2)), 0))

    def pull_back(self, reads: Float[Tensor, "batch pos head d_k"]) -> Float[Tensor, "batch pos head d_k"]:
        """T_t^T r_t: reading S_{t-1} with it gives the part of S_t^T r_t that comes from S_{t-1}."""
        dtype = torch.promote_types(self.dtype, reads.dtype)
        wide = self.map(lambda x: x.to(dtype))
        a, b = wide.with_erase_vector().a, wide.b
        reads = reads.to(dtype)
        pulled = per_channel(wide.g).exp() * reads
        return pulled if a is None or b is None else pulled + b * (a * reads).sum(-1, keepdim=True)


def scan(
    recurrence: Recurrence,
    initial_state: Float[Tensor, "batch head d_k d_v"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Tensor, "batch pos head d_v"], Float[Tensor, "batch head d_k d_v"]]:
    """Chunked scan: outputs o_t of every token and the state after the last one.

    Args:
        recurrence: the layer's inputs, any number of positions.
        initial_state: the state before the first token (None: zero).
        chunk_size: tokens per chunk; the result does not depend on it beyond rounding.

    Returns:
        outputs ``[batch, pos, head, d_v]`` and final state ``[batch, head, d_k, d_v]``, in the
        engine's dtype (float32, or float64 for float64 inputs). Differentiable in all inputs.
    """
    if recurrence.k.shape[1] == 1:
        return _step(recurrence, initial_state)
    trajectory = Trajectory(recurrence, initial_state, chunk_size=chunk_size)
    return trajectory.read(recurrence.q), trajectory.final_state


@full_precision
def _step(
    recurrence: Recurrence, initial_state: Float[Tensor, "batch head d_k d_v"] | None
) -> tuple[Float[Tensor, "batch one head d_v"], Float[Tensor, "batch head d_k d_v"]]:
    """The scan of a single token, as in decoding, where chunks cost more than the state itself."""
    dtype, (batch, _, heads, d_k) = recurrence.dtype, recurrence.k.shape
    q, k, v = (x[:, 0].to(dtype) for x in (recurrence.q, recurrence.k, recurrence.v))  # [B, H, K or V]
    if initial_state is None:
        before = k.new_zeros(batch, heads, d_k, v.shape[-1])
    else:
        before = initial_state.to(dtype)
    left, right = k[..., None], v[..., None, :]  # [B, H, K, 1], [B, H, 1, V]
    if recurrence.a is not None and recurrence.b is not None:
        a = per_channel(recurrence.a)[:, 0, ..., None].to(dtype)
        erased = recurrence.b[:, 0, :, None].to(dtype) @ before
        if recurrence.a.ndim == 3:  # of k: (a k) w^T + k v^T = k (a w + v)^T, one product
            right = torch.addcmul(right, a, erased)
        else:
            left, right = torch.cat([left, a], dim=-1), torch.cat([right, erased], dim=-2)
    decayed = per_channel(recurrence.g)[:, 0, ..., None].exp().to(dtype) * before
    state = torch.baddbmm(*(x.flatten(0, 1) for x in (decayed, left, right))).unflatten(0, (batch, heads))
    return (q[..., None, :] @ state).transpose(1, 2), state


@full_precision
def scan_sequential(
    recurrence: Recurrence, initial_state: Float[Tensor, "batch head d_k d_v"] | None = None
) -> tuple[Float[Tensor, "batch pos head d_v"], Float[Tensor, "batch head d_k d_v"]]:
    """The recurrence token by token, as written in the module's first equation: the oracle of `scan`."""
    dtype = recurrence.dtype
    rec = recurrence.map(lambda x: x.to(dtype)).with_erase_vector()
    batch, length, heads, d_k = rec.k.shape
    state = (
        rec.k.new_zeros(batch, heads, d_k, rec.v.shape[-1])
        if initial_state is None
        else initial_state.to(dtype)
    )
    outputs = []
    for t in range(length):
        decay = rec.g[:, t].exp().reshape(batch, heads, -1, 1)
        carried = decay * state
        if rec.a is not None and rec.b is not None:
            erased = torch.einsum("bhkv,bhk->bhv", state, rec.b[:, t])
            carried = carried + rec.a[:, t, :, :, None] * erased[:, :, None, :]
        state = carried + rec.k[:, t, :, :, None] * rec.v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, rec.q[:, t]))
    if not outputs:
        return rec.v.clone(), state
    return torch.stack(outputs, dim=1), state


class Trajectory:
    """The states of a recurrence at all positions, in chunk form: any of them can be read, or built.

    Args:
        recurrence: the layer's inputs.
        initial_state: the state before the first token (None: zero), ``[batch, head, d_k, d_v]``.
        inflow: what enters each chunk's final state besides its writes (see `responses`),
            ``[batch, head, chunk, d_k, d_v]``.
        chunk_size: tokens per chunk.
    """

    @full_precision
    def __init__(
        self,
        recurrence: Recurrence,
        initial_state: Float[Tensor, "batch head d_k d_v"] | None = None,
        inflow: Float[Tensor, "batch head chunk d_k d_v"] | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        batch, self.length, heads, d_k = recurrence.k.shape
        self.dtype = recurrence.dtype
        self.chunk_size = max(1, min(chunk_size, self.length))
        self.n_chunks = -(-self.length // self.chunk_size)

        # 1. Chunks. G_t is the running sum of g inside each; exp(G_C - G_s) is left of a vector at its end.
        self.log_decay = _running_sum(self._chunked(per_channel(recurrence.g), keep_dtype=True))
        self._prepare_products()
        last = self.log_decay[..., -1:, :]  # [B, H, N, 1, K or 1]
        to_end = (last - self.log_decay).to(self.dtype).exp()  # [B, H, N, C, K or 1]
        k, v = self._chunked(recurrence.k), self._chunked(recurrence.v)  # [B, H, N, C, K], [B, H, N, C, V]
        k_to_end = (to_end * k).mT  # [B, H, N, K, C]

        # 2. S_t = exp(G_t) S_0 + sum_{s<=t} exp(G_t - G_s) left_s right_s^T: the write k_s v_s^T, and the
        #    erase a_s w_s^T with w_s = from_writes_s + from_start_s S_0.
        self.sources: list[tuple[Tensor, Tensor]] = []  # (left, right), each [B, H, N, C, K or V]
        left, carry, erase = k, k_to_end, None
        if recurrence.a is not None and recurrence.b is not None:
            a, b = self._chunked(per_channel(recurrence.a)), self._chunked(recurrence.b)
            a_is_multiple = recurrence.a.ndim == 3
            from_writes, from_start = self._solve_erase(a, b, k, v, a_is_multiple)
            if a_is_multiple:  # of k: (a k) w^T + k v^T = k (a w + v)^T, one source
                erase = torch.addcmul(v, a, from_writes), a * from_start
            else:
                erase, left, carry = (from_writes, from_start), a, (to_end * a).mT
        flow = inflow
        if erase is None or left is not k:
            self.sources.append((k, v))
            flow = k_to_end @ v if inflow is None else k_to_end @ v + inflow

        # 3. From chunk to chunk: S_C = exp(G_C) S_0 + what entered in between.
        decay = last.to(self.dtype).exp().mT  # [B, H, N, K or 1, 1]
        if initial_state is None:
            state = k.new_zeros(batch, heads, d_k, v.shape[-1])
        else:
            state = initial_state.to(self.dtype)
        starts, rights = [], []
        for n in range(self.n_chunks):
            starts.append(state)
            state = decay[:, :, n] * state
            if erase is not None:
                rights.append(erase[0][:, :, n] + erase[1][:, :, n] @ starts[n])
                state = state + carry[:, :, n] @ rights[n]
            if flow is not None:
                state = state + flow[:, :, n]
        if erase is not None:
            self.sources.append((left, torch.stack(rights, dim=2) if rights else v))
        self.final_state: Float[Tensor, "batch head d_k d_v"] = state
        # [B, H, N, K, V]: the state that each chunk starts from.
        self.starts = torch.stack(starts, dim=2) if starts else state[:, :, None][:, :, :0]

    def _solve_erase(
        self, a: Tensor, b: Tensor, k: Tensor, v: Tensor, a_is_multiple: bool
    ) -> tuple[Tensor, Tensor]:
        """w_t = S_{t-1}^T b_t of each chunk, as from_writes_t + from_start_t S_0.

        w_t = exp(G_{t-1}) b_t S_0 + sum_{s<t} (b_t exp(G_{t-1} - G_s) k_s) v_s + (b_t exp(..) a_s) w_s is a
        unit-triangular system; one solve gives both terms.

        Returns:
            from_writes ``[B, H, N, C, V]`` and from_start ``[B, H, N, C, K]``.
        """
        on_writes = self._products(b, k, before=True)  # [B, H, N, C, C]
        on_erases = on_writes * a.mT if a_is_multiple else self._products(b, a, before=True)
        right = torch.cat([self._from_start(b, before=True), on_writes @ v], dim=-1)
        solved = torch.linalg.solve_triangular(-on_erases, right, upper=False, unitriangular=True)
        from_start, from_writes = solved.split([k.shape[-1], v.shape[-1]], dim=-1)
        return from_writes, from_start

    @full_precision
    def read(
        self, reads: Float[Tensor, "batch pos head d_k"], before: bool = False
    ) -> Float[Tensor, "batch pos head d_v"]:
        """S_t^T r_t for every position, or S_{t-1}^T r_t with ``before``.

        Args:
            reads: one vector per position and head, ``[batch, pos, head, d_k]``.
            before: read the state before the position's own transition and write.
        """
        r = self._chunked(reads)
        out = self._from_start(r, before) @ self.starts  # [B, H, N, C, V]
        for left, right in self.sources:
            out = out + self._products(r, left, before) @ right
        batch, heads = out.shape[:2]
        flat = out.reshape(batch, heads, self.n_chunks * self.chunk_size, out.shape[-1])
        return flat[:, :, : self.length].transpose(1, 2)

    @full_precision
    def states(self) -> Float[Tensor, "batch pos head d_k d_v"]:
        """S_t after every position."""
        if not self.n_chunks:
            return self.starts.transpose(1, 2)
        left = torch.cat([x for x, _ in self.sources], dim=-2)  # [B, H, N, sources * C, K]
        right = torch.cat([y for _, y in self.sources], dim=-2)
        future = torch.ones(self.chunk_size, self.chunk_size, dtype=torch.bool, device=left.device).triu(1)
        chunks = []
        for n in range(self.n_chunks):
            rows = min(self.chunk_size, self.length - n * self.chunk_size)
            now = self.log_decay[:, :, n, :rows]
            since = now[..., None, :] - self.log_decay[:, :, n, None]  # [B, H, rows, C, K or 1]: G_t - G_s
            since = since.masked_fill(future[:rows, :, None], float("-inf"))
            weight = since.to(self.dtype).exp().repeat(1, 1, 1, len(self.sources), 1)
            lefts = (weight * left[:, :, n, None]).transpose(-1, -2)  # [B, H, rows, K, sources * C]
            summed = (lefts.flatten(2, 3) @ right[:, :, n]).reshape(*lefts.shape[:4], -1)
            start = now.to(self.dtype).exp()[..., None] * self.starts[:, :, n, None]
            chunks.append(start + summed)
        return torch.cat(chunks, dim=2).transpose(1, 2)

    def _chunked(self, x: Tensor, keep_dtype: bool = False) -> Tensor:
        """[B, T, H, D] -> [B, H, N, C, D], padded with zeros, which change no state."""
        x = x if keep_dtype else x.to(self.dtype)
        pad = self.n_chunks * self.chunk_size - self.length
        x = x.transpose(1, 2)
        if pad:
            x = torch.nn.functional.pad(x, (0, 0, 0, pad))
        return x.unflatten(2, (self.n_chunks, self.chunk_size))

    def _before(self) -> Tensor:
        """G_{t-1}: the running sum without the position's own decay."""
        return torch.nn.functional.pad(self.log_decay[..., :-1, :], (0, 0, 1, 0))

    def _from_start(self, x: Tensor, before: bool) -> Tensor:
        """exp(G_t) x_t, or exp(G_{t-1}) x_t: how vectors see the state that the chunk starts from."""
        log_decay = self._before() if before else self.log_decay
        return log_decay.to(self.dtype).exp() * x

    def _prepare_products(self) -> None:
        """Choose how `_products` brings in exp(G_t - G_s), and compute what all its calls share."""
        self._between: Tensor | None = None
        self._mild: tuple[Tensor, Tensor, Tensor] | None = None
        if self.log_decay.shape[-1] == 1:
            self._between = self._decay_matrix()
        elif self.length:
            self._mild = self._about_the_middle()

    def _decay_matrix(self) -> Tensor:
        """exp(G_t - G_s) for s <= t, else 0, where all channels share their decay: [B, H, N, C, C]."""
        since = (self.log_decay - self.log_decay.mT).to(self.dtype)
        future = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).triu(1)
        return since.masked_fill_(future, float("-inf")).exp_()

    def _about_the_middle(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """exp(G_t - R), exp(G_{t-1} - R) and exp(R - G_s) about the chunk's middle R, if none overflows."""
        first, last = self.log_decay[..., :1, :], self.log_decay[..., -1:, :]
        if not bool((first - last < MILD).all()):
            return None
        middle = ((first + last) / 2).detach()
        # Nothing inside the chunk comes before its first token, so any bounded number will do there.
        before = torch.cat([first, self.log_decay[..., :-1, :]], dim=-2)
        exponents = self.log_decay - middle, before - middle, middle - self.log_decay
        onwards, onwards_before, back = (x.to(self.dtype).exp() for x in exponents)
        return onwards, onwards_before, back

    def _products(self, x: Tensor, y: Tensor, before: bool) -> Tensor:
        """sum_d x_t[d] exp(G_t[d] - G_s[d]) y_s[d] for s <= t, or with G_{t-1} for s < t; else 0."""
        if self._between is not None:
            between = self._between
            if before:  # exp(G_{t-1} - G_s) is the row above
                between = torch.nn.functional.pad(between[..., :-1, :], (0, 0, 1, 0))
            return (x @ y.mT) * between
        # Per channel the exponent cannot leave the sum over d, but it splits at a reference point.
        if self._mild is not None:
            onwards, onwards_before, back = self._mild
            products = ((onwards_before if before else onwards) * x) @ (back * y).mT
            return products.tril(-1 if before else 0)
        return self._products_under_strong_decay(x, y, before)

    def _products_under_strong_decay(self, x: Tensor, y: Tensor, before: bool) -> Tensor:
        """As `_products`, in blocks of `SUB_CHUNK_SIZE` tokens.

        A block below the diagonal has its own reference point, between t and s, so that both factors stay
        below 1; one on the diagonal takes each exponent by itself.
        """
        own, size = self._before() if before else self.log_decay, self.chunk_size
        allowed = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1 if before else 0)
        rows = []
        for start in range(0, size, SUB_CHUNK_SIZE):
            stop = min(start + SUB_CHUNK_SIZE, size)
            now = slice(start, stop)
            blocks = []
            if start:
                reference = self.log_decay[..., start - 1 : start, :]
                past_y = (reference - self.log_decay[..., :start, :]).to(self.dtype).exp()
                here_x = (own[..., now, :] - reference).to(self.dtype).exp()
                past = past_y * y[..., :start, :]
                blocks.append((here_x * x[..., now, :]) @ past.mT)
            since = own[..., now, None, :] - self.log_decay[..., None, now, :]
            since = since.masked_fill(~allowed[now, now, None], float("-inf")).to(self.dtype).exp()
            blocks.append(torch.einsum("...td,...sd,...tsd->...ts", x[..., now, :], y[..., now, :], since))
            blocks.append(x.new_zeros(*x.shape[:-2], stop - start, size - stop))
            rows.append(torch.cat(blocks, dim=-1))
        return torch.cat(rows, dim=-2)


def per_channel(g: Tensor) -> Tensor:
    """[B, T, H] or [B, T, H, K] -> [B, T, H, 1] or [B, T, H, K]."""
    return g[..., None] if g.ndim == 3 else g


def _running_sum(g: Tensor) -> Tensor:
    """Running sum of the log decay, in float64 where the device has it."""
    wide = g if g.device.type == "mps" else g.double()
    # log 0 is -inf, and -inf - -inf is not a number.
    return wide.clamp_min(LOG_ZERO).cumsum(dim=-2)


def __getattr__(name: str) -> Any:
    """`later_reads`, `respond` and `respond_states` of `responses` can still be imported from here."""
    if name in ("later_reads", "respond", "respond_states"):
        from hooked_models import responses

        return getattr(responses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
