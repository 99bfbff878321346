"""What the two sequence-parallel matmuls of CPU ranks that share memory have in common.

Both multiply chunk by chunk, a chunk being one rank's tokens, as the ops' parts do: same bits. A rank
waits only after it has multiplied what needs nobody, so ranks that are up to one chunk's time apart
don't wait at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.shared.host_tensors import REDUCIBLE_CODES


def reason_against(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> str | None:
    """Why a call can't run here."""
    if not isinstance(group.communicator, SharedMemoryCommunicator):
        return f"the group '{group.communicator.name}' does not share memory"
    if not (x.is_cpu and weight.is_cpu):
        return f"the tensors are on {x.device} and {weight.device}"
    if x.dtype not in REDUCIBLE_CODES:
        return f"{x.dtype} cannot be summed"
    return None


def others(group: Group) -> list[int]:
    """The other ranks, from the next one on."""
    return [(group.rank + step) % group.size for step in range(1, group.size)]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each rank's tokens begin."""
    return [sum(sizes[:rank]) for rank in range(len(sizes))]
