"""Who may join a launch: its own ranks. What peers say is JSON and tensors, never a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pyparallel.comm import peer_proof
from pyparallel.comm.exchange import decode, encode
from pyparallel.launch import RankError, launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.saving.save import restore, save
from tests.campaigns.strangers import _one
from tests.transformers_models import build


def listening() -> set[str]:
    """Where this rank, its server and the launcher listen, over TCP."""
    init_mesh(tp=dist.get_world_size())
    processes = [psutil.Process(), *psutil.Process().parents()[:2]]
    found = [c for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"]
    return {c.laddr.ip for c in found}


def test_nothing_listens_beyond_the_loopback_interface(monkeypatch):
    # What a cluster's profile sets must not open another interface either.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    for addresses in launch(listening, 2):
        assert addresses and addresses <= {"127.0.0.1", "::1"}


def listeners_of_the_launcher() -> int:
    launcher = psutil.Process().parents()[1]
    return sum(c.status == "LISTEN" for c in launcher.net_connections("tcp"))


def test_the_launcher_listens_nowhere():
    before = sum(c.status == "LISTEN" for c in psutil.Process().net_connections("tcp"))
    assert launch(listeners_of_the_launcher, 1) == [before]


@pytest.mark.parametrize("sockets", ["abstract", "loopback"])
def test_a_stranger_is_dropped_and_the_join_goes_on(sockets):
    rows = [_one(3, sockets) for _ in range(2)]
    assert [row.verdict for row in rows] == ["ok", "ok"], rows


def without_pickles(folder: str, place: str) -> dict:
    def refused(*args, **kwargs):
        raise AssertionError("a peer's pickle was read")

    distributed_c10d._tensor_to_object = refused
    distributed_c10d._object_to_tensor = refused
    pickle.loads = pickle.load = pickle.Unpickler = refused
    mesh = init_mesh(tp=dist.get_world_size())
    model = load(folder, mesh, dtype=torch.float32)
    save(model, place, mesh, extra={"step": 3})
    return restore(model, place, mesh)


def test_nothing_of_a_peer_is_unpickled(tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "model")
    told = launch(without_pickles, 2, str(tmp_path / "model"), str(tmp_path / "saved"))
    assert told == [{"step": 3}] * 2


def another_secret() -> None:
    # The world was proven at the start.
    peer_proof._proven.clear()
    if dist.get_rank() == 1:
        peer_proof._secret = b"of another launch"
    init_mesh(tp=2)


def test_a_peer_that_is_of_another_launch_is_refused():
    with pytest.raises(RankError, match=r"another program has taken the place of rank [01]"):
        launch(another_secret, 2, timeout_s=10)


def test_values_survive_the_exchange():
    value = [1, "a", None, {"b": [2.5, torch.arange(3)]}, torch.ones(2, 0, dtype=torch.bfloat16)]
    back = decode(encode(value))
    assert back[:3] == value[:3]
    assert back[3]["b"][0] == 2.5 and back[3]["b"][1].tolist() == [0, 1, 2]
    assert back[4].shape == (2, 0) and back[4].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expected JSON and tensors, got PosixPath"):
        encode(Path("."))
