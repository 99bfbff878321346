"""A small Llama over two ranks, forward and backward, through the Triton kernels alone."""

from collections import Counter
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from pyparallel import backend
from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.kernels.launch import INTERPRETING
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.fill import fill
from pyparallel.models.load import decoder_config
from pyparallel.models.weights import sources
from pyparallel.testing import assert_as_dense, assert_within, dense_bound, poisoned_empty
from tests.orders import Exact, farthest
from tests.training.pipeline_checks import Truth, family_of, part
from tests.transformers_models import build

IDS = [5, 9, 2, 40, 33, 7, 18]
LAYERS = 2
# Launches on each rank. Both: attention and rope (q and k, forward and backward) of each layer.
BOTH = {
    "attention_kernel": LAYERS,
    "attention_delta_kernel": LAYERS,
    "attention_backward_kv_kernel": LAYERS,
    "attention_backward_q_kernel": LAYERS,
    "rope_kernel": 4 * LAYERS,
}
PLAIN = BOTH | {
    # Of attention, and of the MLP behind it: gate and up, then down.
    "all_reduce_residual_rms_norm_kernel": LAYERS,
    "gated_mlp_kernel": LAYERS,
    # Down forward; dx of q, k, v and of gate and up; dx of the head.
    "matmul_all_reduce_kernel": 3 * LAYERS + 1,
}
SEQUENCE_PARALLEL = BOTH | {
    # Into q, k, v and gate and up, and the head; dx and the gradient itself of out and down.
    "all_gather_matmul_kernel": 4 * LAYERS + 1,
    # Out of attention and MLP; dx of what was gathered into.
    "matmul_reduce_scatter_kernel": 4 * LAYERS + 1,
}


def count_launches() -> Counter:
    """Count this process's launches from here on, by the kernels' names."""
    counter: Counter = Counter()
    kind = InterpretedFunction if INTERPRETING else JITFunction
    run = kind.run

    def counted(self, *args, **options):
        counter[self.fn.__name__] += 1
        return run(self, *args, **options)

    kind.run = counted
    return counter


def compare(folder: str, sequence_parallel: bool, expected: Truth, device: str = "cpu") -> Counter:
    group = init_mesh(tp=torch.distributed.get_world_size()).tp
    checkpoint = open_checkpoint(folder)
    launches = count_launches()
    with poisoned_empty(), backend.use("triton"):
        config = decoder_config(checkpoint)
        model = Decoder(config, "meta", group=group, sequence_parallel=sequence_parallel)
        fill(model, checkpoint, device=device)
        ids = torch.tensor([IDS], device=device)
        logits = model(ids)
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    rounded, exact = (expected[str(dtype)] for dtype in (torch.float32, torch.float64))
    ranks = group.size
    assert_as_dense(logits.cpu(), rounded["logits"], exact["logits"], ranks, "logits")
    for name, wanted in sources(config, ranks).items():
        truth = torch.cat([part(exact, source, group.rank) for source in wanted])
        pairs = [pair for source in wanted for pair in family_of(source.name, expected)]
        bound = max(dense_bound(*pair, ranks, name) for pair in pairs)
        assert_within(model.get_parameter(name).grad.cpu(), truth, bound, name)
    return launches


def step(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of a loss."""
    model.zero_grad(set_to_none=True)
    ids = torch.tensor([IDS])
    logits = model(ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


def dense(folder: str, sequence_parallel: bool) -> Truth:
    """Save a model; its step, exact, and in fp32 over several orders of its sums."""
    # A bias stands between the sum and the residual, so a layer without one is fused further.
    model = build("llama", attention_bias=sequence_parallel)
    model.save_pretrained(folder)
    with Exact():
        exact = step(deepcopy(model).double())
    return {str(torch.float64): exact, str(torch.float32): farthest(partial(step, model), exact)}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_equals_dense(sequence_parallel, tmp_path):
    expected = dense(str(tmp_path), sequence_parallel)
    ran = launch(compare, 2, str(tmp_path), sequence_parallel, expected, threads=1)
    wanted = SEQUENCE_PARALLEL if sequence_parallel else PLAIN
    for launches in ran:
        assert {name: launches[name] for name in wanted} == wanted, launches
        # What is no linear layer: the embedding's sum, the logits, the gradients of norms.
        plain = ("all_reduce_one_shot_kernel", "all_gather_kernel", "reduce_scatter_kernel")
        assert all(launches[name] for name in plain[: 3 if sequence_parallel else 2]), launches
