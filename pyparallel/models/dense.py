"""The dense model and its tokenizer, as transformers loads them: what ``--check`` compares with."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pyparallel.checkpoint.format import one_line
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.checkpoint.tokenizer import check_tokenizer_files
from pyparallel.checkpoint.tokenizer_cache import entry_of, keep, unpack
from pyparallel.comm.group import Group
from pyparallel.cut.quantize import PackedWeight, quantize_rows
from pyparallel.ops.next_token import Sampling, sample


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers is not installed, and tokenizers and --check need it; "
            "install pyparallel-kernels[hf]"
        ) from None
    # Its bars and advice would mix with what the command prints.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _place(path: str) -> dict[str, Any]:
    """How transformers names what lies at ``path``."""
    place = Path(path)
    if place.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name}
    folder = place.parent if place.suffix == ".safetensors" else place
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a folder or a GGUF file. Code that lies there is never run.

    Raises:
        CheckpointError: there is none, or it is one of its folder's own code.
    """
    transformers = _transformers()
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file or folder for the tokenizer")
    check_tokenizer_files(Path(path))
    try:
        tokenizer = _read_tokenizer(transformers, Path(path))
        # One whose unknown word is in no vocabulary fails when it meets a character that it has not.
        tokenizer("\U0010fffd")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if _wants_code(error):
            raise CheckpointError(_no_code(path, "tokenizer")) from None
        # What panics in Rust is no Exception.
        reason = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(
            f"{path}: no tokenizer could be read from it ({reason}); name its folder with --tokenizer"
        ) from None


def _read_tokenizer(transformers: Any, path: Path) -> Any:
    """As transformers reads it; a GGUF's, which takes it seconds, from what was kept of it, if it is."""

    def read(**place: Any) -> Any:
        return transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)

    if path.suffix != ".gguf":
        return read(**_place(str(path)))
    versions = (transformers.__version__, version("tokenizers"), version("gguf"))
    entry = entry_of(path, versions)
    try:
        folder = tempfile.TemporaryDirectory(prefix="pyparallel-")
    except OSError:
        return read(**_place(str(path)))
    with folder as name:
        if entry is not None and unpack(entry, Path(name)):
            # What is kept is whole; should transformers not read it, it is built anew.
            with contextlib.suppress(Exception):
                tokenizer = read(**_place(name))
                tokenizer.name_or_path = str(path.parent)
                return tokenizer
        tokenizer = read(**_place(str(path)))
        if entry is not None:
            with tempfile.TemporaryDirectory(dir=name) as made:
                tokenizer.save_pretrained(made)
                keep(entry, Path(made))
        return tokenizer


def load_dense(path: str, dtype: torch.dtype) -> torch.nn.Module:
    """The dense transformers model of a checkpoint."""
    transformers = _transformers()
    options = _place(path)
    if "gguf_file" in options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # A GGUF is read under a bar that no setting of transformers turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **options, dtype=dtype, trust_remote_code=False
            )
        except ValueError as error:
            if _wants_code(error):
                raise CheckpointError(_no_code(path, "model")) from None
            raise
    return model.eval()


def _wants_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)


def _no_code(path: str, what: str) -> str:
    return (
        f"{path}: its {what} is Python code of its own (auto_map), which is never run "
        f"(trust_remote_code=False); convert it to a class of transformers"
    )


@torch.no_grad()
def round_to_int8(model: torch.nn.Module) -> None:
    """Round every linear layer's weight to what int8 with a scale a row holds, in place."""
    for module in model.modules():
        # transformers' Conv1D holds its weight transposed.
        transposed = type(module).__name__ == "Conv1D"
        if transposed or isinstance(module, torch.nn.Linear):
            weight = module.weight.t() if transposed else module.weight
            data, scale = quantize_rows(weight)
            weight.copy_(PackedWeight(data, "int8", weight.dtype, scale).dequantized())


@torch.inference_mode()
def compare(
    path: str,
    prompts: Sequence[Sequence[int]],
    made: dict[str, Any],
    sampling: Sampling,
    dtype: torch.dtype,
    *,
    int8: bool = False,
) -> dict[str, Any]:
    """Whether the dense model says the same: ``matches_dense`` and ``max_abs_logit_diff``.

    Greedy tokens are compared with transformers' own greedy generation; sampled ones with draws from
    the dense logits. Logits are compared at every token that was chosen.

    Args:
        made: rank 0's ``tokens`` and ``logits``.
        int8: the dense model's matrices are rounded as :func:`pyparallel.load` rounds them.
    """
    model = load_dense(path, dtype)
    if int8:
        round_to_int8(model)
    matches, difference = True, 0.0
    for row, prompt in enumerate(prompts):
        tokens, logits = made["tokens"][row], made["logits"][row]
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        dense = model(ids).logits[0, len(prompt) - 1 :].float()
        difference = max(difference, (dense - logits).abs().max().item())
        if sampling.is_greedy:
            continued = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=len(tokens),
                do_sample=False,
            )
            expected = continued[0, len(prompt) :].tolist()
        else:
            draws = torch.arange(len(tokens)) + row * (1 << 32)
            said = [[*prompt, *tokens[:place]] for place in range(len(tokens))]
            drawn = sample(
                dense,
                sampling,
                draws,
                start=0,
                group=Group.single(),
                said=(said, [len(prompt)] * len(tokens)),
            )
            expected = drawn.tolist()
        matches = matches and expected == tokens
    return {"matches_dense": matches, "max_abs_logit_diff": difference}
