"""The sizes of a decoder, and how many weights each of its parts has.

Legend: H hidden, D head_dim, N heads, G kv_heads, F ffn, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyparallel.checkpoint.format import read_json
from pyparallel.planner.config_fields import config_fields
from pyparallel.planner.names import find, shipped


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer; all sizes are dense.

    Attributes:
        ffn: features between the matrices of a dense layer's MLP.
        tied: the LM head is the embedding.
        gated: the MLP has a gate beside its up projection.
        norm: "rms" (a weight) or "layer" (a weight and a bias).
        norms: norms a layer beside those of queries and keys; Gemma 2 and 3 have four.
        qk_norm: "": none; "head": a weight of ``head_dim`` for queries, one for keys.
        learned_positions: rows of a table of positions that is added to the embedding; 0: rotary.
        max_positions: tokens that a sequence may have.
        window, windowed_layers: how many layers see the last ``window`` tokens alone.
        experts, top_k, expert_ffn: routed experts of a layer, how many a token visits, their features.
        shared_ffn: features of the expert that every token visits.
        dense_layers: how many layers, the first ones, have a dense MLP of ``ffn`` in a model of experts.
        sinks: a learned logit a head beside attention's.
        kept: modules whose matrices stay at 16 bits where weights have fewer, by parts of their names
            ("self_attn", "layers.0.mlp"), as a checkpoint's quantization_config lists them.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied: bool = False
    gated: bool = True
    norm: str = "rms"
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    learned_positions: int = 0
    window: int = 0
    windowed_layers: int = 0
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    sinks: bool = False
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}"
            )

    def __hash__(self) -> int:
        # Shapes are keys of what is computed once for each; all their fields would cost more than that.
        return hash((self.name, self.hidden, self.layers, self.vocab))

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one MLP: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    def is_moe(self, layer: int) -> bool:
        """Whether that layer's MLP is one of experts."""
        return self.experts > 0 and layer >= self.dense_layers

    @property
    def moe_layers(self) -> int:
        """Layers whose MLP is one of experts."""
        return max(0, self.layers - self.dense_layers) if self.experts else 0

    @property
    def norm_parameters(self) -> int:
        """Of one norm over H."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def attention_matrices(self) -> int:
        """Weights that a token is multiplied with in one layer's attention: H D (2 N + 2 G)."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    def mlp_weights(self, moe: bool, *, active: bool = False) -> int:
        """Weights of one layer's MLP that are matrices; ``active``: those that one token meets."""
        if not moe:
            return self.mlp_matrices * self.hidden * self.ffn
        visited = self.top_k if active else self.experts
        features = visited * self.expert_ffn + self.shared_ffn
        return self.mlp_matrices * self.hidden * features + self.hidden * self.experts

    def layer_parameters(self, moe: bool = False) -> int:
        """All parameters of one layer."""
        qkv = self.head_dim * (self.heads + 2 * self.kv_heads)
        total = self.attention_matrices + self.mlp_weights(moe)
        total += self.norms * self.norm_parameters + 2 * self.head_dim * self.qk_norm
        total += qkv * self.qkv_bias + self.hidden * self.out_bias + self.heads * self.sinks
        if self.mlp_bias:
            features = self.ffn if not moe else self.experts * self.expert_ffn
            rows = 1 if not moe else self.experts
            total += (self.mlp_matrices - 1) * features + rows * self.hidden
            total += self.experts if moe else 0
        return total

    def parameters(self) -> int:
        """All parameters; a tied head's are the embedding's."""
        layers = self.moe_layers * self.layer_parameters(True)
        layers += (self.layers - self.moe_layers) * self.layer_parameters()
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return layers + tables + self.learned_positions * self.hidden + self.norm_parameters

    def matmul_weights(self, *, head: bool = True) -> int:
        """Weights that each token is multiplied with, the head's among them; experts: visited ones."""
        mlp = self.moe_layers * self.mlp_weights(True, active=True)
        mlp += (self.layers - self.moe_layers) * self.mlp_weights(False)
        return self.layers * self.attention_matrices + mlp + head * self.vocab * self.hidden

    def kv_bytes_per_token(self, bytes_each: float = 2.0) -> float:
        """Keys and values of one token in all layers, before any is cut or replicated."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_each


def model_shape(model: str | Path | Mapping[str, Any]) -> ModelShape:
    """A shipped model by name, or what a Hugging Face config.json (or its folder, or its content) says.

    Names match whatever their case, dashes and organisation: "meta-llama/Llama-3.1-8B" is
    "llama 3.1 8b".

    Raises:
        ValueError: no such name (the message gives the nearest), or a config that can't be read.
    """
    if isinstance(model, Mapping):
        return ModelShape(**config_fields(model, "config"))
    path = Path(model)
    if path.is_dir() or path.suffix == ".json" or isinstance(model, Path):
        path = path / "config.json" if path.is_dir() else path
        return ModelShape(**config_fields(read_json(path), path.parent.name or "config"))
    known = shipped("models")
    name = find("model", str(model), known)
    entry = {key: value for key, value in known[name].items() if key not in ("aliases", "source")}
    return ModelShape(name=name, **entry | {"kept": tuple(entry.get("kept", ()))})
