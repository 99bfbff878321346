"""peft's LoRA layers over a module that is cut. Imported where peft is installed alone.

Legend: K input features, M output features, r the rank of the adapter, s its scaling, V ids, R ranks;
K_r, M_r, V_r this rank's. A is ``lora_A [r, K]``, B is ``lora_B [M, r]``; dropout is left out.

    column   forward   y_shard_m = x w_shard_m^T + s (x A^T) B_shard_m^T
             backward  dh = all_reduce(s dy_shard_m B_shard_m), [..., r]; dA = dh^T x, whole
    row      forward   y = reduce(x_shard_k w_shard_k^T + s (x_shard_k A_shard_k^T) B^T), one reduction
             backward  dB = all_reduce(s dy^T (x_shard_k A_shard_k^T))

Where x was gathered from sequence shards, whoever gathered it sums dx, so a column has no all-reduce of
dh, and has one of dA instead. Of KV heads that several ranks hold, B's gradient is summed over the
replicas as the layer's is. A and B are what peft's files have, or slices of it, under peft's names: its
merging, saving, enabling and deleting work on them as ever.

An embedding's adapter is small in one axis, [r, V] and [H, r]: every rank has it whole, looks its ids up
there, and merges the rows that it holds.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel.comm.collectives import broadcast_raw, split
from pyparallel.comm.group import Group
from pyparallel.cut.shard import REPLICATED, Sharding
from pyparallel.layers.parameters import ShardedModule
from pyparallel.layers.row_parallel_linear import RowParallelLinear
from pyparallel.mesh import mesh_of
from pyparallel.models.head_dropout import drawing_alike
from pyparallel.models.swap.conv1d import RowParallelConv1D
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.gradients.replicated_parameter import sum_over_replicas
from pyparallel.ops.gradients.shared_parameters import with_summed_gradients

ROWS = (RowParallelLinear, RowParallelConv1D)


class AdapterMatrix(ShardedModule):
    """One ``lora_A`` or ``lora_B`` of a module that is cut; ``weight`` is this rank's part.

    Args:
        dense: the whole one, the first rank's of which all take.
        group: the ranks.
        sharding: which rows or columns each rank holds.
    """

    def __init__(self, dense: nn.Linear, *, group: Group, sharding: Sharding) -> None:
        super().__init__(group)
        shape = tuple(dense.weight.shape)
        self.add_shard("weight", shape, sharding, "meta", dense.weight.dtype)
        self.load_dense(dense)

    def forward(self, x: Tensor) -> Tensor:
        """``x weight^T``, by what this rank holds alone; :class:`CutLinear` sums."""
        return column_parallel_linear(x, self.weight, group=Group.single())

    def extra_repr(self) -> str:
        return f"{self.dense_shapes['weight']}, local={tuple(self.weight.shape)}, {self.group}"


class CutLinear(lora.Linear):
    """``lora.Linear`` whose ``base_layer`` is a parallel linear layer or ``Conv1D``."""

    def cut(self, adapter: str) -> None:
        """Cut the whole ``lora_A`` and ``lora_B`` of an adapter as the base layer is.

        Raises:
            ValueError: :func:`check_adapter` raises it.
        """
        base = self.base_layer
        held = base.shardings["weight"]
        is_row = isinstance(base, ROWS)
        shardings = {
            "lora_A": held.along(1) if is_row else REPLICATED,
            "lora_B": REPLICATED if is_row else held.along(0),
        }
        for name, sharding in shardings.items():
            dense = getattr(self, name)[adapter]
            share_first(dense.weight, base.group)
            matrix = AdapterMatrix(dense, group=base.group, sharding=sharding)
            getattr(self, name)[adapter] = matrix

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Add an adapter to a layer that has others."""
        super().update_layer(adapter_name, *args, **kwargs)
        check_adapter(self, adapter_name, context_size(self.base_layer.group))
        self.cut(adapter_name)

    def forward(self, x: Tensor, *, adapter_names: list[str] | None = None) -> Tensor:
        """The base layer and the active adapters, in one reduction.

        Raises:
            ValueError: ``adapter_names``.
        """
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names: expected None on a model that is cut over {self.base_layer.group.size} "
                f"ranks, got {len(adapter_names)}; call set_adapter, and once for each adapter"
            )
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x)
        return self.base_layer(x, plus=sum(self._path(name, x) for name in active))

    def _path(self, adapter: str, x: Tensor) -> Tensor:
        """What an adapter adds to this rank's features, or to its partial sums."""
        base, group = self.base_layer, self.base_layer.group
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        x = self._cast_input_dtype(x, a.dtype)
        if isinstance(base, ROWS):
            x = self._drop_features(adapter, x)
            (b,) = with_summed_gradients(b, group=group)
            reduced = Group.single()
        else:
            with drawing_alike():
                x = self.lora_dropout[adapter](x)
            reduced = group
            if base.input_is_gathered:
                (a,) = with_summed_gradients(a, group=group)
                reduced = Group.single()
            if (replicas := getattr(base, "replicas", None)) is not None:
                first_row, sharding = replicas
                b = sum_over_replicas(b, sharding, group, first_row=first_row)
        h = column_parallel_linear(x, a, group=Group.single())
        return column_parallel_linear(h, b, group=reduced) * self.scaling[adapter]

    def _drop_features(self, adapter: str, x: Tensor) -> Tensor:
        """This rank's features of ``x``, dropped as the whole ones would be."""
        base, dropout = self.base_layer, self.lora_dropout[adapter]
        sharding = self.lora_A[adapter].shardings["weight"].along(-1)
        whole = not getattr(base, "input_is_parallel", True)
        drops = self.training and isinstance(dropout, nn.Dropout)
        if whole and drops:
            with drawing_alike():
                x = dropout(x)
        if whole:
            return split(x, base.group, dim=-1, sizes=sharding.sizes)
        if not drops:
            return x
        with drawing_alike():
            kept = dropout(x.new_ones(*x.shape[:-1], sharding.length))
        return x * sharding.split(kept, base.group.rank)


