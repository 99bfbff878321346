"""Published step times of training against the planner's.

The floor is a roofline of three constants for all GPUs: products at 0.6 of the peak, messages at 0.7
of the slowest link of what a step sends, and the bubble of a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.planner.truth import Pair, Reading
from bench.planner.ultrascale import rows_of, shape_of, strategy_of, training_of
from pyparallel.planner.engines import Engine, engine_of
from pyparallel.planner.hardware import Cluster, cluster_of
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import Strategy, Training
from pyparallel.planner.training_time import model_flops, training_time

FLOPS_SHARE, LINK_SHARE = 0.6, 0.7


def floor_seconds(
    shape: ModelShape, strategy: Strategy, training: Training, cluster: Cluster
) -> float:
    """A step by one line: FLOPs, the bytes of tp and dp on their links, and the bubble."""
    flops = model_flops(shape, training) * (4 / 3 if strategy.recompute == "layers" else 1)
    peak = cluster.gpu.peak_flops(training.dtype)
    compute = flops / strategy.ranks / (FLOPS_SHARE * peak)
    tokens = training.tokens / strategy.dp / strategy.cp
    ring = 2 * (strategy.tp - 1) / strategy.tp
    sent = 4 * ring * 2 * tokens * shape.hidden * shape.layers / strategy.pp
    messages = sent / (LINK_SHARE * cluster.link(strategy.tp).bytes_per_s)
    replicas = strategy.dp * strategy.cp
    held = shape.parameters() / strategy.tp / strategy.pp
    if replicas > 1:
        rate = LINK_SHARE * cluster.link(strategy.tp * replicas).bytes_per_s
        messages += 2 * 4 * held / rate
    bubble = (strategy.pp - 1) / (strategy.virtual_stages * training.micro_batches(strategy))
    return (compute + messages) * (1 + bubble)


def _pair(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    cluster: Cluster,
    engine: Engine,
    measured: float,
    *,
    calibrated: bool = False,
    label: str = "",
    group: str = "",
    quantity: str = "step time",
) -> Pair:
    step = training_time(shape, strategy, training, cluster, engine=engine)
    floor = floor_seconds(shape, strategy, training, cluster)
    name = label or f"{shape.name} {strategy} mbs {strategy.micro_batch} {training.dtype}"
    return Pair(quantity, step.total, measured, floor, "s", calibrated, name, group)


def dgxc(content: Mapping[str, Any]) -> Reading:
    """NeMo's recipes: bf16 gradients, distributed optimizer, no recomputation."""
    reading, engine = Reading(), engine_of("megatron")
    for row in [*content["rows"], *content["finetune"]]:
        if row.get("fsdp"):
            reading.unused["FSDP of MaxText, another engine"] += 1
            continue
        shape = _layers_of(model_shape(row["model"]), row.get("layers"))
        cp = row.get("cp", 1)
        strategy = Strategy(
            dp=row.get("dp", row["gpus"] // (row["tp"] * row["pp"] * cp)),
            pp=row["pp"],
            cp=cp,
            tp=row["tp"],
            sp=row["tp"] > 1,
            micro_batch=row["micro_batch"],
            virtual_stages=row.get("vp") or 1,
            zero=1,
        )
        training = Training(
            row["global_batch"], row["seq"], dtype=row["precision"], gradient_dtype="bf16"
        )
        gpu = row.get("gpu", "H100")
        cluster = cluster_of(gpu, row["gpus"])
        reading_of(
            reading,
            lambda s=shape, t=strategy, w=training, c=cluster, r=row, g=gpu: _pair(
                s,
                t,
                w,
                c,
                engine,
                r["step_time_s"],
                calibrated=g == "H100" and w.dtype == "bf16",
                quantity=f"step time, {g} {w.dtype}",
            ),
        )
    return reading


def _layers_of(shape: ModelShape, layers: int | None) -> ModelShape:
    from dataclasses import replace

    return replace(shape, layers=layers) if layers else shape


def reading_of(reading: Reading, pair: Callable[[], Pair]) -> None:
    """Add a pair, or count why there is none."""
    try:
        reading.pairs.append(pair())
    except ValueError as error:
        reading.unused[f"{str(error).partition(',')[0]}"] += 1


def gpt(hidden: int, layers: int, heads: int, vocab: int = 51200, name: str = "GPT") -> ModelShape:
    """Megatron's GPT: tied, biases, learned positions, features of 4 H."""
    return ModelShape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocab=vocab,
        max_positions=2048,
        tied=True,
        gated=False,
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=2048,
    )


