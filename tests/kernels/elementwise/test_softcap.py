"""The Triton row of softcap: the checks of tests/ops/test_softcap.py, in the interpreter."""

import pytest
import torch

from pyparallel.kernels.elementwise.softcap import softcap, softcap_backward, softcap_out
from tests.ops.test_softcap import CAPS, DTYPES, SHAPES, check, check_ends


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, device):
    for shape in SHAPES:
        for cap in CAPS:
            check("triton", shape, dtype, cap, device)


def test_the_ends(device):
    check_ends("triton", device)


def test_in_place_and_what_does_not_fit(device):
    x = torch.linspace(-90, 90, 1030, device=device)
    expected = softcap(x, cap=30.0)
    assert softcap_out(x, x, cap=30.0) is x and torch.equal(x, expected)
    with pytest.raises(ValueError, match="cap: expected more than 0, got -1"):
        softcap(x, cap=-1.0)
    with pytest.raises(ValueError, match="dy: expected shape"):
        softcap_backward(x[:3], x, cap=1.0)
    with pytest.raises(ValueError, match="x: expected contiguous"):
        softcap(x[::2], cap=1.0)
