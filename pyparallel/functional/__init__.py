"""Differentiable operations on shards. Importing this fills the op x backend table."""

from pyparallel.functional import (  # noqa: F401
    activation,
    all_gather_linear,
    attention,
    attention_with_lse,
    column_parallel_linear,
    cross_entropy_shard,
    cuda_kernels,
    dropout,
    linear,
    linear_reduce_scatter,
    norm,
    replicated_parameter,
    rope,
    row_parallel_linear,
    shared_memory_linear,
    triton_ops,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)
