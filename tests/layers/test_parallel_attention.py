"""ParallelAttention against attention written out: forward, every gradient, caches, masks."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyparallel.comm.collectives import count_collectives
from pyparallel.comm.group import Group
from pyparallel.layers import ParallelAttention, RotaryEmbedding
from pyparallel.layers.span import Span
from pyparallel.testing import (
    assert_as_dense,
    assert_equal,
    dense_attention,
    normals,
    own,
    run_ranks,
)
from tests.orders import farthest

EMBED, HEAD_DIM = 18, 4
# MHA, GQA, SmolLM2's uneven heads, replicated KV heads and MQA; with every option in turn.
CASES = (
    {"num_heads": 4, "num_kv_heads": 4, "bias": True, "causal": False},
    {"num_heads": 9, "num_kv_heads": 3, "causal": True, "rotary_dim": 4},
    {"num_heads": 8, "num_kv_heads": 2, "bias": True, "causal": True, "rotary_dim": 2},
    {"num_heads": 5, "num_kv_heads": 1, "causal": True, "window": 3},
    {"num_heads": 8, "num_kv_heads": 2, "causal": True, "rotary_dim": 4, "qk_norm": True},
)


class Twin:
    """A parallel module and the dense weights it holds its part of."""

    def __init__(self, case: dict, group: Group, dtype: torch.dtype) -> None:
        heads, kv_heads = case["num_heads"], case["num_kv_heads"]
        self.norm, bias = case.get("qk_norm", False), case.get("bias", False)
        rotary_dim = case.get("rotary_dim")
        rotary = RotaryEmbedding(rotary_dim) if rotary_dim else None
        self.options = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "causal": case["causal"],
            "window": case.get("window"),
            "frequencies": rotary.frequencies if rotary else None,
        }
        rows = (heads + 2 * kv_heads) * HEAD_DIM
        self.weights = {
            "qkv": normals(rows, EMBED, seed=1, dtype=dtype, scale=0.3),
            "out": normals(EMBED, heads * HEAD_DIM, seed=2, dtype=dtype, scale=0.3),
        }
        if bias:
            self.weights |= {
                "qkv_bias": normals(rows, seed=3, dtype=dtype),
                "out_bias": normals(EMBED, seed=4, dtype=dtype),
            }
        if self.norm:
            self.weights |= {
                "q_norm": normals(HEAD_DIM, seed=5, dtype=dtype),
                "k_norm": normals(HEAD_DIM, seed=6, dtype=dtype),
            }
        self.module = ParallelAttention(
            EMBED,
            heads,
            bias,
            dtype=dtype,
            group=group,
            num_kv_heads=kv_heads,
            head_dim=HEAD_DIM,
            causal=case["causal"],
            rotary=rotary,
            qk_norm_eps=1e-6 if self.norm else None,
            window=case.get("window"),
        )
        self.module.qkv_proj.load_dense(
            {"weight": self.weights["qkv"], "bias": self.weights.get("qkv_bias")}
        )
        self.module.out_proj.load_dense(
            {"weight": self.weights["out"], "bias": self.weights.get("out_bias")}
        )
        if self.norm:
            self.module.q_norm.weight.data = self.weights["q_norm"].clone()
            self.module.k_norm.weight.data = self.weights["k_norm"].clone()

    def dense(self, x: torch.Tensor, dtype: torch.dtype, **options) -> torch.Tensor:
        weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        return dense_attention(x.to(dtype), weights, **self.options, **options)

    def dense_with_grads(self, x, dy, dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = {"x": x, **self.weights}
        inputs = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        weights = {name: inputs[name] for name in self.weights}
        y = dense_attention(inputs["x"], weights, **self.options)
        grads = torch.autograd.grad(y, list(inputs.values()), dy.to(dtype))
        return y.detach(), dict(zip(inputs, grads, strict=True))

    def parameters(self) -> dict[str, tuple[nn.Parameter, object, str]]:
        """Each dense weight's name: this rank's part, the module it is in, and its name there."""
        qkv, out = self.module.qkv_proj, self.module.out_proj
        found = {"qkv": (qkv.weight, qkv, "weight"), "out": (out.weight, out, "weight")}
        if qkv.bias is not None:
            found |= {"qkv_bias": (qkv.bias, qkv, "bias"), "out_bias": (out.bias, out, "bias")}
        if self.norm:
            found["q_norm"] = (self.module.q_norm.weight, None, "weight")
            found["k_norm"] = (self.module.k_norm.weight, None, "weight")
        return found


def forward_and_gradients(group: Group, cases, batch: int, length: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases:
            twin = Twin(case, group, dtype)
            x = normals(batch, length, EMBED, seed=7, dtype=dtype).requires_grad_()
            dy = normals(batch, length, EMBED, seed=8, dtype=dtype)
            truth, truth_grads = twin.dense_with_grads(x, dy, torch.float64)
            dense, dense_grads = farthest(
                partial(twin.dense_with_grads, x, dy, dtype), (truth, truth_grads)
            )
            with count_collectives() as forward:
                y = twin.module(x)
            parameters = twin.parameters()
            with count_collectives() as backward:
                grads = torch.autograd.grad(y, [x, *(p for p, _, _ in parameters.values())], dy)
            what = f"{dtype} {case}"
            assert_as_dense(y, dense, truth, group.size, what)
            for name, grad in zip(("x", *parameters), grads, strict=True):
                pair, part = (dense_grads[name], truth_grads[name]), None
                if name != "x" and parameters[name][1] is not None:
                    _, module, local = parameters[name]
                    part = partial(own, module, local, group=group)
                assert_as_dense(grad, *pair, group.size, f"{what} d{name}", part=part)
            replicated = twin.module.qkv_proj.layout.replicated
            sums = 1 + replicated * (1 + case.get("bias", False)) + 2 * twin.norm
            assert forward["all_reduce"] == (group.size > 1), what
            assert backward["all_reduce"] == (sums if group.size > 1 else 0), (what, backward)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_dense(ranks):
    run_ranks(forward_and_gradients, ranks, CASES, 2, 7)


@st.composite
def head_cases(draw) -> tuple[int, list[dict]]:
    ranks = draw(st.integers(2, 4))
    cases = []
    for _ in range(3):
        kv_heads = draw(st.integers(1, 4))
        # Every replica of a KV head needs a query head of its own.
        least = -(-ranks // kv_heads)
        heads = kv_heads * draw(st.integers(least, 4))
        cases.append({"num_heads": heads, "num_kv_heads": kv_heads, "causal": draw(st.booleans())})
    return ranks, cases


@settings(max_examples=4)
@given(drawn=head_cases(), batch=st.integers(1, 3), length=st.integers(1, 9))
def test_any_heads(drawn, batch, length):
    ranks, cases = drawn
    run_ranks(forward_and_gradients, ranks, cases, batch, length)


def cached(group: Group) -> None:
    """Tokens one by one, in chunks, and in sequences of uneven length: the same as all at once."""
    for case in CASES[1:]:
        twin = Twin(case, group, torch.float32)
        module, rotary, window = twin.module, twin.module.rotary, case.get("window")
        x = normals(2, 7, EMBED, seed=7)
        truth = twin.dense(x, torch.float64)
        dense = farthest(partial(twin.dense, x, torch.float32), truth)
        with torch.no_grad():
            cache = module.new_cache(2, 7)
            chunks = []
            for start, stop in ((0, 3), (3, 5), (5, 6), (6, 7)):
                span = Span.of([start, start], stop - start, rotary=rotary)
                chunks.append(module(x[:, start:stop], span=span, cache=cache))
            assert_as_dense(torch.cat(chunks, 1), dense, truth, group.size, f"chunks {case}")

            # The second sequence is one token shorter: its tokens stand one place earlier.
            cache = module.new_cache(2, 7)
            module(x[:, :4], span=Span.of([0, 0], 4, rotary=rotary), cache=cache)
            for place in (4, 5, 6):
                step = torch.stack([x[0, place], x[1, place - 1]]).unsqueeze(1)
                span = Span.of([place, place - 1], 1, rotary=rotary, window=window)
                y = module(step, span=span, cache=cache)
                for row, at in ((0, place), (1, place - 1)):
                    assert_as_dense(
                        y[row, 0],
                        dense,
                        truth,
                        group.size,
                        f"uneven {case}",
                        part=lambda t, row=row, at=at: t[row, at],
                    )
            with pytest.raises(ValueError, match="position 7 does not fit its 7 slots"):
                module(x[:, :1], span=Span.of([7, 7], 1, rotary=rotary), cache=cache)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_cache_gives_what_the_whole_sequence_does(ranks):
    run_ranks(cached, ranks)


def masked(group: Group) -> None:
    twin = Twin(CASES[0], group, torch.float32)
    x = normals(2, 6, EMBED, seed=7)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    truth = twin.dense(x, torch.float64, mask=mask)
    dense = farthest(partial(twin.dense, x, torch.float32, mask=mask), truth)
    assert_as_dense(twin.module(x, mask=mask), dense, truth, group.size, "mask")
    assert not torch.allclose(twin.module(x), truth.float(), atol=1e-3)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_mask_hides_padding(ranks):
    run_ranks(masked, ranks)


def torch_twin(group: Group) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 6, batch_first=True)
    nn.init.normal_(dense.in_proj_bias)
    module = ParallelAttention.from_dense(dense, group=group)
    x = normals(2, 5, 12, seed=1)
    truth = copy.deepcopy(dense).double()(x.double(), x.double(), x.double())[0]
    plain = farthest(lambda: dense(x, x, x)[0], truth)
    assert_as_dense(module(x), plain, truth, group.size, "nn.MultiheadAttention")
    assert_equal(copy.deepcopy(module)(x), module(x), "deepcopy")
    assert copy.deepcopy(module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        options = {"group": group, "causal": True}
        meta = ParallelAttention(12, 6, rotary=RotaryEmbedding(2), **options)
    torch.manual_seed(3)
    real = ParallelAttention(12, 6, rotary=RotaryEmbedding(2), **options)
    meta.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert_equal(meta(x), real(x), "meta, then loaded")


@pytest.mark.parametrize("ranks", [1, 4])
def test_replaces_torchs_module(ranks):
    run_ranks(torch_twin, ranks)


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"add_zero_attn": True}, {"kdim": 6}])
def test_what_it_has_not_is_refused(option):
    dense = nn.MultiheadAttention(12, 6, batch_first=True, **option)
    with pytest.raises(ValueError, match=r"dropout|add_zero_attn|qkv_same_embed_dim"):
        ParallelAttention.from_dense(dense, group=Group.single())
    with pytest.raises(ValueError, match="batch_first: expected True"):
        ParallelAttention.from_dense(nn.MultiheadAttention(12, 6), group=Group.single())
    added = nn.MultiheadAttention(12, 6, batch_first=True, add_bias_kv=True)
    with pytest.raises(ValueError, match="bias_k: expected None"):
        ParallelAttention.from_dense(added, group=Group.single())
