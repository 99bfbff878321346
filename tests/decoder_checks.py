"""What tests of whole decoders on CPU ranks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

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
