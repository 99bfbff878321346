"""transformers' Trainer on a cut model: the dense Trainer's losses, norms, metrics and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.models.peft_truth import TOLERANCE, adapted, near
from tests.trainer.program import train
from tests.trainer.settings import ADAPTED, EVALUATED, HALF, PREDICTED, STEPS, model_of

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
EXACT = ("learning_rate", "eval_rows", "eval_places", "rows", "places", "num_input_tokens_seen")


class Dense:
    """What the dense Trainer logs and leaves, in fp32 and in fp64."""

    def __init__(self, folder: Path) -> None:
        self.log = train(transformers.Trainer, model_of(), folder / "fp32", 1)
        self.exact = train(transformers.Trainer, model_of().double(), folder / "fp64", 1)
        self.weights = load_file(folder / "fp32" / WEIGHTS)
        self.exact_weights = load_file(folder / "fp64" / WEIGHTS)

    def check_log(self, log: list[dict[str, float]], *, first: int = 0) -> None:
        """Each number is the fp64 run's, up to ten times what fp32 does to the dense one's curve."""
        dense = [line for line in self.log if line["step"] > first]
        exact = [line for line in self.exact if line["step"] > first]
        assert [sorted(line) for line in log] == [sorted(line) for line in exact]
        for key in ("loss", "grad_norm", "eval_loss"):
            values, truths, roundings = (
                [line[key] for line in lines if key in line] for lines in (log, exact, dense)
            )
            rounding = max(abs(a - b) for a, b in zip(roundings, truths, strict=True))
            for value, truth in zip(values, truths, strict=True):
                assert abs(value - truth) <= 10 * rounding + 2.0**-22 * truth, key
        for key in EXACT:
            values, truths = (
                [line[key] for line in lines if key in line] for lines in (log, exact)
            )
            assert values == truths, key

    def check_weights(self, weights: dict[str, Tensor]) -> None:
        assert weights.keys() == self.weights.keys()
        moved = 0.0
        for name, before in model_of().state_dict().items():
            if name not in weights:
                continue
            truth, dense, ours = self.exact_weights[name], self.weights[name], weights[name]
            assert ours.shape == truth.shape and ours.dtype == torch.float32
            rounding = (dense.double() - truth).abs().max() + 2.0**-24 * truth.abs().max()
            assert (ours.double() - truth).abs().max() <= 10 * rounding, name
            moved = max(moved, float((truth - before).abs().max() / rounding))
        assert moved > 1e3


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    return Dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def over_dp_and_tp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    run(
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "-m",
        "tests.trainer.program",
        folder,
        2,
        2,
    )
    return folder


def run(*words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def told(folder: Path) -> dict:
    return json.loads((folder / "told.json").read_text())


def test_torchrun_over_dp_and_tp_is_the_dense_trainer(dense: Dense, over_dp_and_tp: Path) -> None:
    dense.check_log(told(over_dp_and_tp)["log"])
    assert [line["eval_rows"] for line in dense.log if "eval_rows" in line] == [EVALUATED] * 2
    assert dense.log[-1]["rows"] == PREDICTED
    dense.check_weights(load_file(over_dp_and_tp / WEIGHTS))


def test_a_checkpoint_is_the_dense_model_and_goes_on_to_the_same_bits(
    dense: Dense, over_dp_and_tp: Path
) -> None:
    half = over_dp_and_tp / f"checkpoint-{HALF}"
    names = {path.name for path in half.iterdir()}
    assert {WEIGHTS, "config.json", "sharded", "scheduler.pt", "trainer_state.json"} <= names
    # One rank's optimizer under the dense one's name would be read back as the whole.
    assert not {"optimizer.pt", "optimizer.bin"} & names
    dense_model = transformers.AutoModelForCausalLM.from_pretrained(half)
    assert sum(p.numel() for p in dense_model.parameters()) == model_of().num_parameters()
    whole, resumed = (told(over_dp_and_tp)[key] for key in ("log", "resumed"))
    late = [line for line in resumed if line["step"] > HALF]
    assert late == [line for line in whole if line["step"] > HALF]
    assert len([line for line in late if "loss" in line]) == STEPS - HALF
    straight = load_file(over_dp_and_tp / WEIGHTS)
    for name, weight in load_file(over_dp_and_tp / "resumed" / WEIGHTS).items():
        assert torch.equal(weight, straight[name]), name


def test_adapters_are_the_dense_runs(over_dp_and_tp: Path, tmp_path: Path) -> None:
    truth = train(transformers.Trainer, adapted(ADAPTED), tmp_path, 1)
    ours = told(over_dp_and_tp)["adapters"]
    assert [sorted(line) for line in ours] == [sorted(line) for line in truth]
    for line, exact in zip(ours, truth, strict=True):
        for key, value in exact.items():
            # Losses are told in fp32.
            tolerance = 2.0**-22 if key.endswith("loss") else TOLERANCE
            assert line[key] == pytest.approx(value, rel=tolerance, abs=0), key
    written, dense = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (over_dp_and_tp / "adapters", tmp_path)
    )
    assert written.keys() == dense.keys()
    for name, weight in written.items():
        near(weight, dense[name], name)


def test_what_it_can_not_do_is_one_line(over_dp_and_tp: Path) -> None:
    said = told(over_dp_and_tp)["refused"]
    assert len(said) == 13
    for words, line in said.items():
        assert words in line
        assert "\n" not in line
        if words.startswith("DistributedDataParallel"):
            assert "(accelerate and Trainer take the whole world)" in line
            assert "in Trainer's place use pyparallel.Trainer" in line


@pytest.mark.slow
def test_accelerate_launch_over_tp_resumes_what_another_mesh_saved(
    dense: Dense, over_dp_and_tp: Path, tmp_path: Path
) -> None:
    half = over_dp_and_tp / f"checkpoint-{HALF}"
    # With --cpu it would start one process: several are MPI's then.
    words = (
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    )
    launcher = ("accelerate.commands.launch", *words, "--dynamo_backend", "no", "-m")
    run(*launcher, "tests.trainer.program", tmp_path, 1, 2, half)
    dense.check_log([line for line in told(tmp_path)["log"] if line["step"] > HALF], first=HALF)
    dense.check_weights(load_file(tmp_path / WEIGHTS))
