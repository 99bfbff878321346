"""The table's ``triton`` rows that communicate, over ranks of the engine's shared memory.

Inputs are small integers, so every sum is exact and equality is to the bit."""

import pytest
import torch
from test_whole_model import count_launches
from torch.nn import functional as F

from pyparallel import backend
from pyparallel.comm.collectives import (
    all_gather_raw,
    all_reduce_raw,
    count_collectives,
    reduce_scatter_raw,
)
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.symmetric_regions import symmetric_memory
from pyparallel.layers.norm import RMSNorm
from pyparallel.layers.parallel_mlp import ParallelMLP
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.ops.all_gather_linear import all_gather_linear
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.ops.row_parallel_linear import row_parallel_linear
from pyparallel.testing import assert_equal, integers, normals, run_ranks

K, M = 6, 7


def sizes_of(group):
    """Tokens and features of each rank: uneven, and of three ranks one without tokens."""
    tokens = [5, 2] if group.size == 2 else [4, 0, *[3] * (group.size - 2)]
    return tokens, [3 + 5 * (rank % 2) for rank in range(group.size)]


def linears(group, lead, dtype, device):
    """Every parallel linear op, forward and backward, beside one process's."""
    tokens, features = sizes_of(group)

    def whole_numbers(*shape, seed):
        return integers(*shape, seed=seed, dtype=dtype).to(device)

    rank, total = group.rank, sum(tokens)
    whole = whole_numbers(*lead, total, K, seed=1)
    column = whole_numbers(sum(features), K, seed=2)
    row = whole_numbers(M, sum(features), seed=3)
    bias = whole_numbers(M, seed=4)
    wide = whole_numbers(*lead, total, sum(features), seed=5)
    grad_wide = whole_numbers(*lead, total, sum(features), seed=6)
    grad = whole_numbers(*lead, total, M, seed=7)

    def own(x, sizes, dim):
        return x.split(sizes, dim)[rank].clone().requires_grad_()

    def check(y, leaves, dense, dense_leaves, dy, parts):
        """y and the leaves' gradients are this rank's parts of the dense ones."""
        y.backward(parts[0](dy).contiguous())
        dense.backward(dy)
        assert_equal(y, parts[0](dense), "y")
        for leaf, dense_leaf, part in zip(leaves, dense_leaves, parts[1:], strict=True):
            assert_equal(leaf.grad, part(dense_leaf.grad), "gradient")

    def part(sizes, dim):
        return lambda t: t.split(sizes, dim)[rank]

    def same(t):
        return t

    def dense(*tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return leaves, F.linear(*leaves)

    of_tokens, of_features = part(tokens, -2), part(features, -1)
    rows_of = part(features, 0)

    b = whole_numbers(sum(features), seed=8)
    leaves, y = dense(whole, column, b)
    mine = [own(whole, tokens, -2), own(column, features, 0), own(b, features, 0)]
    ours = all_gather_linear(*mine, group=group, sizes=tokens)
    check(ours, mine, y, leaves, grad_wide, [of_features, of_tokens, rows_of, rows_of])

    leaves, y = dense(whole, column, b)
    mine = [whole.clone().requires_grad_(), own(column, features, 0), own(b, features, 0)]
    ours = column_parallel_linear(*mine, group=group)
    check(ours, mine, y, leaves, grad_wide, [of_features, same, rows_of, rows_of])

    leaves, y = dense(wide, row, bias)
    mine = [own(wide, features, -1), own(row, features, 1), bias.clone().requires_grad_()]
    ours = linear_reduce_scatter(*mine, group=group, sizes=tokens)
    check(ours, mine, y, leaves, grad, [of_tokens, of_features, part(features, 1), same])

    leaves, y = dense(wide, row, bias)
    mine = [own(wide, features, -1), own(row, features, 1), bias.clone().requires_grad_()]
    ours = row_parallel_linear(*mine, group=group)
    check(ours, mine, y, leaves, grad, [same, of_features, part(features, 1), same])


def collectives(group, device):
    """Uneven parts along an inner axis; sums in rank order; what kernels don't take, by the engine."""
    tokens, _ = sizes_of(group)
    for dtype in (torch.float32, torch.bfloat16):
        xs = [normals(3, sum(tokens), 2, seed=r, dtype=dtype) for r in range(group.size)]
        xs = [x.to(device) for x in xs]
        total = torch.zeros(xs[0].shape, device=device)
        for x in xs:
            total += x
        total = total.to(dtype)
        launches = count_launches()
        assert_equal(all_reduce_raw(xs[group.rank].clone(), group), total, "all_reduce")
        part = total.split(tokens, 1)[group.rank]
        options = {"dim": 1, "sizes": tokens}
        pending = reduce_scatter_raw(xs[group.rank], group, async_op=True, **options)
        assert_equal(pending.wait(), part, "reduce_scatter")
        assert_equal(all_gather_raw(part, group, **options), total, "all_gather")
        names = {"all_reduce_one_shot_kernel", "reduce_scatter_kernel", "all_gather_kernel"}
        assert set(launches) == names, launches
    launches.clear()
    largest = torch.stack(xs).amax(0)
    assert_equal(all_reduce_raw(xs[group.rank].clone(), group, op="max"), largest, "max")
    ranks = all_gather_raw(torch.tensor([group.rank], device=device), group)
    assert ranks.tolist() == list(range(group.size)) and not launches


def regions_grow(group, device):
    """A call that does not fit gets a larger region, and the protocol starts anew."""
    x = torch.full((1 << 20,), 2.0**group.rank, device=device)
    first = symmetric_memory(x, group, 8)
    small = all_reduce_raw(x[:64].clone(), group)
    large = all_reduce_raw(x.clone(), group)
    again = all_reduce_raw(x[:64].clone(), group)
    assert symmetric_memory(x, group, 8) is not first
    expected = 2.0**group.size - 1
    assert (small == expected).all() and (large == expected).all() and (again == expected).all()


def fused_layers(group, device):
    """gated_mlp and all_reduce_residual_rms_norm beside the ops that they stand for."""
    results = []
    for name in ("triton", "torch"):
        with backend.use(name):
            torch.manual_seed(0)
            mlp = ParallelMLP(K, 11, "swiglu", group=group).to(device)
            out = RowParallelLinear(10, K, False, group=group).to(device)
            norm = RMSNorm(K, 1e-5).to(device)
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            sizes = out.shardings["weight"].sizes
            o = normals(2, 3, 10, seed=1).split(sizes, -1)[group.rank].to(device).requires_grad_()
            residual = normals(2, 3, K, seed=2).to(device).requires_grad_()
            with count_collectives() as counted:
                normed, h = out.add_and_norm(o, residual, norm)
                y = h + mlp(normed)
                y.backward(normals(2, 3, K, seed=3).to(device))
            assert counted["all_reduce"] == 3, counted
            tensors = [o, residual, *mlp.parameters(), *out.parameters(), *norm.parameters()]
            results.append([y, h, *(t.grad for t in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def everything(group, device):
    launches = count_launches()
    with backend.use("triton"):
        for lead in ((), (1,), (2, 3)):
            linears(group, lead, torch.float32, device)
        linears(group, (2,), torch.bfloat16, device)
        names = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
        found = [launches[f"{name}_kernel"] for name in names]
        # Four times: forward of one op and backward of another.
        assert found == [8, 8, 8], launches
        collectives(group, device)
        regions_grow(group, device)
    launches.clear()
    fused_layers(group, device)
    assert launches["gated_mlp_kernel"] == 1, launches
    assert launches["all_reduce_residual_rms_norm_kernel"] == 1, launches
    return True


@pytest.mark.parametrize("ranks", [2, 3])
def test_fused_and_plain_are_the_dense_model(ranks):
    assert run_ranks(everything, ranks, "cpu", timeout_s=100) == [True] * ranks


def waits_in_vain(group):
    """Rank 1 makes no call: the other one says so, in the group's own kind of error."""
    x = torch.ones(8)
    memory = symmetric_memory(x, group, 8)
    memory.timeout_ns = int(0.2e9)
    message = ""
    if group.rank == 0:
        with backend.use("triton"), pytest.raises(PeerError) as caught:
            all_reduce_raw(x, group)
        message = str(caught.value)
    group.communicator.barrier()
    return message


def test_a_rank_that_does_not_come():
    message = run_ranks(waits_in_vain, 2)[0]
    assert "all_reduce: rank 0 of 2 waited 0.2 s" in message and "for rank 1" in message


def test_only_where_asked_for():
    x, single = torch.ones(4), Group.single()
    reason = backend.row("all_reduce", "triton").reason
    assert "asked for" in reason(x, single)
    with backend.use("triton"):
        assert reason(x, single) == "the group has one rank"
        assert "no max" in reason(x, single, "max")
    assert backend.offered("all_reduce", x, single) is None
    assert "asked for" in backend.row("gated_mlp", "triton").reason(x, x, "silu", single)
