"""The flags of ``pyparallel generate``."""

from __future__ import annotations

import argparse

from pyparallel.commands.flags import add_model, add_shares, add_timeout

DTYPES = ("float32", "bfloat16", "float16")
SHORT_DTYPES = dict(zip(("fp32", "bf16", "fp16"), DTYPES, strict=True))
# "dense", and what load() calls the others; a test holds them together.
WEIGHTS = ("dense", "int8", "blocks")
MAX_NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add(
        *("-p", "--prompt"),
        action="append",
        help="text to continue; may be repeated. Without any: a prompt a line of standard input",
    )
    add(
        "--prompt-file",
        action="append",
        metavar="PATH",
        help="a file with a prompt a line, - for standard input; may be repeated",
    )
    add(
        "--chat",
        action="store_true",
        help="put each prompt into the model's chat template; without a prompt, talk: each line of the "
        "input is a question, and the answers are remembered. Ctrl-C ends an answer, and then the chat",
    )
    add("--system", metavar="TEXT", help="with --chat: what the model is told before it is asked")
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text that ends an answer, and is no part of it; may be repeated",
    )
    _add_ranks(parser)
    add(
        "--max-new-tokens",
        type=int,
        metavar="K",
        help=f"default: {MAX_NEW_TOKENS}, and in a chat of several questions 512 or half the context",
    )
    add(
        "--dtype",
        choices=(*DTYPES, *SHORT_DTYPES),
        help="of weights and activations; default: the checkpoint's",
    )
    add(
        "--weights",
        choices=WEIGHTS,
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
    add("--profile", metavar="FILE", help="a trace of all ranks' answers, for Perfetto")
    add("--threads", type=int, metavar="N", help="threads per rank; default: cores / ranks")
    add_timeout(parser)
    add("--check", action="store_true", help="run the dense model too, and compare")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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
