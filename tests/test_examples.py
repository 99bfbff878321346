"""The examples run as their own texts say, and what they print is right."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from safetensors.torch import load_file

from pyparallel.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
WAIT_S = 300

pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(*command: object, cwd: Path = ROOT, **more: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=cwd,
        env=environment(**more),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> tuple[float, float]:
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups()
    return float(first), float(last)


def test_a_small_gpt_learns() -> None:
    first, last = losses(run(sys.executable, EXAMPLES / "train_gpt.py", "--steps", 60))
    assert last < first - 2


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_two_hosts() -> None:
    """Both on this machine; the losses are those of four ranks that launch() starts."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    more = {"TORCHRUN": torchrun, "PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    hosts = [
        subprocess.Popen(
            [str(EXAMPLES / "two_hosts.sh"), "127.0.0.1", str(node), "--steps", "20"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**more),
        )
        for node in range(2)
    ]
    try:
        said = [host.communicate(timeout=WAIT_S) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    alone = run(sys.executable, EXAMPLES / "train_gpt.py", "--steps", 20)
    assert losses(said[0][0]) == losses(alone)


@pytest.mark.model
def test_a_chat_remembers() -> None:
    questions = ("What is the capital of France?", "And of Italy?")
    said = [word for question in questions for word in ("--say", question)]
    text = run(sys.executable, EXAMPLES / "chat_hugging_face.py", "--model", MODEL, *said)
    lines = text.splitlines()
    assert lines[0::2] == [f"user: {question}" for question in questions]
    assert "Paris" in lines[1] and "Rome" in lines[3]


@pytest.mark.model
def test_lora_by_trainer(tmp_path: Path) -> None:
    """SmolLM2 over 2 x 2; the adapter is the dense model's."""
    assert main(["export", "--checkpoint", str(MODEL), "--out", str(tmp_path / "model")]) == 0
    text = run(
        *(sys.executable, EXAMPLES / "lora_trainer.py", "--model", tmp_path / "model"),
        *("--out", tmp_path / "adapter", "--steps", 3),
    )
    first, last = losses(text)
    assert last < first
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    shapes = {name.split(".layers.0.")[-1]: tuple(t.shape) for name, t in tensors.items()}
    assert shapes["self_attn.k_proj.lora_B.weight"] == (192, 8)
    assert shapes["mlp.down_proj.lora_A.weight"] == (8, 1536)
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


@pytest.mark.model
def test_the_notebook() -> None:
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    manager, client = start_new_kernel(cwd=str(EXAMPLES), env=environment())
    printed: list[str] = []

    def hear(message: dict) -> None:
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            printed.append(content["text"])

    try:
        for cell in cells:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                reply = client.execute_interactive(source, timeout=WAIT_S, output_hook=hear)
                assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    one, two, layers, strategy = "".join(printed).splitlines()
    assert "Paris" in one and one.split(" [")[0] == two.split(" [")[0]
    assert len(re.findall(r"\d+ MB", two)) == 2
    parts = re.findall(r"\(\((\d+), 10\), ([\d.e-]+)\)", layers)
    assert sum(int(rows) for rows, _ in parts) == 30, layers
    assert len(parts) == 3 and all(float(error) < 1e-5 for _, error in parts), layers
    assert strategy == "dp 1 x pp 2 x cp 1 x tp 8"
