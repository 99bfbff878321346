"""The norms of the decoder, by its config."""

from __future__ import annotations

import torch
from torch import nn

from pyparallel.comm.group import Group
from pyparallel.layers import (
    LayerNorm,
    RMSNorm,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
)
from pyparallel.models.config import DecoderConfig


def norm_of(
    config: DecoderConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    group: Group,
    sequence_parallel: bool,
) -> nn.Module:
    """A norm of the config's kind, on all tokens or on this rank's."""
    options = {"device": device, "dtype": dtype}
    if sequence_parallel:
        kind = SequenceParallelRMSNorm if config.norm == "rms" else SequenceParallelLayerNorm
        return kind(config.hidden_size, config.norm_eps, group=group, **options)
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.hidden_size, config.norm_eps, **options)
