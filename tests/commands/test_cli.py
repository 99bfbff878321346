"""The command line: its JSON, its errors, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tokenizers

from pyparallel.cli import main
from pyparallel.models import dense
from tests.checkpoint.gguf_files import Model
from tests.transformers_models import build


def run(*args: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pyparallel", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


Report = Callable[..., dict]


@pytest.fixture
def report(capsys: pytest.CaptureFixture) -> Report:
    """What ``pyparallel generate ... --json`` reports, run here, where everything is imported."""

    def told(*args: object) -> dict:
        status = main(["generate", *map(str, args), "--json"])
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out)

    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer that knows 61 words."""
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return path


@pytest.mark.parametrize("extra", [(), ("--temperature", 1, "--top-k", 9, "--seed", 5)])
def test_generate_json(report: Report, folder: Path, extra: tuple) -> None:
    found = report(
        *("--model", folder, "--tp", 2, "--prompt", "w5 w9 w2", "--check"),
        *("--max-new-tokens", 7, *extra),
    )
    assert found["matches_dense"] is True
    assert found["max_abs_logit_diff"] < 1e-4
    assert 1 <= len(found["tokens"]) <= 7
    assert found["prefill_s"] > 0
    assert [row["rank"] for row in found["ranks"]] == [0, 1]
    dense_bytes = sum(p.numel() * p.itemsize for p in build("llama").parameters())
    # The norms and the output bias of two layers, and the last norm, are on both ranks.
    replicated = (3 * 2 + 1) * 36 * 4
    assert sum(row["weight_bytes"] for row in found["ranks"]) == dense_bytes + replicated
    assert all(row["peak_rss_bytes"] > row["weight_bytes"] for row in found["ranks"])


def test_shares_move_weights_and_change_no_token(report: Report, folder: Path) -> None:
    told = []
    for shares in ((), ("--shares", "6,2")):
        found = report(
            *("--model", folder, "--tp", 2, *shares, "--check"),
            *("--prompt", "w5 w9 w2", "--max-new-tokens", 7),
        )
        told.append(found)
    equal, unequal = told
    assert unequal["matches_dense"] is True and unequal["max_abs_logit_diff"] < 1e-4
    assert unequal["tokens"] == equal["tokens"]
    held = [row["weight_bytes"] for row in unequal["ranks"]]
    assert sum(held) == sum(row["weight_bytes"] for row in equal["ranks"])
    # 50 features are four grains of 16, of which the second rank has the last, of two features.
    assert 2 < held[0] / held[1] < 5


@pytest.mark.parametrize("text", ["2,1.5", "2;1", "2,", "", "2,1_0", "2,\u0663", "2," + "9" * 40])
def test_shares_are_whole_numbers(text: str, capsys) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["generate", "--model", "nowhere", "--prompt", "w1", "--tp", "2", "--shares", text])
    error = capsys.readouterr().err
    assert "--shares: expected whole numbers with commas between, such as 2,1,1; got" in error
    assert error.count("\n") == 1


def test_int8_weights_match_the_dense_model_rounded_alike(report: Report, folder: Path) -> None:
    found = report(
        *("--model", folder, "--tp", 2, "--weights", "int8", "--check"),
        *("--prompt", "w5 w9 w2", "--max-new-tokens", 7),
    )
    assert found["matches_dense"] is True
    assert found["max_abs_logit_diff"] < 1e-4
    whole = sum(p.numel() * p.itemsize for p in build("llama").parameters())
    # The matrices are all of it but for a table that is only looked up, and vectors.
    assert sum(row["weight_bytes"] for row in found["ranks"]) < 0.4 * whole


