"""One training step of a small dense model, in fp64: what every mesh has to give."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pyparallel.mesh import Mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.parallelize import named_shardings
from pyparallel.models.weights import sources
from pyparallel.testing import UNIT_ROUNDOFF, assert_within
from tests.orders import Exact, farthest
from tests.transformers_models import build

BATCH, LENGTH = 6, 13
LEARNING_RATE, ADAM_EPS, DECAY = 0.01, 0.1, 0.1
NORM_TYPES = (2.0, 1.0, math.inf)
U = UNIT_ROUNDOFF[torch.float32]

# Tied, grouped heads; fewer KV heads than two ranks; learned positions, biases, transposed weights.
FAMILIES = {
    "llama tied": ("llama tied", {}),
    "one kv": (
        "llama",
        {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 20},
    ),
    "gpt2": ("gpt2", {}),
}


def dense(family: str) -> nn.Module:
    """The dense transformers model."""
    name, changes = FAMILIES[family]
    return build(name, **changes)


def text() -> Tensor:
    """[B, S]."""
    return torch.randint(2, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def targets() -> Tensor:
    """The next tokens [B, S]; the first sequences, and the ends of all, have few that count."""
    found = torch.cat([text()[:, 1:], torch.full((BATCH, 1), -100)], 1)
    found[0] = -100
    found[1, 2:] = -100
    found[:, -3:] = -100
    return found


@dataclass(frozen=True)
class Truth:
    """A step of the dense model in fp64, and how far fp32 may be from it.

    The dense model in fp32 errs by e = max |dense - truth| of a tensor, over several legal orders of
    its sums. Every mesh makes the roundings that it makes, with sums in up to R parts:
    ``(1 + sqrt(R)) (e + r |g| + u |g_max|)``, r the worst relative error of a whole gradient; see
    ``tests/models/test_parallelize.py``. The loss is a mean, which errs no more than the worst of the
    tokens' losses. A norm of all is the norm of the parameters' norms, so what those err by has a norm
    that it errs by no more than; and its own sums round once more.

    Attributes:
        loss: the mean; loss_error: the e + u |max| of the tokens' losses.
        grads: of all parameters; errors: the e + r |g| + u |g_max| of each.
        norms: by their order; norm_errors: the e + u |norm| of each.
        clipped: the norm that the step is clipped to.
        stepped: the parameters after clipping and one AdamW step.
    """

    loss: float
    loss_error: float
    grads: dict[str, Tensor]
    errors: dict[str, float]
    norms: dict[float, float]
    norm_errors: dict[float, float]
    clipped: float
    stepped: dict[str, Tensor]


def truth_of(model: nn.Module) -> Truth:
    """The truth of ``model`` on :func:`text`."""
    exact = copy.deepcopy(model).double()
    with Exact():
        losses, grads, own_norms = _step(exact)
    seen = farthest(partial(_step, model), (losses, grads, own_norms))
    losses_seen, rounded, norms_seen = seen
    rough = {name: float((rounded[name] - grad).abs().max()) for name, grad in grads.items()}
    sizes = {name: float(grad.abs().max()) for name, grad in grads.items()}
    top = max(sizes.values())
    real = [name for name, size in sizes.items() if size > 1e-4 * top]
    relative = max(rough[name] / sizes[name] for name in real)
    errors = {name: rough[name] + relative * sizes[name] + U * top for name in grads}
    # A bound that lets a wrong gradient through would be no test.
    assert all(3 * errors[name] < 0.01 * sizes[name] for name in real)
    assert len(real) > 0.8 * len(sizes)
    norms = {
        p: float(torch.nn.utils.get_total_norm(list(grads.values()), norm_type=p))
        for p in NORM_TYPES
    }
    norm_errors = {}
    for p, exact_norms in own_norms.items():
        off = torch.linalg.vector_norm(norms_seen[p].double() - exact_norms, p)
        norm_errors[p] = float(off) + U * norms[p]
    loss_error = float((losses_seen.double() - losses).abs().max() + U * losses.max())
    clipped = norms[2.0] / 3
    torch.nn.utils.clip_grad_norm_(exact.parameters(), clipped)
    optimizer_of(exact).step()
    stepped = {name: p.detach().clone() for name, p in exact.named_parameters()}
    loss = float(losses.sum() / (targets() != -100).sum())
    return Truth(loss, loss_error, grads, errors, norms, norm_errors, clipped, stepped)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, whose step is smooth in the gradient: |d step / d g| <= LEARNING_RATE / ADAM_EPS."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=DECAY)


def _step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], dict[float, Tensor]]:
    """The tokens' losses, every gradient, and the gradients' own norms by their order."""
    model.zero_grad(set_to_none=True)
    logits = model(text(), use_cache=False).logits
    wanted = targets().flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
    (losses.sum() / (wanted != -100).sum()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norms = {
        p: torch.stack([torch.linalg.vector_norm(g, p) for g in grads.values()]) for p in NORM_TYPES
    }
    return losses.detach(), grads, norms


def own_parts(model: nn.Module, values: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A dense model's values, by the names and in the parts of ``model``: a Decoder, or parallelized."""
    if not isinstance(model, Decoder):
        return {n: s.split(values[n], rank) for n, s in named_shardings(model).items()}
    found = {}
    for name, parts in sources(model.config, model.group.shares).items():
        if name in dict(model.named_parameters()):
            split = [s.sharding.split(values[s.name], rank) for s in parts]
            found[name] = torch.cat(
                [p.t() if s.transposed else p for p, s in zip(split, parts, strict=True)]
            )
    return found


