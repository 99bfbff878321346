"""What the flags of ``pyparallel generate`` may be together, and what they name."""

from __future__ import annotations

import argparse

import torch

from pyparallel.checkpoint.gguf import GGUFCheckpoint
from pyparallel.checkpoint.source import Checkpoint
from pyparallel.commands.generate_flags import SHORT_DTYPES
from pyparallel.cut.shard import HeadLayout
from pyparallel.models.config import DecoderConfig
from pyparallel.models.stage import stages_of


def check_model(
    args: argparse.Namespace, checkpoint: Checkpoint, config: DecoderConfig | None
) -> None:
    """Raise the ValueError of flags that this model can't be run with, before ranks start.

    Args:
        config: None for a model that transformers runs.
    """
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


def asked_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """What ``--dtype`` names."""
    return getattr(torch, SHORT_DTYPES.get(args.dtype, args.dtype)) if args.dtype else None
