"""Build a model of which every rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyparallel.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from pyparallel.gguf_checkpoint import GGUFCheckpoint
from pyparallel.mesh import Mesh
from pyparallel.models.config import (
    DecoderConfig,
    UnknownArchitectureError,
    from_gguf,
    from_hugging_face,
)
from pyparallel.models.decoder import Decoder
from pyparallel.models.weights import Source, Sources, sources

# Tensors that checkpoints carry and that hold nothing a model has to load.
IGNORED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rope_freqs.weight",
)

Progress = Callable[[int, int], None]


def load(
    path: str | Path | Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """The model in ``path``, cut over ``mesh.tp``; each rank reads only its own slices.

    Peak memory of a rank is its share and one tensor. Llama, Mistral, Qwen2, Qwen3, GPT-2 and GPT-NeoX
    become a :class:`Decoder`; any other architecture with a tensor-parallel plan becomes its
    transformers model, parallelized.

    Args:
        path: a folder of safetensors, a .safetensors or .gguf file, or an opened checkpoint.
        dtype: of the parameters; by default the checkpoint's (fp32 for a GGUF).
        progress: called with (bytes read, bytes of this rank in all) after each parameter.

    Raises:
        CheckpointError: a file is missing or broken; a tensor is missing, extra or mis-shaped.
        ValueError: an unknown architecture, or more ranks than its heads can be cut into.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    device = device or mesh.device_mesh.device_type
    try:
        config = decoder_config(checkpoint)
    except UnknownArchitectureError:
        if isinstance(checkpoint, GGUFCheckpoint):
            raise
        from pyparallel.models.hugging_face import load_hugging_face

        return load_hugging_face(checkpoint, mesh, dtype=dtype, device=device, progress=progress)
    model = Decoder(config, "meta", dtype or stored_dtype(checkpoint), group=mesh.tp)
    fill(model, checkpoint, device=device, progress=progress)
    return model.eval()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What a checkpoint's config says its weights are; fp32 for a GGUF, whose blocks are neither."""
    config = checkpoint.config()
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """The decoder that a checkpoint describes."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return from_gguf(checkpoint.config())
    return from_hugging_face(checkpoint.config())


def fill(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    progress: Progress | None = None,
) -> None:
    """Read every parameter of a decoder on the meta device.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped; the message names it.
    """
    wanted = _as_stored(sources(model.config, model.group.size), checkpoint)
    extra = set(checkpoint.shapes) - {source.name for found in wanted.values() for source in found}
    extra = {name for name in extra if not name.endswith(IGNORED)}
    if model.config.tied:
        extra -= {"lm_head.weight", "embed_out.weight"}
    if extra:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {min(extra)} is not one of a {model.config.family} model"
            + (f" (nor are {len(extra) - 1} others)" if len(extra) > 1 else "")
        )
    parameters = dict(model.named_parameters())
    total = sum(p.numel() * p.itemsize for p in parameters.values())
    done = 0
    for name, parameter in parameters.items():
        value = _read(checkpoint, wanted[name], model.group.rank, parameter.dtype)
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {wanted[name][0].name} gives {name} the shape "
                f"{tuple(value.shape)}, expected {tuple(parameter.shape)}"
            )
        _assign(model, name, value.to(device))
        done += value.numel() * value.itemsize
        if progress is not None:
            progress(done, total)
    if model.config.tied:
        model.head.weight = model.embedding.weight


def _read(
    checkpoint: Checkpoint,
    found: tuple[Source, ...],
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    parts = []
    for source in found:
        part = checkpoint.read(source.name, source.sharding, rank, dtype=dtype)
        parts.append(part.t().contiguous() if source.transposed else part)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _as_stored(wanted: Sources, checkpoint: Checkpoint) -> Sources:
    """The sources under this checkpoint's names: a bare base model's lack the first part."""
    base = next(iter(wanted.values()))[0].name.split(".")[0] + "."
    if any(name.startswith(base) for name in checkpoint.shapes):
        return wanted
    return {
        parameter: tuple(replace(source, name=source.name.removeprefix(base)) for source in found)
        for parameter, found in wanted.items()
    }


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
