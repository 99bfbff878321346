"""transformers' Trainer for a model that is cut over a mesh of dp x tp.

:class:`Trainer` stands in the place of ``transformers.Trainer``, and :class:`MeshTrainer` in front of
any class derived from it. What they do otherwise: the ranks of one tp group get the same batches, and
those of dp different ones; gradients are averaged over dp, by this library's engine; metrics count each
sequence once; and a checkpoint has the dense model, which all ranks join and the first one writes, with
``sharded/`` beside it, from which a run is resumed on this mesh or another.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.trainer import SCHEDULER_NAME

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import Mesh, mesh_of
from pyparallel.saving.save import restore, save
from pyparallel.training.data import data_parallel

# In a checkpoint's folder: the weights and the optimizer, as pyparallel.save writes them.
SHARDED = "sharded"


class MeshTrainer:
    """What a Trainer does otherwise where its model is cut; a mixin.

    ``class OwnTrainer(MeshTrainer, SFTTrainer): ...``. Every rank constructs it and calls ``train``,
    ``evaluate``, ``predict`` and ``save_model``, under torchrun, ``accelerate launch`` or
    :func:`pyparallel.launch`, with the arguments of the Trainer behind it.

    Raises:
        ValueError: the model is not a transformers model that :func:`pyparallel.parallelize` has cut, or
            is cut over pp or cp; an argument whose work is the mesh's (FSDP, DeepSpeed, a
            ``parallelism_config``), or that would write or gather shards.
    """

    @property
    def mesh(self) -> Mesh:
        """That the model is cut over."""
        for module in self.model.modules():
            if isinstance(module, ShardedModule):
                mesh = mesh_of(module.group)
                if mesh is not None:
                    return mesh
        raise ValueError(
            f"model: expected a transformers model that is cut over a mesh, got a "
            f"{type(self.model).__name__}; use pyparallel.parallelize(model, mesh) first"
        )

    def get_tp_size(self) -> int:
        return self.mesh.tp.size

    def create_accelerator_and_postprocess(self) -> None:
        if self.model is None:
            raise ValueError(
                "model: expected a model that is cut over a mesh, got model_init; give the model"
            )
        mesh = self.mesh
        _check(self.model, mesh, self.args)
        super().create_accelerator_and_postprocess()
        if mesh.tp.size > 1:
            # Accelerate cuts data by axes of these names. Its own way to them, a ParallelismConfig, is
            # for FSDP, and for GPUs.
            axes = init_device_mesh(
                mesh.device_mesh.device_type,
                (mesh.dp.size, mesh.tp.size),
                mesh_dim_names=("dp_replicate", "tp"),
            )
            self.accelerator._prepare_device_mesh = lambda: axes

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        data = options["dataloader_config"]
        if self.mesh.tp.size > 1 and self.mesh.dp.size > 1:
            if data.dispatch_batches:
                raise ValueError(
                    "dispatch_batches: expected False on a mesh of dp and tp, where accelerate hands "
                    "every rank the same batch; leave it out"
                )
            data.dispatch_batches = False
        return super()._build_accelerator_args(**options)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        if not training or self.mesh.world.size == 1:
            return super()._wrap_model(model, training, dataloader)
        if self.accelerator.unwrap_model(model, keep_torch_compile=False) is not model:
            return model
        # Autocast and torch.compile; not DDP over the whole world.
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model._is_accelerate_prepared = True
        if self.mesh.dp.size == 1:
            return model
        return data_parallel(
            model,
            self.mesh,
            average=True,
            find_unused_parameters=self.accelerator.ddp_handler.find_unused_parameters,
            bucket_cap_mb=self.args.ddp_bucket_cap_mb,
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(batch_samples, device)
        if torch.is_tensor(count) and not self.args.average_tokens_across_devices:
            # Transformers has divided by the ranks of one batch, over which it has not summed.
            return count * self.mesh.tp.size
        return count

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> transformers.trainer_utils.EvalLoopOutput:
        if self.mesh.tp.size > 1:
            once = copy.copy(self.accelerator)
            once.gather = self._gather_once
            # The Trainer forgets it at the end of each evaluation.
            self.gather_function = once.gather_for_metrics
        return super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def _gather_once(self, tensors: Any) -> Any:
        """All replicas' rows: of the ranks of one tp group, which have the same, the first one's."""
        from accelerate.utils import recursively_apply

        # tp varies fastest.
        world, tp = self.mesh.world.size, self.mesh.tp.size
        return recursively_apply(
            lambda whole: whole.unflatten(0, (world, -1))[::tp].flatten(0, 1),
            self.accelerator.gather(tensors),
        )

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.mesh.tp.size

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save or self.mesh.tp.size == 1:
            super()._save(output_dir, state_dict)
        else:
            # All ranks join the dense tensors, which the first one writes.
            self.model.save_pretrained(
                output_dir or self.args.output_dir, is_main_process=False, state_dict=state_dict
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save(
            self.model,
            folder / SHARDED,
            self.mesh,
            optimizer=_bare(self.optimizer),
            overwrite=True,
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore(model or self.model, _sharded(resume_from_checkpoint), self.mesh)

    def _load_best_model(self) -> None:
        restore(self.model, _sharded(self.state.best_model_checkpoint), self.mesh)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        restore(self.model, _sharded(checkpoint), self.mesh, optimizer=_bare(self.optimizer))
        state = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(state)


class Trainer(MeshTrainer, transformers.Trainer):
    """``transformers.Trainer`` for a model that :func:`pyparallel.parallelize` has cut over dp x tp.

    The arguments are transformers'; see :class:`MeshTrainer`, and docs/trainer.md.
    """


def _check(model: nn.Module, mesh: Mesh, args: transformers.TrainingArguments) -> None:
    whole = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(whole, transformers.PreTrainedModel):
        raise ValueError(
            f"model: expected a transformers model, got a {type(model).__name__}; use "
            f"pyparallel.parallelize(model, mesh), or load(...).model where that is transformers' own"
        )
    if mesh.pp.size > 1 or mesh.cp.size > 1:
        raise ValueError(
            f"mesh: expected dp and tp alone for Trainer, got {mesh}; train over pp and cp with "
            f"pyparallel.Pipeline, or in a loop of your own"
        )
    if args.world_size != mesh.world.size:
        # The loss is scaled by processes // tp: 0 where each rank takes itself for the only one.
        raise ValueError(
            f"args: expected TrainingArguments that know all {mesh.world.size} ranks of {mesh}, got "
            f"{args.world_size}; on CPUs give them use_cpu=True, and make them after init_mesh"
        )
    refused = {
        "fsdp": (bool(args.fsdp), "the mesh says who holds what"),
        "deepspeed": (bool(args.deepspeed), "the mesh says who holds what"),
        "parallelism_config": (
            args.parallelism_config is not None,
            "it is made of the mesh",
        ),
        "save_on_each_node": (args.save_on_each_node, "the world's first rank writes"),
        "eval_use_gather_object": (
            args.eval_use_gather_object,
            "ranks of tp have the same objects",
        ),
        "save_only_model": (
            args.save_only_model and args.load_best_model_at_end,
            "the best model is read from what is saved beside it",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ValueError(f"{name}: expected its default over {mesh}, since {why}; leave it out")


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate's stands before."""
    return getattr(optimizer, "optimizer", optimizer)


def _sharded(checkpoint: str) -> Path:
    folder = Path(checkpoint) / SHARDED
    if not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint that pyparallel.Trainer wrote, with {SHARDED}/ in it; "
            f"from another's weights start with pyparallel.load(folder, mesh), without resuming"
        )
    return folder
