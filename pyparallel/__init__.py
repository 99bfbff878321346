"""pyparallel: many devices work on one transformer."""

from pyparallel.commands import start as command_start  # isort: skip

if command_start.is_command():
    command_start.begin()

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pyparallel.version import __version__

if TYPE_CHECKING or not command_start.only_tells():
    # The extension links against torch's libraries, which importing torch loads.
    import torch  # noqa: F401  isort: skip

    from pyparallel.backend import use
    from pyparallel.comm.communicator import PeerError
    from pyparallel.launch import RankError, launch

if TYPE_CHECKING:
    from pyparallel.comm.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
    from pyparallel.comm.group import Group
    from pyparallel.decoding.generate import generate
    from pyparallel.decoding.stream import stream
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
    from pyparallel.planner.plan import plan
    from pyparallel.profiling.profile import profile
    from pyparallel.saving.export import export
    from pyparallel.saving.save import restore, save
    from pyparallel.trainer import Trainer
    from pyparallel.training.batch import split_batch
    from pyparallel.training.data import data_parallel
    from pyparallel.training.grad_norm import clip_grad_norm_, grad_norm
    from pyparallel.training.loss import count_targets, cross_entropy, mean_loss
    from pyparallel.training.pipeline import Pipeline

# Imported when they are first asked for: who plans needs no modules, and who serves no optimizer. The
# module of each name; `launch` is not among them, since its module has its name.
_LATER = {
    **dict.fromkeys(
        ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"), "comm.collectives"
    ),
    "Group": "comm.group",
    "generate": "decoding.generate",
    "stream": "decoding.stream",
    **dict.fromkeys(
        (
            "ColumnParallelLinear",
            "ParallelAttention",
            "ParallelLMHead",
            "ParallelMLP",
            "QKVParallelLinear",
            "RowParallelLinear",
            "SequenceParallelDropout",
            "SequenceParallelLayerNorm",
            "SequenceParallelRMSNorm",
            "VocabParallelEmbedding",
        ),
        "layers",
    ),
    **dict.fromkeys(("Mesh", "init_mesh"), "mesh"),
    **dict.fromkeys(("load", "load_stages"), "models.load"),
    "parallelize": "models.parallelize",
    "Sampling": "ops.next_token",
    "vocab_parallel_cross_entropy": "ops.vocab_parallel_cross_entropy",
    "plan": "planner.plan",
    "profile": "profiling.profile",
    "export": "saving.export",
    **dict.fromkeys(("restore", "save"), "saving.save"),
    "split_batch": "training.batch",
    "data_parallel": "training.data",
    **dict.fromkeys(("clip_grad_norm_", "grad_norm"), "training.grad_norm"),
    **dict.fromkeys(("count_targets", "cross_entropy", "mean_loss"), "training.loss"),
    "Pipeline": "training.pipeline",
    "Trainer": "trainer",
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
    "Trainer",
    "VocabParallelEmbedding",
    "__version__",
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
    "profile",
    "reduce_scatter",
    "restore",
    "save",
    "split_batch",
    "stream",
    "use",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        found = getattr(import_module(f"pyparallel.{_LATER[name]}"), name)
    elif not name.startswith("_") and find_spec(f"pyparallel.{name}"):
        # `pyparallel.layers` is there without an import of its own.
        return import_module(f"pyparallel.{name}")
    else:
        raise AttributeError(f"module 'pyparallel' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
