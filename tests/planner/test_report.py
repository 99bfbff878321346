"""The table of errors: its numbers by hand, and folders that hold other things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.planner.choices import choice_of
from bench.planner.report import main
from bench.planner.tables import labels_of, line_of, quantile
from bench.planner.truth import Pair, readers


def pair(predicted: float, measured: float, floor: float, group: str = "", unit: str = "s") -> Pair:
    return Pair("time", predicted, measured, floor, unit, False, "row", group)


def test_errors_by_hand() -> None:
    pairs = [pair(1 + error, 1.0, 2.0) for error in (-0.1, 0.2, 0.3, -0.4, 0.5)]
    line = line_of("a.json", pairs)
    assert (line.count, line.floor_worst) == (5, 1.0)
    assert (line.median, line.p90, line.worst) == pytest.approx((0.3, 0.5, 0.5))
    assert quantile([3, 1, 2], 0.5) == 2


def test_labels_by_hand() -> None:
    # Four fit, one of them called a failure; two fail, one of them called.
    pairs = [
        pair(*each, 1, unit="label") for each in ((1, 1), (1, 1), (1, 1), (0, 1), (0, 0), (1, 0))
    ]
    labels = labels_of("a.json", pairs)
    assert labels.right == pytest.approx(4 / 6)
    assert (labels.false_alarms, labels.failures_called) == (0.25, 0.5)
    assert labels.floor_right == pytest.approx(4 / 6)


def test_a_pick_costs_what_the_best_would_have_saved() -> None:
    # By time: the pick takes 1.2, the best 1.0; 1.02 is as good as 1.
    slow = [pair(1.0, 1.2, 1.0, "a"), pair(1.1, 1.0, 2.0, "a")]
    close = [pair(1.0, 1.02, 2.0, "b"), pair(1.1, 1.0, 1.0, "b")]
    choice = choice_of("a.json", [*slow, *close, pair(1, 1, 1)])
    assert choice is not None
    assert (choice.groups, choice.hit, choice.floor_hit) == (2, 0.5, 0.5)
    assert choice.regret == pytest.approx((0.2 + 0.02) / 2)
    # Of three picks the best is among two rivals always, and among four not.
    assert choice.of_three == 0.0
    many = [pair(rank, 10 - rank, 1, "c") for rank in range(1, 5)]
    choice = choice_of("a.json", many)
    assert choice is not None
    assert (choice.regret, choice.of_three) == (pytest.approx(9 / 6 - 1), pytest.approx(7 / 6 - 1))
    # By rate: the pick makes 80, the best 100.
    rates = [pair(9, 80, 1, "a", "tokens/s"), pair(8, 100, 2, "a", "tokens/s")]
    choice = choice_of("a.json", rates)
    assert choice is not None
    assert (choice.regret, choice.floor_regret) == (pytest.approx(0.25), 0)
    assert choice_of("a.json", [pair(1, 1, 1), pair(1, 1, 1)]) is None


SERVING = {
    "rows": [
        {
            "model": "meta-llama/Llama-3.1-8B-Instruct",
            "system": "h100_sxm",
            "backend": "vllm",
            "version": None,
            "precision": "fp8",
            "isl": 1024,
            "osl": 128,
            "concurrency": 4,
            "tp": tp,
            "pp": 1,
            "ttft_ms": 100.0,
            "tpot_ms": 10.0,
        }
        for tp in (1, 2)
    ]
}


def test_another_folder_of_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "infer_serving_dense_tp_sweeps.json").write_text(json.dumps(SERVING))
    (tmp_path / "infer_trtllm_tp_sweeps.json").write_text('{"rows": [{"model": "x"}]}')
    (tmp_path / "comm_published_tables.json").write_text("no JSON")
    (tmp_path / "weather.json").write_text("{}")
    plots, numbers = tmp_path / "plots", tmp_path / "errors.json"
    assert main([str(tmp_path), "--plots", str(plots), "--json", str(numbers)]) == 0
    said = capsys.readouterr()
    assert "weather.json: skipped, no reader knows it" in said.err
    assert "comm_published_tables.json: skipped, ValueError" in said.err
    assert "infer_trtllm_tp_sweeps.json: skipped, KeyError" in said.err
    assert "time per token, vllm" in said.out
    found = json.loads(numbers.read_text())
    (line,) = [each for each in found["lines"] if each["quantity"] == "time per token, vllm"]
    assert (line["count"], line["calibrated"]) == (2, True)
    assert (plots / "infer_serving_dense_tp_sweeps.png").stat().st_size > 1000


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "expected a folder of measurements" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "expected at least one file of" in capsys.readouterr().err


def test_every_family_has_a_reader() -> None:
    names = set(readers())
    assert {"comm_vidur_a100_h100.json", "infer_l4_pp_vs_tp.json"} <= names
    assert any(name.startswith("train_") for name in names)
