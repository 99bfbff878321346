"""What a model whose sequences are cut must not work out from a rank's part of them.

Rotary frequencies may depend on a call's length (``dynamic``, ``longrope``), which transformers reads
off the largest position that it is given: each rank shows it the whole call's. Dropout outside of
attention drops what it would drop of whole sequences, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.context import ContextShards
from pyparallel.ops.dropout import dropout


class WholeCall:
    """The call that is going through a model.

    Attributes:
        shards: how its sequences are cut; None outside of a call.
        last: the largest position of all ranks.
    """

    def __init__(self) -> None:
        self.shards: ContextShards | None = None
        self.last: Tensor | None = None

    def add_last(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a rotary module: one more position, the whole call's largest."""
        if self.last is None:
            return None
        given = "position_ids" in kwargs
        positions = kwargs["position_ids"] if given else args[1]
        last = self.last.to(positions.dtype).expand(*positions.shape[:-1], 1)
        positions = torch.cat([positions, last], -1)
        if given:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def drop_last(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Behind it: the tables [B, S_r, D] of this rank's tokens."""
        if self.last is None:
            return None
        return tuple(table[..., :-1, :] for table in output)


class WholeDropout(nn.Dropout):
    """A dropout of [B, S_r, H] with the mask of the whole sequences."""

    call: WholeCall

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or self.call.shards is None:
            return super().forward(x)
        return drop(x, self.p, self.call.shards, 0)


def draw_seed() -> Tensor:
    """From torch's CPU generator, which must be in the same state on all ranks."""
    return torch.randint(-(2**63), 2**63 - 1, (), device="cpu")


def drop(
    x: Tensor,
    p: float,
    shards: ContextShards | None,
    first: int,
    *,
    seed: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """``x [..., S_r, H]``, this rank's tokens from its ``first`` on, with the whole sequences' mask.

    Args:
        shards: how sequences are cut over cp; None: they are not, and have ``length`` tokens.
        seed: by default a new one.
    """
    seed = draw_seed() if seed is None else seed
    if shards is None:
        return dropout(x, p, seed=seed, length=length, start=first)
    dropped, last = [], first + x.shape[-2]
    before = 0
    for start, stop in shards.sharding.ranges[shards.group.rank]:
        low, high = max(first, before), min(last, before + stop - start)
        if low < high:
            part = x[..., low - first : high - first, :]
            at = start + low - before
            dropped.append(dropout(part, p, seed=seed, length=shards.length, start=at))
        before += stop - start
    return torch.cat(dropped, -2)


def see_whole_calls(model: nn.Module, call: WholeCall, cores: Sequence[str]) -> None:
    """Let the rotary modules and the dropouts of ``model`` work by ``call``.

    Args:
        cores: the attention modules, whose own dropouts act on heads.
    """
    for name, module in list(model.named_modules()):
        buffers = [buffer for buffer, _ in module.named_buffers(recurse=False)]
        if any(buffer.endswith("inv_freq") for buffer in buffers):
            module.register_forward_pre_hook(call.add_last, with_kwargs=True)
            module.register_forward_hook(call.drop_last, with_kwargs=True)
        on_heads = name.rpartition(".")[0] in cores and not name.endswith("resid_dropout")
        if type(module) is nn.Dropout and not on_heads:
            module.__class__ = WholeDropout
            module.call = call


def check_drops(model: nn.Module, cores: Sequence[str]) -> None:
    """Raise where a dropout that is no module would depend on how a sequence is cut.

    Raises:
        ValueError: it names the attribute.
    """
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            floating = isinstance(value, float) and "dropout" in attribute and value > 0
            if floating and (name not in cores or attribute.startswith("resid")):
                raise ValueError(
                    f"{name}.{attribute}: expected 0 where the context is cut over ranks, got {value}; "
                    f"its mask would depend on the number of ranks"
                )
