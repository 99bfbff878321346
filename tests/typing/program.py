"""A program of a user's, for the type checker alone: every public name, as its types are promised.

`make lint` checks it with mypy as strictly as mypy can, and tests/typing/test_program.py that no public
name is missing here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import pyparallel
from pyparallel import Group, Mesh, PeerError, RankError, Sampling
from pyparallel.decoding.generation import Generation
from pyparallel.decoding.stream import Piece
from pyparallel.planner.plans.inference import InferencePlan
from pyparallel.planner.plans.training import TrainingPlan


def ranks(folder: Path) -> list[float]:
    mesh = pyparallel.init_mesh(dp=2, tp=2, shares=(2, 1), timeout_s=60.0)
    assert_type(mesh, Mesh)
    assert_type(mesh.tp, Group)
    model = pyparallel.load(folder, mesh, dtype=torch.bfloat16)
    assert_type(model, nn.Module)
    made = pyparallel.generate(
        model, [[1, 2, 3]], max_new_tokens=4, sampling=Sampling(temperature=1.0), replicas=mesh.dp
    )
    assert_type(made, Generation)
    pieces = pyparallel.stream(model, ["text"], max_new_tokens=4, tokenizer=folder)
    assert_type(pieces, Generator[Piece, None, None])
    return [float(token) for row in made.tokens for token in row]


def start(folder: Path) -> None:
    try:
        results = pyparallel.launch(ranks, 4, folder, threads=1, on_report=print)
        assert_type(results, list[Any])
    except RankError as error:
        assert_type(error.rank, int)
    except PeerError:
        pass
    assert_type(pyparallel.__version__, str)


def layers(linear: nn.Linear, x: Tensor, device_mesh: DeviceMesh) -> Tensor:
    """Groups are ours, or torch's own."""
    groups: Sequence[Group | dist.ProcessGroup | DeviceMesh] = [
        Group.single(),
        pyparallel.init_mesh(device_mesh).tp,
        device_mesh["tp"],
        dist.new_group([0, 1]),
    ]
    for group in groups:
        up = pyparallel.ColumnParallelLinear.from_dense(linear, group=group, gather_output=False)
        assert_type(up, pyparallel.ColumnParallelLinear)
        down = pyparallel.RowParallelLinear.from_dense(linear, group=group)
        assert_type(down, pyparallel.RowParallelLinear)
        x = down.forward(up.forward(x))
        pyparallel.ParallelMLP(8, 16, activation="swiglu", group=group)
        pyparallel.ParallelAttention(8, 4, group=group, causal=True)
        pyparallel.QKVParallelLinear(8, 4, group=group)
        pyparallel.ParallelLMHead(8, 100, group=group)
        pyparallel.VocabParallelEmbedding(100, 8, group=group)
        pyparallel.SequenceParallelDropout(0.1, group=group)
        pyparallel.SequenceParallelLayerNorm(8, group=group)
        pyparallel.SequenceParallelRMSNorm(8, group=group)
        assert_type(pyparallel.all_reduce(x, group), Tensor)
        assert_type(pyparallel.all_gather(x, group, dim=0), Tensor)
        assert_type(pyparallel.reduce_scatter(x, group, dim=0), Tensor)
        assert_type(pyparallel.all_to_all(x, group, split_dim=0, join_dim=1), Tensor)
        loss = pyparallel.vocab_parallel_cross_entropy(
            x, torch.zeros(1, dtype=torch.long), group=group, vocab_size=100
        )
        assert_type(loss, Tensor)
    return x


def train(mesh: Mesh, dense: nn.Module, folder: Path, ids: Tensor, targets: Tensor) -> None:
    model = pyparallel.parallelize(dense, mesh, sequence_parallel=True)
    wrapped = pyparallel.data_parallel(model, mesh, engine="ddp")
    assert_type(wrapped, nn.Module)
    logits = wrapped(ids)
    count = pyparallel.count_targets(targets, mesh)
    loss = pyparallel.cross_entropy(logits, targets, mesh, count=count)
    assert_type(pyparallel.mean_loss(loss, count, mesh), Tensor)
    assert_type(pyparallel.grad_norm(model, mesh), Tensor)
    assert_type(pyparallel.clip_grad_norm_(model, 1.0, mesh), Tensor)
    stages = pyparallel.load_stages(folder, mesh, chunks=2)
    pipeline = pyparallel.Pipeline(stages, mesh, num_microbatches=4)
    ids, targets = pyparallel.split_batch((ids, targets), mesh)
    assert_type(pipeline.step(ids, targets), Tensor)
    optimizer = torch.optim.AdamW(model.parameters())
    pyparallel.save(model, folder, mesh, optimizer=optimizer, extra={"step": 3})
    assert_type(pyparallel.restore(model, folder, mesh, optimizer=optimizer), dict[str, Any])
    pyparallel.export(model, folder, mesh)


def traced(folder: Path, model: nn.Module, ids: Tensor) -> None:
    with pyparallel.profile(folder / "trace.json") as profiler:
        assert_type(profiler, torch.profiler.profile)
        model(ids)
    trainer = pyparallel.Trainer(model)
    trainer.train()


def choose() -> InferencePlan | TrainingPlan:
    with pyparallel.use("torch"):
        return pyparallel.plan("llama-3.1-8b", "h100", 8, train=True)
