"""Load a transformers model of which every rank reads only its own slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyparallel.checkpoint.format import one_line
from pyparallel.checkpoint.gguf import GGUFCheckpoint
from pyparallel.checkpoint.source import Checkpoint, CheckpointError
from pyparallel.cut.shard import REPLICATED
from pyparallel.mesh import Mesh
from pyparallel.models.generation import NAME, read_generation
from pyparallel.models.gguf_config import hugging_face_config
from pyparallel.models.parallelize import named_shardings, parallelize
from pyparallel.models.stored import equal_tensors
from pyparallel.models.swap.plans import parent_of
from pyparallel.models.transformers_decoder import TransformersDecoder
from pyparallel.models.transformers_names import stored_names

Progress = Callable[[int, int], None]


def load_hugging_face(
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """As :func:`load_transformers`, and made ready for :func:`pyparallel.generate`.

    Returns:
        A :class:`TransformersDecoder` (its ``model`` is the transformers one) where the model generates
        text, else the transformers model.

    Raises:
        CheckpointError, ValueError: as :func:`load_transformers`.
    """
    model = load_transformers(
        checkpoint,
        mesh,
        dtype=dtype,
        device=device,
        progress=progress,
        sequence_parallel=sequence_parallel,
    )
    return TransformersDecoder(model, mesh.tp) if model.can_generate() else model


def load_transformers(
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """The transformers model in ``checkpoint``, as :func:`parallelize` cuts it over ``mesh``.

    The model is built without storage for its parameters, cut, and filled; a rank's peak memory is its
    share and one tensor.

    Args:
        dtype: of the parameters; by default the configuration's.
        progress: called with (bytes read, bytes of this rank in all) after each parameter.
        sequence_parallel: as :func:`parallelize` takes it.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped; the message names it.
        ValueError: transformers or parallelize does not know the model.
    """
    model = _empty_model(checkpoint, dtype)
    if _is_untied(model, checkpoint):
        model = _empty_model(checkpoint, dtype, untie=True)
    # Of the whole model: a stage of a pipeline has a part of it.
    stored, shapes = _stored_tensors(model, checkpoint), _shapes(model)
    parallelize(model, mesh, sequence_parallel=sequence_parallel)
    _fill(model, checkpoint, stored, shapes, mesh.tp.rank, torch.device(device), progress)
    model.eval()
    _take_generation_config(model, Path(checkpoint.path))
    return model


def _is_untied(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether tensors that the config ties are all stored, and differ: transformers keeps them apart."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = stored_names(model, checkpoint) if tied else {}
    return any(
        one in stored
        and other in stored
        and not equal_tensors(checkpoint, stored[one], stored[other])
        for one, other in tied.items()
    )


def _take_generation_config(model: nn.Module, path: Path) -> None:
    """Let the model's own generate() have the file that transformers would read."""
    from transformers import GenerationConfig

    read_generation(path)
    folder = path if path.is_dir() else path.parent
    if model.can_generate() and (folder / NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, *, untie: bool = False
) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{checkpoint.path}: only transformers knows this model; "
            f"install it: pip install 'pyparallel-kernels[hf]'"
        ) from None
    values = _config_of(checkpoint)
    model_type, names = values.get("model_type"), values.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{checkpoint.path}: transformers {transformers.__version__} has no model type "
            f"{model_type!r} with the architecture {names[0]!r}"
        )
    if untie:
        values["tie_word_embeddings"] = False
        if isinstance(values.get("text_config"), dict):
            values["text_config"] = {**values["text_config"], "tie_word_embeddings": False}
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        with parameters_on_meta():
            model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as error:
        # Its classes check their keys, and raise in many ways, over several lines.
        raise CheckpointError(
            f"{checkpoint.path}: transformers makes no {names[0]} of its config "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    if isinstance(checkpoint, GGUFCheckpoint):
        _divide_frequencies(model, checkpoint.config().get("rope_factors"))
    return model


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What its config.json says, or would say."""
    values = dict(checkpoint.config())
    if not isinstance(checkpoint, GGUFCheckpoint):
        return values
    # Which no config.json says: they go into the built model.
    values.pop("rope_factors", None)
    return hugging_face_config(values)


def _divide_frequencies(model: nn.Module, factors: Sequence[float] | None) -> None:
    """Divide the rotary frequencies by what a GGUF lists for them (``rope_freqs.weight``)."""
    if factors is None:
        return
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                frequencies = getattr(module, name)
                setattr(module, name, frequencies / frequencies.new_tensor(factors))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A tied parameter comes by again, and has to stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            # transformers' own mark: drawing values that a meta tensor can't have takes most of a start.
            param._is_hf_initialized = True
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _stored_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's tensor for each name of a parameter or persistent buffer, tied ones' too.

    Raises:
        CheckpointError: one is missing, or extra.
    """
    stored = stored_names(model, checkpoint)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        source = next((stored[name] for name in tied if name in stored), None)
        if source is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {tied[0]} is missing")
        stored |= {name: source for name in tied}
    for name in model.state_dict():
        if name not in stored:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
    return stored


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The dense shape of each tensor that a checkpoint has."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Read every parameter and every persistent buffer of a parallelized model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shardings = named_shardings(model)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() * p.itemsize for p in parameters.values())
    done = 0
    for name, parameter in parameters.items():
        source = _checked(checkpoint, stored[name], shapes[name])
        value = checkpoint.read(source, shardings[name], rank, dtype=parameter.dtype).to(device)
        filled = nn.Parameter(value, parameter.requires_grad)
        for other in names[id(parameter)]:
            setattr(model.get_submodule(parent_of(other)), other.rpartition(".")[2], filled)
        done += value.numel() * value.itemsize
        if progress is not None:
            progress(done, total)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        value = buffer
        if name in saved:
            source = _checked(checkpoint, stored[name], shapes[name])
            value = checkpoint.read(source, REPLICATED, rank, dtype=buffer.dtype)
        setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], value.to(device))


def _checked(checkpoint: Checkpoint, source: str, shape: tuple[int, ...]) -> str:
    if checkpoint.shapes[source] != shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source} has shape {checkpoint.shapes[source]}, expected {shape}"
        )
    return source
