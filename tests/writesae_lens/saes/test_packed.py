"""Packed writes against the matrices themselves: the same numbers, whatever is done to them."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from writesae_lens import WriteSAEError
from writesae_lens.saes.packed import PackedWrites, Write

HEADS = {"one": [(3, 5)], "two": [(3, 5), (4, 2)], "three": [(2, 3), (3, 2), (1, 4)]}

sides = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)
bounds = st.one_of(st.none(), st.integers(-40, 40))


def pair(batch, heads, dtype=torch.float32, seed=0):
    """Packed writes and the numbers that they stand for, from loops over the factors."""
    rng = torch.Generator().manual_seed(seed)
    blocks = [
        Write(
            torch.randn(*batch, 1, d_k, generator=rng).to(dtype),
            torch.randn(*batch, 1, d_v, generator=rng).to(dtype),
        )
        for d_k, d_v in heads
    ]
    columns = [
        block.key[..., 0, i] * block.value[..., 0, j]
        for block, (d_k, d_v) in zip(blocks, heads)
        for i in range(d_k)
        for j in range(d_v)
    ]
    return PackedWrites(*blocks), torch.stack(columns, dim=-1)


def plain(x):
    return x.dense() if isinstance(x, PackedWrites) else x


def check(ours, theirs, packed=None):
    """The same numbers, shape and dtype; ``packed`` says whether they must still be in factors."""
    assert type(theirs) is torch.Tensor
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert plain(ours).dtype == theirs.dtype
    torch.testing.assert_close(plain(ours), theirs)
    if packed is not None:
        assert isinstance(ours, PackedWrites) == packed


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("batch", [(4,), (2, 3), (0,), ()])
def test_shape_and_numbers_are_those_of_the_matrices(batch, heads):
    x, dense = pair(batch, heads)
    check(x, dense, packed=True)
    assert (x.dtype, x.device, x.requires_grad) == (dense.dtype, dense.device, False)
    assert x.numel() == dense.numel()


# What the store, the mixing buffer and the trainer do with rows: the factors must survive it.
KEPT = {
    "reshape to rows": lambda x: x.reshape(-1, x.shape[-1]),
    "view": lambda x: x.view(3, 2, x.shape[-1]),
    "flatten": lambda x: x.flatten(0, 1),
    "first axis": lambda x: x[1:],
    "second axis": lambda x: x[:, -2:],
    "step": lambda x: x[:, ::2],
    "empty": lambda x: x[2:2],
    "shuffle": lambda x: x.reshape(-1, x.shape[-1])[torch.tensor([3, 0, 5, 1, 2, 4])],
    "repeated rows": lambda x: x[:, [0, 2, 2, -1]],
    "two-axis index": lambda x: x[torch.tensor([[0, 1], [1, 1]])],
    "mask": lambda x: x.reshape(-1, x.shape[-1])[torch.tensor([True, False, True, True, False, False])],
    "mask of two axes": lambda x: x[torch.tensor([[True, False, True], [False, False, True]])],
    "empty mask": lambda x: x[torch.zeros(2, dtype=torch.bool)],
    "rows side by side": lambda x: torch.cat([x, x[1:], x], dim=0),
    "rows on another axis": lambda x: torch.cat([x, x[:, :1]], dim=1),
    "columns side by side": lambda x: torch.cat([x, x * 2], dim=-1),
    "columns, axis from the front": lambda x: torch.cat([x, x], dim=2),
    "float64": lambda x: x.to(torch.float64),
    "device and dtype": lambda x: x.to("cpu", torch.float64),
    "same dtype": lambda x: x.to(torch.float32),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "scale": lambda x: x * 2.5,
    "scale from the left": lambda x: 2.5 * x,
    "scale by a tensor": lambda x: x * torch.tensor(-0.5),
    "scale by a tensor of another dtype": lambda x: x * torch.tensor(3.0, dtype=torch.float64),
    "scale by zero": lambda x: x * 0,
    "deepcopy": copy.deepcopy,
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("operation", KEPT.values(), ids=KEPT)
def test_rows_travel_as_factors(operation, heads):
    x, dense = pair((2, 3), heads)
    check(operation(x), operation(dense), packed=True)
    check(x, dense)  # and leave what they came from alone


@pytest.mark.parametrize("operation", KEPT.values(), ids=KEPT)
def test_reads_stay_with_their_writes(operation):
    """All entries of a row's value are its number n, those of its three reads n, n + 100 and n + 200."""
    number, later = torch.arange(6.0).view(2, 3, 1, 1), torch.tensor([[0.0], [100.0], [200.0]])
    x = PackedWrites(
        Write(torch.ones(2, 3, 1, 4), number.expand(2, 3, 1, 5), (number + later).expand(2, 3, 3, 4), (1, 4)),
        Write(torch.ones(2, 3, 1, 2), torch.ones(2, 3, 1, 2)),
    )
    with_reads, without = operation(x).blocks[:2]
    assert (with_reads.distances, without.reads) == ((1, 4), None)
    wanted = with_reads.value[..., :1] + later.to(with_reads.value)
    torch.testing.assert_close(with_reads.reads, wanted.expand(with_reads.reads.shape))
    assert with_reads.reads.shape == (*with_reads.value.shape[:-2], 3, 4)


