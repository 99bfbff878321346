"""``pyparallel generate --chat`` without a prompt: questions from the terminal or a pipe, one a line."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from pyparallel.commands.generate_output import Printer
from pyparallel.commands.generate_ranks import Job, answer_questions
from pyparallel.commands.questions import Questions
from pyparallel.commands.start import say
from pyparallel.decoding.conversation import Conversation
from pyparallel.decoding.request import check_prompts
from pyparallel.launch import launch
from pyparallel.models.config import DecoderConfig
from pyparallel.ranks.torchrun import world_of_torchrun


def talk(args: argparse.Namespace, job: Job, tokenizer: Any, config: DecoderConfig | None) -> int:
    """Answer until the input ends. Ctrl-C ends an answer; with none under way, the command."""
    if args.check:
        raise ValueError("--check: expected --prompt with it, got a chat of several questions")
    if args.micro_batches not in (None, 1):
        raise ValueError(f"--micro-batches: expected 1 in a chat, got {args.micro_batches}")
    if world_of_torchrun() > 1:
        raise ValueError(
            "--chat: expected --prompt with it under torchrun, whose ranks share no terminal; start a "
            "chat without torchrun"
        )
    most = None if config is None else config.max_positions
    conversation = Conversation(tokenizer, system=args.system, most_tokens=most)
    # A template that is missing, or knows no system, is told before anything starts.
    conversation.ask("", job.max_new_tokens)
    world_size = args.pp * args.cp * args.tp
    with (
        contextlib.closing(Questions(world_size)) as questions,
        contextlib.ExitStack() as answering,
    ):
        chat = _Chat(job, tokenizer, config, conversation, questions, answering, args.json)
        launch(
            answer_questions,
            world_size,
            job,
            questions.places,
            threads=args.threads,
            timeout_s=args.timeout,
            on_report=chat.heard,
        )
    return 0


class _Chat:
    """The launcher's side, driven by what rank 0 reports.

    Args:
        answering: holds what lasts as long as an answer.
    """

    def __init__(
        self,
        job: Job,
        tokenizer: Any,
        config: DecoderConfig | None,
        conversation: Conversation,
        questions: Questions,
        answering: contextlib.ExitStack,
        as_json: bool,
    ) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._config = config
        self._conversation = conversation
        self._questions = questions
        self._json = as_json
        self._interactive = sys.stdin is not None and sys.stdin.isatty()
        self._question = ""
        self._printer = self._new_printer()
        self._answering = answering
        if self._interactive:
            with contextlib.suppress(ImportError):
                # input() then lets its line be edited, and finds earlier ones.
                import readline  # noqa: F401

    def heard(self, rank: int, value: Any) -> None:
        """A token; what an answer took; or {} when the ranks are ready."""
        if isinstance(value, int):
            self._printer.show(rank, value)
            return
        if value:
            self._answering.close()
            self._finish(value)
        else:
            self._questions.all_hear()
        self._next()

    def _finish(self, times: dict[str, float]) -> None:
        self._printer.end()
        text = self._printer.text
        self._conversation.answered(text)
        if self._json:
            told = {"prompt": self._question, "tokens": self._printer.tokens, "text": text}
            print(json.dumps(told | times), flush=True)
        elif self._interactive:
            speed = f"{times['decode_tokens_per_s']:.1f} tokens/s"
            print(f"(prefill {times['prefill_s']:.2f} s, {speed})", file=sys.stderr, flush=True)

    def _next(self) -> None:
        """Read the next question and pass it on, or the end of the input."""
        while (line := self._read()) is not None:
            if not line.strip():
                continue
            self._question = line
            try:
                ids = self._asked(line)
            except ValueError as error:
                if not self._interactive:
                    raise
                say(str(error))
                continue
            self._printer = self._new_printer()
            self._questions.ask({"ids": ids})
            self._answering.enter_context(self._stop_by_ctrl_c())
            return
        self._questions.close()

    def _asked(self, line: str) -> list[int]:
        new_tokens = self._job.max_new_tokens
        ids = self._conversation.ask(line, new_tokens)
        if self._config is not None:
            vocab_size, positions = self._config.vocab_size, self._config.max_positions
            check_prompts([ids], new_tokens, vocab_size, positions)
        if self._conversation.forgotten:
            print(
                f"(the {self._conversation.forgotten} oldest questions no longer fit the context and "
                f"are forgotten)",
                file=sys.stderr,
                flush=True,
            )
        return ids

    def _read(self) -> str | None:
        """The next line, without its end; None where there is none."""
        try:
            if self._interactive:
                return input("> " if sys.stdout.isatty() else "")
            line = sys.stdin.readline() if sys.stdin is not None else ""
        except EOFError:
            print(flush=True)
            return None
        except UnicodeDecodeError as error:
            given = error.object[error.start : error.start + 8]
            raise ValueError(
                f"standard input: expected text in UTF-8, got the bytes {given!r}"
            ) from None
        return line.rstrip("\r\n") if line else None

    def _new_printer(self) -> Printer:
        stops = self._job.stop_strings
        return Printer(self._tokenizer, shown=not self._json, stop_strings=stops)

    @contextlib.contextmanager
    def _stop_by_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C ends the answer that is under way; the next one is anybody's again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            self._questions.stop()

        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
