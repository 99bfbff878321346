"""Rotary position embedding; see :func:`pyparallel.reference.rope` for the equation."""

from __future__ import annotations

from pyparallel import backend, reference

backend.register("rope", "torch")(reference.rope)
backend.register("rope", "reference")(reference.rope)
