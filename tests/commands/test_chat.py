"""``generate --chat``: templates, a conversation, stop strings, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tokenizers

from pyparallel.cli import main
from pyparallel.decoding.conversation import Conversation, chat_ids
from tests.transformers_models import build

# Words of the vocabulary stand for the roles.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'w50', 'user': 'w51', 'assistant': 'w52'}[message['role']] }} "
    "{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w52{% endif %}"
)


def folder_of(path: Path, template: str | None, **changes: int) -> Path:
    """A small Llama with a tokenizer that knows 61 words."""
    build("llama", **changes).save_pretrained(path)
    # No word ends an answer.
    (path / "generation_config.json").write_text("{}")
    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Room for an answer that lasts until it is stopped.
    return folder_of(tmp_path_factory.mktemp("chat"), TEMPLATE, max_position_embeddings=100_000)


class Command:
    """``generate`` in this process, whose ranks are warm, with ``given`` as its standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self._patch = monkeypatch
        self._capsys = capsys

    def printed(self, folder: Path, *args: object, given: str = "") -> str:
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        assert main(["generate", "--model", str(folder), *map(str, args)]) == 0
        return self._capsys.readouterr().out

    def __call__(self, *args: object, given: str = "") -> list[dict]:
        """What it prints as JSON."""
        return [
            json.loads(line) for line in self.printed(*args, "--json", given=given).splitlines()
        ]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    return Command(monkeypatch, capsys)


def test_a_prompt_goes_through_the_template(folder: Path, command: Command) -> None:
    options = ("--max-new-tokens", 6, "--tp", 2)
    (chat,) = command(folder, *options, "--chat", "--system", "w8", "--prompt", "w5 w9")
    (plain,) = command(folder, *options, "--prompt", "w50 w8 w51 w5 w9 w52")
    assert chat["tokens"] == plain["tokens"]


@pytest.mark.parametrize("ranks", [("--tp", 2), ("--pp", 2)], ids=str)
def test_lines_of_the_input_are_a_conversation(
    folder: Path, ranks: tuple, command: Command
) -> None:
    options = ("--max-new-tokens", 6, *ranks)
    talk = command(folder, *options, "--chat", given="w5 w9\n\nw3")
    assert [turn["prompt"] for turn in talk] == ["w5 w9", "w3"]
    history = "w51 w5 w9 w52"
    for turn in talk:
        (plain,) = command(folder, *options, "--prompt", history)
        assert turn["tokens"] == plain["tokens"]
        assert turn["text"] == plain["text"]
        history += f" {turn['text']} w51 w3 w52"
    # Without JSON the answers alone are printed, one a line.
    printed = command.printed(folder, *options[:2], "--chat", given="w5 w9\nw3\n")
    assert printed == "".join(f"{turn['text']}\n" for turn in talk)


def test_stop_strings_end_answers(folder: Path, command: Command) -> None:
    options = ("--max-new-tokens", 9, "--tp", 2, "--chat")
    (whole,) = command(folder, *options, "--prompt", "w5 w9")
    stop = whole["text"].split()[4]
    before = whole["text"].split(stop)[0]
    (cut,) = command(folder, *options, "--prompt", "w5 w9", "--stop", stop, "--stop", "none")
    (asked,) = command(folder, *options, "--stop", stop, given="w5 w9\n")
    for made in (cut, asked):
        assert made["text"] == before
        assert made["tokens"] == whole["tokens"][: len(made["tokens"])]
        assert len(made["tokens"]) <= 5


