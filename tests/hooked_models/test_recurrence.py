"""The engine against float64 loops: every option, any length, strong and weak decay, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_models.recurrence import LOG_ZERO, MILD, Recurrence, Trajectory, scan, scan_sequential
from hooked_models.responses import respond, respond_states
from tests.hooked_models.oracles import Run, loop

FIELDS = ("q", "g", "k", "v", "a", "b")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
LENGTHS = (1, 2, 3, 7, 16, 17, 31, 63, 64, 65, 130)
SIZES = ((1, 3), (3, 1), (4, 7), (5, 2), (8, 6), (6, 17))  # d_k, d_v: never square


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def log_decay(generator: torch.Generator, kind: str, *shape: int) -> Tensor:
    """Log decays: none, a few per mille, e^-1 to e^-40, all of these, or about what one chunk can bear."""
    weak = -1e-3 * uniform(generator, *shape)
    strong = -1 - 39 * uniform(generator, *shape) ** 3
    if kind == "mixed":
        choice = uniform(generator, *shape)
        middling = -uniform(generator, *shape)
        mixed = torch.where(choice < 0.4, weak, torch.where(choice < 0.7, middling, strong))
        return mixed.masked_fill(choice > 0.95, -40.0)
    borderline = -2 * MILD / 64 * uniform(generator, *shape)
    return {"none": 0 * weak, "weak": weak, "strong": strong, "borderline": borderline}[kind]


@dataclasses.dataclass
class Problem:
    """A recurrence in the dtype under test; the loops see the same numbers in float64."""

    recurrence: Recurrence
    initial: Tensor | None
    chunk_size: int
    generator: torch.Generator

    @property
    def inputs(self) -> dict[str, Tensor]:
        pairs = {name: getattr(self.recurrence, name) for name in FIELDS}
        return {name: x for name, x in pairs.items() if x is not None}

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.recurrence.dtype]

    def loop(self, writes: Tensor | None = None, set_states: tuple[Tensor, Tensor] | None = None) -> Run:
        return loop(**self.inputs, initial=self.initial, writes=writes, set_states=set_states)

    def random(self, *shape: int) -> Tensor:
        return random(self.generator, *shape).to(self.recurrence.dtype)


def make(
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 65,
    heads: int = 3,
    sizes: tuple[int, int] = (6, 9),
    decay: str = "mixed",
    per_channel: bool = False,
    erase: str = "none",
    keys: str = "random",
    initial: bool = True,
    chunk_size: int = 64,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    d_k, d_v = sizes
    shape = (batch, length, heads)
    g = log_decay(generator, decay, *shape, *((d_k,) if per_channel else ()))
    k = unit(random(generator, *shape, d_k))
    if keys == "few":  # the same three directions again and again: the erase matters most
        k = k[:, torch.randint(0, min(3, length), (length,), generator=generator)]
    v = random(generator, *shape, d_v)
    a = b = None
    if erase == "multiple":  # the delta rule: -alpha beta k k^T
        a = -uniform(generator, *shape) * (g if g.ndim == 3 else g.amax(-1)).exp()
        b = k
    elif erase == "multiple of another vector":
        a, b = 0.3 * random(generator, *shape), unit(random(generator, *shape, d_k))
    elif erase == "removal":  # RWKV-7: -(kappa * rate) kappa^T, beside the written key
        b = -unit(random(generator, *shape, d_k))
        a = -b * uniform(generator, *shape, d_k)
    elif erase == "general":
        a, b = 0.3 * random(generator, *shape, d_k), unit(random(generator, *shape, d_k))
    recurrence = Recurrence(random(generator, *shape, d_k), g, k, v, a, b).map(lambda x: x.to(dtype))
    state = random(generator, batch, heads, d_k, d_v).to(dtype) if initial else None
    return Problem(recurrence, state, chunk_size, generator)


@st.composite
def problems(draw: st.DrawFn, **fixed: object) -> Problem:
    options = {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 2),
        "length": st.sampled_from(LENGTHS),
        "heads": st.integers(1, 3),
        "sizes": st.sampled_from(SIZES),
        "decay": st.sampled_from(["none", "weak", "borderline", "strong", "mixed"]),
        "per_channel": st.booleans(),
        "erase": st.sampled_from(["none", "multiple", "multiple of another vector", "removal", "general"]),
        "keys": st.sampled_from(["random", "few"]),
        "initial": st.booleans(),
        "chunk_size": st.sampled_from([1, 2, 5, 16, 17, 48, 64, 200]),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
    return make(**{name: fixed.get(name, draw(choice)) for name, choice in options.items()})


def assert_close(found: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """Largest difference at most ``tolerance`` of the largest expected number; NaN fails."""
    assert found.shape == expected.shape
    if not expected.numel():
        return
    scale = float(expected.detach().abs().max()) if scale is None else scale
    error = float((found.detach().double() - expected.detach()).abs().max())
    assert error <= tolerance * max(scale, 1e-12), f"off by {error:.2e} at scale {scale:.2e}"


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(7).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.float64)).isnan().all()
    assert torch.ones(2, dtype=torch.bfloat16).new_empty(5).isnan().all()


# The scan.


def assert_run(found: tuple[Tensor, Tensor], problem: Problem, truth: Run | None = None) -> None:
    """Outputs and final state are the loop's, in the problem's dtype."""
    truth = truth or problem.loop()
    for x, expected in zip(found, (truth.outputs, truth.final_state), strict=True):
        assert x.dtype == problem.recurrence.dtype
        assert_close(x, expected, problem.tolerance)


def assert_response(
    problem: Problem, difference: Tensor, native: Run, edited: Run, *is_set: Tensor, drawn: bool = False
) -> None:
    """The response to a difference of writes (of states where set) is what the loop's edited run adds."""
    outputs, final = respond(problem.recurrence, difference, *is_set, chunk_size=problem.chunk_size)
    scale, state_scale = None, None  # the change's own, but where few or small changes are lost in rounding
    if drawn:
        scale = float(torch.stack([edited.outputs, native.outputs]).abs().max())
        state_scale = float(torch.stack([edited.states, native.states]).abs().max())
    assert_close(outputs, edited.outputs - native.outputs, problem.tolerance, scale)
    assert_close(final, edited.final_state - native.final_state, problem.tolerance, state_scale)
    if not is_set:
        states = respond_states(problem.recurrence, difference)
        assert_close(states, edited.states - native.states, problem.tolerance, state_scale)


