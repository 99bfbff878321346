"""Seconds to read a prompt of 1024 tokens, against transformers.

    pytest -s --benchmark-enable bench/decoding/prefill.py

Rivals take turns in one run; each has shown that it finds the same next token before it is timed.
All give the logits of the last position only.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench.contestants import hugging_face, modules, ours
from bench.decoding import llama_cpp
from bench.rivals import MODEL, Contest, Rival, machine, print_table

LENGTH = 1024
ROUNDS = 5


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """The medians of each test, for the comparison between dtypes."""
    return {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(benchmark: Any, dtype: str, seconds: dict[str, float]) -> None:
    name, request = MODEL.stem, ("prefill", LENGTH)
    rivals = [
        Rival("pyparallel tp=2", ours, (name, dtype), ranks=2),
        Rival("pyparallel tp=1, 2 threads", ours, (name, dtype), threads=2),
        Rival("pyparallel tp=2, GGUF blocks", ours, (name, dtype, "blocks"), ranks=2),
        Rival("pyparallel tp=1, 2 threads, GGUF blocks", ours, (name, dtype, "blocks"), threads=2),
        Rival("pyparallel modules tp=2", modules, (name, dtype), ranks=2),
        Rival("transformers dense", hugging_face, (name, dtype), threads=2),
        *llama_cpp.rivals(dtype),
    ]
    with Contest(rivals) as contest:
        answers = {rival.name: rival.turn(request)[1] for rival in rivals}
        # A random prompt's likeliest tokens lie close in half precision.
        if dtype == "float32":
            assert len({tuple(answer) for answer in answers.values()}) == 1, answers
        contest.rounds(request, ROUNDS)
    medians = {rival.name: rival.median(request) for rival in rivals}
    dense, other = medians["transformers dense"], medians.get(llama_cpp.NAME)
    rows = [
        [
            rival.name,
            f"{medians[rival.name]:.3f}",
            f"{100 * rival.spread(request):.0f} %",
            f"{LENGTH / medians[rival.name]:.0f}",
            f"{dense / medians[rival.name]:.2f}",
            "" if other is None else f"{other / medians[rival.name]:.2f}",
        ]
        for rival in rivals
    ]
    columns = ["", "seconds", "+-", "tokens/s", "x dense", "x llama.cpp"]
    print_table(f"prefill of {LENGTH} tokens, {name}, {dtype}", columns, rows)
    seconds[dtype] = medians["pyparallel tp=2"]
    if len(seconds) == 2:
        print(f"bf16 takes {seconds['bfloat16'] / seconds['float32']:.2f} of fp32's time")
    benchmark.extra_info |= machine() | {
        "op": "prefill",
        "shape": [1, LENGTH],
        "dtype": dtype,
        "world": 2,
        "backend": "cpu",
        "seconds": {rival.name: rival.seconds[request] for rival in rivals},
    }
    rounds = iter(rivals[0].seconds[request])
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=ROUNDS)
