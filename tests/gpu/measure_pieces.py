"""Measures what `pyparallel.native.cuda.tuning` declares, on this machine; under torchrun, a GPU a rank:

torchrun --nproc-per-node 8 -m tests.gpu.measure_pieces --k 8192 --n 3584 --out tuning.json
PYPARALLEL_TUNING=tuning.json ...

Written are: every way of the overlapped linear layers for K and N (and K and N changed about, as an
MLP's second matmul has them), the thresholds of the peer kernels, and the speeds the model works with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.cut.shard import part_sizes
from pyparallel.native.cuda.ops import reduce_on_gpu
from pyparallel.ops.cuda._pipeline import available
from pyparallel.overlap.choice import Choice
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import forward_linear
from pyparallel.overlap.pipelines import (
    Pipeline,
    Plan,
    all_gather_linear_pipeline,
    linear_reduce_scatter_pipeline,
)
from pyparallel.overlap.predict import OPERATIONS
from tests.gpu.measure_peers import machine_facts, peer_thresholds

REPEATS = 20


def build(operation: str, c: NcclCommunicator, m: int, k: int, n: int, way: Choice) -> Pipeline:
    plan = Plan(c.rank, tuple(part_sizes(m, c.size)), way.pieces, way.transport)
    weight = torch.randn(n, k, device="cuda").bfloat16()
    rows = plan.rows[c.rank] if operation == "all_gather_linear" else m
    x = torch.randn(rows, k, device="cuda").bfloat16()
    how = {"plan": plan, "link": link_of(c), "linear": forward_linear(way.multiplier)}
    if operation == "all_gather_linear":
        return all_gather_linear_pipeline(x, weight, **how)
    return linear_reduce_scatter_pipeline(x, weight, **how, reduce=reduce_on_gpu)


def seconds(c: NcclCommunicator, run: Callable[[], object]) -> float:
    """Median over repeats, the slowest rank's."""
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        c.barrier()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    median = torch.tensor([sorted(times[3:])[REPEATS // 2]], device="cuda")
    c.all_reduce(median, op="max")
    return float(median)


def overlaps(c: NcclCommunicator, k: int, n: int, ms: list[int]) -> list[dict]:
    """Entries for `overlap.choice.ChoiceTable.add`."""
    entries = []
    for operation, (inner, outer) in zip(OPERATIONS, ((k, n), (n, k)), strict=True):
        for m in ms:
            weight = torch.empty(outer, inner, dtype=torch.bfloat16, device="cuda")
            ways = available(
                weight,
                tuple(part_sizes(m, c.size)),
                addressable=c.peers is not None,
                most_bytes=1 << 40,
            )
            times = {}
            for way in ways:
                pipeline = build(operation, c, m, inner, outer, way)
                times[way.label] = seconds(c, lambda p=pipeline: streams_of(c).run(p))
            shape = {"operation": operation, "size": c.size, "m": m, "k": inner, "n": outer}
            entries.append({**shape, "seconds": times})
            if c.rank == 0:
                print(shape, {way: f"{t * 1e6:.0f} us" for way, t in times.items()}, flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--m", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.distributed_c10d._get_default_store()
    c = NcclCommunicator.create(store, rank, size, "measure")
    found = {
        "measured": f"{size} x {torch.cuda.get_device_name()}, torch {torch.__version__}",
        "thresholds": peer_thresholds(c, seconds),
        "machine": machine_facts(c, seconds),
        "overlap": overlaps(c, args.k, args.n, args.m),
    }
    if rank == 0:
        args.out.write_text(json.dumps(found, indent=1))
    c.close()


if __name__ == "__main__":
    main()
