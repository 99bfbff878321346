"""generate() honours generation_config.json as transformers does: stops, penalties, how it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pyparallel.checkpoint.source import CheckpointError
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.models.dense import compare
from pyparallel.models.generation import asked_sampling, read_generation
from pyparallel.models.load import load
from pyparallel.ops.next_token import Sampling
from tests.transformers_models import build

PROMPTS = [[5, 9, 2, 40, 33, 7], [11, 12, 13]]
NEW = 14
# One after another, since a batch of ours may have prompts of several lengths.
FILES: dict[str, dict] = {
    "stops": {"eos_token_id": [3, 17, 41, 22, 8, 55, 30]},
    "no stop": {},
    "repetition": {"repetition_penalty": 1.7},
    "rewarded": {"repetition_penalty": 0.6},
    "ngram": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
    "unigram": {"no_repeat_ngram_size": 1},
    "length": {"eos_token_id": list(range(3, 60)), "min_new_tokens": 5},
    "whole length": {"eos_token_id": list(range(3, 60)), "min_length": 9},
    "suppress": {"suppress_tokens": list(range(10, 40)), "begin_suppress_tokens": [41, 42, 43]},
    "bad words": {"bad_words_ids": [[i] for i in range(20, 50)] + [[3, 4], [9, 9, 9]]},
    "bias": {"sequence_bias": [[[17], 9.0], [[17, 18], 30.0]]},
    "forced": {"forced_eos_token_id": 4, "eos_token_id": 4},
    "decay": {"exponential_decay_length_penalty": [3, 1.8], "eos_token_id": [21, 22, 23]},
    "drawn, but one": {"do_sample": True, "top_k": 1, "temperature": 0.7},
    "drawn by min_p": {"do_sample": True, "min_p": 1.0, "repetition_penalty": 1.3},
}


def folder_of(path: Path, values: dict, family: str = "llama") -> Path:
    build(family).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


def truth(path: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)
        made.append(tokens[0, len(prompt) :].tolist())
    return made


def answers(sizes: dict[str, int], folders: list[str]) -> list[list[list[int]]]:
    mesh = init_mesh(**sizes)
    return [generate(load(f, mesh), PROMPTS, max_new_tokens=NEW).tokens for f in folders]


def test_as_transformers(tmp_path: Path) -> None:
    folders = {name: folder_of(tmp_path / name, values) for name, values in FILES.items()}
    for name in ("repetition", "stops"):
        folders[f"phi3 {name}"] = folder_of(tmp_path / f"phi3 {name}", FILES[name], "phi3")
    expected = {name: truth(folder) for name, folder in folders.items()}
    assert len({str(tokens) for tokens in expected.values()}) > len(expected) // 2
    for sizes in ({"tp": 1}, {"tp": 3}, {"pp": 2}):
        names = [n for n in folders if "pp" not in sizes or not n.startswith("phi3")]
        ranks = next(iter(sizes.values()))
        found = launch(answers, ranks, sizes, [str(folders[n]) for n in names], threads=1)
        for made in found:
            for name, tokens in zip(names, made, strict=True):
                assert tokens == expected[name], f"{name} {sizes}"


def explicit(folder: str) -> None:
    model = load(folder, init_mesh())
    with pytest.raises(ValueError, match=r"generation_config.json: num_beams: expected 1, got 4"):
        generate(model, PROMPTS, max_new_tokens=3)
    generate(model, PROMPTS, max_new_tokens=3, sampling=Sampling())


def test_what_generate_can_not_do_is_named(tmp_path: Path) -> None:
    launch(explicit, 1, str(folder_of(tmp_path, {"num_beams": 4})))


def checked(folder: str) -> list[dict]:
    """What --check says: of tokens by the file alone, and drawn with its penalties."""
    found = []
    for flags in ({}, {"temperature": 0.9, "seed": 3}):
        sampling = asked_sampling(read_generation(folder), NEW, **flags)
        model = load(folder, init_mesh())
        tokens = generate(model, PROMPTS, max_new_tokens=NEW, sampling=sampling).tokens
        logits = [rows.numpy() for rows in teacher_forced_logits(model, PROMPTS, tokens)]
        made = {"tokens": tokens, "logits": logits}
        found.append(compare(folder, PROMPTS, made, sampling, torch.float32))
    return found


def test_check_compares_like_with_like(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"repetition_penalty": 1.8, "eos_token_id": [7, 50]})
    for report in launch(checked, 1, str(folder), threads=1)[0]:
        assert report["matches_dense"] and report["max_abs_logit_diff"] < 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "expected an object"),
        ("{", "generation_config.json"),
        ('{"eos_token_id": "x"}', "eos_token_id: expected an id or a list of ids, got 'x'"),
        ('{"repetition_penalty": 0}', "repetition_penalty: expected more than 0, got 0"),
        ('{"top_k": "y", "do_sample": true}', "top_k: expected a number, got 'y'"),
        ('{"min_p": 3.0, "do_sample": true}', "min_p: expected 0 to 1, got 3.0"),
    ],
)
def test_a_broken_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_generation(tmp_path)
    assert "\n" not in str(caught.value)
