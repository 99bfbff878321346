"""Pictures: their slices tile the matrices, and their numbers are those of the modules' own cuts."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pyparallel.cli import main
from pyparallel.cut.shard import HeadLayout
from pyparallel.drawing import draw
from pyparallel.drawing.draw import facts_of
from pyparallel.drawing.model import config_of, decoder_of
from pyparallel.drawing.pictures import PICTURES
from pyparallel.drawing.svg import colour
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Strategy
from tests.checkpoint.gguf_files import MODELS

SVG = "{http://www.w3.org/2000/svg}"
SMALL = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
# Equal and unequal ranks; fewer KV heads than ranks; one rank.
CUTS = [(1, ()), (2, ()), (3, (5, 3, 1)), (4, ()), (5, (1, 4, 1, 2, 1))]


def named(picture: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """The rectangles that stand for something, by what: x, y, width, height."""
    found = defaultdict(list)
    for shape in ElementTree.fromstring(picture).iter(f"{SVG}rect"):
        if of := shape.get("data-of"):
            box = tuple(float(shape.get(side)) for side in ("x", "y", "width", "height"))
            found[of].append(box)
    return found


@pytest.mark.parametrize(("tp", "shares"), CUTS)
def test_slices_tile_every_matrix_in_the_ranks_proportions(tp: int, shares: tuple) -> None:
    shape, strategy = model_shape(SMALL), Strategy(tp=tp)
    boxes = named(draw(shape, strategy, shares=shares))
    for matrix in facts_of(shape, strategy, shares=shares).matrices:
        slices = {r: boxes[f"{matrix.name}/{r}"] for r in range(tp) if matrix.held(r)}
        whole = [box for held in slices.values() for box in held]
        left, top = min(b[0] for b in whole), min(b[1] for b in whole)
        right, low = max(b[0] + b[2] for b in whole), max(b[1] + b[3] for b in whole)
        area = (right - left) * (low - top)
        # Two decimals of each side.
        close = 0.02 * len(whole) * max(right - left, low - top)
        assert abs(sum(b[2] * b[3] for b in whole) - area) <= close, matrix.name
        holders = {part: len(part.ranks) for part in matrix.parts}
        across = matrix.columns if matrix.axis == 0 else matrix.rows
        for rank, held in slices.items():
            own = sum(
                (p.stop - p.start) * across / n for p, n in holders.items() if rank in p.ranks
            )
            expected = own / matrix.numbers * area
            assert abs(sum(b[2] * b[3] for b in held) - expected) <= close, (matrix.name, rank)


@pytest.mark.parametrize(("tp", "shares"), CUTS)
def test_what_a_rank_holds_is_what_its_modules_allocate(tp: int, shares: tuple) -> None:
    shape = model_shape(SMALL)
    matrices = facts_of(shape, Strategy(tp=tp), shares=shares).matrices
    assert sum(m.numbers for m in matrices if m.name != "LM head") + 61 * 36 == (
        # Norms are no matrices; one layer of three.
        shape.parameters() - 2 * shape.layer_parameters() - 3 * 36
    )
    for rank in range(tp):
        model, _ = decoder_of(config_of(shape), tp=tp, rank=rank, shares=shares)
        allocated = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert sum(matrix.held(rank) for matrix in matrices) == allocated


@pytest.mark.parametrize(("tp", "shares"), CUTS)
def test_heads_are_those_of_the_layout(tp: int, shares: tuple) -> None:
    boxes = named(draw(model_shape(SMALL), Strategy(tp=tp), shares=shares))
    layout = HeadLayout.of(12, 3, shares or tp)
    expected = {f"query {h}/{r}" for r, (a, b) in enumerate(layout.query) for h in range(a, b)}
    expected |= {f"kv {h}/{r}" for r, (a, b) in enumerate(layout.kv) for h in range(a, b)}
    found = [name for name in boxes if re.match(r"(query|kv) \d", name)]
    assert set(found) == expected and all(len(boxes[name]) == 1 for name in found)


def test_messages_are_the_modules_own() -> None:
    """Minimal communication, as the documents say: two a layer, each way."""
    shape = model_shape({**SMALL, "num_key_value_heads": 4})
    size = 3 * 8 * 36 * 2
    facts = facts_of(shape, Strategy(tp=2, micro_batch=3), tokens=8)
    told = [(m.phase, m.half, m.operation, m.whole_bytes) for m in facts.messages]
    assert told == [
        ("forward", "attention", "all-reduce", size),
        ("forward", "mlp", "all-reduce", size),
        ("backward", "mlp", "all-reduce", size),
        ("backward", "attention", "all-reduce", size),
    ]
    facts = facts_of(shape, Strategy(tp=2, sp=True, micro_batch=3), tokens=8)
    forward = [(m.half, m.operation) for m in facts.messages if m.phase == "forward"]
    pair = ("all-gather", "reduce-scatter")
    assert forward == [(half, op) for half in ("attention", "mlp") for op in pair]
    # Beside the sum over the replicas' keys and values where there are some.
    more = facts_of(model_shape(SMALL), Strategy(tp=4), tokens=8).messages
    assert len(more) == 5 and more[-1].whole_bytes == 3 * 2 * 4 * 36 * 2
    assert facts_of(shape, Strategy(), tokens=8).messages == []
    boxes = named(draw(shape, Strategy(tp=2, micro_batch=3), tokens=8))
    assert sum(len(b) for name, b in boxes.items() if f"all-reduce/{size}" in name) == 4


def test_tokens_and_ranks() -> None:
    strategy = Strategy(dp=5, pp=3, cp=2, tp=2, sp=True)
    picture = draw(model_shape(SMALL), strategy, tokens=16)
    boxes = named(picture)
    zigzag = {"cp 0-4/0", "cp 4-8/1", "cp 8-12/1", "cp 12-16/0"}
    assert {name for name in boxes if name.startswith("cp ")} == zigzag
    assert {name for name in boxes if name.startswith("sp ")} == {"sp 0-4/0", "sp 4-8/1"}
    # Four replicas of five are drawn; tp is the fastest axis.
    ranks = [name for name in boxes if name.startswith("rank ")]
    assert ranks == [f"rank {number}/{number % 2}" for number in range(4 * 3 * 2 * 2)]
    assert "and 1 more replicas" in picture and "60 in all" in picture


@pytest.mark.parametrize("tp", [1, 12])
def test_attention_along_cp_is_what_runs(tp: int) -> None:
    """Every pair of a query and an earlier key is met once, on the ring; Ulysses' parts tile."""
    tokens, context = 26, 3
    boxes = named(draw(model_shape(SMALL), Strategy(cp=context, tp=tp), tokens=tokens))
    steps = [re.fullmatch(r"ring (\d)\.(\d)/(\d)=(\d+)", name) for name in boxes]
    ring = [tuple(map(int, step.groups())) for step in steps if step]
    assert [(rank, step) for rank, step, _, _ in ring] == list(
        itertools.product(range(context), repeat=2)
    )
    assert {visited for _, _, visited, _ in ring[:context]} == set(range(context))
    # What a rank hands on is what its neighbour has at the next step.
    held = {(rank, step): visited for rank, step, visited, _ in ring}
    assert all(
        held[(rank + 1) % context, step + 1] == visited
        for (rank, step), visited in held.items()
        if step + 1 < context
    )
    assert sum(pairs for *_, pairs in ring) == tokens * (tokens + 1) // 2
    pieces = [box for name, found in boxes.items() if name.startswith("ulysses") for box in found]
    areas = sum(width * height for _, _, width, height in pieces)
    if tp == 1:
        # Sides are written with two digits.
        assert areas == pytest.approx(2 * 300 * 110, abs=len(pieces) * 300 * 0.005)
    else:
        # One head of a tp rank can't be cut over three ranks of cp, which the picture says.
        assert pieces == []


