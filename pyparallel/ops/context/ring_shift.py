"""Every rank hands a block to the next one: one step around a ring.

Made of one all-to-all of which all parts but one are empty. So it exists wherever collectives do, can't
deadlock as a cycle of blocking sends can, runs in the background, and a dead peer is noticed as in any
collective. Over NCCL it is one send and one receive.
"""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.comm.raw import Pending, record_collective


def ring_shift_raw(x: Tensor, group: Group, *, received: int) -> Pending:
    """Start sending ``x`` to rank + 1; ``wait()`` gives the ``[received]`` elements of rank - 1.

    Args:
        x: contiguous, of any size; must stay as it is until the result is there.
        received: how many elements the rank before sends.
    """
    sent = [0] * group.size
    sent[(group.rank + 1) % group.size] = x.numel()
    held = [0] * group.size
    held[(group.rank - 1) % group.size] = received
    result = x.new_empty(received)
    record_collective("ring_shift", x.numel() * x.itemsize)
    work = group.communicator.all_to_all(
        result, x.view(-1), output_counts=held, input_counts=sent, async_op=True
    )
    return Pending(result, work)
