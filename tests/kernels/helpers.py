"""Inputs and error bounds that the kernel tests share."""

import torch

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def integers(*shape, dtype=torch.float32, device="cpu", seed=0, low=-3, high=4):
    """Small exact integers: products and sums are exact in fp32, so equality is exact."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype).to(device)


def strided(tensor):
    """The same values with every second column of a wider, NaN-filled tensor in between."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 99, device=tensor.device)
    wide = wide.to(tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def padded(tensor, extra=3):
    """The same values in rows that are longer than the tensor: stride(0) > shape[1]."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + extra)
    wide = torch.full(shape, 99, device=tensor.device).to(tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def assert_within(got, truth, bound, name="out"):
    """|got - truth| <= bound elementwise, all finite; says where it is worst."""
    assert got.shape == truth.shape, f"{name}: shape {got.shape}, expected {truth.shape}"
    error = (got.double() - truth.double()).abs()
    limit = torch.as_tensor(bound, dtype=torch.float64, device=error.device).expand_as(error)
    bad = ~(error <= limit)
    if bad.any():
        worst = torch.where(bad, (error - limit).nan_to_num(torch.inf), -torch.inf).argmax()
        index = torch.unravel_index(worst, error.shape)
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements out of bound; at "
            f"{[int(i) for i in index]} got {got[index].item()}, expected {truth[index].item()} "
            f"within {limit[index].item():.3g}"
        )


def rounding_bound(truth, dtype, absolute_sum, terms):
    """Error of a sum of `terms` products rounded once to dtype.

    fp32 accumulation in any order: terms * u32 * sum |products| (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1), then one rounding of the result.
    """
    return (
        2 * UNIT[dtype] * truth.double().abs()
        + (terms + 8) * UNIT[torch.float32] * absolute_sum.double()
        + 1e-30
    )
