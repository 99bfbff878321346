"""``launch()`` in a process that torchrun started: the ranks are there, and this is one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyparallel.limits import environment_number
from pyparallel.ranks import life
from pyparallel.ranks.torchrun import is_first, world_of_torchrun


def run_joined(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    *,
    threads: int | None,
    timeout_s: float,
    on_report: Callable[[int, Any], None] | None,
) -> list[Any]:
    """``fn(*args)`` here, as the other ranks do; every rank returns the results of all.

    Results travel as JSON and tensors, since nothing of a peer is unpickled: tuples become lists. Rank 0
    hears its own reports, and nobody another's.

    Raises:
        ValueError: ``world_size`` is not torchrun's, or a variable of torchrun's is wrong.
        TypeError: the result of a rank is neither JSON nor tensors; on every rank.
    """
    from pyparallel.comm.exchange import encode, gather_objects
    from pyparallel.comm.peer_watch import naming_lost_peers
    from pyparallel.mesh import init_distributed, world_group

    started = world_of_torchrun()
    if world_size != started:
        raise ValueError(
            f"world_size: expected {started}, the ranks that torchrun started, got {world_size}; choose "
            f"axes whose product is {started}, or start without torchrun"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    rank = environment_number("RANK", None, least=0, most=started - 1)
    with naming_lost_peers("start-up", rank=rank, size=started):
        init_distributed(timeout_s)
    with life.reporting(on_report if is_first() else None):
        told: dict[str, Any] = {"result": fn(*args)}
    try:
        encode(told)
    except TypeError as error:
        told = {"error": str(error)}
    results = gather_objects(world_group(), told)
    for rank, result in enumerate(results):
        if "error" in result:
            raise TypeError(
                f"the result of fn on rank {rank} of torchrun's: {result['error']}; return JSON and "
                f"tensors, or start without torchrun"
            )
    return [result["result"] for result in results]
