"""Reading every tensor of a file of many small ones, beside the loop that safetensors' users write.

    make bench-tensors

Both copy each tensor into memory that is there already. The files are in the page cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cut.shard import REPLICATED

# Of a small matrix of a mixture of experts, as far as 50,000 of them fit into memory.
SHAPE = (64, 72)

Read = Callable[[Path, dict[str, Tensor]], None]


def ours(folder: Path, places: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    for name, place in places.items():
        checkpoint.read_into(place, name, REPLICATED, 0)
    checkpoint.close()


def by_safe_open(folder: Path, places: dict[str, Tensor]) -> None:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name, place in places.items():
            place.copy_(tensors.get_slice(name)[:])


@pytest.mark.parametrize("number", [100, 1000, 5000, 50_000])
@pytest.mark.parametrize("read", [ours, by_safe_open], ids=lambda read: read.__name__)
def test_many_small_tensors(
    benchmark: BenchmarkFixture, tmp_path: Path, read: Read, number: int
) -> None:
    tensors = {f"experts.{i}.weight": torch.full(SHAPE, float(i)) for i in range(number)}
    save_file(tensors, tmp_path / "model.safetensors")
    places = {name: torch.empty(SHAPE) for name in tensors}
    benchmark.group = f"{number} tensors"
    benchmark.pedantic(read, args=(tmp_path, places), rounds=5, warmup_rounds=1)
    assert all(torch.equal(places[name], tensors[name]) for name in tensors)
