"""Boolean and additive masks in the flash kernels, forward and backward."""

import pytest
import torch
from helpers import DTYPES, UNIT, normal
from test_attention import check as check_forward
from test_attention import inputs
from test_attention_backward import check as check_backward

from pyparallel import reference
from pyparallel.kernels.attention.attention import attention
from pyparallel.kernels.attention.attention_backward import attention_backward


def random_mask(*shape, device, additive=None):
    """Half of the keys hidden at random; additive: in this dtype, beside some bias."""
    seen = normal(*shape, device=device, seed=7) > 0
    if additive is None:
        return seen
    return normal(*shape, device=device, seed=9, dtype=additive).masked_fill(~seen, -torch.inf)


SHAPES = ["full", "per key", "per head", "per sequence", "transposed", "expanded"]


def mask_of(what, b, s, t, n, device, additive=None):
    """Masks that are broadcast over some axes, or have their axes the other way round."""
    if what == "transposed":
        return random_mask(b, n, t, s, device=device, additive=additive).transpose(2, 3)
    if what == "expanded":
        return random_mask(1, 1, 1, t, device=device, additive=additive).expand(b, n, s, t)
    shape = {
        "full": (b, n, s, t),
        "per key": (1, 1, 1, t),
        "per head": (1, n, s, t),
        "per sequence": (b, 1, s, t),
    }[what]
    return random_mask(*shape, device=device, additive=additive)


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("additive", [None, torch.float32])
def test_shapes_and_strides(what, additive, device):
    b, s, t, n = 2, 21, 37, 4
    q, k, v = inputs((b, s, t, n, 2, 24), torch.float32, device)
    do = normal(b, s, n, 24, device=device, seed=3)
    mask = mask_of(what, b, s, t, n, device, additive)
    check_forward(attention(q, k, v, mask=mask), q, k, v, mask=mask)
    check_backward(q, k, v, do, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_joined_with_causal_and_window(dtype, causal, window, device):
    q, k, v = inputs((1, 35, 41, 2, 1, 16), dtype, device)
    do = normal(1, 35, 2, 16, device=device, dtype=dtype, seed=3)
    for additive in (None, dtype):
        mask = mask_of("per sequence", 1, 35, 41, 2, device, additive)
        options = {"mask": mask, "causal": causal, "window": window}
        check_forward(attention(q, k, v, **options), q, k, v, **options)
        check_backward(q, k, v, do, **options)


def test_padding_on_the_left_leaves_rows_that_see_nothing(device):
    """As transformers pads prompts: a padding query sees no key, and moves no gradient."""
    q, k, v = inputs((2, 20, 20, 2, 1, 16), torch.float32, device)
    do = normal(2, 20, 2, 16, device=device, seed=3)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool, device=device)
    mask[0, ..., :18] = False
    o, lse = attention(q, k, v, causal=True, mask=mask)
    assert (o[0, :18] == 0).all() and (lse[0, :, :18] == -torch.inf).all()
    dq, dk, dv = attention_backward(do, q, k, v, o, lse, causal=True, mask=mask)
    assert (dq[0, :18] == 0).all() and (dk[0, :18] == 0).all() and (dv[0, :18] == 0).all()
    check_forward((o, lse), q, k, v, causal=True, mask=mask)
    check_backward(q, k, v, do, causal=True, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_counts_as_unseen(dtype, device):
    """What many models add instead of -inf: the sum must not leave fp32's range as a NaN."""
    q, k, v = inputs((1, 9, 20, 2, 2, 16), dtype, device)
    do = normal(1, 9, 2, 16, device=device, dtype=dtype, seed=3)
    seen = random_mask(1, 1, 9, 20, device=device)
    seen[..., 4, :] = False
    lowest = torch.zeros(seen.shape, dtype=dtype, device=device)
    lowest = lowest.masked_fill(~seen, torch.finfo(dtype).min)
    got = attention(q, k, v, mask=lowest)
    expected = attention(q, k, v, mask=seen)
    gradients = [
        attention_backward(do, q, k, v, *forward, mask=mask)
        for forward, mask in ((got, lowest), (expected, seen))
    ]
    # Compiled, the scale is joined by fma to what follows it, which is another operation in each: a
    # rounding of a score of up to 8, and its exponential is in error by as much.
    apart = 0.0 if device == "cpu" else 8 * UNIT[torch.float32] + 2 * UNIT[dtype]
    for a, b in zip((*got, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(
            a, b, rtol=apart, atol=apart * float(b[b.isfinite()].abs().max())
        )


def test_the_reference_adds_what_the_boolean_mask_hides(device):
    q, k, v = inputs((1, 7, 11, 2, 1, 16), torch.float32, device)
    seen = random_mask(1, 2, 7, 11, device=device)
    hidden = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
    for a, b in zip(
        reference.attention(q, k, v, causal=True, mask=seen),
        reference.attention(q, k, v, causal=True, mask=hidden),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_bad_masks(device):
    q, k, v = inputs((1, 4, 6, 2, 1, 16), torch.float32, device)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
    for mask, message in (
        (torch.ones(4, 6, dtype=torch.bool, device=device), r"expands to \(1, 2, 4, 6\)"),
        (torch.ones(1, 2, 4, 5, dtype=torch.bool, device=device), r"expands to \(1, 2, 4, 6\)"),
        (torch.ones(1, 2, 4, 6, dtype=torch.int32, device=device), "got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, mask=mask)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="expected None beside cu_seqlens"):
        attention(q, k, v, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