def test_a_gguf_is_held_as_its_blocks(report: Report, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    Model("Q4_0", hidden=96, heads=3, kv_heads=3, intermediate=160).write(path)
    found = report(
        *("--model", path, "--tokenizer", folder, "--tp", 2, "--check"),
        *("--prompt", "w5 w9 w2", "--max-new-tokens", 7),
    )
    assert found["matches_dense"] is True
    assert found["max_abs_logit_diff"] < 1e-4
    # The file, with its header; the norms are on both ranks.
    assert sum(row["weight_bytes"] for row in found["ranks"]) < path.stat().st_size + 5 * 96 * 4


def test_the_context_is_cut_too(report: Report, folder: Path) -> None:
    found = report(
        *("--model", folder, "--tp", 2, "--cp", 2, "--check"),
        *("--prompt", "w5 w9 w2 w7 w7 w1 w3", "--max-new-tokens", 7),
    )
    assert found["matches_dense"] is True
    assert found["max_abs_logit_diff"] < 1e-4
    assert [row["rank"] for row in found["ranks"]] == [0, 1, 2, 3]
    weights = [row["weight_bytes"] for row in found["ranks"]]
    # cp cuts no weights: ranks 0 and 2 are the first of the two tp ranks.
    assert weights[:2] == weights[2:] and weights[0] < sum(weights[:2])


def test_prompts_are_answered_by_replicas(report: Report, folder: Path) -> None:
    found = report(
        *("--model", folder, "--dp", 2, "--tp", 2, "--check"),
        *("--prompt", "w5 w9", "--prompt", "w3", "--prompt", "w7 w1 w2", "--max-new-tokens", 4),
        *("--temperature", 1.0, "--seed", 5),
    )
    assert found["matches_dense"] is True
    assert len(found["text"]) == 3
    assert [row["rank"] for row in found["ranks"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "options", [("--tp", 2), ("--dp", 2, "--weights", "int8")], ids=["tp", "dp int8"]
)
def test_the_layers_are_cut_too(report: Report, folder: Path, options: tuple) -> None:
    found = report(
        *("--model", folder, "--pp", 2, "--micro-batches", 2, "--check"),
        *("--prompt", "w5 w9 w2", "--prompt", "w7 w7 w1 w3", "--prompt", "w8"),
        *("--max-new-tokens", 7, *options),
    )
    assert found["matches_dense"] is True
    assert found["max_abs_logit_diff"] < 1e-4
    assert [row["rank"] for row in found["ranks"]] == [0, 1, 2, 3]


def test_generate_prints_text(folder: Path) -> None:
    result = run(
        *("generate", "--model", folder, "--tp", 2, "--max-new-tokens", 3),
        *("--prompt", "w5 w9", "--prompt", "w3"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("> w5 w9\n")
    assert "\n> w3\n" in result.stdout
    assert "tokens/s" in result.stderr


def test_streamed_text_is_the_whole_text(report: Report, folder: Path) -> None:
    args = ("--model", folder, "--tp", 2, "--prompt", "w5 w9", "--max-new-tokens", 9)
    streamed, whole = run("generate", *args), run("generate", *args, "--json")
    assert (
        streamed.stdout.strip()
        == json.loads(whole.stdout)["text"].strip()
        == report(*args)["text"].strip()
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "nowhere"], "nowhere: no such file or folder"),
        (["--tokenizer", "nowhere"], "nowhere: no such file or folder for the tokenizer"),
        (["--tokenizer", "."], "no tokenizer could be read from it"),
        (["--tp", "0"], "--tp: expected at least 1, got 0"),
        (["--tp", "10"], "use at most tp=9"),
        (["--tp", "2", "--shares", "2,0"], "--shares of rank 1: expected at least 1, got 0"),
        (["--tp", "2", "--shares", "2,-1"], "--shares of rank 1: expected at least 1, got -1"),
        (["--shares", "2,1"], "--shares: expected 1, one for each rank of tp=1, got 2"),
        (["--tp", "10", "--shares", "2" + ",1" * 9], "use at most tp=9"),
        (["--cp", "0"], "--cp: expected at least 1, got 0"),
        (
            ["--cp", "4"],
            "--cp: expected at most a rank for each of the longest prompt's 1 tokens, got 4",
        ),
        (["--dp", "2"], "--dp: expected at most a replica for each of the 1 prompts, got 2"),
        (["--pp", "3"], "stages: expected 1 to 2"),
        (["--pp", "2", "--micro-batches", "2"], "micro_batches: expected 1 to 1"),
        (["--max-new-tokens", "100"], "more than the context of 64"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected at least 1"),
        (["--temperature", "-1"], "temperature: expected 0 or more"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--weights", "blocks"], "--weights: expected dense or int8 for a model in no GGUF file"),
        (["--prompt", ""], "expected at least one token"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, args: list[str], words: str, capsys, monkeypatch
) -> None:
    """In this process, which has everything imported; the status is what the shell would see."""
    monkeypatch.chdir(tmp_path)
    given = ["generate", "--model", str(folder), *args]
    if "--prompt" not in args:
        given += ["--prompt", "w1"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_unknown_architecture_is_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))
    assert main(["generate", "--model", str(tmp_path), "--prompt", "w1", "--tp", "2"]) == 2
    error = capsys.readouterr().err
    assert "perceptron" in error
    assert error.count("\n") == 1


def test_a_killed_rank_is_told_and_leaves_nothing(folder: Path) -> None:
    shm = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pyparallel", "generate", "--model", str(folder)),
            *("--tp", "3", "--prompt", "w1", "--max-new-tokens", "60", "--threads", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = psutil.Process(process.pid)
    victim = None
    deadline = time.monotonic() + 60
    while victim is None and time.monotonic() < deadline and process.poll() is None:
        # Ranks are the server's children.
        ranks = [c for child in family.children() for c in child.children()]
        if len(ranks) == 3:
            victim = ranks[1]
            victim.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    everyone = [family, *family.children(recursive=True)]
    _, error = process.communicate(timeout=60)
    assert victim is not None
    assert process.returncode == 1
    assert "killed by SIGKILL" in error
    assert "Traceback" not in error
    psutil.wait_procs(everyone, timeout=10)
    assert not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert set(os.listdir("/dev/shm")) <= shm


def test_doctor(capsys: pytest.CaptureFixture) -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    backends = {row["name"]: row for row in report["backends"]}
    assert backends["torch"]["supports"]
    assert backends["cpu"]["supports"], backends["cpu"]["reason"]
    assert backends["cuda"]["supports"] or backends["cuda"]["reason"]
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert "linear" in report["ops"]
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.count("yes") >= 2


def test_the_dense_model_is_transformers_own(folder: Path) -> None:
    import torch

    model = dense.load_dense(str(folder), torch.float32)
    assert type(model).__module__.startswith("transformers.")
