"""Rows of the Triton kernels, with the gradients that autograd wants of them: one file an op.

On CUDA and ROCm tensors the automatic choice takes them; a plain matmul it leaves to torch, whose vendor
library is the one to beat there. On CPU tensors they run in Triton's interpreter, and only where
``triton`` is asked for by name. The equations are in the files of :mod:`pyparallel.kernels`.
"""

from __future__ import annotations

from torch import Tensor

from pyparallel.native import FLOATS
from pyparallel.native.triton import reason_against as reason  # noqa: F401


def dtype_reason(x: Tensor) -> str | None:
    """Why the kernels can't take a tensor of this dtype, or None."""
    return None if x.dtype in FLOATS else f"the kernels take fp32, fp16 and bf16, not {x.dtype}"


def flat(x: Tensor) -> Tensor:
    """[..., H] as rows, also where there are none."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
