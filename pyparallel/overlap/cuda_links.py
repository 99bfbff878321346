"""How the pipelines' steps run on GPUs: CUDA streams, and links over NCCL and over peer memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.cuda.peers import PeerMatrix
from pyparallel.overlap.pipelines import Pipeline
from pyparallel.overlap.schedule import CALLER, COMMUNICATION, COMPUTE


class CudaStreams:
    """The streams of one communicator's pipelines: two to compute on, and the communicator's own."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.streams = {name: torch.cuda.Stream() for name in COMPUTE}
        self.streams[COMMUNICATION] = communicator.stream
        self.last: torch.cuda.Event | None = None

    def run(self, pipeline: Pipeline) -> None:
        """Issues every step in order; the caller's current stream waits for the end of all.

        Nothing blocks the host, and all forks are joined, so the whole may be captured into a graph.
        Temporaries belong to the caller's stream, or to the communicator, whose calls run one after
        another, from whatever stream they come; only replays of graphs the caller orders himself.
        """
        current = torch.cuda.current_stream()
        capturing = torch.cuda.is_current_stream_capturing()
        if self.last is not None and not capturing:
            current.wait_event(self.last)
        awaited = pipeline.schedule.awaited()
        ended: dict[str, torch.cuda.Event] = {}
        for step in pipeline.schedule.steps:
            stream = current if step.stream == CALLER else self.streams[step.stream]
            for name in step.waits:
                stream.wait_event(ended[name])
            with torch.cuda.stream(stream):
                pipeline.actions[step.action](step)
            if step.name in awaited:
                ended[step.name] = stream.record_event()
        if not capturing:
            self.last = current.record_event()


_streams: WeakKeyDictionary[NcclCommunicator, CudaStreams] = WeakKeyDictionary()


def streams_of(communicator: NcclCommunicator) -> CudaStreams:
    """The streams of a communicator, made at its first pipeline."""
    if communicator not in _streams:
        _streams[communicator] = CudaStreams(communicator)
    return _streams[communicator]


class NcclLink:
    """`overlap.actions.Link` over NCCL, on whatever stream is current."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.communicator = communicator

    def buffer(self, name: str, shape: Sequence[int], like: Tensor, *, elements: int) -> Tensor:
        memory = self.communicator.windows.memory(name, elements * like.itemsize)
        if memory is None:
            return like.new_empty(shape)
        return memory[: prod(shape) * like.itemsize].view(like.dtype).view(shape)

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        self.communicator.exchange(send, send_to, receive, receive_from)

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        counts = [count * own.shape[1] for count in rows]
        self.communicator.all_gather(output, own, counts=counts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        self.communicator.all_to_all(
            output,
            send,
            output_counts=[output[0].numel()] * self.communicator.size,
            input_counts=[count * send.shape[1] for count in rows_out],
        )


class PeerLink(NcclLink):
    """`overlap.actions.CopyLink`: copy engines move rows out of the memory of GPUs of this machine."""

    def share(self, name: str, rows: int, columns: int, like: Tensor) -> PeerMatrix:
        return self.communicator.call(self.communicator.peers.share, name, rows, columns, like)

    def meet(self) -> None:
        self.communicator.call(self.communicator.peers.meet)


def link_of(communicator: NcclCommunicator) -> NcclLink:
    """The best link the communicator has: over peer memory, or over NCCL alone."""
    return NcclLink(communicator) if communicator.peers is None else PeerLink(communicator)
