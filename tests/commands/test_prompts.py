"""Prompts from flags, files and standard input; short flags and names; the version."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import pyparallel
from pyparallel.cli import main
from tests.commands.test_chat import folder_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"), None)


def told(capsys: pytest.CaptureFixture, *args: object) -> dict:
    """What a command prints as JSON; in this process, whose ranks are warm."""
    assert main(["generate", *map(str, args), "--json", "--max-new-tokens", "4"]) == 0
    return json.loads(capsys.readouterr().out)


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_prompts_come_from_everywhere(
    folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("-m", folder)
    named = told(capsys, *model, "-p", "w5 w9", "-p", "w3", "-p", "w7 w1 w2")
    assert len(named["tokens"]) == 3
    # A mark of UTF-8, ends of lines as elsewhere, blank lines, none at the end.
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfw3\r\n\n   \nw7 w1 w2")
    listed = told(capsys, *model, "-p", "w5 w9", "--prompt-file", file)
    assert listed["tokens"] == named["tokens"]
    given(monkeypatch, b"w5 w9\nw3\nw7 w1 w2\n")
    piped = told(capsys, *model, "--tp", 2)
    assert piped["tokens"] == named["tokens"]
    given(monkeypatch, b"w3\nw7 w1 w2\n")
    asked = told(capsys, *model, "-p", "w5 w9", "--prompt-file", "-")
    assert asked["tokens"] == named["tokens"]


def test_both_speeds_are_told(folder: Path, capsys) -> None:
    args = ("--max-new-tokens", "4", "-p", "w5 w9", "-p", "w3")
    assert main(["generate", "-m", str(folder), *args]) == 0
    shown = capsys.readouterr()
    assert "tokens/s for one reader, " in shown.err and "tokens/s in all; ranks hold" in shown.err
    # What a bar would write is for a terminal.
    assert "answering" not in shown.err
    made = told(capsys, "-m", folder, "-p", "w5 w9", "-p", "w3")
    after_the_first = sum(len(row) - 1 for row in made["tokens"])
    steps = max(len(row) - 1 for row in made["tokens"])
    assert made["batch_tokens_per_s"] == pytest.approx(
        made["decode_tokens_per_s"] * after_the_first / steps
    )


@pytest.mark.parametrize("short", ["fp32", "bf16", "fp16"])
def test_short_names_of_dtypes(folder: Path, short: str, capsys) -> None:
    long = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[short]
    made = [told(capsys, "-m", folder, "-p", "w5", "--dtype", name) for name in (short, long)]
    assert made[0]["tokens"] == made[1]["tokens"]
    held = [row["ranks"][0]["weight_bytes"] for row in made]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("args", "data", "words"),
    [
        ((), b"", "--prompt-file: expected a prompt a line, got no line that is not blank"),
        ((), b"w1\xff\n", r"standard input: expected text in UTF-8, got the bytes b'\xff\n'"),
        (("--prompt-file", "nowhere"), b"", "got nowhere: No such file or directory"),
        (("--prompt-file", "."), b"", "got .: Is a directory"),
        (("--prompt-file", os.devnull), b"", "got no line that is not blank"),
        (("--prompt", "w1", "--stop", ""), b"", "stop_strings: expected texts that are not empty"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, args: tuple, data: bytes, words: str, capsys, monkeypatch
) -> None:
    given(monkeypatch, data)
    assert main(["generate", "-m", str(folder), *args]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_anything_to_read_there_is_one_line(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "-m", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "--prompt: expected one, --prompt-file, text on standard input, or --chat" in error


def test_a_terminal_sees_a_batch_grow(folder: Path) -> None:
    end, slave = pty.openpty()
    command = (sys.executable, "-m", "pyparallel", "generate", "-m", str(folder), "--dp", "2")
    process = subprocess.Popen(
        [*command, "-p", "w5 w9", "-p", "w3", "--max-new-tokens", "40"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 90
    while b"ranks hold" not in seen and time.monotonic() < deadline:
        if select.select([end], [], [], 1)[0]:
            try:
                seen += os.read(end, 1 << 16)
            except OSError:
                break
    out, _ = process.communicate(timeout=60)
    os.close(end)
    assert process.returncode == 0, seen
    assert b"answering" in seen and b"/80" in seen
    assert out.startswith(b"> w5 w9\n")


def test_the_version_is_in_one_place(capsys) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"pyparallel {pyparallel.__version__}\n"
    config = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'version = { attr = "pyparallel.version.__version__" }' in config
    assert pyparallel.__version__ not in config
    (name,) = [line.split('"')[1] for line in config.splitlines() if line.startswith("name = ")]
    assert metadata.version(name) == pyparallel.__version__
