"""Build a model of which every rank reads only its own slices."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from pyparallel.checkpoint.gguf import GGUFCheckpoint
from pyparallel.checkpoint.source import Checkpoint, CheckpointError, open_checkpoint
from pyparallel.mesh import Mesh
from pyparallel.models.config import (
    DecoderConfig,
    UnknownArchitectureError,
    from_hugging_face,
)
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.models.fill import Progress, fill
from pyparallel.models.generation import read_generation
from pyparallel.models.gguf_config import from_gguf
from pyparallel.models.head_dropout import share_generator_state
from pyparallel.models.stage import Stage, stages_of, stages_of_rank
from pyparallel.models.stored import check_sizes, stored_dtype, untie_if_stored

__all__ = ["WEIGHTS", "decoder_config", "load", "load_stages", "stored_dtype"]

WEIGHTS = ("int8", "blocks")
# The fields that count what tensors are made of, by their names in a config.json.
_SIZES = {
    **{name: name for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")},
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_positions",
}


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
    transformers: bool = False,
) -> nn.Module:
    """The model in ``path``, cut over ``mesh.tp``; each rank reads only its own slices.

    Over several ``mesh.pp`` ranks it is this rank's stage of the model, and only the stage's tensors are
    read; see :mod:`pyparallel.models.stage`.

    Its ``loaded_from`` is the path, where :func:`pyparallel.save` finds its config and tokenizer.

    ``load(...).train()`` drops what the checkpoint's config says, as transformers' model does in
    training, with masks that do not depend on the number of tp, sp, cp and pp ranks: the ranks get the
    first one's random state here, and have to draw alike from it.

    Peak memory of a rank is its share and one tensor. Llama, Mistral, Qwen2, Qwen3, GPT-2 and GPT-NeoX
    become a :class:`Decoder`, or over several ``mesh.cp`` ranks a :class:`ContextDecoder`; any other
    architecture with a tensor-parallel plan becomes its transformers model, parallelized.

    Args:
        path: a folder of safetensors, a .safetensors or .gguf file, or an opened checkpoint.
        dtype: of the parameters; by default what the checkpoint's config names, else what its first
            tensor of floats is (fp32 for a GGUF).
        progress: called with (bytes read, bytes of this rank in all) after each parameter.
        sequence_parallel, recompute: for training, as :class:`Decoder` takes them; a transformers
            model recomputes by its own ``gradient_checkpointing_enable()``.
        stage: which part of a :class:`Decoder`; by default stage ``mesh.pp.rank`` of ``mesh.pp.size``.
        weights: "int8" rounds every matrix (a tied embedding too) to int8 with a scale a row as it is
            read: half of bf16's bytes to hold and to read a token. "blocks" holds every matrix that a
            GGUF stores as Q4_0, Q4_1 or Q8_0 in its bytes, on the CPU; its numbers are then the file's,
            not rounded to ``dtype``. A matrix of another type, of several types (q, k and v; gate and
            up) or whose columns are cut inside a block of 32 is read densely, as ever; a module's
            ``packed`` says. Both are for inference with a decoder, and the weights are the same numbers
            at every number of ranks. Activations, cache, norms and biases stay in ``dtype``.
        transformers: whatever the family, return transformers' own model as :func:`parallelize` cuts
            it, for its forward with ``labels=``, its ``generate`` and ``pipeline()``, Trainer and peft.

    Raises:
        CheckpointError: a file is missing or broken; a tensor is missing, extra or mis-shaped.
        ValueError: an unknown architecture, one that can't be cut over ``mesh.cp`` or ``mesh.pp``, or
            more ranks than its heads or layers can be cut into; ``weights`` with
            ``sequence_parallel`` or a transformers model; blocks of another file or device.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    device = torch.device(device or mesh.device_mesh.device_type)
    _check_weights(weights, checkpoint, device, sequence_parallel)
    try:
        config = decoder_config(checkpoint)
    except UnknownArchitectureError:
        if isinstance(checkpoint, GGUFCheckpoint):
            raise
        config = None
    dtype = dtype or stored_dtype(checkpoint)
    with closing(checkpoint):
        if config is None or transformers:
            _check_for_transformers(checkpoint, mesh, stage, recompute, weights, transformers)
            # Only here: transformers is imported where a model of its own is loaded.
            from pyparallel.models.hugging_face import load_hugging_face, load_transformers

            build = load_transformers if transformers else load_hugging_face
            model = build(
                checkpoint,
                mesh,
                dtype=dtype,
                device=device,
                progress=progress,
                sequence_parallel=sequence_parallel,
            )
        else:
            model = _empty_decoder(config, mesh, dtype, device, stage, sequence_parallel, recompute)
            fill(model, checkpoint, device=device, progress=progress, weights=weights)
            model.eval()
    model.loaded_from = checkpoint.path
    model.generation = read_generation(checkpoint.path)
    return model


