"""The kernels for weights in a GGUF's blocks, which are the file's numbers whatever the dtype."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel import backend
from pyparallel.cut.quantize import BLOCK_BYTES, PackedWeight, unwoven_blocks, weave_blocks_
from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import init_mesh
from pyparallel.native.cpu import ops as cpu_ops
from pyparallel.testing import UNIT_ROUNDOFF, assert_equal, assert_within, dense_bound, normals
from tests.decoding.decoder_checks import FIXED_POINT, instruction_set, instruction_sets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blocks_of(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """Random blocks as a file has them, and their numbers in fp32."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    data = gguf.quants.quantize(normals(rows, columns, seed=rows).numpy(), number)
    return torch.from_numpy(data), torch.from_numpy(gguf.quants.dequantize(data, number))


@pytest.mark.parametrize("kind", list(BLOCK_BYTES))
def test_weaving_is_undone(kind: str) -> None:
    for rows, columns in ((16, 32), (33, 96), (7, 64), (2065, 32), (0, 64)):
        data, numbers = blocks_of(max(rows, 1), columns, kind)
        data, numbers = data[:rows], numbers[:rows]
        woven = weave_blocks_(data.clone(), kind)
        assert_equal(unwoven_blocks(woven, kind), data, f"{kind} {rows}")
        packed = PackedWeight(woven, kind, torch.float32)
        assert_equal(packed.dequantized(), numbers, f"{kind} {rows}")
        index = torch.tensor([rows - 1, 0, rows // 2, 0]) if rows else torch.tensor([], dtype=int)
        assert_equal(packed.rows(index), numbers[index], f"{kind} {rows}")


@pytest.mark.parametrize("kind", list(BLOCK_BYTES))
def test_modules_hold_any_kind(kind: str) -> None:
    group = init_mesh(tp=1).tp
    data, numbers = blocks_of(39, 96, kind)
    for dtype in DTYPES:
        module = ColumnParallelLinear(96, 39, dtype=dtype, group=group)
        dense = ColumnParallelLinear(96, 39, dtype=dtype, group=group)
        dense.load_dense({"weight": numbers.to(dtype), "bias": module.bias})
        module.hold_blocks(data.clone(), kind)
        assert module.dtype is dtype and not module.weight.requires_grad
        assert module.weight_shape == (39, 96) and module.packed.shape == (39, 96)
        bias = module.bias.detach()
        for rows in (1, 16, 40):
            x = normals(2, rows, 96, seed=rows, dtype=dtype)
            truth = F.linear(x.double(), numbers.double(), bias.double())
            plain = F.linear(x.float(), numbers, bias.float())
            # Weights that are not rounded to dtype: only the result is.
            bound = FIXED_POINT * dense_bound(plain, truth, 1, kind)
            bound = bound + UNIT_ROUNDOFF[dtype] * truth.abs()
            for isa in instruction_sets():
                with torch.inference_mode(), instruction_set(isa), backend.use("cpu"):
                    ours = module(x)
                    # The dot product of bf16 takes bf16.
                    loose = isa == "avx512_bf16" and dtype is torch.bfloat16 and 2 * rows > 16
                    allowed = dense_bound(dense(x), truth, 1, kind) if loose else bound
                    assert_within(ours, truth, allowed, f"{kind} {dtype} {rows} {isa}")
            for row in ("torch", "reference"):
                with torch.inference_mode(), backend.use(row):
                    assert_within(module(x), truth, bound, f"{kind} {dtype} {rows} {row}")
    # Another weight takes the blocks' place.
    module.load_dense({"weight": numbers, "bias": module.bias})
    assert module.packed is None and module.dtype is torch.float32


@pytest.mark.parametrize("kind", list(BLOCK_BYTES))
def test_bits_of_a_row_do_not_depend_on_the_others(kind: str) -> None:
    data, _ = blocks_of(77, 160, kind)
    weight = PackedWeight(weave_blocks_(data, kind), kind, torch.float32)
    gate = PackedWeight(weave_blocks_(blocks_of(77, 160, kind)[0], kind), kind, torch.float32)
    x = normals(16, 160, seed=1)
    for isa in instruction_sets():
        with instruction_set(isa):
            for up in (None, gate):
                whole = cpu_ops.linear(x, weight, up=up, thin=True)
                for row, expected in zip(x, whole, strict=True):
                    alone = cpu_ops.linear(row.unsqueeze(0), weight, up=up, thin=True)
                    assert_equal(alone[0], expected, f"{kind} {isa}")
                if isa == "avx512_bf16":
                    many = cpu_ops.linear(x, weight, up=up, thin=False)
                    assert_equal(many, whole, f"{kind}: many rows")


@pytest.mark.parametrize("kind", list(BLOCK_BYTES))
@pytest.mark.parametrize("thin", [True, False])
def test_any_activation_is_multiplied(kind: str, thin: bool) -> None:
    """What integers cannot hold: an infinity or NaN stays in its row; zeros, tiny and huge numbers."""
    data, numbers = blocks_of(20, 64, kind)
    weight = PackedWeight(weave_blocks_(data, kind), kind, torch.float32)
    ones = torch.ones(64)
    # A sum of K products errs by K roundings of each; what is below 2^-95 may count as 0.
    magnitude = numbers.double().abs().sum(1)
    rounding = FIXED_POINT * 64 * UNIT_ROUNDOFF[torch.float32]
    for isa in instruction_sets():
        with instruction_set(isa):
            for scale in (0.0, 1e-45, 1e-38, 1e-30, 1e30):
                y = cpu_ops.linear((ones * scale).unsqueeze(0), weight, thin=thin)[0]
                bound = (rounding * scale + 2**-116) * magnitude
                assert_within(y, numbers.double().sum(1) * scale, bound, isa)
            for bad in (float("nan"), float("inf")):
                for at in (0, 63):
                    x = ones.repeat(3, 1)
                    x[1, at] = bad
                    y = cpu_ops.linear(x, weight, thin=thin)
                    assert not y[1].isfinite().any(), (isa, bad, at)
                    assert y[[0, 2]].isfinite().all(), (isa, bad, at)
