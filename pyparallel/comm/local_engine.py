"""The engine of a group of one rank: every collective is the identity."""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.communicator import Communicator


class LocalCommunicator(Communicator):
    """One rank, which needs no peers and no process group."""

    def __init__(self, name: str = "local") -> None:
        self.rank, self.size, self.name = 0, 1, name

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        pass

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        output.copy_(input.view(output.shape))

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        output.copy_(input.view(output.shape))

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        output.copy_(input.view(output.shape))

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        pass

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        raise AssertionError("a group of one rank has no other to send to")

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        raise AssertionError("a group of one rank has no other to receive from")

    def _barrier(self) -> None:
        pass

    def _close(self) -> None:
        pass
