"""The plan: JSON, reasons, errors that say the way out, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyparallel
from pyparallel.planner.memory import RankMemory
from pyparallel.planner.plan import plan
from pyparallel.planner.plans.explanation import cuts, memory_reason, overflowing
from pyparallel.planner.plans.inference import InferencePlan
from pyparallel.planner.plans.plots import check_plot, load_curve, write_plot
from pyparallel.planner.plans.training import TrainingPlan
from pyparallel.planner.strategy import Strategy

GIB = 2**30


@pytest.fixture(scope="module")
def answer() -> InferencePlan:
    return plan("llama-3.1-405b", "h100", 16, gpus_per_node=8, prompt=8192, output=512)


@pytest.fixture(scope="module")
def training() -> TrainingPlan:
    return plan("llama-3.1-8b", "h100", 16, train=True, batch=64)


def test_the_public_name() -> None:
    assert pyparallel.plan is plan


def test_405b_on_two_nodes(answer: InferencePlan) -> None:
    assert cuts(answer.best.strategy) == "tp 8 x pp 2"
    # 2 bytes of 405.85e9 parameters, the embedding and the head on a stage each: a sixteenth and a bit.
    assert answer.best.memory[0].terms["weights"] == pytest.approx(2 * 405.85e9 / 16, rel=0.02)
    tp, pp, binding = answer.why
    assert "252 reductions stay inside a node of 8" in tp
    assert "weights overflow" in pp
    assert "reading and multiplying weights" in binding
    assert answer.next_best.startswith("tp 4 x pp 4: ")
    assert "put aside: tp 16" in answer.next_best
    assert "weights in fp8: tp 8 x dp 2" in answer.changes


def test_the_json_of_answers(answer: InferencePlan) -> None:
    said = json.loads(json.dumps(answer.as_dict()))
    assert said["best"] == said["candidates"][0]
    keys = {"dp", "pp", "cp", "tp", "sp", "memory_bytes", "fits", "ttft_s", "tpot_s", "why"}
    for each in said["candidates"]:
        assert keys | {"tokens_per_s"} <= set(each)
        assert each["dp"] * each["pp"] * each["cp"] * each["tp"] == 16
        terms = [{**stage, "stage": 0} for stage in each["memory"]]
        assert max(sum(stage.values()) for stage in terms) == pytest.approx(each["memory_bytes"])
        if each["fits"]:
            assert 0 < each["tpot_s"] < each["ttft_s"]
            assert sum(each["time"].values()) <= each["tpot_s"] * (1 + 1e-9)
        else:
            assert each["ttft_s"] is each["tpot_s"] is each["tokens_per_s"] is None
            assert each["why"].startswith("does not fit")


def test_the_json_of_training(training: TrainingPlan) -> None:
    said = json.loads(json.dumps(training.as_dict()))
    assert said["best"] == said["candidates"][0]
    for each in said["candidates"]:
        assert each["dp"] * each["pp"] * each["cp"] * each["tp"] == 16
        if each["fits"]:
            assert sum(each["time"].values()) == pytest.approx(each["step_s"])
            assert each["tokens_per_s"] == pytest.approx(64 * 8192 / each["step_s"])
            assert 0 < each["mfu"] < 1
    fitting = [each["step_s"] for each in said["candidates"] if each["fits"]]
    assert fitting[0] <= min(fitting) * 1.0205


def test_the_same_question_has_the_same_plan(answer: InferencePlan) -> None:
    again = plan("llama-3.1-405b", "h100", 16, gpus_per_node=8, prompt=8192, output=512)
    assert again.as_dict() == answer.as_dict()


def test_what_overflows_is_the_first_that_has_no_room() -> None:
    memory = RankMemory(1, {"weights": 6 * GIB, "kv cache": 3 * GIB, "activations": 2 * GIB})
    assert overflowing(memory, 10 * GIB) == "activations"
    assert overflowing(memory, 8 * GIB) == "kv cache"
    assert overflowing(memory, 12 * GIB) == ""
    assert memory_reason(memory, 12 * GIB, 2) == "fits: 11.0 GiB of 12.0 GiB a rank"
    assert memory_reason(memory, 8 * GIB, 2) == (
        "does not fit: rank of stage 1 needs 11.0 GiB of 8.0 GiB; kv cache overflows (takes 3.0 GiB)"
    )


def test_cuts() -> None:
    assert cuts(Strategy()) == "one GPU"
    assert cuts(Strategy(dp=2, pp=3, cp=4, tp=5, sp=True)) == "tp 5 x pp 3 x cp 4 x dp 2 + sp"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "lama-3.1-8b"}, "did you mean Llama-3.1-8B"),
        ({"gpu": "h1000"}, "did you mean H100"),
        ({"gpus": 0}, "gpus: expected at least 1, got 0"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 10**30}, "batch: expected at most"),
        ({"prompt": 131_072}, "expected at most 131072 tokens, the positions of Llama-3.1-8B"),
        ({"output": -5}, "output: expected at least 1, got -5"),
        ({"dtype": "fp7"}, "dtype: expected one of fp32, bf16"),
        ({"engine": "llama"}, "engine: expected one of vllm"),
        ({"sequence": 100}, "sequence: expected none without train"),
        ({"train": True, "sequence": 10**6}, "sequence: expected at most 131072"),
        ({"train": True, "batch": 3, "gpus": 8, "model": "gpt-3-175b"}, "the smallest cluster"),
        ({"intra": "nvlnk4"}, "did you mean"),
    ],
)
def test_what_is_refused(asked: dict[str, object], message: str) -> None:
    given = {"model": "llama-3.1-8b", "gpu": "h100", "gpus": 8, **asked}
    with pytest.raises(ValueError, match=message) as error:
        plan(**given)
    assert "\n" not in str(error.value)


def test_the_smallest_cluster_that_holds_it() -> None:
    with pytest.raises(ValueError, match=r"holds it has 16 \(tp 8 x pp 2\)") as error:
        plan("llama-3.1-405b", "h100", 4)
    assert "weights overflow (alone take 189" in str(error.value)
    assert plan("llama-3.1-405b", "h100", 16).best.fits
    with pytest.raises(ValueError, match="does not fit"):
        plan("llama-3.1-405b", "h100", 8)


def test_pictures(answer: InferencePlan, training: TrainingPlan, tmp_path: Path) -> None:
    for name, found in (("answer", answer), ("training", training)):
        picture, page = tmp_path / f"{name}.png", tmp_path / f"{name}.html"
        write_plot(found, picture)
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        write_plot(found, page)
        text = page.read_text()
        assert "<svg" in text
        assert "<script" not in text
        assert text.count("<tr>") == len(found.candidates) + 1


def test_throughput_grows_with_the_batch(answer: InferencePlan) -> None:
    points = load_curve(answer, answer.best)
    assert len(points) > 3
    assert [rate for _, rate in points] == sorted(rate for _, rate in points)
    assert [tpot for tpot, _ in points] == sorted(tpot for tpot, _ in points)


def test_a_picture_that_can_not_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ending in .png, .html, .svg"):
        check_plot(tmp_path / "plan.pdf")
    with pytest.raises(ValueError, match="expected a folder that is there"):
        check_plot(tmp_path / "nowhere" / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'pyparallel-kernels\[plot\]'"):
        check_plot(tmp_path / "plan.png")


def test_the_planner_draws_and_opens_nothing_when_it_is_imported() -> None:
    code = (
        "import sys, torch.distributed; before = set(sys.modules); import pyparallel.planner.plan; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print('matplotlib' in sys.modules, len(new - {'pyparallel', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    drawn, count = done.stdout.split()
    assert drawn == "False"
    # Beside our own files and torch's: tomllib, and what of the standard library they need.
    assert int(count) < 60, done.stdout + done.stderr
