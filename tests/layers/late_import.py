"""A rank that meets torch's checkpoints after it has taken a state dict; imported by its test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import init_mesh


def save_late(out: Path) -> None:
    """``dcp.save`` knows what it did not see being taken."""
    layer = ColumnParallelLinear(6, 5, group=init_mesh(tp=2).tp)
    assert "torch.distributed.checkpoint" not in sys.modules
    state = layer.state_dict()
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=str(out / "dcp"))
    whole = {"weight": torch.zeros(5, 6), "bias": torch.zeros(5)}
    dcp.load(whole, checkpoint_id=str(out / "dcp"))
    for name, value in whole.items():
        assert torch.equal(layer.split_dense(name, value), state[name])
