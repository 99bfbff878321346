"""Ring against Ulysses, and both against one rank: seconds of a forward and a forward with backward.

    pytest -s --benchmark-enable bench/ops/context_parallel_attention.py

Ranks measure between barriers; a round's time is the slowest rank's. Rivals take turns in one run, and
every result is compared with the others' before it is timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from bench.rivals import machine, print_table
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.ops.context.attention import context_parallel_attention
from pyparallel.ops.context.choice import choose

# (S, N, G, D): few and many KV heads, short and long.
SHAPES = ((512, 8, 8, 64), (2048, 8, 8, 64), (2048, 8, 2, 64), (4096, 9, 3, 64))
RIVALS = ("one rank", "ring", "ulysses")
ROUNDS = 5


def measure(shape: tuple[int, int, int, int], backward: bool) -> dict[str, list[float]]:
    """Seconds of each round of each rival, on this rank."""
    length, heads, kv_heads, size = shape
    group = init_mesh(cp=torch.distributed.get_world_size()).cp
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, length, count, size, generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    whole = ContextShards.of(length, Group.single())

    def work(rival: str) -> torch.Tensor | None:
        shards = ContextShards.of(length, group, algorithm="auto" if rival == "one rank" else rival)
        *qkv, do = tensors if rival == "one rank" else (shards.split(t) for t in tensors)
        if rival == "one rank" and group.rank:
            return None
        qkv = [t.detach().requires_grad_(backward) for t in qkv]
        cut = whole if rival == "one rank" else shards
        o = context_parallel_attention(*qkv, cut, causal=True)
        if backward:
            o.backward(do)
        return o.detach()

    results = {rival: work(rival) for rival in RIVALS}
    torch.testing.assert_close(results["ring"], results["ulysses"], rtol=1e-4, atol=1e-5)
    if group.rank == 0:
        own = ContextShards.of(length, group).split(results["one rank"])
        torch.testing.assert_close(results["ring"], own, rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {rival: [] for rival in RIVALS}
    for _ in range(ROUNDS):
        for rival in RIVALS:
            group.communicator.barrier()
            started = time.perf_counter()
            work(rival)
            group.communicator.barrier()
            seconds[rival].append(time.perf_counter() - started)
    return seconds


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "S{}-N{}-G{}-D{}".format(*shape))
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_attention(
    benchmark: Any, ranks: int, shape: tuple, backward: bool
) -> None:
    by_rank = launch(measure, ranks, shape, backward, threads=1)
    slowest = {
        rival: [max(times) for times in zip(*(rank[rival] for rank in by_rank), strict=True)]
        for rival in RIVALS
    }
    length, heads, kv_heads, size = shape
    choice = choose(
        batch=1,
        length=length,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        ranks=ranks,
        itemsize=4,
        causal=True,
    )
    rows = []
    dense = statistics.median(slowest["one rank"])
    for rival, times in slowest.items():
        median = statistics.median(times)
        chosen = "chosen" if rival == choice.algorithm else ""
        rows.append([rival, f"{median * 1e3:.1f}", f"{dense / median:.2f}", chosen])
    what = "forward and backward" if backward else "forward"
    title = f"causal attention, {what}, S N G D = {shape}, {ranks} ranks of one thread"
    print_table(title, ["", "ms", "x one rank", ""], rows)
    benchmark.extra_info |= machine() | {
        "op": "context_parallel_attention",
        "shape": list(shape),
        "dtype": "float32",
        "world": ranks,
        "backend": "torch over shared memory",
        "seconds": slowest,
        "chosen": choice.algorithm,
        "why": choice.reason,
    }
    rounds = iter(slowest[choice.algorithm])
    # The ranks have taken the times; pytest-benchmark counts one of them a round.
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=ROUNDS)
