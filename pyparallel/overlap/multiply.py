"""The matmuls of the pipelines on GPUs: the library's, and ours of fixed tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.native.triton import missing
from pyparallel.overlap.pipelines import Linear, matmul_plain

# Up to here our kernel has other tiles for few rows, some of which multiply w @ x^T:
# FEW_ROWS of `kernels/configurations.py`.
MOST_THIN_ROWS = 128


def reason_against_triton(like: Tensor, rows: tuple[int, ...]) -> str | None:
    """Why the Triton kernel cannot multiply shards of `rows` rows of this dtype, or None."""
    if like.dtype not in (torch.float16, torch.bfloat16):
        return f"it is not meant to beat the library in {like.dtype}"
    if min(rows) <= MOST_THIN_ROWS:
        return f"a shard of {min(rows)} rows has the tiles for few rows"
    return missing()


def library(bias: Tensor | None = None) -> Linear:
    """out = rows @ weight^T (+ bias), by cuBLASLt, which adds the bias in its epilogue."""

    def linear(rows: Tensor, weight: Tensor, out: Tensor) -> None:
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)

    return linear


def triton(bias: Tensor | None = None, *, transposed: bool = True) -> Linear:
    """out = rows @ weight^T (+ bias), or rows @ weight, by `matmul_on_best_path`.

    Its tiles are those of many rows whatever it is given, and each row is summed over K in one order,
    with descriptors or without: a shard in pieces has the bits of the shard in one, which are those of
    the unfused path on the backend `triton`.
    """

    def linear(rows: Tensor, weight: Tensor, out: Tensor) -> None:
        from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path

        right = weight if transposed else weight.t()
        matmul_on_best_path(rows, right, out, bias=bias, least_rows=MOST_THIN_ROWS + 1)

    return linear


def forward_linear(multiplier: str, bias: Tensor | None = None) -> Linear:
    """The multiplier of that name for rows @ weight^T + bias."""
    return triton(bias) if multiplier == "triton" else library(bias)


def backward_linear(multiplier: str) -> Linear:
    """The multiplier of that name for rows @ weight."""
    return triton(transposed=False) if multiplier == "triton" else matmul_plain
