"""Which ways there are to cut a model over a cluster: all products dp x pp x cp x tp of its GPUs.

What can't run is left out here: more tp ranks than attention heads, more stages than layers, more
context ranks than tokens to cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pyparallel.planner.hardware import Cluster
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training

# A context rank should have this many tokens, or its messages outweigh its work.
TOKENS_PER_CONTEXT_RANK = 8192
MICRO_BATCHES = (1, 2, 4, 8)
VIRTUAL_STAGES = (1, 2, 4)


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Of a positive number, from 1 up."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return tuple(sorted({*small, *(number // each for each in small)}))


def meshes(
    shape: ModelShape, cluster: Cluster, tokens: int, *, nodes_of_tp: int = 2
) -> Iterator[Strategy]:
    """Every dp x pp x cp x tp of all GPUs, the smallest tp first.

    Args:
        tokens: of a sequence, which cp may cut.
        nodes_of_tp: how many nodes a tp group may span; the second only shows what it would cost.
    """
    most_tp = min(shape.heads, cluster.gpus_per_node * nodes_of_tp)
    for tp in divisors(cluster.gpus):
        if tp > most_tp:
            break
        for pp in divisors(cluster.gpus // tp):
            if pp > shape.layers:
                break
            for cp in divisors(cluster.gpus // (tp * pp)):
                if cp > 1 and tokens // cp < TOKENS_PER_CONTEXT_RANK:
                    break
                yield Strategy(dp=cluster.gpus // (tp * pp * cp), pp=pp, cp=cp, tp=tp)


def schedules(
    shape: ModelShape, training: Training, mesh: Strategy
) -> Iterator[tuple[int, int, bool]]:
    """Micro-batch, stages of a rank, and whether sp is on, that training on a mesh may have."""
    if training.global_batch % mesh.dp:
        return
    each = training.global_batch // mesh.dp
    for micro_batch in MICRO_BATCHES:
        if each % micro_batch:
            break
        for virtual in VIRTUAL_STAGES if mesh.pp > 1 else (1,):
            if mesh.pp * virtual > shape.layers:
                break
            # Interleaved 1F1B works through micro-batches in groups of pp.
            if virtual > 1 and (each // micro_batch) % mesh.pp:
                break
            # sp moves the bytes that tp does without it, hides some of them, and keeps less.
            yield micro_batch, virtual, mesh.tp > 1
