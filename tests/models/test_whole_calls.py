"""cp: what depends on a call's length, or drops its tokens, is that of the whole call."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.context import ContextShards
from pyparallel.comm.group import Group
from pyparallel.launch import launch
from pyparallel.layers.sequence_parallel_dropout import SequenceParallelDropout
from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_as_dense, poisoned_empty
from tests.orders import Exact, farthest
from tests.transformers_models import build

LENGTH = 29
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 9.0],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CASES = [
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}),
    (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
        },
    ),
]


def ids() -> Tensor:
    return torch.randint(2, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def whole(logits: Tensor, mesh: Mesh, length: int = LENGTH) -> Tensor:
    """All ranks' logits in the order of the positions."""
    shards = ContextShards.of(length, mesh.cp)
    joined = all_gather_raw(logits, mesh.cp, dim=1, sizes=shards.sizes)
    return joined[:, shards.dense_order()]


def lengths_matter(cases: list, expected: list[tuple[list[Tensor], list[Tensor]]]) -> None:
    mesh = init_mesh(cp=torch.distributed.get_world_size())
    for (name, changes), truths in zip(cases, expected, strict=True):
        with poisoned_empty():
            model = parallelize(build(name, **changes), mesh)
            # A long call, a short one, a long one with positions of its own.
            found = [
                whole(model(input_ids=ids()).logits, mesh),
                whole(model(input_ids=ids()[:, :11]).logits, mesh, 11),
                whole(
                    model(
                        input_ids=ids(), position_ids=torch.arange(LENGTH).expand(2, -1) + 3
                    ).logits,
                    mesh,
                ),
            ]
        for ours, plain, exact in zip(found, *truths, strict=True):
            assert_as_dense(ours, plain, exact, mesh.cp.size, f"{name} {changes}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_frequencies_of_the_whole_length(ranks: int) -> None:
    expected = []
    for name, changes in CASES:
        with torch.no_grad():
            with Exact():
                exact = three_calls(name, changes, torch.float64)
            plain = farthest(partial(three_calls, name, changes, torch.float32), exact)
        expected.append((plain, exact))
    launch(lengths_matter, ranks, CASES, expected, threads=1)


def three_calls(name: str, changes: dict, dtype: torch.dtype) -> list[Tensor]:
    """The dense logits of a long call, a short one, and one with positions of its own."""
    shifted = torch.arange(LENGTH).expand(2, -1) + 3
    calls = ({"input_ids": ids()}, {"input_ids": ids()[:, :11]})
    calls = (*calls, {"input_ids": ids(), "position_ids": shifted})
    # A new model each: transformers' keeps the frequencies of the longest call.
    return [build(name, **changes).to(dtype)(**call).logits for call in calls]


def dropping() -> nn.Module:
    return build("gpt2", embd_pdrop=0.3, resid_pdrop=0.4)


def drops(sizes: dict[str, int], sequence: bool) -> list[Tensor]:
    mesh = init_mesh(**sizes)
    model = parallelize(dropping(), mesh, sequence_parallel=sequence).train()
    torch.manual_seed(5)
    with poisoned_empty():
        return [whole(model(input_ids=ids()).logits.detach(), mesh) for _ in range(2)]


def dense_drops(dtype: torch.dtype) -> list[Tensor]:
    """Two calls of the dense model, with the masks that a sequence has on any number of ranks."""
    model = dropping().to(dtype).train()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(
                    parent, name, SequenceParallelDropout.from_dense(child, group=Group.single())
                )
    torch.manual_seed(5)
    with torch.no_grad():
        return [model(ids()).logits for _ in range(2)]


@pytest.mark.parametrize(
    ("sizes", "sequence"),
    [
        ({"cp": 2}, False),
        ({"cp": 3}, False),
        ({"cp": 2, "tp": 2}, False),
        ({"cp": 2, "tp": 2}, True),
    ],
)
def test_dropout_does_not_depend_on_the_ranks(sizes: dict[str, int], sequence: bool) -> None:
    with Exact():
        exact = dense_drops(torch.float64)
    plain = farthest(partial(dense_drops, torch.float32), exact)
    ranks = math.prod(sizes.values())
    for found in launch(drops, ranks, sizes, sequence, threads=1):
        for ours, rounded, truth in zip(found, plain, exact, strict=True):
            assert_as_dense(ours, rounded, truth, ranks, f"{sizes} {sequence}")
    assert not torch.allclose(exact[0], exact[1], rtol=0.1)


def refused() -> None:
    mesh = init_mesh(cp=2)
    with pytest.raises(ValueError, match=r"self_attn.residual_dropout: expected 0 .* got 0.1"):
        parallelize(build("starcoder2", residual_dropout=0.1), mesh)


def test_dropout_that_is_no_module() -> None:
    launch(refused, 2, threads=1)
