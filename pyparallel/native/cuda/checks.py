"""What the CUDA ops ask of their arguments, said in one line before the kernels are reached.

The C++ side checks again, for callers of `torch.ops.pyparallel`; there an error is a RuntimeError, as
torch's ABI hands exceptions on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.native import FLOATS


def check_matrix(
    name: str, tensor: Tensor, shape: tuple[int, int] | None = None, *, contiguous: bool = False
) -> tuple[int, int]:
    """Rows and columns of a matrix with dense rows; ValueError for anything else, or another shape."""
    if tensor.dim() != 2 or (shape is not None and tuple(tensor.shape) != shape):
        expected = "a matrix [M, N]" if shape is None else f"[{shape[0]}, {shape[1]}]"
        raise ValueError(
            f"{name}: expected {expected}, got {list(tensor.shape)}; reshape it, or check the others"
        )
    dense = tensor.is_contiguous() if contiguous else tensor.shape[1] <= 1 or tensor.stride(1) == 1
    if not dense:
        what = "a contiguous matrix" if contiguous else "contiguous rows"
        raise ValueError(
            f"{name}: expected {what}, got strides {list(tensor.stride())}; call .contiguous()"
        )
    return tensor.shape[0], tensor.shape[1]


def check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    """ValueError unless it is a contiguous [length]; None passes."""
    if tensor is None:
        return
    if tensor.dim() != 1 or tensor.shape[0] != length or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous [{length}], got {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}; check the other shapes, or call .contiguous()"
        )


def check_dtypes(**tensors: Tensor | None) -> None:
    """ValueError unless all are of the first one's dtype, and that is one the kernels take."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, like = next(iter(given.items()))
    if like.dtype not in FLOATS:
        raise ValueError(
            f"{first}: expected float32, float16 or bfloat16, got {like.dtype}; call .to()"
        )
    for name, tensor in given.items():
        check_dtype(name, tensor, like.dtype)


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """ValueError unless it is of that dtype."""
    if tensor.dtype != expected:
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}; call .to({expected})")


def check_devices(**tensors: Tensor | None) -> None:
    """ValueError unless all lie on one GPU (or have no memory yet, where a graph is traced)."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given.values())).device
    for name, tensor in given.items():
        if tensor.device.type not in ("cuda", "meta") or tensor.device != first:
            where = first if first.type == "cuda" else "a GPU"
            raise ValueError(
                f"{name}: expected a tensor on {where}, got one on {tensor.device}; call .to(device)"
            )
