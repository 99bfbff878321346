"""The four pipelines: schedule, buffers and actions put together, ready for an executor.

X_r [M_r, K] etc. as in `all_gather_linear.py` and `linear_reduce_scatter.py`; W [N, K] is always this
rank's shard of the weight. A pipeline allocates its temporaries on the device of its input, and its
results are complete when the executor returns (CPU) or for work on the caller's stream (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyparallel.overlap.actions import (
    Action,
    GatherSide,
    Link,
    Multiply,
    Reduce,
    ScatterSide,
    Shared,
    View,
    check_link,
    rank_ordered_sum,
)
from pyparallel.overlap.all_gather_linear import all_gather_linear, all_gather_linear_backward
from pyparallel.overlap.layout import Layout
from pyparallel.overlap.linear_reduce_scatter import (
    linear_reduce_scatter,
    linear_reduce_scatter_backward,
)
from pyparallel.overlap.schedule import Schedule, Step


@dataclass(frozen=True)
class Plan:
    """How one group overlaps: its place in it, the rows of every rank, and the schedule's choices.

    rows: M_r of every rank. pieces: C of the schedules, 0 to not overlap. transport: see `gather.py`.
    slots: see `all_gather_linear`.
    """

    rank: int
    rows: tuple[int, ...]
    pieces: int
    transport: str = "direct"
    slots: int | None = None

    @property
    def size(self) -> int:
        """R."""
        return len(self.rows)

    @property
    def used_transport(self) -> str:
        """The path that is not overlapped is the library's collective."""
        return self.transport if self.pieces else "direct"

    @property
    def scatter_transport(self) -> str:
        """Partial sums are added at their owner, so no ring carries them."""
        return "copy" if self.used_transport == "copy" else "direct"

    def layout(self) -> Layout:
        """Where each chunk lies."""
        return Layout(self.rows, pieces=self.pieces)


@dataclass(frozen=True)
class Pipeline:
    """One call, bound to its tensors.

    actions: what each step does. views: buffer name to memory, for executors that watch it.
    results: what the caller gets.
    """

    schedule: Schedule
    actions: dict[str, Action]
    views: dict[str, View]
    results: tuple[Tensor, ...]


def _no_action(step: Step) -> None:
    """fork and join: ordering only."""


_ORDERING: dict[str, Action] = {"fork": _no_action, "join": _no_action}
Linear = Callable[[Tensor, Tensor, Tensor], None]


def matmul_transposed(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [m, N] = rows [m, K] @ weight^T; weight [N, K]."""
    torch.mm(rows, weight.t(), out=out)


def matmul_plain(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [m, K] = rows [m, N] @ weight; weight [N, K]."""
    torch.mm(rows, weight, out=out)


def _multiply(linear: Linear, weight: Tensor) -> Multiply:
    def multiply(rows: Tensor, out: Tensor) -> None:
        # An empty shard has steps like any other, and nothing to do in them.
        if rows.shape[0] > 0:
            linear(rows, weight, out)

    return multiply


def _partial(like: Tensor, columns: int, plan: Plan, link: Link) -> Tensor | Shared:
    """[M, columns] for partial sums, where the peers can address it if they copy out of it."""
    check_link(link, plan.scatter_transport)
    if plan.scatter_transport == "copy":
        return link.share("partial", sum(plan.rows), columns, like)
    return like.new_empty(sum(plan.rows), columns)


def _check(name: str, tensor: Tensor, rows: int, columns: int) -> None:
    if tensor.dim() != 2 or tensor.shape != (rows, columns) or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of shape [{rows}, {columns}], got "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}; call .contiguous() or "
            f"check the plan's rows"
        )


def all_gather_linear_pipeline(
    x: Tensor, weight: Tensor, *, plan: Plan, link: Link, linear: Linear = matmul_transposed
) -> Pipeline:
    """results: y [M, N] = all_gather(x) @ weight^T; x [M_r, K], weight [N, K]."""
    layout = plan.layout()
    _check("x", x, plan.rows[plan.rank], weight.shape[1])
    schedule = all_gather_linear(
        rank=plan.rank,
        size=plan.size,
        pieces=plan.pieces,
        transport=plan.transport,
        slots=plan.slots,
    )
    y = x.new_empty(layout.total, weight.shape[0])
    if plan.pieces and plan.slots is not None:
        landing = x.new_empty(plan.slots, layout.largest_piece, x.shape[1])
    else:
        landing = x.new_empty(layout.total, x.shape[1])
    side = GatherSide(
        x,
        landing,
        y,
        rank=plan.rank,
        layout=layout,
        link=link,
        multiply=_multiply(linear, weight),
        names=("x", "landing" if plan.pieces else "gathered", "y"),
        transport=plan.used_transport,
    )
    return Pipeline(schedule, {**_ORDERING, **side.actions()}, side.views(), (y,))


