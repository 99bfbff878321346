"""Tokens a second of one reader, against transformers and against what memory allows.

    pytest -s --benchmark-enable bench/decode.py

Rivals take turns in one run; each has shown that it says the same tokens before it is timed. The
limit is the read bandwidth, measured in the same run, over the bytes of weights that a token needs.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import llama_cpp
from bench.contestants import EVEN, hugging_face, modules, ours, weight_bytes_read
from bench.rivals import MODEL, Contest, Rival, machine, print_table, read_bandwidth
from pyparallel.checkpoint import open_checkpoint
from pyparallel.models.config import from_hugging_face
from pyparallel.models.load import decoder_config

STEPS = 32
ROUNDS = 7
POSITIONS = (64, 512, 1024, 2048, 4096, 8191)


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


def table(title: str, contest: Contest, limit: float | None) -> dict[str, Any]:
    request = ("decode", STEPS)
    speeds = {r.name: STEPS / r.median(request) for r in contest.rivals}
    base, other = speeds.get("transformers dense"), speeds.get(llama_cpp.NAME)
    rows = []
    for rival in contest.rivals:
        speed = speeds[rival.name]
        rows.append(
            [
                rival.name,
                f"{speed:.1f}",
                f"{100 * rival.spread(request):.0f} %",
                "" if base is None else f"{speed / base:.2f}",
                "" if other is None else f"{speed / other:.2f}",
                # int8 weights are fewer bytes to read.
                "" if limit is None or "int8" in rival.name else f"{100 * speed / limit:.0f} %",
            ]
        )
    if limit is not None:
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
        Rival("pyparallel modules tp=2", modules, (name, dtype), ranks=2),
        Rival("transformers dense", hugging_face, (name, dtype), threads=2),
        *llama_cpp.rivals(dtype),
    ]
    reader = Rival("bandwidth", read_bandwidth, (), threads=2)
    with Contest([*rivals, reader]) as everyone:
        contest = Contest(rivals)
        check_tokens(contest, dtype)
        bandwidths = []
        for _ in range(ROUNDS):
            bandwidths.append(reader.turn(("read",))[1])
            for rival in everyone.rivals[:-1]:
                rival.time(("decode", STEPS))
        memories = {r.name: r.turn(("memory",))[1] for r in rivals[:2]}
    config = decoder_config(open_checkpoint(MODEL))
    bandwidth = sorted(bandwidths)[ROUNDS // 2]
    limit = bandwidth / weight_bytes_read(config, getattr(torch, dtype))
    speeds = table(f"decode, {name}, {dtype}", contest, limit)
    for who, bytes_ in memories.items():
        process = bytes_["peak_rss_bytes"] - bytes_["weight_bytes"] - bytes_["cache_bytes"]
        print(
            f"{who}: a rank holds {bytes_['weight_bytes'] / 1e6:.0f} MB of weights, "
            f"{bytes_['cache_bytes'] / 1e6:.0f} MB of cache; peak beyond these {process / 1e6:.0f} MB"
        )
    info = {"bandwidth": bandwidth, "limit": limit, "tokens_per_s": speeds, "memory": memories}
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
    speeds = table(title, contest, None)
    record(benchmark, rivals[1], dtype, {"tokens_per_s": speeds})


def test_cost_of_context(benchmark: Any) -> None:
    """Milliseconds a token at growing positions, beside the bytes of cache that are read."""
    rivals = [
        Rival(f"pyparallel tp=2 {dtype}", ours, (MODEL.stem, dtype), ranks=2)
        for dtype in ("float32", "bfloat16")
    ]
    with Contest(rivals) as contest:
        for position in POSITIONS:
            contest.rounds(("context", position), ROUNDS)
    config = decoder_config(open_checkpoint(MODEL))
    width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    rows = []
    for rival in rivals:
        itemsize = 4 if "float32" in rival.name else 2
        start = min(rival.seconds[("context", POSITIONS[0])]) / 8
        for position in POSITIONS:
            took = min(rival.seconds[("context", position)]) / 8
            bytes_read = width * position * itemsize
            rate = bytes_read / (took - start) / 1e9 if position > POSITIONS[0] else 0
            rows.append(
                [
                    f"{rival.name}, position {position}",
                    f"{1e3 * took:.2f}",
                    f"{bytes_read / 1e6:.1f}",
                    f"{rate:.1f}" if rate > 0 else "",
                ]
            )
    print_table("decode by context", ["", "ms/token", "cache MB", "GB/s of the growth"], rows)
    rounds = iter(rivals[0].seconds[("context", POSITIONS[-1])])
    benchmark.extra_info |= machine() | {
        "op": "decode by context",
        "world": 2,
        "backend": "cpu",
        "seconds": {r.name: {str(k): v for k, v in r.seconds.items()} for r in rivals},
    }
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=ROUNDS)
