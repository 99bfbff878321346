"""Milliseconds a token by the length of the context and by the number of layers.

    pytest -s --benchmark-enable --benchmark-json RESULT.json bench/decoding/decode_cost.py
    python -m bench.decoding.decode_cost_plot RESULT.json docs/decode_cost.svg

A context costs the bytes of cache that are read, no more; a layer costs what the one before it did.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from bench.contestants import ours
from bench.rivals import MODEL, Contest, Rival, machine, print_table, read_bandwidth
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.models.load import decoder_config

ROUNDS = 7
STEPS = 8
POSITIONS = (64, 1024, 2048, 4096, 6144, 8191)
LAYERS = (6, 12, 18, 24, 30)


def record(benchmark: Any, times: list[float], info: dict[str, Any]) -> None:
    benchmark.extra_info |= machine() | {"world": 2, "backend": "cpu", **info}
    rounds = iter(times)
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=len(times))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_context(benchmark: Any, dtype: str) -> None:
    rival = Rival("pyparallel tp=2", ours, (MODEL.stem, dtype), ranks=2)
    reader = Rival("bandwidth", read_bandwidth, (), threads=2)
    reads = []
    with Contest([rival, reader]):
        rival.turn(("fill",))
        for _ in range(ROUNDS + 1):
            for position in POSITIONS:
                rival.time(("context", position))
                reads.append(reader.turn(("read",))[1])
    config = decoder_config(open_checkpoint(MODEL))
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    took = {p: median(rival.seconds[("context", p)][1:]) / STEPS for p in POSITIONS}
    cache_bytes = {p: width * (p + 1) * getattr(torch, dtype).itemsize for p in POSITIONS}
    start = took[POSITIONS[0]]
    rows = [
        [
            f"position {p}",
            f"{1e3 * took[p]:.2f}",
            f"{cache_bytes[p] / 1e6:.1f}",
            f"{(cache_bytes[p] - cache_bytes[POSITIONS[0]]) / (took[p] - start) / 1e9:.1f}"
            if took[p] > start
            else "",
        ]
        for p in POSITIONS
    ]
    columns = ["", "ms/token", "cache MB", "GB/s of the growth"]
    print_table(f"decode by context, tp=2, {dtype}", columns, rows)
    print(f"memory is read at {median(reads) / 1e9:.1f} GB/s")
    record(
        benchmark,
        rival.seconds[("context", POSITIONS[-1])][1:],
        {
            "op": "decode by context",
            "dtype": dtype,
            "seconds": {str(p): t for p, t in took.items()},
            "cache_bytes": {str(p): b for p, b in cache_bytes.items()},
            "bandwidth": median(reads),
        },
    )


def test_layers(benchmark: Any) -> None:
    rivals = [
        Rival(f"{count} layers", ours, (MODEL.stem, "float32", None, count), ranks=2)
        for count in LAYERS
    ]
    request = ("context", POSITIONS[0])
    with Contest(rivals) as contest:
        for rival in rivals:
            rival.turn(("fill",))
        contest.rounds(request, 2 * ROUNDS)
    took = {n: rival.median(request) / STEPS for n, rival in zip(LAYERS, rivals, strict=True)}
    rows = []
    for fewer, more in zip((None, *LAYERS), LAYERS, strict=False):
        growth = "" if fewer is None else f"{1e3 * (took[more] - took[fewer]) / (more - fewer):.3f}"
        rows.append([f"{more} layers", f"{1e3 * took[more]:.2f}", growth])
    print_table("decode by layers, tp=2, float32", ["", "ms/token", "ms a further layer"], rows)
    record(
        benchmark,
        rivals[-1].seconds[request],
        {
            "op": "decode by layers",
            "dtype": "float32",
            "seconds": {str(n): t for n, t in took.items()},
        },
    )
