"""parallelize() over cp: transformers models on this rank's tokens, against the dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.context import ContextShards
from pyparallel.decoding.generate import generate
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.load import load
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.models.swap.context_region import FAMILIES
from pyparallel.testing import UNIT_ROUNDOFF, assert_within, poisoned_empty
from tests.models.dense_truth import largest, truth_of
from tests.transformers_models import CASES, build, config_of

BATCH, LENGTH = 2, 13
U = UNIT_ROUNDOFF[torch.float32]
NAMES = tuple(name for name in CASES if config_of(name).model_type in FAMILIES and "up" not in name)
FAST = ("llama", "llama tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
# Three documents in the first sequence, one in the second.
PACKED = torch.tensor([[*range(4), *range(6), *range(3)], [*range(13)]])


def arguments(kind: str) -> dict:
    """How the model is called; every kind has targets that do not count."""
    ids = torch.randint(2, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, -3:] = -100
    given = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        given["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [10]])).long()
    if kind == "packed":
        # The dense model looks for documents only where it has no cache.
        given |= {"position_ids": PACKED, "use_cache": False}
    return given


@dataclass
class Truth:
    """The dense model in fp64, and the errors of fp32 as in ``tests/models/test_parallelize.py``."""

    loss: float
    logits: Tensor
    error: float
    grads: dict[str, Tensor]
    errors: dict[str, float]


def truth(name: str, kind: str) -> Truth:
    model = build(name)
    exact = truth_of(model)
    outputs = [each(**arguments(kind)) for each in (model, exact)]
    for output in outputs:
        output.loss.backward()
    logits = [output.logits.detach() for output in outputs]
    error = largest(logits[0].double() - logits[1]) + U * largest(logits[1])
    grads = {n: p.grad for n, p in exact.named_parameters()}
    top = max(map(largest, grads.values()))
    real = [n for n, g in grads.items() if largest(g) > 1e-4 * top]
    rough = {n: largest(p.grad.double() - grads[n]) for n, p in model.named_parameters()}
    relative = max(rough[n] / largest(grads[n]) for n in real)
    errors = {n: rough[n] + (relative + U) * largest(g) + U * top for n, g in grads.items()}
    assert all(3 * errors[n] < 0.01 * largest(grads[n]) for n in real), name
    return Truth(float(outputs[1].loss.detach()), logits[1], error, grads, errors)


@cache
def truths(names: tuple[str, ...]) -> dict[tuple[str, str], Truth]:
    kinds = {name: ("plain",) for name in names}
    kinds |= {name: ("plain", "padded", "packed") for name in names if name in ("llama", "gpt2")}
    return {(name, kind): truth(name, kind) for name in names for kind in kinds[name]}


def check(
    model: nn.Module, mesh: Mesh, expected: Truth, kind: str, algorithm: str, what: str
) -> None:
    shards = ContextShards.of(LENGTH, mesh.cp)
    model.zero_grad()
    output = model(**arguments(kind))
    grown = 1 + math.sqrt(mesh.world.size)
    logits, own = output.logits.detach(), shards.split(expected.logits)
    if kind == "padded":
        # What padding sees is nobody's business.
        counts = shards.split(arguments(kind)["attention_mask"]).bool()
        logits, own = logits[counts], own[counts]
    assert_within(logits, own, grown * expected.error, f"{what} logits")
    loss = output.loss.detach().double() - expected.loss
    assert abs(float(loss)) < 2 * grown * expected.error, what
    output.loss.backward()
    for name, sharding in named_shardings(model).items():
        grad = all_reduce_raw(model.get_parameter(name).grad.clone(), mesh.cp)
        part = sharding.split(expected.grads[name], mesh.tp.rank)
        assert_within(grad, part, grown * expected.errors[name], f"{what} d{name}")


def compare(cp: int, tp: int, cases: list, truths: dict) -> None:
    mesh = init_mesh(cp=cp, tp=tp)
    for name, sequence, algorithm, checkpointing in cases:
        with poisoned_empty():
            model = parallelize(
                build(name), mesh, sequence_parallel=sequence, context_algorithm=algorithm
            )
            if checkpointing:
                model.train()
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for (case, kind), expected in truths.items():
                if case == name:
                    what = f"{name} {kind} {mesh} sp={sequence} {algorithm} rank={mesh.world.rank}"
                    check(model, mesh, expected, kind, algorithm, what)


CASES_OF = {
    (2, 1): [(name, False, "auto", False) for name in FAST],
    (3, 1): [
        ("llama tied", False, "ring", False),
        ("gpt2", False, "ring", False),
        ("mistral", False, "ring", False),
        ("llama", False, "ulysses", True),
    ],
    (2, 2): [
        ("llama", False, "auto", False),
        ("llama", True, "ring", True),
        ("gpt2", True, "ulysses", False),
        ("qwen3", True, "auto", False),
    ],
}


@pytest.mark.parametrize(("cp", "tp"), CASES_OF)
def test_equals_dense(cp: int, tp: int) -> None:
    launch(compare, cp * tp, cp, tp, CASES_OF[cp, tp], truths(FAST), threads=1, timeout_s=60.0)


@pytest.mark.slow
def test_every_family_equals_dense() -> None:
    others = tuple(name for name in NAMES if name not in FAST)
    assert {config_of(name).model_type for name in NAMES} == set(FAMILIES)
    cases = [(name, False, "auto", False) for name in others]
    cases += [(name, True, "auto", False) for name in ("glm", "phi3", "cohere")]
    launch(compare, 4, 2, 2, cases, truths(others), threads=1, timeout_s=60.0)


def refusals(folder: str) -> list[str]:
    """What can't be cut, and calls that can't; on three ranks."""
    mesh = init_mesh(cp=3)
    whole = arguments("plain")
    ids = whole["input_ids"]
    said = []

    def refuse(call: Callable[[], object]) -> None:
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))

    refuse(lambda: parallelize(build("bert"), mesh))
    refuse(lambda: parallelize(build("gemma2", "eager"), mesh))
    refuse(lambda: parallelize(LlamaForSequenceClassification(config_of("llama")), mesh))
    refuse(lambda: parallelize(build("llama"), mesh, context_algorithm="rings"))
    model = parallelize(build("llama"), mesh)
    left = torch.ones_like(ids)
    left[0, :2] = 0
    refuse(lambda: model(ids[:, :2]))
    refuse(lambda: model(ids, attention_mask=left))
    refuse(lambda: model(ids, use_cache=True))
    refuse(lambda: model.generate(ids, max_new_tokens=2))
    refuse(lambda: model(ids, logits_to_keep=1))
    refuse(lambda: model(labels=ids))
    refuse(lambda: model.model(ids))
    dropping = parallelize(build("llama", attention_dropout=0.1).train(), mesh)
    refuse(lambda: dropping(ids))
    decoder = load(folder, mesh)
    refuse(lambda: decoder(ids[:, :2]))
    refuse(lambda: generate(decoder, [[5, 6], [7]], max_new_tokens=3))
    # Three tokens are enough, and nothing that was refused has left anything behind.
    for logits in (model(ids[:, :3]).logits, decoder(ids[:, :3])):
        assert logits.shape == (2, 1, 61)
    assert generate(decoder, [[5, 6, 7], [7]], max_new_tokens=3).steps == 2
    return said


def test_what_can_not_be_cut_is_said_in_one_line(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    expected = (
        "cp: expected 1 for a bert model",
        "cp: expected 1 for a gemma2 model",
        "cp: expected 1 for a LlamaForSequenceClassification",
        "context_algorithm: expected one of auto, ring, ulysses, got 'rings'",
        "at least a token for each of the cp=3 ranks, got 2",
        "attention_mask: expected None or [B, S] with padding on the right",
        "use_cache: expected none",
        "expected none where the context is cut over ranks; to generate, load the checkpoint",
        "logits_to_keep: expected 0",
        "input_ids: expected ids [B, S] or inputs_embeds, got neither",
        "LlamaAttention: its context is cut over ranks, so call the model that parallelize() was given",
        "attention dropout: expected 0",
        "at least a token for each of the cp=3 ranks, got 2",
        "at least a token for each of the cp=3 ranks, got 2",
    )
    for said in launch(refusals, 3, str(tmp_path), threads=1, timeout_s=60.0):
        assert len(said) == len(expected)
        for words, line in zip(expected, said, strict=True):
            assert words in line
            assert "\n" not in line
