"""This rank's stages as torch.distributed.pipelining takes them: their shapes, their head, their order.

Legend: B sequences of a micro-batch, S tokens of each, S_r this rank's, H hidden, V_r this rank's ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyparallel.mesh import Mesh
from pyparallel.models.stage import stages_of_rank
from pyparallel.training.data_engines import sum_behind_backward
from pyparallel.training.pipeline_schedules import check, schedule_of


class Stages:
    """One rank's stages of a model.

    Attributes:
        modules: as they were given. bare: the models inside their wrappers.
        count: how many stages the model has, on all ranks.
        last_rank: which pp rank has the last one.

    Raises:
        ValueError: they are not the ones that the schedule wants on this rank.
    """

    def __init__(
        self, modules: Sequence[nn.Module], mesh: Mesh, schedule: str, num_microbatches: int
    ) -> None:
        self.modules = list(modules)
        self.bare = [bare_module(module) for module in self.modules]
        self.mesh = mesh
        self.schedule = schedule
        self.num_microbatches = num_microbatches
        chunks = len(self.modules)
        check(schedule, ranks=mesh.pp.size, chunks=chunks, num_microbatches=num_microbatches)
        self.count = mesh.pp.size * chunks
        self._check()
        self._rank_of = {
            index: rank for rank in range(mesh.pp.size) for index in self._held_by(rank)
        }
        self.last_rank = self._rank_of[self.count - 1]

    @property
    def splits(self) -> bool:
        """Whether the schedule splits backward, so that weights' gradients come without DDP's hooks."""
        return schedule_of(self.schedule).splits

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters of all stages."""
        for bare in self.bare:
            yield from bare.parameters()

    def sum_over_data(self) -> None:
        """What DDP does under backward, behind it, for the stages in DDP of a schedule that splits."""
        if not self.splits:
            return
        for module, bare in zip(self.modules, self.bare, strict=True):
            if module is not bare:
                sum_behind_backward(bare.parameters(), self.mesh.data)

    @property
    def has_first(self) -> bool:
        """Whether the first stage is here."""
        return self.bare[0].stage.is_first

    @property
    def has_last(self) -> bool:
        """Whether the last stage is here."""
        return self.bare[-1].stage.is_last

    def engine(self, batch: int, length: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Torch's schedule for micro-batches [batch, length]."""
        # Two seconds of import that only training pays for.
        from torch.distributed import pipelining

        kind = schedule_of(self.schedule)
        stages = [
            pipelining.PipelineStage(
                module,
                bare.stage.index,
                self.count,
                next(bare.parameters()).device,
                # Given to torch, so that nobody has to send shapes or try a step.
                input_args=self.input_of(bare, batch, length),
                output_args=self._output_of(bare, batch, length),
                group=self.mesh.device_mesh.get_group("pp"),
            )
            for module, bare in zip(
                self.bare if self.splits else self.modules, self.bare, strict=True
            )
        ]
        return getattr(pipelining, kind.kind)(
            stages if kind.several else stages[0],
            self.num_microbatches,
            loss_fn=loss,
            scale_grads=False,
        )

    def forward(
        self, microbatches: Sequence[Tensor], options: Sequence[dict[str, Any]]
    ) -> list[Tensor]:
        """All micro-batches through all stages, without gradients; the last stage's outputs, where
        that is.

        Sends do not wait for their receivers, in any engine, so this cannot deadlock.
        """
        talk = self.mesh.pp.communicator
        batch, length = microbatches[0].shape
        held: dict[int, list[Tensor]] = {}
        for module, bare in zip(self.modules, self.bare, strict=True):
            stage = bare.stage
            outputs = held.setdefault(stage.index, [])
            before = self._rank_of.get(stage.index - 1)
            after = self._rank_of.get(stage.index + 1)
            for place, ids in enumerate(microbatches):
                if stage.is_first:
                    x = ids
                elif before == self.mesh.pp.rank:
                    x = held[stage.index - 1][place]
                else:
                    shape = self.input_of(bare, batch, length)
                    x = torch.empty_like(shape, device=ids.device, requires_grad=False)
                    talk.recv(x, before, tag=stage.index)
                y = module(x, **options[place])
                if stage.is_last or after == self.mesh.pp.rank:
                    outputs.append(y)
                else:
                    talk.send(y.contiguous(), after, tag=stage.index + 1)
        return held[self.count - 1] if self.has_last else []

    @contextmanager
    def local_logits(self) -> Iterator[None]:
        """Inside, the last stage returns this rank's logits [B, S_r, V_r] and gathers none."""
        head = self.head()
        if head is None:
            yield
            return
        gathers, head.gather_output = head.gather_output, False
        try:
            yield
        finally:
            head.gather_output = gathers

    def head(self) -> nn.Module | None:
        """The last stage's head, if it is here and its vocabulary is cut."""
        if not self.has_last:
            return None
        last = self.bare[-1]
        head = last.get_output_embeddings() if _is_transformers(last) else last.head
        return head if hasattr(head, "local_logits") else None

    def options(self, length: int) -> dict[str, Any]:
        """What a call of the stages takes beside its tensors."""
        return {} if _is_transformers(self.bare[0]) else {"length": length}

    def input_of(self, bare: nn.Module, batch: int, length: int) -> Tensor:
        """The shape of a stage's input, on the meta device: ids [B, S], or hidden states."""
        if bare.stage.is_first:
            return torch.empty(batch, length, dtype=torch.long, device="meta")
        return self._between(bare, batch, length)

    def _output_of(self, bare: nn.Module, batch: int, length: int) -> Tensor:
        if bare.stage.is_last:
            # Nobody receives it.
            return torch.empty(batch, length, 1, device="meta", requires_grad=True)
        return self._between(bare, batch, length)

    def _between(self, bare: nn.Module, batch: int, length: int) -> Tensor:
        """Hidden states [B, S_r, H]."""
        return torch.empty(
            batch,
            length if _is_transformers(bare) else bare.own_tokens(length),
            bare.config.hidden_size,
            dtype=next(bare.parameters()).dtype,
            device="meta",
            requires_grad=True,
        )

    def _held_by(self, rank: int) -> list[int]:
        order = schedule_of(self.schedule).order
        return stages_of_rank(self.mesh.pp.size, rank, len(self.modules), order=order)

    def _check(self) -> None:
        wanted = self._held_by(self.mesh.pp.rank)
        held = [getattr(getattr(bare, "stage", None), "index", None) for bare in self.bare]
        counts = {bare.stage.count for bare in self.bare if hasattr(bare, "stage")}
        if held != wanted or counts != {self.count}:
            raise ValueError(
                f"stages: expected {wanted} of {self.count} on rank {self.mesh.pp.rank} of "
                f"pp={self.mesh.pp.size} for schedule={self.schedule!r}, got {held} of "
                f"{sorted(counts)}; load them with load() or load_stages() on this mesh"
            )
        if any(getattr(module, "gradient_divisor", 1) != 1 for module in self.modules):
            raise ValueError(
                "stages: expected data_parallel(..., average=False), since the pipeline's loss is the "
                "mean over all replicas' targets already, got average=True"
            )
        if self.splits and any(_is_fsdp(bare) for bare in self.bare):
            raise ValueError(
                f"stages: expected no FSDP for schedule={self.schedule!r}, whose split backward loses "
                f"gradients of its parameters; use data_parallel(..., engine='ddp')"
            )


def _is_fsdp(module: nn.Module) -> bool:
    # FSDP2 gives a module a class that derives from its FSDPModule, and whoever has such a module has
    # imported it: its name tells, so asking imports nothing.
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def bare_module(module: nn.Module) -> nn.Module:
    """The model inside DDP; FSDP2 is a class of the model itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _is_transformers(bare: nn.Module) -> bool:
    return hasattr(bare, "get_output_embeddings")
