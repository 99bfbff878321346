"""parallelize() against the dense transformers models: logits, loss, every gradient, every token."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.launch import launch
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.parallelize import named_dense_shapes, named_shardings, parallelize
from pyparallel.testing import (
    UNIT_ROUNDOFF,
    assert_equal,
    assert_within,
    dense_bound,
    poisoned_empty,
)
from tests.models.dense_truth import (
    GREEDY,
    PROMPT,
    Case,
    Changes,
    Truth,
    largest,
    step,
    truth_of,
    truth_of_case,
)
from tests.orders import Exact, farthest
from tests.transformers_models import CASES, build, class_of, config_of, inputs
from tests.truths import truths_of

OTHERS = ("gemma2", "gemma3", "cohere", "olmo2", "phi3", "phi", "glm", "granite", "starcoder2")
FAMILIES = tuple(name for name in CASES if name not in OTHERS)

# More heads than the cases': fewer KV heads than ranks, cut unevenly over them.
FEW_KV = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 32}
ONE_KV = {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 20}


def in_mesh(shares, fn, *args):
    mesh = init_mesh(tp=torch.distributed.get_world_size(), shares=shares)
    with poisoned_empty():
        return fn(mesh, *args)


def on_ranks(fn, ranks: int, *args, shares: tuple[int, ...] | None = None) -> list:
    return launch(in_mesh, ranks, shares, fn, *args, threads=1, timeout_s=60.0)


def compare(mesh: Mesh, name: str, attention: str, changes: Changes, truth: Truth) -> None:
    """Forward, backward and generation of one case.

    Bounds: the dense model in fp32 errs by e = max |dense - truth| against fp64, over several legal
    orders of its sums. The parallel one makes
    the same roundings and adds R partial sums where the dense one has one sum, which at random signs
    grows errors by sqrt(R): ``(1 + sqrt(R)) e``. For gradients e is a tensor's own error, and what the
    worst tensor's relative error would give it; and a rounding of the largest gradient, for those that
    are a sum of nothing but cancelling terms (a key's bias).
    """
    rank, ranks = mesh.tp.rank, mesh.tp.size
    grown, u = 1 + math.sqrt(ranks), UNIT_ROUNDOFF[torch.float32]
    what = f"{name} {attention} {dict(changes) or ''} R={ranks} rank={rank}"
    dense = build(name, attention, **dict(changes))
    model = parallelize(copy.deepcopy(dense), mesh)
    exact, plain = truth.exact, truth.plain
    found = step(model, inputs(dense))

    error = largest(plain["logits"].double() - exact["logits"]) + u * largest(exact["logits"])
    assert_within(found["logits"], exact["logits"], grown * error, what + " logits")
    # The loss moves by at most twice the largest change of a logit.
    assert_within(found["loss"], exact["loss"], 2 * grown * error, what + " loss")

    shardings, shapes = named_shardings(model), named_dense_shapes(model)
    ours, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    assert list(ours) == list(theirs), what
    assert found.keys() == exact.keys(), what
    grads = {n: (plain[n], exact[n]) for n in theirs if n in exact}
    top = max(largest(t) for _, t in grads.values())
    real = [n for n, (_, t) in grads.items() if largest(t) > 1e-4 * top]
    assert len(real) > 0.8 * len(grads), what
    relative = max(largest(grads[n][0].double() - grads[n][1]) / largest(grads[n][1]) for n in real)
    for n, (grad, exact) in grads.items():
        assert shapes[n] == tuple(exact.shape), f"{what} {n}"
        size = largest(exact)
        bound = grown * (largest(grad.double() - exact) + (relative + u) * size + u * top)
        # A bound that lets a wrong gradient through would be no test.
        assert n not in real or bound < 0.01 * size, f"{what} {n}: bound {bound} of {size}"
        assert_within(ours[n].grad, shardings[n].split(exact, rank), bound, f"{what} d{n}")

    if truth.tokens is not None:
        tokens = model.generate(inputs(dense)["input_ids"][:1, :PROMPT], **GREEDY)
        assert_equal(tokens, truth.tokens, what + " tokens")
        if ranks == 2:
            options = {**GREEDY, "cache_implementation": "static"}
            tokens = model.generate(inputs(dense)["input_ids"][:1, :PROMPT], **options)
            assert_equal(tokens, truth.tokens, what + " tokens, static cache")


def compare_all(mesh: Mesh, cases: list[Case], truths: list[Truth]) -> None:
    for case, truth in zip(cases, truths, strict=True):
        compare(mesh, *case, truth)


def check_cases(cases: list[Case], ranks: int, shares: tuple[int, ...] | None = None) -> None:
    on_ranks(compare_all, ranks, cases, truths_of(truth_of_case, cases), shares=shares)


def cases_of(names: Iterable[str], attention: str, changes: dict | None = None) -> list[Case]:
    # Gemma2 caps its scores, which only the eager path does.
    given = tuple((changes or {}).items())
    return [(n, "eager" if n == "gemma2" else attention, given) for n in names]


SWEEPS = {
    1: cases_of(FAMILIES, "sdpa"),
    2: cases_of(FAMILIES, "eager") + cases_of(OTHERS, "sdpa"),
    3: cases_of(FAMILIES, "sdpa")
    + cases_of(OTHERS, "eager")
    + cases_of(("llama", "qwen2", "qwen3", "phi3", "gemma2"), "eager", FEW_KV),
    4: cases_of(FAMILIES, "sdpa")
    + cases_of(("qwen3", "phi3"), "sdpa", ONE_KV)
    + cases_of(("llama", "qwen3"), "eager", FEW_KV),
}


@pytest.mark.parametrize("ranks", SWEEPS)
def test_equals_dense(ranks: int) -> None:
    check_cases(SWEEPS[ranks], ranks)


# What cuts in ways of its own: stacked and interleaved projections, Conv1D, an encoder, replicas.
UNEQUAL = {
    (3, 1): cases_of(("llama", "gpt2", "bert", "phi3"), "sdpa"),
    (5, 3, 1): cases_of(("llama", "gpt_neox", "phi3"), "sdpa")
    + cases_of(("qwen3", "phi3"), "eager", FEW_KV)
    + cases_of(("llama",), "eager", ONE_KV),
}


@pytest.mark.parametrize("shares", UNEQUAL, ids=str)
def test_equals_dense_at_unequal_shares(shares: tuple[int, ...]) -> None:
    check_cases(UNEQUAL[shares], len(shares), shares)


def check_structure(mesh: Mesh) -> None:
    for name in CASES:
        dense = build(name, "eager")
        model = parallelize(copy.deepcopy(dense), mesh)
        with torch.device("meta"):
            empty = class_of(name)(config_of(name, "eager"))
        parallelize(empty, mesh)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        assert shapes == {n: p.shape for n, p in empty.named_parameters()}, name
        assert all(p.is_meta for p in empty.parameters()), name
        assert named_shardings(model) == named_shardings(empty), name
        # Every name of the dense state dict, each holding its slice.
        shardings = {
            n: next(s for m, s in named_shardings(model).items() if model.get_parameter(m) is p)
            for n, p in model.named_parameters(remove_duplicate=False)
        }
        saved, whole = model.state_dict(), dense.state_dict()
        assert list(saved) == list(whole), name
        for n, value in whole.items():
            part = shardings[n].split(value, mesh.tp.rank) if n in shardings else value
            assert_equal(saved[n], part, f"{name} {n}")
        # What the dense model ties is one parameter here too.
        assert len(list(model.parameters())) == len(list(dense.parameters())), name
        copied = copy.deepcopy(model)
        x = inputs(dense)
        assert_equal(copied(**x).logits, model(**x).logits, f"{name}, copied")
        local = sum(p.numel() for p in model.parameters())
        total = sum(p.numel() for p in dense.parameters())
        # Norms, positions and token types alone are replicated.
        assert local < 0.75 * total, f"{name}: {local} of {total}"


def check_ties(mesh: Mesh) -> None:
    llama = parallelize(build("llama tied"), mesh)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    bert = parallelize(build("bert"), mesh)
    head = bert.cls.predictions
    assert head.decoder.weight is bert.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias
    assert head.bias.shape[0] < 61


def check_counts(mesh: Mesh) -> None:
    layers = 2
    for name, gathers in (("llama", 1), ("qwen2", 1), ("gpt2", 1), ("phi3", 1), ("gpt_neox", 1)):
        model = parallelize(build(name), mesh)
        x = inputs(model)
        with count_collectives() as forward:
            loss = model(**x).loss
        with count_collectives() as backward:
            loss.backward()
        # Forward: the embedding, then two a layer, and the logits. Backward: two entries a layer (three
        # projections that are separate each reduce their own), and the head's.
        entries = {"llama": 5, "qwen2": 5}.get(name, 2)
        counts = {n: c for n, c in forward.items() if isinstance(n, str)}
        assert counts == {"all_reduce": 1 + 2 * layers, "all_gather": gathers}, (name, counts)
        counts = {n: c for n, c in backward.items() if isinstance(n, str)}
        assert counts == {"all_reduce": 1 + entries * layers}, (name, counts)


def check_training(mesh: Mesh) -> None:
    """Two steps of SGD give the dense model's weights, as far as rounding lets two dense ones agree."""
    dense = build("qwen3", "eager")
    model = parallelize(copy.deepcopy(dense), mesh)
    x = inputs(dense)

    def trained(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(**x).loss.backward()
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    with Exact():
        exact = trained(truth_of(dense))
    rounded = farthest(lambda: trained(copy.deepcopy(dense)), exact)
    shardings = named_shardings(model)
    for n, ours in trained(model).items():
        bound = dense_bound(rounded[n], exact[n], mesh.tp.size, n)
        moved = largest(exact[n] - dense.get_parameter(n).detach())
        # A bound that lets a step of another size through would be no test.
        assert bound < 0.01 * moved, (n, bound, moved)
        assert_within(ours, shardings[n].split(exact[n], mesh.tp.rank), bound, n)


CHECKS = {
    "structure": check_structure,
    "ties": check_ties,
    "counts": check_counts,
    "training": check_training,
}


def check_named(mesh: Mesh) -> None:
    for name, check in CHECKS.items():
        try:
            check(mesh)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_structure_ties_counts_training() -> None:
    on_ranks(check_named, 2)


def test_sharded_modules_know_their_dense_shapes() -> None:
    model = parallelize(build("gpt2"), init_mesh())
    sharded = [module for module in model.modules() if isinstance(module, ShardedModule)]
    # Two layers of four projections, the embedding and the head.
    assert len(sharded) == 10
    for module in sharded:
        for leaf, shape in module.dense_shapes.items():
            assert tuple(getattr(module, leaf).shape) == shape
