"""Counted collectives are those that the modules of a dry run make."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from pyparallel.models.config import from_hugging_face
from pyparallel.models.dry_run import dry_run_inference, dry_run_training
from pyparallel.planner.messages import inference_calls, training_calls
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import RECOMPUTE, Inference, Strategy, Training
from tests.planner.test_weights import random_config


@pytest.mark.parametrize("seed", range(200, 224))
def test_calls_of_training(seed: int) -> None:
    config, draw = random_config(seed), random.Random(seed)
    shape, decoder = model_shape(config), from_hugging_face(config)
    strategy = Strategy(
        pp=draw.randint(1, 2),
        tp=draw.randint(1, min(4, shape.heads)),
        sp=draw.random() < 0.5,
        micro_batch=draw.randint(1, 3),
        recompute=draw.choice(RECOMPUTE),
    )
    sp = strategy.sp and strategy.tp > 1
    work = Training(global_batch=strategy.micro_batch, sequence=draw.randint(5, 8))
    stages = dry_run_training(
        decoder,
        tp=strategy.tp,
        pp=strategy.pp,
        micro_batch=strategy.micro_batch,
        sequence=work.sequence,
        sequence_parallel=sp,
        recompute=strategy.recompute,
        dtype=torch.bfloat16,
    )
    for counted in stages:
        ends = {"first": counted.stage.is_first, "last": counted.stage.is_last}
        told = training_calls(shape, strategy, work, len(counted.stage.layers), **ends)
        for phase, calls in told.items():
            assert counted.calls[phase].get("tp", Counter()) == calls, (config, strategy, phase)


@pytest.mark.parametrize("seed", range(300, 306))
def test_calls_of_answers(seed: int) -> None:
    config, draw = random_config(seed), random.Random(seed)
    shape, decoder = model_shape(config), from_hugging_face(config)
    strategy = Strategy(pp=draw.randint(1, 2), tp=draw.randint(1, min(4, shape.heads)))
    work = Inference(batch=draw.randint(1, 3), prompt=5, output=2)
    stages = dry_run_inference(
        decoder, tp=strategy.tp, pp=strategy.pp, batch=work.batch, prompt=5, output=2
    )
    for counted in stages:
        layers, first = len(counted.stage.layers), counted.stage.is_first
        told = inference_calls(shape, strategy, work, layers, first=first)
        for phase, calls in told.items():
            assert counted.calls[phase].get("tp", Counter()) == calls, (config, strategy, phase)