def test_neighbouring_ranks_differ_in_colour() -> None:
    assert len({colour(rank) for rank in range(64)}) == 64


def test_the_documents_pictures_are_current() -> None:
    """`make pictures` writes them."""
    folder = Path(__file__).parents[2] / "docs/pictures"
    assert {path.stem for path in folder.glob("*.svg")} == set(PICTURES)
    for name, make in PICTURES.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == make(), name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    MODELS["q8_0"].write(tmp_path / "small.gguf")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    out = tmp_path / "x.svg"
    given = ["draw", "--tp", "2", "--shares", "6,2", "--out", str(out), "--json", "--model"]
    for model in (tmp_path / "small.gguf", tmp_path, tmp_path / "config.json"):
        assert main([*given, str(model)]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["file"] == str(out) and told["shares"] == [3, 1]
        assert {matrix["name"] for matrix in told["matrices"]} >= {"query", "down", "LM head"}
        assert named(out.read_text())["query/1"]
    assert main(["draw", "--model", "llama-3.1-8b", "--pp", "2"]) == 0
    assert "Pipeline: 1f1b" in capsys.readouterr().out
    assert main(["draw", "--model", "llama-3.1-8b", "--pp", "2", "--chunks", "4"]) == 0
    assert "Pipeline: interleaved, 4 micro-batches, 4 chunks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp", "2", "--shares", "1,0"], "--shares of rank 1: expected at least 1, got 0"),
        (["--tp", "65"], "tp: expected at most 64 in a picture, got 65"),
        (["--tp", "33"], "use at most tp=32"),
        (["--pp", "33"], "stages: expected 1 to 32"),
        (["--pp", "32", "--tp", "32", "--cp", "2"], "pp x cp x tp: expected at most 1024 ranks"),
        (["--dp", "0"], "dp: expected at least 1, got 0"),
        (["--cp", "4", "--tokens", "7"], "tokens: expected at least 8, two chunks for each rank"),
        (["--tp", "4", "--sp", "--tokens", "3"], "sequence: expected at least 4 tokens"),
        (["--tokens", "99999999999"], "tokens: expected at most 16777216"),
        (["--micro-batch", "99999999"], "micro_batch x tokens: expected at most 268435456"),
        (["--pp", "2", "--micro-batches", "0"], "micro_batches: expected at least 1, got 0"),
        (["--model", "mixtral-8x7b"], "model: expected a dense model, got Mixtral-8x7B"),
        (["--model", "lama-3.1-8b"], "did you mean Llama-3.1-8B"),
        (["--pp", "2", "--schedule", "interleaved"], "chunks: expected 2 or more a rank"),
        (["--pp", "2", "--chunks", "2", "--micro-batches", "3"], "use 4"),
        (["--json"], "--json: expected --out FILE beside it"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["draw", "--model", "llama-3.1-8b", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_drawn_decoder_has_no_storage() -> None:
    model, _ = decoder_of(config_of(model_shape("llama-3.1-405b")), tp=8)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in model.parameters())
