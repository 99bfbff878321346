"""Load a transformers model of which every rank reads only its own slices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyparallel.checkpoint.format import one_line
from pyparallel.checkpoint.source import Checkpoint, CheckpointError
from pyparallel.cut.shard import REPLICATED
from pyparallel.mesh import Mesh
from pyparallel.models.generation import NAME, read_generation
from pyparallel.models.parallelize import named_dense_shapes, named_shardings, parallelize
from pyparallel.models.stored import equal_tensors
from pyparallel.models.swap.plans import parent_of
from pyparallel.models.transformers_decoder import TransformersDecoder

Progress = Callable[[int, int], None]

# Tensors of older checkpoints that hold nothing a model has to load.
NOT_LOADED = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids)$"
)


def load_hugging_face(
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """The transformers model in ``checkpoint``, cut over ``mesh.tp``.

    The model is built without storage for its parameters, cut, and filled; a rank's peak memory is its
    share and one tensor.

    Args:
        dtype: of the parameters; by default the configuration's.
        progress: called with (bytes read, bytes of this rank in all) after each parameter.
        sequence_parallel: as :func:`parallelize` takes it.

    Returns:
        A :class:`TransformersDecoder` (its ``model`` is the transformers one) where the model generates
        text, else the transformers model.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped; the message names it.
        ValueError: transformers or parallelize does not know the model.
    """
    model = _empty_model(checkpoint, dtype)
    if _is_untied(model, checkpoint):
        model = _empty_model(checkpoint, dtype, untie=True)
    parallelize(model, mesh, sequence_parallel=sequence_parallel)
    _fill(model, checkpoint, mesh.tp.rank, torch.device(device), progress)
    model.eval()
    _take_generation_config(model, Path(checkpoint.path))
    return TransformersDecoder(model, mesh.tp) if model.can_generate() else model


def _is_untied(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether tensors that the config ties are all stored, and differ: transformers keeps them apart."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = _stored_names(model, checkpoint) if tied else {}
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
            f"install it: pip install 'pyparallel[hf]'"
        ) from None
    values = dict(checkpoint.config())
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
            return kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    except Exception as error:
        # Its classes check their keys, and raise in many ways, over several lines.
        raise CheckpointError(
            f"{checkpoint.path}: transformers makes no {names[0]} of its config "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A tied parameter comes by again, and has to stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    rank: int,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Read every parameter and every persistent buffer of a parallelized model."""
    stored = _stored_names(model, checkpoint)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shardings, shapes = named_shardings(model), named_dense_shapes(model)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() * p.itemsize for p in parameters.values())
    done = 0
    for name, parameter in parameters.items():
        tied = names[id(parameter)]
        source = next((stored[other] for other in tied if other in stored), None)
        if source is None:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        if checkpoint.shapes[source] != shapes[name]:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} has shape {checkpoint.shapes[source]}, "
                f"expected {shapes[name]}"
            )
        value = checkpoint.read(source, shardings[name], rank, dtype=parameter.dtype).to(device)
        filled = nn.Parameter(value, parameter.requires_grad)
        for other in tied:
            setattr(model.get_submodule(parent_of(other)), other.rpartition(".")[2], filled)
        done += value.numel() * value.itemsize
        if progress is not None:
            progress(done, total)
    _fill_buffers(model, checkpoint, stored, rank, device)


def _fill_buffers(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    rank: int,
    device: torch.device,
) -> None:
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        value = buffer
        if name in saved:
            if name not in stored:
                raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
            if checkpoint.shapes[stored[name]] != tuple(buffer.shape):
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {stored[name]} has shape "
                    f"{checkpoint.shapes[stored[name]]}, expected {tuple(buffer.shape)}"
                )
            value = checkpoint.read(stored[name], REPLICATED, rank, dtype=buffer.dtype)
        setattr(model.get_submodule(parent_of(name)), name.rpartition(".")[2], value.to(device))


def _stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name of each of the model's tensors, where it has one.

    Raises:
        CheckpointError: the checkpoint has a tensor that is none of the model's, or has it in a layout
            that transformers converts while loading.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
    wanted: dict[str, Any] = model.state_dict()
    ignored = [re.compile(rule) for rule in model._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, str] = {}
    for source in checkpoint.shapes:
        name, converter = rename_source_key(
            source, renamings, converters, model.base_model_prefix, wanted
        )
        if name in wanted and converter is None:
            found[name] = source
        elif converter is not None:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} is stored in another layout than the model's "
                f"{name}; load it with transformers and call parallelize()"
            )
        elif not NOT_LOADED.search(source) and not any(rule.search(name) for rule in ignored):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {source} is not one of a {type(model).__name__}"
            )
    return found


def saved_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What transformers would call these tensors of a model in a checkpoint.

    Raises:
        ValueError: it would store them in another layout.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    held = list(names)
    # Its own saving runs on numbers that stand for the tensors.
    numbers = {tied.get(name, name): torch.tensor(number) for number, name in enumerate(held)}
    reverted = {
        int(number): name
        for name, number in revert_weight_conversion(model, numbers).items()
        if number.dim() == 0
    }
    if sorted(reverted) != list(range(len(held))):
        raise ValueError(
            f"{type(model).__name__}: transformers stores its tensors in another layout than the "
            f"model's; save and export know no way there"
        )
    return {name: reverted[number] for number, name in enumerate(held)}
