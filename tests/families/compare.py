"""One case on every rank, through every door: what differs from transformers, or how it is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.decoding.generate import generate
from pyparallel.mesh import Mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.models.stage import tied_copies
from pyparallel.testing import UNIT_ROUNDOFF
from pyparallel.training.pipeline import Pipeline
from tests.families.settings import VOCABULARY, Case
from tests.orders import Exact, farthest

LENGTH, PADDED, NEW_TOKENS = 9, 3, 6
U = UNIT_ROUNDOFF[torch.float32]
Step = dict[str, Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [2, 9], their mask with one row padded on the left, and the targets."""
    ids = torch.randint(2, VOCABULARY - 1, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    return ids, mask, targets.masked_fill(mask == 0, -100)


def step(model: nn.Module, padded: bool) -> Step:
    """Logits of the tokens that count, the loss, and every gradient."""
    ids, mask, targets = batch()
    if not padded:
        mask, targets = torch.ones_like(mask), batch_targets(ids)
    model.zero_grad(set_to_none=True)
    given = {"attention_mask": mask} if padded else {}
    logits = model(ids, **given).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {" logits": logits.detach()[mask == 1], " loss": loss.detach(), **grads}


def batch_targets(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)


def truths(model: nn.Module, orders: int) -> dict[bool, tuple[Step, Step]]:
    """By padded or not: exact, and in fp32 as far off as an order of the sums may bring it.

    Without what transformers' model itself can't do.
    """
    found = {}
    for padded in (False, True):
        try:
            with Exact():
                exact = step(copy.deepcopy(model).double(), padded)
            plain = farthest(lambda p=padded: step(model, p), exact, orders=orders)
        except Exception:
            continue
        if all(t.isfinite().all() for t in exact.values()):
            found[padded] = plain, exact
    return found


class Bounds:
    """The errors allowed: see tests/models/test_parallelize.py, whose derivation this is."""

    def __init__(self, plain: Step, exact: Step, ranks: int) -> None:
        self.plain, self.exact, self.grown = plain, exact, 1 + math.sqrt(ranks)
        grads = [name for name in exact if not name.startswith(" ")]
        self.top = max(float(exact[name].abs().max()) for name in grads)
        real = [n for n in grads if float(exact[n].abs().max()) > 1e-4 * self.top]
        self.relative = max(self.error(n) / float(exact[n].abs().max()) for n in real)

    def error(self, name: str) -> float:
        return float((self.plain[name].double() - self.exact[name]).abs().max())

    def of(self, name: str) -> float:
        size = float(self.exact[name].abs().max())
        if name.startswith(" "):
            # The loss moves by at most twice the largest change of a logit.
            size = float(self.exact[" logits"].abs().max())
            return self.grown * 2 * (self.error(" logits") + self.error(name) + U * size)
        return self.grown * (self.error(name) + (self.relative + U) * size + U * self.top)


def differences(found: Step, bounds: Bounds, parts: Any, what: str) -> list[str]:
    told = []
    # Over cp a call gives its own tokens' logits, and all tokens' loss.
    if found.keys() | {" logits"} != bounds.exact.keys():
        told.append(f"{what}: gradients of {sorted(found.keys() ^ bounds.exact.keys())}")
    for name in found.keys() & bounds.exact.keys():
        exact = bounds.exact[name] if name.startswith(" ") else parts(name, bounds.exact[name])
        if found[name].shape != exact.shape:
            told.append(f"{what}{name}: shape {tuple(found[name].shape)}, not {tuple(exact.shape)}")
            continue
        off = float((found[name].double() - exact).abs().max()) if exact.numel() else 0.0
        if not off <= bounds.of(name):
            told.append(f"{what} {name}: {off:.3g} off, bound {bounds.of(name):.3g}")
    return told


def whole_calls(
    case: Case, dense: nn.Module, mesh: Mesh, truth: dict, sequence_parallel: bool
) -> list[str]:
    """parallelize over tp, or tp and cp: logits, loss and gradients, with and without padding."""
    model = parallelize(copy.deepcopy(dense), mesh, sequence_parallel=sequence_parallel)
    told = []
    for padded, (plain, exact) in truth.items():
        if padded and mesh.cp.size > 1:
            continue
        found = step_of(model, mesh, padded)
        shardings = named_shardings(model)

        def part(name: str, tensor: Tensor, shardings: dict = shardings) -> Tensor:
            return shardings[name].split(tensor, mesh.tp.rank)

        ranks = mesh.tp.size * mesh.cp.size
        what = f"{case} parallelize {mesh} sp={sequence_parallel} padded={padded}"
        told += differences(found, Bounds(plain, exact, ranks), part, what)
    return told


def step_of(model: nn.Module, mesh: Mesh, padded: bool) -> Step:
    if mesh.cp.size == 1:
        return step(model, padded)
    # Over cp the model's own loss is all tokens', a gradient this rank's tokens' share.
    ids, _, _ = batch()
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids)
    output.loss.backward()
    grads = {
        n: all_reduce_raw(p.grad, mesh.cp)
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return {" loss": output.loss.detach(), **grads}


def staged(case: Case, dense: nn.Module, mesh: Mesh, truth: dict) -> list[str]:
    """A pipeline of stages: its loss and gradients."""
    model = parallelize(copy.deepcopy(dense), mesh)
    ids, _, _ = batch()
    loss = Pipeline(model, mesh, num_microbatches=2).step(ids, batch_targets(ids))
    plain, exact = truth[False]
    bounds = Bounds(plain, exact, 2)
    shardings, copies = named_shardings(model), tied_copies(model)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    named = {copies.get(name, name): grad for name, grad in found.items()}
    owners = {copies.get(name, name): name for name in found}
    off = float((loss.double() - exact[" loss"]).abs())
    told = [] if off <= bounds.of(" loss") else [f"{case} pp loss: {off:.3g} off"]
    for name, grad in named.items():
        part = shardings[owners[name]].split(exact[name], mesh.tp.rank)
        off = float((grad.double() - part).abs().max())
        if not off <= bounds.of(name):
            told.append(f"{case} pp {name}: {off:.3g} off, bound {bounds.of(name):.3g}")
    return told


def prompts() -> list[list[int]]:
    ids, _, _ = batch()
    return [ids[0].tolist(), ids[1, PADDED:].tolist()]


def continued(dense: nn.Module) -> list[list[int]] | None:
    """Greedy tokens of each prompt alone, as transformers says them; None where it has none."""
    try:
        return _continued(dense)
    except Exception:
        return None


def _continued(dense: nn.Module) -> list[list[int]]:
    found = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = dense.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def loaded(
    case: Case, folder: Path, mesh: Mesh, truth: dict, expected: list[list[int]] | None
) -> list[str]:
    """load: logits, and the tokens of two prompts of different lengths."""
    model = load(folder, mesh)
    plain, exact = truth[False]
    bounds = Bounds(plain, exact, mesh.tp.size * mesh.cp.size)
    told = []
    ids, _, _ = batch()
    if mesh.cp.size == 1:
        with torch.no_grad():
            logits = model(ids).flatten(0, 1)
        off = float((logits.double() - exact[" logits"]).abs().max())
        if not off <= bounds.of(" logits"):
            told.append(
                f"{case} load {mesh} logits: {off:.3g} off, bound {bounds.of(' logits'):.3g}"
            )
    if expected is None:
        return told
    made = generate(model, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=()).tokens
    if made != expected:
        told.append(f"{case} generate {mesh}: {made}, not {expected}")
    return told
