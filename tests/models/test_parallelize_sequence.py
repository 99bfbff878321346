"""parallelize(sequence_parallel=True) against the dense transformers models."""

from __future__ import annotations

import copy

import pytest
import torch

from pyparallel.comm.collectives import count_collectives
from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.testing import UNIT_ROUNDOFF, assert_equal, assert_within, poisoned_empty
from tests.models.dense_truth import GREEDY, PROMPT, largest, truth_of
from tests.transformers_models import build, class_of, config_of, inputs

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "bert", "bert classes")
OTHERS = ("gemma2", "glm", "phi3", "cohere")


def in_mesh(fn, *args):
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    with poisoned_empty():
        return fn(mesh, *args)


def on_ranks(fn, ranks: int, *args) -> list:
    return launch(in_mesh, ranks, fn, *args, threads=1, timeout_s=60.0)


def compare(mesh: Mesh, names: tuple[str, ...], checkpointing: bool) -> None:
    """Loss and every gradient, with the bounds of test_parallelize.compare."""
    rank, ranks = mesh.tp.rank, mesh.tp.size
    grown, u = 1 + ranks**0.5, UNIT_ROUNDOFF[torch.float32]
    for name in names:
        what = f"{name} R={ranks} rank={rank}"
        dense = build(name, "eager" if name == "gemma2" else "sdpa")
        truth = truth_of(dense)
        model = parallelize(copy.deepcopy(dense), mesh, sequence_parallel=True)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # 9 tokens divide by 3 alone.
        x = inputs(dense)
        outputs = [each(**x) for each in (dense, truth, model)]
        for output in outputs:
            output.loss.backward()
        logits = [output.logits.detach() for output in outputs]
        error = largest(logits[0].double() - logits[1]) + u * largest(logits[1])
        assert_within(logits[2], logits[1], grown * error, what + " logits")
        losses = [output.loss.detach() for output in outputs]
        assert_within(losses[2], losses[1], 2 * grown * error, what + " loss")
        grads = {
            n: (p.grad, truth.get_parameter(n).grad)
            for n, p in dense.named_parameters()
            if p.grad is not None
        }
        top = max(largest(exact) for _, exact in grads.values())
        real = [n for n, (_, exact) in grads.items() if largest(exact) > 1e-4 * top]
        relative = max(
            largest(grads[n][0].double() - grads[n][1]) / largest(grads[n][1]) for n in real
        )
        shardings, ours = named_shardings(model), dict(model.named_parameters())
        for n, (grad, exact) in grads.items():
            bound = largest(grad.double() - exact) + (relative + u) * largest(exact) + u * top
            assert n not in real or grown * bound < 0.01 * largest(exact), f"{what} {n}: {bound}"
            own = shardings[n].split(exact, rank)
            assert_within(ours[n].grad, own, grown * bound, f"{what} d{n}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense(ranks):
    on_ranks(compare, ranks, FAMILIES + (OTHERS if ranks == 3 else ()), False)


def test_equals_dense_with_transformers_checkpointing():
    on_ranks(compare, 2, ("llama", "gpt2", "bert"), True)


def generates(mesh: Mesh, expected: dict) -> None:
    for name, tokens in expected.items():
        model = parallelize(build(name), mesh, sequence_parallel=True)
        prompt = inputs(model)["input_ids"][:1, :PROMPT]
        assert_equal(model.generate(prompt, **GREEDY), tokens, name)
        copied = copy.deepcopy(model)
        assert_equal(copied(prompt).logits, model(prompt).logits, f"{name}, copied")


def test_generates_what_the_dense_model_does():
    """A prompt that is cut, then steps of one token that are not; and one too short to be cut."""
    expected = {}
    for name in ("llama", "gpt2", "gpt_neox"):
        dense = build(name)
        expected[name] = dense.generate(inputs(dense)["input_ids"][:1, :PROMPT], **GREEDY)
    on_ranks(generates, 3, expected)


def counted(mesh: Mesh, name: str) -> tuple[dict, dict]:
    model = parallelize(build(name), mesh, sequence_parallel=True)
    x = inputs(model)
    del x["labels"]
    with count_collectives() as forward:
        logits = model(**x).logits
    with count_collectives() as backward:
        logits.sum().backward()
    return tuple(
        {n: c for n, c in counter.items() if isinstance(n, str)} for counter in (forward, backward)
    )


@pytest.mark.parametrize(("name", "norms"), [("llama", 1), ("gpt2", 2), ("gpt_neox", 2)])
def test_every_collective(name, norms):
    """2 layers. ``norms``: the parameters of one norm, each of which is an all-reduce backward."""
    layers = 2
    forward = {
        # embedding
        "all_reduce": 1,
        # before attention and MLP; at the end of the stack; the logits
        "all_gather": 2 * layers + 1 + 1,
        "reduce_scatter": 2 * layers,
    }
    backward = {
        # head; norms
        "all_reduce": 1 + 2 * norms * layers,
        # behind attention and MLP; the start of the stack
        "all_gather": 2 * layers + 1,
        "reduce_scatter": 2 * layers,
    }
    for found in on_ranks(counted, 2, name):
        assert found == (forward, backward)


def drops(mesh: Mesh) -> list:
    results = []
    for name, rates in (
        ("gpt2", {"resid_pdrop": 0.3, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("bert", {"hidden_dropout_prob": 0.3}),
        ("gpt_neox", {"hidden_dropout": 0.3}),
    ):
        model = build(name, "sdpa", **rates).train()
        torch.manual_seed(5)
        parallelize(model, mesh, sequence_parallel=True)
        # What is outside the layers draws from torch's generator, the same on all ranks.
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.p = 0.0
        x = inputs(model)
        torch.manual_seed(6)
        results.append(model(**x).logits.detach())
    return results


def test_dropout_does_not_depend_on_the_number_of_ranks():
    two, three = (on_ranks(drops, ranks) for ranks in (2, 3))
    for name, in_two, in_three in zip(("gpt2", "bert", "gpt_neox"), two[0], three[0], strict=True):
        torch.testing.assert_close(in_two, in_three, rtol=1e-4, atol=1e-4, msg=name)


def refused(mesh: Mesh) -> None:
    model = parallelize(build("llama"), mesh, sequence_parallel=True)
    with pytest.raises(ValueError, match="sequence: expected at least 3 tokens"):
        model(torch.ones(1, 2, dtype=torch.long))
    dense = class_of("starcoder2")(config_of("starcoder2", residual_dropout=0.1))
    with pytest.raises(ValueError, match=r"mlp\.residual_dropout: expected 0 with"):
        parallelize(dense, mesh, sequence_parallel=True)
    # Refused before anything was changed.
    parallelize(dense, mesh)
    # Its queries are normalised whole, so they are gathered within the attention.
    with pytest.raises(ValueError, match="expected one stack of layers whose attention is cut by"):
        parallelize(build("olmo2"), mesh, sequence_parallel=True)
    crossed = class_of("gpt2")(config_of("gpt2", add_cross_attention=True))
    with pytest.raises(ValueError, match="crossattention: attends to another sequence"):
        parallelize(crossed, mesh, sequence_parallel=True)


def test_refused():
    on_ranks(refused, 3)
