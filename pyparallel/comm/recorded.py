"""An engine of ranks that are not there: every call is noted, and no byte moves.

For tensors without storage (the meta device), whose shapes alone say what a real run would send.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from pyparallel.comm.communicator import Communicator


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


class RecordedCommunicator(Communicator):
    """Rank ``rank`` of ``size``, whose peers never answer.

    Attributes:
        calls: how often each (operation, bytes) was called; bytes are those of the dense side, the
            reduced tensor or the gathered one, and of a message what is sent.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.calls: Counter[tuple[str, int]] = Counter()

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        self.calls["all_reduce", _bytes(tensor)] += 1

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        self.calls["all_gather", _bytes(output)] += 1

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        self.calls["reduce_scatter", _bytes(input)] += 1

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        self.calls["all_to_all", _bytes(input)] += 1

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        self.calls["broadcast", _bytes(tensor)] += 1

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        self.calls["send", _bytes(tensor)] += 1

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        # The sender's rank notes the message.
        pass

    def _barrier(self) -> None:
        self.calls["barrier", 0] += 1

    def _close(self) -> None:
        pass
