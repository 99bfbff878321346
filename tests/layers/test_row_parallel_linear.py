"""RowParallelLinear against nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import RowParallelLinear
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
SHAPES = (((2, 3), 7, 12), ((5,), 65, 33), ((1, 1), 2, 3), ((), 3, 4), ((0,), 5, 4))


def dense_linear(k: int, m: int, bias: bool, dtype: torch.dtype, make) -> nn.Linear:
    linear = nn.Linear(k, m, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(make(m, k, seed=1, dtype=dtype))
        if bias:
            linear.bias.copy_(make(m, seed=2, dtype=dtype))
    return linear


def exact(group: Group, shapes, input_is_parallel: bool) -> None:
    for dtype in DTYPES:
        for index, (lead, k, m) in enumerate(shapes):
            bias = index % 2 == 0
            what = f"{dtype} {lead} K={k} M={m} bias={bias} parallel={input_is_parallel}"
            linear = dense_linear(k, m, bias, dtype, integers)
            module = RowParallelLinear.from_dense(
                linear, group=group, input_is_parallel=input_is_parallel
            )
            cut = module.shardings["weight"].along(-1)
            x = integers(*lead, k, seed=3, dtype=dtype)
            dy = integers(*lead, m, seed=4, dtype=dtype)
            dense_x = x.clone().requires_grad_()
            dense_y = linear(dense_x)
            dense_dx, *dense_grads = torch.autograd.grad(
                dense_y, [dense_x, *linear.parameters()], dy
            )
            if input_is_parallel:
                x, dense_dx = cut.split(x, group.rank), cut.split(dense_dx, group.rank)
            x.requires_grad_()
            with count_collectives() as forward:
                y = module(x)
            with count_collectives() as backward:
                dx, *grads = torch.autograd.grad(y, [x, *module.parameters()], dy)
            assert_equal(y, dense_y, what + " y")
            assert_equal(dx, dense_dx, what + " dx")
            for name, grad, dense in zip(("weight", "bias"), grads, dense_grads, strict=False):
                assert_equal(grad, own(module, name, dense, group), f"{what} d{name}")
            several = group.size > 1
            assert calls(forward) == ({"all_reduce": 1} if several else {}), what
            gathered = several and not input_is_parallel
            assert calls(backward) == ({"all_gather": 1} if gathered else {}), what


def calls(counter) -> dict[str, int]:
    return {name: count for name, count in counter.items() if isinstance(name, str)}


@pytest.mark.parametrize("input_is_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly_on_integers(ranks, input_is_parallel):
    run_ranks(exact, ranks, SHAPES, input_is_parallel)


def forward_and_bound(group: Group, k: int, dtype: torch.dtype):
    linear = dense_linear(k, 33, True, dtype, normals)
    module = RowParallelLinear.from_dense(linear, group=group, input_is_parallel=False)
    x = normals(7, k, seed=3, dtype=dtype)
    x64, w64, b64 = (t.detach().double() for t in (x, linear.weight, linear.bias))
    truth = x64 @ w64.t() + b64
    bound = sum_bound(x64.abs() @ w64.t().abs() + b64.abs(), k, group.size, dtype)
    return module, x, truth, bound


def bounded(group: Group) -> None:
    for dtype in DTYPES:
        for k in (65, 130, 3):
            module, x, truth, bound = forward_and_bound(group, k, dtype)
            assert_within(module(x), truth, bound, f"{dtype} K={k}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_errs_by_rounding_only(ranks):
    run_ranks(bounded, ranks)


def bias_on_every_rank(group: Group) -> None:
    module, x, truth, bound = forward_and_bound(group, 65, torch.bfloat16)
    wrong = module(x) + (group.size - 1) * module.bias
    with pytest.raises(AssertionError, match="above the bound"):
        assert_within(wrong, truth, bound, "bias on every rank")


def test_the_bound_shows_a_bias_added_by_every_rank():
    run_ranks(bias_on_every_rank, 2)


shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=2).map(tuple), st.integers(1, 140), st.integers(1, 70)
)


@settings(max_examples=6)
@given(ranks=st.integers(2, 4), shapes=st.lists(shapes, min_size=3, max_size=3))
def test_any_shape(ranks, shapes):
    run_ranks(exact, ranks, shapes, True)


def survives(group: Group) -> None:
    torch.manual_seed(5)
    linear = nn.Linear(10, 6)
    torch.manual_seed(5)
    module = RowParallelLinear(10, 6, group=group)
    assert_equal(module.weight, own(module, "weight", linear.weight, group), "seeded weight")
    assert_equal(module.bias, linear.bias, "seeded bias")
    x = normals(4, module.weight.shape[1], seed=1)
    assert_equal(copy.deepcopy(module)(x), module(x), "deepcopy")
    assert copy.deepcopy(module).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    meta = RowParallelLinear(10, 6, device="meta", group=group)
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_equal(meta(x), module(x), "meta, then loaded")


@pytest.mark.parametrize("ranks", [1, 3])
def test_survives_copies_casts_and_meta(ranks):
    run_ranks(survives, ranks)
