"""``save_pretrained`` of a transformers model that is cut: the dense model's folder.

transformers writes what ``state_dict`` has, and of a cut model that is this rank's shards. So the ranks
of tp join them first, one parameter at a time, and the world's first rank writes what the dense model
would write, to the bit, by transformers' own method with whatever options it was given. That rank holds
the dense model in the host's memory for a while; :func:`pyparallel.export` never does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_watch import naming_lost_peers
from pyparallel.layers.find_shards import is_dtensor
from pyparallel.layers.parameters import ShardedModule
from pyparallel.models.swap.stage import StageModel

# The name of a tensor, with the module that has it cut and its name in there.
Cut = dict[str, tuple[ShardedModule, str]]


def save_dense(model: nn.Module) -> None:
    """Let ``save_pretrained`` of ``model``'s class, and of all of transformers', know cut models."""
    for kind in type(model).__mro__:
        if kind.__name__ == "PreTrainedModel":
            theirs = vars(kind)["save_pretrained"]
            if not hasattr(theirs, "knows_cut_models"):
                kind.save_pretrained = _of_the_dense(theirs)


def _of_the_dense(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def save_pretrained(
        self: nn.Module,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Transformers' own; of a cut model a call of all ranks, of which the first one writes.

        Raises:
            CheckpointError: on every rank, if any rank fails.
        """
        cut = cut_tensors(self)
        if not cut and not isinstance(self, StageModel):
            return theirs(self, save_directory, is_main_process, state_dict, *args, **kwargs)
        values = dict(self.state_dict() if state_dict is None else state_dict)
        _check(self, values, kwargs.get("distributed_checkpoint", False))
        parts = agree_on_parts(cut, values, dist.group.WORLD)
        writes = dist.get_rank() == 0
        dense = join_parts(cut, values, parts, keep=writes)
        error = None
        if writes:
            # What a folder of several files tells of the model's size is the dense one's.
            self.num_parameters = functools.partial(_num_parameters, self, cut)
            try:
                theirs(self, save_directory, is_main_process, dense, *args, **kwargs)
            except Exception as caught:
                error = caught
            finally:
                del self.num_parameters
        raise_together(error and f"{type(error).__name__}: {error}", error)

    save_pretrained.knows_cut_models = True
    return save_pretrained


def cut_tensors(model: nn.Module) -> Cut:
    """The tensors of a model that are shards."""
    cut = {
        id(module._parameters[leaf]): (module, leaf)
        for module in model.modules()
        if isinstance(module, ShardedModule) and module.group.size > 1
        for leaf, sharding in module.shardings.items()
        if sharding.dim is not None
    }
    # A shard may have a second name in a module that is not cut, as BERT's head has for its bias.
    named = model.named_parameters(remove_duplicate=False)
    return {name: cut[id(parameter)] for name, parameter in named if id(parameter) in cut}


def _check(model: nn.Module, values: Mapping[str, Any], distributed: bool) -> None:
    """Raise where the ranks of tp alone can't make the dense model."""
    why = None
    if isinstance(model, StageModel):
        why = "expected a whole model, got one stage of a pipeline"
    elif any(is_dtensor(value) for value in values.values()):
        why = "expected parameters that are cut over tp alone, but FSDP has cut them too"
    elif distributed:
        why = (
            "distributed_checkpoint: expected False, since transformers does not know these shards"
        )
    if why is not None:
        # Every rank sees the same.
        raise CheckpointError(
            f"save_pretrained: {why}; use pyparallel.export(model, folder, mesh), or "
            f"pyparallel.save(model, folder, mesh)"
        )


def agree_on_parts(
    cut: Cut, values: Mapping[str, Any], process_group: dist.ProcessGroup
) -> list[str]:
    """The names of what has to be joined: of what any rank has less of than the dense tensor.

    Args:
        process_group: the ranks that have these tensors, or parts of them.

    Raises:
        CheckpointError: on every rank of the world, if a rank has neither.
    """
    own = [
        name
        for name, (module, leaf) in cut.items()
        if name in values and tuple(values[name].shape) != module.dense_shapes[leaf]
    ]
    with naming_lost_peers("save_pretrained"):
        told = gather_objects(process_group, own)
    parts = sorted({name for names in told for name in names})
    odd = [name for name in parts if not _is_part(values.get(name), *cut[name])]
    raise_together(
        f"state_dict: expected this rank's part of {odd[0]} on every rank, as model.state_dict() has "
        f"it, or the dense tensor on every rank"
        if odd
        else None
    )
    return parts


def _is_part(value: Any, module: ShardedModule, leaf: str) -> bool:
    shape = module.shardings[leaf].local_shape(module.dense_shapes[leaf], module.group.rank)
    return isinstance(value, Tensor) and tuple(value.shape) == shape


def join_parts(
    cut: Cut, values: Mapping[str, Any], parts: list[str], *, keep: bool
) -> dict[str, Any] | None:
    """``values`` with the dense tensors of ``parts``, tied ones once; a call of all ranks."""
    joined: dict[int, Tensor | None] = {}
    for name in parts:
        module, leaf = cut[name]
        key = id(module._parameters[leaf])
        if key in joined:
            continue
        sharding = module.shardings[leaf]
        sizes = sharding.sizes
        flat = all_gather_raw(values[name].detach(), module.group, dim=sharding.dim, sizes=sizes)
        joined[key] = sharding.join(flat.split(sizes, sharding.dim)).cpu() if keep else None
    if not keep:
        return None
    return values | {name: joined[id(cut[name][0]._parameters[cut[name][1]])] for name in parts}


def _num_parameters(model: nn.Module, cut: Cut) -> int:
    dense = {id(m._parameters[leaf]): math.prod(m.dense_shapes[leaf]) for m, leaf in cut.values()}
    return sum(dense.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def raise_together(text: str | None, error: Exception | None = None) -> None:
    """On every rank, the first rank's error if there is one."""
    with naming_lost_peers("save_pretrained"):
        told = gather_objects(dist.group.WORLD, text)
    for rank, line in enumerate(told):
        if line is not None:
            raise CheckpointError(f"save_pretrained: rank {rank}: {line}") from error
