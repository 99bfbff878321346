"""Seconds that a collective takes, by its bytes, its ranks and the links between them.

``num_bytes`` is the "size" of nccl-tests: what a rank has before an all_reduce or a broadcast, and the
whole buffer, over all ranks, of all_gather, reduce_scatter and all_to_all; of a send, the message.

Inside a node there are three answers, the first that is known:

* **table**: measured times of this op, on these GPUs, by these ranks, at every fourfold size; between
  two sizes the logarithm of the time is a line. Algorithms change with the size (LL, LL128, simple,
  NVLS; one shot, two shots), which two constants can't follow.
* **alpha_beta**: t = alpha + bytes / beta, with the two constants fitted to the same measurements.
* **law**, for a link that nobody measured, by R ranks::

      t = 0.4 (R + 2) link.alpha + wire / (0.7 link.bytes_per_s)
      wire = 2 (R-1)/R bytes for all_reduce, (R-1)/R for the gathers, scatters and all_to_all, else 1

  0.4 (R + 2) is what the fits of an H100 show: 7.8, 11.0 and 18.4 us of all_reduce by 2, 4 and 8 ranks,
  where a message takes 5; 0.7 lies between the 0.5 and 0.85 of the link's rate that they show.

**Across nodes** a group with k ranks on each of m nodes reduces inside the nodes, then each of the k
ranks of a node sums its part with its peers on the other nodes, each by its own network card. NCCL
pipelines the two, so the bytes of the slower one count, and both latencies: ``2 log2 m`` messages, twice
for all_reduce, as two A100 nodes show (40 us more than one, at 10 us a message) and four B200 nodes do
(330 us more, at 30).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

from pyparallel.planner.fits import read_fits, system_of
from pyparallel.planner.hardware import Cluster, Link

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"]
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
# Whose all_reduce: NCCL's; vLLM's one and two shots, in a CUDA graph or launched one by one;
# TensorRT-LLM's.
Kernel = Literal["nccl", "vllm_graph", "vllm_eager", "trtllm"]
Model = Literal["table", "alpha_beta", "law"]
# Of a link's rate: in a collective by all ranks of a node, and by messages between two.
LINK_FRACTION = 0.7
SEND_FRACTION = 0.8


def collective_seconds(
    op: Op,
    num_bytes: float,
    ranks: int,
    cluster: Cluster,
    *,
    ranks_per_node: int | None = None,
    kernel: Kernel = "nccl",
    model: Model = "table",
) -> float:
    """Seconds of one collective.

    Args:
        num_bytes: as nccl-tests counts it; see above.
        ranks: of the group; 1 costs nothing.
        ranks_per_node: ranks of the group that share a node. Default: ranks side by side, so as many as
            a node holds. A data-parallel group whose ranks are 8 apart has 1 on a node of 8.
        kernel: whose all_reduce, inside a node; NCCL's stands in where there is no measurement of it.
        model: the best answer to use.

    Raises:
        ValueError: for an op of another name, fewer than one rank, or negative bytes.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    if ranks < 1 or num_bytes < 0:
        raise ValueError(f"{op}: expected at least 1 rank and 0 bytes, got {ranks} and {num_bytes}")
    if ranks == 1 or num_bytes == 0:
        return 0.0
    inside = min(ranks, ranks_per_node or cluster.gpus_per_node)
    nodes = math.ceil(ranks / inside)
    if op == "send":
        link = cluster.intra if inside > 1 else cluster.inter
        return link.alpha_s + num_bytes / (SEND_FRACTION * link.bytes_per_s)
    if nodes == 1:
        return _inside(op, num_bytes, inside, cluster, kernel, model)
    rate = SEND_FRACTION * cluster.inter.bytes_per_s
    across = _wire(op, nodes) * num_bytes / inside / rate
    messages = math.ceil(math.log2(nodes)) * (4 if op == "all_reduce" else 2)
    latency = messages * cluster.inter.alpha_s
    if inside == 1:
        return latency + across
    within = _inside(op, num_bytes, inside, cluster, kernel, model)
    within_latency = min(within, _inside(op, 1024, inside, cluster, kernel, model))
    return latency + within_latency + max(across, within - within_latency)


def _wire(op: Op, ranks: int) -> float:
    """Bytes that a rank sends for each of ``num_bytes``, by a ring."""
    if op == "broadcast":
        return 1.0
    return (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks


def _law(op: Op, num_bytes: float, ranks: int, link: Link) -> float:
    rate = LINK_FRACTION * link.bytes_per_s * (ranks - 1 if link.per_peer else 1)
    return 0.4 * (ranks + 2) * link.alpha_s + _wire(op, ranks) * num_bytes / rate


def _inside(
    op: Op, num_bytes: float, ranks: int, cluster: Cluster, kernel: Kernel, model: Model
) -> float:
    usual = cluster.intra.name == cluster.gpu.link
    if model == "law" or op == "broadcast" or not usual:
        return _law(op, num_bytes, ranks, cluster.intra)
    system = system_of(cluster.gpu.name)
    kernel = kernel if op == "all_reduce" else "nccl"
    for name in dict.fromkeys((kernel, "nccl")):
        measured = _measured(model, name, system, op)
        if measured:
            break
    else:
        return _law(op, num_bytes, ranks, cluster.intra)
    # Between and beyond the groups that were measured, the law's ratio to the nearest of them.
    nearest = min(measured, key=lambda count: (abs(math.log(count / ranks)), count))
    seconds = _at(model, name, system, op, nearest, num_bytes)
    if nearest == ranks:
        return seconds
    return seconds * (
        _law(op, num_bytes, ranks, cluster.intra) / _law(op, num_bytes, nearest, cluster.intra)
    )


@cache
def _measured(model: Model, kernel: str, system: str, op: str) -> tuple[int, ...]:
    """Sizes of the groups that were measured."""
    fits = read_fits("communication")["tables" if model == "table" else "alpha_beta"]
    return tuple(map(int, fits.get(kernel, {}).get(system, {}).get(op, {})))


def _at(model: Model, kernel: str, system: str, op: str, ranks: int, num_bytes: float) -> float:
    fits = read_fits("communication")
    if model == "alpha_beta":
        alpha, beta = fits["alpha_beta"][kernel][system][op][str(ranks)]
        return (alpha + num_bytes / beta) * 1e-6
    sizes = fits["tables"][kernel]["bytes"]
    times = fits["tables"][kernel][system][op][str(ranks)]
    return _interpolate(sizes, times, num_bytes) * 1e-6


def _interpolate(sizes: list[int], times: list[float], num_bytes: float) -> float:
    """On the line between two neighbours in logarithms; flat below the table, proportional above."""
    if num_bytes <= sizes[0]:
        return times[0]
    if num_bytes >= sizes[-1]:
        return times[-1] * num_bytes / sizes[-1]
    # Every size is four times the one before.
    place = math.log(num_bytes / sizes[0], 4)
    low = min(int(place), len(sizes) - 2)
    part = place - low
    return times[low] ** (1 - part) * times[low + 1] ** part