def sc21(content: Mapping[str, Any]) -> Reading:
    """Table 1 of arXiv:2104.04473: full recomputation, no sp, no ZeRO."""
    reading, engine = Reading(), engine_of("megatron-2021")
    for row in content["rows"]:
        shape = gpt(row["hidden"], row["layers"], row["heads"], name=row["model"])
        strategy = Strategy(
            dp=row["dp"],
            pp=row["pp"],
            tp=row["tp"],
            micro_batch=row["micro_batch"],
            virtual_stages=row["vp"] or 1,
            recompute="layers",
        )
        training = Training(row["global_batch"], row["seq"], dtype="fp16")
        cluster = cluster_of("a100", row["gpus"])
        reading_of(
            reading,
            lambda s=shape, t=strategy, w=training, c=cluster, r=row: _pair(
                s, t, w, c, engine, r["derived_step_time_s"]
            ),
        )
    return reading


def seqpar(content: Mapping[str, Any]) -> Reading:
    """Tables 4 and 5 of arXiv:2205.05198: full recomputation without sp, selective with it."""
    reading, engine = Reading(), engine_of("megatron-2021")
    for row in content["rows"]:
        shape = gpt(row["hidden"], row["layers"], row["heads"], name=row["model"])
        training = Training(row["global_batch"], row["seq"], dtype="fp16")
        cluster = cluster_of("a100", row["gpus"])
        for key, sp, recompute in (
            ("iter_s_full_recompute_no_sp", False, "layers"),
            ("iter_s_selective_plus_sp", True, "attention"),
        ):
            strategy = Strategy(
                dp=row["dp"],
                pp=row["pp"],
                tp=row["tp"],
                sp=sp,
                micro_batch=row["micro_batch"],
                virtual_stages=row["vp"] or 1,
                recompute=recompute,
            )
            reading_of(
                reading,
                lambda s=shape, t=strategy, w=training, c=cluster, m=row[key]: _pair(
                    s, t, w, c, engine, m
                ),
            )
    return reading


def vtrain(content: Mapping[str, Any]) -> Reading:
    """One node of eight A100, activation checkpointing; rivals are the cuts of one model and batch."""
    reading, engine = Reading(), engine_of("megatron-2021")
    for values in content["rows"]:
        row = dict(zip(content["columns"], values, strict=True))
        shape = gpt(row["hidden"], row["layers"], row["heads"])
        strategy = Strategy(
            dp=row["dp"],
            pp=row["pp"],
            tp=row["tp"],
            micro_batch=row["micro_batch"],
            recompute="layers",
        )
        training = Training(row["global_batch"], row["seq"], dtype="fp16")
        cluster = cluster_of("a100", row["gpus"], gpus_per_node=8)
        group = " ".join(
            str(row[key]) for key in ("gpus", "global_batch", "hidden", "layers", "seq")
        )
        reading_of(
            reading,
            lambda s=shape, t=strategy, w=training, c=cluster, r=row, g=group: _pair(
                s, t, w, c, engine, r["iter_ms"] / 1e3, calibrated=True, group=g
            ),
        )
    return reading


def ultrascale(content: Mapping[str, Any]) -> Reading:
    """The sweep's runs; rivals are all cuts of one model on as many nodes."""
    reading, engine = Reading(), engine_of("nanotron")
    for row in rows_of(content, reading):
        if row["status"] != "ok":
            continue
        shape, strategy, training = (
            shape_of(content, row["model"]),
            strategy_of(row),
            training_of(row),
        )
        cluster = cluster_of("h100", 8 * row["nodes"], inter="efa")
        measured = training.tokens / (row["tok_s_gpu"] * strategy.ranks)
        group = f"{row['model']} on {row['nodes']} nodes"
        reading_of(
            reading,
            lambda s=shape, t=strategy, w=training, c=cluster, m=measured, g=group: _pair(
                s, t, w, c, engine, m, group=g
            ),
        )
    return reading


READERS = {
    "train_dgxc_nemo_llama31_h100.json": dgxc,
    "train_megatron_sc21_table1.json": sc21,
    "train_seqpar_recompute_2205_05198.json": seqpar,
    "train_ultrascale_h100_sweep.json": ultrascale,
    "train_vtrain_single_a100.json": vtrain,
}
