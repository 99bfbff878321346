"""What was said in a chat, and its ids in the model's own template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids of ``messages`` ({"role", "content"}) up to where the assistant begins to answer.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without "
            f"one; leave --chat out, or name another with --tokenizer"
        )
    try:
        # Not return_dict, whose default is another in each version of transformers.
        found = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except ImportError as error:
        raise ValueError(
            f"chat: templates need jinja2: {error}; install pyparallel-kernels[hf]"
        ) from None
    except Exception as error:
        # A template is a program, and raises what it likes.
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"chat: the model's chat template refuses messages of {roles}: {error}"
        ) from None
    return list(found)


class Conversation:
    """A chat with one model: what was said, as much of it as the context holds.

    Args:
        system: what the model is told before the first question.
        most_tokens: of the questions and answers with the next answer; None: no bound is known.

    Attributes:
        forgotten: how many of the oldest exchanges were left out of the last question.
    """

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, most_tokens: int | None = None
    ) -> None:
        self.forgotten = 0
        self._tokenizer = tokenizer
        self._system: list[Message] = []
        if system is not None:
            self._system.append({"role": "system", "content": system})
        self._most_tokens = most_tokens
        self._said: list[Message] = []
        self._asked: list[Message] = []

    def ask(self, question: str, new_tokens: int) -> list[int]:
        """The ids of all that was said and ``question``, with room for an answer of ``new_tokens``.

        Where they are too many, the oldest exchanges are forgotten.

        Raises:
            ValueError: the question alone is too long, or as :func:`chat_ids`.
        """
        asked: Message = {"role": "user", "content": question}
        said, self.forgotten = list(self._said), 0
        while True:
            ids = chat_ids(self._tokenizer, [*self._system, *said, asked])
            if self._most_tokens is None or len(ids) + new_tokens <= self._most_tokens:
                break
            if not said:
                raise ValueError(
                    f"chat: {len(ids)} tokens and {new_tokens} new ones are more than the context of "
                    f"{self._most_tokens}; ask for less, or give a smaller --max-new-tokens"
                )
            del said[:2]
            self.forgotten += 1
        self._asked = [*said, asked]
        return ids

    def answered(self, text: str) -> None:
        """Keep the last question and its answer, whole or as far as it came."""
        self._said = [*self._asked, {"role": "assistant", "content": text}]
