"""``pyparallel generate``: answer prompts with a model cut over the ranks of this machine."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from pyparallel.checkpoint.source import Checkpoint, open_checkpoint
from pyparallel.commands.chat import talk
from pyparallel.commands.flags import check_numbers, check_texts
from pyparallel.commands.generate_checks import asked_dtype, check_model
from pyparallel.commands.generate_flags import MAX_NEW_TOKENS
from pyparallel.commands.generate_output import BatchBar, Printer, print_summary, summary
from pyparallel.commands.generate_ranks import Job, answer_prompts
from pyparallel.commands.prompt_texts import asked_texts
from pyparallel.cut.shares import part_sizes
from pyparallel.decoding.conversation import Conversation
from pyparallel.decoding.request import check_micro_batches, check_prompts
from pyparallel.decoding.texts import checked_stops, ids_of
from pyparallel.launch import launch
from pyparallel.models.config import DecoderConfig, UnknownArchitectureError
from pyparallel.models.dense import compare, load_tokenizer
from pyparallel.models.generation import asked_sampling, read_generation
from pyparallel.models.load import decoder_config, stored_dtype
from pyparallel.ops.next_token import Sampling


def run(args: argparse.Namespace) -> int:
    check_numbers(args, ("dp", "tp", "cp", "pp"))
    texts = asked_texts(args)
    talking = args.chat and not texts
    check_texts("--stop", args.stop or ())
    check_texts("--system", [args.system or ""])
    stops = checked_stops(args.stop or ())
    if args.system is not None and not args.chat:
        raise ValueError("--system: expected --chat with it, got none")
    if args.profile is not None and talking:
        raise ValueError("--profile: expected --prompt with it, since a talk has no end; got none")
    count = 1 if talking else len(texts)
    if args.dp > count:
        raise ValueError(
            f"--dp: expected at most a replica for each of the {count} prompts, got {args.dp}"
        )
    flags = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    Sampling(**{name: value for name, value in flags.items() if value is not None})
    checkpoint = open_checkpoint(args.model)
    config = _decoder_config(checkpoint)
    new_tokens = _new_tokens(args.max_new_tokens, config, talking)
    sampling = asked_sampling(read_generation(checkpoint.path), new_tokens, **flags)
    check_model(args, checkpoint, config)
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    job = Job(
        {name: getattr(args, name) for name in ("dp", "pp", "cp", "tp", "shares")},
        checkpoint,
        new_tokens,
        sampling,
        asked_dtype(args) or stored_dtype(checkpoint),
        args.weights,
        stops,
        light(tokenizer) if stops else None,
        bar=not args.json,
        profile=args.profile,
    )
    if talking:
        return talk(args, job, tokenizer, config)
    return _answer(args, texts, job, tokenizer, config)


def _answer(
    args: argparse.Namespace,
    texts: list[str],
    job: Job,
    tokenizer: Any,
    config: DecoderConfig | None,
) -> int:
    """Every prompt, all at once."""
    if args.chat:
        system = {"system": args.system}
        prompts = [Conversation(tokenizer, **system).ask(text, 0) for text in texts]
    else:
        prompts = [ids_of(tokenizer, text) for text in texts]
    _check_context(prompts, args.dp, args.cp)
    check_micro_batches(args.micro_batches, len(prompts) if args.pp > 1 else 1)
    if config is not None:
        check_prompts(prompts, job.max_new_tokens, config.vocab_size, config.max_positions)
    single = len(prompts) == 1
    shown = not args.json and (single or sys.stderr.isatty())
    if shown and not single:
        printer = BatchBar(len(prompts) * job.max_new_tokens)
    else:
        printer = Printer(tokenizer, shown=shown, stop_strings=job.stop_strings)
    with printer:
        ranks = launch(
            answer_prompts,
            args.dp * args.pp * args.cp * args.tp,
            job,
            prompts,
            args.micro_batches,
            args.check,
            shown,
            threads=args.threads,
            timeout_s=args.timeout,
            on_report=printer.show,
        )
    told = summary(tokenizer, ranks, job.stop_strings)
    if args.check:
        told |= compare(
            args.model, prompts, ranks[0], job.sampling, job.dtype, int8=args.weights == "int8"
        )
    print_summary(told, texts, as_json=args.json)
    return 0 if told.get("matches_dense", True) else 1


def _new_tokens(asked: int | None, config: DecoderConfig | None, talking: bool) -> int:
    if asked is not None:
        return asked
    if not talking:
        return MAX_NEW_TOKENS
    return 512 if config is None else max(1, min(512, config.max_positions // 2))


def light(tokenizer: Any) -> Any:
    """What decodes a tokenizer's tokens alike and needs no transformers, where there is such a thing."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    # What tidies spaces is transformers' own work.
    return tokenizer if inner is None or tokenizer.clean_up_tokenization_spaces else inner


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
