"""A GGUF's tokenizer from its cache: the same one; an entry that is broken, or anybody's, is none."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import transformers

from pyparallel.checkpoint import tokenizer_cache
from pyparallel.models.dense import load_tokenizer

TEXTS = ("one two", "tweleve  o\nw", "")


def write_gguf(path: Path, words: list[str]) -> str:
    """A file of a byte-level tokenizer and one tensor."""
    letters = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    merges = [f"{word[0]} {word[1]}" for word in words]
    writer.add_token_list([*letters, *words, "<end>"])
    writer.add_token_types([1] * (len(letters) + len(words)) + [3])
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(len(letters) + len(words))
    writer.add_chat_template("{{ messages[0]['content'] }}<end>")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "one.gguf", ["on", "tw"])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The GGUF files that transformers has read."""
    read, files = transformers.AutoTokenizer.from_pretrained, []

    def watched(*args: object, **options: object) -> object:
        if "gguf_file" in options:
            files.append(options["gguf_file"])
        return read(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", watched)
    yield files


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "pyparallel" / "tokenizers").glob("*"))


def said(tokenizer: object) -> list[object]:
    talk = [{"role": "user", "content": "two"}]
    template = tokenizer.apply_chat_template(talk, tokenize=False)
    names = ("all_special_ids", "name_or_path", "model_max_length", "padding_side")
    return [
        *(tokenizer(text).input_ids for text in TEXTS),
        tokenizer.decode(tokenizer(TEXTS[1]).input_ids),
        tokenizer.backend_tokenizer.to_str(),
        template,
        *(getattr(tokenizer, name) for name in names),
    ]


def test_the_second_is_by_file_and_the_same(file: str, built: list[str], tmp_path: Path) -> None:
    first = said(load_tokenizer(file))
    assert said(load_tokenizer(file)) == first
    assert built == ["one.gguf"]
    (entry,) = entries(tmp_path)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700
    # Elsewhere, and with other weights behind it, it is the same tokenizer.
    moved = Path(file).rename(tmp_path / "moved.gguf")
    assert said(load_tokenizer(str(moved)))[0] == first[0]
    assert built == ["one.gguf"]
    other = write_gguf(tmp_path / "other.gguf", ["on", "wo"])
    assert said(load_tokenizer(other))[0] != first[0]
    assert built == ["one.gguf", "other.gguf"] and len(entries(tmp_path)) == 2


@pytest.mark.parametrize("fault", ["cut", "changed", "unreadable", "anybody's", "a link", "a fifo"])
def test_what_can_not_be_trusted_is_built_anew(
    file: str, built: list[str], tmp_path: Path, fault: str
) -> None:
    first = said(load_tokenizer(file))
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    if fault == "cut":
        entry.write_bytes(whole[:-9])
    elif fault == "changed":
        entry.write_bytes(whole.replace(b"tw", b"wt", 1))
    elif fault == "unreadable":
        files = {"tokenizer.json": "{}"}
        entry.write_text(json.dumps({"sum": tokenizer_cache._sum(files), "files": files}))
    elif fault == "anybody's":
        entry.chmod(0o622)
    else:
        entry.unlink()
        if fault == "a link":
            target = tmp_path / "target"
            target.write_bytes(whole)
            entry.symlink_to(target)
        else:
            os.mkfifo(entry)
    assert said(load_tokenizer(file)) == first
    assert len(built) == 2
    (entry,) = entries(tmp_path)
    assert entry.read_bytes() == whole and stat.S_IMODE(entry.lstat().st_mode) == 0o600


def test_a_place_that_can_not_be_written_is_done_without(
    file: str, built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert said(load_tokenizer(file)) == said(load_tokenizer(file))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    load_tokenizer(file)
    assert len(built) == 3 and not Path("relative").exists()


def test_the_oldest_entries_are_removed(tmp_path: Path) -> None:
    source = tmp_path / "files"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (tmp_path / "kept").mkdir()
    others = tmp_path / "kept" / "note.txt"
    others.write_text("not ours")
    names = [f"{number:064x}.json" for number in range(tokenizer_cache.MAX_ENTRIES + 2)]
    for age, name in enumerate(names):
        tokenizer_cache.keep(tmp_path / "kept" / name, source)
        os.utime(tmp_path / "kept" / name, (age, age))
    left = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert left == [*names[2:], "note.txt"]
