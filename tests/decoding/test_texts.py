"""Text in, text out: generate() and stream() with a tokenizer, on one rank and several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.comm.group import Group
from pyparallel.decoding import texts
from pyparallel.decoding.generate import generate
from pyparallel.decoding.stream import stream
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.decoder import Decoder
from pyparallel.models.load import decoder_config, load
from tests.transformers_models import build

TEXTS = ["w5 w9 w2", "w7", "w11 w12 w13 w14"]
IDS = [[5, 9, 2], [7], [11, 12, 13, 14]]
NEW_TOKENS = 8
WORDS = [*(f"w{i}" for i in range(60)), "[UNK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Llama whose tokenizer knows the words w0 to w59."""
    path = tmp_path_factory.mktemp("llama")
    build("llama", num_hidden_layers=3).save_pretrained(path)
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return str(path)


def texts_by(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    mesh = init_mesh(**sizes)
    model = load(folder, mesh)
    options = {"max_new_tokens": NEW_TOKENS, "stop_ids": ()}
    told = generate(model, TEXTS, **options)
    padded = torch.tensor([[5, 9, 2], [7, 7, 7]])
    # A word in the middle of the first answer ends it, and whichever other holds it.
    stop = told.texts[0].split()[3]
    cut = generate(model, TEXTS, stop_strings=stop, **options)
    pieces = list(stream(model, TEXTS, stop_strings=[stop], **options))
    left = []
    for piece in stream(model, TEXTS, **options):
        left.append(piece)
        if len(left) == 5:
            break
    return {
        "told": told,
        "ids": generate(model, IDS, **options),
        "by path": generate(model, IDS, tokenizer=folder, **options).texts,
        "tensors": generate(model, padded, **options).tokens,
        "stop": stop,
        "cut": cut,
        "pieces": pieces,
        "outside": torch.is_inference_mode_enabled(),
        # After a stream that was left early.
        "again": generate(model, TEXTS, **options).tokens,
    }


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"pp": 2}, {"pp": 3}], ids=str)
def test_texts_go_in_and_come_out(folder: str, sizes: dict[str, int]) -> None:
    ranks = max(sizes.values(), default=1)
    for made in launch(texts_by, ranks, folder, sizes, threads=1):
        told, ids = made["told"], made["ids"]
        assert told.tokens == ids.tokens == made["again"]
        assert ids.texts is None
        assert told.texts == made["by path"]
        assert told.texts == [" ".join(map(WORDS.__getitem__, row)) for row in ids.tokens]
        assert made["tensors"][0] == ids.tokens[0]
        assert told.batch_tokens_per_s == pytest.approx(3 * told.decode_tokens_per_s, rel=1e-9), (
            "each of three prompts gets a token a step"
        )
        stop, cut = made["stop"], made["cut"]
        for row, text in enumerate(told.texts):
            assert cut.texts[row] == text.split(stop)[0]
            assert told.tokens[row][: len(cut.tokens[row])] == cut.tokens[row]
            whole = " ".join(text.split()[: len(cut.tokens[row])])
            assert stop not in text or stop in whole.split()[-1]
            own = [piece for piece in made["pieces"] if piece.row == row]
            assert [piece.token for piece in own] == cut.tokens[row]
            assert "".join(piece.text for piece in own) == cut.texts[row]
            assert [piece.last for piece in own] == [False] * (len(own) - 1) + [True]
        assert not made["outside"]


def test_without_a_tokenizer_there_is_one_line(folder: str) -> None:
    model = Decoder(decoder_config(open_checkpoint(folder)), group=Group.single())
    for options in ({"prompts": TEXTS}, {"prompts": IDS, "stop_strings": "w1"}):
        with pytest.raises(
            ValueError, match=r"^tokenizer: expected one for prompts or stop [^\n]*$"
        ):
            generate(model, max_new_tokens=1, **options)
    for call in (generate, stream):
        with pytest.raises(ValueError, match=r"^tokenizer: expected a tokenizer of .*, got int$"):
            call(model, TEXTS, max_new_tokens=1, tokenizer=5)
        with pytest.raises(
            ValueError, match=r"^prompts: expected a list of lists of token ids or "
        ):
            call(model, TEXTS[0], max_new_tokens=1, tokenizer=folder)


def test_the_loaded_tokenizer_is_built_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    read = texts.load_tokenizer
    monkeypatch.setattr(texts, "load_tokenizer", lambda path: built.append(path) or read(path))
    model = load(Path(folder), init_mesh())
    for _ in range(2):
        assert generate(model, TEXTS, max_new_tokens=2).texts
    assert built == [folder]
