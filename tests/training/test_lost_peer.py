"""A rank that is gone is a PeerError that names it, whichever call its peers make next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.training.lost_peer_script import TIMEOUT_S
from tests.transformers_models import build

ROOT = Path(__file__).parents[2]
OPERATIONS = {
    "step": "pipeline step (1f1b) on stage 0 of 1 (layers 0 to 1), rank 0 of pp=1: all_reduce",
    "evaluate": "all_reduce",
    "save": "save or restore of",
    "restore": "save or restore of",
    "export": "save or restore of export to",
    "init_mesh": "init_mesh",
}


def test_every_call_names_a_lost_rank(tmp_path: Path) -> None:
    build("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.lost_peer_script", str(tmp_path)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [
            rank.communicate(timeout=60 + len(OPERATIONS) * TIMEOUT_S)[1]
            for rank in reversed(ranks)
        ]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 9], said
    told = json.loads((tmp_path / "told.json").read_text())
    assert set(told) == set(OPERATIONS)
    for call, (kind, message, missing) in told.items():
        assert kind == "PeerError", (call, message)
        assert message.startswith(OPERATIONS[call]), (call, message)
        assert "(rank 0 of 2)" in message, (call, message)
        assert missing == [1], (call, message)
        assert "\n" not in message, (call, message)
