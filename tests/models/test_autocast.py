"""Models under torch.autocast against dense transformers models under it: logits, loss, gradients."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyparallel.launch import launch
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import load
from pyparallel.models.parallelize import parallelize
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.testing import UNIT_ROUNDOFF, assert_within, dense_bound, poisoned_empty
from tests.models.dense_truth import largest, step, truth_of
from tests.orders import Exact, farthest
from tests.training.training_truth import own_parts
from tests.transformers_models import build, inputs
from tests.truths import truths_of

Values = dict[str, Tensor]
FAMILIES = ("llama", "qwen3", "gpt2")
# fp16's small numbers end at 6e-8: gradients are scaled up before they get there.
SCALE = 1024.0


def whole_inputs(dense: nn.Module) -> Values:
    """Tokens without padding, as the library's own decoder takes them."""
    ids = inputs(dense)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def lowered_step(dtype: torch.dtype, model: nn.Module, x: Values) -> Values:
    """As :func:`step`, the forward pass under autocast; backward, of the scaled loss, after it."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype):
        if isinstance(model, Decoder):
            model.head.gather_output = False
            logits, ids = model(x["input_ids"]), x["labels"]
            targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
            cut = {"group": model.group, "vocab_size": model.vocab_size}
            # Backward writes over the logits.
            shown = logits.detach().clone()
            loss = vocab_parallel_cross_entropy(logits, targets, **cut)
        else:
            output = model(**x)
            shown, loss = output.logits.detach(), output.loss
    (loss * SCALE).backward()
    grads = {n: p.grad / SCALE for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": shown, "loss": loss.detach(), **grads}


def check_grads(
    model: nn.Module, found: Values, plain: Values, exact: Values, u: float, rank: int, what: str
) -> None:
    """The dense model errs by e under autocast, over several legal orders of its sums; the parallel one
    rounds at the same places, and R partial sums: ``(1 + sqrt(R)) (e + u (max |g| + max |all|))``, the
    last for gradients that are a sum of nothing but cancelling terms."""
    ranks = torch.distributed.get_world_size()
    names = [n for n in exact if n not in ("logits", "loss")]
    top = max(largest(exact[n]) for n in names)
    bounds = {
        n: largest(plain[n].double() - exact[n]) + u * (largest(exact[n]) + top) for n in names
    }
    # Bounds that let most of them be anything would be no test.
    assert sum(bounds[n] < 0.2 * largest(exact[n]) for n in names) > 0.6 * len(names), what
    grown = {n: torch.full_like(exact[n], (1 + ranks**0.5) * bounds[n]) for n in names}
    held = own_parts(model, grown, rank)
    for n, part in own_parts(model, {n: exact[n] for n in names}, rank).items():
        assert_within(found[n], part, held[n], f"{what} d{n}")


def truth_of_case(family: str, dtype: torch.dtype, own: bool) -> tuple[Values, Values]:
    """The dense model's step in fp64, and under autocast, of several orders of its sums the farthest."""
    dense = build(family)
    x = whole_inputs(dense) if own else inputs(dense)
    with Exact():
        exact = step(truth_of(dense), x)
    return exact, farthest(partial(lowered_step, dtype, dense, x), exact)


# Family, dtype, sequence parallel, and whether the library's own decoder.
CASES = [
    *itertools.product(FAMILIES, (torch.bfloat16,), (False, True), (False, True)),
    ("llama", torch.float16, False, False),
]


def compare(
    mesh: Mesh,
    case: tuple[str, torch.dtype, bool, bool],
    folder: str,
    exact: Values,
    plain: Values,
) -> None:
    family, dtype, sequence, own = case
    what = f"{family} {dtype} R={mesh.tp.size} rank={mesh.tp.rank} sp={sequence} own={own}"
    dense = build(family)
    x = whole_inputs(dense) if own else inputs(dense)
    if own:
        model = load(folder, mesh, sequence_parallel=sequence).train()
    else:
        model = parallelize(copy.deepcopy(dense), mesh, sequence_parallel=sequence)
    found = lowered_step(dtype, model, x)
    # Matmuls give autocast's dtype, losses and the parameters' gradients fp32.
    assert found["logits"].dtype is plain["logits"].dtype is dtype, what
    others = {t.dtype for n, t in found.items() if n != "logits"}
    assert others == {torch.float32} == {t.dtype for n, t in plain.items() if n != "logits"}, what
    bound = dense_bound(plain["logits"], exact["logits"], mesh.tp.size, what)
    logits = exact["logits"]
    if own:
        logits = model.head.shardings["weight"].along(-1).split(logits, mesh.tp.rank)
    assert_within(found["logits"], logits, bound, what + " logits")
    # The loss moves by at most twice the largest change of a logit.
    assert_within(found["loss"], exact["loss"], 2 * bound, what + " loss")
    check_grads(model, found, plain, exact, UNIT_ROUNDOFF[dtype], mesh.tp.rank, what)


def compare_all(folders: dict[str, str], truths: list[tuple[Values, Values]]) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    with poisoned_empty():
        for case, truth in zip(CASES, truths, strict=True):
            compare(mesh, case, folders[case[0]], *truth)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The dense models' checkpoints."""
    found = {}
    for family in FAMILIES:
        folder: Path = tmp_path_factory.mktemp("model")
        build(family).save_pretrained(folder)
        found[family] = str(folder)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_as_dense(ranks: int, folders: dict[str, str]) -> None:
    truths = truths_of(truth_of_case, [(family, dtype, own) for family, dtype, _, own in CASES])
    launch(compare_all, ranks, folders, truths, threads=1, timeout_s=60.0)


def scaled_steps(model: nn.Module, x: Values) -> tuple[list[float], Values]:
    """A step whose scale is too large for fp16, then one that is not: the scales, the unscaled gradients
    of the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    scales = []
    for scale in (None, SCALE):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.update(scale) if scale is not None else None
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**x).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(moved) if scale is not None else not any(moved), scale
    return scales, grads


def compare_scaled(exact: Values, plain: Values) -> None:
    mesh = init_mesh(tp=torch.distributed.get_world_size())
    dense = build("llama")
    x = inputs(dense)
    model = parallelize(copy.deepcopy(dense), mesh)
    scales, grads = scaled_steps(model, x)
    assert scales == scaled_steps(dense, x)[0] == [2.0**39, SCALE]
    u = UNIT_ROUNDOFF[torch.float16]
    check_grads(model, grads, plain, exact, u, mesh.tp.rank, "GradScaler")


def test_a_scaler_scales_and_skips_as_on_the_dense_model() -> None:
    (truth,) = truths_of(truth_of_case, [("llama", torch.float16, False)])
    launch(compare_scaled, 2, *truth, threads=1, timeout_s=60.0)
