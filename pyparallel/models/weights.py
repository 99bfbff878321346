"""Where each parameter of the decoder lies in a checkpoint, and how it is cut.

A parameter is the join, along its axis 0, of slices of one or more dense tensors, which GPT-2 stores
transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyparallel.cut.shard import REPLICATED, HeadLayout, Sharding, features
from pyparallel.cut.shares import Parts
from pyparallel.layers.vocab_parallel_embedding import vocab_sharding
from pyparallel.models.config import DecoderConfig


@dataclass(frozen=True)
class Source:
    """The slices of a dense tensor that a parameter takes.

    Attributes:
        name: the tensor in the checkpoint.
        sharding: how the tensor, as it is stored, is cut.
        transposed: it is stored as [K, M], and the parameter is [M, K].
    """

    name: str
    sharding: Sharding
    transposed: bool = False


Sources = dict[str, tuple[Source, ...]]


def sources(config: DecoderConfig, parts: Parts) -> Sources:
    """The sources of every parameter of ``Decoder(config)``, over ranks or their shares."""
    return {"llama": _llama, "gpt2": _gpt2, "gpt_neox": _gpt_neox}[config.family](config, parts)


def _replicated(name: str) -> tuple[Source, ...]:
    return (Source(name, REPLICATED),)


def _llama(config: DecoderConfig, parts: Parts) -> Sources:
    layout = HeadLayout.of(config.num_heads, config.num_kv_heads, parts)
    query, kv = layout.query_sharding(config.head_dim), layout.kv_sharding(config.head_dim)
    cut = features(config.intermediate_size, parts)
    vocab = vocab_sharding(config.vocab_size, parts)
    found: Sources = {
        "embedding.weight": (Source("model.embed_tokens.weight", vocab),),
        "norm.weight": _replicated("model.norm.weight"),
    }
    if not config.tied:
        found["head.weight"] = (Source("lm_head.weight", vocab),)
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        found[ours + "attention_norm.weight"] = _replicated(theirs + "input_layernorm.weight")
        found[ours + "mlp_norm.weight"] = _replicated(theirs + "post_attention_layernorm.weight")
        heads = (("q_proj", query), ("k_proj", kv), ("v_proj", kv))
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            found[f"{ours}attention.qkv_proj.{kind}"] = tuple(
                Source(f"{attention}{name}.{kind}", sharding) for name, sharding in heads
            )
        found[ours + "attention.out_proj.weight"] = (
            Source(attention + "o_proj.weight", query.along(1)),
        )
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            found[f"{ours}mlp.up_proj.{kind}"] = tuple(
                Source(f"{mlp}{name}.{kind}", cut) for name in ("gate_proj", "up_proj")
            )
        found[ours + "mlp.down_proj.weight"] = (Source(mlp + "down_proj.weight", cut.along(1)),)
        if config.out_bias:
            found[ours + "attention.out_proj.bias"] = _replicated(attention + "o_proj.bias")
        if config.mlp_bias:
            found[ours + "mlp.down_proj.bias"] = _replicated(mlp + "down_proj.bias")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                weight = f"{attention}{name}.weight"
                found[f"{ours}attention.{name}.weight"] = _replicated(weight)
    return found


def _norms(found: Sources, ours: str, theirs: str) -> None:
    for kind in ("weight", "bias"):
        found[f"{ours}.{kind}"] = _replicated(f"{theirs}.{kind}")


def _gpt2(config: DecoderConfig, parts: Parts) -> Sources:
    layout = HeadLayout.of(config.num_heads, config.num_kv_heads, parts)
    qkv, heads = layout.qkv_sharding(config.head_dim), layout.query_sharding(config.head_dim)
    cut = features(config.intermediate_size, parts)
    vocab = vocab_sharding(config.vocab_size, parts)
    found: Sources = {
        "embedding.weight": (Source("transformer.wte.weight", vocab),),
        "positions.weight": _replicated("transformer.wpe.weight"),
    }
    _norms(found, "norm", "transformer.ln_f")
    if not config.tied:
        found["head.weight"] = (Source("lm_head.weight", vocab),)
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"transformer.h.{index}."
        _norms(found, ours + "attention_norm", theirs + "ln_1")
        _norms(found, ours + "mlp_norm", theirs + "ln_2")
        for name, source, sharding in (
            ("attention.qkv_proj", "attn.c_attn", qkv),
            ("mlp.up_proj", "mlp.c_fc", cut),
        ):
            weight = Source(f"{theirs}{source}.weight", sharding.along(1), True)
            found[f"{ours}{name}.weight"] = (weight,)
            found[f"{ours}{name}.bias"] = (Source(f"{theirs}{source}.bias", sharding),)
        for name, source, sharding in (
            ("attention.out_proj", "attn.c_proj", heads),
            ("mlp.down_proj", "mlp.c_proj", cut),
        ):
            weight = Source(f"{theirs}{source}.weight", sharding, True)
            found[f"{ours}{name}.weight"] = (weight,)
            found[f"{ours}{name}.bias"] = _replicated(f"{theirs}{source}.bias")
    return found


def _gpt_neox(config: DecoderConfig, parts: Parts) -> Sources:
    layout = HeadLayout.of(config.num_heads, config.num_kv_heads, parts)
    qkv = interleaved_qkv(layout, config.head_dim)
    heads = layout.query_sharding(config.head_dim, dim=1)
    cut = features(config.intermediate_size, parts)
    vocab = vocab_sharding(config.vocab_size, parts)
    found: Sources = {"embedding.weight": (Source("gpt_neox.embed_in.weight", vocab),)}
    _norms(found, "norm", "gpt_neox.final_layer_norm")
    if not config.tied:
        found["head.weight"] = (Source("embed_out.weight", vocab),)
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"gpt_neox.layers.{index}."
        _norms(found, ours + "attention_norm", theirs + "input_layernorm")
        _norms(found, ours + "mlp_norm", theirs + "post_attention_layernorm")
        rows: list[tuple[str, str, Sharding, Sharding]] = [
            ("mlp.up_proj", "mlp.dense_h_to_4h", cut, cut),
            ("mlp.down_proj", "mlp.dense_4h_to_h", cut.along(1), REPLICATED),
            ("attention.qkv_proj", "attention.query_key_value", qkv, qkv),
            ("attention.out_proj", "attention.dense", heads, REPLICATED),
        ]
        for name, source, weight, bias in rows:
            found[f"{ours}{name}.weight"] = (Source(f"{theirs}{source}.weight", weight),)
            if name.startswith("mlp") or config.qkv_bias:
                found[f"{ours}{name}.bias"] = (Source(f"{theirs}{source}.bias", bias),)
    return found


def interleaved_qkv(layout: HeadLayout, head_dim: int) -> Sharding:
    """Rows stored head by head, each head's query, key and value rows together (GPT-NeoX).

    A rank takes its heads' queries, then their keys, then their values.
    """
    ranges = tuple(
        tuple(
            ((3 * head + part) * head_dim, (3 * head + part + 1) * head_dim)
            for part in range(3)
            for head in range(start, stop)
        )
        for start, stop in layout.query
    )
    return Sharding(0, 3 * layout.num_heads * head_dim, ranges)