def test_rows_that_are_read_at_other_distances_keep_the_own_read_in_common():
    def rows(n_reads, distances):
        return PackedWrites(
            Write(torch.ones(2, 1, 3), torch.ones(2, 1, 4), torch.randn(2, n_reads, 3), distances)
        )

    first, other, bare = rows(3, (1, 2)), rows(3, (1, 4)), PackedWrites(*pair((2,), [(3, 4)])[0].blocks)
    both = torch.cat([first, other]).blocks[0]
    assert both.distances == ()
    assert torch.equal(both.reads, torch.cat([x.blocks[0].reads[:, :1] for x in (first, other)]))
    assert torch.cat([first, bare]).blocks[0].reads is None
    same = torch.cat([first, first]).blocks[0]
    assert same.distances == (1, 2)
    assert torch.equal(same.reads, first.blocks[0].reads.repeat(2, 1, 1))


def test_reads_are_picked_by_their_distance():
    write = Write(torch.ones(2, 1, 3), torch.ones(2, 1, 4), torch.randn(2, 4, 3), (1, 4, 16))
    assert torch.equal(write.reads_at((16, 1)), write.reads[:, [0, 3, 1]])
    assert torch.equal(write.reads_at((2, 4)), write.reads[:, [0, 2]])
    assert torch.equal(write.reads_at(()), write.reads[:, :1])
    assert torch.equal(write._replace(distances=None).reads_at((2,)), write.reads)
    assert Write(write.key, write.value).reads_at((1,)) is None