@pytest.mark.parametrize(
    ("template", "args", "words"),
    [
        (None, ("--chat",), "chat: expected a tokenizer with a chat template"),
        (None, ("--chat", "--prompt", "w1"), "chat: expected a tokenizer with a chat template"),
        (
            "{{ raise_exception('no system here') }}",
            ("--chat", "--system", "w1"),
            "chat: the model's chat template refuses messages of system, user: no system here",
        ),
        ("{{ 1 / 0 }}", ("--chat", "--prompt", "w1"), "refuses messages of user: division by zero"),
        (TEMPLATE, ("--chat", "--dp", "2"), "--dp: expected at most a replica for each of the 1"),
        (TEMPLATE, ("--chat", "--check"), "--check: expected --prompt with it"),
        (TEMPLATE, ("--system", "w1", "--prompt", "w1"), "--system: expected --chat with it"),
        (TEMPLATE, ("--chat", "--stop", ""), "stop_strings: expected texts that are not empty"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, template: str | None, args: tuple[str, ...], words: str, capsys
) -> None:
    folder = folder_of(tmp_path, template)
    capsys.readouterr()
    assert main(["generate", "--model", str(folder), *args]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


class Terminal:
    """A chat whose input is a terminal."""

    def __init__(self, *command: object) -> None:
        self.screen = ""
        self._end, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyparallel", "generate", *map(str, command)],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Whoever started the tests in the background ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)

    def until(self, shown: str) -> str:
        """What came on the screen up to ``shown``."""
        deadline = time.monotonic() + 90
        while shown not in self.screen:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._end], [], [], left)
            if not ready or left == 0.0:
                self.process.kill()
                raise AssertionError(self.screen[-500:])
            try:
                self.screen += os.read(self._end, 1 << 16).decode()
            except OSError:
                raise AssertionError(self.close()) from None
        before, _, self.screen = self.screen.partition(shown)
        return before

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def ctrl_c(self) -> None:
        """As from a keyboard: to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> tuple[int, str]:
        """Exit status, and what came on standard error."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        _, error = self.process.communicate(timeout=60)
        os.close(self._end)
        psutil.wait_procs(everyone, timeout=10)
        assert not [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return self.process.returncode, error


def test_ctrl_c_ends_the_answer_and_then_the_chat(folder: Path) -> None:
    chat = Terminal("--model", folder, "--chat", "--tp", 2, "--max-new-tokens", 50_000)
    chat.until("> ")
    chat.type("w5 w9\n")
    chat.until("w5 w9\r\n")
    # The answer has begun, and would go on for minutes.
    chat.until(" w")
    chat.ctrl_c()
    chat.until("\r\n> ")
    chat.type("w3\n")
    chat.until("w3\r\n")
    chat.until(" w")
    chat.ctrl_c()
    chat.until("\r\n> ")
    # Between its prompt and its wait for a key readline sees no signal.
    time.sleep(1)
    chat.ctrl_c()
    status, error = chat.close()
    assert status == 128 + signal.SIGINT
    assert error.count("tokens/s)") == 2
    assert error.endswith("pyparallel: error: ended by SIGINT\n")
    assert "Traceback" not in error


def test_the_end_of_the_input_ends_the_chat(folder: Path) -> None:
    chat = Terminal("--model", folder, "--chat", "--max-new-tokens", 4)
    chat.until("> ")
    chat.type("w5 w9\n")
    chat.until("w5 w9\r\n")
    chat.until("> ")
    chat.type("\x04")
    status, error = chat.close()
    assert status == 0, error
    assert "Traceback" not in error


class Words:
    """A tokenizer of words, with a template of a word a message."""

    chat_template = "there is one"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [int(word) for message in messages for word in message["content"].split()]


def test_a_conversation_forgets_what_the_context_does_not_hold() -> None:
    talk = Conversation(Words(), system="9", most_tokens=10)
    assert talk.ask("1 1", 3) == [9, 1, 1]
    # A question that was never answered is not kept.
    assert talk.ask("1 2", 3) == [9, 1, 2]
    talk.answered("5")
    assert talk.ask("2 2", 3) == [9, 1, 2, 5, 2, 2]
    talk.answered("6")
    assert talk.forgotten == 0
    assert talk.ask("3 3", 3) == [9, 2, 2, 6, 3, 3]
    assert talk.forgotten == 1
    with pytest.raises(
        ValueError, match=r"^chat: 8 tokens and 3 new ones are more than the context"
    ):
        talk.ask("4 4 4 4 4 4 4", 3)
    talk.answered("7")
    assert talk.ask("0", 1) == [9, 2, 2, 6, 3, 3, 7, 0]


def test_every_kind_of_ids_is_a_list() -> None:
    assert chat_ids(Words(), [{"role": "user", "content": "1 2"}]) == [1, 2]
