"""pyparallel: many devices work on one transformer."""

from pyparallel import command_start  # isort: skip

if command_start.is_command():
    command_start.begin()

# The extension links against torch's libraries, which importing torch loads.
import torch  # noqa: F401  isort: skip

from pyparallel.backend import use
from pyparallel.batch import split_batch
from pyparallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from pyparallel.communicator import PeerError
from pyparallel.data import data_parallel
from pyparallel.export import export
from pyparallel.functional.next_token import Sampling
from pyparallel.functional.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.generate import generate
from pyparallel.grad_norm import clip_grad_norm_, grad_norm
from pyparallel.group import Group
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
from pyparallel.loss import count_targets, cross_entropy, mean_loss
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load, load_stages
from pyparallel.parallelize import parallelize
from pyparallel.pipeline import Pipeline
from pyparallel.save import restore, save

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
    "reduce_scatter",
    "restore",
    "save",
    "split_batch",
    "use",
    "vocab_parallel_cross_entropy",
]
