"""pyparallel train: a killed run goes on to the same bits; checkpoints, the model, held-out loss."""

from __future__ import annotations

import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cli import main
from pyparallel.commands import train_ranks
from pyparallel.commands.train import Run, train
from pyparallel.commands.train_files import Resumed, find_checkpoint
from pyparallel.commands.train_progress import Progress, duration
from pyparallel.launch import RankError, launch
from tests.transformers_models import build

STEPS, SAVED, KILLED, SEQUENCES, HELD_OUT, LENGTH = 5, 2, 4, 6, 3, 8
DROPS = {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 that drops, with a tokenizer of words and a text of them."""
    path = tmp_path_factory.mktemp("train") / "model"
    build("gpt2", **DROPS).save_pretrained(path)
    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 61)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    drawn = torch.randint(1, 61, (500,), generator=torch.Generator().manual_seed(5)).tolist()
    (path / "text.txt").write_text(" ".join(f"w{number}" for number in drawn))
    return path


def run_command(model: Path, out: Path, *more: object) -> None:
    words = {
        "--model": model,
        "--text": model / "text.txt",
        "--steps": STEPS,
        "--batch": 2,
        "--accumulate": 2,
        "--lr": 1e-2,
        "--warmup": 2,
        "--lr-schedule": "cosine",
        "--length": LENGTH,
        "--sequences": SEQUENCES,
        "--eval-every": 2,
        "--eval-sequences": HELD_OUT,
        "--save-every": SAVED,
        "--out": out,
        "--threads": 1,
    }
    said = [str(word) for pair in words.items() for word in pair]
    assert main(["train", *said, *map(str, more)]) == 0


def dying(model: Path, asked: Run, rows: torch.Tensor, held_out: torch.Tensor) -> None:
    """Rank 1 is killed in the middle of a step."""
    clip, calls = train_ranks.clip_grad_norm_, itertools.count(1)

    def clipped(*args: object) -> torch.Tensor:
        if next(calls) == KILLED and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(*args)

    train_ranks.clip_grad_norm_ = clipped
    train_ranks.train_rank(open_checkpoint(model), asked, rows, held_out)


def text_rows(model: Path) -> torch.Tensor:
    words = (model / "text.txt").read_text().split()
    ids = [int(word[1:]) for word in words[: (SEQUENCES + HELD_OUT) * (LENGTH + 1)]]
    return torch.tensor(ids).view(-1, LENGTH + 1)


def test_a_killed_run_goes_on_to_the_same_bits_and_on_another_mesh(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_command(model, whole, "--tp", 2, "--json")
    uninterrupted = json.loads(capsys.readouterr().out)
    asked = Run(**uninterrupted["run"])
    assert [line["step"] for line in uninterrupted["evaluations"]] == [1, 3, 4]
    rows, held_out = text_rows(model).split([SEQUENCES, HELD_OUT])
    with pytest.raises(RankError, match=r"killed|SIGKILL"):
        launch(dying, 2, model, replace(asked, out=str(cut)), rows, held_out, threads=1)
    assert [path.name for path in cut.iterdir()] == [f"step-{SAVED:06}"]
    run_command(model, cut, "--tp", 2, "--resume")
    said = capsys.readouterr().err
    assert "step 3/5: loss" in said and "step 2/5" not in said
    assert "tokens/s, 0:00 left" in said
    assert f"wrote {cut / 'model'}" in said
    # Weights, data, rates and what was dropped.
    expected = load_file(whole / "model" / "model.safetensors")
    for name, weight in load_file(cut / "model" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name
    for file in (whole / f"step-{STEPS:06}").glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.parent.name / file.name).read_bytes()
    check_evaluation(whole / "model", held_out, uninterrupted["evaluations"][-1]["loss"])

    # What is dropped does not depend on tp and pp: the same curve, in another order of sums.
    stages = replace(asked, sizes={"dp": 1, "pp": 2, "cp": 1, "tp": 1}, out=None, save_every=None)
    resumed = Resumed(whole / f"step-{SAVED:06}", SAVED)
    told = train(
        open_checkpoint(model), stages, rows, held_out=held_out, resumed=resumed, threads=1
    )
    assert told["first_step"] == SAVED
    losses = uninterrupted["losses"][SAVED:]
    assert max(losses) - min(losses) > 1e-2
    assert told["losses"] == pytest.approx(losses, rel=2.0**-16)

    check_refusals(model, whole, asked, rows, capsys)


def check_evaluation(folder: Path, rows: torch.Tensor, loss: float) -> None:
    """The held-out loss is the written model's, dense."""
    losses = []
    for dtype in (torch.float32, torch.float64):
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            logits = dense(rows[:, :-1]).logits
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())))
    assert abs(loss - losses[1]) <= 10 * abs(losses[0] - losses[1]) + 2.0**-22 * losses[1]


