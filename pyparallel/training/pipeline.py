"""Training through the stages of a model, by the schedules of torch.distributed.pipelining.

    L = sum over micro-batches of l_i / n,    dw = sum over micro-batches of dl_i / dw / n

l_i is the sum of the losses of micro-batch i, on the last stage; n counts the targets of all of them,
over dp and cp too. Torch's schedules run the stages and move activations and their gradients, by Gloo or
NCCL; what is added here: shapes known beforehand, tied weights, the loss and its count, and errors that
name stages.

Legend: P ranks, m micro-batches, B sequences, S tokens of each, S_r this rank's, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyparallel.comm.collectives import all_reduce_raw, broadcast_raw
from pyparallel.comm.context import ContextShards
from pyparallel.mesh import Mesh
from pyparallel.ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from pyparallel.training.pipeline_errors import named_errors
from pyparallel.training.pipeline_stages import Stages
from pyparallel.training.tied_gradients import sum_tied_gradients

# A target that does not count, as in torch's cross_entropy.
IGNORE_INDEX = -100
# A schedule keeps receive buffers of its shape; a step of another shape makes another schedule.
KEPT_SHAPES = 4

Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """A model's stages, trained together; made by all ranks of the mesh.

    Args:
        stages: this rank's: from :func:`pyparallel.load`, or several from
            :func:`pyparallel.load_stages`; each may be data-parallel.
        num_microbatches: m, how many parts a batch is cut into.
        schedule: "gpipe", "1f1b", "interleaved", "zero_bubble" or "zero_bubble_v"; see
            :mod:`pyparallel.training.pipeline_schedules`.
        loss: ``loss(logits, targets)``, the sum over the tokens of a micro-batch, of logits
            [B, S_r, V]; by default the cross-entropy, for which no logits are gathered.

    Raises:
        ValueError: an unknown schedule; stages that are not the ones it wants here; a number of
            micro-batches that it can't take; FSDP under a zero-bubble schedule.
    """

    def __init__(
        self,
        stages: nn.Module | Sequence[nn.Module],
        mesh: Mesh,
        *,
        num_microbatches: int,
        schedule: str = "1f1b",
        loss: Loss | None = None,
    ) -> None:
        modules = [stages] if isinstance(stages, nn.Module) else list(stages)
        self.stages = Stages(modules, mesh, schedule, num_microbatches)
        self.mesh = mesh
        self.schedule = schedule
        self.num_microbatches = num_microbatches
        self._loss = loss
        self._engines: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._count: Tensor | None = None

    def step(self, ids: Tensor, targets: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Forward and backward of a batch; gradients are added to ``.grad``.

        Afterwards every parameter has the dense gradient's part; over cp and dp, this rank's part of
        that, which data parallelism sums. A batch that does not divide into m equal parts is padded
        with sequences that do not count.

        Args:
            ids: [B, S], this dp replica's, whole, the same on all its ranks.
            targets: [B, S]: the token after each; -100 does not count.
            documents: [B, S], ids of the documents packed into a sequence, over cp.

        Returns:
            The mean loss over the targets of all dp replicas, fp32, on every rank.

        Raises:
            ValueError: shapes that do not fit, or no target that counts.
            PeerError: another stage is dead or stuck; the message names it where that is known.
        """
        ids, targets, options = self._prepare(ids, targets, documents)
        bare = self.stages.bare
        # Only what this step adds may be summed over the stages that share a weight, or over dp x cp.
        shared = [s.tied_weight for s in bare if s.tied_weight is not None]
        if self.stages.splits:
            shared = list(self.stages.trained())
        before = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = None
        losses: list[Tensor] = []
        with named_errors(bare, self.mesh.pp, f"pipeline step ({self.schedule})"):
            with self._logits():
                self._engine(ids).step(
                    *((ids,) if self.stages.has_first else ()),
                    target=targets if self.stages.has_last else None,
                    losses=losses,
                    return_outputs=False,
                    **options,
                )
            self.stages.sum_over_data()
            sum_tied_gradients(bare, self.mesh.pp, first=0, last=self.stages.last_rank)
        for parameter, gradient in zip(shared, before, strict=True):
            if gradient is not None:
                added = parameter.grad
                parameter.grad = gradient if added is None else gradient.add_(added)
        return self._shared(losses, ids.device)

    @torch.no_grad()
    def evaluate(self, ids: Tensor, targets: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """The loss that :meth:`step` would return, without gradients."""
        ids, targets, options = self._prepare(ids, targets, documents)
        rows = ids.tensor_split(self.num_microbatches)
        packed = options.pop("documents", ids).tensor_split(self.num_microbatches)
        each = [options if documents is None else {**options, "documents": part} for part in packed]
        losses = []
        with named_errors(self.stages.bare, self.mesh.pp, "pipeline evaluation"), self._logits():
            outputs = self.stages.forward(rows, each)
            for logits, wanted in zip(
                outputs, targets.tensor_split(self.num_microbatches), strict=False
            ):
                losses.append(self._loss_of(logits, wanted))
        return self._shared(losses, ids.device)

    def _prepare(
        self, ids: Tensor, targets: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Checked and padded ids and targets, and the options of the stages' calls."""
        for name, tensor in (("targets", targets), ("documents", documents)):
            if tensor is not None and tensor.shape != ids.shape:
                raise ValueError(
                    f"{name}: expected the shape of ids {tuple(ids.shape)}, got {tuple(tensor.shape)}"
                )
        if ids.dim() != 2 or not ids.shape[0]:
            raise ValueError(f"ids: expected [B, S] with B > 0, got shape {tuple(ids.shape)}")
        if documents is not None and self.mesh.cp.size == 1:
            raise ValueError(
                "documents: expected None without context-parallel ranks, got a tensor"
            )
        self._count = (targets != IGNORE_INDEX).sum()
        if self.mesh.dp.size > 1:
            self._count = all_reduce_raw(self._count, self.mesh.dp)
        if int(self._count) == 0:
            raise ValueError(f"targets: expected one that counts, got only {IGNORE_INDEX}")
        rows = -ids.shape[0] % self.num_microbatches
        options = self.stages.options(ids.shape[1])
        if documents is not None:
            options["documents"] = _pad(documents, rows, 0)
        return _pad(ids, rows, 0), _pad(targets, rows, IGNORE_INDEX), options

    def _engine(self, ids: Tensor) -> Any:
        """Torch's schedule for a batch of this shape."""
        shape = ids.shape[0] // self.num_microbatches, ids.shape[1]
        if shape not in self._engines:
            self._engines[shape] = self.stages.engine(*shape, self._loss_of)
            if len(self._engines) > KEPT_SHAPES:
                self._engines.popitem(last=False)
        self._engines.move_to_end(shape)
        return self._engines[shape]

    def _logits(self) -> ExitStack:
        stack = ExitStack()
        if self._loss is None:
            stack.enter_context(self.stages.local_logits())
        return stack

    def _loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's part of the mean."""
        if self.mesh.cp.size > 1:
            targets = ContextShards.of(targets.shape[1], self.mesh.cp).split(targets)
        if self._loss is not None:
            return self._loss(logits, targets) / self._count
        head = self.stages.head()
        if head is None:
            total = F.cross_entropy(
                logits.flatten(0, -2).float(), targets.flatten(), reduction="sum"
            )
        else:
            total = vocab_parallel_cross_entropy(
                logits, targets, group=head.group, vocab_size=head.out_features, reduction="sum"
            )
        return total / self._count

    def _shared(self, losses: list[Tensor], device: torch.device) -> Tensor:
        """The sum of all micro-batches' losses of all ranks, on every rank."""
        total = torch.zeros((), device=device)
        if self.stages.has_last:
            total = torch.stack([loss.detach().float() for loss in losses]).sum()
        for group in (self.mesh.cp, self.mesh.dp):
            if group.size > 1:
                total = all_reduce_raw(total, group)
        if self.mesh.pp.size > 1:
            total = broadcast_raw(total, self.mesh.pp, src=self.stages.last_rank)
        return total


def _pad(tensor: Tensor, rows: int, value: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rows), value=value) if rows else tensor
