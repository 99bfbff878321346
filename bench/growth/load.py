"""Growth of a load: a file of many small tensors, as experts are, all of them read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.checkpoint.tensors import ours
from bench.growth.line import Line, median_s

# So small that 50,000 of them are 77 MB: what is measured is what a tensor costs, not its bytes.
SHAPE = (16, 24)


def reading(number: int) -> float:
    """CPU seconds of opening the file and reading every tensor into its place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {f"experts.{i}.weight": torch.full(SHAPE, float(i)) for i in range(number)}
        save_file(tensors, folder / "model.safetensors")
        places = {name: torch.empty(SHAPE) for name in tensors}
        spent = median_s(lambda: ours(folder, places))
        assert all(torch.equal(places[name], tensors[name]) for name in tensors)
    return spent


LINES = (
    Line(
        name="load",
        axis="tensors",
        unit="s of CPU",
        sizes=(100, 1000, 5000, 50_000),
        expected=1,
        measure=reading,
    ),
)
