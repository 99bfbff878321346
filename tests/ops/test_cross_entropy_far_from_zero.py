"""vocab_parallel_cross_entropy of logits far from zero, as near to the truth as torch's own in fp32."""

from __future__ import annotations

import pytest
import torch

from pyparallel.comm.group import Group
from pyparallel.cut.shard import even_parts
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.testing import UNIT_ROUNDOFF, assert_within, normals, run_ranks
from tests.ops.test_vocab_parallel_cross_entropy import dense_loss, targets_for


def far_from_zero(group: Group, offset: float) -> None:
    """Logits around ``offset``: as near to the truth as torch's own loss in fp32, times the ranks."""
    vocab, lead = 61, (8,)
    logits = normals(*lead, vocab, seed=1, scale=4.0) + offset
    targets = targets_for(lead, vocab, -100)
    cut = even_parts(vocab, group.size, dim=-1)
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (1.0, 0.0), (0.1, 1e-7)):
        options = {
            "ignore_index": -100,
            "label_smoothing": smoothing,
            "reduction": "none",
            "z_loss": z_loss,
        }
        results = []
        for x in (logits.double(), logits.clone()):
            x.requires_grad_()
            loss = dense_loss(x, targets, **options)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        (truth, truth_grad), (dense, dense_grad) = results
        shard = cut.split(logits, group.rank).clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(
            shard, targets, group=group, vocab_size=vocab, **options
        )
        (grad,) = torch.autograd.grad(loss.sum(), shard)
        what = f"e={smoothing} z={z_loss}"
        # Roundings of numbers around the loss and around 1; z lse^2 is a large number itself.
        rounding = UNIT_ROUNDOFF[torch.float32] * 8
        bound = (1 + group.size) * (dense - truth).abs().max() + rounding * truth.abs()
        assert_within(loss, truth, bound, what)
        grad_bound = (1 + group.size) * (dense_grad - truth_grad).abs().max() + rounding
        assert_within(grad, cut.split(truth_grad, group.rank), grad_bound, f"{what} dlogits")


@pytest.mark.parametrize("offset", [4096.0, -3e4])
def test_logits_far_from_zero(offset):
    for ranks in (1, 2, 3):
        run_ranks(far_from_zero, ranks, offset)
