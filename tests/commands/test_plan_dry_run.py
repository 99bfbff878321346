"""`pyparallel plan`: what it counts on modules, draws, and measures of this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pyparallel.cli import main
from pyparallel.commands import calibrate
from pyparallel.commands.dry_run import StageCheck

CPU = calibrate.Calibration(
    ranks=2,
    threads=1,
    memory_bytes=12 << 30,
    bandwidth=10e9,
    fp32_flops=50e9,
    bf16_flops=40e9,
    layer_s=1e-5,
    step_s=2e-5,
    sequence_s=1e-6,
    staged_layer_s=4e-4,
    alpha_s=1e-6,
    bytes_per_s=5e9,
)


def test_modules_hold_and_call_what_is_planned(capsys) -> None:
    asked = ["plan", "--model", "llama-3.1-8b", "--gpu", "l40s", "--gpus", "2", "--prompt", "100"]
    assert main([*asked, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["dry_run"]) == told["best"]["pp"]
    for stage in told["dry_run"]:
        assert stage["agrees"]
        assert stage["weight_bytes"]["planned"] == stage["weight_bytes"]["counted"] > 0
        assert stage["cache_bytes"]["planned"] == stage["cache_bytes"]["counted"] > 0
        for phase in ("prefill", "token"):
            calls = stage["collectives"][phase]["tp"]
            assert calls["planned"] == calls["counted"]
            assert bool(calls["counted"]) == (told["best"]["tp"] > 1)


def test_of_training_too_and_for_people(capsys) -> None:
    asked = ["plan", "--model", "smollm2-135m", "--gpu", "a10g", "--gpus", "4", "--train"]
    assert main([*asked, "--sequence", "512", "--batch", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "dry run, planned and counted on the modules:" in said
    assert "2 of 2 phases alike" in said and "they differ" not in said


def test_a_difference_is_told_and_is_an_error(capsys, monkeypatch) -> None:
    sides = Counter({("all_reduce", 8): 2}), Counter({("all_reduce", 8): 3})
    wrong = StageCheck(0, 2, (10, 10), (4, 4), {"token": sides}, {"token": {}})
    monkeypatch.setattr("pyparallel.commands.dry_run.dry_run", lambda plan, train: [wrong])
    asked = ["plan", "--model", "smollm2-135m", "--gpu", "l4", "--dry-run"]
    assert main(asked) == 1
    assert "they differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dtype", "fp8"), "--dry-run: expected --dtype fp32, bf16, fp16, got fp8"),
        (("--model", "mixtral-8x7b", "--gpus", "8"), "expected a dense model"),
    ],
)
def test_what_cannot_be_counted_is_refused(more, message, capsys) -> None:
    asked = ["plan", "--model", "llama-3.1-8b", "--gpu", "h100", *more, "--dry-run"]
    assert main(asked) == 2
    assert message in capsys.readouterr().err


def test_the_best_is_drawn(tmp_path: Path, capsys) -> None:
    path = tmp_path / "best.svg"
    asked = ["plan", "--model", "smollm2-135m", "--gpu", "l4", "--gpus", "2", "--draw", str(path)]
    assert main(asked) == 0
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["--calibrate", "--draw"])
def test_a_file_that_can_not_be_written_is_told_first(
    name, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda ranks: pytest.fail("measured"))
    path = tmp_path / "nowhere" / "file"
    assert main(["plan", "--model", "smollm2-135m", "--gpu", "l4", name, str(path)]) == 2
    assert f"{name}: expected a folder that is there" in capsys.readouterr().err


def test_a_measured_machine_is_planned_for(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda ranks: CPU)
    path = tmp_path / "cpu.toml"
    assert main(["plan", "--calibrate", str(path), "--gpus", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bandwidth"] == CPU.bandwidth
    asked = ["plan", "--model", "smollm2-135m", "--gpu", str(path), "--gpus", "2"]
    assert main([*asked, "--dtype", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["tp"] == 2 and path.name in told["notes"][0]
    # A layer of a stage costs 390 us more, 30 times.
    of = {(each["tp"], each["pp"]): each["tpot_s"] for each in told["candidates"]}
    assert of[1, 2] > 30 * CPU.staged_layer_s
    # By hand, of the rank with 6 of 9 heads and 2 of 3 KV heads, at 10 GB/s: 2/3 of attention's 26.5 M
    # weights and half of the other 108 M, 4 bytes each; 1088 cached tokens of 30 layers; the layers'
    # 10 us; 61 sums of 0.4 x 4 us.
    weights = (26.5e6 * 2 / 3 + 108e6 / 2) * 4
    cached = 1088 * 30 * 2 * 2 * 64 * 4
    assert told["best"]["tpot_s"] == pytest.approx(
        (weights + cached) / 10e9 + 30 * 1e-5 + 61 * 1.6e-6, rel=0.01
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("layer_s = -1", "[engine]: layer_s: expected a finite number of at least 0"),
        ("speed = 1", "[engine]: 'speed': expected one of memory_fraction"),
        ("", "[engine]: layer_s: expected a number, but it is not there"),
    ],
)
def test_a_broken_engine_is_one_line(line, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "cpu.toml"
    calibrate.write(CPU, path)
    head = path.read_text().partition("layer_s")[0]
    path.write_text(f"{head}{line}\n")
    assert main(["plan", "--model", "smollm2-135m", "--gpu", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_are_measured(tmp_path: Path) -> None:
    found = calibrate.calibrate(2)
    assert (found.ranks, found.bandwidth > 1e8, found.fp32_flops > 1e8) == (2, True, True)
    assert 0 < found.layer_s < 1 and found.bytes_per_s > 1e6
