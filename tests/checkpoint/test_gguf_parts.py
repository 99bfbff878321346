"""A GGUF file in several parts: all are read, or what is missing is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cut.shard import REPLICATED
from pyparallel.models.load import decoder_config
from tests.checkpoint.test_gguf_header import SMALL, refused


def split(path: Path) -> list[Path]:
    """The small model in three parts, as gguf-split writes them; output.weight is in the last."""
    SMALL.write(path / "source.gguf")
    writer = gguf.GGUFWriter(path / "model.gguf", "llama", split_max_tensors=4)
    reader = gguf.GGUFReader(path / "source.gguf")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "tokenizer.ggml.tokens")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name == "output.weight"):
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (path / "source.gguf").unlink()
    return sorted(path.glob("*.gguf"))


def test_all_parts_of_a_split_file_are_read(tmp_path: Path) -> None:
    """Its first part, without output.weight, was taken for a tied model."""
    parts = split(tmp_path)
    assert len(parts) == 3
    (tmp_path / "one").mkdir()
    SMALL.write(tmp_path / "one" / "whole.gguf")
    whole = open_checkpoint(tmp_path / "one" / "whole.gguf")
    for path in (parts[0], tmp_path):
        found = open_checkpoint(path)
        assert found.shapes == whole.shapes
        assert not found.config()["tied"]
        assert decoder_config(found) == decoder_config(whole)
        for name in whole.shapes:
            assert torch.equal(found.read(name, REPLICATED, 0), whole.read(name, REPLICATED, 0)), (
                name
            )
    assert f"name the first, {parts[0].name}" in refused(parts[1])
    shutil.copy(parts[0], tmp_path / "other.gguf")
    assert re.search(
        r"part 1 of 3; expected its name to be other-00001-of-00003",
        refused(tmp_path / "other.gguf"),
    )
    (tmp_path / "other.gguf").unlink()
    shutil.copy(parts[1], parts[2])
    assert "split.no, split.count: expected 2 of 3, got 1 of 3" in refused(parts[0])
    parts[2].unlink()
    assert f"{parts[2].name} is missing beside it" in refused(parts[0])
    parts[1].unlink()
    assert "are missing beside it" in refused(parts[0])
