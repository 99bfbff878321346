"""What tests of whole decoders on CPU ranks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyparallel import _C
from pyparallel.decoding.cpu_decoder import CPUDecoder

# Narrowest first.
ISAS = ("plain", "avx2", "avx512", "avx512_bf16")

# Where the kernels take activations as integers, these have 4 fp32 roundings' error, 2^-22 of a block's
# largest (csrc/cpu/kernels/gguf_fixed_point.inl): how many times a dense model's error in fp32 is
# allowed.
FIXED_POINT = 4


def engine_logits(decoder: CPUDecoder, ids: Sequence[int], prefilled: int) -> Tensor:
    """This rank's logits after token ``prefilled`` - 1 and every later one, prefilled and decoded."""
    decoder.start(1, len(ids))
    decoder.prefill(ids[:prefilled])
    rows = [decoder.logits().clone()]
    for position in range(prefilled, len(ids)):
        decoder.decode([ids[position]], rows=[0], positions=[position])
        rows.append(decoder.logits().clone())
    return torch.cat(rows)


class KeptIn(TorchDispatchMode):
    """A model in fp32 rounds what the C++ decoder of a model in ``dtype`` rounds beside fp32 itself.

    Keys and values are as the cache holds them; in bf16, where the processor multiplies in that type and
    a prefill does, so are the activations that enter a matmul. Weights are taken as they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # Which arguments of an operation are rounded.
        kept = {
            torch.ops.aten.bmm.default: (1,),
            torch.ops.aten.baddbmm.default: (2,),
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (1, 2),
        }
        multiplied = {torch.ops.aten.mm.default: (0,), torch.ops.aten.addmm.default: (1,)}
        multiplies = dtype is torch.bfloat16 and _C.isa_in_use() == "avx512_bf16"
        self.rounded = kept | multiplied if multiplies else kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (places := self.rounded.get(func)) is not None:
            given = enumerate(args)
            args = tuple(a.to(self.dtype).to(a.dtype) if i in places else a for i, a in given)
            return func(*args, **kwargs)
        # Under inference mode autograd doesn't take composite ops apart.
        with self:
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor has."""
    return ISAS[: ISAS.index(_C.isa()) + 1]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _C.isa_in_use()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)
