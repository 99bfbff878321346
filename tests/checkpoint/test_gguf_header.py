"""GGUF headers that lie, files in parts, and what their metadata mean."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pyparallel.checkpoint.source import CheckpointError, open_checkpoint
from pyparallel.cut.shard import REPLICATED
from pyparallel.models.load import decoder_config
from tests.checkpoint.gguf_files import Model

SMALL = Model("Q8_0", hidden=64, heads=2, kv_heads=1, intermediate=96, layers=1)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    SMALL.write(path)
    return path


def written(path: Path, add: Callable[[gguf.GGUFWriter], object], **changes: Any) -> Path:
    """The small model with more metadata, or without some (``drop=``), or in another byte order."""
    drop = changes.pop("drop", ())
    endian = changes.pop("endian", gguf.GGUFEndian.LITTLE)
    source = path.with_name("source.gguf")
    SMALL.write(source)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")) and field.name not in drop:
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub)
    add(writer)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            data = np.array(tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(ValueError) as failure:
        decoder_config(open_checkpoint(path))
    assert time.monotonic() - begin < 60
    assert "\n" not in str(failure.value)
    return str(failure.value)


def patched(small: Path, to: Path, after: bytes, value: bytes, skip: int = 0) -> Path:
    """The file with bytes replaced, ``skip`` bytes behind the first ``after``."""
    data = bytearray(small.read_bytes())
    at = data.index(after) + len(after) + skip
    data[at : at + len(value)] = value
    path = to / "patched.gguf"
    path.write_bytes(data)
    return path


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.mark.parametrize("layers", [0, 65536, 2**31, 2**32 - 1])
def test_block_count_is_bounded_by_the_tensors(small: Path, tmp_path: Path, layers: int) -> None:
    """65536 and more looped for ever."""
    path = patched(small, tmp_path, b"llama.block_count", u32(layers), 4)
    assert f"llama.block_count: expected an integer from 1 to 12, got {layers}" in refused(path)


def test_counts_and_lengths_are_bounded_by_the_file(small: Path, tmp_path: Path) -> None:
    tokens = b"tokenizer.ggml.tokens"
    for after, value, skip, words in (
        (b"GGUF", u64(2**40), 4, "tensors: 1099511627776 of at least"),
        (b"GGUF", u64(2**63), 12, "keys: 9223372036854775808 of at least"),
        (tokens, u64(2**31), 8, "tokenizer.ggml.tokens: 2147483648 of at least 8"),
        (tokens, u64(2**64 - 1), 16, "it ends inside key tokenizer.ggml.tokens"),
        (tokens, u64(2**62), 16, "it ends inside key tokenizer.ggml.tokens"),
        (tokens, u32(9), 4, "a list of the unknown type 9"),
        (tokens, u32(77), 0, "is of the unknown type 77"),
        (b"token_embd.weight", u32(5), 0, "has 5 dimensions"),
        (b"token_embd.weight", u32(0), 0, "has 0 dimensions"),
        (b"token_embd.weight", u64(0), 4, "is not made of blocks"),
        (b"token_embd.weight", u64(33), 4, "is not made of blocks"),
        (b"token_embd.weight", u64(2**63), 12, "it ends inside tensor token_embd.weight"),
        (b"token_embd.weight", u32(99), 20, "of the unknown type 99"),
        (b"token_embd.weight", u64(2**64 - 32), 24, "it ends inside tensor token_embd.weight"),
        (b"token_embd.weight", u64(8), 24, "not aligned to 32"),
        (b"output_norm.weight", u64(0), 16, "overlap"),
    ):
        found = refused(patched(small, tmp_path, after, value, skip))
        assert words in found, (after, words, found)


def test_names_are_there_once(small: Path, tmp_path: Path) -> None:
    for name, other, words in (
        (
            b"blk.0.attn_k.weight",
            b"blk.0.attn_v.weight",
            "tensor blk.0.attn_v.weight is there twice",
        ),
        (b"token_embd.weight", b"model.norm.weight", "is there twice, as model.norm.weight"),
        (b"llama.context_length", b"llama.embeddinglengt", "llama.context_length is missing"),
        (b"llama.context_length", b"llama.context_\xff\xfe\xfd\xfc\xfb\xfa", "is no UTF-8 text"),
    ):
        (tmp_path / "x.gguf").write_bytes(small.read_bytes().replace(name, other))
        assert words in refused(tmp_path / "x.gguf")


def test_what_a_sparse_file_allows_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    """Lists, texts and words of 2 GiB and more, in files that have the bytes: holes."""
    for kind, part, count, words in (
        (9, 0, 2**31, "unknown GGUF architecture None"),
        (8, None, 2**31, "is a text of 2147483648 bytes, expected at most"),
        (9, 8, 2**31, "lists 2147483648 texts, expected at most"),
    ):
        head = b"GGUF" + u32(3) + u64(0) + u64(1) + u64(1) + b"k" + u32(kind)
        head += (b"" if part is None else u32(part)) + u64(count)
        with open(tmp_path / "x.gguf", "wb") as file:
            file.write(head)
            file.truncate(len(head) + 8 * count)
        tracemalloc.start()
        assert words in refused(tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "llama.attention.layer_norm_rms_epsilon",
            float("nan"),
            "expected a number with a point from 0 to 1, got nan",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            -1e-5,
            "expected a number with a point from 0 to 1",
        ),
        ("llama.rope.freq_base", -1.0, "llama.rope.freq_base: expected a number from 1e-06"),
        ("llama.rope.freq_base", float("inf"), "llama.rope.freq_base: expected a number"),
        ("llama.rope.scaling.factor", -2.0, "scaling.factor: expected a number from 0"),
        ("llama.rope.scaling.type", "yarn", "expected 'none' or 'linear', got 'yarn'"),
        ("llama.rope.scaling.type", 3, "scaling.type: expected a string"),
        ("llama.rope.dimension_count", 16, "rope.dimension_count: expected the size of a head, 32"),
        ("llama.attention.value_length", 16, "value_length: expected the size of a head, 32"),
        ("llama.attention.head_count", "two", "head_count: expected an integer from 1"),
        (
            "llama.attention.head_count",
            2**30,
            "num_attention_heads of its config: expected at most 96",
        ),
        ("llama.attention.head_count_kv", 2**30, "num_key_value_heads of its config: expected"),
        ("llama.attention.head_count", 0, "head_count: expected an integer from 1"),
        ("llama.attention.head_count_kv", [1, 2], "head_count_kv: expected an integer"),
        ("llama.embedding_length", 64.0, "embedding_length: expected an integer"),
        ("llama.context_length", True, "context_length: expected an integer"),
        ("llama.feed_forward_length", 2**31, "feed_forward_length: expected an integer"),
        ("llama.attention.causal", False, "attention.causal: expected true"),
        ("tokenizer.ggml.eos_token_id", "2", "eos_token_id: expected an integer"),
        ("general.alignment", 24, "general.alignment: expected a power of two, got 24"),
        ("general.alignment", 0, "general.alignment: expected a power of two, got 0"),
        ("split.count", "many", "split.count, split.no: expected a number"),
    ],
)
def test_metadata_of_another_type_or_range(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    kind = gguf.GGUFValueType[kinds[type(value)]]
    sub = gguf.GGUFValueType.UINT32 if isinstance(value, list) else None
    path = written(
        tmp_path / "x.gguf", lambda writer: writer.add_key_value(key, value, kind, sub), drop=(key,)
    )
    found = refused(path)
    assert words in found, found


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for key in (
        "attention.head_count",
        "embedding_length",
        "context_length",
        "feed_forward_length",
    ):
        path = written(tmp_path / "x.gguf", lambda writer: None, drop=(f"llama.{key}",))
        assert f"llama.{key} is missing" in refused(path)
    path = written(tmp_path / "x.gguf", lambda writer: None, drop=("llama.block_count",))
    assert "unknown GGUF architecture 'llama'" in refused(path)


def test_one_number_for_each_layer(tmp_path: Path) -> None:
    key = "llama.attention.head_count_kv"
    path = written(
        tmp_path / "x.gguf",
        lambda writer: writer.add_array(key, [1]),
        drop=(key,),
    )
    assert decoder_config(open_checkpoint(path)).num_kv_heads == 1


def test_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    """It was read as it stands, and every logit was NaN."""
    path = written(tmp_path / "x.gguf", lambda writer: None, endian=gguf.GGUFEndian.BIG)
    assert "big-endian" in refused(path)


@pytest.mark.parametrize(
    ("keys", "kind", "factor"),
    [
        ({"llama.rope.scaling.factor": 4.0}, "linear", 4.0),
        ({"llama.rope.scale_linear": 2.0}, "linear", 2.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}, "linear", 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"}, "linear", 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, "default", 1.0),
        ({"llama.rope.scaling.type": "linear"}, "default", 1.0),
        ({"llama.rope.scaling.factor": 0.0}, "default", 1.0),
    ],
)
def test_rope_scaling_as_llama_cpp(
    tmp_path: Path, keys: dict[str, Any], kind: str, factor: float
) -> None:
    """A factor without a type was ignored."""

    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(
                key, value
            )

    config = decoder_config(open_checkpoint(written(tmp_path / "x.gguf", add)))
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == (kind, factor)


def test_tokens_that_end_a_turn(tmp_path: Path) -> None:
    """eos, eot and eom ids, and llama.cpp's texts; once each, the text's own first."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(5)
        writer.add_eot_token_id(7)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 9)
        tokens = [f"token{i}" for i in range(61)]
        tokens[11], tokens[7] = "<|im_end|>", "<|eot_id|>"
        writer.add_token_list(tokens)

    path = written(tmp_path / "x.gguf", add, drop=("tokenizer.ggml.tokens",))
    assert decoder_config(open_checkpoint(path)).stop_ids == (5, 7, 9, 11)
    none = written(tmp_path / "y.gguf", lambda writer: writer.add_eot_token_id(2**32 - 1))
    assert decoder_config(open_checkpoint(none)).stop_ids == ()


def test_types_that_are_no_weights_are_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output_norm.weight", np.ones(64, np.int32))

    checkpoint = open_checkpoint(written(tmp_path / "x.gguf", add, drop=("output_norm.weight",)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is of type I32"):
        checkpoint.read("model.norm.weight", REPLICATED, 0)
