"""Differentiable operations on shards, and the rows of the op x backend table: see
:mod:`pyparallel.backend` for where an op's rows lie."""
