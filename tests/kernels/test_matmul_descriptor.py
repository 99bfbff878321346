import pytest
import torch
from helpers import DTYPES, integers, padded

from pyparallel.kernels.matmul import matmul
from pyparallel.kernels.matmul_descriptor import matmul_descriptor, matmul_on_best_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (70, 40, 104), (33, 72, 48)])
def test_has_the_bits_of_matmul(dtype, shape, device):
    m, n, k = shape
    x, w = integers(m, k, dtype=dtype, device=device), integers(n, k, dtype=dtype, device=device)
    bias = integers(n, dtype=dtype, device=device)
    if device != "cpu" and dtype == torch.float32:
        with pytest.raises(ValueError, match="no configuration for 4-byte operands"):
            matmul_descriptor(x, w, bias=bias)
        return
    got = matmul_descriptor(x, w, bias=bias, activation="relu")
    assert torch.equal(got, matmul(x, w, bias=bias, activation="relu"))
    assert torch.equal(matmul_descriptor(padded(x, 8), w), matmul(x, w))


def test_fp8_gives_bf16(device):
    x = integers(40, 64, device=device).to(torch.float8_e4m3fn)
    w = integers(24, 64, device=device).to(torch.float8_e4m3fn)
    got = matmul_descriptor(x, w)
    assert got.dtype == torch.bfloat16 and torch.equal(got, matmul(x, w))


def test_what_descriptors_cannot_move_is_said_and_goes_elsewhere(device):
    x, w = integers(70, 33, device=device), integers(8, 33, device=device)
    with pytest.raises(ValueError, match=r"strides \(33, 1\) are not .*; call matmul"):
        matmul_descriptor(x, w)
    with pytest.raises(ValueError, match="an operand is empty; call matmul"):
        matmul_descriptor(x[:0], w)
    assert torch.equal(matmul_on_best_path(x, w), matmul(x, w))
