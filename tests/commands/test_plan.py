"""``pyparallel plan``: its text, its JSON and its one-line errors."""

from __future__ import annotations

import json

import pytest

from pyparallel.cli import main

ASKED = ("--model", "llama-3.1-8b", "--gpu", "h100")


def run(*args: object) -> int:
    return main(["plan", *map(str, args)])


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "llama-3.1-405b", "--gpu", "h100", "--gpus", 16, "--gpus-per-node", 8)
    assert run(*asked, "--prompt", 8192, "--output", 512) == 0
    said = capsys.readouterr().out
    assert "best: tp 8 x pp 2\n" in said
    assert "next best: tp 4 x pp 4" in said
    assert "what would change it:\n" in said
    assert "weights overflow" in said


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--gpus", 8, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["best"]["tp"], said["best"]["fits"]) == (8, True)
    assert {"best", "candidates", "why", "next_best", "changes"} <= set(said)


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--gpus", 8, "--train", "--batch", 16, "--sequence", 4096) == 0
    assert "MFU" in capsys.readouterr().out
    assert run(*ASKED, "--gpus", 8, "--train", "--batch", 16, "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["best"]["mfu"] < 1


def test_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "llama-3.1-8b", "--devices", "a6000:1,rtx3090:2") == 0
    assert "--tp 3 --shares 5,6,6" in capsys.readouterr().out
    assert run("--model", "llama-3.1-8b", "--devices", "a6000:1,rtx3090:2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["binds"], said["shares"]) == ("speed", [5, 6, 6])


def test_a_plot_and_a_config_of_ones_own(tmp_path, capsys) -> None:
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512},
        **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 2048, "vocab_size": 1000, "max_position_embeddings": 2048},
    }
    path, page = tmp_path / "config.json", tmp_path / "plan.html"
    path.write_text(json.dumps(config))
    assert run("--model", path, "--gpu", "h100", "--gpus", 2, "--plot", page) == 0
    assert "<svg" in page.read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "llama-3.1-8b"), "--gpu: expected a GPU's name, or --devices"),
        ((*ASKED, "--devices", "a6000,l4"), "--gpu: expected a GPU's name, or --devices"),
        (("--model", "llama-3.1-80b", "--gpu", "h100"), "did you mean Llama-3.1-8B"),
        (("--model", "llama-3.1-8b", "--gpu", "h200x"), "did you mean H200"),
        ((*ASKED, "--gpus", -1), "gpus: expected at least 1, got -1"),
        ((*ASKED, "--gpus", 10**12), "gpus: expected at most"),
        ((*ASKED, "--plot", "plan.pdf"), "--plot: expected a file ending in"),
        ((*ASKED, "--prompt", "x"), "--prompt: invalid int value"),
        (("--model", "llama-3.1-405b", "--gpu", "l4", "--gpus", 2), "the smallest cluster"),
    ],
)
def test_mistakes_are_one_line(args, message, capsys) -> None:
    try:
        status = run(*args)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert status == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
