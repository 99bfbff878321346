"""QKVParallelLinear against three dense projections: even heads, GQA, replicated KV heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import QKVParallelLinear
from pyparallel.testing import assert_equal, integers, own, run_ranks

# (heads, KV heads): MHA, GQA that divides, SmolLM2's, MQA, replicas beside a sole holder.
HEADS = ((4, 4), (8, 4), (9, 3), (4, 1), (8, 2), (12, 3))
HEAD_DIM, EMBED = 3, 7


def exact(group: Group) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for index, (heads, kv_heads) in enumerate(HEADS):
            bias = index % 2 == 0
            what = f"{dtype} N={heads} G={kv_heads} bias={bias}"
            dense = [
                nn.Linear(EMBED, count * HEAD_DIM, bias, dtype=dtype)
                for count in (heads, kv_heads, kv_heads)
            ]
            for seed, linear in enumerate(dense):
                for parameter in linear.parameters():
                    parameter.data = integers(*parameter.shape, seed=seed, dtype=dtype)
            module = QKVParallelLinear.from_dense(*dense, head_dim=HEAD_DIM, group=group)
            x = integers(2, 3, EMBED, seed=7, dtype=dtype).requires_grad_()
            with count_collectives() as forward:
                outputs = module(x)
            assert not forward, what

            layout = module.layout
            # A replica's gradients come from its own query heads only: each rank gives another part,
            # and the dense gradient is their sum.
            own_heads = (layout.query, layout.kv, layout.kv)
            dense_outputs = [linear(x).unflatten(-1, (-1, HEAD_DIM)) for linear in dense]
            parts, total = [], [torch.zeros_like(y) for y in dense_outputs]
            for rank in range(group.size):
                for which, held in enumerate(own_heads):
                    start, stop = held[rank]
                    shape = (2, 3, stop - start, HEAD_DIM)
                    part = integers(*shape, seed=10 * rank + which, dtype=dtype)
                    total[which][:, :, start:stop] += part
                    if rank == group.rank:
                        parts.append(part)
                        assert_equal(outputs[which], dense_outputs[which][:, :, start:stop], what)
            dense_params = [p for linear in dense for p in linear.parameters()]
            dense_dx, *dense_grads = torch.autograd.grad(dense_outputs, [x, *dense_params], total)
            with count_collectives() as backward:
                dx, *grads = torch.autograd.grad(outputs, [x, *module.parameters()], parts)
            assert_equal(dx, dense_dx, what + " dx")
            per_linear = 2 if bias else 1
            for index_, name in enumerate(("weight", "bias")[:per_linear]):
                fused = torch.cat(dense_grads[index_::per_linear])
                assert_equal(grads[index_], own(module, name, fused, group), f"{what} d{name}")
            # One for dx; a replicated parameter's gradient is summed over its replicas.
            expected = 1 + per_linear * layout.replicated if group.size > 1 else 0
            assert backward["all_reduce"] == expected, (what, backward)
            assert (
                sum(count for name, count in backward.items() if isinstance(name, str)) == expected
            )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense_exactly_on_integers(ranks):
    run_ranks(exact, ranks)


def seeded(group: Group) -> None:
    torch.manual_seed(5)
    fused = nn.Linear(EMBED, (4 + 2 * 2) * HEAD_DIM)
    torch.manual_seed(5)
    module = QKVParallelLinear(EMBED, 4, 2, HEAD_DIM, group=group)
    assert_equal(module.weight, own(module, "weight", fused.weight, group), "seeded")
    x = integers(2, EMBED, seed=1)
    for actual, expected in zip(copy.deepcopy(module)(x), module(x), strict=True):
        assert_equal(actual, expected, "deepcopy")
    meta = QKVParallelLinear(EMBED, 4, 2, HEAD_DIM, device="meta", group=group)
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    for actual, expected in zip(meta(x), module(x), strict=True):
        assert_equal(actual, expected, "meta, then loaded")


def test_the_seed_decides_and_copies_agree():
    run_ranks(seeded, 3)


def test_bad_heads_are_named():
    group = Group.single()
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=4, got 7"):
        QKVParallelLinear(7, 4, group=group)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads=4, got 3"):
        QKVParallelLinear(8, 4, 3, group=group)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads=4, got 0"):
        QKVParallelLinear(8, 4, 0, group=group)
