"""What the sums of CPU ranks that share memory take: a few rows.

Both store what their ops' parts store, rounded where these round: same bits. They take over up to
MOST_ROWS rows; see docs/cpu.md for what was measured.
"""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.native.cpu.ops import plain_reason

# Beyond, a call is bound by its matmul, and the plain all-reduce shares the sum over the ranks.
MOST_ROWS = 32


def reason_against(rows: int, width: int, group: Group, *tensors: Tensor | None) -> str | None:
    """Why rows of ``width`` of ``tensors``, the first of which is summed, can't be summed here."""
    if not isinstance(group.communicator, SharedMemoryCommunicator):
        return f"the group '{group.communicator.name}' does not share memory"
    given = [t for t in tensors if t is not None]
    if any(t.dtype is not given[0].dtype for t in given):
        return "expected one dtype"
    if rows > MOST_ROWS:
        return f"{rows} rows are more than {MOST_ROWS}"
    if rows * width * given[0].itemsize > group.communicator.slot_bytes:
        return f"{rows} rows of {width} do not fit {group.communicator.slot_bytes} bytes"
    return plain_reason(*given)
