"""Tokens a second of transformers' own ``model.generate``: dense, and parallelized on CPU ranks.

    pytest -s --benchmark-enable bench/decoding/hugging_face_generate.py

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
from pyparallel.models.parallelize import parallelize

STEPS = 32
ROUNDS = 5
CACHES = ("dynamic", "static")


def generates(dtype: str, cut: bool) -> Callable[[tuple], Any]:
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
            cache_implementation=request[2],
        )
        return made[0, len(PROMPT) :].tolist()

    return turn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate(benchmark: Any, dtype: str) -> None:
    requests = [("decode", STEPS, cache) for cache in CACHES]
    rivals = [
        Rival("dense, 2 threads", generates, (dtype, False), threads=2),
        Rival("parallelized, tp=1, 2 threads", generates, (dtype, True), threads=2),
        Rival("parallelized, tp=2", generates, (dtype, True), ranks=2),
    ]
    with Contest(rivals) as contest:
        answers = {r.name: [r.turn(request)[1] for request in requests] for r in rivals}
        same = STEPS if dtype == "float32" else 2
        assert len({tuple(made[:same]) for both in answers.values() for made in both}) == 1, answers
        for request in requests:
            contest.rounds(request, ROUNDS)
    base = rivals[0].median(requests[0])
    rows = [
        [
            f"{rival.name}, {request[2]} cache",
            f"{STEPS / rival.median(request):.1f}",
            f"{100 * rival.spread(request):.0f} %",
            f"{base / rival.median(request):.2f}",
        ]
        for rival in rivals
        for request in requests
    ]
    title = f"model.generate of transformers, {MODEL.stem}, {dtype}"
    print_table(title, ["", "tokens/s", "+-", "x dense"], rows)
    benchmark.extra_info |= machine() | {
        "op": "generate of transformers",
        "dtype": dtype,
        "world": 2,
        "backend": "cpu",
        "seconds": {r.name: {k[2]: v for k, v in r.seconds.items()} for r in rivals},
    }
    turns = iter(rivals[-1].seconds[requests[0]])
    benchmark.pedantic(lambda: time.sleep(next(turns)), rounds=ROUNDS)
