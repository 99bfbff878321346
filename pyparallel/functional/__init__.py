"""Differentiable operations on shards. Importing this fills the op x backend table."""

from pyparallel.functional import (  # noqa: F401
    activation,
    attention,
    column_parallel_linear,
    linear,
    norm,
    replicated_parameter,
    rope,
    row_parallel_linear,
    vocab_parallel_embedding,
)