# Anything else builds the matrices, and gets them right.
BUILT = {
    "matmul": lambda x: x @ x.mT,
    "einsum": lambda x: torch.einsum("abi,cbi->ac", x, x),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(0),
    "norm": lambda x: x.norm(dim=-1),
    "minus": lambda x: -x,
    "difference": lambda x: x - 1.5,
    "square": lambda x: x * x,
    "product with a vector": lambda x: x * torch.arange(x.shape[-1]),
    "product with one number in a list": lambda x: x * torch.tensor([2.0]),
    "product from the left": lambda x: torch.mul(torch.tensor(2.0), x),
    "quotient": lambda x: x / 3,
    "new axis": lambda x: x[:, None],
    "new axis in front": lambda x: x[None],
    "one row": lambda x: x[1],
    "last row": lambda x: x[-1, -1],
    "everything": lambda x: x[:],
    "all columns": lambda x: x[..., :],
    "one column": lambda x: x[..., 0],
    "columns by number": lambda x: x[..., torch.tensor([0, -1])],
    "columns by step": lambda x: x[..., ::2],
    "columns backwards to nothing": lambda x: x[..., 3:1],
    "all but the first column": lambda x: x[..., 1:],
    "all in one": lambda x: x.flatten(),
    "another width": lambda x: x.reshape(6, -1)[:, :3].reshape(9, 2),
    "width inferred": lambda x: x.view(6, -1),
    "transposed": lambda x: x.transpose(0, 1),
    "permuted and put in rows": lambda x: x.permute(1, 0, 2).reshape(-1, x.shape[-1]),
    "stack": lambda x: torch.stack([x, x]),
    "with dense rows": lambda x: torch.cat([x, torch.ones_like(x)]),
    "squeeze": lambda x: x[:1].squeeze(0),
    "expand": lambda x: x.expand(4, *x.shape),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "split": lambda x: x.split(2, dim=1)[1],
    "unbind": lambda x: list(x)[1],
    "where": lambda x: torch.where(x > 0, x, 0),
    "mask of numbers": lambda x: x[x > 0],
    "mask of the last two axes": lambda x: x[:, plain(x)[0] > 0],
    "compare": lambda x: x == x,
    "sort": lambda x: x.sort(dim=-1).values,
    "finite": lambda x: torch.isfinite(x),
    "zeros like": lambda x: torch.zeros_like(x),
    "whole numbers": lambda x: (3 * x).long(),
    "truth values": lambda x: x.bool(),
    "imaginary": lambda x: (x * 1j).imag,
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("operation", BUILT.values(), ids=BUILT)
def test_every_other_operation_sees_the_matrices(operation, heads):
    x, dense = pair((2, 3), heads)
    check(operation(x), operation(dense))


@given(sides, bounds, bounds, st.integers(1, 3))
def test_slices_of_columns_are_those_of_the_matrices(heads, start, end, step):
    x, dense = pair((3,), heads)
    check(x[:, start:end:step], dense[:, start:end:step])
    check(x[:, start:end:step].sum(), dense[:, start:end:step].sum())


@given(sides, bounds, bounds, st.integers(1, 3), st.sampled_from([0, 1, -3, -2]))
def test_slices_of_rows_are_those_of_the_matrices(heads, start, end, step, axis):
    x, dense = pair((3, 5), heads)
    here = (slice(None),) * (axis % 3) + (slice(start, end, step),)
    check(x[here], dense[here])
    if step == 1 and start is not None and 0 <= start < dense.shape[axis]:
        length = dense.shape[axis] - start
        check(x.narrow(axis, start, length), dense.narrow(axis, start, length))


@given(sides, st.lists(st.integers(-6, 5), max_size=8), st.lists(st.booleans(), min_size=6, max_size=6))
def test_indexed_rows_are_those_of_the_matrices(heads, rows, mask):
    x, dense = pair((6,), heads)
    rows, mask = torch.tensor(rows, dtype=torch.long), torch.tensor(mask)
    check(x[rows], dense[rows], packed=True)
    check(x[mask], dense[mask], packed=True)
    check(x[rows][..., None], dense[rows][..., None])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=3))
def test_heads_put_side_by_side_come_apart_again(heads):
    """What `mixing_buffer` does with several hooks: columns together, rows shuffled, columns apart."""
    parts = [pair((5,), [head], seed=n) for n, head in enumerate(heads)]
    packed = torch.cat([x for x, _ in parts], dim=1)
    order = torch.tensor([4, 2, 0, 1])
    shuffled = torch.cat([packed, packed])[order]
    edge = 0
    for (_, dense), (d_k, d_v) in zip(parts, heads):
        check(shuffled[:, edge : edge + d_k * d_v], dense[order], packed=True)
        edge += d_k * d_v


