"""``pyparallel generate``: answer prompts with a model cut over the ranks of this machine."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
from typing import Any

import torch

from pyparallel.checkpoint.gguf import GGUFCheckpoint
from pyparallel.checkpoint.source import Checkpoint, open_checkpoint
from pyparallel.commands.flags import add_shares, add_timeout, check_numbers, check_texts
from pyparallel.cut.shard import HeadLayout
from pyparallel.cut.shares import part_sizes
from pyparallel.decoding.generate import generate
from pyparallel.decoding.logits import teacher_forced_logits
from pyparallel.decoding.request import check_micro_batches, check_prompts
from pyparallel.launch import launch, report
from pyparallel.mesh import init_mesh
from pyparallel.models.config import DecoderConfig, UnknownArchitectureError
from pyparallel.models.dense import compare, encode, load_tokenizer
from pyparallel.models.generation import asked_sampling, read_generation
from pyparallel.models.load import WEIGHTS, decoder_config, load, stored_dtype
from pyparallel.models.stage import stages_of
from pyparallel.ops.next_token import Sampling

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a folder of safetensors, or a GGUF file")
    add("--tokenizer", metavar="PATH", help="where the tokenizer is, if not with the model")
    add("--prompt", required=True, action="append", help="text to continue; may be repeated")
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    add_shares(parser)
    add(
        "--cp",
        type=int,
        default=1,
        metavar="N",
        help="context-parallel ranks, each with its part of the prompt and the KV cache",
    )
    add(
        "--dp",
        type=int,
        default=1,
        metavar="N",
        help="replicas of the model, each with its part of the prompts; dp x tp x cp x pp ranks in all",
    )
    add(
        "--pp",
        type=int,
        default=1,
        metavar="N",
        help="pipeline-parallel ranks, each with its part of the layers",
    )
    add(
        "--micro-batches",
        type=int,
        metavar="M",
        help="parts the prompts are cut into, to keep several stages of --pp busy; default: N",
    )
    add("--max-new-tokens", type=int, default=64, metavar="K")
    add("--dtype", choices=DTYPES, help="of weights and activations; default: the checkpoint's")
    add(
        "--weights",
        choices=("dense", *WEIGHTS),
        help="of the matrices. dense: in --dtype. int8: rounded, with a scale a row, to a quarter of "
        "fp32's bytes. blocks: a GGUF's Q4_0, Q4_1 and Q8_0 tensors as they are stored: its own "
        "numbers, with a seventh to a quarter of fp32's bytes to hold and read. Default: "
        "blocks for a GGUF on the CPU, else dense",
    )
    asked = "; default: the model's generation_config.json, or"
    add("--temperature", type=float, help=f"0: the likeliest token{asked} 0")
    add("--top-k", type=int, help=f"0: all{asked} 0")
    add("--top-p", type=float, help=f"1: all{asked} 1")
    add("--seed", type=int, default=0, help="the same seed gives the same text at every --tp")
    add("--threads", type=int, metavar="N", help="threads per rank; default: cores / ranks")
    add_timeout(parser)
    add("--check", action="store_true", help="run the dense model too, and compare")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    check_numbers(args, ("dp", "tp", "cp", "pp"))
    check_texts("--prompt", args.prompt)
    if args.dp > len(args.prompt):
        raise ValueError(
            f"--dp: expected at most a replica for each of the {len(args.prompt)} prompts, "
            f"got {args.dp}"
        )
    flags = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    Sampling(**{name: value for name, value in flags.items() if value is not None})
    checkpoint = open_checkpoint(args.model)
    sampling = asked_sampling(read_generation(checkpoint.path), args.max_new_tokens, **flags)
    config = _decoder_config(checkpoint)
    if config is not None:
        HeadLayout.of(config.num_heads, config.num_kv_heads, args.shares or args.tp)
        stages_of(config, args.pp)
    for axis in ("cp", "pp"):
        if config is None and getattr(args, axis) > 1:
            raise ValueError(
                f"--{axis}: expected 1 for a model that transformers runs, got {getattr(args, axis)}"
            )
    if config is None and args.weights not in (None, "dense"):
        raise ValueError(
            f"--weights: expected dense for a model that transformers runs, got {args.weights}"
        )
    if args.weights == "blocks" and not isinstance(checkpoint, GGUFCheckpoint):
        raise ValueError(
            "--weights: expected dense or int8 for a model in no GGUF file, got blocks"
        )
    dtype = getattr(torch, args.dtype) if args.dtype else stored_dtype(checkpoint)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    prompts = [encode(tokenizer, prompt, args.chat) for prompt in args.prompt]
    _check_context(prompts, args.dp, args.cp)
    check_micro_batches(args.micro_batches, len(prompts) if args.pp > 1 else 1)
    if config is not None:
        check_prompts(prompts, args.max_new_tokens, config.vocab_size, config.max_positions)
    printer = _Printer(tokenizer, shown=not args.json and len(prompts) == 1)
    ranks = launch(
        _rank,
        args.dp * args.pp * args.cp * args.tp,
        {name: getattr(args, name) for name in ("dp", "pp", "cp", "tp", "shares")},
        checkpoint,
        prompts,
        args.max_new_tokens,
        args.micro_batches,
        sampling,
        dtype,
        args.weights,
        args.check,
        not args.json,
        threads=args.threads,
        timeout_s=args.timeout,
        on_report=printer.show,
    )
    printer.end()
    summary = _summary(tokenizer, ranks)
    if args.check:
        summary |= compare(
            args.model, prompts, ranks[0], sampling, dtype, int8=args.weights == "int8"
        )
    _print(summary, args, len(prompts))
    return 0 if summary.get("matches_dense", True) else 1


def _check_context(prompts: list[list[int]], dp: int, cp: int) -> None:
    """Every replica has a prompt of a token for each of the context's ranks."""
    lengths = iter(map(len, prompts))
    for rows in part_sizes(len(prompts), dp):
        longest = max(itertools.islice(lengths, rows))
        if cp > 1 and longest < cp:
            raise ValueError(
                f"--cp: expected at most a rank for each of the longest prompt's {longest} tokens, "
                f"got {cp}"
            )


