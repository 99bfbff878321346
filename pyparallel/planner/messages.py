"""The collectives that a stage's tp ranks make, counted: what ``--dry-run`` hears from the modules.

Legend: L the stage's layers, T tokens of the call on this cp rank, H hidden, e bytes of a number. Bytes
of a call are those of the whole tensor, reduced or gathered: T H e where nothing else is said.

    forward            all_reduce: 2 L, and 1 behind the embedding
      with sp          reduce_scatter as often; all_gather: 2 L, and 1 before the head
      the loss         all_gather of four fp32 numbers a token and rank
    backward           all_reduce: 2 L, and 1 of the head
      with sp          reduce_scatter as often; all_gather: 4 L (gradients, and inputs once more for the
                       weights' gradients), 1 of the head's input, 1 of the embedding's gradient and 1
                       of learned positions'; all_reduce of a norm's gradient, H e or (LayerNorm) 2 H e
      q and k normed   all_reduce: 2 L, of the gradient of a head's norm
      KV replicated    all_reduce: L, of the gradients of all keys' and values' weights
      recompute=layers the layers' forward once more

Source: Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022, "Reducing activation recomputation".
"""

from __future__ import annotations

from collections import Counter

from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, Inference, Strategy, Training

# (operation, bytes of the whole): how often.
Calls = Counter[tuple[str, int]]


def inference_calls(
    shape: ModelShape, strategy: Strategy, work: Inference, layers: int, *, first: bool
) -> dict[str, Calls]:
    """Of a stage of ``layers``: by phase, "prefill" of all prompts and one "token" of each."""
    size = 4 if work.weight_dtype == "fp32" else 2
    found: dict[str, Calls] = {}
    for phase, tokens in (("prefill", work.prompt), ("token", 1)):
        whole = work.batch * tokens * shape.hidden * size
        found[phase] = _of({("all_reduce", whole): 2 * layers + first}, strategy)
    return found


def training_calls(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    layers: int,
    *,
    first: bool,
    last: bool,
) -> dict[str, Calls]:
    """Of a stage of ``layers`` in one micro-batch: by phase, "forward" and "backward"."""
    size = int(BYTES[training.dtype])
    tokens = strategy.micro_batch * training.sequence // strategy.cp
    whole = tokens * shape.hidden * size
    loss = {("all_gather", 16 * tokens * strategy.tp): int(last)}
    kv = 2 * shape.kv_heads * shape.head_dim * size
    replicated = layers if shape.kv_heads < strategy.tp else 0
    replicas = Counter({("all_reduce", kv * shape.hidden): replicated})
    if shape.qkv_bias:
        replicas["all_reduce", kv] += replicated
    if shape.qk_norm:
        replicas["all_reduce", shape.head_dim * size] += 2 * layers
    again = 2 * layers if strategy.recompute == "layers" else 0
    if not strategy.sp:
        forward = {("all_reduce", whole): 2 * layers + first}
        backward = {("all_reduce", whole): 2 * layers + last + again}
    else:
        embedded, vectors = 1 + bool(shape.learned_positions), 2 if shape.norm == "layer" else 1
        forward = {
            ("reduce_scatter", whole): 2 * layers + first,
            ("all_gather", whole): 2 * layers + last,
        }
        backward = {
            ("reduce_scatter", whole): 2 * layers + last + again,
            ("all_gather", whole): 4 * layers + first * embedded + last + again,
            ("all_reduce", vectors * shape.hidden * size): 2 * layers + last,
        }
    return {
        "forward": _of(Counter(forward) + Counter(loss), strategy),
        "backward": _of(Counter(backward) + replicas, strategy),
    }


def _of(calls: dict[tuple[str, int], int], strategy: Strategy) -> Calls:
    """Without those that are never made."""
    return Counter({call: n for call, n in calls.items() if n and strategy.tp > 1})
