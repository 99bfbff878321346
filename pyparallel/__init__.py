"""pyparallel: many devices work on one transformer."""

from pyparallel.commands import start as command_start  # isort: skip

if command_start.is_command():
    command_start.begin()

# The extension links against torch's libraries, which importing torch loads.
import torch  # noqa: F401  isort: skip

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyparallel.backend import use
from pyparallel.comm.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.decoding.generate import generate
from pyparallel.launch import RankError, launch
from pyparallel.layers import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelLMHead,
    ParallelMLP,
    QKVParallelLinear,
    RowParallelLinear,
    SequenceParallelDropout,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
)
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.models.parallelize import parallelize
from pyparallel.ops.next_token import Sampling
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.training.batch import split_batch
from pyparallel.training.loss import count_targets, cross_entropy, mean_loss

if TYPE_CHECKING:
    from pyparallel.planner.plan import plan
    from pyparallel.saving.export import export
    from pyparallel.saving.save import restore, save
    from pyparallel.training.data import data_parallel
    from pyparallel.training.grad_norm import clip_grad_norm_, grad_norm
    from pyparallel.training.pipeline import Pipeline

# Imported when they are first asked for: torch's checkpoints and FSDP, on which they stand, take longer
# to import than the rest of the library.
_LATER = {
    "Pipeline": "training.pipeline",
    "clip_grad_norm_": "training.grad_norm",
    "data_parallel": "training.data",
    "export": "saving.export",
    "grad_norm": "training.grad_norm",
    "plan": "planner.plan",
    "restore": "saving.save",
    "save": "saving.save",
}

__all__ = [
    "ColumnParallelLinear",
    "Group",
    "Mesh",
    "ParallelAttention",
    "ParallelLMHead",
    "ParallelMLP",
    "PeerError",
    "Pipeline",
    "QKVParallelLinear",
    "RankError",
    "RowParallelLinear",
    "Sampling",
    "SequenceParallelDropout",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "VocabParallelEmbedding",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "clip_grad_norm_",
    "count_targets",
    "cross_entropy",
    "data_parallel",
    "export",
    "generate",
    "grad_norm",
    "init_mesh",
    "launch",
    "load",
    "load_stages",
    "mean_loss",
    "parallelize",
    "plan",
    "reduce_scatter",
    "restore",
    "save",
    "split_batch",
    "use",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'pyparallel' has no attribute {name!r}")
    found = getattr(import_module(f"pyparallel.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
