"""A LoRA run on data, pipeline and tensor parallel ranks: the dense run's file, loaded elsewhere."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.saving.save import restore, save
from pyparallel.testing import assert_equal, poisoned_empty
from pyparallel.training.data import data_parallel
from pyparallel.training.grad_norm import clip_grad_norm_
from pyparallel.training.pipeline import Pipeline
from tests.models.peft_truth import (
    TOLERANCE,
    adapted,
    base_of,
    near,
)
from tests.orders import Exact
from tests.training.pipeline_checks import batch_of, token_losses
from tests.transformers_models import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 0.1


def trained(name: str, layers: int) -> tuple[Tensor, nn.Module]:
    """The dense run: the loss of a step of SGD, with the norm of its gradients clipped."""
    model = adapted(name, num_hidden_layers=layers).train()
    ids, targets = batch_of()
    with Exact():
        loss = token_losses(model(ids).logits, targets).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.optim.SGD(model.parameters(), lr=RATE).step()
    return loss.detach(), model


def train_on_the_mesh(root: Path, truths: dict[str, Tensor], layers: int) -> None:
    mesh = init_mesh(dp=2, pp=2, tp=2)
    for name, truth in truths.items():
        model = adapted(name, num_hidden_layers=layers).train()
        model = parallelize(model, mesh, sequence_parallel=name == "phi3")
        stage = data_parallel(model, mesh)
        pipeline = Pipeline(stage, mesh, num_microbatches=3)
        ids, targets = (t.tensor_split(2)[mesh.dp.rank] for t in batch_of())
        # The loss of a stage that has none is made in this dtype.
        torch.set_default_dtype(torch.float64)
        with Exact(), poisoned_empty():
            loss = pipeline.step(ids, targets)
            clip_grad_norm_(stage, 0.5, mesh)
            torch.optim.SGD(model.parameters(), lr=RATE).step()
        torch.set_default_dtype(torch.float32)
        near(loss, truth, f"{name} loss")
        model.save_pretrained(root / f"{name} mesh")
        if model.config.tie_word_embeddings:
            with pytest.raises(
                CheckpointError, match=r"save the adapters alone by save_pretrained"
            ):
                save(model, root / "whole", mesh)
        else:
            save(model, root / f"{name} whole", mesh)


def load_elsewhere(root: Path, names: list[str], layers: int) -> None:
    """What eight ranks have trained, on two."""
    mesh = init_mesh(tp=2)
    for name in names:
        folder = root / f"{name} mesh"
        dense = peft.PeftModel.from_pretrained(base_of(name, num_hidden_layers=layers), folder)
        model = parallelize(base_of(name, num_hidden_layers=layers), mesh)
        model = peft.PeftModel.from_pretrained(model, folder)
        ids = inputs(dense)["input_ids"]
        with Exact(), torch.inference_mode():
            near(model.eval()(ids).logits, dense.eval()(ids).logits, f"{name} on two ranks")
        if model.config.tie_word_embeddings:
            continue
        restored = parallelize(adapted(name, num_hidden_layers=layers), mesh)
        restore(restored, root / f"{name} whole", mesh)
        whole = dict(model.named_parameters())
        for key, value in restored.named_parameters():
            assert_equal(value.detach(), whole[key].detach(), f"{name} restored {key}")


def test_trains_on_2x2x2_and_loads_elsewhere(tmp_path: Path) -> None:
    names, layers = ["qwen2", "phi3"], 3
    runs = {name: trained(name, layers) for name in names}
    truths = {name: loss for name, (loss, _) in runs.items()}
    launch(train_on_the_mesh, 8, tmp_path, truths, layers, threads=1, timeout_s=240.0)
    for name, (_, dense) in runs.items():
        dense.save_pretrained(tmp_path / name)
        ours, theirs = (
            load_file(tmp_path / folder / "adapter_model.safetensors")
            for folder in (f"{name} mesh", name)
        )
        start = adapted(name, num_hidden_layers=layers).state_dict()
        assert ours.keys() == theirs.keys()
        for key, truth in theirs.items():
            near(ours[key], truth, key)
            moved = start[key.replace(".weight", ".default.weight")] - truth
            assert float(moved.abs().max()) > 1e3 * TOLERANCE * float(truth.abs().max()), key
    launch(load_elsewhere, 2, tmp_path, names, layers, threads=1, timeout_s=240.0)
