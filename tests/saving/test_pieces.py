"""Pieces: together they are the dense tensors, and those that ranks own are each element once."""

from __future__ import annotations

import pytest
import torch

from pyparallel.cut.shard import HeadLayout, even_parts
from pyparallel.models.weights import Source
from pyparallel.saving.pieces import pieces_of

DIM = 4


@pytest.mark.parametrize(("kv_heads", "parts"), [(1, 2), (1, 5), (3, 2), (3, 7), (9, 4)])
@pytest.mark.parametrize("kind", ["fused", "stacked", "transposed", "vocabulary"])
def test_owned_pieces_are_every_element_once(kind: str, kv_heads: int, parts: int) -> None:
    layout = HeadLayout.of(9, kv_heads, parts)
    query, kv = layout.query_sharding(DIM), layout.kv_sharding(DIM)
    found = {
        "fused": (Source("q", query), Source("k", kv), Source("v", kv)),
        "stacked": (Source("qkv", layout.qkv_sharding(DIM)),),
        "transposed": (Source("qkv", layout.qkv_sharding(DIM, dim=1), True),),
        "vocabulary": (Source("table", even_parts(61, parts)),),
    }[kind]
    dense = {
        source.name: torch.rand(
            (6, source.sharding.length) if source.transposed else (source.sharding.length, 6)
        )
        for source in found
    }
    written = {name: torch.zeros_like(value) for name, value in dense.items()}
    for rank in range(parts):
        shards = [source.sharding.split(dense[source.name], rank) for source in found]
        parameter = torch.cat([s.t() if kind == "transposed" else s for s in shards])
        held = 0
        for owned in (False, True):
            for piece in pieces_of(parameter, found, rank, owned=owned):
                assert piece.shape == tuple(dense[piece.name].shape)
                box = tuple(
                    slice(start, start + size)
                    for start, size in zip(piece.offsets, piece.tensor.shape, strict=True)
                )
                assert torch.equal(piece.tensor, dense[piece.name][box])
                assert piece.tensor.untyped_storage().data_ptr() == parameter.data_ptr()
                if owned:
                    written[piece.name][box] += 1
                else:
                    held += piece.tensor.numel()
        assert held == parameter.numel()
    for name, count in written.items():
        assert bool((count == 1).all()), name
