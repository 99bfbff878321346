"""ColumnParallelLinear against nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.cut.shard import features, fuse
from pyparallel.layers import ColumnParallelLinear
from pyparallel.testing import (
    assert_equal,
    assert_within,
    integers,
    normals,
    own,
    run_ranks,
    sum_bound,
)

DTYPES = (torch.float32, torch.bfloat16)
# (leading axes of x, K, M): odd, uneven, fewer features than ranks, no batch axis, no rows.
SHAPES = (
    ((2, 3), 7, 12),
    ((5,), 33, 65),
    ((1, 1), 3, 2),
    ((), 4, 3),
    ((0,), 4, 5),
    ((2, 1, 3), 1, 1),
)


def dense_linear(k: int, m: int, bias: bool, dtype: torch.dtype, make) -> nn.Linear:
    linear = nn.Linear(k, m, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(make(m, k, seed=1, dtype=dtype))
        if bias:
            linear.bias.copy_(make(m, seed=2, dtype=dtype))
    return linear


def exact(group: Group, shapes, gather_output: bool) -> None:
    for dtype in DTYPES:
        for lead, k, m in shapes:
            for bias in (True, False):
                what = f"{dtype} {lead} K={k} M={m} bias={bias} gather={gather_output}"
                linear = dense_linear(k, m, bias, dtype, integers)
                module = ColumnParallelLinear.from_dense(
                    linear, group=group, gather_output=gather_output
                )
                x = integers(*lead, k, seed=3, dtype=dtype).requires_grad_()
                dy = integers(*lead, m, seed=4, dtype=dtype)
                dense_params = [linear.weight] + ([linear.bias] if bias else [])
                dense_y = linear(x)
                dense_grads = torch.autograd.grad(dense_y, [x, *dense_params], dy)

                with count_collectives() as forward:
                    y = module(x)
                cut = module.shardings["weight"].along(-1)
                with count_collectives() as backward:
                    grads = torch.autograd.grad(
                        y,
                        [x, *module.parameters()],
                        dy if gather_output else cut.split(dy, group.rank),
                    )
                assert_equal(
                    y, dense_y if gather_output else cut.split(dense_y, group.rank), what + " y"
                )
                assert_equal(grads[0], dense_grads[0], what + " dx")
                for name, grad, dense in zip(
                    ("weight", "bias"), grads[1:], dense_grads[1:], strict=False
                ):
                    assert_equal(grad, own(module, name, dense, group), f"{what} d{name}")
                expected = {"all_gather": 1} if gather_output and group.size > 1 else {}
                assert {n: c for n, c in forward.items() if isinstance(n, str)} == expected, what
                expected = {"all_reduce": 1} if group.size > 1 else {}
                assert {n: c for n, c in backward.items() if isinstance(n, str)} == expected, what


@pytest.mark.parametrize("gather_output", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly_on_integers(ranks, gather_output):
    run_ranks(exact, ranks, SHAPES, gather_output)


def bounded(group: Group, shapes) -> None:
    for dtype in DTYPES:
        for lead, k, m in shapes:
            what = f"{dtype} {lead} K={k} M={m}"
            linear = dense_linear(k, m, True, dtype, normals)
            module = ColumnParallelLinear.from_dense(linear, group=group)
            x = normals(*lead, k, seed=3, dtype=dtype).requires_grad_()
            dy = normals(*lead, m, seed=4, dtype=dtype)
            cut = module.shardings["weight"].along(-1)
            y = module(x)
            dx, dw, db = torch.autograd.grad(
                y, [x, module.weight, module.bias], cut.split(dy, group.rank)
            )
            x64, w64, b64, dy64 = (t.detach().double() for t in (x, linear.weight, linear.bias, dy))
            tokens = max(1, x64.numel() // k)
            x_rows, dy_rows = x64.reshape(tokens, k), dy64.reshape(tokens, m)
            for actual, truth, size, terms, name in (
                (y, x64 @ w64.t() + b64, x64.abs() @ w64.t().abs() + b64.abs(), k, "y"),
                (dx, dy64 @ w64, dy64.abs() @ w64.abs(), m, "dx"),
                (dw, dy_rows.t() @ x_rows, dy_rows.t().abs() @ x_rows.abs(), tokens, "dw"),
                (db, dy_rows.sum(0), dy_rows.abs().sum(0), tokens, "db"),
            ):
                bound = sum_bound(size, terms, group.size, dtype)
                if name == "y":
                    truth, bound = cut.split(truth, group.rank), cut.split(bound, group.rank)
                elif name in ("dw", "db"):
                    parameter = {"dw": "weight", "db": "bias"}[name]
                    truth = own(module, parameter, truth, group)
                    bound = own(module, parameter, bound, group)
                assert_within(actual, truth, bound, f"{what} {name}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_errs_by_rounding_only(ranks):
    run_ranks(bounded, ranks, (((2, 3), 100, 65), ((7,), 33, 130)))


shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=2).map(tuple), st.integers(1, 70), st.integers(1, 140)
)


@settings(max_examples=6)
@given(ranks=st.integers(2, 4), shapes=st.lists(shapes, min_size=5, max_size=5))
def test_any_shape(ranks, shapes):
    run_ranks(exact, ranks, shapes, False)


def survives(group: Group) -> None:
    linear = nn.Linear(6, 10)
    torch.manual_seed(5)
    linear.reset_parameters()
    torch.manual_seed(5)
    module = ColumnParallelLinear(6, 10, group=group)
    assert_equal(module.weight, own(module, "weight", linear.weight, group), "seeded weight")
    assert_equal(module.bias, own(module, "bias", linear.bias, group), "seeded bias")
    torch.manual_seed(6)
    assert not torch.equal(ColumnParallelLinear(6, 10, group=group).weight, module.weight)

    x = normals(4, 6, seed=1)
    copied = copy.deepcopy(module)
    assert copied.group is group
    assert copied.weight is not module.weight
    assert_equal(copied(x), module(x), "deepcopy")
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    meta = ColumnParallelLinear(6, 10, device="meta", group=group)
    assert meta.weight.is_meta and meta.weight.shape == module.weight.shape
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_equal(meta(x), module(x), "meta, then loaded")
    torch.manual_seed(5)
    meta.reset_parameters()
    assert_equal(meta.weight, module.weight, "meta, then reset")


@pytest.mark.parametrize("ranks", [1, 3])
def test_survives_copies_casts_and_meta(ranks):
    run_ranks(survives, ranks)


def test_frozen_dense_stays_frozen():
    linear = nn.Linear(3, 4).requires_grad_(False)
    module = ColumnParallelLinear.from_dense(linear, group=Group.single())
    assert not module.weight.requires_grad and not module.bias.requires_grad


def test_gather_output_of_a_fused_cut_is_refused():
    cut = features(8, 2)
    group = Group(0, 2, LocalCommunicator())
    with pytest.raises(ValueError, match="gather_output"):
        ColumnParallelLinear(4, 16, group=group, gather_output=True, sharding=fuse(cut, cut))


def test_load_dense_names_what_is_missing():
    module = ColumnParallelLinear(3, 4, group=Group.single())
    with pytest.raises(ValueError, match="bias"):
        module.load_dense(nn.Linear(3, 4, bias=False))
    with pytest.raises(ValueError, match="bias"):
        module.load_dense({"weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"weight: expected .*\(4, 3\).*\(5, 3\)"):
        module.load_dense(nn.Linear(3, 5))
