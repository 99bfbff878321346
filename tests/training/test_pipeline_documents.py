"""Documents packed into sequences, over pipeline stages and context-parallel ranks: each as if alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.load import load
from pyparallel.testing import poisoned_empty
from pyparallel.training.pipeline import Pipeline
from tests.training.pipeline_checks import (
    BATCH,
    LAYERS,
    LENGTH,
    Truth,
    batch_of,
    check_gradients,
    check_loss,
    token_losses,
)
from tests.transformers_models import build

# Of each row: where its documents end. Other rows have other documents.
ENDS = [(3, LENGTH), (1, 4, LENGTH), (LENGTH,)] * (BATCH // 3)


def documents() -> Tensor:
    """[B, S]: the number of each token's document in its row."""
    found = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row, ends in enumerate(ENDS):
        for end in ends[:-1]:
            found[row, end:] += 1
    return found


def alone(folder: Path) -> Truth:
    """Token losses and gradients of the dense model that is shown one document at a time."""
    found: Truth = {}
    ids, targets = batch_of()
    for dtype in (torch.float32, torch.float64):
        model = build("llama tied", num_hidden_layers=LAYERS).to(dtype)
        if dtype is torch.float32:
            model.save_pretrained(folder)
        losses = []
        for row, ends in enumerate(ENDS):
            start = 0
            for end in ends:
                logits = model(ids[row : row + 1, start:end]).logits[0]
                losses.append(token_losses(logits, targets[row, start:end]))
                start = end
        every = torch.cat(losses)
        every.mean().backward()
        found[str(dtype)] = {name: p.grad for name, p in model.named_parameters()}
        found[str(dtype)]["losses"] = every.detach()
    return found


def step(folder: str, truth: Truth) -> None:
    mesh = init_mesh(pp=2, cp=2)
    stage = load(folder, mesh)
    with poisoned_empty():
        pipeline = Pipeline(stage, mesh, num_microbatches=2)
        loss = pipeline.step(*batch_of(), documents=documents())
        check_loss(loss, truth, 4, "documents")
        check_gradients([stage], mesh, truth, 4, "documents", summed=False)
        loss = pipeline.evaluate(*batch_of(), documents=documents())
        check_loss(loss, truth, 4, "documents evaluated")


def test_each_document_is_as_if_alone(tmp_path: Path) -> None:
    launch(step, 4, str(tmp_path), alone(tmp_path), threads=1)
