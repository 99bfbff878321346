import pytest
import torch
from helpers import DTYPES, UNIT, assert_within, normal

from pyparallel import backend, reference
from pyparallel.kernels.attention.attention_decode import attention_decode, split_size_of


def truth_of(q, k, v, lengths, window=None):
    """Each sequence alone, its query at its last key."""
    pairs = []
    for b, length in enumerate(lengths.tolist()):
        one = q[b][None, None].double()
        keys, values = k[b : b + 1, :length].double(), v[b : b + 1, :length].double()
        o, lse = reference.attention(one, keys, values, causal=True, window=window)
        pairs.append((o[0, 0], lse[0, :, 0]))
    return [torch.stack(t) for t in zip(*pairs, strict=True)]


def check(got, q, k, v, lengths, window=None):
    truth, truth_lse = truth_of(q, k, v, lengths, window)
    size = v.double().abs().amax()
    unit = 2 * UNIT[q.dtype]
    assert_within(got[0], truth, unit * (truth.abs() + size) + 2e-5 * size, "o")
    none = truth_lse == -torch.inf
    assert torch.equal(got[1] == -torch.inf, none)
    assert_within(got[1][~none], truth_lse[~none].float(), 1e-4, "lse")


def inputs(b, t, n, g, d, dtype=torch.float32, device="cpu"):
    q = normal(b, n, d, dtype=dtype, device=device)
    k = normal(b, t, g, d, dtype=dtype, device=device, seed=1)
    return q, k, normal(b, t, g, d, dtype=dtype, device=device, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (3, 75, 6, 2, 80), (2, 40, 20, 1, 64)])
@pytest.mark.parametrize("split_size", [32, None])
def test_contiguous_cache(dtype, shape, split_size, device):
    q, k, v = inputs(*shape, dtype, device)
    lengths = torch.tensor([shape[1], 1, shape[1] // 2 + 1][: shape[0]], dtype=torch.int32)
    lengths = lengths.to(device)
    check(attention_decode(q, k, v, lengths, split_size=split_size), q, k, v, lengths)


@pytest.mark.parametrize("window", [1, 9, 64])
def test_sliding_window(window, device):
    q, k, v = inputs(2, 90, 2, 1, 16, device=device)
    lengths = torch.tensor([90, 41], dtype=torch.int32, device=device)
    got = attention_decode(q, k, v, lengths, window=window, split_size=32)
    check(got, q, k, v, lengths, window)


@pytest.mark.parametrize("page_size", [1, 8, 24])
def test_paged_cache_has_the_bits_of_the_contiguous_one(page_size, device):
    q, k, v = inputs(3, 48, 4, 2, 16, device=device)
    lengths = torch.tensor([48, 0, 29], dtype=torch.int32, device=device)
    pages = 48 // page_size
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(1)).to(device)
    table = order.view(3, pages).to(torch.int32)
    # Entries past a sequence's end are never read.
    table[1] = 2**30
    pool = [torch.full((3 * pages, page_size, 2, 16), torch.nan, device=device) for _ in "kv"]
    for source, paged in zip((k, v), pool, strict=True):
        paged[order] = source.reshape(3 * pages, page_size, 2, 16)
    got = attention_decode(q, *pool, lengths, block_table=table, split_size=16)
    expected = attention_decode(q, k, v, lengths, split_size=16)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert (got[0][1] == 0).all() and (got[1][1] == -torch.inf).all()
    check(got, q, k, v, lengths)


def test_bits_do_not_depend_on_the_batch(device):
    q, k, v = inputs(3, 70, 4, 2, 16, device=device)
    lengths = torch.tensor([70, 33, 64], dtype=torch.int32, device=device)
    whole = attention_decode(q, k, v, lengths, split_size=32)
    alone = attention_decode(q[1:2], k[1:2], v[1:2], lengths[1:2], split_size=32)
    assert torch.equal(whole[0][1:2], alone[0])


def test_split_sizes_fill_the_cache():
    for capacity in (1, 255, 256, 5000, 131072, 10**6):
        size = split_size_of(capacity, 64)
        assert size % 64 == 0 and size >= 256 and -(-capacity // size) <= 64


def test_bad_input(device):
    q, k, v = inputs(2, 8, 3, 2, 16, device=device)
    lengths = torch.tensor([8, 8], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="number of heads dividing 3, got 2"):
        attention_decode(q, k, v, lengths)
    with pytest.raises(ValueError, match="lengths: expected one of int32"):
        attention_decode(q, k[:, :, :1], v[:, :, :1], lengths.long())
    with pytest.raises(ValueError, match=r"block_table: expected shape \(2, 4\)"):
        table = torch.zeros(1, 4, dtype=torch.int32, device=device)
        attention_decode(q, k[:, :, :1], v[:, :, :1], lengths, block_table=table)
    assert attention_decode(q[:0], k[:0, :, :1], v[:0, :, :1], lengths[:0])[0].shape == (0, 3, 16)


@pytest.mark.parametrize("window", [None, 5])
def test_the_table_decodes_where_the_cache_lies(window, device, monkeypatch):
    """One query without gradients, keys and values as views of a cache [B, G, slots, D]."""
    q = normal(2, 1, 6, 16, device=device)
    caches = [normal(2, 3, 50, 16, device=device, seed=i) for i in (1, 2)]
    k, v = (cache[:, :, :37].transpose(1, 2) for cache in caches)
    addresses = []
    options = {"causal": True, "scale": 0.3, "window": window}

    def seen(q, k, v, lengths, **more):
        addresses.append((k.data_ptr(), v.data_ptr()))
        return attention_decode(q, k, v, lengths, **more)

    monkeypatch.setattr("pyparallel.ops.triton.attention.attention_decode", seen)
    with backend.use("triton"):
        o = backend.call("attention", q, k, v, **options)
        given = q.clone().requires_grad_()
        differentiable = backend.call("attention", given, k, v, **options)
    assert addresses == [(k.data_ptr(), v.data_ptr())] and differentiable.requires_grad
    truth, _ = reference.attention(q.double(), k.double(), v.double(), **options)
    for got in (o, differentiable):
        assert_within(got, truth, 1e-5 * (1 + truth.abs()), "o")
