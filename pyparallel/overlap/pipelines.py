"""The four pipelines: schedule, buffers and actions put together, ready for an executor.

X_r [M_r, K] etc. as in `all_gather_linear.py` and `linear_reduce_scatter.py`; W [N, K] is always this
rank's shard of the weight. A pipeline allocates its temporaries on the device of its input, and its
results are complete when the executor returns (CPU) or for work on the caller's stream (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

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
from pyparallel.overlap.linear_reduce_scatter import (
    linear_reduce_scatter,
    linear_reduce_scatter_backward,
)
from pyparallel.overlap.plan import Plan
from pyparallel.overlap.schedule import Schedule, Step


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
    return _buffer(link, "partial", (sum(plan.rows), columns), like)


def _landed(like: Tensor, columns: int, plan: Plan, link: Link) -> Tensor:
    """[R, M_r, columns]: the partial sums of the own rows, by source."""
    shape = (plan.size, plan.rows[plan.rank], columns)
    elements = plan.size * max(plan.rows) * columns
    return link.buffer("landed", shape, like, elements=elements)


def _buffer(link: Link, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """One whose shape is the same on all ranks."""
    return link.buffer(name, shape, like, elements=prod(shape))


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
        landing = _buffer(link, "gathered", (plan.slots, layout.largest_piece, x.shape[1]), x)
    else:
        landing = _buffer(link, "gathered", (layout.total, x.shape[1]), x)
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
        _landed(x, columns, plan, link),
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
    gathered = _buffer(link, "gathered", (layout.total, columns), x)
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
        _landed(x, columns, plan, link),
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
) -> Pipeline:
    """results: dx [M, K_r], dw [N, K_r]; dy [M_r, N], x [M, K_r], weight [N, K_r].

    views["gathered"]() is the dy [M, N] of all ranks, until the link's next call.
    """
    layout = plan.layout()
    _check("dy", dy, plan.rows[plan.rank], weight.shape[0])
    _check("x", x, layout.total, weight.shape[1])
    schedule = linear_reduce_scatter_backward(
        rank=plan.rank, size=plan.size, pieces=plan.pieces, transport=plan.transport
    )
    gathered = _buffer(link, "gathered", (layout.total, dy.shape[1]), dy)
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
