"""The bubble of each pipeline schedule, and of pipelined generation: measured, beside the formula.

    pytest -s --benchmark-enable bench/training/pipeline.py

A rank's busy time is what it spends in its stages' forwards, backwards and loss; a step lasts from a
barrier to the next. The bubble is the part of a step in which a rank is not busy, the mean over ranks.
It holds what the formula leaves out too: messages, stages that are not equal, the schedule's own Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from bench.rivals import machine, print_table
from pyparallel import backend
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.config import DecoderConfig, from_hugging_face
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import stages_of, stages_of_rank
from pyparallel.training.pipeline import Pipeline
from pyparallel.training.pipeline_schedules import SCHEDULES, bubble, schedule_of

RANKS = 2
# Layers that divide by 2 and by 4, and a vocabulary that costs little: stages cost the same.
MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# Sequences of a micro-batch, and tokens of each.
MICRO_BATCH, LENGTH = 1, 192
MICRO_BATCHES = (2, 4, 8)
ROUNDS = 5
NEW_TOKENS = 16
PROMPT = 64

Round = tuple[float, float]


class Clock:
    """Seconds in the functions it wraps."""

    def __init__(self) -> None:
        self.busy = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.busy += time.perf_counter() - started

        return timed


def stages(mesh: Mesh, chunks: int, order: str) -> list[Decoder]:
    config: DecoderConfig = from_hugging_face(MODEL)
    cut = stages_of(config, mesh.pp.size * chunks)
    made = []
    for index in stages_of_rank(mesh.pp.size, mesh.pp.rank, chunks, order=order):
        torch.manual_seed(index)
        made.append(Decoder(config, "cpu", torch.float32, group=mesh.tp, stage=cut[index]))
        made[-1].pipeline = mesh.pp
    return made


def rounds(mesh: Mesh, clock: Clock, step: Callable[[], Any]) -> list[Round]:
    """(busy, whole) seconds of this rank in each round, the first left out."""
    found = []
    for _ in range(ROUNDS + 1):
        mesh.pp.communicator.barrier()
        clock.busy, started = 0.0, time.perf_counter()
        step()
        mesh.pp.communicator.barrier()
        found.append((clock.busy, time.perf_counter() - started))
    return found[1:]


def train(schedule: str, m: int, chunks: int) -> list[Round]:
    mesh = init_mesh(pp=torch.distributed.get_world_size())
    clock = Clock()
    for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
        setattr(PipelineStage, name, clock.wrap(getattr(PipelineStage, name)))
    pipeline = Pipeline(
        stages(mesh, chunks, schedule_of(schedule).order),
        mesh,
        schedule=schedule,
        num_microbatches=m,
    )
    pipeline._loss_of = clock.wrap(pipeline._loss_of)
    ids = torch.randint(
        0, 512, (m * MICRO_BATCH, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    return rounds(mesh, clock, lambda: pipeline.step(ids, ids))


def answer(m: int) -> list[Round]:
    """As many prompts as micro-batches of 4."""
    mesh = init_mesh(pp=torch.distributed.get_world_size())
    (model,) = stages(mesh, 1, "loop")
    model.eval()
    clock = Clock()
    model.hidden = clock.wrap(model.hidden)
    if model.head is not None:
        model.head.sample = clock.wrap(model.head.sample)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 512, (4 * m, PROMPT), generator=generator).tolist()

    def step() -> None:
        with backend.use("torch"):
            generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=(), micro_batches=m)

    return rounds(mesh, clock, step)


def bubbles(by_rank: list[list[Round]]) -> list[float]:
    """Of each round, the mean over ranks."""
    return [
        statistics.fmean(1 - busy / max(whole for _, whole in ranks) for busy, _ in ranks)
        for ranks in zip(*by_rank, strict=True)
    ]


def report(benchmark: Any, what: str, m: int, formula: float, by_rank: list[list[Round]]) -> None:
    measured = bubbles(by_rank)
    seconds = [max(whole for _, whole in ranks) for ranks in zip(*by_rank, strict=True)]
    print_table(
        f"{what}, m={m}, {RANKS} ranks of one thread",
        ["bubble", "formula", "seconds"],
        [
            [
                f"{statistics.median(measured):.3f} ({min(measured):.3f} to {max(measured):.3f})",
                f"{formula:.3f}",
                f"{statistics.median(seconds):.3f}",
            ]
        ],
    )
    benchmark.extra_info |= machine() | {
        "op": what,
        "shape": [MICRO_BATCH, LENGTH, MODEL["hidden_size"], MODEL["num_hidden_layers"]],
        "dtype": "float32",
        "world": RANKS,
        "backend": "torch over Gloo" if "generate" not in what else "torch over shared memory",
        "micro_batches": m,
        "bubble": measured,
        "formula": formula,
    }
    taken = iter(seconds)
    # The ranks have taken the times; pytest-benchmark counts one of them a round.
    benchmark.pedantic(lambda: time.sleep(next(taken)), rounds=ROUNDS)


@pytest.mark.parametrize("m", MICRO_BATCHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training(benchmark: Any, schedule: str, m: int) -> None:
    chunks = 1 if schedule in ("gpipe", "1f1b") else 2
    by_rank = launch(train, RANKS, schedule, m, chunks, threads=1)
    formula = bubble(schedule, ranks=RANKS, chunks=chunks, num_microbatches=m)
    report(benchmark, schedule, m, formula, by_rank)


@pytest.mark.parametrize("m", (1, *MICRO_BATCHES))
def test_generation(benchmark: Any, m: int) -> None:
    by_rank = launch(answer, RANKS, m, threads=1)
    report(benchmark, "generate", m, (RANKS - 1) / (m + RANKS - 1), by_rank)
