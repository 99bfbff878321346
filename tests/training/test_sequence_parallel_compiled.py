"""A parallel block under torch.compile(fullgraph=True), and the fused operators under opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.layers import (
    LayerNorm,
    ParallelAttention,
    ParallelLMHead,
    ParallelMLP,
    RMSNorm,
    RotaryEmbedding,
    SequenceParallelDropout,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
)
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.testing import assert_equal, normals, run_ranks

H, LENGTH, VOCAB = 16, 7, 11


class Block(nn.Module):
    """A decoder layer and the head."""

    def __init__(self, group: Group, sequence_parallel: bool) -> None:
        super().__init__()
        options = {"group": group, "sequence_parallel": sequence_parallel}
        if sequence_parallel:
            self.norm = SequenceParallelRMSNorm(H, 1e-6, group=group)
            self.mlp_norm = SequenceParallelLayerNorm(H, group=group)
        else:
            self.norm, self.mlp_norm = RMSNorm(H, 1e-6), LayerNorm(H)
        rotary = RotaryEmbedding(4)
        self.attention = ParallelAttention(
            H, 4, num_kv_heads=2, causal=True, rotary=rotary, **options
        )
        self.mlp = ParallelMLP(H, 30, bias=True, **options)
        self.head = ParallelLMHead(H, VOCAB, gather_output=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), length=LENGTH)
        x = x + self.mlp(self.mlp_norm(x), length=LENGTH)
        return self.head(x, length=LENGTH)


def compiled(group: Group, sequence_parallel: bool, engine: str) -> None:
    torch.manual_seed(0)
    block = Block(group, sequence_parallel)
    x = normals(2, LENGTH, H, seed=1)
    if sequence_parallel:
        x = x.split(sequence_sizes(LENGTH, group), 1)[group.rank].contiguous()
    targets = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    results = []
    for module in (block, torch.compile(block, fullgraph=True, backend=engine)):
        given = x.clone().requires_grad_()
        with count_collectives() as counter:
            logits = module(given)
            first = logits.detach().clone()
            loss = vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=VOCAB)
            grads = torch.autograd.grad(loss, [given, *block.parameters()])
        results.append((first, grads, dict(counter)))
    (logits, grads, counted), (actual, actual_grads, actual_counted) = results
    assert actual_counted == counted, "the graph makes the same collectives"
    names = ["x", *(name for name, _ in block.named_parameters())]
    if engine == "aot_eager" and sequence_parallel:
        assert_equal(actual, logits, "logits")
        for name, grad, expected in zip(names, actual_grads, grads, strict=True):
            assert_equal(grad, expected, f"d{name}")
    else:
        # Inductor, or a backend that is found while tracing, sums in another order.
        torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-5)
        for name, grad, expected in zip(names, actual_grads, grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_block_in_one_graph(ranks, sequence_parallel):
    run_ranks(compiled, ranks, sequence_parallel, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_block_in_one_graph_by_inductor(sequence_parallel):
    run_ranks(compiled, 2, sequence_parallel, "inductor", timeout_s=300.0)


def drops(group: Group) -> None:
    module = SequenceParallelDropout(0.4, group=group)
    x = normals(2, sequence_sizes(LENGTH, group)[group.rank], H, seed=1)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        y = call(given, length=LENGTH)
        (grad,) = torch.autograd.grad(y, given, torch.ones_like(y))
        results.append((y.detach(), grad))
    for name, actual, expected in zip(("y", "dx"), results[1], results[0], strict=True):
        assert_equal(actual, expected, name)
    x = normals(2, 3, H, seed=1, dtype=torch.bfloat16)
    arguments = (x, 0.4, torch.tensor(5), LENGTH, 2)
    torch.library.opcheck(torch.ops.pyparallel.dropout.default, arguments)


def test_dropout_in_one_graph():
    run_ranks(drops, 2)


def operators(group: Group) -> None:
    sizes, handle = sequence_sizes(LENGTH, group), group.handle
    weight, bias = normals(5, 4, seed=1), normals(5, seed=2)
    for lead in ((2,), ()):
        shard = normals(*lead, sizes[group.rank], 4, seed=3)
        whole = normals(*lead, LENGTH, 4, seed=4)
        for operator, x in (
            (torch.ops.pyparallel.all_gather_linear, shard),
            (torch.ops.pyparallel.linear_reduce_scatter, whole),
        ):
            for given_bias in (bias, None):
                torch.library.opcheck(operator.default, (x, weight, given_bias, sizes, handle))


def test_opcheck():
    run_ranks(operators, 2)
