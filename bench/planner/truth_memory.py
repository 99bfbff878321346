"""Published memory against the planner's: peaks of training, weights and caches of serving, what fits.

The floor of training is one line: 18 bytes a parameter (ZeRO 1: 6 + 12 / dp) over tp x pp, and 34 bytes
of hidden state a token and layer; of serving it is what 0.9 of the GPU leaves beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.planner.training_rows import nemo_strategy
from bench.planner.truth import Pair, Reading
from bench.planner.ultrascale import rows_of, shape_of, strategy_of, training_of
from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import Gpu, gpu_of
from pyparallel.planner.memory import fits, peak, weight_bytes
from pyparallel.planner.memory import stage_shards as shards_of
from pyparallel.planner.memory_inference import cache_room, cache_tokens, inference_memory
from pyparallel.planner.memory_training import training_memory
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import Inference, Strategy, Training

GIB = 2**30
# The checkpoint behind a row whose model alone does not say it: Meta's of 8 bits, which in July 2024
# still had every KV head twice.
CHECKPOINTS = {
    "llama31-405b-fp8-tp8-h100": replace(model_shape("Llama-3.1-405B-FP8"), kv_heads=16),
    "llama31-405b-fp8-8xh100": model_shape("Llama-3.1-405B-FP8"),
}
# The lengths that the Lambda table was made with.
LADDER = (4096, 16384, 32768, 65536, 131072)


def ultrascale(content: Mapping[str, Any]) -> Reading:
    """Peaks of the sweep's runs, and which of its configurations failed."""
    reading, engine, gpu = Reading(), engine_of("nanotron"), gpu_of("h100")
    # A configuration that ran in one of its tries counts as one that runs: its thriftiest decides.
    thrifty = replace(engine, gathered_kept="never")
    for row in rows_of(content, reading):
        shape = shape_of(content, row["model"])
        strategy, training = strategy_of(row), training_of(row)
        try:
            memory = training_memory(shape, strategy, training, engine=engine)
            least = training_memory(shape, strategy, training, engine=thrifty)
        except ValueError as error:
            reading.unused[f"cannot be cut: {str(error).partition(':')[0]}"] += 1
            continue
        label = f"{row['model']} {strategy} z{row['zero']} mbs {row['mbs']}"
        naive = training_floor(shape, strategy, training)
        if row["status"] == "ok":
            predicted = max(each.total - each.terms["overhead"] for each in memory) / GIB
            # The 1B rows are what the engine's constants were fitted on.
            fitted = row["model"] == "1B"
            # With tp the inputs of column layers are kept gathered or not; the sweep doesn't say.
            kept = "tp 1" if strategy.tp == 1 else "tp > 1"
            quantity = f"peak memory{', 1B' if fitted else ''}, {kept}"
            reading.pairs.append(
                Pair(quantity, predicted, row["mem_gb"], naive / GIB, "GiB", fitted, label)
            )
        elif row["status"] != "failed":
            reading.unused["slow, drawn as failed"] += 1
            continue
        # Hangs, dead nodes and runs out of time are failures too, which no memory explains.
        ran, naively = float(row["status"] == "ok"), float(naive <= gpu.memory_bytes)
        predicted = float(fits(least, gpu))
        reading.pairs.append(Pair("fits", predicted, ran, naively, "label", False, label))
    return reading


def training_floor(shape: ModelShape, strategy: Strategy, training: Training) -> float:
    """One line: bytes a parameter, and 34 bytes a feature, token and layer, evenly cut."""
    each = 6 + 12 / (strategy.dp if strategy.zero else 1)
    cut = strategy.tp * strategy.pp
    tokens = strategy.micro_batch * training.sequence
    ahead = min(strategy.pp, training.micro_batches(strategy))
    return (each * shape.parameters() + 34 * tokens * shape.hidden * shape.layers * ahead) / cut


def dgxc(content: Mapping[str, Any]) -> Reading:
    """The two peaks that NeMo's recipes print."""
    reading, engine = Reading(), engine_of("megatron")
    for row in content["measured_memory"]:
        shape, strategy = model_shape(row["model"]), nemo_strategy(row)
        # What is allocated after a step is 2 + 2 + 12 / (dp cp) bytes a parameter: bf16 gradients.
        training = Training(row.get("global_batch", 128), row["seq"], gradient_dtype="bf16")
        memory = training_memory(shape, strategy, training, engine=engine)
        terms = peak(memory).terms
        predicted = peak(memory).total - terms["overhead"]
        states = sum(terms[name] for name in ("weights", "gradients", "optimizer"))
        floor = training_floor(shape, strategy, training)
        measured = row["peak_memory_bytes"]
        label = f"{row['model']} {strategy}"
        reading.pairs.append(
            Pair("peak memory", predicted / GIB, measured / GIB, floor / GIB, "GiB", False, label)
        )
        allocated = row["memory_allocated_bytes"] / GIB
        naive = 18 * shape.parameters() / strategy.tp / strategy.pp / GIB
        reading.pairs.append(Pair("states", states / GIB, allocated, naive, "GiB", False, label))
    return reading


