"""Dropout, cross-entropy and attention as the modules call them: the table's triton rows and torch's."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.comm.group import Group
from pyparallel.ops.dropout import dropout
from pyparallel.ops.triton.attention import reason as reason_against
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
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
@pytest.mark.parametrize(("z_loss", "offset"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 4096.0)])
def test_cross_entropy(label_smoothing, z_loss, offset, device):
    logits = (normals(5, 33, seed=1, scale=4.0) + offset).to(device)
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


def test_plain_attention_is_left_to_torch_unless_asked_for(device):
    """By itself the table takes our kernel only for what torch has no fused kernel for."""
    q, k = normals(1, 4, 2, 8, seed=1).to(device), normals(1, 6, 2, 8, seed=2).to(device)
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool, device=device)
    plain = (
        (q, q, q, {"causal": True}),
        (q, k, k, {}),
        (q[:, :1], k, k, {"causal": True}),
    )
    ours = (
        (q, k, k, {"causal": True}),
        (q, q, q, {"causal": True, "window": 2}),
        (q, k, k, {"mask": mask}),
    )
    for *tensors, options in plain:
        assert "unless triton is asked for" in reason_against(*tensors, **options)
        with backend.use("triton"):
            assert reason_against(*tensors, **options) is None
    for *tensors, options in ours:
        assert "unless triton is asked for" not in (reason_against(*tensors, **options) or "")
