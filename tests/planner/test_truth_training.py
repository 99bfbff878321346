"""Readers of training measurements: rows become pairs, the others are counted with a reason."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.planner.truth import Reading, readers
from bench.planner.truth_memory import READERS as MEMORY
from bench.planner.truth_training import READERS as STEPS

SWEEP = {
    "columns": [
        *("model", "nodes", "dp", "tp", "pp", "zero", "mbs", "grad_acc"),
        *("status", "mfu_pct", "tok_s_gpu", "mem_gb", "gbs_inconsistent"),
    ],
    "model_shapes": {
        "3B": {
            "layers": 28,
            "hidden": 3072,
            "heads": 32,
            "kv_heads": 32,
            "ffn": 8192,
            "vocab": 131072,
            "tied": True,
            "params_b": 3.57,
        }
    },
    "rows": [
        ["3B", 1, 4, 1, 2, 1, 2, 32, "ok", 46.7, 16426, 56.9, False],
        ["3B", 1, 8, 1, 1, 0, 8, 4, "failed", None, None, None, False],
        ["3B", 1, 8, 1, 1, 0, 8, 3, "ok", 1.0, 1.0, 1.0, True],
        ["3B", 1, 8, 1, 1, 0, 8, 4, "slow_flagged_failed", 1.0, 1.0, 1.0, False],
        ["3B", 8, 1, 64, 1, 0, 1, 256, "failed", None, None, None, False],
    ],
}
GPT = {"hidden": 1024, "heads": 16, "layers": 24, "tp": 2, "pp": 1, "dp": 1, "micro_batch": 2}


def test_a_sweep_gives_times_peaks_and_verdicts():
    name = "train_ultrascale_h100_sweep.json"
    reading = readers()[name](SWEEP)
    pairs = {pair.quantity: pair for pair in reading.pairs}
    assert pairs["peak memory, tp 1"].error < 0.1
    assert pairs["step time"].measured == pytest.approx(256 * 4096 / (16426 * 8))
    assert pairs["step time"].group == "3B on 1 nodes"
    verdicts = [pair for pair in reading.pairs if pair.quantity == "fits"]
    assert [(pair.predicted, pair.measured) for pair in verdicts] == [(1.0, 1.0), (0.0, 0.0)]
    assert reading.unused["slow, drawn as failed"] == 1
    # Both readers of the file skip the row whose batch is not what it says.
    assert reading.unused["dp x mbs x accumulation is not the global batch"] == 2
    assert any(reason.startswith("cannot be cut: tp=64") for reason in reading.unused)


def test_rivals_of_a_sweep_share_a_group():
    columns = [*GPT, "gpus", "global_batch", "seq", "iter_ms"]
    cuts = [GPT | {"tp": tp, "dp": 2 // tp} for tp in (1, 2)]
    rows = [[*cut.values(), 2, 4, 1024, 300.0] for cut in cuts]
    pairs = STEPS["train_vtrain_single_a100.json"]({"columns": columns, "rows": rows}).pairs
    assert len({pair.group for pair in pairs}) == 1
    assert all(pair.calibrated and pair.measured == 0.3 for pair in pairs)


def test_what_has_no_shape_is_counted():
    row = {"model": "Mamba", "seq": 1}
    for name in ("train_megatron_bridge_perf.json", "train_mpt_fsdp_a100_h100.json"):
        reading = STEPS[name]({"rows": [row, row]})
        assert not reading.pairs
        assert sum(reading.unused.values()) == 2


def test_a_cut_that_the_planner_refuses_is_counted():
    row = GPT | {"vp": 1, "gpus": 64, "global_batch": 4, "seq": 1024, "tp": 64, "model": "x"}
    row["derived_step_time_s"] = 1.0
    reading = STEPS["train_megatron_sc21_table1.json"]({"rows": [row]})
    assert not reading.pairs
    assert list(reading.unused) == [
        "tp=64 is more than 16 heads in 16 KV groups can be cut into; use at most tp=16"
    ]


def test_contexts_and_single_reports():
    cell = {"model": "Llama-3.1-70B-Instruct-FP8", "weights": "fp8", "system": "h100_sxm", "tp": 1}
    cell |= {"max_context": 4096, "fits": True}
    pairs = MEMORY["oom_lambda_vllm_max_context.json"]({"rows": [cell]}).pairs
    assert [(pair.predicted, pair.measured) for pair in pairs] == [(1.0, 1.0), (4096.0, 4096.0)]
    report = {"id": "a", "model": "Llama-3-8B", "dtype": "bf16", "gpu": "H100-80", "tp": 1}
    rows = [report | {"weights_gib": 14.96}, report, report | {"model": "Mamba"}, {"id": "b"}]
    reading = MEMORY["memory_oom_points.json"]({"rows": rows})
    assert [pair.error < 0.005 for pair in reading.pairs] == [True]
    assert sum(reading.unused.values()) == 3


def test_readings_of_one_file_are_joined():
    names = Counter(name for table in (STEPS, MEMORY) for name in table)
    assert names["train_dgxc_nemo_llama31_h100.json"] == 2
    assert isinstance(Reading().unused, Counter)
