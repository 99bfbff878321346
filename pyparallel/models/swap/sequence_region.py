"""A transformers model's layers on sequence shards: what is between their matmuls is cut by tokens.

The region is the stack of layers. At its start each rank takes its tokens; in front of every attention
and MLP the tokens are gathered, behind it the row layers scatter them; at the end they are gathered. So
norms, dropouts and residuals work on shards, and everything outside (masks, positions, the final norm,
the head) sees whole sequences.

    start   split                 backward all-gather
    inside  all-gather            backward reduce-scatter     before each attention and MLP
            reduce-scatter        backward all-gather         behind each
    end     all-gather            backward split

Source: Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models",
section 4.2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group
from pyparallel.comm.sequence import gather_sequence, shard_sizes, split_sequence
from pyparallel.layers.owner import check_replaceable
from pyparallel.layers.parameters import ShardedModule
from pyparallel.layers.sequence_parallel_dropout import SequenceParallelDropout
from pyparallel.models.swap.cuts import Cuts
from pyparallel.models.swap.plans import parent_of
from pyparallel.models.swap.shared_parameter import always_sum_gradients
from pyparallel.models.whole_call import WholeCall, drop

# Dropouts that an attention module applies behind its output projection; its others act on heads.
BEHIND_OUTPUT = ("resid_dropout",)


class RegionDropout(SequenceParallelDropout):
    """A dropout of the region, with the mask of the whole sequence."""

    region: SequenceRegion
    call: WholeCall | None = None

    def forward(self, x: Tensor) -> Tensor:
        length = self.region.length
        if self.call is None or self.call.shards is None or not self.training or self.p == 0.0:
            return super().forward(x, length=length)
        # The whole sequence is cut over cp first, and a rank's part of it over tp.
        sizes = [] if length is None else shard_sizes(x, length, self.group)
        return drop(x, self.p, self.call.shards, sum(sizes[: self.group.rank]))


class SequenceRegion:
    """The stack of layers while a call goes through it.

    Attributes:
        length: S of the call, if it is cut; else None, and all of the region's parts do what they do
            without sequence parallelism.
    """

    def __init__(self, group: Group, columns: list[nn.Module], rows: list[nn.Module]) -> None:
        self.group = group
        self.length: int | None = None
        self._columns = columns
        self._rows = rows

    def enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the first layer: take this rank's tokens.

        Without gradients a call of fewer tokens than ranks, a step of generation, is not cut.
        """
        length = _first(args, kwargs).shape[-2]
        cut = torch.is_grad_enabled() or length >= self.group.size
        self.length = length if cut else None
        for column in self._columns:
            column.input_is_gathered = cut
        for row in self._rows:
            row.sequence_parallel = cut
        return _replace(args, kwargs, lambda x: split_sequence(x, self.group)) if cut else None

    def gather(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before an attention or an MLP: the whole sequence."""
        if self.length is None:
            return None
        return _replace(
            args,
            kwargs,
            lambda x: gather_sequence(x, self.group, length=self.length, grad="reduce_scatter"),
        )

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the last layer: the whole sequence, on every rank."""
        if self.length is None:
            return None
        x, *rest = output if isinstance(output, tuple) else (output,)
        x = gather_sequence(x, self.group, length=self.length)
        return (x, *rest) if isinstance(output, tuple) else x


def cut_sequence(model: nn.Module, cuts: Cuts, group: Group) -> None:
    """Let the layers of ``model``, whose modules are cut already, work on sequence shards.

    Raises:
        ValueError: :func:`check_sequence` raises it; call that before anything is changed.
    """
    stack = _stack(cuts)
    layers = model.get_submodule(stack)
    inside = {n: c for n, c in cuts.modules.items() if n.startswith(f"{stack}.")}
    columns, rows = (
        [model.get_submodule(name) for name, cut in inside.items() if cut.kind == kind]
        for kind in ("column", "row")
    )
    region = SequenceRegion(group, columns, rows)
    places = _places(cuts, inside)
    for name in list(_dropouts(model, stack, cuts)):
        dropout = RegionDropout(model.get_submodule(name).p, group=group)
        dropout.region = region
        dropout.call = getattr(model.get_submodule(name), "call", None)
        dropout.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], dropout)
    for name, module in layers.named_modules(prefix=stack):
        own = any(p is not None for p in module._parameters.values())
        if own and not isinstance(module, ShardedModule) and not _within(name, places):
            # One module: its children come in their own turn.
            _sum_own(module, group)
    layers[0].register_forward_pre_hook(region.enter, with_kwargs=True)
    for name in places:
        model.get_submodule(name).register_forward_pre_hook(region.gather, with_kwargs=True)
    layers[len(layers) - 1].register_forward_hook(region.leave)


