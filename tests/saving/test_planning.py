"""Plans of many ranks: every element is written once, by a rank that has it, and little is told."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.checkpoint.planning import FILE_BYTES, Played, index_of, planned, with_files
from bench.checkpoint.ranks import Job
from pyparallel.checkpoint import grid as checkpoint_grid
from pyparallel.checkpoint.grid import Box, Chunk, Grid, grid_of
from pyparallel.checkpoint.index import FORMAT, INDEX, Index, read_index
from pyparallel.checkpoint.sharded import ShardedCheckpoint
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.checkpoint.storage import file_name
from pyparallel.cut.shard import HeadLayout, even_parts, features
from pyparallel.models.weights import Source
from pyparallel.saving.pieces import Piece, pieces_at
from pyparallel.saving.plan import plan, stored, written_by
from pyparallel.saving.told import kinds_of, tell
from pyparallel.saving.wanted import reads_of

STATE = {"extra": {}, "optimizer": None}


def held_by(rank: int, *, tp: int, dp: int, fsdp: bool) -> list[Piece]:
    """Layers of uneven heads, apart and in one tensor, K and V on several ranks; a norm, a number."""
    layout = HeadLayout.of(9, 3, tp)
    query, kv = layout.query_sharding(2), layout.kv_sharding(2)
    rows = features(20, tp)
    found: list[tuple[Source, ...]] = [(Source("norm", even_parts(7, [1] * tp)),)]
    for layer in range(8):
        names = [(f"{layer}.{name}", cut) for name, cut in (("q", query), ("k", kv), ("v", kv))]
        found.append(tuple(Source(name, cut) for name, cut in names))
        found.append((Source(f"{layer}.qkv", layout.qkv_sharding(2)),))
        found.append((Source(f"{layer}.down", rows.along(1)),))
        found.append((Source(f"{layer}.turned", rows, transposed=True),))
    pieces = []
    for made_of in found:
        axes = 1 if made_of[0].name == "norm" else 2
        sizes = [source.sharding.sizes[rank % tp] for source in made_of]
        shape = [sum(sizes), 5][:axes]
        if made_of[0].sharding.dim == 1 or made_of[0].transposed:
            shape = [5, sum(sizes)]
        each = -(-shape[0] // dp) if fsdp else shape[0]
        begin = min(rank // tp * each, shape[0]) if fsdp else 0
        local = torch.empty((min(each, shape[0] - begin), *shape[1:]))
        place = [begin, *[0] * (axes - 1)]
        pieces += pieces_at(local, place, shape, made_of, rank % tp, owned=True)
    return [*pieces, Piece("number", (), (), torch.tensor(1, dtype=torch.int64))]


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 3), (5, 2), (3, 8)])
def test_every_element_is_in_one_box_of_one_file(tp: int, dp: int, fsdp: bool) -> None:
    ranks = range(tp * dp)
    held = [held_by(rank, tp=tp, dp=dp, fsdp=fsdp) for rank in ranks]
    told = json.loads(json.dumps([tell(pieces) for pieces in held]))
    lists = [
        kinds
        for number, (kinds, _) in enumerate(told)
        if kinds not in [k for k, _ in told[:number]]
    ]
    numbers = [(lists.index(kinds), boxes) for kinds, boxes in told]
    cuts = plan([kinds_of(kinds) for kinds in lists], numbers)
    # The ranks' files end anywhere.
    draw = random.Random(tp * dp)
    written, place = [], {}
    for rank in ranks:
        own = {(piece.name, piece.offsets): piece for piece in held[rank]}
        boxes = list(written_by(rank, cuts))
        assert len(set(boxes)) == len(boxes)
        sizes: list[list[int]] = []
        for name, box in boxes:
            assert tuple(own[name, box.offsets].tensor.shape) == box.sizes
            if not sizes or draw.random() < 0.3:
                sizes.append([0, FILE_BYTES])
            sizes[-1][0] += 1
            assert (name, box) not in place
            place[name, box] = file_name(rank, len(sizes) - 1, "x")
        written.append(sizes)
    tensors, files = stored(cuts, written, "x", "here")
    assert len(files) == sum(map(len, written))
    assert set(tensors) == {piece.name for pieces in held for piece in pieces}
    listed = {
        (name, Box(chunk.offsets, chunk.sizes)): chunk.file
        for name, found in tensors.items()
        for chunk in found.chunks
    }
    assert listed == place
    for name, found in tensors.items():
        count = torch.zeros(found.shape)
        for chunk in found.chunks:
            sides = zip(chunk.offsets, chunk.sizes, strict=True)
            count[tuple(slice(a, a + n) for a, n in sides)] += 1
        assert bool((count == 1).all()), name
        # What overlaps a box is what a look at each says, in whichever form they are.
        for chunk in found.chunks:
            inside = [c for c in found.chunks if c.offsets == chunk.offsets]
            assert list(found.meeting(chunk.offsets, chunk.sizes)) == inside


def test_index_there_and_back(tmp_path: Path) -> None:
    """As a grid, and as a list where boxes are none."""
    held = held_by(0, tp=1, dp=1, fsdp=False)
    corner = [((0, 0), (2, 5)), ((2, 0), (3, 2)), ((2, 2), (3, 3))]
    held += [Piece("pinwheel", (5, 5), offsets, torch.empty(sizes)) for offsets, sizes in corner]
    kinds, boxes = tell(held)
    cuts = plan([kinds_of(kinds)], [(0, boxes)])
    tensors, files = stored(cuts, [[(len(held), FILE_BYTES)]], "", "here")
    assert isinstance(tensors["norm"].chunks, Grid)
    assert not isinstance(tensors["pinwheel"].chunks, Grid)
    (tmp_path / INDEX).write_text(Index(tensors, files, STATE).to_json())
    again = read_index(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["format"] == FORMAT
    assert again.files == files
    for name, found in tensors.items():
        assert (again.tensors[name].shape, again.tensors[name].dtype) == (found.shape, found.dtype)
        assert list(again.tensors[name].chunks) == list(found.chunks)


def test_what_ranks_hold_has_to_be_all_of_a_tensor_and_alike() -> None:
    def told(offset: int, rows: int, shape: tuple[int, ...] = (4, 2)) -> tuple:
        return tell([Piece("a", shape, (offset, 0), torch.empty(rows, 2))])

    for second, words in (
        (told(2, 1), "here: tensor a of shape (4, 2) is not whole"),
        (told(1, 3), "a of"),
    ):
        parts = [told(0, 2), second]
        kinds = [kinds_of(parts[0][0])]
        cuts = plan(kinds, [(0, boxes) for _, boxes in parts], "here")
        with pytest.raises(CheckpointError) as caught:
            stored(cuts, [[(1, 100)], [(1, 100)]], "", "here")
        assert words in str(caught.value)
    parts = [told(0, 2), told(2, 2, (5, 2))]
    with pytest.raises(
        CheckpointError, match=r"here: tensor a is \(4, 2\) of torch.float32 on rank 0, and"
    ):
        plan(
            [kinds_of(kinds) for kinds, _ in parts],
            [(i, b) for i, (_, b) in enumerate(parts)],
            "here",
        )


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2))],
        [((0, 0), (2, 4)), ((2, 1), (2, 3))],
        [((1, 0), (3, 4))],
        [((0, 0), (2, 3)), ((2, 0), (2, 4))],
    ],
)
def test_what_is_no_grid(boxes: list[tuple]) -> None:
    assert grid_of((4, 4), sorted(Box(*box) for box in boxes)) is None


def test_a_thousandth_of_what_all_ranks_hold_is_told_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """405B and AdamW over 128 ranks, each of which told all its boxes and looked at everybody's."""
    played = Played(Job(dp=16, pp=1, tp=8, fsdp=True))
    cuts, states = planned(played)
    assert max(len(told) for _, told in played.own) < 1000
    assert played.bytes_told < 300_000
    # Copies are shared out: the norms that all ranks of tp hold.
    norms = Counter(
        w for cut in cuts if "norm" in cut.names[0] for w in cut.writers for _ in cut.names
    )
    assert set(norms) == set(range(128))
    assert max(norms.values()) <= 1.2 * min(norms.values())
    text = index_of(played, cuts, states)
    boxes = sum(len(cut.boxes) * len(cut.names) for cut in cuts)
    assert boxes > 200_000
    assert len(text) < 700_000
    with_files(tmp_path, text, rank=3)
    made: list[Chunk] = []

    def counted(*sides: object) -> Chunk:
        made.append(Chunk(*sides))
        return made[-1]

    monkeypatch.setattr(checkpoint_grid, "Chunk", counted)
    checkpoint = ShardedCheckpoint(tmp_path, part=3, of=128)
    assert not made
    reads = reads_of(checkpoint, played.pieces(3, owned=False), "here")
    assert len(made) == len(reads) < 3000
