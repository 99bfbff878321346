"""What Trainer and accelerate say where they can't serve a cut model, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
import transformers
from torch import nn

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.trainer import Trainer
from tests.trainer.settings import options, rows
from tests.transformers_models import build

DDP = "DistributedDataParallel: expected ranks that hold the same weights"
LEAVE = "{}: expected its default over Mesh(dp=2 x pp=1 x cp=1 x tp=2), since"
REFUSED = {
    "fsdp": "full_shard",
    "save_on_each_node": True,
    "eval_use_gather_object": True,
}


def refused(folder: Path, mesh: Mesh) -> dict[str, str]:
    """What is said, by what is expected to be said; of dp x tp = 2 x 2."""
    folder.mkdir(exist_ok=True)
    said: dict[str, str] = {}
    data = rows(8, 1)

    def tell(words: str, call: Callable[[], object]) -> None:
        try:
            call()
            said[words] = "nothing"
        except (ValueError, CheckpointError) as error:
            said[words] = str(error)

    def ours(model: nn.Module | None = None, **changed: object) -> Trainer:
        arguments = options(folder, 1)
        for name, value in changed.items():
            setattr(arguments, name, value)
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    model = parallelize(build("llama"), mesh)
    theirs = transformers.Trainer(model, options(folder, 1), train_dataset=data, eval_dataset=data)
    tell(f"{DDP}, got", theirs.train)
    optimizer = torch.optim.SGD(model.parameters())
    tell(f"{DDP}, ", lambda: accelerate.Accelerator(cpu=True).prepare(model, optimizer))
    for name, value in REFUSED.items():
        tell(LEAVE.format(name), lambda name=name, value=value: ours(model, **{name: value}))
    # As of arguments without use_cpu on CPUs, which would train on losses times 0.
    alone = f"args: expected TrainingArguments that know all 4 ranks of {mesh}, got 1; on CPUs"
    tell(alone, lambda: ours(model, distributed_state=None))
    tell("model: expected a model that is cut over a mesh, got model_init", ours)
    tell("expected a transformers model that is cut over a mesh", lambda: ours(build("llama")))
    tell("model: expected a transformers model, got a", lambda: ours(model.lm_head))
    (folder / "another").mkdir(exist_ok=True)
    tell(
        "another: expected a checkpoint that pyparallel.Trainer wrote",
        lambda: ours(model).train(resume_from_checkpoint=str(folder / "another")),
    )
    stage = parallelize(build("llama"), init_mesh(dp=2, pp=2))
    tell("mesh: expected dp and tp alone for Trainer, got Mesh(dp=2 x pp=2", lambda: ours(stage))
    return {**said, **_counts(ours, model, mesh)}


def _counts(ours: Callable[..., Trainer], model: nn.Module, mesh: Mesh) -> dict[str, str]:
    """How many targets a step has, summed over devices or not: of all replicas, or of one."""
    data = rows(8, 1)
    batches = [{"labels": row["labels"][None]} for row in data]
    count = int(sum((row["labels"][1:] != -100).sum() for row in data))
    told = {}
    for whole in (True, False):
        trainer = ours(model, average_tokens_across_devices=whole)
        number = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        told[f"{count * (mesh.dp.size if whole else 1)} targets"] = f"{int(number)} targets"
    return told
