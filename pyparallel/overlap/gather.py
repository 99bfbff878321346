"""The communication half of an all-gather: which chunk travels when, shared by the pipelines.

Chunk (q, p) is piece p of rank q's shard; a shard has C pieces. Round s = 1..R-1 brings the shard of
rank (r + s) % R, piece by piece, so that all ranks pull from different peers in every round.

direct: rank r sends its own piece to (r - s) % R. Any switch that connects all pairs.
ring:   rank r forwards what round s-1 brought to (r - 1) % R. Only neighbours talk, as slow or
        hierarchical links want it.
Both move (R - 1) / R of the gathered bytes through every rank's link, in (R - 1) * C steps.
"""

from __future__ import annotations

from pyparallel.overlap.schedule import COMMUNICATION, Builder, Region, Step

TRANSPORTS = ("direct", "ring")


def check_transport(transport: str) -> None:
    """Raises ValueError for a transport that does not exist."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {TRANSPORTS}, got {transport!r}")


def check_slots(slots: int | None, *, pieces: int, transport: str) -> None:
    """Raises ValueError when fewer landing slots are asked for than chunks are alive at once."""
    # On a ring a chunk is still being forwarded while the next `pieces` chunks land.
    least = pieces + 1 if transport == "ring" else 1
    if slots is not None and slots < least:
        raise ValueError(
            f"slots: expected at least {least} for {pieces} pieces over {transport!r}, got {slots}; "
            f"pass None to give every chunk its own place"
        )


def add_exchanges(
    builder: Builder,
    *,
    name: str,
    own: str,
    landing: str,
    transport: str,
    slots: int | None = None,
    reader: str = "",
) -> dict[tuple[int, int], Region]:
    """Adds the exchanges of one all-gather to the communication stream.

    own: buffer of the rank's own shard. landing: buffer the foreign chunks land in.
    slots: number of landing places that are reused in turn; None gives each chunk its own.
    reader: action that frees a slot; its step for a chunk is named f"{reader}[{q},{p}]".
    Returns where each foreign chunk lands, in the order of arrival. The event of chunk (q, p) is the
    end of the step f"{name}[{q},{p}]".
    """
    rank, size, pieces = builder.rank, builder.size, builder.pieces
    place: dict[tuple[int, int], Region] = {}
    order: list[tuple[int, int]] = []
    for s in range(1, size):
        for piece in range(pieces):
            chunk = ((rank + s) % size, piece)
            waits: tuple[str, ...] = ()
            if slots is None:
                place[chunk] = (landing, *chunk)
            else:
                place[chunk] = (landing, len(order) % slots)
                if len(order) >= slots:
                    earlier = order[len(order) - slots]
                    waits = (f"{reader}[{earlier[0]},{earlier[1]}]",)
            order.append(chunk)
            if transport == "direct":
                send_to, receive_from = (rank - s) % size, chunk[0]
                send_chunk = (rank, piece)
            else:
                send_to, receive_from = (rank - 1) % size, (rank + 1) % size
                send_chunk = ((rank + s - 1) % size, piece)
            sent: Region = (own, piece) if send_chunk[0] == rank else place[send_chunk]
            builder.add(
                Step(
                    name=f"{name}[{chunk[0]},{chunk[1]}]",
                    action=name,
                    stream=COMMUNICATION,
                    chunk=chunk,
                    waits=waits,
                    send_to=send_to,
                    receive_from=receive_from,
                    send_chunk=send_chunk,
                    receive_chunk=chunk,
                    reads=(sent,),
                    writes=(place[chunk],),
                )
            )
    return place
