"""The smallest cluster that holds a piece of work, for one who has asked too little of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyparallel.planner.hardware import MAX_GPUS, Cluster, with_gpus


def smallest_cluster(cluster: Cluster, holds: Callable[[Cluster], bool]) -> Cluster | None:
    """The first, of ever more GPUs like these, that ``holds`` says yes to; None where none does.

    Parts of a node are powers of two, clusters whole nodes: each number of them up to 16, then each
    power of two. A single node grows to what its GPUs are usually built in.
    """
    per_node = cluster.gpus_per_node
    if cluster.nodes == 1:
        per_node = max(per_node, cluster.gpu.gpus_per_node)
    for gpus in _sizes(per_node):
        grown = with_gpus(cluster, gpus, per_node)
        if gpus > cluster.gpus and holds(grown):
            return grown
    return None


def _sizes(per_node: int) -> Iterator[int]:
    part = 1
    while part < per_node:
        yield part
        part *= 2
    nodes = 1
    while nodes * per_node <= min(MAX_GPUS, 1 << 16):
        yield nodes * per_node
        nodes = nodes + 1 if nodes < 16 else 2 * nodes
