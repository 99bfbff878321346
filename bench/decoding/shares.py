"""Two CPU ranks, one on a core that is half busy: equal shares against those that measured rates give.

    pytest -s --benchmark-enable bench/decoding/shares.py

First each rank decodes alone on its core, at once with the other: from these rates the planner makes its
proposal. Then the rivals take turns, all beside the same busy process; each has shown that it says the
same tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.contestants import PROMPT, ours, weight_bytes_read
from bench.decoding.busy_core import busy_core
from bench.rivals import MODEL, Contest, Rival, machine, print_table
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.comm.exchange import gather_objects
from pyparallel.decoding.cpu_decoder import CPUDecoder
from pyparallel.mesh import init_mesh
from pyparallel.models.load import decoder_config, load
from pyparallel.planner.hardware import Gpu, Link
from pyparallel.planner.plans.shares import MEMORY_FRACTION, propose_shares
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Inference

ROUNDS = 7
REQUESTS = {"decode": ("decode", 32), "prefill": ("prefill", 512)}


def rates(model: str, dtype: str) -> Callable[[Any], list[float]]:
    """A turn: the tokens a second that each rank decodes by itself, all of them at once."""
    mesh = init_mesh(dp=dist.get_world_size())
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[mesh.dp.rank]})
    decoder = CPUDecoder(load(MODEL, mesh, dtype=getattr(torch, dtype)), pin=False)

    def turn(count: int) -> list[float]:
        decoder.start(1, len(PROMPT) + count)
        decoder.prefill(PROMPT)
        started = time.perf_counter()
        for step in range(count):
            decoder.decode([7], rows=[0], positions=[len(PROMPT) + step])
        return gather_objects(dist.group.WORLD, count / (time.perf_counter() - started))

    return turn


def proposal(measured: list[float], dtype: str) -> tuple[int, ...]:
    """What the planner proposes for devices of these rates (`pyparallel plan --devices`)."""
    config = decoder_config(open_checkpoint(MODEL))
    read = weight_bytes_read(config, getattr(torch, dtype))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(measured)
    # Of a bandwidth the planner takes what devices reach; a rate is reached.
    devices = [
        Gpu(f"core {place}", "cpu", memory, rate * read / MEMORY_FRACTION, 1e11)
        for place, rate in enumerate(measured)
    ]
    kind = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    work = Inference(1, len(PROMPT), 32, kind, kind)
    link = Link("shared memory", 1e-6, 1e10)
    return propose_shares(model_shape("SmolLM2-135M"), devices, work, link=link).best.shares


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_a_core(benchmark: Any, dtype: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert len(cores) >= 2, f"two ranks need two cores, this process may use {len(cores)}"
    name = MODEL.stem
    with busy_core(cores[1]):
        probe = Rival("rates", rates, (name, dtype), ranks=2)
        with Contest([probe]):
            probe.turn(16)
            measured = probe.turn(64)[1]
        shares = proposal(measured, dtype)
        equal = Rival("tp=2, equal shares", ours, (name, dtype), ranks=2)
        proposed = Rival(f"tp=2, shares {shares}", ours, (name, dtype, None, None, shares), ranks=2)
        alone = Rival("tp=1, on the free core", ours, (name, dtype))
        rivals = [equal, proposed, alone]
        with Contest(rivals) as contest:
            for request in REQUESTS.values():
                answers = [tuple(rival.turn(request)[1]) for rival in rivals]
                # Half precision rounds partial sums: there the first tokens are compared.
                compared = None if dtype == "float32" else 1
                assert len({answer[:compared] for answer in answers}) == 1, answers
                contest.rounds(request, ROUNDS)
    print_table(
        f"{name}, {dtype}, rates alone {measured[0]:.1f} and {measured[1]:.1f} tokens/s",
        ["", "decode s", "+-", "x equal", "prefill s", "+-", "x equal"],
        [
            [rival.name]
            + [
                cell
                for request in REQUESTS.values()
                for cell in (
                    f"{rival.median(request):.3f}",
                    f"{100 * rival.spread(request):.0f} %",
                    f"{equal.median(request) / rival.median(request):.2f}",
                )
            ]
            for rival in rivals
        ],
    )
    benchmark.extra_info |= machine() | {
        "op": "shares",
        "shape": REQUESTS,
        "dtype": dtype,
        "world": 2,
        "backend": "cpu",
        "rates": measured,
        "shares": shares,
        "seconds": {
            f"{rival.name}, {kind}": rival.seconds[request]
            for rival in rivals
            for kind, request in REQUESTS.items()
        },
    }
    rounds = iter(proposed.seconds[REQUESTS["decode"]])
    benchmark.pedantic(lambda: time.sleep(next(rounds)), rounds=ROUNDS)
