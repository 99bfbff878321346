"""What dense transformers models say of a step and a prompt, exactly and in fp32."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from tests.orders import Exact, farthest
from tests.transformers_models import GENERATES, build, inputs

PROMPT = 5
GREEDY = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None}


def truth_of(dense: nn.Module) -> nn.Module:
    """The same model in fp64."""
    truth = copy.deepcopy(dense).double()
    for module in truth.modules():
        # GPT-2's upcast path insists on fp32; its other path computes the same.
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False
    return truth


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


def step(model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    output = model(**x)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **grads}


@dataclass(frozen=True)
class Truth:
    """What the dense model of a case gives.

    Attributes:
        exact: :func:`step` in fp64.
        plain: in fp32, of several orders of its sums the farthest.
        tokens: what it generates, if it does.
    """

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]
    tokens: Tensor | None


# Of a config, as pairs; a model's name, its attention, and those.
Changes = tuple[tuple[str, int], ...]
Case = tuple[str, str, Changes]


def truth_of_case(name: str, attention: str, changes: Changes) -> Truth:
    dense = build(name, attention, **dict(changes))
    x = inputs(dense)
    with Exact():
        exact = step(truth_of(dense), x)
    plain = farthest(partial(step, dense, x), exact)
    tokens = None
    if name in GENERATES:
        tokens = dense.generate(x["input_ids"][:1, :PROMPT], **GREEDY)
        assert tokens.shape[1] == PROMPT + GREEDY["max_new_tokens"]
    return Truth(exact, plain, tokens)
