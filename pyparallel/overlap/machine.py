"""The speeds of a GPU and its link that the timing model works with."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Rows, columns, and the share of the largest tile's speed it reaches.
Tile = tuple[int, int, float]


@dataclass(frozen=True)
class Machine:
    """A GPU and its link.

    peak: flop/s of the matmul's dtype; efficiency: the share of it a large matmul reaches.
    link: bytes/s one GPU sends (and receives) at once. Times in seconds, bandwidths in bytes/s.
    communication_sms: multiprocessors that communication kernels take from the matmul while the
    schedule overlaps. reduction_sms: those of a kernel that saturates the memory.

    The defaults are declared: a grouped send and receive costs two launches and NCCL's handshake; a
    copy a launch and the copy engine's start; a meeting a launch and a flag's way there, which the
    peers' kernels wait for; NCCL drives NVLink at full speed with 8 to 16 blocks; half of the
    multiprocessors keep enough loads in flight for the memory. `tests/gpu/measure_pieces.py` measures
    what a machine has.
    """

    name: str
    peak: float
    efficiency: float
    multiprocessors: int
    link: float
    memory: float
    latency: float = 6e-6
    launch: float = 2e-6
    communication_sms: int = 8
    copy_latency: float = 4e-6
    meeting: float = 5e-6
    reduction_sms: int = 66
    # Smaller tiles reuse less of what they load.
    tiles: tuple[Tile, ...] = (
        (128, 256, 1.0),
        (128, 128, 0.85),
        (64, 128, 0.70),
    )

    def slowed(self, speed: float) -> Machine:
        """The same with a matmul of `speed` times the speed."""
        return self if speed == 1.0 else replace(self, efficiency=self.efficiency * speed)


# 989 TFLOP/s dense bf16, 450 GB/s each way over NVLink, 3.35 TB/s: the data sheet's; 70% is what large
# bf16 matmuls reach under the power limit.
H100 = Machine(
    name="H100 SXM", peak=989e12, efficiency=0.70, multiprocessors=132, link=450e9, memory=3.35e12
)