def lambda_contexts(content: Mapping[str, Any]) -> Reading:
    """Which cells start at all, and up to which of the lengths tried."""
    reading, engine = Reading(), engine_of("vllm")
    for row in content["rows"]:
        shape = model_shape(row["model"].removesuffix("-FP8"))
        gpu = gpu_of(row["system"].partition("_")[0])
        strategy = Strategy(tp=row["tp"])
        longest = longest_context(shape, strategy, gpu, row["weights"])
        weights = weight_bytes(shards_of(shape, strategy, engine)[0], row["weights"])
        naive = 0.9 * gpu.memory_bytes - weights > 0
        label = f"{row['model']} {row['system']} tp {row['tp']}"
        fitted = float(longest > 0)
        reading.pairs.append(
            Pair("fits", fitted, float(row["fits"]), float(naive), "label", False, label)
        )
        reading.pairs.append(
            Pair(
                "longest context",
                float(longest),
                float(row["max_context"]),
                float(shape.max_positions if naive else 0),
                "tokens",
                False,
                label,
            )
        )
    return reading


def longest_context(shape: ModelShape, strategy: Strategy, gpu: Gpu, dtype: str) -> int:
    """The longest of the ladder's lengths whose KV cache fits one sequence, by vLLM 0.5.4's rules.

    It runs a prompt at once up to 32k tokens, and in chunks of 512 beyond.
    """
    engine, longest = engine_of("vllm"), 0
    for length in LADDER:
        step = max(length, 2048) if length <= 32768 else 512
        room = cache_room(shape, strategy, gpu, engine=engine, weight_dtype=dtype, step_tokens=step)
        if length <= shape.max_positions and cache_tokens(shape, strategy, room) >= length:
            longest = length
    return longest


def oom_points(content: Mapping[str, Any]) -> Reading:
    """Weights, caches and verdicts of single reports."""
    reading, engine = Reading(), engine_of("vllm")
    for row in content["rows"]:
        before = len(reading.pairs)
        name, dtype = str(row.get("model", "")), _dtype(row.get("dtype", ""))
        if "tp" not in row or "train" in row.get("task", ""):
            reading.unused["no serving by tp"] += 1
            continue
        try:
            shape, gpu = model_shape(name), gpu_of(_gpu(row["gpu"]))
        except ValueError as error:
            reading.unused[str(error).partition(";")[0]] += 1
            continue
        if row["id"] in CHECKPOINTS:
            shape = CHECKPOINTS[row["id"]]
        strategy = Strategy(tp=row["tp"])
        weights = weight_bytes(shards_of(shape, strategy, engine)[0], dtype)
        floor = shape.parameters() * (1 if dtype == "fp8" else 2) / row["tp"]
        # vLLM prints GB where it means GiB.
        for key in ("weights_gib", "weights_gb", "weights_gb_per_gpu"):
            if key in row:
                pair = (weights / GIB, row[key], floor / GIB, "GiB", False, row["id"])
                reading.pairs.append(Pair("weights a GPU", *pair))
        utilization = row.get("util", 0.9)
        room = cache_room(
            shape,
            strategy,
            gpu,
            engine=engine,
            weight_dtype=dtype,
            utilization=utilization,
            # Beyond 32k tokens prompts are read in chunks.
            step_tokens=row.get("max_len", 8192) if row.get("max_len", 0) <= 32768 else 2048,
        )
        if "kv_gib" in row:
            left = utilization * gpu.memory_bytes - floor
            pair = (room / GIB, row["kv_gib"], left / GIB, "GiB", False, row["id"])
            reading.pairs.append(Pair("KV cache", *pair))
        if "kv_tokens" in row:
            tokens = float(cache_tokens(shape, strategy, room))
            per_token = shape.kv_bytes_per_token() / row["tp"]
            left = (utilization * gpu.memory_bytes - floor) / per_token
            pair = (tokens, row["kv_tokens"], left, "tokens", False, row["id"])
            reading.pairs.append(Pair("KV tokens", *pair))
        if "fits" in row:
            work = Inference(1, row.get("max_len", 8192) - 1, 1, dtype)
            memory = inference_memory(shape, strategy, work, engine=engine, chunk=2048)
            verdict = float(fits(memory, gpu) and room > memory[0].terms["kv cache"])
            naive = float(floor < gpu.memory_bytes)
            pair = (verdict, float(row["fits"]), naive, "label", False, row["id"])
            reading.pairs.append(Pair("fits", *pair))
        if len(reading.pairs) == before:
            reading.unused["nothing measured"] += 1
    return reading


def _dtype(text: str) -> str:
    return "fp8" if "8" in text and "fp" in text else "bf16"


def _gpu(text: str) -> str:
    return text.replace("RTX4090-24", "rtx-4090").replace("80 GB class", "h100")


READERS = {
    "memory_oom_points.json": oom_points,
    "oom_lambda_vllm_max_context.json": lambda_contexts,
    "train_dgxc_nemo_llama31_h100.json": dgxc,
    "train_ultrascale_h100_sweep.json": ultrascale,
}
