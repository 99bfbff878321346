"""``launch()`` in a process that torchrun started: the ranks are there, and this is one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from pyparallel.limits import environment_number
from pyparallel.ranks import life

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_WORLD = 1 << 20


def world_of_torchrun() -> int:
    """How many ranks torchrun, or what sets its variables, started; 1 where nothing did."""
    if any(name not in os.environ for name in VARIABLES):
        return 1
    return environment_number("WORLD_SIZE", None, least=1, most=MAX_WORLD)


def is_first() -> bool:
    """Whether this process is the one that tells what all of torchrun's ranks did."""
    return world_of_torchrun() == 1 or os.environ["RANK"] == "0"


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
        ValueError: ``world_size`` is not torchrun's.
        TypeError: the result of a rank is neither JSON nor tensors; on every rank.
    """
    from torch import distributed as dist

    from pyparallel.comm.exchange import encode, gather_objects
    from pyparallel.mesh import init_distributed

    started = world_of_torchrun()
    if world_size != started:
        raise ValueError(
            f"world_size: expected {started}, the ranks that torchrun started, got {world_size}; choose "
            f"axes whose product is {started}, or start without torchrun"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    init_distributed(timeout_s)
    with life.reporting(on_report if is_first() else None):
        told: dict[str, Any] = {"result": fn(*args)}
    try:
        encode(told)
    except TypeError as error:
        told = {"error": str(error)}
    results = gather_objects(dist.group.WORLD, told)
    for rank, result in enumerate(results):
        if "error" in result:
            raise TypeError(
                f"the result of fn on rank {rank} of torchrun's: {result['error']}; return JSON and "
                f"tensors, or start without torchrun"
            )
    return [result["result"] for result in results]
