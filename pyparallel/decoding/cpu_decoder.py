"""The whole decoder of a CPU rank in C++: one call a token, all layers and collectives inside.

A :class:`~pyparallel.models.decoder.Decoder` is read once into the addresses of its parameters; the
kernels (``csrc/cpu``) read these in place. Activations are fp32; weights and cache keep the model's
dtype. Sums over ranks run in rank order, as everywhere.

Where the context is cut as well, its ranks decode as one team: each holds the cache of its own tokens,
and computes its part of every matrix's outputs (``csrc/cpu/decoder/context.cpp``).

Legend: B sequences, T slots of the cache, V_r this rank's vocabulary, R ranks.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyparallel import _C, backend
from pyparallel.comm.group import Group
from pyparallel.decoding.ranks_apart import ranks_apart
from pyparallel.layers.context_kv_cache import ContextKVCache
from pyparallel.layers.kv_cache import KVCache
from pyparallel.layers.parallel_mlp import GATED
from pyparallel.layers.parameters import ShardedModule
from pyparallel.models.context_decoder import ContextDecoder
from pyparallel.models.decoder import Decoder
from pyparallel.models.plain import unlike_plain
from pyparallel.native.cpu.ops import ACTIVATIONS
from pyparallel.native.cpu.weights import PRECISIONS, hold, weight_argument, widened


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences that were begun together, and what is held of them.

    Attributes:
        tables: cosines and sines of the angles, and the positions of a cut context's slots.
    """

    cache: list[KVCache] | list[ContextKVCache]
    batch: int
    length: int
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]


class CPUDecoder:
    """This rank's share of a decoder, ready to run. All ranks of the model's group make one.

    Args:
        model: on the CPU, in fp32, bf16 or fp16; its matrices may be packed.
        threads: of this rank; by default torch's number.
        pin: keep every thread on a core of its own, if the ranks of this machine have as many.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        threads: int | None = None,
        pin: bool = True,
    ) -> None:
        reason = reason_against(model)
        if reason is not None:
            raise backend.UnsupportedError(f"decode_session: cpu: {reason}")
        # Its parts and not the model, whose end is what frees this one.
        self._attentions = [layer.attention for layer in model.layers]
        self._rotary = model.rotary
        self.group = model.group
        context = model.context if isinstance(model, ContextDecoder) else Group.single()
        self.head_start = model.head._start
        self.vocab_rows = model.head.weight.shape[0]
        # Everything the C++ side holds addresses of, and what of it had to be copied.
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.cache: list[KVCache] | list[ContextKVCache] | None = None
        self.sequences: Sequences | None = None
        threads = threads or torch.get_num_threads()
        rank = context.rank * self.group.size + self.group.rank
        cores = _cores(rank, context.size * self.group.size, threads) if pin else []
        self.engine = _C.Decoder(
            self._shape(model),
            self._weights(model),
            group=_engine_of(self.group),
            context=_engine_of(context),
            threads=threads,
            cores=cores,
        )

    def start(self, batch: int, slots: int, *, prompt: int = 0) -> None:
        """Begin ``batch`` sequences of up to ``slots`` tokens, with empty caches; of a whole context.

        Args:
            prompt: how many tokens the first call of each has, where rotary frequencies depend on it.
        """
        cache = [attention.new_cache(batch, slots) for attention in self._attentions]
        self._hold(cache, batch, slots, prompt, None)

    def resume(self, cache: list[ContextKVCache], *, prompt: int) -> None:
        """Go on behind prompts whose keys and values lie in the caches of a cut context.

        Args:
            cache: of each layer, from :meth:`ContextDecoder.new_cache`, with the prompts written.
        """
        first = cache[0]
        held = first.slots.positions_of(first.keys.shape[2], torch.device("cpu"))
        self._hold(cache, first.keys.shape[0], first.length, prompt, held)

    def _hold(
        self,
        cache: list[KVCache] | list[ContextKVCache],
        batch: int,
        length: int,
        prompt: int,
        positions: Tensor | None,
    ) -> None:
        # Weights are read in place. What is a copy is taken anew, however its source was changed.
        for source, copy in self._copies:
            copy.copy_(source)
        cos = sin = None
        if self._rotary is not None:
            cos, sin = (t.contiguous() for t in self._rotary.table(length, prompt))
        self.use(Sequences(cache, batch, length, (cos, sin, positions)))

    def use(self, sequences: Sequences) -> None:
        """Go on with sequences that were begun before, if others were since."""
        if sequences is self.sequences:
            return
        # Held for as long as their addresses are in use.
        self.sequences = sequences
        self.cache = cache = sequences.cache
        cos, sin, positions = sequences.tables
        self.engine.use_cache(
            sequences.batch,
            cache[0].keys.shape[2],
            [layer.keys.data_ptr() for layer in cache],
            [layer.values.data_ptr() for layer in cache],
            _address(cos),
            _address(sin),
            sequences.length,
            _address(positions),
        )

    def prefill(self, tokens: Sequence[int], *, row: int = 0, start: int = 0) -> None:
        """Append tokens to a sequence; leaves the logits after the last of them."""
        self.engine.prefill(list(tokens), row, start)

    def decode(
        self, tokens: Sequence[int], *, rows: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Append one token to each of some sequences; leaves the logits after each."""
        self.engine.decode(list(tokens), list(rows), list(positions))

    def greedy(self) -> list[int]:
        """The likeliest token after each row of the last call; no logits are gathered."""
        return self.engine.greedy()

    def logits(self) -> Tensor:
        """This rank's logits [rows of the last call, V_r], fp32; overwritten by the next call."""
        rows = self.engine.logit_rows
        count = rows * self.vocab_rows
        if count == 0:
            return torch.empty(rows, self.vocab_rows)
        memory = (ctypes.c_float * count).from_address(self.engine.logits)
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, self.vocab_rows)

    def _keep(self, tensor: Tensor | None) -> int:
        """The address of a tensor in fp32 that will live as long as this object; 0 for None."""
        if tensor is None:
            return 0
        hold(tensor, widened(tensor.detach()), self._kept, self._copies)
        return self._kept[-1].data_ptr()

    def _norm(self, module: nn.Module) -> tuple[int, int]:
        bias = getattr(module, "bias", None)
        return self._keep(module.weight), self._keep(bias)

    def _weight(self, module: ShardedModule) -> tuple[int, int, int, int, int]:
        weight = module.weight if module.packed is None else module.packed
        bias = getattr(module, "bias", None)
        return weight_argument("weight", weight, bias, self._kept, self._copies)

    def _shape(self, model: Decoder) -> dict[str, Any]:
        attention, mlp = model.layers[0].attention, model.layers[0].mlp
        layout, rank = attention.qkv_proj.layout, self.group.rank
        (query, query_end), (kv, kv_end) = layout.query[rank], layout.kv[rank]
        dtype = model.embedding.dtype
        return {
            "hidden": model.config.hidden_size,
            "heads": query_end - query,
            "kv_heads": kv_end - kv,
            "head_dim": model.config.head_dim,
            "rotary_dim": model.config.rotary_dim,
            "intermediate": mlp.down_proj.weight_shape[1],
            "vocab_size": model.config.vocab_size,
            "vocab_begin": self.head_start,
            "vocab_rows": self.vocab_rows,
            "eps": model.config.norm_eps,
            "softmax_scale": model.config.head_dim**-0.5,
            "gated": mlp.activation in GATED,
            "parallel_residual": model.config.parallel_residual,
            "activation": ACTIVATIONS[GATED.get(mlp.activation, mlp.activation)],
            "cache_precision": PRECISIONS[dtype],
            "bf16_compute": dtype is torch.bfloat16,
        }

    def _weights(self, model: Decoder) -> dict[str, Any]:
        positions = None if model.positions is None else model.positions.weight
        return {
            "embedding": self._weight(model.embedding),
            "positions": self._keep(positions),
            "final_norm": self._norm(model.norm),
            "head": self._weight(model.head),
            "layers": [self._layer(layer) for layer in model.layers],
        }

    def _layer(self, layer: nn.Module) -> dict[str, Any]:
        attention, mlp = layer.attention, layer.mlp
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return {
            "attention_norm": self._norm(layer.attention_norm),
            "qkv": self._weight(attention.qkv_proj),
            "q_norm": self._keep(None if q_norm is None else q_norm.weight),
            "k_norm": self._keep(None if k_norm is None else k_norm.weight),
            "out": self._weight(attention.out_proj),
            "mlp_norm": self._norm(layer.mlp_norm),
            "up": self._weight(mlp.up_proj),
            "down": self._weight(mlp.down_proj),
            "window": attention.window or 0,
        }


