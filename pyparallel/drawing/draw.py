"""One picture of a model on a mesh: matrices, heads, messages, tokens, attention, pipeline and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyparallel.comm.context import zigzag_parts
from pyparallel.cut.shares import Shares, are_equal, check_shares
from pyparallel.drawing.context_attention import context_attention_block
from pyparallel.drawing.cuts import MatrixCut, matrices_of
from pyparallel.drawing.matrices import heads_block, matrices_block
from pyparallel.drawing.messages import Message, messages_block, messages_of
from pyparallel.drawing.model import config_of, decoder_of
from pyparallel.drawing.ranks import ranks_block
from pyparallel.drawing.svg import MARGIN, Block, human_bytes, page, text
from pyparallel.drawing.timeline import stage_costs, timeline_block
from pyparallel.drawing.tokens import tokens_block
from pyparallel.limits import check_count
from pyparallel.mesh import AXES
from pyparallel.models.config import DecoderConfig
from pyparallel.models.decoder import Decoder
from pyparallel.models.stage import stages_of
from pyparallel.planner.shape import ModelShape
from pyparallel.planner.strategy import Strategy

# More could be drawn, but not seen.
MOST_RANKS, MOST_OF_REPLICA, MOST_STEPS = 64, 1024, 256
# Scores of attention, the largest tensor of a layer, are counted in 63 bits.
MOST_TOKENS, MOST_OF_BATCH = 1 << 24, 1 << 28


@dataclass(frozen=True)
class Facts:
    """What a picture shows of one layer and both tables.

    Attributes:
        decoder: one layer on the meta device, as tp rank 0 has it.
        tokens: of a sequence, that a rank of cp has.
    """

    config: DecoderConfig
    decoder: Decoder
    matrices: list[MatrixCut]
    messages: list[Message]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """What ``pyparallel draw --json`` prints."""
        ranks = range(self.decoder.group.size)
        return {
            "shares": self.decoder.group.shares,
            "matrices": [
                {
                    "name": matrix.name,
                    "rows": matrix.rows,
                    "columns": matrix.columns,
                    "cut": "rows" if matrix.axis == 0 else "columns",
                    "held": [matrix.held(rank) for rank in ranks],
                }
                for matrix in self.matrices
            ],
            "messages": [vars(message) for message in self.messages],
        }


def facts_of(
    model: ModelShape | DecoderConfig,
    strategy: Strategy,
    *,
    shares: Shares = (),
    tokens: int = 4096,
) -> Facts:
    """Read what a picture shows from the parallel modules themselves, built on the meta device: what
    their shardings say, and what they ask of their group when the layer runs there.

    Args, Raises: as :func:`draw`.
    """
    config = config_of(model) if isinstance(model, ModelShape) else model
    for axis in ("pp", "cp", "tp"):
        check_count(axis, getattr(strategy, axis), MOST_RANKS, why=" in a picture")
    replica = strategy.pp * strategy.cp * strategy.tp
    check_count("pp x cp x tp", replica, MOST_OF_REPLICA, why=" ranks in a picture")
    check_count("tokens", tokens, MOST_TOKENS)
    check_count("micro_batch x tokens", strategy.micro_batch * tokens, MOST_OF_BATCH)
    own = tokens
    if strategy.cp > 1:
        if tokens < 2 * strategy.cp:
            raise ValueError(
                f"tokens: expected at least {2 * strategy.cp}, two chunks for each rank of "
                f"cp={strategy.cp}, got {tokens}"
            )
        # The first rank has as many as any.
        own = zigzag_parts(tokens, strategy.cp).sizes[0]
    decoder, communicator = decoder_of(
        config,
        tp=strategy.tp,
        shares=check_shares("shares", shares or (1,) * strategy.tp, strategy.tp),
        sequence_parallel=strategy.sp and strategy.tp > 1,
    )
    messages: list[Message] = []
    if strategy.tp > 1:
        sequences = strategy.micro_batch
        messages = messages_of(decoder, communicator, sequences=sequences, tokens=own)
    return Facts(config, decoder, matrices_of(decoder), messages, own)


def draw(
    model: ModelShape | DecoderConfig,
    strategy: Strategy,
    *,
    name: str | None = None,
    shares: Shares = (),
    tokens: int = 4096,
    micro_batches: int | None = None,
    schedule: str | None = None,
) -> str:
    """The picture, SVG as text, of what :func:`facts_of` reads.

    Args:
        strategy: dp, pp, cp, tp, sp and the virtual stages; ``micro_batch`` sequences a message.
        name: of the model; by default the shape's, or the config's family.
        shares: of the tp ranks; by default equal.
        tokens: of a sequence.
        micro_batches: of a step of the pipeline; by default twice its ranks.
        schedule: "1f1b" or "gpipe"; of several virtual stages a rank "interleaved".

    Raises:
        ValueError: a model of experts; more ranks than heads, layers or tokens allow, or than can be
            seen (64 along an axis, 1024 a replica); shares that are none.
    """
    facts = facts_of(model, strategy, shares=shares, tokens=tokens)
    decoder, group = facts.decoder, facts.decoder.group
    name = name or (model.name if isinstance(model, ModelShape) else model.family)
    sizes = {axis: getattr(strategy, axis) for axis in AXES}
    title = f"{name}: " + " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    title += " + sp" if decoder.sequence_parallel else ""
    title += "" if are_equal(group.shares) else f", shares {', '.join(map(str, group.shares))}"
    blocks: list[Block | None] = [
        Block(16, (text(MARGIN, 12, title, style="title"),)),
        matrices_block(facts.matrices, strategy.tp),
        heads_block(decoder.layers[0].attention.qkv_proj.layout),
        messages_block(
            facts.messages,
            sequences=strategy.micro_batch,
            tokens=facts.tokens,
            ranks=strategy.tp,
            context=strategy.cp,
        ),
        tokens_block(tokens, group, strategy.cp, sequence_parallel=decoder.sequence_parallel),
        _context_block(facts, strategy, tokens),
    ]
    if strategy.pp > 1:
        blocks.append(_pipeline_block(facts, strategy, micro_batches, schedule))
    blocks.append(ranks_block(sizes))
    return page([block for block in blocks if block is not None])


def _context_block(facts: Facts, strategy: Strategy, tokens: int) -> Block | None:
    attention = facts.decoder.layers[0].attention
    layout = attention.qkv_proj.layout
    (first, last), (first_kv, last_kv) = layout.query[0], layout.kv[0]
    itemsize = facts.decoder.head.dtype.itemsize
    return context_attention_block(
        tokens, strategy.cp, last - first, last_kv - first_kv, facts.config.head_dim, itemsize
    )


def _pipeline_block(
    facts: Facts, strategy: Strategy, micro_batches: int | None, schedule: str | None
) -> Block:
    count = 2 * strategy.pp if micro_batches is None else micro_batches
    check_count("micro_batches", count, MOST_STEPS, why=" in a picture")
    schedule = schedule or ("interleaved" if strategy.virtual_stages > 1 else "1f1b")
    stages = stages_of(facts.config, strategy.pp * strategy.virtual_stages)
    layer = sum(m.numbers for m in facts.matrices if m.module.startswith("layers."))
    tokens = strategy.micro_batch * facts.decoder.own_tokens(facts.tokens)
    handed = tokens * facts.config.hidden_size * facts.decoder.head.dtype.itemsize
    costs = stage_costs(facts.config, stages, layer)
    return timeline_block(stages, costs, strategy.pp, count, schedule, human_bytes(handed))
