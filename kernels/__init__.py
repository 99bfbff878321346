"""Triton kernels: pointers, strides and sizes only; no groups, no modules.

Each file holds one operation: its kernels, a destination-passing launcher and an
allocating function above it. Groups and autograd live in the package above.

On CPU tensors the kernels run in Triton's interpreter, which must be chosen before
Triton is first imported. A process that asks for this backend by name and has no GPU
gets it chosen here.
"""

from __future__ import annotations

import os
import sys

import torch


def _choose_interpreter() -> None:
    asked = os.environ.get("PYPARALLEL_BACKEND", "").strip().lower() == "triton"
    if asked and not torch.cuda.is_available() and "triton.language" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


_choose_interpreter()