def check_refusals(
    model: Path, out: Path, asked: Run, rows: torch.Tensor, capsys: pytest.CaptureFixture
) -> None:
    words = ["train", "--model", str(model), "--out", str(out), "--steps", str(STEPS)]
    words += ["--text", str(model / "text.txt"), "--length", str(LENGTH)]
    for more, line in (
        ([], "--out: expected a folder without another run's files, but"),
        (["--resume"], "--resume: expected the run's own --text, --length, --sequences, --batch"),
        (["--resume", str(model)], "--resume: expected a checkpoint, or a folder with one, got"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"--steps: expected more than the 5 that .* got 5"):
        find_checkpoint(asked, rows, str(out))
    changed = replace(asked, steps=9, lr=1.0, out=str(out / "none"))
    assert find_checkpoint(changed, rows, "") is None
    assert find_checkpoint(changed, rows, str(out)).step == STEPS
    assert "--lr was 0.01, and is 1.0 from here on" in capsys.readouterr().err


def test_autocast_keeps_the_weights_and_a_profile_has_all_ranks(
    model: Path, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path)
    sizes = {"dp": 1, "pp": 2, "cp": 1, "tp": 1}
    rows = text_rows(model)
    files = {"out": str(tmp_path / "out"), "profile": str(tmp_path / "trace.json")}
    asked = Run(sizes, 2, 4, 1e-3, micro_batches=2, autocast="bfloat16", **files)
    told = train(open_checkpoint(tmp_path), asked, rows, threads=1)
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    dense = build("llama")
    with torch.no_grad():
        exact = float(dense(rows[:4], labels=rows[:4]).loss)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = float(dense(rows[:4], labels=rows[:4]).loss)
    assert 0 < abs(told["losses"][0] - exact) <= 10 * abs(rounded - exact)
    # Of the second step.
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"rank 0", "rank 1"} <= {event.get("args", {}).get("name") for event in events}
    assert {event["pid"] for event in events if event["name"].startswith("linear [")} == {0, 1}
    assert "Optimizer.step#AdamW.step" in {event["name"] for event in events}


def test_generate_traces_its_steps(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "generate",
        "-m",
        str(model),
        "--profile",
        str(tmp_path / "trace.json"),
        "--threads",
        "1",
    ]
    assert (
        main([*words, "-p", "w1 w2", "--max-new-tokens", "3", "--temperature", "0", "--json"]) == 0
    )
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"].split(" [")[0] for event in events if event["ph"] == "X"]
    assert [names.count(name) for name in ("prefill", "step")] == [1, len(tokens) - 1]
    assert main([*words, "--chat"]) == 2
    assert "--profile: expected --prompt with it" in capsys.readouterr().err


def test_progress_tells_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seconds = iter([0.0, 2.0, 2.0, 10.0, 12.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    show = Progress(2000, 100)
    show("step", 0, 3.5, 1.25)
    show("step", 1, 3.0, 1.0)
    show("evaluated", 1, 2.75)
    show("step", 2, 2.5, 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 1/2000: loss 3.5000, gradient norm 1.250",
        "step 2/2000: loss 3.0000, gradient norm 1.000, 50 tokens/s, 1:06:36 left",
        "step 2/2000: held-out loss 2.7500",
        "step 3/2000: loss 2.5000, gradient norm 1.000, 50 tokens/s, 1:06:34 left",
    ]
    assert [duration(s) for s in (0.4, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]
