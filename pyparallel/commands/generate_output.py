"""What ``pyparallel generate`` shows while it works, and prints at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pyparallel.decoding.text_stream import TextStream, cut_at, decoded
from pyparallel.models.fill import Progress


@contextlib.contextmanager
def loading_bar(shown: bool) -> Iterator[Progress | None]:
    """A bar for the bytes that rank 0 loads, on standard error."""
    if not (shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class BatchBar:
    """A bar for the tokens of several prompts, on standard error.

    Args:
        most: how many they are where no text ends early.
    """

    def __init__(self, most: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        speed = TextColumn("tokens, {task.fields[speed]:.1f} tokens/s")
        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), speed)
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("answering", total=most, speed=0.0)
        self._began = 0.0
        self._count = 0

    def show(self, rank: int, token: int) -> None:
        now = time.perf_counter()
        if not self._count:
            # Until then rank 0 shows what it loads.
            self._bar.start()
            self._began = now
        self._count += 1
        speed = (self._count - 1) / (now - self._began) if now > self._began else 0.0
        self._bar.update(self._task, completed=self._count, speed=speed)

    def __enter__(self) -> BatchBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class Printer:
    """Prints one answer's text while its tokens come.

    Attributes:
        tokens: those that came.
        text: of them, up to a stop string; whole after :meth:`end`.
    """

    def __init__(self, tokenizer: Any, *, shown: bool, stop_strings: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self._stream = TextStream(tokenizer, stop_strings)
        self._shown = shown

    @property
    def text(self) -> str:
        return self._stream.text

    def __enter__(self) -> Printer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end()

    def show(self, rank: int, token: int) -> None:
        self.tokens.append(token)
        self._stream.add(token)
        if self._shown:
            print(self._stream.fresh(), end="", flush=True)

    def end(self) -> None:
        text = self._stream.fresh(last=True)
        if self._shown:
            print(text, flush=True)


def summary(
    tokenizer: Any, ranks: list[dict[str, Any]], stop_strings: Sequence[str]
) -> dict[str, Any]:
    """What ``--json`` prints."""
    tokens = ranks[0]["tokens"]
    texts = [cut_at(decoded(tokenizer, row), stop_strings) for row in tokens]
    single = len(tokens) == 1
    return {
        "tokens": tokens[0] if single else tokens,
        "text": texts[0] if single else texts,
        "prefill_s": ranks[0]["prefill_s"],
        "decode_tokens_per_s": ranks[0]["decode_tokens_per_s"],
        "batch_tokens_per_s": ranks[0]["batch_tokens_per_s"],
        "ranks": [
            {"rank": rank, **{key: row[key] for key in ("weight_bytes", "peak_rss_bytes")}}
            for rank, row in enumerate(ranks)
        ],
    }


def print_summary(told: dict[str, Any], prompts: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(told))
        return
    if len(prompts) > 1:
        for prompt, text in zip(prompts, told["text"], strict=True):
            print(f"> {prompt}\n{text}\n")
    shares = ", ".join(
        f"{row['weight_bytes'] / 1e6:.0f} MB of weights (peak {row['peak_rss_bytes'] / 1e6:.0f} MB)"
        for row in told["ranks"]
    )
    speed = f"{told['decode_tokens_per_s']:.1f} tokens/s"
    if len(prompts) > 1:
        speed += f" for one reader, {told['batch_tokens_per_s']:.1f} tokens/s in all"
    print(
        f"\nprefill {told['prefill_s']:.2f} s, {speed}; ranks hold {shares}",
        file=sys.stderr,
    )
    if "matches_dense" in told:
        matches = str(told["matches_dense"]).lower()
        print(f"matches_dense: {matches}, max_abs_logit_diff: {told['max_abs_logit_diff']:.3g}")
