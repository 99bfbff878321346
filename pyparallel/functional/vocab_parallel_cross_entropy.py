"""Cross-entropy of logits whose vocabulary is cut over the ranks; no rank holds a whole row of them.

Legend: T tokens, V vocabulary, V_r this rank's part, e smoothing, z the weight of the z-loss.

    statistics  m = max logit, s = sum exp(logit - m), t = the target's logit (0 elsewhere),
                a = sum (logit - m); of this rank's columns, [T, 4]
    combine     M = max over ranks of m,  L = log(sum over ranks, in rank order, of s exp(m - M))
                loss = L + (1 - e) (M - sum t) - (e / V) sum (a + V_r (m - M)) + z lse^2,  lse = M + L
    gradient    dlogit = dloss ((1 + 2 z lse) exp(logit - M - L) - (1 - e) [v = target] - e / V)

Large numbers are subtracted from each other before a small one is added: M + L would round L away where
the logits are far from 0.

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
from pyparallel.collectives import all_gather_raw
from pyparallel.group import Group
from pyparallel.shard import even_parts

REDUCTIONS = ("none", "mean", "sum")


def combine(found: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All ranks' statistics [R, T, 4] to M, L, target logit and sum of (logit - M), each [T].

    Args:
        sizes: how many columns each rank has.
    """
    highest = found[:, :, 0].amax(0)
    base = highest.masked_fill(highest.isneginf(), 0.0)
    total = torch.zeros_like(highest)
    target, everything = torch.zeros_like(highest), torch.zeros_like(highest)
    for size, (m, s, t, a) in zip(sizes, (part.unbind(1) for part in found), strict=True):
        total += s * torch.exp(m - base)
        target += t
        # Nothing was subtracted from a rank's columns that are all -inf, and from none.
        everything += a + size * (torch.where(m.isneginf(), 0.0, m - base))
    return base, torch.log(total), target, everything


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, targets, group, cut, ignore_index, label_smoothing, z_loss) -> Tensor:
        start, vocab_size, sizes = cut
        found = backend.call("cross_entropy_statistics", logits, targets, start, ignore_index)
        found = found.unsqueeze(0)
        if group.size > 1:
            found = all_gather_raw(found, group)
        base, lse, target, everything = combine(found, sizes)
        loss = lse + (1.0 - label_smoothing) * (base - target)
        if label_smoothing:
            loss -= label_smoothing * (everything / vocab_size)
        if z_loss:
            loss += z_loss * (base + lse).square()
        ctx.save_for_backward(logits, targets, lse, base)
        ctx.options = start, vocab_size, ignore_index, label_smoothing, z_loss
        ctx.spent = False
        return loss.masked_fill(targets == ignore_index, 0.0)

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
    group: Group,
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
    cut = even_parts(vocab_size, group.size)
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
