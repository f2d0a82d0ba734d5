"""Swapped and added writes: many edits of a cell's writes in one forward pass.

`hooked_models.edited_runs` runs them. `HookedRecurrent.forward` opens `edit_in_force` for each call, with the
call's edit or with none, and the layers that mix tokens look the edit up here. So an edit ends with its call,
and a call inside another one (from a hook), of another model or in another thread does not see it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_models.errors import HookedModelError
from hooked_models.recurrence import Recurrence, Trajectory, scan


@dataclasses.dataclass(frozen=True)
class SwappedWrites:
    """A sequence of native tokens followed by *branch* tokens, each of which writes something else at a cell.

    Branch j repeats the native token at ``positions[j]``. It sees the native tokens before that position and
    itself, nothing else: it is the last token of a passage of its own.

    Args:
        mixer, head: the cell.
        n_native: how many tokens come before the branches.
        positions: of the branches; they may repeat.
        keys, values: what each branch writes, the sum over rank of key value^T.
        erase: whether a branch's own erase still happens at the cell.
    """

    mixer: nn.Module
    head: int
    n_native: int
    positions: Int[Tensor, " branch"]
    keys: Float[Tensor, "branch rank d_k"]
    values: Float[Tensor, "branch rank d_v"]
    erase: bool

    def outputs(
        self, mixer: nn.Module, recurrence: Recurrence
    ) -> Float[Tensor, "one native_and_branch head d_v"]:
        """S_t^T q_t of the native tokens and of the branches in one layer, the cell's or another.

        A branch has its own T, W and q but the native state before it::

            S_t^T q_t = S_{t-1}^T (T_t^T q_t) + W_t^T q_t
        """
        # 1. The native tokens are a passage as any other.
        native = recurrence.positions(slice(self.n_native))
        branch = recurrence.positions(slice(self.n_native, None))
        trajectory = Trajectory(native)
        # 2. W_t^T q_t, [1, branch, head, d_v]; at the cell with what is swapped in.
        written = branch.v * (branch.k * branch.q).sum(-1, keepdim=True)
        if mixer is self.mixer:
            if not self.erase:
                heads = torch.arange(branch.k.shape[2], device=branch.k.device)
                branch = branch.without_erase((heads == self.head).expand(*branch.k.shape[:3]))
            on_keys = torch.einsum("bjk,jrk->bjr", branch.q[:, :, self.head], self.keys.to(branch.q))
            written = written.clone()
            written[:, :, self.head] = torch.einsum("bjr,jrv->bjv", on_keys, self.values.to(branch.v))
        # 3. S_{t-1}^T (T_t^T q_t). A read takes one vector per position: with n branches at one position, n
        #    reads are needed.
        n_reads, nth_read = self._nth_at_its_position()
        pulled = branch.pull_back(branch.q)
        reads = pulled.new_zeros(n_reads, *native.q.shape)
        reads[nth_read, :, self.positions] = pulled.transpose(0, 1)
        before = torch.stack([trajectory.read(r, before=True) for r in reads])
        before = before[nth_read, :, self.positions].transpose(0, 1)
        return torch.cat([trajectory.read(native.q), before + written], dim=1)

    def _nth_at_its_position(self) -> tuple[int, Tensor]:
        """How many branches share the busiest position, and each branch's number at its position."""
        order = torch.argsort(self.positions, stable=True)
        counts = torch.bincount(self.positions, minlength=1)
        first = (counts.cumsum(0) - counts)[self.positions[order]]
        nth = torch.empty_like(order)
        nth[order] = torch.arange(len(order), device=order.device) - first
        return max(1, int(counts.max())), nth


