"""Tokens a second of one reader, against transformers and against what memory allows.

    pytest -s --benchmark-enable bench/decoding/decode.py

Rivals take turns in one run; each has shown that it says the same tokens before it is timed. The
limit is the read bandwidth over the bytes of weights that a token needs. On a shared machine the
bandwidth changes from second to second: it is measured before and after every turn, and "of limit" is
the median over the turns of a turn's speed by the limit around it.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from bench.contestants import EVEN, hugging_face, modules, ours, weight_bytes_read
from bench.decoding import llama_cpp
from bench.rivals import MODEL, Contest, Rival, machine, print_table, read_bandwidth
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.models.config import from_hugging_face
from pyparallel.models.load import decoder_config

STEPS = 32
ROUNDS = 7
# Beyond weights and cache: torch's libraries, buffers, what reading the checkpoint needs.
PROCESS_BYTES = 320e6


def check_tokens(contest: Contest, dtype: str) -> None:
    """fp32: all tokens equal. Half precision and int8 weights round each in their own way: the first
    tokens are equal."""
    request = ("decode", STEPS)
    answers = {rival.name: rival.turn(request)[1] for rival in contest.rivals}
    first = next(iter(answers.values()))
    for name, tokens in answers.items():
        exact = dtype == "float32" and "int8" not in name
        compared = 1 + STEPS if exact else 2
        assert tokens[:compared] == first[:compared], f"{name} says {tokens}, not {first}"


def fewer_bytes(name: str) -> bool:
    """Whether a rival reads fewer bytes of weights than the limit counts."""
    return "int8" in name or "blocks" in name


def table(
    title: str, contest: Contest, limits: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    """Print and return tokens/s. ``limits``: of each rival, those around its turns."""
    request = ("decode", STEPS)
    speeds = {r.name: STEPS / r.median(request) for r in contest.rivals}
    base, other = speeds.get("transformers dense"), speeds.get(llama_cpp.NAME)
    rows = []
    for rival in contest.rivals:
        speed = speeds[rival.name]
        near = [] if limits is None else limits[rival.name]
        times = rival.seconds[request]
        share = [STEPS / t / limit for t, limit in zip(times, near, strict=False)]
        rows.append(
            [
                rival.name,
                f"{speed:.1f}",
                f"{100 * rival.spread(request):.0f} %",
                "" if base is None else f"{speed / base:.2f}",
                "" if other is None else f"{speed / other:.2f}",
                f"{100 * median(share):.0f} %" if share and not fewer_bytes(rival.name) else "",
            ]
        )
    if limits is not None:
        limit = median(limit for near in limits.values() for limit in near)
        rows.append(["what memory allows", f"{limit:.1f}", "", "", "", "100 %"])
    columns = ["", "tokens/s", "+-", "x dense", "x llama.cpp", "of limit"]
    print_table(title, columns, rows)
    return speeds


def record(benchmark: Any, rival: Rival, dtype: str, info: dict[str, Any]) -> None:
    """The rival's times as pytest-benchmark's rounds, which were taken in turns with the others."""
    request = ("decode", STEPS)
    benchmark.extra_info |= machine() | {
        "op": "decode",
        "dtype": dtype,
        "world": rival.ranks,
        "backend": "cpu",
        "steps": STEPS,
        "seconds": {str(k): v for k, v in rival.seconds.items()},
        **info,
    }
    rounds = iter(rival.seconds[request])
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=ROUNDS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(benchmark: Any, dtype: str) -> None:
    name = str(MODEL.stem)
    rivals = [
        Rival("pyparallel tp=2", ours, (name, dtype), ranks=2),
        Rival("pyparallel tp=1, 2 threads", ours, (name, dtype), threads=2),
        Rival("pyparallel tp=2, int8 weights", ours, (name, dtype, "int8"), ranks=2),
        Rival("pyparallel tp=2, GGUF blocks", ours, (name, dtype, "blocks"), ranks=2),
        Rival("pyparallel tp=1, 2 threads, GGUF blocks", ours, (name, dtype, "blocks"), threads=2),
        Rival("pyparallel modules tp=2", modules, (name, dtype), ranks=2),
        Rival("transformers dense", hugging_face, (name, dtype), threads=2),
        *llama_cpp.rivals(dtype),
    ]
    reader = Rival("bandwidth", read_bandwidth, (), threads=2)
    config = decoder_config(open_checkpoint(MODEL))
    bytes_read = weight_bytes_read(config, getattr(torch, dtype))
    with Contest([*rivals, reader]):
        contest = Contest(rivals)
        check_tokens(contest, dtype)
        limits: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for _ in range(ROUNDS):
            before = reader.turn(("read",))[1]
            for rival in rivals:
                rival.time(("decode", STEPS))
                after = reader.turn(("read",))[1]
                limits[rival.name].append((before + after) / 2 / bytes_read)
                before = after
        memories = {r.name: r.turn(("memory",))[1] for r in rivals[:2]}
    speeds = table(f"decode, {name}, {dtype}", contest, limits)
    for who, bytes_ in memories.items():
        held = bytes_["weight_bytes"] + bytes_["cache_bytes"]
        now, peak = bytes_["rss_bytes"] - held, bytes_["peak_rss_bytes"] - held
        print(
            f"{who}: a rank holds {bytes_['weight_bytes'] / 1e6:.0f} MB of weights, "
            f"{bytes_['cache_bytes'] / 1e6:.0f} MB of cache; beyond these {now / 1e6:.0f} MB, "
            f"at the peak {peak / 1e6:.0f}; the largest tensor {bytes_['largest_bytes'] / 1e6:.0f}"
        )
        assert now <= PROCESS_BYTES, f"{who}: {now} bytes beyond weights and cache"
        assert peak <= PROCESS_BYTES + bytes_["largest_bytes"], f"{who}: {peak} bytes at the peak"
    info = {"limits": limits, "tokens_per_s": speeds, "memory": memories}
    record(benchmark, rivals[0], dtype, info)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_transformers_tp_plan(benchmark: Any, dtype: str) -> None:
    rivals = [
        Rival("transformers dense", hugging_face, ("even", dtype), threads=2),
        Rival("pyparallel tp=2", ours, ("even", dtype), ranks=2),
        Rival("transformers tp_plan, 2 ranks", hugging_face, ("even", dtype, True), ranks=2),
    ]
    with Contest(rivals) as contest:
        check_tokens(contest, dtype)
        contest.rounds(("decode", STEPS), ROUNDS)
    parameters = weight_bytes_read(from_hugging_face({"model_type": "llama", **EVEN}), torch.int8)
    title = f"decode, random even-headed Llama reading {parameters / 1e6:.0f}M weights, {dtype}"
    speeds = table(title, contest)
    record(benchmark, rivals[1], dtype, {"tokens_per_s": speeds})
