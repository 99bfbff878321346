"""Read a decoder's parameters from a checkpoint: each rank its own slices, as it will hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyparallel.checkpoint.source import Checkpoint, CheckpointError
from pyparallel.cut.huge_pages import HugePages, taken_bytes
from pyparallel.cut.quantize import BLOCK_BYTES, block_row_bytes
from pyparallel.cut.shard import Sharding
from pyparallel.layers.parameters import ShardedModule
from pyparallel.models.decoder import Decoder
from pyparallel.models.stored import TIED_NAMES, stored_name
from pyparallel.models.weights import Source, Sources, sources

# Tensors that checkpoints carry and that hold nothing a model has to load.
NOT_LOADED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rope_freqs.weight",
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Form:
    """What a parameter is held in.

    Attributes:
        kind: of a packed one; or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str | None = None

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


def fill(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    progress: Progress | None = None,
    weights: str | None = None,
) -> None:
    """Read every parameter of a decoder, or of a stage of one, on the meta device.

    Args:
        progress, weights: as :func:`pyparallel.load` takes them.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped; the message names it.
    """
    wanted = _as_stored(sources(model.config, model.group.shares), checkpoint)
    if model.config.tied:
        wanted = _tied_as_stored(wanted, model.config.family, checkpoint)
    extra = set(checkpoint.shapes) - {source.name for found in wanted.values() for source in found}
    extra = {name for name in extra if not name.endswith(NOT_LOADED)}
    if model.config.tied:
        extra -= set(TIED_NAMES[model.config.family])
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {min(extra)} is not one of a {model.config.family} model"
            + (f" (nor are {len(extra) - 1} others)" if len(extra) > 1 else "")
        )
    rank = model.group.rank
    for source in {source.name for found in wanted.values() for source in found}:
        if source in checkpoint.shapes and not checkpoint.dtype(source).is_floating_point:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} holds {checkpoint.dtype(source)}, expected floats"
            )
    parameters = dict(model.named_parameters())
    found = {name: wanted[model.tied_copies.get(name, name)] for name in parameters}
    forms = {name: _form(model, name, found[name], checkpoint, weights) for name in parameters}
    total = sum(form.count * form.dtype.itemsize for form in forms.values())
    done = 0
    block = None
    if torch.device(device).type == "cpu":
        block = HugePages(sum(taken_bytes(form.count, form.dtype) for form in forms.values()))
    for name, parameter in parameters.items():
        form = forms[name]
        module = model.get_submodule(name.rpartition(".")[0])
        # Allocated before anything is read, so that what reading takes is given back on top of it.
        if block is not None and form.kind != "int8":
            value = block.zeros(form.shape, form.dtype)
        else:
            value = torch.empty_like(parameter, device="cpu", requires_grad=False)
        if form.kind in BLOCK_BYTES:
            _read(value, checkpoint.read_blocks_into, found[name], rank)
            module.hold_blocks(value, form.kind)
        else:
            _read(value, checkpoint.read_into, found[name], rank)
            setattr(module, name.rpartition(".")[2], nn.Parameter(value.to(device)))
        if form.kind == "int8":
            module.quantize_weight()
            if block is not None:
                module.weight.data = block.zeros(form.shape, form.dtype).copy_(module.weight)
        done += form.count * form.dtype.itemsize
        if progress is not None:
            progress(done, total)
    model.tie()


def _form(
    model: Decoder,
    name: str,
    found: tuple[Source, ...],
    checkpoint: Checkpoint,
    weights: str | None,
) -> _Form:
    parameter = model.get_parameter(name)
    shape = tuple(parameter.shape)
    if weights == "int8" and _is_matrix(model, name):
        return _Form(shape, torch.int8, "int8")
    if weights == "blocks" and name.endswith(".weight") and len(shape) == 2:
        module = model.get_submodule(name.removesuffix(".weight"))
        kinds = {
            None if s.transposed else checkpoint.block_kind(s.name, s.sharding, model.group.rank)
            for s in found
        }
        kind = kinds.pop()
        if isinstance(module, ShardedModule) and not kinds and kind is not None:
            return _Form((shape[0], block_row_bytes(shape[1], kind)), torch.uint8, kind)
    return _Form(shape, parameter.dtype)


def _is_matrix(model: Decoder, name: str) -> bool:
    """Whether matmuls read the parameter: not norms, biases, and tables that are only looked up."""
    if name == "embedding.weight":
        return model.config.tied
    return name == "head.weight" or name.endswith("_proj.weight")


def _read(
    out: Tensor,
    read_into: Callable[[Tensor, str, Sharding, int], None],
    found: tuple[Source, ...],
    rank: int,
) -> None:
    """Fill a parameter from its sources, one after another along its axis 0."""
    filled = 0
    for source in found:
        rows = out.shape[0]
        if source.sharding.dim is not None and source.sharding.dim == int(source.transposed):
            rows = source.sharding.sizes[rank]
        part = out.narrow(0, filled, rows)
        part = part.t() if source.transposed else part
        read_into(part, source.name, source.sharding, rank)
        filled += rows


def _tied_as_stored(wanted: Sources, family: str, checkpoint: Checkpoint) -> Sources:
    """The embedding from the head's tensor, where only that is stored."""
    head = stored_name(checkpoint, TIED_NAMES[family][1])
    (embedding,) = wanted["embedding.weight"]
    if embedding.name in checkpoint.shapes or head is None:
        return wanted
    return {**wanted, "embedding.weight": (replace(embedding, name=head),)}


def _as_stored(wanted: Sources, checkpoint: Checkpoint) -> Sources:
    """The sources under this checkpoint's names: a bare base model's lack the first part."""
    base = next(iter(wanted.values()))[0].name.split(".")[0] + "."
    if any(name.startswith(base) for name in checkpoint.shapes):
        return wanted
    return {
        parameter: tuple(replace(source, name=source.name.removeprefix(base)) for source in found)
        for parameter, found in wanted.items()
    }
