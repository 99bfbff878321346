"""The dense truth of every op: plain torch, computed in fp32 (fp64 for fp64 inputs), differentiable.

Tests and benchmarks compare with these and with nothing else. Legend: B batch, S sequence, H hidden,
N query heads, G key/value heads, D head size, K input features, M output features, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel.autocast import as_written

GATES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ACTIVATIONS = {**GATES, "relu": F.relu}


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


@as_written
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[..., M] = x[..., K] weight[M, K]^T + bias[M]``."""
    wide_x, wide_weight, wide_bias = _wide(x, weight, bias)
    return F.linear(wide_x, wide_weight, wide_bias).to(x.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """``y[..., H] = weight[ids[...], H]``."""
    return F.embedding(ids, weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis (Ba et al. 2016)."""
    wide_x, wide_weight, wide_bias = _wide(x, weight, bias)
    return F.layer_norm(wide_x, x.shape[-1:], wide_weight, wide_bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich 2019)."""
    wide_x, wide_weight = _wide(x, weight)
    y = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    return (y if wide_weight is None else y * wide_weight).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    """The pointwise function ``kind`` of ACTIVATIONS."""
    (wide_x,) = _wide(x)
    return ACTIVATIONS[kind](wide_x).to(x.dtype)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """``y[..., F] = act(gate) * up`` of ``gate_up[..., 2F]`` = [gate, up] (Shazeer 2020)."""
    gate, up = _wide(*gate_up.chunk(2, -1))
    return (GATES[kind](gate) * up).to(gate_up.dtype)


def rope_frequencies(rotary_dim: int, theta: float = 10000.0) -> Tensor:
    """``theta^(-2i / rotary_dim)``, [rotary_dim / 2], fp32 (Su et al. 2021, RoFormer, section 3.2.2)."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2E features of ``x[B, S, N, D]``; feature i is paired with i + E.

    ``cos, sin [S, E]`` or ``[B, S, E]``, of the tokens' positions:
    ``y_i = x_i cos - x_{i+E} sin``, ``y_{i+E} = x_{i+E} cos + x_i sin``.
    """
    half = cos.shape[-1]
    wide_x, cos, sin = _wide(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second, rest = wide_x.split([half, half, x.shape[-1] - 2 * half], -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    return turned.to(x.dtype)


def attention_mask(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``[S, T]``, true where query i sees key j. The last query stands at the last key.

    ``window``: how many keys, its own included, a query sees.
    """
    behind = torch.arange(num_queries, device=device).unsqueeze(1) + (num_keys - num_queries)
    behind = behind - torch.arange(num_keys, device=device)
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if window is None else seen & (behind < window)


@as_written
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention; query head n reads key/value head ``n * G // N``.

    ``o = softmax(scale q k^T) v``. A query that sees no key gives zeros and ``lse = -inf``.

    Args:
        q: [B, S, N, D]; k, v: [B, T, G, D].
        scale: by default ``1 / sqrt(D)``.
        window: how many keys, its own included, a query sees.
        mask: [B or 1, N or 1, S, T], true where a query sees a key, or what is added to the scores;
            joined with ``causal`` and ``window``.

    Returns:
        o [B, S, N, D] in q's dtype and the log-sum-exp of the scores [B, N, S] in fp32.
    """
    wide_q, wide_k, wide_v = (t.transpose(1, 2) for t in _wide(q, k, v))
    repeats = q.shape[2] // k.shape[2]
    wide_k = wide_k.repeat_interleave(repeats, 1)
    wide_v = wide_v.repeat_interleave(repeats, 1)
    scores = (
        wide_q @ wide_k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    )
    seen = attention_mask(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + mask.to(scores.dtype)
        seen = seen & (scores > -math.inf)
    elif mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, torch.exp(scores - lse.unsqueeze(-1)), 0.0)
    return (weights @ wide_v).transpose(1, 2).to(q.dtype), lse


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """``-log softmax(logits[..., V])[targets] + z_loss lse^2``, with torch's smoothing and reductions.

    A target of ``ignore_index`` has no z-loss either.
    """
    (wide,) = _wide(logits)
    wide, targets = wide.flatten(0, -2), targets.flatten()
    loss = F.cross_entropy(
        wide,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if not z_loss:
        return loss
    counts = targets != ignore_index
    extra = torch.where(counts, z_loss * wide.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss + extra
    return loss + extra.sum() / (counts.sum() if reduction == "mean" else 1)


def philox_word(index: Tensor, seed: int) -> Tensor:
    """The first word of Philox4x32-10 with counter ``index`` and key ``seed``, as int64 in [0, 2^32).

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = 0xFFFFFFFF

    def product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits by halves of the constant: an int64 holds each part.
        upper, lower = (constant >> 16) * word, (constant & 0xFFFF) * word
        carry = (lower >> 16) + (upper & 0xFFFF)
        return (upper >> 16) + (carry >> 16), (constant * word) & low

    words = [index & low, (index >> 32) & low, torch.zeros_like(index), torch.zeros_like(index)]
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_b, low_b = product(0xCD9E8D57, words[2])
        high_a, low_a = product(0xD2511F53, words[0])
        words = [high_b ^ words[1] ^ key0, low_b, high_a ^ words[3] ^ key1, low_a]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return words[0]


def dropout_keep(index: Tensor, p: float, seed: int) -> Tensor:
    """True where dropout keeps the elements with these places in the whole tensor.

    The mask is a function of the place and the seed: a shard's mask is the shard of the mask.
    """
    return philox_word(index, seed) < round((1.0 - p) * 2.0**32)
