"""Rows of published step times as what the planner takes: a function a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench.planner import ultrascale
from bench.planner.training_case import Case
from bench.planner.truth import Reading
from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.shape import ModelShape, model_shape
from pyparallel.planner.strategy import Strategy, Training


def gpt(row: Mapping[str, Any], vocab: int = 51200) -> ModelShape:
    """Megatron's GPT: tied, biases, learned positions, features of 4 H."""
    hidden, heads = row["hidden"], row["heads"]
    return ModelShape(
        name=row.get("model", "GPT"),
        hidden=hidden,
        layers=row["layers"],
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


def nemo_strategy(row: Mapping[str, Any]) -> Strategy:
    """A row of NeMo's recipes: sp wherever tp is, and a distributed optimizer."""
    cp = row.get("cp", 1)
    return Strategy(
        dp=row.get("dp", row["gpus"] // (row["tp"] * row["pp"] * cp)),
        pp=row["pp"],
        cp=cp,
        tp=row["tp"],
        sp=row["tp"] > 1,
        micro_batch=row["micro_batch"],
        virtual_stages=row.get("vp") or 1,
        zero=1,
    )


def dgxc(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """NeMo's recipes: bf16 gradients, a distributed optimizer, nothing computed again."""
    for row in [*content["rows"], *content["finetune"]]:
        if row.get("fsdp"):
            reading.unused["FSDP of MaxText, another engine"] += 1
            continue
        shape, gpu = model_shape(row["model"]), row.get("gpu", "H100")
        precision = row["precision"]
        yield Case(
            replace(shape, layers=row.get("layers") or shape.layers),
            nemo_strategy(row),
            Training(row["global_batch"], row["seq"], dtype=precision, gradient_dtype="bf16"),
            cluster_of(gpu, row["gpus"]),
            engine_of("megatron"),
            row["step_time_s"],
            quantity=f"step time, {gpu} {precision}",
            calibrated=gpu == "H100" and precision == "bf16",
        )


def sc21(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """Table 1 of arXiv:2104.04473: layers recomputed, no sp, no ZeRO."""
    del reading
    for row in content["rows"]:
        strategy = _megatron(row, recompute="layers")
        yield Case(
            gpt(row),
            strategy,
            Training(row["global_batch"], row["seq"], dtype="fp16"),
            cluster_of("a100", row["gpus"]),
            engine_of("megatron-2021"),
            row["derived_step_time_s"],
        )


def seqpar(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """Table 5 of arXiv:2205.05198: layers recomputed without sp, attention recomputed with it."""
    del reading
    scaled = content["dp_scaling"]
    (row,) = (row for row in content["rows"] if row["model"] == scaled["model"])
    yield Case(
        gpt(row),
        _megatron(row | {"dp": scaled["dp"]}, sp=True, recompute="attention"),
        Training(row["global_batch"] * scaled["dp"], row["seq"], dtype="fp16"),
        cluster_of("a100", scaled["gpus"]),
        engine_of("megatron-2021"),
        scaled["iter_s"],
    )
    for row in content["rows"]:
        for key, sp, recompute in (
            ("iter_s_full_recompute_no_sp", False, "layers"),
            ("iter_s_selective_plus_sp", True, "attention"),
        ):
            yield Case(
                gpt(row),
                _megatron(row, sp=sp, recompute=recompute),
                Training(row["global_batch"], row["seq"], dtype="fp16"),
                cluster_of("a100", row["gpus"]),
                engine_of("megatron-2021"),
                row[key],
            )


def vtrain(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """One node of eight A100, layers recomputed; rivals are the cuts of one model and batch."""
    del reading
    for values in content["rows"]:
        row = dict(zip(content["columns"], values, strict=True))
        same = ("gpus", "global_batch", "hidden", "layers", "seq")
        yield Case(
            gpt(row),
            _megatron(row, recompute="layers"),
            Training(row["global_batch"], row["seq"], dtype="fp16"),
            cluster_of("a100", row["gpus"], gpus_per_node=8),
            engine_of("megatron-2021"),
            row["iter_ms"] / 1e3,
            calibrated=True,
            group=" ".join(f"{key} {row[key]}" for key in same),
        )


def _megatron(row: Mapping[str, Any], *, recompute: str, sp: bool = False) -> Strategy:
    return Strategy(
        dp=row["dp"],
        pp=row["pp"],
        tp=row["tp"],
        sp=sp,
        micro_batch=row["micro_batch"],
        virtual_stages=row.get("vp") or 1,
        recompute=recompute,
    )


def sweep(content: Mapping[str, Any], reading: Reading) -> Iterator[Case]:
    """The Ultra-Scale sweep's runs; rivals are all cuts of one model on as many nodes."""
    for row in ultrascale.rows_of(content, reading):
        if row["status"] != "ok":
            continue
        strategy, training = ultrascale.strategy_of(row), ultrascale.training_of(row)
        yield Case(
            ultrascale.shape_of(content, row["model"]),
            strategy,
            training,
            cluster_of("h100", 8 * row["nodes"], inter="efa"),
            engine_of("nanotron"),
            training.tokens / (row["tok_s_gpu"] * strategy.ranks),
            group=f"{row['model']} on {row['nodes']} nodes",
        )


ROWS = {
    "train_dgxc_nemo_llama31_h100.json": dgxc,
    "train_megatron_sc21_table1.json": sc21,
    "train_seqpar_recompute_2205_05198.json": seqpar,
    "train_ultrascale_h100_sweep.json": sweep,
    "train_vtrain_single_a100.json": vtrain,
}
