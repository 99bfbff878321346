"""A transformers model cut over two ranks, with a mask of its own, through the Triton kernels."""

import torch
from torch.nn import functional as F

from pyparallel import backend
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.parallelize import parallelize
from pyparallel.testing import assert_as_dense, poisoned_empty
from tests.orders import Exact, farthest
from tests.transformers_models import build

IDS = torch.tensor([[0, 0, 0, 40, 33, 7, 18], [5, 9, 2, 11, 24, 3, 50]])
# Padding, and a hole: padding alone would not need a mask.
SEEN = torch.tensor([[0, 0, 0, 1, 1, 0, 1], [1] * 7])
TARGETS = IDS.masked_fill(SEEN == 0, -100)


def step(model):
    logits = model(IDS, attention_mask=SEEN).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TARGETS[:, 1:].flatten()).backward()
    return logits[SEEN == 1].detach(), model.get_input_embeddings().weight.grad


def masked_step() -> tuple:
    model = parallelize(build("llama"), init_mesh(tp=torch.distributed.get_world_size()))
    from pyparallel.ops.triton import attention as row

    run, masked = row.run, []

    def counted(*args, **options):
        masked.append(options.get("mask") is not None)
        return run(*args, **options)

    row.run = counted
    with poisoned_empty(), backend.use("triton"):
        logits, gradient = step(model)
    return logits, gradient, masked


def test_a_masked_step_equals_dense():
    with Exact():
        exact, exact_gradient = step(build("llama").double())
    logits, gradient = farthest(lambda: step(build("llama")), (exact, exact_gradient))
    parts = launch(masked_step, 2, threads=1)
    for ours, _, masked in parts:
        assert_as_dense(ours, logits, exact, 2, "logits")
        assert masked == [True, True]
    ours = torch.cat([part for _, part, _ in parts])[: gradient.shape[0]]
    assert_as_dense(ours, gradient, exact_gradient, 2, "embedding's gradient")