def _check_weights(
    weights: str | None, checkpoint: Checkpoint, device: torch.device, sequence_parallel: bool
) -> None:
    """Whether the matrices of this checkpoint can be held as ``weights`` says."""
    if weights is None:
        return
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights: expected None (as dtype says), 'int8' or 'blocks', got {weights!r}"
        )
    if sequence_parallel:
        raise ValueError(
            f"weights: expected None with sequence_parallel, since {weights} is for inference; got "
            f"{weights!r}"
        )
    if weights == "blocks" and not isinstance(checkpoint, GGUFCheckpoint):
        raise ValueError(
            f"weights: expected None or 'int8' for {checkpoint.path}, since only a GGUF file has "
            f"blocks; got 'blocks'"
        )
    if weights == "blocks" and device.type != "cpu":
        raise ValueError(
            f"weights: expected None or 'int8' on {device}, since only CPU kernels read blocks; got "
            f"'blocks'"
        )


def _check_for_transformers(
    checkpoint: Checkpoint,
    mesh: Mesh,
    stage: Stage | None,
    recompute: str,
    weights: str | None,
    asked: bool,
) -> None:
    """What a model that keeps transformers' modules can't be asked for; ``asked``: it is wanted so."""
    values = checkpoint.config()
    kind = values.get("model_type") or values.get("general.architecture")
    if mesh.cp.size > 1 and not asked:
        raise ValueError(
            f"cp: expected 1 for a {kind} model, which keeps its own attention; got {mesh.cp.size}"
        )
    if mesh.pp.size > 1 and not asked:
        raise ValueError(
            f"pp: expected 1 to load a {kind} model, got {mesh.pp.size}; load it with transformers=True"
        )
    if stage is not None:
        raise ValueError(
            f"stage: expected None for a {kind} model, whose stages parallelize() cuts; got {stage}"
        )
    if recompute != "none":
        raise ValueError(
            f"recompute: expected 'none' for a {kind} model, got {recompute!r}; call its "
            f"gradient_checkpointing_enable()"
        )
    if weights is not None:
        raise ValueError(
            f"weights: expected None for a {kind} model, which keeps transformers' modules; got "
            f"{weights!r}"
        )


def _empty_decoder(
    config: DecoderConfig,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    stage: Stage | None,
    sequence_parallel: bool,
    recompute: str,
) -> Decoder:
    """This rank's part of the decoder, in training mode and without storage."""
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
    model.pipeline, model.replica = mesh.pp, mesh.dp.rank
    if model.train().drops:
        # What is dropped is drawn alike on the ranks that hold one model.
        for group in (mesh.tp, mesh.cp, mesh.pp):
            if group.size > 1:
                share_generator_state(group, device)
    return model


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


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """The decoder that a checkpoint describes; where both the embedding and the head of a tied one are
    stored, and differ, it is not tied.

    Raises:
        CheckpointError: the config is not one of a decoder, or of a larger one than the tensors are.
        UnknownArchitectureError: the decoder has no such model type.
    """
    values = checkpoint.config()
    check_sizes(checkpoint, values)
    try:
        if isinstance(checkpoint, GGUFCheckpoint):
            config = from_gguf(values)
        else:
            config = from_hugging_face(values)
    except (UnknownArchitectureError, CheckpointError):
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    check_sizes(checkpoint, {key: getattr(config, field) for key, field in _SIZES.items()})
    return untie_if_stored(config, checkpoint)
