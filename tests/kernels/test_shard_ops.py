"""Dropout and cross-entropy as the modules call them: the table's triton rows against its torch rows."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.functional.dropout import dropout
from pyparallel.functional.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.group import Group
from pyparallel.testing import normals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 5, -3, 2**62 + 1])
def test_dropout_drops_the_same_elements(seed, dtype, device):
    x = normals(2, 5, 9, seed=1, dtype=dtype).to(device)
    results = []
    for name in ("triton", "torch"):
        with backend.use(name):
            given = x.clone().requires_grad_()
            y = dropout(given, 0.3, seed=seed, length=11, start=4)
            results.append((y.detach(), *torch.autograd.grad(y, given, torch.ones_like(y))))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy(label_smoothing, z_loss, device):
    logits = normals(5, 33, seed=1, scale=4.0).to(device)
    targets = torch.tensor([0, 32, -100, 7, 16], device=device)
    results = []
    for name in ("triton", "torch"):
        with backend.use(name):
            given = logits.clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(
                given,
                targets,
                group=Group.single(),
                vocab_size=33,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, given)))
    # Sums of 33 terms in two orders, and exponents of up to 20 in error by an fp32 rounding each.
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=33 * 2**-23, atol=20 * 2**-24)
