"""Ring or Ulysses: estimated seconds of each, and why the smaller one wins.

Legend: B sequences of S tokens, R ranks, N query heads, G KV heads, D head size, e bytes an element,
P the (query, key) pairs of one sequence that the mask leaves; F flops a second of one rank, W bytes a
second that a rank sends, L seconds until an exchange of nothing is done.

    work      c = 4 B P N D / (R F)                     seconds of attention a rank, heads or tokens even
    ring      c + (R-1) max(0, t - c/R),                t = L + 2 B (S/R) G D e / W, one step's transfer
    ulysses   c (R max N_r / N) + 2 L + (R-1)/R B (S/R) (2N + 2 max(G, R)) D e / W

The ring sends (R-1)/R B S 2 G D e bytes a rank, which does not shrink with R, but behind the work;
Ulysses sends about R times less for N = G, in the open, and its busiest rank has the most heads. So: few
KV heads and long sequences want the ring, many ranks and short sequences want Ulysses, and more ranks
than query heads leave the ring alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.comm.context import ContextShards
from pyparallel.cut.shard import HeadLayout


@dataclass(frozen=True)
class Speed:
    """What an estimate needs to know of the machine.

    Attributes:
        flops: of one rank's attention, a second.
        bytes_per_s: that one rank sends while all do.
        latency_s: of one exchange among all ranks.
    """

    flops: float
    bytes_per_s: float
    latency_s: float


# Orders of magnitude are enough: near the crossing both take about the same time. CPU: measured, one
# AVX-512 core a rank in fp32, two ranks that share memory. CUDA: not measured, an H100's data sheet with
# the usual share of it: half of the bf16 peak, half of NVLink.
SPEEDS = {"cpu": Speed(3e10, 4e9, 6e-5), "cuda": Speed(5e14, 2e11, 3e-5)}


@dataclass(frozen=True)
class Choice:
    """The algorithm, the estimated forward seconds of each (None: it can't run), and the reason."""

    algorithm: str
    ring_s: float
    ulysses_s: float | None
    reason: str


def seen_pairs(
    length: int,
    *,
    causal: bool,
    window: int | None = None,
    documents: Sequence[int] | None = None,
) -> int:
    """P: how many (query, key) pairs of one sequence are seen."""
    cuts = documents or (0, length)
    pairs = 0
    for start, stop in itertools.pairwise(cuts):
        size = stop - start
        if not causal:
            pairs += size * size
            continue
        near = size if window is None else min(window, size)
        pairs += near * (near + 1) // 2 + (size - near) * near
    return pairs


def choose(
    *,
    batch: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ranks: int,
    itemsize: int,
    causal: bool,
    window: int | None = None,
    documents: Sequence[int] | None = None,
    speed: Speed = SPEEDS["cpu"],
) -> Choice:
    """Which algorithm to run; a function of sizes that all ranks know, so all choose the same."""
    pairs = seen_pairs(length, causal=causal, window=window, documents=documents)
    work = 4 * batch * pairs * num_heads * head_dim / (ranks * speed.flops)
    tokens = batch * length / ranks
    token_bytes = head_dim * itemsize / speed.bytes_per_s
    step = speed.latency_s + 2 * tokens * num_kv_heads * token_bytes
    ring = work + (ranks - 1) * max(0.0, step - work / ranks)
    try:
        layout = HeadLayout.of(num_heads, num_kv_heads, ranks)
    except ValueError:
        reason = f"{num_heads} heads in {num_kv_heads} KV groups can't be cut over {ranks} ranks"
        return Choice("ring", ring, None, reason)
    busiest = max(stop - start for start, stop in layout.query)
    heads = 2 * num_heads + 2 * max(num_kv_heads, ranks)
    exchange = 2 * speed.latency_s + (ranks - 1) / ranks * tokens * heads * token_bytes
    ulysses = work * busiest * ranks / num_heads + exchange
    algorithm = "ring" if ring <= ulysses else "ulysses"
    hidden = "under" if step <= work / ranks else "longer than"
    reason = (
        f"ring {ring * 1e3:.3g} ms (a step's transfer {step * 1e3:.2g} ms, {hidden} its work "
        f"{work / ranks * 1e3:.2g} ms), ulysses {ulysses * 1e3:.3g} ms (exchanges "
        f"{exchange * 1e3:.2g} ms, busiest rank {busiest} of {num_heads} heads)"
    )
    return Choice(algorithm, ring, ulysses, reason)


def choose_for(
    q: Tensor, k: Tensor, shards: ContextShards, *, causal: bool, window: int | None
) -> Choice:
    """The choice for tensors on shards: q [B, S_r, N, D], k [B, S_r, G, D]."""
    return choose(
        batch=q.shape[0],
        length=shards.length,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        ranks=shards.group.size,
        itemsize=torch.finfo(q.dtype).bits // 8,
        causal=causal,
        window=window,
        documents=None if shards.documents is None else shards.documents[0],
        speed=SPEEDS.get(q.device.type, SPEEDS["cpu"]),
    )