class CutEmbedding(lora.Embedding):
    """``lora.Embedding`` whose ``base_layer`` is a vocabulary-parallel embedding."""

    def cut(self, adapter: str) -> None:
        """Take the first rank's adapter."""
        for held in (self.lora_embedding_A, self.lora_embedding_B):
            share_first(held[adapter], self.base_layer.group)

    def update_layer(self, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Add an adapter to a layer that has others."""
        super().update_layer(adapter_name, *args, **kwargs)
        check_adapter(self, adapter_name, context_size(self.base_layer.group))
        self.cut(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the rows that this rank holds."""
        return self.base_layer.split_dense("weight", super().get_delta_weight(adapter))

    def _embed(self, input: Tensor, weight: Tensor, *_: None, **__: None) -> Tensor:
        base = self.base_layer
        return F.embedding(
            input,
            weight,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )


def check_adapter(layer: lora.LoraLayer, adapter: str, context_ranks: int, name: str = "") -> None:
    """Raise where an adapter is more than A and B.

    Args:
        context_ranks: over which sequences are cut.
        name: the layer's, for the message.

    Raises:
        ValueError: a variant of LoRA, as DoRA; a bias of its own; dropout where sequences are cut.
    """
    where = f"{name}: " if name else ""
    kind = layer.lora_variant.get(adapter)
    if kind is not None:
        raise ValueError(
            f"{where}expected plain LoRA beside a layer that is cut, got {type(kind).__name__} "
            f"(use_dora and its like); train it without"
        )
    if layer.lora_bias.get(adapter):
        raise ValueError(f"{where}lora_bias: expected False beside a layer that is cut, got True")
    dropout = layer.lora_dropout[adapter]
    if context_ranks > 1 and isinstance(dropout, nn.Dropout):
        raise ValueError(
            f"{where}lora_dropout: expected 0 over cp={context_ranks} ranks, got {dropout.p}; its mask "
            f"would depend on their number"
        )


def context_size(group: Group) -> int:
    """Over how many ranks of cp the mesh of a tp group cuts sequences."""
    mesh = mesh_of(group)
    return 1 if mesh is None else mesh.cp.size


@torch.no_grad()
def share_first(weight: Tensor, group: Group) -> None:
    """Give all ranks of tp and cp the first one's numbers: adapters that are new are drawn at random."""
    mesh = mesh_of(group)
    for axis in (group,) if mesh is None else (group, mesh.cp):
        if axis.size > 1 and not weight.is_meta:
            weight.copy_(broadcast_raw(weight.detach().clone(), axis))


def adopt(layer: lora.Linear | lora.Embedding, twin: ShardedModule) -> None:
    """Put a layer of peft's with whole adapters around a module that is cut.

    Raises:
        ValueError: an adapter that :func:`check_adapter` refuses.
    """
    for adapter in layer.lora_dropout:
        check_adapter(layer, adapter, context_size(twin.group))
    layer.__class__ = CutEmbedding if type(layer) is lora.Embedding else CutLinear
    layer.base_layer = twin
    for adapter in layer.lora_dropout:
        layer.cut(adapter)
