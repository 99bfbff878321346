"""What launchers need to know of the machine, and the checks that they share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

# Triton's interpreter takes the place of the compiler when TRITON_INTERPRET=1 was set
# before the first import of triton; it runs on CPU tensors, one program after another.
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


@lru_cache(maxsize=16)
def _device_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(tensor: torch.Tensor) -> str:
    """The name under which configurations are kept: "sm_90", "gfx942" or "interpreter"."""
    if tensor.device.type == "cpu":
        return "interpreter"
    return _device_architecture(tensor.device.index or 0)


@lru_cache(maxsize=16)
def _num_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def num_processors(tensor: torch.Tensor) -> int:
    """Programs of a persistent kernel that run at once. The interpreter gets two, so that
    a small test has programs with several tiles and programs with none."""
    if tensor.device.type == "cpu":
        return 2
    return _num_processors(tensor.device.index or 0)


def check_runnable(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless the tensors lie on one device that Triton can run on now."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"{name}: expected tensors on one device, got {found}; move them together")
    device = devices.pop()
    if device.type == "cpu" and not INTERPRETING:
        raise ValueError(
            f"{name}: expected CUDA tensors, got cpu; on CPU the kernels run in Triton's "
            "interpreter: set TRITON_INTERPRET=1 (or PYPARALLEL_BACKEND=triton) before import"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected cuda or cpu tensors, got {device.type}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name}: expected one of {names}, got {tensor.dtype}; cast it first")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def check_last_contiguous(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected the last dimension contiguous, got strides {tensor.stride()}; "
            "call .contiguous()"
        )


def as_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [rows, H] without a copy; ValueError where strides do not allow it."""
    check_last_contiguous(name, tensor)
    try:
        return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(
            0, tensor.shape[-1]
        )
    except RuntimeError:
        raise ValueError(
            f"{name}: expected leading dimensions that fold into rows, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}; call .contiguous()"
        ) from None


def next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def cdiv(value: int, divisor: int) -> int:
    return -(-value // divisor)
