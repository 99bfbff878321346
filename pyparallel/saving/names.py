"""The tensors of a model under the names that a checkpoint knows them by, with how they are cut.

Checkpoints keep the names, the shapes and the layout of Hugging Face's, so that one written from a
:class:`Decoder` loads into the parallelized transformers model, and the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pyparallel.cut.shard import REPLICATED
from pyparallel.layers.parameters import ShardedModule
from pyparallel.mesh import Mesh
from pyparallel.models.config import DecoderConfig
from pyparallel.models.parallelize import named_shardings
from pyparallel.models.stage import tied_copies
from pyparallel.models.weights import Source, sources
from pyparallel.saving.pieces import Piece, pieces_of

# What torch.compile and activation checkpointing put into the names of the modules they wrap.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Named:
    """A tensor of the model and the dense tensors that it is made of.

    Attributes:
        copied: another stage of the pipeline has it too, and saves it.
    """

    value: Tensor
    found: tuple[Source, ...]
    copied: bool = False

    def pieces(self, mesh: Mesh, *, owned: bool) -> Iterator[Piece]:
        """Its pieces on this rank; with ``owned`` those that this rank may write."""
        if not (owned and self.copied):
            yield from pieces_of(self.value, self.found, mesh.tp.rank, owned=owned)


def named_tensors(models: Iterable[nn.Module], mesh: Mesh) -> list[Named]:
    """Every parameter and persistent buffer of this rank's part of a model, tied ones once.

    Args:
        models: one, or this rank's stages of one.

    Raises:
        ValueError: a parameter has no storage, is rounded for inference, or is none that a checkpoint
            has a name for.
    """
    return [named for model in models for named in _named_tensors(unwrap(model)[-1], mesh)]


def _named_tensors(model: nn.Module, mesh: Mesh) -> Iterator[Named]:
    for module in model.modules():
        # After a forward without a backward FSDP may still hold whole parameters.
        if isinstance(module, FSDPModule):
            module.reshard()
    known = _known_sources(model, mesh)
    copies = {_plain(name): owner for name, owner in tied_copies(model).items()}
    if copies and hasattr(model, "peft_config"):
        raise ValueError(
            f"{next(iter(copies))}: tied to a weight of another stage in a model with adapters, which "
            f"has no name in a checkpoint; save the adapters alone by save_pretrained()"
        )
    packed = {
        _plain(f"{name}.weight").removeprefix("."): module.packed.kind
        for name, module in model.named_modules()
        if isinstance(module, ShardedModule) and module.packed is not None
    }
    for name, value in _tensors(model).items():
        if value.is_meta:
            raise ValueError(f"{name}: expected a tensor with storage, got one on the meta device")
        if name in packed:
            raise ValueError(
                f"{name}: expected a floating dtype, got {packed[name]} weights, which are for "
                f"inference; load the model without weights="
            )
        # transformers has one name for what is tied, and this stage has not the owner.
        found = known.get(copies.get(name, name), known.get(name))
        if found is None:
            raise ValueError(f"{name}: not a tensor that checkpoints of this model have")
        yield Named(value, found, copied=name in copies)


def unwrap(model: nn.Module) -> list[nn.Module]:
    """The model and what is inside DDP, torch.compile, and the driver of transformers' generation; the
    last one is the model itself.
    """
    chain = [model]
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif _drives_transformers(model):
            model = model.model
        else:
            return chain
        chain.append(model)


def _drives_transformers(model: nn.Module) -> bool:
    # Its module imports transformers, which nothing else here needs.
    module = sys.modules.get("pyparallel.models.transformers_decoder")
    return module is not None and isinstance(model, module.TransformersDecoder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    return {_plain(name): value for name, value in [*model.named_parameters(), *buffers.items()]}


def _known_sources(model: nn.Module, mesh: Mesh) -> Mapping[str, tuple[Source, ...]]:
    if isinstance(getattr(model, "config", None), DecoderConfig):
        return sources(model.config, mesh.tp.shares)
    cut = {_plain(name): sharding for name, sharding in named_shardings(model).items()}
    names = {name: name for name in _tensors(model)}
    if hasattr(getattr(model, "config", None), "model_type"):
        from pyparallel.models.transformers_names import saved_names

        names = saved_names(model, names)
    return {name: (Source(names[name], cut.get(name, REPLICATED)),) for name in names}


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
