"""The communication half of an all-gather: which chunk travels when, shared by the pipelines.

Chunk (q, p) is piece p of rank q's shard; a shard has C pieces. Round s = 1..R-1 brings the shard of
rank (r + s) % R, piece by piece, so that all ranks pull from different peers in every round.

direct: rank r sends its own piece to (r - s) % R. Any switch that connects all pairs.
ring:   rank r forwards what round s-1 brought to (r - 1) % R. Only neighbours talk, as slow or
        hierarchical links want it.
copy:   rank r publishes its shard in memory that its peers can address, meets them, and copies the
        others' pieces out of theirs: a copy engine's work, which holds no multiprocessor. A second
        meeting after the last copy lets every rank write its memory again in the next call; it is one
        buffer and not two halves in turn, because a replayed CUDA graph copies from fixed addresses.
All move (R - 1) / R of the gathered bytes through every rank's link, in (R - 1) * C steps.
"""

from __future__ import annotations

from pyparallel.overlap.schedule import COMMUNICATION, Builder, Region, Step

TRANSPORTS = ("direct", "ring", "copy")
SCATTER_TRANSPORTS = ("direct", "copy")


def check_transport(transport: str, known: tuple[str, ...] = TRANSPORTS) -> None:
    """Raises ValueError for a transport that does not exist."""
    if transport not in known:
        raise ValueError(f"transport: expected one of {known}, got {transport!r}")


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
    meet_after: bool = True,
) -> dict[tuple[int, int], Region]:
    """Adds the exchanges of one all-gather to the communication stream.

    own: buffer of the rank's own shard. landing: buffer the foreign chunks land in.
    slots: number of landing places that are reused in turn; None gives each chunk its own.
    reader: action that frees a slot; its step for a chunk is named f"{reader}[{q},{p}]".
    meet_after: whether copies end with a meeting; not where later ones of the schedule say the same.
    Returns where each foreign chunk lands, in the order of arrival. The event of chunk (q, p) is the
    end of the step f"{name}[{q},{p}]".
    """
    rank, size, pieces = builder.rank, builder.size, builder.pieces
    place: dict[tuple[int, int], Region] = {}
    order: list[tuple[int, int]] = []
    if transport == "copy":
        _add_publication(builder, name=name, own=own)
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
            if transport == "copy":
                builder.add(
                    Step(
                        name=f"{name}[{chunk[0]},{chunk[1]}]",
                        action="pull",
                        stream=COMMUNICATION,
                        chunk=chunk,
                        waits=waits,
                        pull_from=chunk[0],
                        remote_reads=(("published", piece),),
                        writes=(place[chunk],),
                    )
                )
                continue
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
    if transport == "copy" and meet_after:
        builder.add(meeting("gather_taken"))
    return place


def _add_publication(builder: Builder, *, name: str, own: str) -> None:
    pieces = range(builder.pieces)
    builder.add(
        Step(
            name="publish",
            action="publish",
            stream=COMMUNICATION,
            chunk=(builder.rank, -1),
            reads=tuple((own, p) for p in pieces),
            writes=tuple(("published", p) for p in pieces),
        )
    )
    builder.add(meeting(f"{name}_ready"))


def meeting(name: str, *, waits: tuple[str, ...] = ()) -> Step:
    """A step that no rank leaves before all have entered it."""
    return Step(name=name, action="meet", stream=COMMUNICATION, waits=waits)
