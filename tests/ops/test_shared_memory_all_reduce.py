"""The fused sums over ranks that share memory, of a few rows, against the plain path: same bits."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyparallel import _C, backend
from pyparallel.comm.collectives import all_reduce_raw, count_collectives
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.launch import RankError
from pyparallel.layers import RMSNorm, RowParallelLinear
from pyparallel.ops.cpu import all_reduce_residual_rms_norm, linear_all_reduce
from pyparallel.ops.cpu._few_rows import MOST_ROWS
from pyparallel.ops.row_parallel_linear import linear_all_reduce as fused_or_composed
from pyparallel.ops.row_parallel_linear import linear_then_all_reduce, row_parallel_linear
from pyparallel.testing import (
    assert_equal,
    integers,
    normals,
    run_ranks,
)
from tests.comm.engine_checks import reduced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (leading axes, K_r but for the rank's own number, N): one row and many, odd everything, none at all.
SHAPES = (
    ((1,), 40, 65),
    ((2, 3), 7, 33),
    ((), 12, 1),
    ((1, 17), 64, 96),
    ((0,), 5, 8),
    ((32,), 1, 3),
)
EPS = 1e-5


def features(group: Group, k: int) -> int:
    """Uneven parts, and none on the last of three ranks."""
    return 0 if group.rank == 2 else k + group.rank


def same_bits(group: Group) -> None:
    for isa in ("plain", "avx2", "avx512", "avx512_bf16"):
        try:
            _C.use_isa(isa)
        except ValueError:
            continue
        for number, (lead, k, n) in enumerate(SHAPES):
            for dtype in DTYPES:
                one_case(group, lead, features(group, k), n, dtype, number)


def one_case(group: Group, lead: tuple, k: int, n: int, dtype: torch.dtype, seed: int) -> None:
    mine = 100 * group.rank + seed
    x, weight = normals(*lead, k, seed=mine, dtype=dtype), normals(n, k, seed=mine + 1, dtype=dtype)
    bias, residual = normals(n, seed=seed, dtype=dtype), normals(*lead, n, seed=seed, dtype=dtype)
    for given in (bias, None):
        with count_collectives() as expected:
            y = linear_then_all_reduce(x, weight, given, group)
        with count_collectives() as counted:
            actual = linear_all_reduce.run(x, weight, given, group)
        assert_equal(actual, y, f"linear_all_reduce {lead} {k} {n} {dtype}")
        assert counted == expected
    partial = normals(*lead, n, seed=mine, dtype=dtype)
    h = residual + all_reduce_raw(partial.clone(), group)
    plain = backend.call("rms_norm", h, bias, EPS), h
    with count_collectives() as counted:
        ours = all_reduce_residual_rms_norm.run(partial, residual, bias, EPS, group)
    for name, actual, y in zip("yh", ours, plain, strict=True):
        assert_equal(actual, y, f"all_reduce_residual_rms_norm {name} {lead} {n} {dtype}")
    assert counted == {"all_reduce": 1, ("all_reduce", "bytes"): partial.numel() * dtype.itemsize}


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_bits(ranks: int) -> None:
    run_ranks(same_bits, ranks)


def linear_gradients(group: Group) -> None:
    """Few rows take the fused row, many the plain one; integers make both exact."""
    for rows in (4, MOST_ROWS + 1):
        xs = [integers(rows, 6 + r, seed=r) for r in range(group.size)]
        weights = [integers(9, 6 + r, seed=20 + r) for r in range(group.size)]
        bias, dy = integers(9, seed=40), integers(rows, 9, seed=41)
        leaves = [t.clone().requires_grad_() for t in (xs[group.rank], weights[group.rank], bias)]
        with torch.no_grad():
            run = backend.offered("linear_all_reduce", *leaves, group)
        assert run is (linear_all_reduce.run if rows == 4 else None)
        y = row_parallel_linear(*leaves, group=group)
        grads = torch.autograd.grad(y, leaves, dy)
        total = sum(x @ w.t() for x, w in zip(xs, weights, strict=True)) + bias
        assert_equal(y.detach(), total, "y")
        assert_equal(grads[0], dy @ weights[group.rank], "dx")
        assert_equal(grads[1], dy.t() @ xs[group.rank], "dw")
        assert_equal(grads[2], dy.sum(0), "db")


def test_gradients_of_the_linear() -> None:
    run_ranks(linear_gradients, 2)


def layers(group: Group) -> None:
    """RowParallelLinear with a residual and a norm: fused in inference, the bits of the modules."""
    seen: list[str] = []
    rows = {
        "linear_all_reduce": linear_all_reduce,
        "all_reduce_residual_rms_norm": all_reduce_residual_rms_norm,
    }
    for name, row in rows.items():

        def told(*args: object, run=row.run, name: str = name) -> object:
            seen.append(name)
            return run(*args)

        row.run = told
    for dtype in DTYPES:
        linear = RowParallelLinear(24, 16, False, dtype=dtype, group=group)
        norm = RMSNorm(16, None, dtype=dtype)
        norm.weight.data = normals(16, seed=5, dtype=dtype)
        x = normals(3, linear.weight.shape[1], seed=group.rank, dtype=dtype)
        residual = normals(3, 16, seed=6, dtype=dtype)
        for quantized in (False, True):
            if quantized:
                linear.quantize_weight()
            with torch.inference_mode():
                seen.clear()
                y, h = linear.add_and_norm(x, residual, norm)
                assert seen == ["all_reduce_residual_rms_norm"]
                seen.clear()
                reasons = {row: row.reason for row in rows.values()}
                for row in reasons:
                    row.reason = lambda *_: "taken away"
                expected = residual + linear(x)
                assert_equal(h, expected, f"h {dtype} {quantized}")
                assert_equal(y, norm(expected), f"y {dtype} {quantized}")
                assert seen == []
                for row, reason in reasons.items():
                    row.reason = reason
                linear(x)
                assert seen == ([] if quantized else ["linear_all_reduce"])
                # LayerNorm is not fused.
                seen.clear()
                linear.add_and_norm(x, residual, nn.LayerNorm(16, dtype=dtype))
                assert "all_reduce_residual_rms_norm" not in seen
            if not quantized:
                seen.clear()
                linear.add_and_norm(x.clone().requires_grad_(), residual, norm)
                assert seen == ["linear_all_reduce"]


def test_layers_take_them() -> None:
    run_ranks(layers, 2)


def operators(group: Group) -> None:
    handle = group.handle
    x, weight, bias = normals(3, 4, seed=1), normals(5, 4, seed=2), normals(5, seed=3)
    for given in (bias, None):
        operator = torch.ops.pyparallel.linear_all_reduce.default
        torch.library.opcheck(operator, (x, weight, given, handle))

    def step(x: Tensor) -> Tensor:
        return row_parallel_linear(x * 2, weight, bias, group=group)

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for wanted in (False, True):
        with torch.set_grad_enabled(wanted):
            leaf = x.clone().requires_grad_(wanted)
            eager, traced = step(leaf), graph(leaf)
        assert_equal(traced, eager, "y")
        if wanted:
            (expected,), (grad,) = (torch.autograd.grad(y.sum(), leaf) for y in (eager, traced))
            assert_equal(grad, expected, "dx")


def test_operator_and_graph() -> None:
    run_ranks(operators, 2)


def many_calls(group: Group) -> None:
    """Both ops and plain collectives in turn, growing and shrinking, each rank now and then late."""
    late = random.Random(group.rank)
    for number in range(80):
        m, k, n = 1 + number * 5 % 31, 1 + number % 9, 1 + number * 7 % 60
        x, weight = normals(m, k, seed=group.rank), normals(n, k, seed=number)
        pending = all_reduce_raw(torch.ones(5), group, async_op=True)
        y = linear_all_reduce.run(x, weight, None, group)
        if late.random() < 0.2:
            time.sleep(0.005)
        partials = [
            backend.call("linear", normals(m, k, seed=r), weight) for r in range(group.size)
        ]
        assert_equal(y, reduced(partials, "sum"), "linear_all_reduce")
        h = all_reduce_residual_rms_norm.run(y, y, torch.ones(n), EPS, group)[1]
        assert_equal(h, y + reduced([y] * group.size, "sum"), "the sum and its residual")
        assert_equal(pending.wait(), torch.full((5,), float(group.size)), "all_reduce")


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_calls_with_late_ranks(ranks: int) -> None:
    run_ranks(many_calls, ranks)


def reasons(group: Group) -> None:
    x, weight = normals(2, 8, seed=0), normals(4, 8, seed=1)
    with torch.no_grad():
        assert linear_all_reduce.reason(x, weight, None, group) is None
        for text, arguments in (
            ("33 rows are more than 32", (normals(33, 8, seed=0), weight, None, group)),
            ("one dtype", (x.bfloat16(), weight, None, group)),
            ("do not fit", (normals(32, 1, seed=0), normals(9000, 1, seed=1), None, group)),
            ("contiguous weight", (x, weight.t(), None, group)),
            ("does not share memory", (x, weight, None, Group.single())),
            ("fp32, bf16 or fp16", (x.double(), weight.double(), None, group)),
        ):
            assert text in linear_all_reduce.reason(*arguments)
        assert "residual of x's shape" in all_reduce_residual_rms_norm.reason(
            x, weight, weight[0], EPS, group
        )


def test_what_they_do_not_take() -> None:
    run_ranks(reasons, 2)


def transposed(group: Group) -> list[str | None]:
    """Weights stored the other way round, of which the last ranks have one column, and none."""
    told = []
    for k in (2, 5, 33):
        own = (k - 1, 1, 0)[group.rank]
        x, stored = integers(4, k, seed=1), integers(k, 6, seed=2)
        part = slice(sum((k - 1, 1, 0)[: group.rank]), sum((k - 1, 1, 0)[: group.rank + 1]))
        weight = stored[part].contiguous().t()
        assert weight.shape == (6, own)
        with torch.inference_mode():
            told.append(linear_all_reduce.reason(x[:, part], weight, None, group))
            y = fused_or_composed(x[:, part], weight, None, group)
        assert_equal(y, x @ stored, f"K={k}")
        # And slices of the columns of a whole matrix, which are views.
        with torch.inference_mode():
            sliced = stored.t().contiguous()[:, part]
            assert linear_all_reduce.reason(x[:, part], sliced, None, group) is None
            y = fused_or_composed(x[:, part], sliced, None, group)
        assert_equal(y, x @ stored, f"sliced, K={k}")
    return told


def test_ranks_with_one_column_or_none_choose_as_the_others() -> None:
    for told in run_ranks(transposed, 3):
        assert told == ["expected a contiguous weight"] * 3


def dies(group: Group, report: str) -> None:
    x, weight = normals(2, 8, seed=0), normals(4, 8, seed=1)
    linear_all_reduce.run(x, weight, None, group)
    if group.rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        linear_all_reduce.run(x, weight, None, group)
    except PeerError as error:
        Path(report).write_text(f"{error.missing} {time.monotonic() - start < 5.0}")


def test_a_dead_peer_is_noticed(tmp_path: Path) -> None:
    report = tmp_path / "report"
    with pytest.raises(RankError, match="ended with exit status 3"):
        run_ranks(dies, 2, str(report))
    assert report.read_text() == "(1,) True"