def check_sequence(model: nn.Module, cuts: Cuts) -> None:
    """Raise where the layers of ``model`` can't work on sequence shards; the message names why.

    Raises:
        ValueError: several stacks of layers, attention to another sequence, a module that wants or
            makes whole features between the matmuls, or dropout that is no module.
    """
    stack = _stack(cuts)
    for name, cut in cuts.modules.items():
        if name.startswith(f"{stack}.") and cut.whole:
            raise ValueError(
                f"{name}: gathers or splits features inside a layer, which sequence_parallel can't "
                f"follow; parallelize without it"
            )
    for attention in cuts.attentions:
        if "cross" in attention.attention.core:
            raise ValueError(
                f"{attention.attention.core}: attends to another sequence, which sequence_parallel "
                f"does not cut; parallelize without it"
            )
    places = _places(cuts, cuts.modules)
    if stack in {parent_of(place) for place in places}:
        raise ValueError(f"{stack}: a layer's own projection is cut; expected it in a module")
    for name in _dropouts(model, stack, cuts):
        check_replaceable(model.get_submodule(name), name)
    cores = {attention.attention.core for attention in cuts.attentions}
    for name, module in model.get_submodule(stack).named_modules(prefix=stack):
        for attribute, value in vars(module).items():
            floating = isinstance(value, float) and "dropout" in attribute and value > 0
            if floating and not _within(name, cores):
                raise ValueError(
                    f"{name}.{attribute}: expected 0 with sequence_parallel, got {value}; its mask "
                    f"would depend on the number of ranks"
                )


def _stack(cuts: Cuts) -> str:
    stacks = set()
    for attention in cuts.attentions:
        found = re.match(r"(.*?)\.\d+\.", attention.attention.core)
        stacks.add(found.group(1) if found else attention.attention.core)
    if len(stacks) != 1:
        raise ValueError(
            f"sequence_parallel: expected one stack of layers whose attention is cut by heads, got "
            f"{', '.join(sorted(stacks)) or 'none'}; parallelize without it"
        )
    return stacks.pop()


def _places(cuts: Cuts, modules: dict[str, Any]) -> list[str]:
    """The modules before which the tokens are gathered: attention cores, and parents of columns."""
    projections = {name for a in cuts.attentions for name in a.attention.projections}
    places = [attention.attention.core for attention in cuts.attentions]
    stack = _stack(cuts)
    for name, cut in modules.items():
        if cut.kind == "column" and name not in projections and name.startswith(f"{stack}."):
            places.append(parent_of(name))
    return list(dict.fromkeys(places))


def _within(name: str, places: Any) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _dropouts(model: nn.Module, stack: str, cuts: Cuts) -> Iterator[str]:
    """The dropouts of the stack that act on its residual, not on heads."""
    cores = [attention.attention.core for attention in cuts.attentions]
    for name, module in model.get_submodule(stack).named_modules(prefix=stack):
        on_heads = _within(name, cores) and name.rpartition(".")[2] not in BEHIND_OUTPUT
        if isinstance(module, nn.Dropout) and not on_heads:
            yield name


def _sum_own(module: nn.Module, group: Group) -> None:
    if next(module.children(), None) is None:
        always_sum_gradients(module, group)
        return
    raise ValueError(
        f"{type(module).__name__}: has parameters beside modules of its own; sequence_parallel knows "
        f"only norms between the matmuls"
    )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _replace(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = change(_first(args, kwargs))
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
