"""The ranks of a save or a restore agree, told in JSON: what is equal travels once."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_watch import naming_lost_peers

T = TypeVar("T")

# Of one list that ranks share; a length is a number from outside.
MAX_SHARED_BYTES = 1 << 30


def together(work: Callable[[], T], what: str = "") -> T:
    """The result of ``work``, or on every rank the error of the first rank that has one.

    Args:
        what: is worked on, for errors that do not name it.
    """
    return exchange(work, lambda result: None, what)[0]


def exchange(
    work: Callable[[], T], tell: Callable[[T], Any], what: str = ""
) -> tuple[T, list[Any]]:
    """The result of ``work``, and what every rank tells of its own; or the first rank's error."""
    result, told, error = None, None, None
    try:
        result = work()
        told = tell(result)
    except Exception as caught:
        error = caught
    own = None if error is None else _described(error, what)
    with naming_lost_peers(_called(what)):
        everyone = gather_objects(dist.group.WORLD, [own, told])
    for text, _ in everyone:
        if text is not None:
            raise CheckpointError(text) from error
    return result, [value for _, value in everyone]


def exchange_shared(
    work: Callable[[], T], tell: Callable[[T], tuple[Any, Any]], what: str = ""
) -> tuple[T, list[tuple[int, Any]], list[Any]]:
    """:func:`exchange` where much of what the ranks tell is the same.

    Args:
        tell: what many ranks tell alike, and what is a rank's own; both as JSON.

    Returns:
        The result of ``work``; for each rank the number of what it shares, and its own; the shared ones.
    """
    packed = b""

    def told(result: T) -> list[Any]:
        nonlocal packed
        shared, own = tell(result)
        packed = pack(shared)
        return [hashlib.blake2b(packed, digest_size=16).hexdigest(), len(packed), own]

    result, everyone = exchange(work, told, what)
    firsts: dict[str, int] = {}
    for rank, (digest, _, _) in enumerate(everyone):
        firsts.setdefault(digest, rank)
    with naming_lost_peers(_called(what)):
        shared = [unpack(_broadcast(packed, rank, everyone[rank][1])) for rank in firsts.values()]
    numbers = {digest: number for number, digest in enumerate(firsts)}
    return result, [(numbers[digest], own) for digest, _, own in everyone], shared


def pack(value: Any) -> bytes:
    """JSON, compressed: names of tensors are much alike."""
    return zlib.compress(json.dumps(value).encode(), 1)


def unpack(data: bytes) -> Any:
    """What :func:`pack` made.

    Raises:
        CheckpointError: it is longer than anything a rank tells.
    """
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, MAX_SHARED_BYTES)
    if not unpacker.eof:
        raise CheckpointError(f"a rank tells more than {MAX_SHARED_BYTES} bytes")
    return json.loads(text)


def _broadcast(own: bytes, source: int, size: int) -> bytes:
    """What rank ``source`` holds, ``size`` bytes."""
    try:
        dist.group.WORLD._get_backend(torch.device("cpu"))
        device = torch.device("cpu")
    except RuntimeError:
        device = torch.device("cuda", torch.cuda.current_device())
    if not 0 <= size <= MAX_SHARED_BYTES:
        raise CheckpointError(
            f"rank {source} tells {size} bytes, at most {MAX_SHARED_BYTES} can be"
        )
    data = bytearray(own) if dist.get_rank() == source else bytearray(size)
    buffer = torch.frombuffer(data, dtype=torch.uint8).to(device)
    dist.broadcast(buffer, source)
    return buffer.cpu().numpy().tobytes()


def _called(what: str) -> str:
    return f"save or restore of {what}" if what else "save or restore"


def _described(error: Exception, what: str) -> str:
    if isinstance(error, ValueError):
        return str(error)
    where = f"{what}: " if what else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{where}rank {dist.get_rank()}: {text}"
