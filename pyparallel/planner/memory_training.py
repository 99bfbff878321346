"""What a rank holds while it trains.

Of one layer and token, in bytes; a: bytes of a number, H hidden, D head_dim, N_r query heads, G_r KV
heads and F_r features of the rank (of an MoE layer top_k expert_ffn + shared_ffn). sp cuts the norms'
and the column layers' inputs, tp the rest:

    norms       2 (a H + 4)              RMS; with two statistics each, layer norms' 2 (a H + 8)
    inputs      2 a H                    of the QKV and the gate-up matmuls
    attention   a D (2 N_r + 2 G_r) + 4 N_r      q, k, v, output; flash keeps a log-sum-exp a query
    fused qkv   a D (N_r + G_r)          q and k before their rotation, where v lies beside them
    MLP         3 a F_r                  gate, up and their product; 2 a F_r without a gate

Recomputing attention drops the log-sum-exps, since flash attention keeps no scores; recomputing layers
keeps a H of each, and one layer's all while it is computed again. This is Korthikanti et al. 2022
(arXiv:2205.05198, equations 1 to 6) for grouped heads, gates and flash attention.

1F1B keeps min(pp - p, m) micro-batches on pp rank p, and interleaved 2 (pp - p - 1) + (v - 1) pp + 1
of its chunks (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from pyparallel.planner.engines import PYPARALLEL, Engine
from pyparallel.planner.memory import RankMemory, overhead_bytes, stage_shards
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import BYTES, OPTIMIZERS, Strategy, Training
from pyparallel.planner.weights import StageShard, largest_rank, layer_shard


def training_memory(
    shape: ModelShape,
    strategy: Strategy,
    training: Training,
    *,
    engine: Engine = PYPARALLEL,
) -> list[RankMemory]:
    """The peak of each pp rank, of its tp rank that holds the most.

    Raises:
        ValueError: a batch that does not divide, more stages than layers, more tp ranks than heads.
    """
    micro_batches = training.micro_batches(strategy)
    tokens = strategy.micro_batch * training.sequence / strategy.cp
    size, kept = _itemsize(training.dtype), layer_bytes(shape, strategy, training.dtype, engine)
    hidden, slack = size * shape.hidden, 1 + engine.fragmentation
    held, again = kept, 0.0
    if strategy.recompute == "layers":
        held, again = hidden / strategy.sequence_shards, kept
    working = working_bytes(shape, strategy, training.dtype)
    table = engine.table_gradients * 2 * -(-shape.vocab // strategy.tp) * shape.hidden
    # The gathered input of a column layer, and hidden states to and from the neighbours.
    sent = strategy.sp + 2 * (strategy.pp > 1) / strategy.sequence_shards
    buffers = engine.workspace_bytes + tokens * hidden * sent
    overhead = overhead_bytes(strategy, engine)
    shards = stage_shards(shape, strategy, engine)
    # Most stages of a long pipeline are alike.
    states = {shard: state_terms(shard, strategy, training, engine) for shard in set(shards)}
    found = []
    for place, shard in enumerate(shards):
        terms = dict(states[shard])
        at_once = shard.layers * in_flight(strategy, place, micro_batches)
        activations = held * at_once + again * (shard.layers > 0) + working
        terms["activations"] = tokens * activations * slack
        terms["logits"] = tokens * shard.vocab * (size + engine.logit_bytes) * slack
        terms["gradients"] += table if shard.embedding or shard.vocab else 0.0
        terms["buffers"] = buffers
        terms["overhead"] = overhead
        found.append(RankMemory(place, terms))
    return found


def state_terms(
    shard: StageShard, strategy: Strategy, training: Training, engine: Engine
) -> dict[str, float]:
    """Weights, gradients and optimizer states, shared out over dp x cp as ZeRO says.

    With ZeRO 3 a layer's weights are gathered when they are used, and the next one's before that; with 2
    and 3 a layer's gradients are whole until they are reduced.
    """
    parts, size = strategy.dp * strategy.cp, _itemsize(training.dtype)
    slack = 1 + engine.state_slack
    layer = shard.layer_total / max(1, shard.layers)
    widest = max(layer, shard.embedding, shard.head)
    stored = 4.0 if strategy.zero == 3 and training.master else size
    weights = shard.total * size
    if strategy.zero == 3 and parts > 1:
        weights = shard.total * stored / parts + (widest + layer) * size
    if training.frozen:
        return {"weights": weights * slack, "gradients": 0.0, "optimizer": 0.0}
    each = BYTES[training.gradient_dtype]
    gradients = shard.total * each
    if strategy.zero >= 2 and parts > 1:
        gradients = gradients / parts + widest * each
    states = 4 * OPTIMIZERS[training.optimizer]
    # The master copy is the stored weights themselves where those are fp32 shards.
    states += 4 if training.master and size < 4 and strategy.zero < 3 else 0
    optimizer = shard.total * states / (parts if strategy.zero else 1)
    return {
        "weights": weights * slack,
        "gradients": gradients * slack,
        "optimizer": optimizer * slack,
    }


def layer_bytes(
    shape: ModelShape, strategy: Strategy, dtype: str, engine: Engine = PYPARALLEL
) -> float:
    """What one layer keeps of one token for backward, where layers are not recomputed."""
    size, moe = _itemsize(dtype), shape.experts > 0
    shard = layer_shard(shape, strategy.tp, largest_rank(shape, strategy.tp), moe)
    hidden = size * shape.hidden
    statistics = 4 if shape.norm == "rms" else 8
    norm = hidden + statistics
    if engine.fp32_norms:
        norm = 8 * shape.hidden + 4 if shape.norm == "rms" else hidden + 2 * size
    gathered = engine.gathered_kept == "always" or (
        engine.gathered_kept == "without pipeline" and strategy.pp == 1
    )
    between = 2 * norm / strategy.sequence_shards
    between += 2 * hidden / (1 if gathered else strategy.sequence_shards)
    head = size * shape.head_dim
    query, kv = shard.query_heads, shard.kv_heads
    attention = head * (2 * query + 2 * kv) + engine.attention_copies * head * query
    if engine.fused_qkv_kept and not shape.learned_positions:
        attention += head * (query + kv)
    if shape.qk_norm:
        attention += 8 * shape.head_dim * (query + kv) if engine.fp32_norms else 0
        attention += 4 * (query + kv)
    if strategy.recompute != "attention":
        attention += 4 * query
    features = shard.ffn
    if moe:
        share = shard.mlp / max(1, shape.mlp_weights(True))
        features = (shape.top_k * shape.expert_ffn + shape.shared_ffn) * share
        # Each token's copies on their way to their experts and back.
        between += 2 * shape.top_k * hidden / strategy.sequence_shards
    mlp = size * features * (shape.mlp_matrices + (engine.silu_kept and shape.gated))
    return between + attention + mlp


def working_bytes(shape: ModelShape, strategy: Strategy, dtype: str) -> float:
    """A token's gradients that backward of one layer has at once: of the MLP's widest, and of x."""
    shard = layer_shard(shape, strategy.tp, largest_rank(shape, strategy.tp), shape.experts > 0)
    features = shard.ffn or shape.top_k * shape.expert_ffn / strategy.tp
    widest = _itemsize(dtype) * features * shape.mlp_matrices
    return widest + 2 * _itemsize(dtype) * shape.hidden / strategy.sequence_shards


def in_flight(strategy: Strategy, place: int, micro_batches: int) -> float:
    """How many micro-batches' activations of all its layers a pp rank holds at once."""
    pp, chunks = strategy.pp, strategy.virtual_stages
    if chunks == 1:
        return min(pp - place, micro_batches)
    ahead = 2 * (pp - place - 1) + (chunks - 1) * pp + 1
    return min(ahead, micro_batches * chunks) / chunks


def _itemsize(dtype: str) -> float:
    """Of activations and gathered weights: products of fp8 keep what surrounds them in 16 bits."""
    return max(BYTES[dtype], 2.0)
