"""Rows of ``infer_*.json`` as the planner's own words: what was served, on what, cut how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pyparallel.planner.engine_rates import EngineRates
from pyparallel.planner.hardware import Cluster, cluster_of
from pyparallel.planner.serving import Speed, serve, serve_all
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import BYTES, Inference, Strategy
from pyparallel.planner.weights import layer_shard, stage_layers, stage_shard

GPUS = {
    "a100_sxm": "a100",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "gh200": "gh200",
    "b200_sxm": "b200",
    "gb200": "gb200",
    "l40s": "l40s",
    "l4": "l4",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
# Bytes that an engine leaves free of its GPU's memory, and what it takes beside weights and KV.
MEMORY_FRACTION = {"vllm": 0.9, "sglang": 0.9, "trtllm": 0.9, "trtllm_bench": 0.95}
OTHER_BYTES = 3e9


@dataclass(frozen=True)
class Served:
    """One row.

    Attributes:
        engine: name of the engine whose constants are meant.
        concurrency: clients; 0: as many requests as there are, at once.
        kv_tokens: tokens that the KV cache of a replica has room for.
        tpot_s, ttft_s, tokens_per_s: measured; 0 where they were not.
    """

    engine: str
    shape: ModelShape
    cluster: Cluster
    strategy: Strategy
    work: Inference
    concurrency: int
    kv_tokens: float
    tpot_s: float
    ttft_s: float
    tokens_per_s: float
    label: str
    group: str

    def speed(self, engine: EngineRates) -> Speed:
        """What the planner says of it."""
        call = (self.shape, self.cluster, self.strategy, self.work, engine)
        if self.concurrency:
            return serve(*call, concurrency=self.concurrency, kv_tokens=self.kv_tokens)
        return serve_all(*call, kv_tokens=self.kv_tokens)


def served(row: Mapping[str, Any], engine: str) -> Served:
    """What a row of ``infer_serving_*`` or ``infer_trtllm_*`` says."""
    weights = (row["precision"] if "precision" in row else row["dtype"]) or "bf16"
    kv = "fp8" if engine.startswith("trtllm") and weights in ("fp8", "fp4") else "bf16"
    shape = _shape(row["model"])
    gpus = row["tp"] * row["pp"]
    cluster = cluster_of(GPUS[row["system"]], max(8, gpus))
    strategy = Strategy(pp=row["pp"], tp=row["tp"])
    work = Inference(
        batch=1, prompt=row["isl"], output=row["osl"], weight_dtype=weights, kv_dtype=kv
    )
    asked = f"{row['model']} {weights} {row['system']} {row['isl']}/{row['osl']}"
    concurrency = row.get("concurrency", 0)
    return Served(
        engine=engine,
        shape=shape,
        cluster=cluster,
        strategy=strategy,
        work=work,
        concurrency=concurrency,
        kv_tokens=kv_tokens(shape, cluster, strategy, work, engine),
        tpot_s=(row.get("tpot_ms") or 0) * 1e-3,
        ttft_s=(row.get("ttft_ms") or 0) * 1e-3,
        tokens_per_s=row.get("output_tok_s") or 0.0,
        label=f"{asked} tp {row['tp']} pp {row['pp']} x{concurrency or 'all'}",
        group=f"{asked} {row.get('version')} {row.get('backend')} x{concurrency or 'all'}",
    )


@cache
def _shape(name: str) -> ModelShape:
    return model_shape(name.removesuffix("-FP8").removesuffix("-NVFP4"))


def kv_tokens(
    shape: ModelShape, cluster: Cluster, strategy: Strategy, work: Inference, engine: str
) -> float:
    """Tokens of context that the fullest stage has room for."""
    usable = cluster.gpu.memory_bytes * MEMORY_FRACTION[engine] - OTHER_BYTES
    layers = stage_layers(shape, strategy.pp)
    kv_heads = layer_shard(shape, strategy.tp, 0).kv_heads
    each = 2 * kv_heads * shape.head_dim * BYTES[work.kv_dtype]
    room = []
    for stage in range(strategy.pp):
        shard = stage_shard(shape, strategy.tp, 0, [stage], layers)
        weights = shard.layer_total * BYTES[work.weight_dtype]
        weights += 2 * (shard.embedding + shard.head + shard.final_norm)
        room.append((usable - weights) / (shard.layers * each))
    return strategy.cp * min(room)
