"""llama.cpp as a rival, where llama-cpp-python is installed: pip install llama-cpp-python compiles it.

It reads the model of the benchmarks from GGUF files in f32 and bf16, written once beside each other in
the temporary folder: the same numbers that the others dequantize from the Q4_1 file. Tensors are copied
one by one, since the rows of queries and keys stay in llama.cpp's own order.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contestants import LONGEST, PROMPT, long_prompt
from bench.rivals import MODEL, Rival, memory

NAME = "llama.cpp, 2 threads"

# ggml's numbers of types, for the KV cache.
GGML_TYPES = {"float32": 0, "bfloat16": 30}


def rivals(dtype: str) -> list[Rival]:
    """The rival on two threads, or none where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return []
    return [Rival(NAME, llama_cpp, (dtype,), threads=2)]


def write_gguf(dtype: str) -> Path:
    """The model's GGUF with its matrices in ``dtype``; vectors are fp32, as llama.cpp wants them."""
    import gguf

    folder = Path(tempfile.gettempdir()) / f"pyparallel-gguf-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{MODEL.stem}.{dtype}.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(MODEL)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop("general.architecture").contents()
    written = path.with_suffix(".part")
    writer = gguf.GGUFWriter(written, architecture)
    kinds = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(kinds[dtype])
    for name, field in fields.items():
        if name in ("general.file_type", "general.quantization_version", "general.alignment"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if dtype == "bfloat16" and len(tensor.shape) > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written.rename(path)
    return path


def llama_cpp(dtype: str) -> Callable[[tuple], Any]:
    """llama.cpp's own calls, without the Python around them that llama-cpp-python adds."""
    import ctypes

    import llama_cpp as library
    import numpy

    model = library.Llama(
        str(write_gguf(dtype)),
        n_ctx=LONGEST,
        n_batch=1024,
        n_threads=2,
        n_threads_batch=2,
        type_k=GGML_TYPES[dtype],
        type_v=GGML_TYPES[dtype],
        verbose=False,
    )
    vocab_size = model.n_vocab()

    def append(tokens: list[int]) -> int:
        """The likeliest token after these."""
        array = (library.llama_token * len(tokens))(*tokens)
        status = library.llama_decode(model.ctx, library.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        logits = ctypes.cast(
            library.llama_get_logits_ith(model.ctx, -1), ctypes.POINTER(ctypes.c_float)
        )
        return int(numpy.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())

    def turn(request: tuple) -> Any:
        kind, *rest = request
        if kind == "memory":
            return memory()
        library.llama_memory_clear(library.llama_get_memory(model.ctx), True)
        ids = PROMPT if kind == "decode" else long_prompt(rest[0], vocab_size)
        tokens = [append(ids)]
        for _ in range(rest[0] if kind == "decode" else 0):
            tokens.append(append(tokens[-1:]))
        return tokens

    return turn
