"""What to do with a model and a cluster: the plan, its rivals, and the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyparallel.limits import check_count
from pyparallel.planner.engine_rates import DEFAULT_ENGINE, engine_of_file, engine_rates_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.plans.inference import InferencePlan, plan_inference
from pyparallel.planner.plans.training import TrainingPlan, plan_training
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import BYTES, Inference, Training, check_choice

MAX_BATCH = 1 << 20
# Of a step of training where nothing is said: tokens of a sequence, and of all sequences.
SEQUENCE = 8192
STEP_TOKENS = 1 << 22


def plan(
    model: str | Path | Mapping[str, Any],
    gpu: str | Path,
    gpus: int,
    *,
    gpus_per_node: int | None = None,
    intra: str | Path | None = None,
    inter: str | Path | None = None,
    batch: int | None = None,
    prompt: int = 1024,
    output: int = 128,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    engine: str = DEFAULT_ENGINE,
    train: bool = False,
    sequence: int | None = None,
    optimizer: str = "adamw",
) -> InferencePlan | TrainingPlan:
    """Which dp x pp x cp x tp answers a batch of prompts, or trains, the fastest, and why.

    Args:
        model: a shipped model's name, or a Hugging Face config.json, its folder or its content.
        gpu: a shipped GPU's name, or a TOML file of one's own.
        gpus: in all; ``gpus_per_node`` of them share ``intra``, nodes share ``inter``, names or files.
        batch: sequences that are answered together over all GPUs (default 1), each of ``prompt`` tokens,
            ``output`` more made; or those of a step (default: 4 Mi tokens).
        dtype, kv_dtype: of weights, and of the KV cache (default: 16 bits).
        engine: whose measured rates the times of answers are taken from: vllm, sglang, trtllm; a TOML
            file's own, where it has an [engine].
        train: plan a step of ``optimizer`` on sequences of ``sequence`` tokens (default 8192) instead.

    Raises:
        ValueError: an unknown name (with the nearest), a number out of range, or work that no plan
            holds (with the smallest cluster that does).
    """
    shape = model_shape(model)
    cluster = cluster_of(gpu, gpus, gpus_per_node=gpus_per_node, intra=intra, inter=inter)
    if train:
        return plan_training(shape, cluster, _training(shape, batch, sequence, dtype, optimizer))
    if sequence is not None:
        raise ValueError(
            f"sequence: expected none without train, got {sequence}; use prompt and output"
        )
    work = check_work(shape, 1 if batch is None else batch, prompt, output, dtype, kv_dtype)
    rates = engine_of_file(Path(gpu)) if Path(gpu).suffix == ".toml" else None
    rates = rates or engine_rates_of(engine, cluster.gpu.name)
    return plan_inference(shape, cluster, work, rates)


def _training(
    shape: ModelShape, batch: int | None, sequence: int | None, dtype: str, optimizer: str
) -> Training:
    length = min(SEQUENCE, shape.max_positions) if sequence is None else sequence
    check_count("sequence", length, shape.max_positions, why=f", the positions of {shape.name}")
    sequences = max(1, STEP_TOKENS // length) if batch is None else batch
    check_count("batch", sequences, MAX_BATCH)
    return Training(sequences, length, dtype=dtype, optimizer=optimizer)


def check_work(
    shape: ModelShape, batch: int, prompt: int, output: int, dtype: str, kv_dtype: str | None
) -> Inference:
    """The work, its numbers checked.

    Raises:
        ValueError: a number out of range, an unknown type, or more tokens than the model has positions.
    """
    check_count("batch", batch, MAX_BATCH)
    check_count("prompt", prompt, 1 << 31)
    check_count("output", output, 1 << 31)
    check_choice("dtype", dtype, tuple(BYTES))
    if prompt + output > shape.max_positions:
        raise ValueError(
            f"prompt + output: expected at most {shape.max_positions} tokens, the positions of "
            f"{shape.name}, got {prompt} + {output}"
        )
    kv = kv_dtype or ("fp32" if dtype == "fp32" else "bf16")
    check_choice("kv_dtype", kv, tuple(BYTES))
    return Inference(batch, prompt, output, dtype, kv)
