"""A rank that is gone is a PeerError that names it, whichever call its peers make next."""

from __future__ import annotations

import json
from pathlib import Path

from tests.comm.by_torchrun import ranks_of
from tests.training.lost_peer_script import TIMEOUT_S
from tests.transformers_models import build

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
    with ranks_of("tests.training.lost_peer_script", str(tmp_path)) as ranks:
        said = [
            rank.communicate(timeout=60 + len(OPERATIONS) * TIMEOUT_S)[1]
            for rank in reversed(ranks)
        ]
    assert [rank.returncode for rank in ranks] == [0, 9], said
    told = json.loads((tmp_path / "told.json").read_text())
    assert set(told) == set(OPERATIONS)
    for call, (kind, message, missing) in told.items():
        assert kind == "PeerError", (call, message)
        assert message.startswith(OPERATIONS[call]), (call, message)
        assert "(rank 0 of 2)" in message, (call, message)
        assert missing == [1], (call, message)
        assert "\n" not in message, (call, message)
