"""What `measure_pieces.py` finds out about peer memory and about the machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.cuda.peers import PeerMemory
from pyparallel.native.cuda import ops as cuda_ops
from pyparallel.native.cuda.extension import NCCL_TYPES, stream

Seconds = Callable[[NcclCommunicator, Callable[[], object]], float]
# From a decode step's one row of 8192 in bf16 up to a prefill's.
SIZES = [1 << power for power in range(14, 26)]
LARGE = 1 << 28


def peer_thresholds(c: NcclCommunicator, seconds: Seconds) -> dict[str, int]:
    """Where the peer kernels stop winning: the last size of `SIZES` at which each does."""
    if c.peers is None:
        return {}
    peers, kind = c.peers, NCCL_TYPES[torch.bfloat16]
    algorithms = peers.extension.Algorithm
    one_shot = all_reduce = norm = 0
    weight = torch.ones(8192, dtype=torch.bfloat16, device="cuda")
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device="cuda")

        def reduce(x: Tensor = x, how: object = algorithms.one_shot) -> None:
            peers.group.all_reduce(
                x.data_ptr(), x.numel(), kind, peers.reductions["sum"], how, stream()
            )

        times = {
            "one": seconds(c, lambda r=reduce: r(how=algorithms.one_shot)),
            "two": seconds(c, lambda r=reduce: r(how=algorithms.two_shot)),
        }
        times["nccl"] = seconds(c, lambda x=x: over_nccl(c, x))
        if times["one"] <= times["two"]:
            one_shot = size * (c.size - 1)
        if min(times["one"], times["two"]) <= times["nccl"]:
            all_reduce = size
        if size >= 2 * 8192:
            rows = x.view(-1, 8192)
            fused = seconds(c, lambda r=rows: norm_fused(peers, r, weight))
            plain = seconds(c, lambda r=rows: norm_plain(c, r, weight))
            if fused <= plain:
                norm = size
        if c.rank == 0:
            print(size, {name: f"{t * 1e6:.1f} us" for name, t in times.items()}, flush=True)
    return {
        "one_shot_read_bytes": one_shot,
        "peer_all_reduce_bytes": all_reduce,
        "peer_norm_bytes": norm,
    }


def over_nccl(c: NcclCommunicator, x: Tensor) -> None:
    """The rank-ordered all-reduce that larger tensors take."""
    peers, c.peers = c.peers, None
    try:
        c.all_reduce(x)
    finally:
        c.peers = peers


def norm_fused(peers: PeerMemory, x: Tensor, weight: Tensor) -> None:
    peers.all_reduce_residual_rms_norm(x, x, weight, eps=1e-5)


def norm_plain(c: NcclCommunicator, x: Tensor, weight: Tensor) -> None:
    summed = x.clone()
    c.all_reduce(summed)
    cuda_ops.add_rms_norm(summed, x, weight, eps=1e-5)


def machine_facts(c: NcclCommunicator, seconds: Seconds) -> dict[str, float]:
    """Fields of `overlap.machine.Machine`; peak is what a large matmul reaches over the efficiency."""
    from pyparallel.overlap.machine import H100

    small = torch.zeros(128, dtype=torch.uint8, device="cuda")
    large, other = (torch.zeros(LARGE, dtype=torch.uint8, device="cuda") for _ in range(2))
    peer, source = (c.rank + 1) % c.size, (c.rank - 1) % c.size
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    latency = seconds(c, lambda: c.exchange(small, peer, small.clone(), source))
    found = {
        "peak": 2.0 * 8192**3 / seconds(c, lambda: square @ square) / H100.efficiency,
        "memory": 2.0 * LARGE / seconds(c, lambda: other.copy_(large)),
        "latency": latency,
        "link": LARGE / (seconds(c, lambda: c.exchange(large, peer, other, source)) - latency),
        "launch": seconds(c, lambda: small.zero_()),
    }
    if c.peers is not None:
        shared = c.peers.share("measured", LARGE, 1, small)
        found["copy_latency"] = seconds(c, lambda: shared.pull(peer, 0, small[:128].view(-1, 1)))
        found["meeting"] = seconds(c, c.peers.meet)
    return found
