import pytest
import torch
from helpers import DTYPES, integers, padded

from pyparallel.kernels.configurations import FEW_ROWS, matmul_config
from pyparallel.kernels.matmul import matmul_descriptor as module
from pyparallel.kernels.matmul.matmul import matmul
from pyparallel.kernels.matmul.matmul_descriptor import matmul_descriptor, matmul_on_best_path


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layers_gradients_are_read_as_they_lie(dtype, device):
    """dx = dout @ w reads w along N, dw = dout^T @ x reads both along M."""
    if device != "cpu" and dtype == torch.float32:
        pytest.skip("descriptors have no configuration for 4-byte operands")
    x, w = (integers(n, 104, dtype=dtype, device=device) for n in (72, 40))
    dout = integers(72, 40, dtype=dtype, device=device, seed=3)
    assert torch.equal(matmul_descriptor(dout, w.T), matmul(dout, w.T))
    assert torch.equal(matmul_descriptor(dout.T, x.T), matmul(dout.T, x.T))
    assert torch.equal(matmul_descriptor(dout.T.contiguous(), x.T), matmul(dout.T, x.T))


@pytest.mark.parametrize("pays", [True, False])
def test_best_path(pays, monkeypatch, device):
    """Descriptors where they pay and can move the operands, pointers elsewhere, into `out` too."""
    taken = []

    def watch(name):
        run = getattr(module, name)

        def watched(*args, **options):
            taken.append((name, options.get("config")))
            return run(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch("matmul_descriptor_out")
    watch("matmul_out")
    monkeypatch.setattr(module, "descriptors_pay", lambda *args: pays)
    kind = torch.bfloat16
    x, w = integers(40, 64, dtype=kind, device=device), integers(24, 64, dtype=kind, device=device)
    out = torch.empty(40, 24, dtype=kind, device=device)
    assert matmul_on_best_path(x, w, out) is out and torch.equal(out, matmul(x, w))
    wide = torch.empty(40, 27, dtype=kind, device=device)[:, :24]
    assert torch.equal(matmul_on_best_path(x, w, wide, least_rows=FEW_ROWS + 1), out)
    names = ["matmul_descriptor_out" if pays else "matmul_out", "matmul_out"]
    assert [name for name, _ in taken] == names
    arch = module.architecture(x)
    assert taken[1][1] == matmul_config(arch, FEW_ROWS + 1, 24, 64, 2)
