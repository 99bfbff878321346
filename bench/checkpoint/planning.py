"""What it takes to plan a checkpoint of Llama 3.1 405B with AdamW's moments, over 8 to 4096 ranks.

    make bench-checkpoint-planning

Nothing is stored or sent: every rank's pieces are tensors on the meta device, what a rank would tell
goes through the functions that encode it, and one process plays one rank after another. Of a save: the
CPU seconds of rank 0 (what the others told decoded, who writes what, the index), and the bytes that
reach it. Of a restore on the same mesh: the CPU seconds of one rank, which reads the index.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.checkpoint.ranks import Job, members, of_one_layer, optimizer_state, pieces
from pyparallel.checkpoint.index import INDEX, Index
from pyparallel.checkpoint.sharded import ShardedCheckpoint
from pyparallel.checkpoint.storage import file_name
from pyparallel.saving.exchange import pack, unpack
from pyparallel.saving.optimizer import merge_optimizers
from pyparallel.saving.pieces import Piece
from pyparallel.saving.plan import Cut, plan, stored, written_by
from pyparallel.saving.told import kinds_of, tell
from pyparallel.saving.wanted import reads_of

# Of every file, as far as the index says: more than any rank writes, less than a file system's limit.
FILE_BYTES = 1 << 43
JOBS = (
    Job(dp=1, pp=1, tp=8, fsdp=False),
    Job(dp=2, pp=4, tp=8, fsdp=False),
    Job(dp=4, pp=16, tp=8, fsdp=False),
    Job(dp=8, pp=16, tp=8, fsdp=False),
    Job(dp=32, pp=16, tp=8, fsdp=False),
    Job(dp=8, pp=1, tp=8, fsdp=True),
    Job(dp=64, pp=1, tp=8, fsdp=True),
    Job(dp=32, pp=4, tp=8, fsdp=True),
    Job(dp=128, pp=1, tp=8, fsdp=True),
    Job(dp=512, pp=1, tp=8, fsdp=True),
)


class Played:
    """What the ranks of a job tell one another, each played in turn.

    All layers of a stage are cut alike, so a rank's boxes are had of one layer, and the names of all of
    them of the first rank whose boxes are of the same kinds.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stages = [members(job, stage) for stage in range(job.pp)]
        self.shared: list[bytes] = []
        # For each rank the number of what it shares, and its boxes as they travel.
        self.own: list[tuple[int, bytes]] = []
        numbers: dict[str, int] = {}
        short = [of_one_layer(stage) for stage in self.stages]
        for rank in range(job.ranks):
            found = short[job.stage(rank)]
            kinds, boxes = tell(pieces(job, rank, found, owned=True))
            number = numbers.setdefault(json.dumps(kinds), len(self.shared))
            if number == len(self.shared):
                kinds, same = tell(self.pieces(rank, owned=True))
                assert same == boxes
                self.shared.append(pack([kinds, optimizer_state(self.stages[job.stage(rank)])]))
            self.own.append((number, json.dumps(boxes).encode()))

    def pieces(self, rank: int, *, owned: bool) -> list[Piece]:
        """Of all layers."""
        found = self.stages[self.job.stage(rank)]
        return list(pieces(self.job, rank, found, owned=owned))

    @property
    def bytes_told(self) -> int:
        """That reach every rank: of each rank as many as of the longest, and what they share."""
        # Beside its boxes a rank tells the hash and the length of what it shares, and of its files the
        # numbers of boxes and bytes: below 200 bytes.
        return len(self.own) * (200 + max(len(told) for _, told in self.own)) + sum(
            map(len, self.shared)
        )


def planned(played: Played) -> tuple[list[Cut], list]:
    """Who writes what, from what the ranks told."""
    shared = [unpack(packed) for packed in played.shared]
    told = [(number, json.loads(boxes)) for number, boxes in played.own]
    return plan([kinds_of(kinds) for kinds, _ in shared], told), [state for _, state in shared]


def index_of(played: Played, cuts: Sequence[Cut], states: Sequence[dict]) -> str:
    """The index that rank 0 writes; every rank has one file."""
    count = [0] * played.job.ranks
    for cut in cuts:
        for writer in cut.writers:
            count[writer] += len(cut.names)
    sizes = [[(boxes, FILE_BYTES)] if boxes else [] for boxes in count]
    tensors, files = stored(cuts, sizes, "", str(played.job))
    return Index(tensors, files, {"extra": {}, "optimizer": merge_optimizers(states)}).to_json()


def with_files(folder: Path, index: str, *, rank: int) -> Path:
    """The folder, with an index and the file whose size a rank looks at: a hole."""
    (folder / INDEX).write_text(index)
    with (folder / file_name(rank, 0, "")).open("wb") as file:
        file.truncate(FILE_BYTES)
    return folder


def restored(played: Played, folder: Path, rank: int) -> int:
    """What one rank reads of the index: its own boxes."""
    # Which files are whole is asked of as many as the rank has: one.
    checkpoint = ShardedCheckpoint(folder, part=rank, of=max(rank + 1, played.job.ranks))
    return len(reads_of(checkpoint, played.pieces(rank, owned=False), str(played.job)))


def measure(job: Job, repeats: int) -> dict[str, object]:
    """One row of the table: the medians of ``repeats``."""
    played = Played(job)
    times: dict[str, list[float]] = {"told": [], "plan": [], "restore": []}
    for _ in range(repeats):
        begin = time.process_time()
        tell(played.pieces(0, owned=True))
        times["told"].append(time.process_time() - begin)
        begin = time.process_time()
        cuts, states = planned(played)
        text = index_of(played, cuts, states)
        written = sum(1 for _ in written_by(0, cuts))
        times["plan"].append(time.process_time() - begin)
    with tempfile.TemporaryDirectory() as name:
        rank = job.ranks // 2
        folder = with_files(Path(name), text, rank=rank)
        for _ in range(repeats):
            begin = time.process_time()
            reads = restored(played, folder, rank)
            times["restore"].append(time.process_time() - begin)
    median = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    return {
        "job": str(job),
        "ranks": job.ranks,
        "boxes": sum(len(cut.boxes) * len(cut.names) for cut in cuts),
        "rank 0 tells s": round(median["told"], 3),
        "rank 0 plans s": round(median["plan"], 3),
        "told MB": round(played.bytes_told / 1e6, 3),
        "rank 0 writes boxes": written,
        "index MB": round(len(text) / 1e6, 3),
        "restore s": round(median["restore"], 3),
        "restore reads boxes": reads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-ranks", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for job in JOBS:
        if job.ranks <= options.max_ranks:
            print(json.dumps(measure(job, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