def _decoder_config(checkpoint: Checkpoint) -> DecoderConfig | None:
    """The model's sizes, where it is one of the decoder's, to find mistakes before ranks start."""
    try:
        return decoder_config(checkpoint)
    except UnknownArchitectureError:
        return None


def _rank(
    axes: dict[str, Any],
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    max_new_tokens: int,
    micro_batches: int | None,
    sampling: Sampling,
    dtype: torch.dtype,
    weights: str | None,
    check: bool,
    show_progress: bool,
) -> dict[str, Any]:
    """What each rank does: load its share, generate, tell."""
    mesh = init_mesh(**axes)
    first = mesh.world.rank == 0
    on_cpu = mesh.device_mesh.device_type == "cpu"
    if weights is None and on_cpu and isinstance(checkpoint, GGUFCheckpoint):
        weights = "blocks"
    held = None if weights == "dense" else weights
    with _progress_bar(show_progress and first) as progress:
        model = load(checkpoint, mesh, dtype=dtype, progress=progress, weights=held)
    on_token = (lambda row, token: report(token)) if first and len(prompts) == 1 else None
    made = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        on_token=on_token,
        replicas=mesh.dp,
        micro_batches=micro_batches,
    )
    told = {
        "tokens": made.tokens,
        "prefill_s": made.prefill_s,
        "decode_tokens_per_s": made.decode_tokens_per_s,
        "weight_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if check:
        logits = teacher_forced_logits(model, prompts, made.tokens)
        told["logits"] = [rows.numpy() for rows in logits] if first else None
    return told


class _progress_bar:
    """A bar for the bytes that rank 0 loads, on standard error."""

    def __init__(self, shown: bool) -> None:
        self._bar = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            console = Console(stderr=True)
            columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Any:
        if self._bar is None:
            return None
        self._bar.start()
        task = self._bar.add_task("loading", total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Printer:
    """Prints one prompt's text while its tokens come."""

    def __init__(self, tokenizer: Any, *, shown: bool) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._tokens: list[int] = []
        self._text = ""

    def show(self, rank: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character may be spread over several tokens; wait until it is whole.
        if self._shown and not text.endswith("\ufffd"):
            print(text[len(self._text) :], end="", flush=True)
            self._text = text

    def end(self) -> None:
        if self._shown:
            print(flush=True)


def _summary(tokenizer: Any, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = ranks[0]["tokens"]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    single = len(tokens) == 1
    return {
        "tokens": tokens[0] if single else tokens,
        "text": texts[0] if single else texts,
        "prefill_s": ranks[0]["prefill_s"],
        "decode_tokens_per_s": ranks[0]["decode_tokens_per_s"],
        "ranks": [
            {"rank": rank, **{key: row[key] for key in ("weight_bytes", "peak_rss_bytes")}}
            for rank, row in enumerate(ranks)
        ],
    }


def _print(summary: dict[str, Any], args: argparse.Namespace, num_prompts: int) -> None:
    if args.json:
        print(json.dumps(summary))
        return
    if num_prompts > 1:
        for prompt, text in zip(args.prompt, summary["text"], strict=True):
            print(f"> {prompt}\n{text}\n")
    shares = ", ".join(
        f"{row['weight_bytes'] / 1e6:.0f} MB of weights (peak {row['peak_rss_bytes'] / 1e6:.0f} MB)"
        for row in summary["ranks"]
    )
    print(
        f"\nprefill {summary['prefill_s']:.2f} s, {summary['decode_tokens_per_s']:.1f} tokens/s; "
        f"ranks hold {shares}",
        file=sys.stderr,
    )
    if "matches_dense" in summary:
        matches = str(summary["matches_dense"]).lower()
        print(f"matches_dense: {matches}, max_abs_logit_diff: {summary['max_abs_logit_diff']:.3g}")
