"""What a collective may be given: checked once, with one wording, whatever engine makes the call.

An error is a ValueError of one line that begins ``operation: argument:``, nothing has been sent by then,
and the group is as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("sum", "max", "min")


@dataclass(frozen=True)
class Takes:
    """What an engine takes; None: everything.

    Attributes:
        device: the type of device that its tensors are on, "cpu" or "cuda".
        moved: the types that it carries.
        reduced: the types that it reduces.
    """

    device: str | None = None
    moved: Collection[torch.dtype] | None = None
    reduced: Collection[torch.dtype] | None = None


def check_reduction(operation: str, op: str) -> None:
    if op not in REDUCTIONS:
        raise ValueError(
            f"{operation}: op: expected one of {', '.join(REDUCTIONS)}, got {op!r}; "
            "gather the parts where another is needed"
        )


def check_moved(operation: str, name: str, tensor: Tensor, takes: Takes) -> None:
    """That the tensor's memory can be carried as it is."""
    _check_place(operation, name, tensor, takes)
    if takes.moved is not None and tensor.dtype not in takes.moved:
        raise ValueError(
            f"{operation}: {name}: expected a type of {_names(takes.moved)}, got {tensor.dtype}; "
            "view it as torch.uint8"
        )


def check_reduced(operation: str, name: str, tensor: Tensor, takes: Takes) -> None:
    """That the tensor's elements can be reduced."""
    _check_place(operation, name, tensor, takes)
    if takes.reduced is not None and tensor.dtype not in takes.reduced:
        raise ValueError(
            f"{operation}: {name}: expected a type of {_names(takes.reduced)}, got {tensor.dtype}; "
            "convert it first"
        )


def check_input(operation: str, input: Tensor, output: Tensor, takes: Takes) -> None:
    """That ``input`` is of the kind of ``output``, which has been checked."""
    _check_place(operation, "input", input, takes)
    # Where the engine's device is checked anyway, asking for both again would cost more than all else.
    apart = takes.device is None and input.device != output.device
    if apart or input.dtype != output.dtype:
        raise ValueError(
            f"{operation}: input: expected output's {output.dtype} on {output.device}, got "
            f"{input.dtype} on {input.device}; convert one with .to()"
        )


def part_counts(
    operation: str,
    rank: int,
    size: int,
    whole: tuple[str, Tensor],
    part: tuple[str, Tensor],
    counts: Sequence[int] | None,
) -> list[int]:
    """The elements of every rank's part of ``whole``, of which ``part`` is this rank's.

    Args:
        whole, part: an argument's name and its tensor.
        counts: as given; None: all parts are equal.
    """
    length, own = whole[1].numel(), part[1].numel()
    if counts is None:
        if own * size != length:
            raise ValueError(
                f"{operation}: {whole[0]}: expected {size} x {part[0]}'s {own} elements, got "
                f"{length}; give counts= where the parts are uneven"
            )
        return [own] * size
    checked = _checked_counts(operation, "counts", counts, size, whole[0], length)
    if checked[rank] != own:
        raise ValueError(
            f"{operation}: {part[0]}: expected this rank's counts[{rank}] = {checked[rank]} "
            f"elements, got {own}; give the same counts= on all ranks"
        )
    return checked


def message_counts(
    operation: str, name: str, tensor: Tensor, size: int, counts: Sequence[int] | None
) -> list[int]:
    """The elements of ``tensor`` that go to each rank, or come from it; None: equal parts."""
    length = tensor.numel()
    if counts is None:
        if length % size:
            raise ValueError(
                f"{operation}: {name}: expected a multiple of {size} ranks' elements, got {length}; "
                f"give {name}_counts= where the parts are uneven"
            )
        return [length // size] * size
    return _checked_counts(operation, f"{name}_counts", counts, size, name, length)


def check_source(operation: str, src: int, size: int) -> None:
    if not 0 <= src < size:
        raise ValueError(
            f"{operation}: src: expected a rank from 0 to {size - 1}, got {src}; "
            "name it by its place in the group"
        )


def check_peer(operation: str, name: str, peer: int, rank: int, size: int, group: str) -> None:
    if peer == rank or not 0 <= peer < size:
        has = "one rank" if size == 1 else f"{size} ranks"
        raise ValueError(
            f"{operation}: {name}: expected another rank than this one, {rank}, got {peer}, but the "
            f"group '{group}' has {has}; name it by its place in the group"
        )


def _checked_counts(
    operation: str, name: str, counts: Sequence[int], size: int, whole: str, length: int
) -> list[int]:
    if len(counts) != size or sum(counts) != length or min(counts) < 0:
        raise ValueError(
            f"{operation}: {name}: expected {size} numbers from 0 that sum to {whole}'s {length} "
            f"elements, got {list(counts)}; give one for each rank"
        )
    return list(counts)


def _check_place(operation: str, name: str, tensor: Tensor, takes: Takes) -> None:
    if takes.device is not None and not (
        tensor.is_cpu if takes.device == "cpu" else tensor.is_cuda
    ):
        raise ValueError(
            f"{operation}: {name}: expected a tensor on {takes.device}, got one on {tensor.device}; "
            f"pass {name}.to({takes.device!r})"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation}: {name}: expected a contiguous tensor, got strides {tensor.stride()} for "
            f"shape {tuple(tensor.shape)}; pass {name}.contiguous()"
        )
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            f"{operation}: {name}: expected resolved values, got a lazy negation or conjugation; "
            f"pass {name}.resolve_neg().resolve_conj()"
        )


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
