"""Rows of the Ultra-Scale Playbook's sweep as what the planner takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.planner.truth import Reading
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy, Training

SEQUENCE = 4096


def rows_of(content: Mapping[str, Any], reading: Reading) -> Iterator[dict[str, Any]]:
    """The rows by their columns' names, without those whose batch is not what they say."""
    for values in content["rows"]:
        row = dict(zip(content["columns"], values, strict=True))
        if row["gbs_inconsistent"]:
            reading.unused["dp x mbs x accumulation is not the global batch"] += 1
        else:
            yield row


def shape_of(content: Mapping[str, Any], name: str) -> ModelShape:
    """One of the sweep's four models."""
    sizes = {
        key: value for key, value in content["model_shapes"][name].items() if key != "params_b"
    }
    head_dim = sizes["hidden"] // sizes["heads"]
    return ModelShape(name=name, head_dim=head_dim, max_positions=SEQUENCE, **sizes)


def strategy_of(row: Mapping[str, Any]) -> Strategy:
    """The sweep's cuts; tp is with sp throughout."""
    return Strategy(
        dp=row["dp"],
        pp=row["pp"],
        tp=row["tp"],
        sp=row["tp"] > 1,
        micro_batch=row["mbs"],
        zero=row["zero"],
    )


def training_of(row: Mapping[str, Any]) -> Training:
    """Its step."""
    return Training(row["dp"] * row["mbs"] * row["grad_acc"], SEQUENCE)
