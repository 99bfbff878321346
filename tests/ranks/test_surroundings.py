"""The console command in odd surroundings, and among files that are not its own: a line, or it works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tokenizers

from pyparallel.cli import main
from tests.transformers_models import build

COMMAND = str(Path(sys.executable).parent / "pyparallel")
ANSWER = "--tp 2 --threads 1 --prompt w1 --max-new-tokens 5"
# Modules that the command, its server or its ranks import, under their names in the current folder.
SHADOWS = (
    "torch",
    "types",
    "json",
    "random",
    "numpy",
    "pickle",
    "socket",
    "transformers",
    "ctypes",
)

LONG = "D=$PWD/$(printf 'a%.0s' {1..110}); mkdir $D;"
EVERYTHING = f"{LONG} mkdir gone; cd gone; rmdir ../gone; TMPDIR=$D"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("surroundings") / "llama"
    build("llama").save_pretrained(path)
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(kind))
    return path


def shell(line: str, folder: Path, cwd: Path) -> subprocess.CompletedProcess:
    """``line`` in a shell, with G for an answer of the command."""
    line = line.replace("G", f"{COMMAND} generate --model {folder} {ANSWER}")
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, cwd=cwd, errors="replace"
    )


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("G > /dev/full", 1, "standard output: No space left on device"),
        (f"{EVERYTHING} G <&- >&-", 0, ""),
        slow("G <&- >&-", 0, ""),
        slow("G --json | head -c 1; exit ${PIPESTATUS[0]}", 0, ""),
        slow("mkdir gone; cd gone; rmdir ../gone; G", 0, ""),
        slow(f"{LONG} TMPDIR=$D G && rmdir $D", 0, ""),
        slow("ulimit -n 14; G", 1, "Too many open files"),
    ],
)
def test_odd_surroundings(folder: Path, tmp_path: Path, line: str, status: int, said: str) -> None:
    result = shell(line, folder, tmp_path)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    if status:
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("start", [COMMAND, slow(f"{sys.executable} -m pyparallel")])
def test_code_in_the_current_folder_is_not_run(folder: Path, tmp_path: Path, start: str) -> None:
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'RAN')!r}, 'a').write('{name} ')"
        )
    result = shell(f"{start} generate --model {folder} {ANSWER}", folder, tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "RAN").exists(), (tmp_path / "RAN").read_text()


def test_a_scripts_own_folder_is_searched_and_the_current_one_is_not(tmp_path: Path) -> None:
    script, here = tmp_path / "script", tmp_path / "here"
    script.mkdir()
    here.mkdir()
    (here / "types.py").write_text("raise SystemExit('run')")
    (here / "torch.py").write_text("raise SystemExit('run')")
    (script / "own.py").write_text("def answer():\n    import random\n    return 42\n")
    (script / "main.py").write_text(
        "import own\nfrom pyparallel.launch import launch\n"
        "if __name__ == '__main__':\n    print(launch(own.answer, 2))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script / "main.py")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=here,
    )
    assert result.stdout == "[42, 42]\n", result.stderr


@pytest.mark.parametrize("what", ["tokenizer", "model"])
def test_code_in_a_models_folder_is_not_run(
    folder: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ran = tmp_path / "RAN"
    (tmp_path / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').write('x')\nclass Evil:\n    pass\n"
    )
    config, words = "tokenizer_config.json", ["generate", "--prompt", "w1"]
    told = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    if what == "model":
        config, told = "config.json", json.loads((tmp_path / "config.json").read_text())
        told |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / config).write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    assert main([*words, "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    if what == "tokenizer":
        assert "trust_remote_code=False" in error
    assert not ran.exists()


def training(
    folder: Path, place: Path, timeout: str = "2"
) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A command whose two ranks train for a long time, and its server and ranks."""
    text = place / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 " * 40)
    process = subprocess.Popen(
        [
            *(COMMAND, "train", "--model", str(folder), "--tp", "2", "--threads", "1"),
            *("--text", str(text), "--steps", "1000000", "--length", "8", "--sequences", "4"),
            *("--timeout", timeout),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    for _ in range(3):
        assert process.stderr.readline().startswith("step")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    return process, family


def ended(process: subprocess.Popen, family: list[psutil.Process], place: Path) -> list[str]:
    """What the command said at its end, which leaves neither process nor file."""
    _, error = process.communicate(timeout=30)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert [path.name for path in place.iterdir()] == ["text.txt"]
    return [line for line in error.splitlines() if not line.startswith("step")]


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM, slow(signal.SIGHUP)])
def test_a_signal_ends_everything_in_one_line(folder: Path, tmp_path: Path, number: int) -> None:
    # On a busy machine the command may hear of the signal later than its peers wait for a rank.
    process, family = training(folder, tmp_path, timeout="20")
    # One that could not hear is ended all the same.
    family[-1].suspend()
    time.sleep(0.1)
    process.send_signal(number)
    assert ended(process, family, tmp_path) == [
        f"pyparallel: error: ended by {signal.Signals(number).name}"
    ]
    assert process.returncode == 128 + number


@pytest.mark.parametrize("fault", ["rank stopped", slow("server killed"), slow("server stopped")])
def test_a_fault_is_told_in_one_line(folder: Path, tmp_path: Path, fault: str) -> None:
    process, family = training(folder, tmp_path)
    server = next(p for p in family if p.ppid() == process.pid)
    ranks = [p for p in family if p != server]
    if fault == "rank stopped":
        ranks[0].suspend()
    elif fault == "server killed":
        server.kill()
    else:
        server.suspend()
        process.kill()
    said = ended(process, family, tmp_path)
    if fault == "rank stopped":
        assert len(said) == 1 and "stopped by a signal" in said[0], said
    elif fault == "server killed":
        assert len(said) == 1 and "process that ranks are forked from" in said[0], said
