"""Memory in huge pages: its pieces, their lifetime, and that the pages are huge where there are any."""

from __future__ import annotations

import copy
import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from pyparallel.cut.huge_pages import PAGE_BYTES, HugePages, taken_bytes, zeros

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_pieces_lie_apart_and_begin_on_lines() -> None:
    shapes = [
        ((3, 5), torch.float32),
        ((0, 4), torch.float32),
        ((), torch.int8),
        ((7,), torch.bfloat16),
    ]
    sizes = [taken_bytes(torch.Size(shape).numel(), dtype) for shape, dtype in shapes]
    assert sizes == [64, 0, 64, 64]
    block = HugePages(sum(sizes))
    pieces = [block.zeros(shape, dtype) for shape, dtype in shapes]
    for number, (piece, (shape, dtype)) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape and piece.dtype == dtype
        assert (piece == 0).all()
        assert piece.numel() == 0 or piece.data_ptr() % 64 == 0
        piece.fill_(number + 1)
    for number, piece in enumerate(pieces):
        assert (piece == number + 1).all()
    assert len({p.untyped_storage().data_ptr() for p in pieces if p.numel()}) == 3
    with pytest.raises(ValueError, match="shape: expected at most the 0 bytes left, got 64"):
        block.zeros((1,), torch.int8)


def test_a_piece_outlives_the_block_and_the_others() -> None:
    block = HugePages(2 * PAGE_BYTES)
    first, second = (block.zeros((PAGE_BYTES // 4,), torch.float32) for _ in range(2))
    second.fill_(3)
    copied = copy.deepcopy(second)
    del block, first
    gc.collect()
    assert (second == 3).all()
    second.zero_()
    assert (copied == 3).all()


def huge_bytes() -> int:
    """Bytes of this process that lie in huge pages."""
    text = Path("/proc/self/smaps").read_text()
    return sum(1024 * int(kib) for kib in re.findall(r"^AnonHugePages: +(\d+) kB", text, re.M))


def test_pages_are_huge_and_given_back() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this system gives no huge pages")
    before = huge_bytes()
    block = zeros((4 * PAGE_BYTES,), dtype=torch.int8)
    assert block.data_ptr() % PAGE_BYTES == 0
    assert huge_bytes() == before
    block.fill_(1)
    # A system that is short of free ones gives ordinary pages instead.
    assert huge_bytes() >= before + PAGE_BYTES
    del block
    assert huge_bytes() == before


def test_no_more_is_resident_than_was_asked_for() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    size = PAGE_BYTES + 4096
    before = resident()
    blocks = [zeros((size,), dtype=torch.int8).fill_(1) for _ in range(32)]
    # A last page made huge would add 2 MiB to each.
    assert resident() - before <= 32 * size + PAGE_BYTES
    assert len(blocks) == 32


def test_zeros_is_torchs_elsewhere() -> None:
    assert zeros((2, 3), dtype=torch.float16).dtype == torch.float16
    assert zeros((3,)).dtype == torch.get_default_dtype()
    assert zeros((PAGE_BYTES,), device="meta", dtype=torch.int8).is_meta
    large = zeros((2, PAGE_BYTES), dtype=torch.bfloat16)
    assert large.shape == (2, PAGE_BYTES) and (large == 0).all()
