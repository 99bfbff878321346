"""Measured serving (``infer_*.json``) against :mod:`pyparallel.planner.serving`.

The floor is a roofline of three constants: weights and KV at 0.8 of the memory's bandwidth, matmuls at
0.6 of the peak, reductions at 0.8 of the link's rate; no launches, no host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench.planner.serving_rows import Served, served
from bench.planner.truth import Pair, Reading
from pyparallel.planner.engine_rates import engine_rates_of
from pyparallel.planner.strategy import BYTES

FEW_CLIENTS = 8


def serving(content: Mapping[str, Any]) -> Reading:
    """``infer_serving_dense_tp_sweeps``: closed loops of 1 to 512 clients."""
    reading = Reading()
    for row in content["rows"]:
        if not row["tpot_ms"]:
            reading.unused["no time per token"] += 1
            continue
        found = served(row, row["backend"])
        reading.pairs.extend(_serving_pairs(found))
    return reading


def _serving_pairs(row: Served) -> Iterator[Pair]:
    own = engine_rates_of(row.engine, row.cluster.gpu.name)
    speed = row.speed(own)
    calibrated = bool(own.calibrated_on)
    floor = floor_seconds(row, speed.running)
    if speed.queued:
        yield _pair(row, "time per token, memory full", speed.tpot_s, row.tpot_s, floor, False)
        return
    name = f"time per token, {row.engine}"
    yield _pair(row, name, speed.tpot_s, row.tpot_s, floor, calibrated, row.group)
    if calibrated:
        foreign = engine_rates_of(row.engine, row.cluster.gpu.name, as_unknown=True)
        name = f"time per token, {row.engine}, as if on a new GPU"
        predicted = row.speed(foreign).tpot_s
        yield _pair(row, name, predicted, row.tpot_s, floor, False)
    few = row.concurrency <= FEW_CLIENTS
    name = f"time to first token, {'at most' if few else 'over'} {FEW_CLIENTS} clients"
    yield _pair(row, name, speed.ttft_s, row.ttft_s, floor_prefill(row) + floor, calibrated)


def max_load(content: Mapping[str, Any]) -> Reading:
    """``infer_trtllm_*``: all requests at once, tokens a second; which tp gives a GPU the most."""
    reading = Reading()
    for row in content["rows"]:
        if not row["output_tok_s"]:
            reading.unused["no number published"] += 1
            continue
        found = served(row, "trtllm_bench")
        own = engine_rates_of("trtllm_bench", found.cluster.gpu.name)
        speed = found.speed(own)
        calibrated = bool(own.calibrated_on) and "version" in row
        tpot = floor_seconds(found, speed.running)
        floor = speed.running / tpot * (row["pp"] if row["pp"] > 1 else 1)
        kind = "a known GPU" if own.calibrated_on else "a new GPU"
        reading.pairs.append(
            Pair(
                quantity=f"tokens/s, {kind}",
                predicted=speed.tokens_per_s,
                measured=found.tokens_per_s,
                floor=floor,
                unit="tokens/s",
                calibrated=calibrated,
                label=found.label,
                group=found.group,
            )
        )
        gpus = row["gpus"]
        reading.pairs.append(
            Pair(
                quantity=f"tokens/s of one GPU, {kind}",
                predicted=speed.tokens_per_s / gpus,
                measured=found.tokens_per_s / gpus,
                floor=floor / gpus,
                unit="tokens/s",
                calibrated=calibrated,
                label=found.label,
                group=found.group,
            )
        )
    return reading


def pipeline_against_tensor(content: Mapping[str, Any]) -> Reading:
    """``infer_l4_pp_vs_tp``: 70B on eight L4 behind PCIe, cut two ways."""
    reading = Reading()
    for row in content["rows"]:
        tp, pp = (int(word[2:]) for word in row["config"].split())
        # ShareGPT's mean answer and prompt, by the rates that the table gives.
        output = round(row["output_tok_s"] / row["req_s"])
        prompt = round(row["total_tok_s"] / row["req_s"]) - output
        found = served(
            {
                "model": "Llama-3.1-70B",
                "precision": "fp8",
                "system": "l4",
                "tp": tp,
                "pp": pp,
                "isl": prompt,
                "osl": output,
                "output_tok_s": row["output_tok_s"],
            },
            "vllm",
        )
        found = replace(found, work=replace(found.work, kv_dtype="fp8"))
        speed = found.speed(engine_rates_of("vllm", found.cluster.gpu.name))
        floor = speed.running / floor_seconds(found, speed.running) * pp
        reading.pairs.append(
            Pair(
                quantity="tokens/s",
                predicted=speed.tokens_per_s,
                measured=row["output_tok_s"],
                floor=floor,
                unit="tokens/s",
                calibrated=False,
                label=row["config"],
                group="70B on 8 L4",
            )
        )
    return reading


def floor_seconds(row: Served, running: float) -> float:
    """Time per token by the roofline; over stages, of one part of the batch through all of them."""
    shape, gpu, tp, pp = row.shape, row.cluster.gpu, row.strategy.tp, row.strategy.pp
    each = max(1.0, running / pp)
    weights = shape.parameters() * BYTES[row.work.weight_dtype] / tp
    kv = shape.kv_bytes_per_token(BYTES[row.work.kv_dtype]) / min(tp, shape.kv_heads)
    context = row.work.prompt + row.work.output / 2
    read = (weights + each * context * kv) / (0.8 * gpu.bandwidth)
    rate = 0.6 * gpu.peak_flops(row.work.weight_dtype)
    compute = 2 * each * shape.matmul_weights() / tp / rate
    moved = 2 * shape.layers * 2 * each * shape.hidden * 2 * (tp - 1) / tp
    reduce = moved / (0.8 * row.cluster.intra.bytes_per_s)
    prefills = max(0.0, running - 1) / row.work.output / pp * floor_prefill(row)
    return max(read, compute) + reduce + prefills


def floor_prefill(row: Served) -> float:
    """One prompt by the roofline."""
    shape, gpu, tp = row.shape, row.cluster.gpu, row.strategy.tp
    rate = 0.6 * gpu.peak_flops(row.work.weight_dtype)
    return 2 * row.work.prompt * shape.matmul_weights() / tp / rate


def _pair(
    row: Served,
    quantity: str,
    predicted: float,
    measured: float,
    floor: float,
    calibrated: bool,
    group: str = "",
) -> Pair:
    return Pair(
        quantity=quantity,
        predicted=predicted,
        measured=measured if measured else math.nan,
        floor=floor,
        unit="s",
        calibrated=calibrated,
        label=row.label,
        group=group,
    )


READERS = {
    "infer_serving_dense_tp_sweeps.json": serving,
    "infer_trtllm_tp_sweeps.json": max_load,
    "infer_trtllm_perf_overview.json": max_load,
    "infer_l4_pp_vs_tp.json": pipeline_against_tensor,
}
