"""Text that comes a token at a time is the whole text, cut at its stop strings."""

from __future__ import annotations

import itertools

import pytest
import tokenizers

from pyparallel.decoding.text_stream import TextStream, cut_at, decoded
from pyparallel.decoding.texts import checked_stops, has_texts


def byte_level(words: list[str]) -> tokenizers.Tokenizer:
    """Tokens are whole words and single bytes; <s> is special."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [piece for word in words for piece, _ in split.pre_tokenize_str(word)]
    vocabulary = {token: number for number, token in enumerate([*sorted(letters), *pieces])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def pieces_of(tokenizer: tokenizers.Tokenizer, tokens: list[int], stops: tuple) -> list[str]:
    stream, pieces = TextStream(tokenizer, stops), []
    for place, token in enumerate(tokens):
        stopped = stream.add(token)
        pieces.append(stream.fresh(last=stopped or place == len(tokens) - 1))
        if stopped:
            break
    return pieces


TEXT = "Hé, 世界! \U0001f600 END of\nEN EXTRA END"


@pytest.mark.parametrize("stops", [(), ("END",), ("\n",), ("世",), ("X", "END of"), ("none",)])
def test_pieces_make_the_text_before_the_stop_string(stops: tuple[str, ...]) -> None:
    tokenizer = byte_level(["Hé", "END", " of"])
    special = tokenizer.token_to_id("<s>")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((mapped, _),) = letters.pre_tokenize_str(TEXT)
    tokens = [tokenizer.token_to_id(letter) for letter in mapped]
    assert None not in tokens
    tokens.insert(5, special)
    assert decoded(tokenizer, tokens) == TEXT
    pieces = pieces_of(tokenizer, tokens, stops)
    assert "".join(pieces) == cut_at(TEXT, stops)
    assert "\ufffd" not in "".join(pieces)
    # Nothing that begins a stop string is told before it is known to be none.
    for told in itertools.accumulate(pieces[:-1]):
        assert not any(told.endswith(stop[:1]) for stop in stops)


def test_what_is_not_whole_at_the_end_is_told() -> None:
    tokenizer = byte_level([])
    ((mapped, _),) = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str("a世")
    tokens = [tokenizer.token_to_id(letter) for letter in mapped][:-1]
    assert pieces_of(tokenizer, tokens, ()) == ["a", "", "\ufffd"]


def test_a_step_decodes_a_window_and_not_all() -> None:
    tokenizer, longest = byte_level([]), 0

    class Watched:
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    stream = TextStream(Watched())
    for _ in range(500):
        stream.add(tokenizer.token_to_id("a"))
        stream.fresh()
    assert stream.text == "a" * 500
    assert longest <= 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("text", "prompts: expected a list of lists of token ids or of texts, got str 'text'"),
        (["text", [1]], "prompt 1: expected a text as prompt 0, got list"),
        ([[1], "text"], "prompt 1: expected token ids as prompt 0, got str"),
        (
            [{"role": "user", "content": "hi"}],
            "prompt 0: expected a text or token ids, got a chat's",
        ),
    ],
)
def test_wrong_prompts_are_one_line(given: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        has_texts(given)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[""], [1], 5, None, ["x"] * 65, "x" * 1001])
def test_wrong_stop_strings_are_one_line(given: object) -> None:
    with pytest.raises(ValueError, match=r"^stop_strings: expected .*, got .*$"):
        checked_stops(given)
