"""Tokens a second of transformers' own ``model.generate``: dense, and parallelized on CPU ranks.

    pytest -s --benchmark-enable bench/hugging_face_generate.py

Greedy, by transformers' dynamic and static caches. Rivals take turns in one run; each has shown that it
says the same tokens (in half precision the same first ones) before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.contestants import PROMPT
from bench.rivals import MODEL, Contest, Rival, machine, print_table
from pyparallel.mesh import init_mesh
from pyparallel.models.dense import load_dense
from pyparallel.parallelize import parallelize

STEPS = 32
ROUNDS = 5
DENSE = "dense, 2 threads"


def generates(dtype: str, cache: str, cut: bool) -> Callable[[tuple], Any]:
    """``model.generate`` of the dense model, or of the one cut over the ranks it is launched on."""
    model = load_dense(str(MODEL), getattr(torch, dtype))
    if cut:
        parallelize(model, init_mesh(tp=torch.distributed.get_world_size()))
    ids = torch.tensor([PROMPT])

    @torch.inference_mode()
    def turn(request: tuple) -> Any:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request[1],
            do_sample=False,
            eos_token_id=None,
            cache_implementation=cache,
        )
        return made[0, len(PROMPT) :].tolist()

    return turn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate(benchmark: Any, dtype: str) -> None:
    request = ("decode", STEPS)
    rivals = [
        Rival(
            f"{name}, {cache} cache", generates, (dtype, cache, cut), ranks=ranks, threads=threads
        )
        for name, cut, ranks, threads in (
            (DENSE, False, 1, 2),
            ("parallelized, tp=1, 2 threads", True, 1, 2),
            ("parallelized, tp=2", True, 2, 1),
        )
        for cache in ("dynamic", "static")
    ]
    with Contest(rivals) as contest:
        answers = {rival.name: rival.turn(request)[1] for rival in rivals}
        same = STEPS if dtype == "float32" else 2
        assert len({tuple(answer[:same]) for answer in answers.values()}) == 1, answers
        contest.rounds(request, ROUNDS)
    base = rivals[0].median(request)
    rows = [
        [
            rival.name,
            f"{STEPS / rival.median(request):.1f}",
            f"{100 * rival.spread(request):.0f} %",
            f"{base / rival.median(request):.2f}",
        ]
        for rival in rivals
    ]
    title = f"model.generate of transformers, {MODEL.stem}, {dtype}"
    print_table(title, ["", "tokens/s", "+-", "x dense"], rows)
    benchmark.extra_info |= machine() | {
        "op": "generate of transformers",
        "dtype": dtype,
        "world": 2,
        "backend": "cpu",
        "seconds": {rival.name: rival.seconds[request] for rival in rivals},
    }
    turns = iter(rivals[-1].seconds[request])
    benchmark.pedantic(lambda: time.sleep(next(turns)), rounds=ROUNDS)
