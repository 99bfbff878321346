"""What the pipeline's tests share: dense losses and gradients, and the comparison with a stage's."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pyparallel import reference
from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.mesh import Mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import tied_copies
from pyparallel.models.weights import sources
from pyparallel.testing import assert_within, dense_bound
from tests.orders import Exact, farthest
from tests.transformers_models import build

LAYERS = 5
BATCH, LENGTH = 6, 7

Truth = dict[str, dict[str, Tensor]]


def batch_of(rows: int = BATCH, *, length: int = LENGTH, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and targets [rows, length]; some targets do not count, and unevenly many of each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(rows):
        targets[row, length - row % 3 :] = -100
    return ids[:, :-1].contiguous(), targets


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every token that counts, [T]."""
    return reference.cross_entropy(logits, targets, reduction="none")[targets.flatten() != -100]


def dense_truth(family: str, folder: Path, **changes: object) -> Truth:
    """Saves a dense model; its token losses and gradients in fp32 and fp64, by transformers' names."""
    model = build(family, num_hidden_layers=LAYERS, **changes)
    model.save_pretrained(folder)
    return truth_of(model)


def truth_of(model: nn.Module) -> Truth:
    """A dense model's token losses and gradients: exact, and what rounding may make of them in fp32."""

    def step(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        ids, targets = batch_of()
        losses = token_losses(model(ids).logits, targets)
        losses.mean().backward()
        return {name: p.grad for name, p in model.named_parameters()} | {"losses": losses.detach()}

    with Exact():
        exact = step(deepcopy(model).double())
    return {
        str(torch.float32): farthest(partial(step, model), exact),
        str(torch.float64): exact,
    }


def family_of(name: str, truth: Truth) -> list[tuple[Tensor, Tensor]]:
    """(dense, exact) gradients of the same parameter in every layer."""
    dense, exact = (truth[str(d)] for d in (torch.float32, torch.float64))
    kind = re.sub(r"\d+", "*", name)
    return [(dense[n], exact[n]) for n in exact if re.sub(r"\d+", "*", n) == kind]


def check_loss(loss: Tensor, truth: Truth, parts: int, what: str) -> None:
    """The loss is the dense one: a mean, which errs no more than the worst of the tokens' losses.

    The dense mean's own error is no measure: its tokens' errors may happen to cancel.
    """
    dense, exact = (truth[str(d)]["losses"] for d in (torch.float32, torch.float64))
    assert_within(loss, exact.mean(), dense_bound(dense, exact, parts, what), f"{what}: loss")


def check_gradients(
    stages: list[Decoder], mesh: Mesh, truth: Truth, parts: int, what: str, *, summed: bool = True
) -> set[str]:
    """Every parameter's gradient is the dense one's part; the names that were checked.

    Args:
        parts: how many partial sums make a gradient: micro-batches times ranks.
        summed: over dp and cp too; otherwise that is done here.
    """
    seen = set()
    rank, ranks = mesh.tp.rank, mesh.tp.size
    for stage in stages:
        copies = tied_copies(stage)
        wanted = sources(stage.config, ranks)
        for name, parameter in stage.named_parameters():
            owner = copies.get(name, name)
            exact = torch.cat(
                [part(truth[str(torch.float64)], source, rank) for source in wanted[owner]]
            )
            pairs = [pair for source in wanted[owner] for pair in family_of(source.name, truth)]
            assert parameter.grad is not None, f"{what} {name}: no gradient"
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            for group in () if summed else (mesh.cp, mesh.dp):
                gradient = all_reduce_raw(gradient.clone(), group) if group.size > 1 else gradient
            bound = max(dense_bound(*pair, parts, what) for pair in pairs)
            assert_within(gradient, exact, bound, f"{what} {name}")
            seen.add(owner)
    return seen


def part(gradients: dict[str, Tensor], source: object, rank: int) -> Tensor:
    """A rank's part of a dense gradient."""
    cut = source.sharding.split(gradients[source.name], rank)
    return cut.t() if source.transposed else cut


def reset(stages: list[nn.Module]) -> None:
    for stage in stages:
        stage.zero_grad()