def own_errors(model: nn.Module, truth: Truth) -> dict[str, float]:
    """The error of each of ``model``'s parameters' gradients."""
    if not isinstance(model, Decoder):
        return truth.errors
    return {
        name: max(truth.errors[source.name] for source in parts if source.name in truth.errors)
        for name, parts in sources(model.config, model.group.shares).items()
        if name in dict(model.named_parameters())
    }


def own_rows(x: Tensor, mesh: Mesh) -> Tensor:
    """This dp replica's sequences."""
    return x.chunk(mesh.dp.size)[mesh.dp.rank]


def whole(tensor: Tensor) -> Tensor:
    """What FSDP has cut, put together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_loss(loss: Tensor, truth: Truth, mesh: Mesh, what: str) -> None:
    """The loss is the dense one."""
    grown = 1 + math.sqrt(mesh.world.size)
    exact = torch.tensor(truth.loss, dtype=torch.float64)
    assert_within(loss, exact, grown * truth.loss_error, f"{what} loss")


def check_norm(norm: Tensor, order: float, truth: Truth, mesh: Mesh, what: str) -> None:
    """The norm of all gradients is the dense one's."""
    grown = 1 + math.sqrt(mesh.world.size)
    exact = torch.tensor(truth.norms[order], dtype=torch.float64)
    assert_within(norm, exact, grown * truth.norm_errors[order], f"{what} norm {order}")


def check_grads(model: nn.Module, truth: Truth, mesh: Mesh, what: str) -> None:
    """Every gradient of the unwrapped ``model`` is the dense one's part."""
    grown = 1 + math.sqrt(mesh.world.size)
    errors = own_errors(model, truth)
    for name, part in own_parts(model, truth.grads, mesh.tp.rank).items():
        grad = whole(model.get_parameter(name).grad)
        assert_within(grad, part, grown * errors[name], f"{what} d{name}")


def check_stepped(model: nn.Module, truth: Truth, mesh: Mesh, what: str) -> None:
    """Every parameter after the step is the dense one's part."""
    grown = 1 + math.sqrt(mesh.world.size)
    errors = own_errors(model, truth)
    for name, part in own_parts(model, truth.stepped, mesh.tp.rank).items():
        moved = grown * errors[name] * LEARNING_RATE / ADAM_EPS
        bound = moved + 8 * U * (float(part.abs().max()) + LEARNING_RATE)
        assert_within(whole(model.get_parameter(name)), part, bound, f"{what} stepped {name}")
