"""Build a model of which every rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pyparallel.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from pyparallel.gguf_checkpoint import GGUFCheckpoint
from pyparallel.huge_pages import HugePages, taken_bytes
from pyparallel.mesh import Mesh
from pyparallel.models.config import (
    DecoderConfig,
    UnknownArchitectureError,
    from_hugging_face,
)
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.models.gguf_config import from_gguf
from pyparallel.models.stage import Stage, stages_of, stages_of_rank
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
    sequence_parallel: bool = False,
    recompute: str = "none",
    stage: Stage | None = None,
    weights: str | None = None,
) -> nn.Module:
    """The model in ``path``, cut over ``mesh.tp``; each rank reads only its own slices.

    Over several ``mesh.pp`` ranks it is this rank's stage of the model, and only the stage's tensors are
    read; see :mod:`pyparallel.models.stage`.

    Its ``loaded_from`` is the path, where :func:`pyparallel.save` finds its config and tokenizer.

    Peak memory of a rank is its share and one tensor. Llama, Mistral, Qwen2, Qwen3, GPT-2 and GPT-NeoX
    become a :class:`Decoder`, or over several ``mesh.cp`` ranks a :class:`ContextDecoder`; any other
    architecture with a tensor-parallel plan becomes its transformers model, parallelized.

    Args:
        path: a folder of safetensors, a .safetensors or .gguf file, or an opened checkpoint.
        dtype: of the parameters; by default the checkpoint's (fp32 for a GGUF).
        progress: called with (bytes read, bytes of this rank in all) after each parameter.
        sequence_parallel, recompute: for training, as :class:`Decoder` takes them; a transformers
            model recomputes by its own ``gradient_checkpointing_enable()``.
        stage: which part of a :class:`Decoder`; by default stage ``mesh.pp.rank`` of ``mesh.pp.size``.
        weights: "int8" rounds every matrix (a tied embedding too) to int8 with a scale a row as it is
            read: half of bf16's bytes to hold and to read a token. For inference with a decoder; all
            numbers of ranks round alike. Activations, cache, norms and biases stay in ``dtype``.

    Raises:
        CheckpointError: a file is missing or broken; a tensor is missing, extra or mis-shaped.
        ValueError: an unknown architecture, one that can't be cut over ``mesh.cp`` or ``mesh.pp``, or
            more ranks than its heads or layers can be cut into; int8 weights with
            ``sequence_parallel`` or a transformers model.
    """
    if weights not in (None, "int8"):
        raise ValueError(f"weights: expected None (as dtype says) or 'int8', got {weights!r}")
    if weights is not None and sequence_parallel:
        raise ValueError(
            "weights: expected None with sequence_parallel, since int8 is for inference; got 'int8'"
        )
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    device = device or mesh.device_mesh.device_type
    try:
        config = decoder_config(checkpoint)
    except UnknownArchitectureError:
        if isinstance(checkpoint, GGUFCheckpoint):
            raise
        if mesh.cp.size > 1:
            raise ValueError(
                f"cp: expected 1 for a {checkpoint.config().get('model_type')} model, which keeps its "
                f"own attention; got {mesh.cp.size}"
            ) from None
        if mesh.pp.size > 1 or stage is not None:
            raise ValueError(
                f"pp: expected 1 to load a {checkpoint.config().get('model_type')} model, got "
                f"{mesh.pp.size}; load it with transformers and call parallelize()"
            ) from None
        if recompute != "none":
            raise ValueError(
                f"recompute: expected 'none' for a {checkpoint.config().get('model_type')} model, got "
                f"{recompute!r}; call its gradient_checkpointing_enable()"
            ) from None
        if weights is not None:
            raise ValueError(
                f"weights: expected None for a {checkpoint.config().get('model_type')} model, which "
                f"keeps transformers' modules; got {weights!r}"
            ) from None
        from pyparallel.models.hugging_face import load_hugging_face

        model = load_hugging_face(
            checkpoint,
            mesh,
            dtype=dtype,
            device=device,
            progress=progress,
            sequence_parallel=sequence_parallel,
        )
        model.loaded_from = checkpoint.path
        return model
    dtype = dtype or stored_dtype(checkpoint)
    options = {
        "group": mesh.tp,
        "stage": stage or stages_of(config, mesh.pp.size)[mesh.pp.rank],
        "sequence_parallel": sequence_parallel,
        "recompute": recompute,
    }
    if mesh.cp.size > 1:
        model = ContextDecoder(config, "meta", dtype, context=mesh.cp, **options)
    else:
        model = Decoder(config, "meta", dtype, **options)
    model.pipeline = mesh.pp
    fill(model, checkpoint, device=device, progress=progress, int8=weights == "int8")
    model.loaded_from = checkpoint.path
    return model.eval()


def load_stages(
    path: str | Path | Checkpoint,
    mesh: Mesh,
    *,
    chunks: int,
    order: str = "loop",
    balance: str = "compute",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> list[nn.Module]:
    """This rank's ``chunks`` stages of ``mesh.pp.size * chunks``, as :func:`load` loads one.

    Args:
        chunks: stages a rank (v), for interleaved schedules.
        order: "loop", or "v" for a schedule that goes there and back (zero-bubble V); see
            :func:`pyparallel.models.stage.stages_of_rank`.
        balance: by what the layers are spread; see :func:`pyparallel.models.stage.stages_of`.

    Raises:
        ValueError: as :func:`load`; the model has fewer layers than stages.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    stages = stages_of(decoder_config(checkpoint), mesh.pp.size * chunks, balance=balance)
    return [
        load(
            checkpoint,
            mesh,
            dtype=dtype,
            device=device,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            stage=stages[index],
        )
        for index in stages_of_rank(mesh.pp.size, mesh.pp.rank, chunks, order=order)
    ]


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
    int8: bool = False,
) -> None:
    """Read every parameter of a decoder, or of a stage of one, on the meta device; with ``int8`` round
    its matrices.

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
    held = {
        n: torch.int8 if int8 and _is_matrix(model, n) else p.dtype for n, p in parameters.items()
    }
    block = None
    if torch.device(device).type == "cpu":
        block = HugePages(sum(taken_bytes(p.numel(), held[n]) for n, p in parameters.items()))
    for name, parameter in parameters.items():
        # Allocated before anything is read, so that what reading takes is given back on top of it.
        if block is not None and held[name] == parameter.dtype:
            value = block.zeros(parameter.shape, parameter.dtype)
        else:
            value = torch.empty_like(parameter, device="cpu", requires_grad=False)
        source = wanted[model.tied_copies.get(name, name)]
        _read(value, checkpoint, source, model.group.rank)
        _assign(model, name, value.to(device))
        if held[name] != parameter.dtype:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.quantize_weight()
            if block is not None:
                module.weight.data = block.zeros(parameter.shape, torch.int8).copy_(module.weight)
        done += value.numel() * value.itemsize
        if progress is not None:
            progress(done, total)
    model.tie()


def _is_matrix(model: Decoder, name: str) -> bool:
    """Whether matmuls read the parameter: not norms, biases, and tables that are only looked up."""
    if name == "embedding.weight":
        return model.config.tied
    return name == "head.weight" or name.endswith("_proj.weight")


def _read(out: Tensor, checkpoint: Checkpoint, found: tuple[Source, ...], rank: int) -> None:
    """Fill a parameter from its sources, one after another along its axis 0."""
    filled = 0
    for source in found:
        rows = out.shape[0]
        if source.sharding.dim is not None and source.sharding.dim == int(source.transposed):
            rows = source.sharding.sizes[rank]
        part = out.narrow(0, filled, rows)
        part = part.t() if source.transposed else part
        checkpoint.read_into(part, source.name, source.sharding, rank)
        filled += rows


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
