"""vocab_parallel_cross_entropy against torch's cross_entropy on the whole logits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from pyparallel import backend, reference
from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.cut.shard import even_parts
from pyparallel.layers import ParallelLMHead, VocabParallelEmbedding
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.testing import (
    UNIT_ROUNDOFF,
    assert_equal,
    assert_within,
    integers,
    normals,
    own,
    run_ranks,
)

RANKS = [1, 2, 3, 4]
# Leading axes and vocabulary: odd, uneven, fewer ids than ranks, one id, no token, no batch axis.
SHAPES = (((2, 5), 33), ((7,), 64), ((3,), 3), ((4,), 1), ((0,), 5), ((), 10))
OPTIONS = tuple(product((0.0, 0.1, 1.0), ("none", "mean", "sum"), (0.0, 1e-2)))


def targets_for(lead: tuple[int, ...], vocab: int, ignore_index: int) -> torch.Tensor:
    """Ids that visit every edge between shards, with some ignored ones."""
    count = torch.Size(lead).numel()
    edges = [i for r in (2, 3, 4) for ((a, b),) in even_parts(vocab, r).ranges for i in (a, b - 1)]
    edges = [edge for edge in edges if 0 <= edge < vocab]
    ids = torch.tensor([edges[i * 5 % len(edges)] for i in range(count)], dtype=torch.long)
    ids[2::4] = ignore_index
    return ids.view(lead)


def dense_loss(
    logits, targets, *, ignore_index, label_smoothing, reduction, z_loss
) -> torch.Tensor:
    """Written out with torch's own ops, in the dtype of the logits."""
    flat = logits.reshape(-1, logits.shape[-1])
    loss = F.cross_entropy(
        flat,
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    counts = targets.flatten() != ignore_index
    loss = loss + torch.where(counts, z_loss * flat.logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() / (counts.sum() if reduction == "mean" else 1)


def bounds(logits, targets, loss_grad, ranks, *, label_smoothing, z_loss, **_):
    """Worst-case errors in fp32 of each token's loss and of its gradient, [T] and [T, V].

    With v = 2^-24 and X the token's largest |logit|: a sum of V exponentials merged over R ranks errs by
    (V + R) v, exp() and log() by a few v, and the differences before them by X v; that makes lse's
    error. The loss adds roundings of numbers up to X, those of the sum of V logits, and lse^2's. The
    gradient's exponential has the relative error of its argument.
    """
    x = logits.double().flatten(0, -2) if logits.dim() > 1 else logits.double().unsqueeze(0)
    v, vocab = UNIT_ROUNDOFF[torch.float32], x.shape[-1]
    largest = x.abs().amax(-1)
    lse = x.logsumexp(-1)
    lse_error = v * (vocab + ranks + 8 + 4 * largest)
    factor = 1 + 2 * z_loss * lse.abs()
    loss = lse_error * factor + v * (
        4 * largest + label_smoothing * (vocab + ranks) * largest + 4 * z_loss * lse**2
    )
    p = torch.softmax(x, -1) * factor.unsqueeze(-1)
    relative = (lse_error + v * (2 * largest + 8)).unsqueeze(-1)
    return loss, loss_grad.double().abs().reshape(-1, 1) * (p * relative + 4 * v)


def as_dense(group: Group, dtype: torch.dtype, ignore_index: int) -> None:
    for (lead, vocab), (smoothing, reduction, z_loss) in product(SHAPES, OPTIONS):
        what = f"{dtype} {lead} V={vocab} e={smoothing} {reduction} z={z_loss}"
        options = {
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "reduction": reduction,
            "z_loss": z_loss,
        }
        logits = normals(*lead, vocab, seed=1, dtype=dtype, scale=4.0)
        targets = targets_for(lead, vocab, ignore_index)
        if reduction == "mean" and not bool((targets != ignore_index).any()):
            continue
        dloss = normals(*(lead if reduction == "none" else ()), seed=2)

        truth_x = logits.double().requires_grad_()
        truth = dense_loss(truth_x, targets, **options)
        (truth_grad,) = torch.autograd.grad(truth, truth_x, dloss.double())
        cut = even_parts(vocab, group.shares, dim=-1)
        shard = cut.split(logits, group.rank).requires_grad_()
        with count_collectives() as forward:
            loss = vocab_parallel_cross_entropy(
                shard, targets, group=group, vocab_size=vocab, **options
            )
        with count_collectives() as backward:
            (grad,) = torch.autograd.grad(loss, shard, dloss)

        counts = (targets != ignore_index).flatten()
        scale = dloss / counts.sum() if reduction == "mean" else dloss
        scale = scale.expand(lead) if reduction != "none" else scale
        loss_bound, grad_bound = bounds(logits, targets, scale, group.size, **options)
        if reduction == "none":
            loss_bound = loss_bound.view(lead)
        else:
            # The sum over the tokens rounds each partial sum.
            sizes = dense_loss(logits.double(), targets, **{**options, "reduction": "none"}).abs()
            rounding = (targets.numel() + 2) * UNIT_ROUNDOFF[torch.float32] * sizes.sum()
            loss_bound = (loss_bound * counts).sum() + rounding
            loss_bound = loss_bound / counts.sum() if reduction == "mean" else loss_bound
        assert loss.dtype == torch.float32
        assert_within(loss, truth, 1.1 * loss_bound, what)
        own_truth = cut.split(truth_grad, group.rank)
        own_bound = cut.split(grad_bound.view(logits.shape), group.rank)
        assert grad.dtype == dtype
        # A gradient in bf16 is rounded once more.
        rounding = UNIT_ROUNDOFF[dtype] * own_truth.abs() if dtype != torch.float32 else 0
        assert_within(grad, own_truth, 1.1 * (own_bound + rounding), f"{what} dlogits")
        # The one collective: 4 numbers a token from every rank.
        expected = {}
        if group.size > 1:
            num_bytes = group.size * targets.numel() * 16
            expected = {"all_gather": 1, ("all_gather", "bytes"): num_bytes}
        assert dict(forward) == expected, what
        assert dict(backward) == {}, what


@pytest.mark.parametrize("ranks", RANKS)
def test_as_dense(ranks):
    run_ranks(as_dense, ranks, torch.float32, -100)


@pytest.mark.parametrize("ranks", [1, 3])
def test_as_dense_in_bf16_with_a_real_id_ignored(ranks):
    run_ranks(as_dense, ranks, torch.bfloat16, 0)


def in_place(group: Group) -> None:
    vocab = 11
    shard = even_parts(vocab, group.shares, dim=-1).split(normals(3, vocab, seed=1), group.rank)
    logits = shard.clone().requires_grad_()
    targets = torch.tensor([0, 10, 5])
    loss = vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=vocab)
    assert_equal(logits.detach(), shard, "logits after forward")
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="one backward"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("ranks", [1, 3])
def test_gradient_lies_in_the_logits(ranks):
    run_ranks(in_place, ranks)


def same_bits(group: Group) -> tuple[list[float], list[float]]:
    vocab = 50
    shard = even_parts(vocab, group.shares, dim=-1).split(normals(9, vocab, seed=1), group.rank)
    targets = torch.arange(9) * 5
    options = {"group": group, "vocab_size": vocab, "label_smoothing": 0.1}
    first, second = (
        vocab_parallel_cross_entropy(shard, targets, reduction="none", **options).tolist()
        for _ in range(2)
    )
    return first, second


def test_all_ranks_and_runs_give_the_same_bits():
    losses = run_ranks(same_bits, 4)
    assert all(loss == losses[0][0] for pair in losses for loss in pair)


def infinite(group: Group) -> None:
    """Masked columns, a whole rank of them, and rows that are ignored because they are infinite."""
    vocab = 8
    logits = normals(4, vocab, seed=1)
    logits[0, :4] = -torch.inf
    logits[1, 4:] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    targets = torch.tensor([6, 1, -100, -100])
    truth_x = logits.double()[:2].requires_grad_()
    truth = F.cross_entropy(truth_x, targets[:2], reduction="sum")
    (truth_grad,) = torch.autograd.grad(truth, truth_x)
    cut = even_parts(vocab, group.shares, dim=-1)
    shard = cut.split(logits, group.rank).requires_grad_()
    loss = vocab_parallel_cross_entropy(
        shard, targets, group=group, vocab_size=vocab, reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, shard)
    assert torch.isclose(loss.double(), truth, rtol=1e-6, atol=0)
    expected = torch.cat([truth_grad, torch.zeros(2, vocab, dtype=torch.float64)])
    torch.testing.assert_close(grad.double(), cut.split(expected, group.rank), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_infinite_logits(ranks):
    run_ranks(infinite, ranks)


def memory(group: Group) -> None:
    """Nothing of the logits' size is made: the largest new tensor is a block of rows."""
    vocab, tokens = 4096 * group.size, 1024
    logits = torch.randn(tokens, vocab // group.size, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=vocab)
        torch.autograd.grad(loss, logits)
    made = max(event.self_cpu_memory_usage for event in profile.events())
    assert made < logits.numel() * logits.itemsize / 4, made


def test_makes_no_second_logits():
    run_ranks(memory, 2)


def end_to_end(group: Group) -> None:
    """Tied embedding, head and loss: ids on the edges of the shards, against the dense gradients."""
    vocab, hidden = 13, 4
    table = normals(vocab, hidden, seed=1)
    ids = targets_for((2, 6), vocab, 0)
    labels = ids.roll(-1, 1).masked_fill(ids == 4, -100)
    dense = table.double().requires_grad_()
    loss = reference.cross_entropy(F.linear(F.embedding(ids, dense), dense), labels)
    (truth,) = torch.autograd.grad(loss, dense)

    embedding = VocabParallelEmbedding(vocab, hidden, group=group)
    head = ParallelLMHead(hidden, vocab, False, group=group, gather_output=False)
    embedding.load_dense({"weight": table})
    head.weight = embedding.weight
    parallel = vocab_parallel_cross_entropy(
        head(embedding(ids)), labels, group=group, vocab_size=vocab
    )
    (grad,) = torch.autograd.grad(parallel, embedding.weight)
    assert torch.isclose(parallel.double(), loss, rtol=1e-6, atol=0)
    expected = own(embedding, "weight", truth, group)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_tied_embedding_and_head(ranks):
    run_ranks(end_to_end, ranks)


def test_reference_backend_and_exact_tie():
    """Equal logits give log V whatever the backend."""
    logits = integers(3, 16, seed=1) * 0
    targets = torch.tensor([0, 7, 15])
    for name in ("torch", "reference"):
        with backend.use(name):
            loss = vocab_parallel_cross_entropy(
                logits, targets, group=Group.single(), vocab_size=16
            )
        assert torch.isclose(loss, torch.tensor(16.0).log(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "average"}, "reduction: expected one of none, mean, sum, got 'average'"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1, got 1.5"),
        ({"z_loss": -1.0}, "z_loss: expected 0 or more, got -1.0"),
        ({"vocab_size": 9}, "logits_shard: expected 9 of vocab_size=9 columns"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets: expected shape \(3,\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"targets": torch.zeros(3, dtype=torch.long), "vocab_size": 8, **change}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(
            torch.zeros(3, 8), arguments.pop("targets"), group=Group.single(), **arguments
        )


@pytest.mark.parametrize("wrong", [8, -1])
def test_a_target_outside_the_vocabulary(wrong):
    with pytest.raises(RuntimeError, match=r"targets: expected 0 <= id < 8"):
        vocab_parallel_cross_entropy(
            torch.zeros(1, 8), torch.tensor([wrong]), group=Group.single(), vocab_size=8
        )
