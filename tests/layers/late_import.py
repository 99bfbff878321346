"""A rank that meets torch's checkpoints after it has taken a state dict; imported by its test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyparallel.layers import ColumnParallelLinear
from pyparallel.mesh import init_mesh


def save_late(out: Path) -> None:
    """``dcp.save`` refuses what it did not see being taken."""
    layer = ColumnParallelLinear(6, 5, group=init_mesh(tp=2).tp)
    assert "torch.distributed.checkpoint" not in sys.modules
    state = layer.state_dict()
    import torch.distributed.checkpoint as dcp

    with pytest.raises(ValueError, match="weight is one rank's part of a ColumnParallelLinear"):
        dcp.save(state, checkpoint_id=str(out / "dcp"))
