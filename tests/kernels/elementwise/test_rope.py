import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal

from pyparallel import reference
from pyparallel.kernels.elementwise.rope import rope, rope_out


def tables(positions, half, device):
    angles = torch.arange(positions)[:, None] * reference.rope_frequencies(2 * half)
    return angles.cos().to(device), angles.sin().to(device)


def bound_of(x, dtype, truth):
    pair = x.double().abs().amax(-1, keepdim=True)
    return 2 * UNIT[dtype] * truth.abs() + 4 * UNIT[torch.float32] * pair + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 64), (1, 7, 9, 80)])
@pytest.mark.parametrize("partial", [False, True])
def test_forward(dtype, shape, partial, device):
    half = max(shape[-1] // (4 if partial else 2), 1)
    x = normal(*shape, dtype=dtype, device=device)
    cos, sin = tables(shape[1], half, device)
    truth = reference.rope(x.double(), cos, sin)
    assert_within(rope(x, cos, sin), truth, bound_of(x, dtype, truth))


def test_positions_and_strides(device):
    wide = normal(2, 6, 5, 40, device=device)
    x = wide[:, :, 1:4]
    cos, sin = tables(50, 20, device)
    positions = torch.tensor([[3, 1, 4, 1, 5, 9], [49, 0, 2, 6, 5, 3]], device=device)
    truth = reference.rope(x.double(), cos[positions], sin[positions])
    got = rope(x, cos, sin, positions=positions)
    assert_within(got, truth, bound_of(x, torch.float32, truth))
    before = wide.clone()
    rope_out(x, cos, sin, x, positions=positions)
    assert torch.equal(x, got)
    assert torch.equal(wide[:, :, [0, 4]], before[:, :, [0, 4]])


def test_inverse_is_the_gradient(device):
    x = normal(1, 4, 2, 12, device=device).double().requires_grad_()
    cos, sin = tables(4, 4, device)
    dout = normal(1, 4, 2, 12, device=device, seed=3)
    reference.rope(x, cos.double(), sin.double()).backward(dout.double())
    got = rope(dout, cos, sin, inverse=True)
    assert_within(got, x.grad, bound_of(dout, torch.float32, x.grad))


def test_interleaved_pairs_are_neighbours(device):
    x = normal(1, 3, 2, 14, device=device)
    cos, sin = tables(3, 5, device)
    order = torch.tensor([0, 2, 4, 6, 8, 1, 3, 5, 7, 9, 10, 11, 12, 13], device=device)
    expected = torch.empty_like(x)
    expected[..., order] = rope(x[..., order].contiguous(), cos, sin)
    assert torch.equal(rope(x, cos, sin, interleaved=True), expected)


def test_bad_input(device):
    cos, sin = tables(3, 4, device)
    with pytest.raises(ValueError, match="at least 5 positions, got 3"):
        rope(torch.zeros(1, 5, 2, 8, device=device), cos, sin)
    with pytest.raises(ValueError, match="2E <= D"):
        rope(torch.zeros(1, 3, 2, 6, device=device), cos, sin)
    assert rope(torch.zeros(0, 3, 2, 8, device=device), cos, sin).shape == (0, 3, 2, 8)
