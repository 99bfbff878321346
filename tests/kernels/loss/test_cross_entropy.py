from itertools import pairwise

import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal, padded

from pyparallel import reference
from pyparallel.kernels.loss import cross_entropy as ce


def sharded_loss(logits, targets, cuts, **extra):
    """What R ranks do: statistics of each shard, combined, then each shard's gradient."""
    edges = [0, *cuts, logits.shape[1]]
    shards = [logits[:, a:b] for a, b in pairwise(edges)]
    skip = {k: v for k, v in extra.items() if k == "ignore_index"}
    stats = torch.stack(
        [
            ce.cross_entropy_statistics(s, targets, vocab_start=a, **skip)
            for s, a in zip(shards, edges, strict=False)
        ]
    )
    vocab = logits.shape[1]
    loss, lse = ce.cross_entropy_combine(stats, targets, vocab_size=vocab, **extra)
    return shards, edges, loss, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[], [40], [33, 34], [0, 64, 97]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_over_shards(dtype, cuts, smoothing, device, monkeypatch):
    monkeypatch.setattr(ce, "BLOCK_V", 32)
    logits = normal(9, 97, dtype=dtype, device=device, scale=4)
    targets = torch.tensor([0, 96, 33, -100, 40, 39, 5, 64, 63], device=device)
    dloss = normal(9, device=device, seed=7)
    leaf = logits.double().requires_grad_()
    truth = reference.cross_entropy(leaf, targets, label_smoothing=smoothing, reduction="none")
    truth.backward(dloss.double())

    shards, edges, loss, lse = sharded_loss(
        logits.clone(), targets, cuts, label_smoothing=smoothing
    )
    fp32 = (97 + 20) * UNIT[torch.float32]
    assert_within(loss, truth.detach(), fp32 * (20 + truth.abs()), "loss")
    for shard, start in zip(shards, edges, strict=False):
        ce.cross_entropy_backward_(
            shard, targets, lse, dloss, vocab_size=97, vocab_start=start, label_smoothing=smoothing
        )
    grad = torch.cat(shards, 1)
    bound = 2 * UNIT[dtype] * leaf.grad.abs() + 8 * fp32 * dloss.double().abs()[:, None]
    # fp16's smallest step.
    assert_within(grad, leaf.grad, bound + 2.0**-24, "grad")
    assert (grad[3] == 0).all()


def test_strides_scalar_dloss_and_ignored_infinities(device):
    logits = normal(4, 50, device=device)
    logits[2] = float("-inf")
    logits[0, :40] = float("-inf")
    targets = torch.tensor([45, 3, 7, 7], device=device, dtype=torch.int32)
    view = padded(logits)
    _, _, loss, lse = sharded_loss(view, targets, [20], ignore_index=7)
    keep = torch.tensor([45, 3, -100, -100], device=device)
    truth = reference.cross_entropy(logits.double(), keep, reduction="none")
    assert_within(loss, truth, 100 * UNIT[torch.float32] * (20 + truth.abs()))
    one = torch.tensor(0.5, device=device)
    ce.cross_entropy_backward_(view, targets, lse, one, vocab_size=50, ignore_index=7)
    leaf = logits.double().requires_grad_()
    (0.5 * reference.cross_entropy(leaf, keep, reduction="sum")).backward()
    assert_within(view[[0, 1]], leaf.grad[[0, 1]], 1e-6)
    assert (view[[2, 3]] == 0).all()


def test_empty_and_bad_input(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert ce.cross_entropy_statistics(torch.zeros(0, 5, device=device), none).shape == (0, 4)
    with pytest.raises(ValueError, match=r"logits: expected \[T, V\]"):
        ce.cross_entropy_statistics(torch.zeros(2, 3, 5, device=device), none)
    with pytest.raises(ValueError, match=r"targets: expected shape \(2,\)"):
        ce.cross_entropy_statistics(torch.zeros(2, 5, device=device), none)


def test_centered_statistics(device, monkeypatch):
    """Blocks whose maxima grow and fall, a first block of -inf, logits far from zero."""
    monkeypatch.setattr(ce, "BLOCK_V", 32)
    logits = normal(3, 97, device=device, scale=4) + torch.tensor([[4096.0], [-4096.0], [0.0]])
    logits[1, 64:] += 10
    logits[2, :32] = float("-inf")
    targets = torch.tensor([0, 96, 33], device=device)
    stats = ce.cross_entropy_statistics(logits, targets, centered=True).double()
    wide = logits.double()
    centered = (wide - wide.amax(1, keepdim=True)).sum(1)
    assert_within(stats[:2, 3], centered[:2], 97 * 40 * UNIT[torch.float32])
    assert stats[2, 3] == float("-inf")
