"""Cross-entropy of logits whose vocabulary is cut over the ranks; no rank holds a whole row of them.

Legend: T tokens, V vocabulary, V_r this rank's part, e smoothing, z the weight of the z-loss.

    statistics  m = max logit, s = sum exp(logit - m), t = the target's logit (0 elsewhere),
                a = sum (logit - m); of this rank's columns, [T, 4]
    combine     M = max over ranks of m,  L = log(sum over ranks, in rank order, of s exp(m - M))
                loss = L + (1 - e) (M - sum t) - (e / V) sum (a + V_r (m - M)) + z lse^2,  lse = M + L
    gradient    dlogit = dloss ((1 + 2 z lse) exp(logit - lse) - (1 - e) [v = target] - e / V)

A token's few numbers are combined in fp64, and its lse goes to the gradient in two parts, what fp32
holds of it and the rest: fp32 alone would round 1e-4 away where logits are around 4096.

A token whose target is ``ignore_index`` has loss 0 and gradient 0. The gradient is written over the
logits, so the loss needs no second [T, V_r].

Communication: one all-gather of the statistics forward, 16 T bytes a rank (32 T for fp64); none
backward. A maximum, a sum of exponentials and a target's logit by three all-reduces would wait three
times.
Sources: Shoeybi et al. 2019, "Megatron-LM", section 3; Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax" (merging of partial sums); Chowdhery et al. 2022, "PaLM", section 5 (z-loss);
Szegedy et al. 2016, section 7 (smoothing).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend
from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.cut.shard import even_parts

NEAR_ZERO = 32.0
REDUCTIONS = ("none", "mean", "sum")


def combine(found: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' statistics [R, T, 4] to lse, target logit and mean logit, each [T], in fp64.

    Args:
        sizes: how many columns each rank has.
    """
    found = found.double()
    highest = found[:, :, 0].amax(0)
    base = highest.masked_fill(highest.isneginf(), 0.0)
    total = torch.zeros_like(highest)
    target, everything = torch.zeros_like(highest), torch.zeros_like(highest)
    for size, (m, s, t, a) in zip(sizes, (part.unbind(1) for part in found), strict=True):
        total += s * torch.exp(m - base)
        target += t
        # Nothing was subtracted from a rank's columns that are all -inf, and from none.
        everything += a + size * torch.where(m.isneginf(), 0.0, m - base)
    return base + torch.log(total), target, base + everything / sum(sizes)


def _plain_lse(found: Tensor) -> Tensor:
    """lse [T] by the arithmetic of the statistics' own dtype."""
    highest = found[:, :, 0].amax(0)
    base = highest.masked_fill(highest.isneginf(), 0.0)
    total = torch.zeros_like(highest)
    for m, s in ((part[:, 0], part[:, 1]) for part in found):
        total += s * torch.exp(m - base)
    return base + torch.log(total)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, targets, group, cut, ignore_index, label_smoothing, z_loss) -> Tensor:
        start, vocab_size, sizes = cut
        found = backend.call("cross_entropy_statistics", logits, targets, start, ignore_index)
        found = found.unsqueeze(0)
        if group.size > 1:
            found = all_gather_raw(found, group)
        lse, target, mean = combine(found, sizes)
        loss = lse - (1.0 - label_smoothing) * target
        if label_smoothing:
            loss -= label_smoothing * mean
        if z_loss:
            loss += z_loss * lse.square()
        # What the logits' dtype holds of lse, and the rest. Near zero that is less than a logit's own
        # rounding: one subtraction, of the sum as that dtype gives it, is then all.
        near = lse.abs() < NEAR_ZERO
        base = torch.where(near, _plain_lse(found), lse.to(found.dtype))
        rest = torch.where(near, 0.0, lse - base)
        ctx.save_for_backward(logits, targets, rest.to(found.dtype), base)
        ctx.options = start, vocab_size, ignore_index, label_smoothing, z_loss
        ctx.spent = False
        return loss.to(found.dtype).masked_fill(targets == ignore_index, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: expected one backward, got another; the first wrote "
                "the gradient over the logits, so compute the loss again"
            )
        ctx.spent = True
        logits, targets, lse, base = ctx.saved_tensors
        gradient = backend.call(
            "cross_entropy_gradient_", logits, targets, lse, grad.contiguous(), *ctx.options, base
        )
        return gradient, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_shard: Tensor,
    targets: Tensor,
    *,
    group: GroupLike,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """``-log softmax(logits)[targets]`` of logits cut as :class:`ParallelLMHead` cuts them.

    Backward writes the gradient over ``logits_shard``, once. To predict the next token shift the
    targets, not the logits: a slice of those that is not one piece of memory is copied.

    Args:
        logits_shard: [..., V_r]. targets: [...], int64, ids of the whole vocabulary.
        vocab_size: V.
        ignore_index: targets with this value do not count.
        label_smoothing: how much of a target's probability is spread over the whole vocabulary.
        reduction: "none" ([...]), "mean" over the targets that count, or "sum".
        z_loss: adds ``z_loss * lse^2`` to each token's loss.

    Returns:
        fp32 (fp64 for fp64 logits), the same on every rank.

    Raises:
        ValueError: shapes, sizes or options that do not fit.
        RuntimeError: a target that is neither an id nor ``ignore_index``; a second backward.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: expected 0 or more, got {z_loss}")
    if logits_shard.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits_shard.shape[:-1])}, one for each row of the "
            f"logits, got {tuple(targets.shape)}"
        )
    group = group_of(group)
    cut = even_parts(vocab_size, group.shares)
    ((start, stop),) = cut.ranges[group.rank]
    if stop - start != logits_shard.shape[-1]:
        raise ValueError(
            f"logits_shard: expected {stop - start} of vocab_size={vocab_size} columns on rank "
            f"{group.rank} of {group.size}, got {logits_shard.shape[-1]}"
        )
    flat = targets.flatten()
    counts = flat != ignore_index
    # Asynchronous: no device waits for it.
    known = ~counts | ((flat >= 0) & (flat < vocab_size))
    torch._assert_async(
        known.all(), f"targets: expected 0 <= id < {vocab_size} or {ignore_index} (ignore_index)"
    )
    logits = logits_shard.flatten(0, -2) if logits_shard.dim() > 1 else logits_shard.unsqueeze(0)
    loss = _VocabParallelCrossEntropy.apply(
        logits,
        flat,
        group,
        (start, vocab_size, cut.sizes),
        ignore_index,
        label_smoothing,
        z_loss,
    )
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()
