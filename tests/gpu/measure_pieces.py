"""Measures every number of pieces for a shape, for `PiecesTable.read`; under torchrun, a GPU a rank:

torchrun --nproc-per-node 8 tests/gpu/measure_pieces.py --k 8192 --n 3584 --out pieces.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from pyparallel.cuda_communicator import NcclCommunicator
from pyparallel.cuda_pipelines import NcclLink, reduce_on_gpu, streams_of
from pyparallel.overlap.pipelines import (
    Pipeline,
    Plan,
    all_gather_linear_pipeline,
    even_rows,
    linear_reduce_scatter_pipeline,
)
from pyparallel.overlap.predict import CANDIDATES, OPERATIONS

REPEATS = 20


def build(operation: str, c: NcclCommunicator, m: int, k: int, n: int, pieces: int) -> Pipeline:
    plan = Plan(c.rank, even_rows(m, c.size), pieces)
    weight = torch.randn(n, k, device="cuda").bfloat16()
    rows = plan.rows[c.rank] if operation == "all_gather_linear" else m
    x = torch.randn(rows, k, device="cuda").bfloat16()
    if operation == "all_gather_linear":
        return all_gather_linear_pipeline(x, weight, plan=plan, link=NcclLink(c))
    return linear_reduce_scatter_pipeline(
        x, weight, plan=plan, link=NcclLink(c), reduce=reduce_on_gpu
    )


def seconds(c: NcclCommunicator, pipeline: Pipeline) -> float:
    """Median over repeats, the slowest rank's."""
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        c.barrier()
        start.record()
        streams_of(c).run(pipeline)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    median = torch.tensor([sorted(times[3:])[REPEATS // 2]], device="cuda")
    c.all_reduce(median, op="max")
    return float(median)


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
    entries = []
    for operation in OPERATIONS:
        for m in args.m:
            times = {p: seconds(c, build(operation, c, m, args.k, args.n, p)) for p in CANDIDATES}
            shape = {"operation": operation, "size": size, "m": m, "k": args.k, "n": args.n}
            entries.append({**shape, "seconds": times})
            if rank == 0:
                print(shape, {p: f"{t * 1e6:.0f} us" for p, t in times.items()})
    if rank == 0:
        args.out.write_text(json.dumps(entries, indent=1))
    c.close()


if __name__ == "__main__":
    main()
