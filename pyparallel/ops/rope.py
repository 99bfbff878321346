"""Rotary position embedding; see :func:`pyparallel.reference.rope` for the equation."""

from __future__ import annotations

from pyparallel import reference

run_torch = run_reference = reference.rope