def assert_gradients(problem: Problem, own_scales: bool = False) -> None:
    """Gradients of outputs and final state by all inputs and the initial state are those of the loop.

    To the tolerance of the largest of all, or of each input's own.
    """
    leaves = {name: x.clone().requires_grad_() for name, x in problem.inputs.items()}
    if problem.initial is not None:
        leaves["initial"] = problem.initial.clone().requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    truth = loop(**exact)
    recurrence = Recurrence(**{name: leaves.get(name) for name in FIELDS})
    ends = scan(recurrence, leaves.get("initial"), problem.chunk_size)
    weights = [random(problem.generator, *x.shape) for x in ends]
    loss = sum((x * weight).sum() for x, weight in zip((truth.outputs, truth.final_state), weights))
    expected = torch.autograd.grad(loss, list(exact.values()))
    found = torch.autograd.grad(ends, list(leaves.values()), [y.to(x) for x, y in zip(ends, weights)])
    scale = max(float(x.abs().max()) for x in expected)
    for name, x, y in zip(leaves, found, expected, strict=True):
        assert x.dtype == leaves[name].dtype
        assert_close(x, y, problem.tolerance, None if own_scales else scale)


@given(problems())
def test_both_scans_equal_the_loop(problem: Problem):
    truth = problem.loop()
    assert_run(scan(problem.recurrence, problem.initial, problem.chunk_size), problem, truth)
    assert_run(scan_sequential(problem.recurrence, problem.initial), problem, truth)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("erase", ["none", "multiple", "removal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scan_at_the_size_of_real_heads(dtype: torch.dtype, erase: str, per_channel: bool):
    problem = make(
        batch=1, length=200, heads=2, sizes=(64, 48), erase=erase, per_channel=per_channel, dtype=dtype
    )
    assert_run(scan(problem.recurrence, problem.initial), problem)


@given(problems(dtype=torch.float64), st.floats(0, 1))
def test_a_scan_may_be_cut_anywhere(problem: Problem, where: float):
    rec, length = problem.recurrence, problem.recurrence.k.shape[1]
    cut = 1 + int(where * (length - 1))
    first, state = scan(rec.positions(slice(cut)), problem.initial, problem.chunk_size)
    second = first[:, :0]
    if cut < length:
        second, state = scan(rec.positions(slice(cut, None)), state, problem.chunk_size)
    assert_run((torch.cat([first, second], 1), state), problem)


@given(problems(dtype=torch.float64, heads=3))
def test_heads_are_independent(problem: Problem):
    start = None if problem.initial is None else problem.initial[:, [2, 0]]
    outputs, final_state = scan(problem.recurrence.heads(2, 0), start)
    truth = problem.loop()
    assert_close(outputs, truth.outputs[:, :, [2, 0]], 1e-9)
    assert_close(final_state, truth.final_state[:, [2, 0]], 1e-9)


@pytest.mark.parametrize("chunk_size", [1, 16, 17, 64])
@pytest.mark.parametrize("per_channel", [False, True])
def test_without_decay_and_erase_it_is_causal_linear_attention(chunk_size: int, per_channel: bool):
    problem = make(decay="none", per_channel=per_channel, initial=False, length=70, chunk_size=chunk_size)
    rec = problem.recurrence
    scores = torch.einsum("bthk,bshk->bhts", rec.q, rec.k).tril()
    outputs, final_state = scan(rec, chunk_size=chunk_size)
    assert_close(outputs, torch.einsum("bhts,bshv->bthv", scores, rec.v), 1e-12)
    assert_close(final_state, torch.einsum("bthk,bthv->bhkv", rec.k, rec.v), 1e-12)


def test_a_full_erase_along_a_unit_key_stores_the_value_exactly():
    problem = make(decay="none", length=100, chunk_size=16)
    rec = problem.recurrence
    stored = dataclasses.replace(rec, q=rec.k, a=-torch.ones_like(rec.g), b=rec.k)
    outputs, _ = scan(stored, problem.initial, 16)
    assert_close(outputs, rec.v, 1e-10)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("erase", ["none", "multiple", "general"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decay_of_zero_forgets_without_nan(dtype: torch.dtype, erase: str, per_channel: bool):
    problem = make(length=70, erase=erase, per_channel=per_channel, dtype=dtype, chunk_size=32)
    g = problem.recurrence.g.clone()
    for position in (0, 1, 31, 32, 50, 69):
        g[:, position, 0] = float("-inf")
    g[:, 40] = -1e6
    problem.recurrence = dataclasses.replace(problem.recurrence, g=g)
    truth = problem.loop()
    assert_run(scan(problem.recurrence, problem.initial, 32), problem, truth)
    assert_run(scan_sequential(problem.recurrence, problem.initial), problem, truth)
    states = Trajectory(problem.recurrence, problem.initial, chunk_size=32).states()
    assert_close(states, truth.states, problem.tolerance)
    difference = problem.random(*truth.writes.shape)
    assert_response(problem, difference, truth, problem.loop(truth.writes + difference))
    assert_gradients(problem, own_scales=dtype is torch.float64)


def lose(problem: Problem, share: float, huge: bool) -> Problem:
    """The same with decays per channel: in the second of three chunks the worst loses a share of `MILD`.

    Of the first token's own decay nothing is left inside its chunk, so it does not count and may be huge.
    """
    size, g = problem.chunk_size, -uniform(problem.generator, *problem.recurrence.k.shape)
    g[:, size : 2 * size] *= share * MILD / -g[:, size + 1 : 2 * size].sum(1).min()
    if huge:
        for chunk, first in enumerate((-1000.0, LOG_ZERO, float("-inf"))):
            g[:, chunk * size] = first
    recurrence = dataclasses.replace(problem.recurrence, g=g.to(problem.recurrence.dtype))
    return dataclasses.replace(problem, recurrence=recurrence)


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.999, 1.001, 5.0])
@pytest.mark.parametrize("erase", ["none", "multiple", "removal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_per_channel_about_what_one_reference_point_can_bear(
    dtype: torch.dtype, erase: str, share: float, huge: bool
):
    """One product a chunk below, sub-chunks above: outputs, states, reads, responses and gradients."""
    problem = make(length=72, erase=erase, per_channel=True, dtype=dtype, chunk_size=32)
    problem = lose(problem, share, huge)
    trajectory = Trajectory(problem.recurrence, problem.initial, chunk_size=32)
    assert (trajectory._mild is not None) == (share < 1)
    truth = problem.loop()
    assert_run(scan(problem.recurrence, problem.initial, 32), problem, truth)
    assert_close(trajectory.states(), truth.states, problem.tolerance)
    earlier = states_before(problem, truth.states)
    expected = torch.einsum("bthkv,bthk->bthv", earlier, problem.recurrence.q.double())
    assert_close(trajectory.read(problem.recurrence.q, before=True), expected, problem.tolerance)
    difference = problem.random(*truth.writes.shape)
    assert_response(problem, difference, truth, problem.loop(truth.writes + difference))
    assert_gradients(problem)


@pytest.mark.parametrize("erase", ["none", "multiple", "removal"])
def test_no_tokens_leave_the_state_as_it_was(erase: str):
    problem = make(length=3, erase=erase)
    nothing = problem.recurrence.positions(slice(0, 0))
    for run in (scan, scan_sequential):
        outputs, final_state = run(nothing, problem.initial)
        assert outputs.shape == (2, 0, 3, 9)
        assert torch.equal(final_state, problem.initial)


def test_one_erase_factor_alone_is_refused():
    rec = make().recurrence
    for alone in ("a", "b"):
        with pytest.raises(ValueError, match="both erase factors"):
            Recurrence(rec.q, rec.g, rec.k, rec.v, **{alone: rec.k})


@pytest.mark.parametrize("decays", [True, False], ids=["gated", "plain"])
def test_delta_nets_in_their_own_words(decays: bool):
    """Decay, then write what the key does not hold yet. (The mixers' tests compare layers as published.)"""
    problem = make(length=77, decay="mixed" if decays else "none", initial=False)
    q, g, k, v = (getattr(problem.recurrence, name) for name in "qgkv")
    beta = uniform(problem.generator, *g.shape)
    state, expected = torch.zeros(2, 3, 6, 9, dtype=torch.float64), []
    for t in range(77):
        state = g[:, t, :, None, None].exp() * state
        news = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], news)
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    outputs, final = scan(Recurrence(q, g, k, beta[..., None] * v, a=-g.exp() * beta, b=k))
    assert_close(outputs, torch.stack(expected, 1), 1e-10)
    assert_close(final, state, 1e-10)


# Gradients.


@given(problems(batch=2))
def test_gradients_equal_autograd_through_the_loop(problem: Problem):
    assert_gradients(problem)


# States and reads anywhere.


def states_before(problem: Problem, states: Tensor) -> Tensor:
    """S_{t-1} of every token."""
    first = torch.zeros_like(states[:, :1]) if problem.initial is None else problem.initial.double()[:, None]
    return torch.cat([first, states[:, :-1]], 1)


@given(problems())
def test_states_equal_the_loop(problem: Problem):
    trajectory = Trajectory(problem.recurrence, problem.initial, chunk_size=problem.chunk_size)
    assert_close(trajectory.states(), problem.loop().states, problem.tolerance)


@given(problems())
def test_reads_of_any_vector_after_and_before_a_token(problem: Problem):
    trajectory = Trajectory(problem.recurrence, problem.initial, chunk_size=problem.chunk_size)
    reads = problem.random(*problem.recurrence.q.shape)
    truth = problem.loop()
    earlier = states_before(problem, truth.states)
    for before, states in ((False, truth.states), (True, earlier)):
        expected = torch.einsum("bthkv,bthk->bthv", states, reads.double())
        scale = float(states.abs().max())
        assert_close(trajectory.read(reads, before=before), expected, problem.tolerance, scale)


@given(problems(dtype=torch.float64))
def test_pull_back_reads_the_state_before_through_the_transition(problem: Problem):
    """S_t^T r = S_{t-1}^T (T_t^T r) + W_t^T r, whatever the read."""
    rec, truth = problem.recurrence, problem.loop()
    reads = problem.random(*rec.q.shape)
    earlier = states_before(problem, truth.states)
    carried = torch.einsum("bthkv,bthk->bthv", earlier, rec.pull_back(reads))
    written = torch.einsum("bthkv,bthk->bthv", truth.writes, reads)
    expected = torch.einsum("bthkv,bthk->bthv", truth.states, reads)
    assert_close(carried + written, expected, 1e-9)


# Responses to edits.


@given(problems(), st.floats(0, 1), st.booleans())
def test_response_to_edited_writes(problem: Problem, share: float, low_rank: bool):
    """Full-rank or rank-1 changes of a share of all (batch, position, head)."""
    native = problem.loop()
    shape = native.writes.shape
    difference = problem.random(*shape)
    if low_rank:
        difference = problem.random(*shape[:-1], 1) * problem.random(*shape[:-2], 1, shape[-1])
    edited_here = uniform(problem.generator, *shape[:3]) <= share
    difference = difference * edited_here[..., None, None]
    assert_response(problem, difference, native, problem.loop(native.writes + difference), drawn=True)


@given(problems(), st.floats(0, 1), st.floats(0, 1))
def test_response_to_set_states(problem: Problem, share: float, writes_share: float):
    """Some states set, some other writes edited: what was before a set state no longer matters."""
    native = problem.loop()
    shape = native.writes.shape
    is_set = uniform(problem.generator, *shape[:3]) <= share
    is_edited = uniform(problem.generator, *shape[:3]) <= writes_share
    new_states = problem.random(*shape).double()
    new_writes = torch.where(is_edited[..., None, None], problem.random(*shape).double(), native.writes)
    edited = problem.loop(new_writes, (new_states, is_set))
    difference = torch.where(
        is_set[..., None, None], new_states - native.states, new_writes - native.writes
    ).to(problem.recurrence.dtype)
    assert_response(problem, difference, native, edited, is_set, drawn=True)


@pytest.mark.parametrize("erase", ["none", "multiple", "removal"])
def test_gradient_of_a_response(erase: str):
    problem = make(length=40, erase=erase, chunk_size=16)
    difference = problem.random(*problem.loop().writes.shape).requires_grad_()
    outputs, final = respond(problem.recurrence, difference, chunk_size=16)
    weights, final_weights = problem.random(*outputs.shape), problem.random(*final.shape)
    (found,) = torch.autograd.grad((outputs * weights).sum() + (final * final_weights).sum(), difference)
    writes = difference.detach().clone().requires_grad_()
    truth = problem.loop(writes)
    (expected,) = torch.autograd.grad(
        (truth.outputs * weights).sum() + (truth.final_state * final_weights).sum(), writes
    )
    assert_close(found, expected, 1e-9)


# Low precision outside, float32 inside.


def engine(recurrence: Recurrence, initial: Tensor | None, what: str) -> tuple[Tensor, ...]:
    """One of the engine's computations."""
    if what == "scan":
        return scan(recurrence, initial)
    if what == "scan_sequential":
        return scan_sequential(recurrence, initial)
    if what == "pull_back":
        return (recurrence.pull_back(recurrence.q),)
    trajectory = Trajectory(recurrence, initial)
    if what == "trajectory":
        return trajectory.states(), trajectory.read(recurrence.q, before=True)
    halved = trajectory.states() / -2
    return (*respond(recurrence, halved), respond_states(recurrence, halved))


@pytest.mark.parametrize("what", ["scan", "scan_sequential", "trajectory", "pull_back", "respond"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("erase", ["none", "multiple", "removal"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_inputs_and_autocast_are_computed_in_float32(
    autocast: bool, erase: str, per_channel: bool, what: str
):
    """As good as in float64, where the tests above compare the same computations with the loop."""
    problem = make(erase=erase, per_channel=per_channel, dtype=torch.float32)
    recurrence = problem.recurrence if autocast else problem.recurrence.map(lambda x: x.bfloat16())
    expected = engine(recurrence.map(lambda x: x.double()), problem.initial.double(), what)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == autocast  # it is on
        found = engine(recurrence, problem.initial, what)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert_close(x, y, 1e-4)


def test_float64_gates_among_float32_vectors():
    """A float64 log decay is no reason to compute in float64, nor to lose it."""
    problem = make(erase="multiple", dtype=torch.float32)
    wide = dataclasses.replace(problem.recurrence, g=problem.recurrence.g.double())
    outputs, _ = scan(wide, problem.initial)
    assert outputs.dtype == torch.float32
    assert_close(outputs, problem.loop().outputs, 1e-4)
