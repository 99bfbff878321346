import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal

from pyparallel import reference
from pyparallel.kernels.attention.attention import attention

LAYOUTS = [
    # B, S, T, N, G, D
    (1, 1, 1, 1, 1, 16),
    (2, 17, 17, 3, 3, 64),
    (1, 37, 53, 4, 2, 80),
    (1, 20, 45, 3, 1, 33),
]


def inputs(shape, dtype, device):
    b, s, t, n, g, d = shape
    q = normal(b, s, n, d, dtype=dtype, device=device)
    k = normal(b, t, g, d, dtype=dtype, device=device, seed=1)
    v = normal(b, t, g, d, dtype=dtype, device=device, seed=2)
    return q, k, v


def check(got, q, k, v, **mask):
    """p is rounded to v's dtype before the second product, o once more at the end."""
    o, lse = got
    dtype, terms = q.dtype, q.shape[-1] + k.shape[1] + 40
    truth, truth_lse = reference.attention(q.double(), k.double(), v.double(), **mask)
    size = v.double().abs().amax()
    scores = q.double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax()
    fp32 = UNIT[torch.float32] * terms * (1 + scores / q.shape[-1] ** 0.5)
    assert_within(o, truth, 2 * UNIT[dtype] * (truth.abs() + size) + fp32 * size, "o")
    none = truth_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, none)
    seen = ~none
    assert_within(lse[seen], truth_lse[seen].float(), 4 * fp32, "lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
def test_causal_and_full(dtype, shape, causal, device):
    q, k, v = inputs(shape, dtype, device)
    check(attention(q, k, v, causal=causal), q, k, v, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 7, 16, 30, 100])
def test_sliding_window(window, causal, device):
    q, k, v = inputs((1, 50, 61, 2, 1, 16), torch.float32, device)
    mask = {"causal": causal, "window": window}
    check(attention(q, k, v, **mask), q, k, v, **mask)


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(d, dtype, device):
    q, k, v = inputs((2, 33, 40, 4, 2, d), dtype, device)
    check(attention(q, k, v, causal=True), q, k, v, causal=True)


def test_queries_before_every_key_see_nothing(device):
    q, k, v = inputs((1, 40, 5, 2, 2, 16), torch.float32, device)
    o, lse = attention(q, k, v, causal=True)
    assert (o[:, :35] == 0).all() and (lse[:, :, :35] == -torch.inf).all()
    check((o, lse), q, k, v, causal=True)
    o, lse = attention(q, k[:, :0], v[:, :0])
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_scale_and_views_of_a_fused_projection(device):
    fused = normal(2, 19, 8 * 16, device=device).view(2, 19, 8, 16)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    got = attention(q, k, v, causal=True, scale=0.3)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True, scale=0.3)
    assert torch.equal(got[0], expected[0])
    check(got, q, k, v, causal=True, scale=0.3)


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_is_each_sequence_by_itself(causal, device):
    lengths_q, lengths_k = [5, 0, 18, 1], [9, 3, 18, 0]
    q, k, v = inputs((1, 24, 30, 4, 2, 16), torch.float32, device)
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(ls).cumsum(0)], dtype=torch.int32, device=device)
        for ls in (lengths_q, lengths_k)
    )
    o, lse = attention(
        q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=18
    )
    for i in range(4):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if lengths_q[i]:
            alone = attention(q[:, rows], k[:, keys], v[:, keys], causal=causal)
            assert torch.equal(o[:, rows], alone[0])
            assert torch.equal(lse[:, :, rows], alone[1])


def test_parts_merge_through_lse(device):
    """Context parallelism's sum: two halves of the keys merge into the whole."""
    q, k, v = inputs((1, 12, 32, 2, 2, 16), torch.float32, device)
    parts = [attention(q, k[:, i : i + 16], v[:, i : i + 16]) for i in (0, 16)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (part - lse).exp().transpose(1, 2)[..., None] for o, part in parts)
    check((merged, lse), q, k, v)


def test_bad_input(device):
    q, k, v = inputs((1, 4, 4, 3, 2, 16), torch.float32, device)
    with pytest.raises(ValueError, match="number of heads dividing 3, got 2"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="v: expected shape"):
        attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="head size of 1 to 256, got 300"):
        attention(*(normal(1, 4, 2, 300, device=device) for _ in range(3)))
    with pytest.raises(ValueError, match="window: expected at least 1"):
        attention(q, k[:, :, :1], v[:, :, :1], window=0)
    with pytest.raises(ValueError, match="both of cu_seqlens_q and cu_seqlens_k"):
        attention(
            q,
            k[:, :, :1],
            v[:, :, :1],
            cu_seqlens_q=torch.zeros(2, dtype=torch.int32, device=device),
        )