@given(sides, st.integers(1, 30))
def test_reshaping_to_any_width_keeps_the_order_of_the_numbers(heads, width):
    x, dense = pair((6,), heads)
    if dense.numel() % width:
        with pytest.raises(RuntimeError):
            x.reshape(-1, width)
    else:
        check(x.reshape(-1, width), dense.reshape(-1, width))
        check(x.view(dense.numel() // width, width), dense.reshape(-1, width))


def test_heads_of_other_shapes_but_the_same_width_are_not_taken_for_each_other():
    (x, dense), (y, other) = pair((4,), [(2, 6)]), pair((4,), [(3, 4)], seed=1)
    check(torch.cat([x, y]), torch.cat([dense, other]))
    check(torch.cat([x, y], dim=1), torch.cat([dense, other], dim=1), packed=True)
    two, both = pair((4,), [(2, 3), (1, 6)], seed=2)
    check(torch.cat([x, two]), torch.cat([dense, both]))


@pytest.mark.parametrize("axis", [0, 1])
def test_putting_two_dtypes_together_promotes_as_torch_does(axis):
    (x, dense), (y, other) = pair((4,), [(2, 6)]), pair((4,), [(2, 6)], torch.float64, seed=1)
    check(torch.cat([x, y], dim=axis), torch.cat([dense, other], dim=axis))
    check(torch.cat([y, x], dim=axis), torch.cat([other, dense], dim=axis))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.view(5, 4),
        lambda x: x.reshape(-1, 7),
        lambda x: x[4],
        lambda x: x[torch.tensor([9])],
        lambda x: x[torch.tensor([True])],
        lambda x: torch.cat([x, x[:2]], dim=1),
        lambda x: torch.cat([x, x[:, :5]], dim=0),
        lambda x: torch.cat([x, x[None]], dim=0),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x @ x,
    ],
)
def test_what_torch_refuses_is_refused(operation):
    x, dense = pair((4,), [(3, 5)])
    for either in (dense, x):
        with pytest.raises((RuntimeError, IndexError)):
            operation(either)


CHANGES = {
    "mul_": lambda x: x.mul_(2),
    "add_": lambda x: x.add_(1),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(3),
    "a row": lambda x: x.__setitem__(0, 7.0),
    "a mask": lambda x: x.__setitem__(torch.tensor([True, False, False, True]), 0.0),
    "copy_": lambda x: x.copy_(torch.ones(4, 15)),
    "out": lambda x: torch.add(torch.ones(4, 15), 1, out=x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_made_or_refused_but_never_lost(change):
    x, dense = pair((4,), [(3, 5)])
    change(dense)
    try:
        change(x)
    except WriteSAEError:
        return
    torch.testing.assert_close(plain(x), dense)


def test_numbers_leave_as_numpy_as_lists_and_into_dense_tensors():
    x, dense = pair((4,), [(3, 5), (2, 2)])
    np.testing.assert_allclose(x.numpy(), dense.numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(x), dense.numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.array(x.tolist()), dense.numpy(), rtol=1e-6)
    np.testing.assert_allclose(x[0].tolist(), dense[0].numpy(), rtol=1e-6)
    assert x[1, 2].item() == pytest.approx(dense[1, 2].item())
    held = torch.zeros(2, 4, 19)
    held[1] = x
    check(held[1], dense)
    assert "shape=(4, 19), heads=2" in repr(x)
    assert "heads=2" in f"{x}"


def test_a_copy_a_file_and_a_half_are_the_same_writes():
    x, dense = pair((4,), [(3, 5), (2, 2)])
    twin = copy.deepcopy(x)
    check(twin, dense, packed=True)
    assert twin.blocks[0].key.data_ptr() != x.blocks[0].key.data_ptr()
    assert x.clone().blocks[1].value.data_ptr() != x.blocks[1].value.data_ptr()
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    check(torch.load(file, weights_only=False), dense)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert half.dtype == plain(half).dtype == dtype
        # Two factors rounded and their product: three roundings, where the matrix has one.
        torch.testing.assert_close(plain(half).float(), dense, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_gradients_flow_through_what_is_built_from_packed_writes():
    x, dense = pair((4,), [(3, 5)])
    weight = torch.randn(15, 2, requires_grad=True)
    (ours,) = torch.autograd.grad((x @ weight).square().sum(), weight)
    (theirs,) = torch.autograd.grad((dense @ weight).square().sum(), weight)
    torch.testing.assert_close(ours, theirs)
