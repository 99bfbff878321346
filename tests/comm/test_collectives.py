"""Collectives along axes: uneven parts, autograd pairs, asynchronous calls, counts."""

from __future__ import annotations

import pytest
import torch

from pyparallel.comm.collectives import (
    all_gather,
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    all_to_all,
    broadcast_raw,
    copy_to_group,
    count_collectives,
    reduce_scatter,
    reduce_scatter_raw,
    split,
)
from pyparallel.comm.group import Group
from pyparallel.cut.shard import part_sizes
from pyparallel.testing import assert_equal, integers, run_ranks

DTYPES = (torch.float32, torch.bfloat16)


def calls(counter) -> dict[str, int]:
    return {name: count for name, count in counter.items() if isinstance(name, str)}


def pairs(group: Group) -> None:
    """Each function and its gradient, against one process that holds every rank's tensors.

    Of a function's outputs y_r with gradients g_r, the truth is the gradient of sum(y_r g_r) over all
    ranks by each rank's input; a replicated output counts once.
    """
    ranks, rank = group.size, group.rank
    for dtype in DTYPES:
        for length in (7, 3 * ranks, 1, 0):
            for dim in (0, 1, -1):
                sizes = part_sizes(length, ranks)
                shape = [2, 3, 4]
                shape[dim] = length
                what = f"{dtype} {length} dim={dim}"
                whole = [integers(*shape, seed=r, dtype=dtype) for r in range(ranks)]
                grads = [integers(*shape, seed=9 + r, dtype=dtype) for r in range(ranks)]
                pieces = [t.split(sizes, dim) for t in whole]
                shards = [p[r] for r, p in enumerate(pieces)]
                joined = torch.cat(shards, dim)
                total, total_grad = sum(whole), sum(grads)
                mine = total_grad.split(sizes, dim)[rank]
                gathered_grads = torch.cat(
                    [g.split(sizes, dim)[r] for r, g in enumerate(grads)], dim
                )

                def leaf(tensor):
                    return tensor.clone().requires_grad_()

                def check(name, x, y, value, dy, dx, fwd, bwd, what=what):
                    assert_equal(y, value, f"{name} {what}")
                    with count_collectives() as counter:
                        (actual,) = torch.autograd.grad(y, x, dy)
                    assert_equal(actual, dx, f"{name} gradient {what}")
                    assert calls(counter) == ({bwd: 1} if bwd and ranks > 1 else {}), name
                    assert calls(fwd) == ({name.split()[0]: 1} if ranks > 1 else {}), name

                own_grad = grads[rank].split(sizes, dim)[rank]
                x = leaf(whole[rank])
                with count_collectives() as fwd:
                    y = all_reduce(x, group)
                check("all_reduce", x, y, total, grads[0], grads[0], fwd, None)

                x = leaf(whole[0])
                y = copy_to_group(x, group)
                assert_equal(y, whole[0], what)
                with count_collectives() as counter:
                    (dx,) = torch.autograd.grad(y, x, grads[rank])
                assert_equal(dx, total_grad, f"copy_to_group gradient {what}")
                assert calls(counter) == ({"all_reduce": 1} if ranks > 1 else {})

                x = leaf(shards[rank])
                with count_collectives() as fwd:
                    y = all_gather(x, group, dim=dim, sizes=sizes)
                check("all_gather", x, y, joined, grads[rank], mine, fwd, "reduce_scatter")
                with count_collectives() as fwd:
                    y = all_gather(x, group, dim=dim, sizes=sizes, grad="split")
                dx = grads[0].split(sizes, dim)[rank]
                check("all_gather split", x, y, joined, grads[0], dx, fwd, None)

                x = leaf(whole[rank])
                with count_collectives() as fwd:
                    y = reduce_scatter(x, group, dim=dim, sizes=sizes)
                value = total.split(sizes, dim)[rank]
                check("reduce_scatter", x, y, value, own_grad, gathered_grads, fwd, "all_gather")

                x = leaf(whole[0])
                y = split(x, group, dim=dim, sizes=sizes)
                assert_equal(y, whole[0].split(sizes, dim)[rank], f"split {what}")
                (dx,) = torch.autograd.grad(y, x, own_grad)
                assert_equal(dx, gathered_grads, f"split gradient {what}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_pairs_along_every_axis(ranks):
    run_ranks(pairs, ranks)


def exchange(group: Group) -> None:
    """Sequence shards become head shards and back, both uneven: Ulysses."""
    ranks, rank = group.size, group.rank
    for dtype in DTYPES:
        for seq, heads in ((7, 9), (4, 4), (2, 5), (8, 1)):
            seqs, parts = part_sizes(seq, ranks), part_sizes(heads, ranks)
            whole = integers(2, seq, heads, 3, seed=1, dtype=dtype)
            grad = integers(2, seq, heads, 3, seed=2, dtype=dtype)
            x = whole.split(seqs, 1)[rank].clone().requires_grad_()
            options = {"split_dim": 2, "join_dim": 1, "split_sizes": parts, "join_sizes": seqs}
            with count_collectives() as counter:
                y = all_to_all(x, group, **options)
                assert_equal(y, whole.split(parts, 2)[rank], f"{seq} {heads}")
                (dx,) = torch.autograd.grad(y, x, grad.split(parts, 2)[rank])
            assert_equal(dx, grad.split(seqs, 1)[rank], f"{seq} {heads} gradient")
            assert calls(counter) == ({"all_to_all": 2} if ranks > 1 else {})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_to_all_changes_the_axis_that_is_cut(ranks):
    run_ranks(exchange, ranks)


def raw(group: Group) -> None:
    ranks, rank = group.size, group.rank
    for dtype in DTYPES:
        parts = [integers(3, r + 1, seed=r, dtype=dtype) for r in range(ranks)]
        sizes = [r + 1 for r in range(ranks)]
        whole = [integers(3, sum(sizes), seed=20 + r, dtype=dtype) for r in range(ranks)]
        # All three under way at once; not contiguous where a transpose makes them so.
        gathered = all_gather_raw(parts[rank], group, dim=1, sizes=sizes, async_op=True)
        across = whole[rank].t().contiguous().t()
        scattered = reduce_scatter_raw(across, group, dim=1, sizes=sizes, async_op=True)
        reduced = all_reduce_raw(whole[rank].clone(), group, async_op=True)
        total = sum(whole)
        assert_equal(reduced.wait(), total, "all_reduce")
        assert_equal(scattered.wait(), total.split(sizes, 1)[rank], "reduce_scatter")
        assert_equal(gathered.wait(), torch.cat(parts, 1), "all_gather")
        assert_equal(gathered.wait(), torch.cat(parts, 1), "all_gather, waited twice")
        largest = all_reduce_raw(whole[rank].clone(), group, op="max")
        assert_equal(largest, torch.stack(whole).amax(0), "max")
        assert_equal(broadcast_raw(parts[0] + rank, group, src=0), parts[0], "broadcast")
        with count_collectives() as outer:
            all_reduce_raw(whole[rank].clone(), group)
            with count_collectives() as inner:
                all_gather_raw(parts[rank], group, dim=1, sizes=sizes)
        assert calls(inner) == {"all_gather": 1} and calls(outer) == {
            "all_reduce": 1,
            "all_gather": 1,
        }
        assert outer["all_reduce", "bytes"] == total.numel() * total.itemsize
        assert outer["all_gather", "bytes"] == 3 * sum(sizes) * total.itemsize


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_raw_collectives_run_asynchronously_and_are_counted(ranks):
    run_ranks(raw, ranks)


def refused(group: Group) -> None:
    x = torch.ones(7, 4)
    with pytest.raises(ValueError, match="axis 0 of length 7 does not divide by 2 ranks"):
        reduce_scatter(x, group)
    with pytest.raises(ValueError, match=r"sizes \[3, 3\] do not fit axis 0 of length 7"):
        split(x, group, sizes=[3, 3])
    with pytest.raises(ValueError, match=r"sizes \[7\] do not fit"):
        all_gather(x, group, sizes=[7])
    with pytest.raises(ValueError, match="join_dim: expected another axis than split_dim=0"):
        all_to_all(x, group, split_dim=0, join_dim=-2)
    with pytest.raises(ValueError, match="op: expected one of sum, max, min, got 'mean'"):
        all_reduce_raw(x, group, op="mean")
    with pytest.raises(ValueError, match="op: expected 'sum' for a tensor that needs a gradient"):
        all_reduce(x.requires_grad_(), group, op="max")
    with pytest.raises(ValueError, match="grad: expected 'reduce_scatter' or 'split', got 'sum'"):
        all_gather(x, group, grad="sum")


def test_what_does_not_fit_is_refused_before_anything_is_sent():
    run_ranks(refused, 2)
