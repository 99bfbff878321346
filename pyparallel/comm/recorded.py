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
        in_turn: the same, one after another.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.calls: Counter[tuple[str, int]] = Counter()
        self.in_turn: list[tuple[str, int]] = []

    def _note(self, operation: str, num_bytes: int) -> None:
        self.calls[operation, num_bytes] += 1
        self.in_turn.append((operation, num_bytes))

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        self._note("all_reduce", _bytes(tensor))

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        self._note("all_gather", _bytes(output))

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        self._note("reduce_scatter", _bytes(input))

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        self._note("all_to_all", _bytes(input))

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        self._note("broadcast", _bytes(tensor))

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        self._note("send", _bytes(tensor))

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        # The sender's rank notes the message.
        pass

    def _barrier(self) -> None:
        self._note("barrier", 0)

    def _close(self) -> None:
        pass
