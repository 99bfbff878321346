"""Kernels that join a matmul or a norm with a collective, over forked ranks.

Equality with the plain path is to the bit. The interpreter's BLAS rounds a row differently
at another place of a tile (a GPU doesn't), so operands of matmuls are small integers, whose
products are exact; each rank scales its own by a power of two far from the others', so that
the sum over ranks does round, and rounds differently in another order."""

import time

import pytest
import torch
from helpers import DTYPES, assert_within, integers, normal, rounding_bound
from ranks import run_ranks

from pyparallel.kernels.collective.all_gather_matmul import all_gather_matmul
from pyparallel.kernels.collective.all_reduce_residual_rms_norm import all_reduce_residual_rms_norm
from pyparallel.kernels.collective.matmul_all_reduce import matmul_all_reduce
from pyparallel.kernels.collective.matmul_reduce_scatter import matmul_reduce_scatter
from pyparallel.kernels.matmul.matmul import matmul
from pyparallel.kernels.norm.norm import rms_norm

EPOCHS = 6


SCALES = [1.0, 2.0**-13, 2.0**5, 2.0**-9]


def late(memory, epoch):
    if epoch % memory.size == memory.rank:
        time.sleep(0.03)


def ordered_sum(parts):
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


def test_the_scaled_partials_do_round_in_rank_order():
    xs = [integers(40, 35, seed=r) for r in range(3)]
    parts = [x @ integers(33, 35, seed=5 + r).T * SCALES[r] * 1023 for r, x in enumerate(xs)]
    assert not torch.equal(ordered_sum(parts), ordered_sum(parts[::-1]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_gather_matmul(size):
    def body(memory):
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            counts = [None, [40, 0, 33, 1], [1, 70, 2, 0]][epoch % 3]
            sizes = [20] * size if counts is None else counts[:size]
            n, k = [(33, 40), (70, 32)][epoch % 2]
            xs = [integers(m, k, dtype=dtype, seed=epoch * 10 + r) for r, m in enumerate(sizes)]
            w = integers(n, k, dtype=dtype, seed=epoch + 100 * memory.rank)
            bias = normal(n, dtype=dtype, seed=epoch) if epoch % 2 else None
            late(memory, epoch)
            out, gathered = all_gather_matmul(
                xs[memory.rank], w, memory, counts=counts and sizes, bias=bias, activation="silu"
            )
            assert torch.equal(gathered, torch.cat(xs))
            assert torch.equal(out, matmul(gathered, w, bias=bias, activation="silu")), epoch

    run_ranks(size, body)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_matmul_reduce_scatter(size):
    def body(memory):
        rank = memory.rank
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            sizes = [[12] * 4, [40, 0, 33, 1], [0, 35, 2, 0]][epoch % 3][:size]
            n, k = [(33, 20), (70, 35)][epoch % 2]
            m = sum(sizes)
            xs = [integers(m, k, dtype=dtype, seed=epoch * 10 + r) for r in range(size)]
            ws = [
                integers(n, k, dtype=dtype, seed=epoch * 10 + 5 + r) * SCALES[r]
                for r in range(size)
            ]
            bias = normal(n, dtype=dtype) if epoch % 2 else None
            residual = normal(sizes[rank], n, dtype=dtype) if epoch % 3 == 1 else None
            late(memory, epoch)
            got = matmul_reduce_scatter(
                xs[rank], ws[rank], memory, counts=sizes, bias=bias, residual=residual
            )
            partials = [matmul(x, w) for x, w in zip(xs, ws, strict=True)]
            expected = ordered_sum(partials).split(sizes)[rank]
            if bias is not None or residual is not None:
                total = expected.float()
                total = total if bias is None else total + bias.float()
                total = total if residual is None else total + residual.float()
                expected = total.to(dtype)
            assert torch.equal(got, expected), f"epoch {epoch}"

    run_ranks(size, body)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_matmul_all_reduce(size, algorithm):
    def body(memory):
        rank = memory.rank
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            m, n, k = [(1, 100, 20), (40, 33, 35), (0, 5, 5)][epoch % 3]
            xs = [integers(m, k, dtype=dtype, seed=epoch * 10 + r) for r in range(size)]
            ws = [
                integers(n, k, dtype=dtype, seed=epoch * 10 + 5 + r) * SCALES[r]
                for r in range(size)
            ]
            bias = normal(n, dtype=dtype) if epoch % 2 else None
            late(memory, epoch)
            got = matmul_all_reduce(xs[rank], ws[rank], memory, bias=bias, algorithm=algorithm)
            expected = ordered_sum([matmul(x, w) for x, w in zip(xs, ws, strict=True)])
            if bias is not None:
                expected = (expected.float() + bias.float()).to(dtype)
            assert torch.equal(got, expected), f"epoch {epoch}"
            whole_x, whole_w = torch.cat(xs, 1).double(), torch.cat(ws, 1).double()
            truth = whole_x @ whole_w.T + (0 if bias is None else bias.double())
            sums = whole_x.abs() @ whole_w.abs().T + 4
            # Every partial is rounded to dtype on its way.
            bound = rounding_bound(truth, dtype, sums, whole_x.shape[1])
            assert_within(got, truth, bound + (size + 2) * 2 * rounding_bound(sums, dtype, sums, 0))

    run_ranks(size, body)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_all_reduce_residual_rms_norm(size, algorithm):
    def body(memory):
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            m, h = [(5, 40), (1, 33), (9, 16), (0, 8)][epoch % 4]
            xs = [normal(m, h, dtype=dtype, seed=epoch * 10 + r) for r in range(size)]
            residual, weight = normal(m, h, dtype=dtype, seed=99), normal(h, dtype=dtype)
            late(memory, epoch)
            out, kept = all_reduce_residual_rms_norm(
                xs[memory.rank], residual, weight, memory, eps=1e-5, algorithm=algorithm
            )
            plain = rms_norm(ordered_sum(xs), weight, eps=1e-5, residual=residual)
            assert torch.equal(kept, plain.h) and torch.equal(out, plain.out), f"epoch {epoch}"

    run_ranks(size, body)


@pytest.mark.parametrize("operation", ["gather", "scatter", "reduce"])
def test_a_rank_that_never_comes_is_named_in_time(operation):
    def body(memory):
        x, w = torch.ones(40, 33), torch.ones(35, 33)
        if memory.rank == 1:
            return None
        memory.timeout_ns = 500_000_000
        started = time.monotonic()
        try:
            if operation == "gather":
                all_gather_matmul(x, w, memory)
            elif operation == "scatter":
                matmul_reduce_scatter(x, w, memory)
            else:
                matmul_all_reduce(x, w, memory)
        except TimeoutError as error:
            return time.monotonic() - started, str(error)
        raise AssertionError("nobody noticed")

    waited, message = run_ranks(2, body)[0]
    assert waited < 20 and "in call 1 for rank 1, which did not come" in message


def test_bad_input_is_named():
    def body(memory):
        x, w = torch.ones(4, 6), torch.ones(3, 6)
        with pytest.raises(ValueError, match="no equal division"):
            matmul_reduce_scatter(x[:3], w, memory)
        with pytest.raises(ValueError, match="2 numbers of rows, 4 of them at rank 0, got"):
            all_gather_matmul(x, w, memory, counts=[3, 1])
        with pytest.raises(ValueError, match="bytes of symmetric memory"):
            matmul_all_reduce(torch.ones(400, 6), torch.ones(300, 6), memory)
        with pytest.raises(ValueError, match="residual: expected shape"):
            matmul_all_reduce(x, w, memory, residual=x)

    run_ranks(2, lambda memory: body(memory) if memory.rank == 0 else None)