@dataclasses.dataclass(frozen=True)
class AddedWrites:
    """One write a row of a batch, added at one position to a cell's native writes.

    Args:
        mixer: the layer.
        heads: each row's, which with the layer is its cell.
        positions: of each row's added write.
        keys, values: its factors: key value^T, or the sum of it over rank.
        linear: whether the rest of the model sees the change of the layer's output as a tangent of
            forward-mode differentiation instead of as a change.
    """

    mixer: nn.Module
    heads: Int[Tensor, " row"]
    positions: Int[Tensor, " row"]
    keys: Float[Tensor, "row *rank d_k"]
    values: Float[Tensor, "row *rank d_v"]
    linear: bool

    def added_to(
        self,
        outputs: Float[Tensor, "row pos head d_v"],
        recurrence: Recurrence,
        real: Bool[Tensor, "row pos"] | None = None,
    ) -> Float[Tensor, "row pos head d_v"]:
        """The layer's ``outputs`` S_t^T q_t with what the added writes contribute to them.

        Nothing is added at padding, where ``real`` is False (None: nowhere).
        """
        # The state is linear in the writes, so the added ones contribute what each would write alone: a head
        # for each of them, with the cell's transitions and reads.
        keys, values = (x if x.ndim == 3 else x[:, None] for x in (self.keys, self.values))
        rows = torch.arange(len(outputs), device=outputs.device)
        rec = recurrence.with_erase_vector().map(
            lambda x: x[rows, :, self.heads].unsqueeze(2).expand(-1, -1, keys.shape[1], *x.shape[3:])
        )
        here = torch.arange(outputs.shape[1], device=outputs.device) == self.positions[:, None]
        here = here if real is None else here & real
        keys = here[:, :, None, None] * keys[:, None].to(rec.k)
        change, _ = scan(dataclasses.replace(rec, k=keys, v=values[:, None].to(rec.v).expand_as(rec.v)))
        changed = outputs.clone()
        changed[rows, :, self.heads] += change.sum(dim=2)
        return changed


Edit = SwappedWrites | AddedWrites
_EDIT: ContextVar[Edit | None] = ContextVar("edit of the forward pass that is running", default=None)


@contextmanager
def edit_in_force(edit: Edit | None) -> Iterator[None]:
    """While open, in this thread, the layers of the running forward pass see this edit, or none.

    Raises:
        HookedModelError: it is no edit.
    """
    if not isinstance(edit, (SwappedWrites, AddedWrites, type(None))):
        raise HookedModelError(f"edit must be SwappedWrites or AddedWrites, got a {type(edit).__name__}")
    token = _EDIT.set(edit)
    try:
        yield
    finally:
        _EDIT.reset(token)


def swapped_writes() -> SwappedWrites | None:
    """The swapped writes of the forward pass that is running, if it has branches."""
    edit = _EDIT.get()
    return edit if isinstance(edit, SwappedWrites) else None


def added_writes(mixer: nn.Module) -> AddedWrites | None:
    """What the forward pass that is running adds to the writes of this mixer."""
    edit = _EDIT.get()
    return edit if isinstance(edit, AddedWrites) and edit.mixer is mixer else None


def mix_neighbours(
    mix: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "batch pos channel"],
    own_weight: Float[Tensor, " channel"] | None = None,
) -> Float[Tensor, "batch pos channel"]:
    """Apply a causal mixing of neighbouring tokens, as a convolution or a token shift, branches or not.

    The neighbours of a branch are the native tokens before its position. So its result is that of the native
    token there, with the token's own contribution exchanged for the branch's.

    Args:
        mix: the mixing of a passage.
        hidden: its input, which ends with the branches where there are some.
        own_weight: weight of the token itself in the mixing (None: the token itself does not contribute).
    """
    swapped = swapped_writes()
    if swapped is None:
        return mix(hidden)
    native, branch = hidden[:, : swapped.n_native], hidden[:, swapped.n_native :]
    mixed = mix(native)
    of_branches = mixed[:, swapped.positions]
    if own_weight is not None:
        of_branches = torch.addcmul(of_branches, branch - native[:, swapped.positions], own_weight)
    return torch.cat([mixed, of_branches], dim=1)
