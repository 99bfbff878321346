"""Seconds of one layer, forward and backward, against the planner's: table 4 of arXiv:2205.05198.

The floor is the layer's FLOPs at 0.6 of the peak and its messages at 0.7 of the link's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bench.planner.training_rows import gpt
from bench.planner.truth import Pair, Reading
from bench.planner.truth_training import FLOPS_SHARE, LINK_SHARE
from pyparallel.planner.engines import engine_of
from pyparallel.planner.hardware import cluster_of
from pyparallel.planner.layer_time import layer_time
from pyparallel.planner.roofline import rates_of
from pyparallel.planner.strategy import Strategy, Training


def seqpar(content: Mapping[str, Any]) -> Reading:
    """A layer of the 22B model on eight A100, tp 8, four sequences."""
    reading = Reading()
    (row,) = (row for row in content["rows"] if row["model"] == "22B")
    shape, cluster = gpt(row), cluster_of("a100", 8)
    training = Training(row["global_batch"], row["seq"], dtype="fp16")
    for measured in content["table4_layer_ms_22B"]:
        name = measured["experiment"]
        recompute = "none"
        if "full" in name:
            recompute = "layers"
        elif "selective" in name:
            recompute = "attention"
        strategy = Strategy(
            tp=8, sp="sequence" in name, micro_batch=row["micro_batch"], recompute=recompute
        )
        engine = engine_of("megatron-2021")
        layer = layer_time(shape, strategy, training, cluster, engine, rates_of(cluster.gpu.name))
        predicted = sum(getattr(layer, field.name) for field in fields(layer))
        tokens = training.tokens
        flops = tokens * (6 * shape.layer_parameters() + 12 * shape.hidden * row["seq"]) / 8
        sent = 4 * 2 * 7 / 8 * 2 * tokens * shape.hidden
        floor = flops * (4 / 3 if recompute == "layers" else 1) / FLOPS_SHARE / 312e12
        floor += sent / (LINK_SHARE * cluster.intra.bytes_per_s)
        seconds = measured["total"] / 1e3
        reading.pairs.append(Pair("layer time", predicted, seconds, floor, "s", False, name))
    return reading


READERS = {"train_seqpar_recompute_2205_05198.json": seqpar}
