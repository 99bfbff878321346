"""The transformer's MLP, with its intermediate features cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel import autocast, backend
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.cut.shard import features, fuse
from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.owner import is_touched, join_dense
from pyparallel.layers.row_parallel_linear import RowParallelLinear

# What the MLP applies to the gate, by the name of the gated unit (Shazeer 2020).
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
POINTWISE = ("gelu", "gelu_tanh", "relu", "silu")


class ParallelMLP(nn.Module):
    """``y = (act(x Wg^T) * x Wu^T) Wd^T`` (gated), or ``y = act(x Wu^T) Wd^T``.

    Args:
        hidden_size, intermediate_size: H and F, dense.
        activation: "swiglu", "geglu", "geglu_tanh" (gated), "gelu", "gelu_tanh", "relu" or "silu".
        bias: whether the projections add biases.
        device, dtype: as in ``nn.Linear``.
        group: the ranks; torch's own objects are taken too.
        sequence_parallel: x and y are this rank's tokens.

    Shapes:
        x, y [..., H], replicated, or [..., S_r, H] with ``sequence_parallel``.
        ``up_proj.weight`` [F_r, H], or [2 F_r, H] = gate rows, then up rows; ``down_proj.weight``
        [H, F_r].

    Communication: one all-reduce forward, one backward. With ``sequence_parallel`` one all-gather and
    one reduce-scatter forward; two all-gathers and one reduce-scatter backward.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        if activation not in GATED and activation not in POINTWISE:
            raise ValueError(
                f"activation: expected one of {', '.join((*GATED, *POINTWISE))}, got {activation!r}"
            )
        group = group_of(group)
        cut = features(intermediate_size, group.shares)
        gated = activation in GATED
        self.activation = activation
        self.up_proj = ColumnParallelLinear(
            hidden_size,
            intermediate_size * (2 if gated else 1),
            bias,
            device,
            dtype,
            group=group,
            sharding=fuse(cut, cut) if gated else cut,
            sequence_parallel=sequence_parallel,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias,
            device,
            dtype,
            group=group,
            sharding=cut.along(1),
            sequence_parallel=sequence_parallel,
        )

    @classmethod
    def from_dense(
        cls,
        up: nn.Linear,
        down: nn.Linear,
        gate: nn.Linear | None = None,
        *,
        activation: str,
        group: GroupLike,
        sequence_parallel: bool = False,
    ) -> ParallelMLP:
        """The parallel twin of dense projections; with ``gate`` the activation is a gated one."""
        if (gate is not None) != (activation in GATED):
            raise ValueError(f"gate: {activation!r} takes {'a' if gate is None else 'no'} gate")
        module = cls(
            up.in_features,
            up.out_features,
            activation,
            up.bias is not None,
            "meta",
            up.weight.dtype,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        if (down.bias is None) != (up.bias is None):
            raise ValueError(
                f"bias: expected both of up and down or neither, got {up.bias is not None} and "
                f"{down.bias is not None}; give both a bias, of zeros where there was none"
            )
        names = ("up",) if gate is None else ("gate", "up")
        module.up_proj.load_dense(join_dense([up] if gate is None else [gate, up], names))
        module.down_proj.load_dense(down)
        return module.train(up.training)

    def forward(self, x: Tensor, *, length: int | None = None) -> Tensor:
        """Apply the MLP.

        Args:
            length: S, with ``sequence_parallel``; by default all shards are as long as this one.
        """
        if (fused := self._gated_in_one_pass(x)) is not None:
            return self.down_proj(fused)
        up = self.up_proj(x, length=length)
        if self.activation in GATED:
            return self.down_proj(backend.call("gated_activation", up, GATED[self.activation]))
        return self.down_proj(backend.call("activation", up, self.activation))

    def _gated_in_one_pass(self, x: Tensor) -> Tensor | None:
        """``act(gate) * up`` where a backend has a kernel for both at once."""
        up = self.up_proj
        plain = up.bias is None and not up.sequence_parallel and not up.input_is_gathered
        plain = plain and type(up) is ColumnParallelLinear and not is_touched(up)
        if not plain or self.activation not in GATED or up.packed is not None:
            return None
        weight = up.weight
        if autocast.is_on():
            x, weight = autocast.lowered(x, weight)
        arguments = x, weight, GATED[self.activation], up.group
        run = backend.offered("gated_mlp", *arguments)
        return None if run is None else run(*arguments)
