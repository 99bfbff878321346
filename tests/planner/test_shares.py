"""Unequal devices: what binds, by hand."""

from __future__ import annotations

import pytest

from pyparallel.planner.hardware import Gpu, Link
from pyparallel.planner.plans.shares import Proposal, parse_devices, propose_shares
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Inference

GIB = 2**30
# 16 KV heads; 4 layers of 16.8e6 in attention; nothing else but MLPs and tables.
SHAPE = ModelShape("small", 2048, 4, 16, 16, 128, 8192, 10_000, 4096)
LINK = Link("a link of one's own", 1e-9, 1e15)


def device(name: str, gib: float, rate: float) -> Gpu:
    return Gpu(name, "none", int(gib * GIB), rate, 1e14)


def propose(*devices: Gpu, batch: int = 1) -> Proposal:
    return propose_shares(SHAPE, devices, Inference(batch, 1024, 128), link=LINK)


def test_speed_binds_where_there_is_room() -> None:
    found = propose(device("fast", 100, 2e12), device("slow", 100, 1e12))
    assert found.best.shares == (2, 1)
    assert found.binds == "speed"
    # Equal: the slow one reads a half, where a third would be its share.
    assert found.equal.token_s / found.best.token_s == pytest.approx(1.5, rel=0.05)
    assert "equal shares fit too, at 1." in found.reason


def test_memory_binds_where_there_is_none() -> None:
    # 0.76e9 bytes of weights in all, and 1.6 GB that each process takes: the faster one holds little.
    found = propose(device("fast", 1.7, 2e12), device("slow", 100, 1e12))
    assert found.binds == "memory"
    assert found.best.shares[0] < found.best.shares[1]
    assert not found.equal.fits
    assert "equal shares do not fit: fast would hold" in found.reason
    assert found.best.fits


def test_equal_devices_share_equally() -> None:
    one = device("one", 100, 1e12)
    found = propose(one, one, one, one)
    assert found.best.shares == (1, 1, 1, 1)
    assert found.best == found.equal


def test_all_of_the_model_is_held() -> None:
    found = propose(device("a", 100, 3e12), device("b", 100, 2e12), device("c", 100, 1e12), batch=4)
    cache = 4 * 1152 * SHAPE.kv_bytes_per_token(2)
    processes = sum(found.equal.memory_bytes) - 2 * SHAPE.parameters() - cache
    # Norms are on every device.
    assert sum(found.best.memory_bytes) == pytest.approx(sum(found.equal.memory_bytes))
    norms = 2 * 2 * (2 * 4 + 1) * 2048
    assert processes == pytest.approx(3 * 1.6e9 + norms)


def test_what_they_do_not_hold_together() -> None:
    with pytest.raises(ValueError, match="devices that hold small in bf16 together"):
        propose(device("a", 1.7, 1e12), device("b", 1.7, 1e12))


def test_devices_by_name_and_count() -> None:
    names = [each.name for each in parse_devices("a6000:1,rtx3090:2")]
    assert names == ["RTX-A6000", "RTX-3090", "RTX-3090"]


def test_a_device_of_ones_own(tmp_path) -> None:
    path = tmp_path / "mac.toml"
    path.write_text(
        '[gpu]\narch = "m4"\nmemory_bytes = 137438953472\nbandwidth = 546e9\nbf16_flops = 34e12\n'
    )
    own, other = parse_devices(f"{path}:1,rtx3090")
    assert (own.memory_bytes, own.bandwidth) == (128 * GIB, 546e9)
    assert other.name == "RTX-3090"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME:COUNT"),
        ("a6000", "expected 2 to 64 in all, got 1"),
        ("a6000:x,rtx3090", "expected a count after a6000:, got 'x'"),
        ("a6000:0,rtx3090", "expected at least 1, got 0"),
        ("a6000:99999999999", "expected at most 64"),
        ("a6001:1,rtx3090:2", "did you mean RTX-A6000"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_devices(text)


def test_more_devices_than_heads() -> None:
    with pytest.raises(ValueError, match="expected at most 16, a head of small for each, got 17"):
        propose(*[device("a", 100, 1e12)] * 17)