_compiled: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, CPUDecoder]] = (
    weakref.WeakKeyDictionary()
)


def compiled(model: Decoder) -> CPUDecoder:
    """The model's :class:`CPUDecoder`, made anew only if its parameters have moved."""
    held = (*model.parameters(), *model.buffers())
    places = ((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in held)
    key = (torch.get_num_threads(), model.config, *places)
    known = _compiled.get(model)
    if known is None or known[0] != key:
        known = (key, CPUDecoder(model))
        _compiled[model] = known
    return known[1]


def reason_against(model: nn.Module, *args: Any) -> str | None:
    """Why the C++ decoder can't run this model, or None."""
    if not isinstance(model, Decoder):
        return f"expected a pyparallel Decoder, got {type(model).__name__}"
    if model.drops:
        return "it drops, in training"
    if model.stage.count > 1:
        return f"expected a whole model, got {model.stage}"
    parameters = list(model.parameters())
    if any(p.device.type != "cpu" for p in parameters):
        return f"expected parameters on the CPU, got {parameters[0].device}"
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"expected one of fp32, bf16, fp16 throughout, got {sorted(map(str, dtypes))}"
    if args and len(args[0]) > 1 and model.rows_apart:
        return "its rotary frequencies depend on each prompt's length"
    apart = ranks_apart(model)
    if apart is not None:
        return apart
    return unlike_plain(model)


def _engine_of(group: Group) -> _C.SharedMemoryGroup | None:
    return group.communicator.engine if group.size > 1 else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cores(rank: int, ranks: int, threads: int) -> list[int]:
    """A core for each thread of this rank, or none where there are fewer cores than threads."""
    cores = sorted(os.sched_getaffinity(0))
    if ranks * threads > len(cores):
        return []
    return cores[rank * threads : (rank + 1) * threads]
