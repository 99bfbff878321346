"""Trainer and accelerate where they can't serve a cut model: one line, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
import transformers
from torch import nn

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.trainer import Trainer
from tests.trainer.program import options, rows
from tests.transformers_models import build

DDP = "DistributedDataParallel: expected ranks that hold the same weights"
LEAVE = "{}: expected its default over Mesh(dp=1 x pp=1 x cp=1 x tp=2), since"
REFUSED = {
    "fsdp": "full_shard",
    "save_on_each_node": True,
    "eval_use_gather_object": True,
}


def refused(folder: Path) -> dict[str, str]:
    """What is said, by what was expected to be said."""
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

    model = parallelize(build("llama"), init_mesh(tp=2))
    theirs = transformers.Trainer(model, options(folder, 1), train_dataset=data, eval_dataset=data)
    tell(f"{DDP}, got", theirs.train)
    optimizer = torch.optim.SGD(model.parameters())
    tell(f"{DDP}, ", lambda: accelerate.Accelerator(cpu=True).prepare(model, optimizer))
    for name, value in REFUSED.items():
        tell(LEAVE.format(name), lambda name=name, value=value: ours(model, **{name: value}))
    tell("model: expected a model that is cut over a mesh, got model_init", ours)
    tell("expected a transformers model that is cut over a mesh", lambda: ours(build("llama")))
    tell("model: expected a transformers model, got a", lambda: ours(model.lm_head))
    (folder / "another").mkdir(exist_ok=True)
    tell(
        "another: expected a checkpoint that pyparallel.Trainer wrote",
        lambda: ours(model).train(resume_from_checkpoint=str(folder / "another")),
    )
    batches = [{"labels": row["labels"][None]} for row in data]
    counts = {
        float(
            ours(model, average_tokens_across_devices=whole)._get_num_items_in_batch(
                batches, torch.device("cpu")
            )
        )
        for whole in (True, False)
    }
    # Replicas that are one have one count, summed over ranks or not.
    assert counts == {float(sum((row["labels"][1:] != -100).sum() for row in data))}
    stage = parallelize(build("llama"), init_mesh(pp=2))
    tell("mesh: expected dp and tp alone for Trainer, got Mesh(dp=1 x pp=2", lambda: ours(stage))
    return said


def test_what_it_can_not_do_is_one_line(tmp_path: Path) -> None:
    for said in launch(refused, 2, tmp_path, threads=1, timeout_s=120.0):
        assert len(said) == 10
        for words, line in said.items():
            assert words in line
            assert "\n" not in line
            if words.startswith(DDP):
                assert "(accelerate and Trainer take the whole world)" in line
                assert "in Trainer's place use pyparallel.Trainer" in line
