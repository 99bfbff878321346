"""One process of the campaign: mutates, loads and judges, a seed a line from its parent.

It has a limit of memory; its parent ends it where an answer takes too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from pyparallel.mesh import Mesh, init_mesh
from pyparallel.models.dense import load_tokenizer
from pyparallel.models.load import load
from tests.faults_mutations.gguf_mutations import mutate_gguf
from tests.faults_mutations.originals import IDS, Original, alike, write_all
from tests.faults_mutations.values import mutate_json_file, mutate_safetensors, mutate_text

# On top of what the process has mapped when it begins.
MEMORY_BYTES = 3 << 30
TEXTS = ["hello world", "<s>a b c</s>", "\u00e9\u4e2d x"]


class Judge:
    """The originals, and their answers."""

    def __init__(self, root: Path, mesh: Mesh) -> None:
        self._mesh = mesh
        self._root = root
        self._originals = write_all(root / "originals")
        self._answers = {name: self._answer(each.path) for name, each in self._originals.items()}
        for name, each in self._originals.items():
            assert alike(self._answers[name], each.reference(each.path)), name
        self._tokenizer = _write_tokenizer(root / "originals" / "tokenizer")
        self._texts = _encoded(self._tokenizer)

    def row(self, seed: int) -> dict[str, Any]:
        """Mutate what the seed says, and judge it."""
        draw = random.Random(seed)
        name = draw.choice([*self._originals, "gguf", "gguf", "tokenizer"])
        copied = self._root / "mutated"
        shutil.rmtree(copied, ignore_errors=True)
        source = self._tokenizer if name == "tokenizer" else self._originals[name].path
        shutil.copytree(source if source.is_dir() else source.parent, copied)
        path = copied if source.is_dir() else copied / source.name
        what = mutate_folder(copied, draw)
        verdict, detail = self._judge(name, path)
        return {"seed": seed, "files": name, "what": what, "verdict": verdict, "detail": detail}

    def _judge(self, name: str, path: Path) -> tuple[str, str]:
        try:
            found = _encoded(path) if name == "tokenizer" else self._answer(path)
        except ValueError as error:
            text = str(error)
            good = text and "\n" not in text and len(text) < 2000
            return ("refused" if good else "raised"), text[:300]
        except BaseException as error:
            return "raised", f"{type(error).__name__}: {error}"[:300]
        if name == "tokenizer":
            return ("equal" if found == self._texts else "another"), ""
        if alike(found, self._answers[name]):
            return "equal", ""
        return self._other(self._originals[name], path, found)

    def _other(self, original: Original, path: Path, found: torch.Tensor) -> tuple[str, str]:
        try:
            expected = original.reference(path)
        except BaseException as error:
            return "wrong", f"the reference: {type(error).__name__}: {error}"[:300]
        if alike(found, expected):
            return "another", ""
        return "wrong", f"off by {(found - expected).abs().max().item():.3g}"

    def _answer(self, path: Path) -> torch.Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = load(path, self._mesh)
            inner = getattr(model, "model", model)
            made = inner(IDS)
            return getattr(made, "logits", made).float()


def mutate_folder(folder: Path, draw: random.Random) -> str:
    """Change one file of a folder, by what it is."""
    file = draw.choice(sorted(path for path in folder.iterdir()))
    if draw.random() < 0.06:
        return _replace_file(file, draw)
    data = file.read_bytes()
    if file.suffix == ".json":
        new, what = mutate_json_file(data, draw)
    elif file.suffix == ".safetensors":
        new, what = mutate_safetensors(data, draw)
    elif file.suffix == ".gguf":
        new, what = mutate_gguf(data, draw)
    else:
        new, what = mutate_text(data, draw)
    file.write_bytes(new)
    index = folder / "pyparallel.index.json"
    if file.suffix == ".safetensors" and index.exists() and draw.random() < 0.7:
        # The bytes of each file are in the index: a mutation has to get past them.
        content = json.loads(index.read_text())
        content["files"][file.name] = len(new)
        index.write_text(json.dumps(content))
    return f"{file.name}: {what}"


def _replace_file(file: Path, draw: random.Random) -> str:
    """What is at the name of a file, or beside it."""
    kind = draw.choice(("gone", "fifo", "device", "folder", "outside", "swapped", "beside"))
    others = [other for other in sorted(file.parent.iterdir()) if other != file]
    if kind == "swapped" and others:
        data, other = file.read_bytes(), draw.choice(others)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "beside":
        shutil.copy(file, file.with_name(f"other_{file.name}"))
    else:
        held = file.rename(file.parent.parent / "held")
        if kind == "fifo":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        elif kind == "folder":
            file.mkdir()
        elif kind == "outside":
            file.symlink_to(held)
    return f"{file.name}: {kind}"


def _write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(["hello world a b c"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def _encoded(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(str(folder))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def main() -> None:
    """Answer seeds from standard input until it ends."""
    # What libraries print must not mix with the answers, nor fill a pipe.
    answers = os.fdopen(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as root:
        judge = Judge(Path(root), init_mesh(tp=1))
        status = Path("/proc/self/statm").read_text()
        limit = int(status.split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with contextlib.suppress(BrokenPipeError):
            print("ready", file=answers, flush=True)
            for line in sys.stdin:
                print(json.dumps(judge.row(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
