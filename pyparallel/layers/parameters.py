"""What every sharded module shares: parameters that know which part of the dense tensor they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight, largest_of_rows, quantize_rows, weave_blocks_
from pyparallel.cut.shard import Sharding
from pyparallel.layers import living
from pyparallel.layers.owner import check_replaceable
from pyparallel.layers.state_dicts import teach_checkpoints

# In a state dict's own metadata, which torch.save keeps: whose part a module's tensors are.
_OF_RANK = "pyparallel_rank"


class ShardedModule(nn.Module):
    """A module whose parameters are shards.

    Attributes:
        group: the ranks the parameters are cut over.
        shardings: for each of the module's own parameters, which ranges of the dense one it holds.
        dense_shapes: the dense parameters' shapes.
        weight_kind: what ``weight`` is packed into (:meth:`quantize_weight`, :meth:`hold_blocks`), as
            :class:`~pyparallel.cut.quantize.PackedWeight` names it; or None.
        weight_scale: [M], fp32, where that is int8; or None.
        dtype: of the activations, and of ``weight`` where that is not packed.
    """

    weight_scale: Tensor | None

    def __new__(cls, *args: Any, **options: Any) -> ShardedModule:
        module = super().__new__(cls)
        living.add(module)
        return module

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self.shardings: dict[str, Sharding] = {}
        self.dense_shapes: dict[str, tuple[int, ...]] = {}
        self.weight_kind: str | None = None
        self.register_buffer("weight_scale", None)
        self._dtype: torch.dtype | None = None
        if group.size > 1 and "torch.distributed.checkpoint" in sys.modules:
            teach_checkpoints()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if self._dtype is None else self._dtype

    @property
    def packed(self) -> PackedWeight | None:
        """The weight, where it is held in fewer bits."""
        if self.weight_kind is None:
            return None
        return PackedWeight(self.weight, self.weight_kind, self.dtype, self.weight_scale)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """This rank's part of the dense weight's shape, whatever holds it."""
        return self.shardings["weight"].local_shape(self.dense_shapes["weight"], self.group.rank)

    def quantize_weight(self) -> None:
        """Hold ``weight [M, K]`` as int8 with one fp32 scale a row, for inference; half of bf16's bytes.

        The scales are those of the dense matrix's rows, so all numbers of ranks round it alike.

        Communication: one all-reduce of M numbers where the rows are cut.

        Raises:
            ValueError: the module is sequence-parallel, or the weight is packed already.
        """
        self._check_packable("int8")
        largest = None
        if self.shardings["weight"].dim == 1 and self.group.size > 1:
            largest = all_reduce_raw(largest_of_rows(self.weight), self.group, op="max")
        data, scale = quantize_rows(self.weight, largest)
        self._hold(PackedWeight(data, "int8", self.dtype, scale))

    def hold_blocks(self, data: Tensor, kind: str) -> None:
        """Hold ``weight [M, K]`` as a GGUF's blocks, for inference.

        The weight is then the blocks' numbers, in whatever dtype the module was.

        Args:
            data: [M, K / 32 * bytes of a block], uint8, as a file has them; kept, and woven in place
                (:func:`~pyparallel.cut.quantize.weave_blocks_`).
            kind: "q4_0", "q4_1" or "q8_0".

        Raises:
            ValueError: as :meth:`quantize_weight`; another kind or shape; a view.
        """
        self._check_packable(kind)
        packed = PackedWeight(data, kind, self.dtype)
        if packed.shape != self.weight_shape:
            raise ValueError(f"data: expected blocks of {self.weight_shape}, got {packed.shape}")
        weave_blocks_(data, kind)
        self._hold(packed)

    def share_weight(self, other: ShardedModule) -> None:
        """Take another's weight as one's own, in the form in which it holds it."""
        self.weight, self.weight_scale = other.weight, other.weight_scale
        self.weight_kind, self._dtype = other.weight_kind, other._dtype

    def _check_packable(self, kind: str) -> None:
        if getattr(self, "sequence_parallel", False):
            raise ValueError(
                f"sequence_parallel: expected False for {kind} weights, which are for inference"
            )
        if self.weight_kind is not None:
            raise ValueError(
                f"weight: expected a dense one to hold as {kind}, got {self.weight_kind}"
            )

    def _hold(self, packed: PackedWeight) -> None:
        self._dtype, self.weight_kind = packed.dtype, packed.kind
        self.weight_scale = packed.scale
        self.weight = nn.Parameter(packed.data, requires_grad=False)

    def add_shard(
        self,
        name: str,
        shape: tuple[int, ...],
        sharding: Sharding,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register an uninitialised parameter: this rank's part of a dense one of ``shape``."""
        local = sharding.local_shape(shape, self.group.rank)
        self.register_parameter(name, nn.Parameter(torch.empty(local, device=device, dtype=dtype)))
        self.shardings[name] = sharding
        self.dense_shapes[name] = shape

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        base, _, kind = name.rpartition("_")
        if kind in ("orig", "g", "v") and base in self.shardings:
            self._refuse_derived(base)
        super().register_parameter(name, param)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # Who asks for it may import torch's checkpoints afterwards.
        if self.group.size > 1:
            teach_checkpoints()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if self.group.size > 1 and metadata is not None:
            metadata[_OF_RANK] = self.group.rank

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A dense tensor, as a file of adapters has it, is cut here; a shard is taken as it is.
        rank, of_rank = self.group.rank, local_metadata.get(_OF_RANK)
        for name, sharding in self.shardings.items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or self.group.size == 1:
                continue
            if tuple(value.shape) == self.dense_shapes[name]:
                state_dict[prefix + name] = sharding.split(value, rank)
            elif of_rank is not None and of_rank != rank:
                error_msgs.append(
                    f"{prefix}{name}: expected rank {rank}'s part of {self.group.size}, or the dense "
                    f"tensor, got rank {of_rank}'s, as its state_dict() has it; save each rank's, or "
                    f"use pyparallel.save and restore"
                )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def __delattr__(self, name: str) -> None:
        # What torch does first where it makes a parameter from others.
        if name in self.shardings:
            self._refuse_derived(name)
        super().__delattr__(name)

    def _refuse_derived(self, name: str) -> None:
        if self.group.size > 1:
            raise ValueError(
                f"{type(self).__name__}.{name}: expected to stay a parameter, since parametrizations, "
                f"weight_norm, spectral_norm and pruning would look at this rank's shard alone; apply "
                f"them to the dense module, and make them permanent before it is cut"
            )

    def split_dense(self, name: str, dense: Tensor) -> Tensor:
        """This rank's part of the dense parameter ``name``."""
        if tuple(dense.shape) != self.dense_shapes[name]:
            raise ValueError(
                f"{name}: expected a dense tensor of shape {self.dense_shapes[name]}, "
                f"got {tuple(dense.shape)}"
            )
        return self.shardings[name].split(dense, self.group.rank)

    def load_dense(self, dense: nn.Module | Mapping[str, Tensor | None]) -> ShardedModule:
        """Take this rank's parts of a dense module's (or mapping's) parameters; returns self.

        ``requires_grad``, dtype, device and training mode are the dense one's.

        Raises:
            ValueError: a parameter is missing or has another shape; the module has hooks, or else what
                a twin would lose (:mod:`pyparallel.layers.owner`).
        """
        if isinstance(dense, nn.Module):
            check_replaceable(dense)
            self.train(dense.training)
        self.weight_kind = self.weight_scale = self._dtype = None
        for name in self.shardings:
            value = dense.get(name) if isinstance(dense, Mapping) else getattr(dense, name, None)
            if value is None:
                raise ValueError(
                    f"{name}: expected a dense tensor of shape {self.dense_shapes[name]}, got none; "
                    f"make this module without {name}, or give one"
                )
            trained = value.requires_grad if isinstance(value, nn.Parameter) else True
            part = self.split_dense(name, value.detach())
            setattr(self, name, nn.Parameter(part, requires_grad=trained))
        return self


def init_linear(module: ShardedModule, fan_in: int) -> None:
    """``nn.Linear``'s initialisation, drawn dense and cut: independent of the number of ranks."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    for name in ("weight", "bias"):
        parameter = getattr(module, name)
        if parameter is None or parameter.is_meta:
            continue
        dense = torch.empty(
            module.dense_shapes[name], device=parameter.device, dtype=parameter.dtype
        )
        with torch.no_grad():
            parameter.copy_(module.split_dense(name, dense.uniform_(-bound, bound)))