def linear_reduce_scatter_pipeline(
    x: Tensor,
    weight: Tensor,
    *,
    plan: Plan,
    link: Link,
    linear: Linear = matmul_transposed,
    reduce: Reduce = rank_ordered_sum,
) -> Pipeline:
    """results: y [M_r, N] = reduce_scatter(x @ weight^T); x [M, K_r], weight [N, K_r]."""
    layout = plan.layout()
    _check("x", x, layout.total, weight.shape[1])
    schedule = linear_reduce_scatter(
        rank=plan.rank, size=plan.size, pieces=plan.pieces, transport=plan.scatter_transport
    )
    own, columns = plan.rows[plan.rank], weight.shape[0]
    y = x.new_empty(own, columns)
    side = ScatterSide(
        x,
        _partial(x, columns, plan, link),
        x.new_empty(plan.size, own, columns),
        y,
        rank=plan.rank,
        layout=layout,
        link=link,
        multiply=_multiply(linear, weight),
        reduce=reduce,
        names=("x", "y"),
    )
    return Pipeline(schedule, {**_ORDERING, **side.actions()}, side.views(), (y,))


def all_gather_linear_backward_pipeline(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    plan: Plan,
    link: Link,
    linear: Linear = matmul_plain,
    reduce: Reduce = rank_ordered_sum,
) -> Pipeline:
    """results: dx [M_r, K], dw [N, K]; dy [M, N], x [M_r, K] (gathered again), weight [N, K]."""
    layout = plan.layout()
    own, columns = plan.rows[plan.rank], weight.shape[1]
    _check("dy", dy, layout.total, weight.shape[0])
    _check("x", x, own, columns)
    schedule = all_gather_linear_backward(
        rank=plan.rank, size=plan.size, pieces=plan.pieces, transport=plan.transport
    )
    gathered = x.new_empty(layout.total, columns)
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    gather = GatherSide(
        x,
        gathered,
        gathered,
        rank=plan.rank,
        layout=layout,
        link=link,
        multiply=_multiply(linear, weight),
        names=("x", "gathered", "gathered"),
        transport=plan.used_transport,
    )
    scatter = ScatterSide(
        dy,
        _partial(x, columns, plan, link),
        x.new_empty(plan.size, own, columns),
        dx,
        rank=plan.rank,
        layout=layout,
        link=link,
        multiply=_multiply(linear, weight),
        reduce=reduce,
        names=("dy", "dx"),
    )
    actions = {**_ORDERING, **gather.actions(), **scatter.actions()}
    actions["weight_gradient"] = _weight_gradient(dy, gathered, dw)
    views = {**gather.views(), **scatter.views(), "dw": lambda: dw}
    return Pipeline(schedule, actions, views, (dx, dw))


def linear_reduce_scatter_backward_pipeline(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    plan: Plan,
    link: Link,
    linear: Linear = matmul_plain,
    gathered: Tensor | None = None,
) -> Pipeline:
    """results: dx [M, K_r], dw [N, K_r]; dy [M_r, N], x [M, K_r], weight [N, K_r].

    gathered: [M, N], where all ranks' dy will be, for callers that want its sum as well.
    """
    layout = plan.layout()
    _check("dy", dy, plan.rows[plan.rank], weight.shape[0])
    _check("x", x, layout.total, weight.shape[1])
    schedule = linear_reduce_scatter_backward(
        rank=plan.rank, size=plan.size, pieces=plan.pieces, transport=plan.transport
    )
    gathered = dy.new_empty(layout.total, dy.shape[1]) if gathered is None else gathered
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    side = GatherSide(
        dy,
        gathered,
        dx,
        rank=plan.rank,
        layout=layout,
        link=link,
        multiply=_multiply(linear, weight),
        names=("dy", "gathered", "dx"),
        transport=plan.used_transport,
    )
    actions = {**_ORDERING, **side.actions()}
    actions["weight_gradient"] = _weight_gradient(gathered, x, dw)
    views: dict[str, View] = {
        **side.views(),
        "x": lambda q, p: x[layout.rows_of(q, p)],
        "dw": lambda: dw,
    }
    return Pipeline(schedule, actions, views, (dx, dw))


def _weight_gradient(left: Tensor, right: Tensor, dw: Tensor) -> Action:
    def weight_gradient(step: Step) -> None:
        torch.mm(left.t(), right, out=dw)

    return weight_gradient


def even_rows(total: int, size: int) -> tuple[int, ...]:
    """M rows over R ranks, the first M % R ranks one more."""
    base, extra = divmod(total, size)
    return tuple(base + (rank < extra) for rank in range(size))
