"""Which way a layer takes: never one that loses, by the model or by measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.group import Group
from pyparallel.native.cuda import tuning as cuda_tuning
from pyparallel.ops.cuda import _pipeline
from pyparallel.overlap.choice import (
    PIECES,
    PLAIN,
    Choice,
    ChoiceTable,
    choices,
    choose,
    seconds_of,
)
from pyparallel.overlap.machine import H100
from pyparallel.overlap.multiply import reason_against_triton
from pyparallel.overlap.predict import OPERATIONS, predict, workload

EVERY = choices(multipliers=("library", "triton"))
SHAPE = {"m": 4096, "k": 8192, "n": 3584, "size": 8}
ENTRY = {"operation": "all_gather_linear", **SHAPE}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("m", [8, 64, 512, 1024, 4096, 16384])
def test_the_choice_never_loses_to_the_plain_path(operation: str, m: int) -> None:
    k, n = (8192, 3584) if operation == "all_gather_linear" else (3584, 8192)
    shape = {"m": m, "k": k, "n": n, "size": 8}
    for among in (choices(), choices(transports=("direct",)), EVERY):
        chosen = choose(operation, **shape, among=among)
        assert chosen in among
        total = seconds_of(operation, chosen, **shape)
        assert total <= predict(operation, **shape, pieces=0).total
        # Bounds no schedule beats: the matmul alone, and the link alone.
        work = workload(operation, **shape)
        moved = (m - max(work.rows)) * work.moved_columns * work.element / H100.link
        assert total >= moved
    if m <= 64:
        assert chosen == PLAIN


def test_what_there_is_to_choose() -> None:
    assert choices(transports=("direct",)) == (PLAIN, Choice(1))
    assert {c.pieces for c in EVERY if c.multiplier == "library"} == {0, 1}
    assert {c.pieces for c in EVERY} == set(PIECES)
    assert all(c.transport == "direct" for c in EVERY if c.pieces == 0)
    assert choose("all_gather_linear", m=4096, k=64, n=64, size=1, among=EVERY) == PLAIN


def test_measurements_come_first() -> None:
    table = ChoiceTable()
    assert table.choose("all_gather_linear", **SHAPE, among=choices()) == Choice(1, "copy")
    seconds = {"0/direct/library": 3e-4, "1/direct/library": 4e-4, "4/direct/triton": 2e-4}
    table.add([{**ENTRY, "seconds": seconds}])
    assert table.choose("all_gather_linear", **SHAPE, among=EVERY) == Choice(4, "direct", "triton")
    # Without Triton the plain path was the fastest; what was not measured is not taken.
    assert table.choose("all_gather_linear", **SHAPE, among=choices()) == PLAIN


@pytest.mark.parametrize(
    "entry",
    [
        {"operation": "all_gather_linear"},
        [],
        {"seconds": 3},
        {**ENTRY, "seconds": {"4": 1e-4}},
        {**ENTRY, "seconds": {"1/direct/abacus": 1e-4}},
    ],
    ids=["short", "list", "odd", "label", "multiplier"],
)
def test_bad_measurements_are_named(entry: object) -> None:
    with pytest.raises(ValueError, match="file: entry 0: expected operation, size"):
        ChoiceTable().add([entry], source="file")


def test_measurements_without_the_plain_path_are_refused() -> None:
    with pytest.raises(ValueError, match="a measurement of '0/direct/library'"):
        ChoiceTable().add([{**ENTRY, "seconds": {"1/direct/library": 1e-4}}])


def test_what_a_call_may_choose() -> None:
    weight = torch.empty(3584, 8192, dtype=torch.bfloat16)
    ways = {"addressable": True, "most_bytes": 1 << 30}
    found = _pipeline.available(weight, [512] * 8, **ways)
    assert {c.transport for c in found} == {"direct", "copy"}
    far = _pipeline.available(weight, [512] * 8, addressable=False, most_bytes=1 << 30)
    large = _pipeline.available(weight, [512] * 8, addressable=True, most_bytes=1 << 20)
    assert far == large and {c.transport for c in far} == {"direct"}
    # Few rows in one shard, or fp32: only the library, so only whole shards.
    thin = _pipeline.available(weight, [512] * 7 + [64], **ways)
    wide = _pipeline.available(weight.float(), [512] * 8, **ways)
    for limited in (thin, wide):
        assert {c.pieces for c in limited} == {0, 1}
    assert "64 rows" in reason_against_triton(weight, (512, 64))


@pytest.fixture
def fresh_tuning():
    cuda_tuning.tuning.cache_clear()
    _pipeline.table.cache_clear()
    yield
    cuda_tuning.tuning.cache_clear()
    _pipeline.table.cache_clear()


def test_a_measured_file_is_read_at_run_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_tuning
) -> None:
    path = tmp_path / "tuning.json"
    found = {
        "thresholds": {"one_shot_read_bytes": 1 << 18},
        "machine": {"link": 1e9},
        "overlap": [{**ENTRY, "seconds": {"0/direct/library": 1.0}}],
    }
    path.write_text(json.dumps(found))
    monkeypatch.setenv("PYPARALLEL_TUNING", str(path))
    assert cuda_tuning.tuning()["one_shot_read_bytes"] == 1 << 18
    assert cuda_tuning.tuning()["peer_norm_bytes"] == 4 << 20
    table = _pipeline.table()
    assert table.machine.link == 1e9 and table.machine.peak == H100.peak
    assert table.choose("all_gather_linear", **SHAPE, among=EVERY) == PLAIN


def test_declared_numbers_have_reasons(monkeypatch: pytest.MonkeyPatch, fresh_tuning) -> None:
    monkeypatch.delenv("PYPARALLEL_TUNING", raising=False)
    assert cuda_tuning.tuning().source == "declared"
    for name, threshold in cuda_tuning.DECLARED.items():
        assert cuda_tuning.tuning()[name] == threshold.value > 0 and len(threshold.reason) > 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object of"),
        ('{"threshold": {}}', "expected an object of"),
        ('{"thresholds": {"slots": 3}}', "slots = 3"),
        ('{"thresholds": {"copy_bytes": "much"}}', "copy_bytes = 'much'"),
        ('{"machine": {"wheels": 4}}', "machine: expected numbers for"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        cuda_tuning.read(path)
    with pytest.raises(ValueError, match="expected a readable file"):
        cuda_tuning.read(tmp_path / "nothing.json")


def test_ranks_of_unequal_shares_do_not_choose_by_their_own_shapes() -> None:
    communicator = object.__new__(NcclCommunicator)
    x, weight = torch.zeros(4, 8), torch.zeros(6, 8)
    equal, unequal = (Group(0, 2, communicator, shares) for shares in ((1, 1), (3, 1)))
    assert _pipeline.reason_against(x, weight, None, equal, [4, 4]) is None
    reason = _pipeline.reason_against(x, weight, None, unequal, [4, 4])
    assert reason is not None and "shares (3, 1)" in reason
