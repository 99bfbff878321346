"""``nn.Embedding`` with its rows cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.cut.shard import Sharding, even_parts
from pyparallel.cut.shares import Parts
from pyparallel.layers.parameters import ShardedModule
from pyparallel.ops.packed_linear import packed_embedding
from pyparallel.ops.vocab_parallel_embedding import vocab_parallel_embedding


def vocab_sharding(vocab_size: int, parts: Parts) -> Sharding:
    """How the embedding and the LM head, which may be tied, cut the vocabulary."""
    return even_parts(vocab_size, parts)


class VocabParallelEmbedding(ShardedModule):
    """A lookup table whose rows are cut over the group.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            device, dtype: as in ``nn.Embedding``; ``max_norm`` must be None.
        group: the ranks; torch's own objects are taken too.
        sequence_parallel: y is this rank's tokens.

    Shapes:
        ids [..., S], int64; y [..., S, H] replicated, or [..., S_r, H] with ``sequence_parallel``.
        ``weight`` [V_r, H].

    Communication: one all-reduce forward, none backward. With ``sequence_parallel`` one reduce-scatter
    forward, one all-gather backward.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        sequence_parallel: bool = False,
    ) -> None:
        if max_norm is not None:
            raise ValueError(
                f"max_norm: expected None, got {max_norm}; renormalise the table before sharding it"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx: expected an id below {num_embeddings}, got {padding_idx}"
            )
        group = group_of(group)
        super().__init__(group)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.sequence_parallel = sequence_parallel
        sharding = vocab_sharding(num_embeddings, group.shares)
        self.start = sharding.ranges[group.rank][0][0]
        self.add_shard("weight", (num_embeddings, embedding_dim), sharding, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_dense(
        cls, embedding: nn.Embedding, *, group: GroupLike, sequence_parallel: bool = False
    ) -> VocabParallelEmbedding:
        """The parallel twin of ``embedding``."""
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            "meta",
            embedding.weight.dtype,
            group=group,
            sequence_parallel=sequence_parallel,
        ).load_dense(embedding)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Embedding`` does: the same seed gives slices of the dense table."""
        if self.weight.is_meta:
            return
        weight = self.weight
        dense = torch.empty(self.dense_shapes["weight"], device=weight.device, dtype=weight.dtype)
        dense.normal_()
        if self.padding_idx is not None:
            dense[self.padding_idx].fill_(0)
        with torch.no_grad():
            weight.copy_(self.split_dense("weight", dense))

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.size > 1:
            # An id that no rank holds would come back as zeros. Asynchronous: no device waits for it.
            held = (ids >= 0) & (ids < self.num_embeddings)
            torch._assert_async(held.all(), f"ids: expected 0 <= id < {self.num_embeddings}")
        if (packed := self.packed) is not None:
            return packed_embedding(ids, packed, start=self.start, group=self.group)
        return vocab_parallel_embedding(
            ids,
            self.weight,
            start=self.start,
            group=self.group,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            sequence_parallel=self.sequence_parallel,
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, local={self.weight.shape[0]}, {self.group}"
