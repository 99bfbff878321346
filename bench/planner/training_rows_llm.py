"""Rows of step times that were measured with FSDP, or with Megatron-Bridge's recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.planner.training_case import Case
from bench.planner.truth import Reading
from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import Strategy, Training

# Hidden size, layers and heads of MPT: llm-foundry's configurations. MLP of 4 H, tied, no biases.
MPT = {
    "mpt-125m": (768, 12, 12),
    "mpt-350m": (1024, 24, 16),
    "mpt-760m": (1536, 24, 12),
    "mpt-1b": (2048, 24, 16),
    "mpt-3b": (2560, 32, 20),
    "mpt-7b": (4096, 32, 32),
    "mpt-13b": (5120, 40, 40),
    "mpt-30b": (7168, 48, 56),
    "mpt-70b": (8192, 80, 64),
}
# What Megatron-Bridge calls the models that are planned for.
BRIDGE = {"LLAMA3_8B": "llama-3-8b", "LLAMA3_70B": "llama-3-70b", "LLAMA3.1_405B": "llama-3.1-405b"}


def mpt_shape(name: str, sequence: int) -> ModelShape:
    """One of Mosaic's GPTs."""
    hidden, layers, heads = MPT[name]
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=50368,
        max_positions=sequence,
        tied=True,
        gated=False,
        norm="layer",
        learned_positions=sequence,
    )


def mpt(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """llm-foundry's tables: FSDP alone, weights and gradients of 16 bits on the wire."""
    for row in content["rows"]:
        if row["model"] not in MPT:
            reading.unused[f"no shape of {row['model']}"] += 1
            continue
        shape = mpt_shape(row["model"], row["seq"])
        if abs(shape.parameters() / row["params"] - 1) > 0.01:
            reading.unused[f"parameters of {row['model']} are not the shape's"] += 1
            continue
        strategy = Strategy(
            dp=row["gpus"],
            micro_batch=row["micro_batch"],
            zero=3 if row["sharding"] == "FULL_SHARD" else 2,
            recompute="layers" if row["act_ckpt"] == "True" else "none",
        )
        precision = row["precision"].removeprefix("amp_")
        gpu = row["gpu"].replace("_", "-")
        yield Case(
            shape,
            strategy,
            Training(row["global_batch"], row["seq"], dtype=precision, gradient_dtype="bf16"),
            cluster_of(gpu, row["gpus"]),
            engine_of("llm-foundry"),
            row["global_batch"] * row["seq"] / row["tokens_s"],
            quantity=f"step time, {gpu} {precision}",
        )


def bridge(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """NVIDIA's table of recipes: dense Llamas; experts over ranks are not planned."""
    for row in content["rows"]:
        if row["model"] not in BRIDGE:
            reading.unused[f"{row['model']}: experts over ranks, or no shape"] += 1
            continue
        precision = str(row["precision"]).lower()
        numbers = [row[key] for key in ("fsdp", "tp", "pp", "cp", "vp", "tokens_s_gpu")]
        if row["precision"] is None or any(isinstance(number, str) for number in numbers):
            reading.unused["two recipes or no precision in one row"] += 1
            continue
        gpu = row["system"].removeprefix("DGX-")
        dtype = "fp4" if "fp4" in precision else "fp8" if "fp8" in precision else "bf16"
        tp, pp, cp = row["tp"], row["pp"], row["cp"]
        strategy = Strategy(
            dp=row["gpus"] // (tp * pp * cp),
            pp=pp,
            cp=cp,
            tp=tp,
            sp=tp > 1,
            micro_batch=row["mbs"],
            virtual_stages=row["vp"] or 1,
            zero=3 if row["fsdp"] else 1,
        )
        tokens = row["gbs"] * row["seq"]
        training = Training(
            row["gbs"],
            row["seq"],
            dtype=dtype,
            gradient_dtype="bf16",
            frozen=row["task"] == "LoRA",
        )
        yield Case(
            model_shape(BRIDGE[row["model"]]),
            strategy,
            training,
            cluster_of(gpu, row["gpus"]),
            engine_of("megatron"),
            tokens / (row["tokens_s_gpu"] * row["gpus"]),
            quantity=f"step time, {gpu} {dtype}",
            calibrated=gpu == "GB200" and dtype == "fp8",
        )


ROWS = {
    "train_megatron_bridge_perf.json": bridge,
    "train_mpt_fsdp_a100_h100.json": mpt,
}
