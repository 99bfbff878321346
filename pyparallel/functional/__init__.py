"""Differentiable operations on shards. Importing this fills the op x backend table."""

from pyparallel.functional import (  # noqa: F401
    activation,
    all_gather_linear,
    attention,
    attention_with_lse,
    column_parallel_linear,
    dropout,
    linear,
    linear_reduce_scatter,
    norm,
    replicated_parameter,
    rope,
    row_parallel_linear,
    vocab_parallel_embedding,
)
