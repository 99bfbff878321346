"""GGUF files of small random models, written with the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

VOCAB = 61


@dataclass(frozen=True)
class Model:
    """A Llama-like model.

    Attributes:
        kind: of the matrices; ``kinds`` has others, by the names of tensors in a layer.
    """

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 32
    layers: int = 2
    vocab: int = VOCAB
    tied: bool = False
    architecture: str = "llama"
    kinds: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> dict[str, np.ndarray]:
        """Write the file; returns what its tensors hold, by GGUF's names."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(128)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.intermediate)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"token{i}" for i in range(self.vocab)])
        random = np.random.default_rng(0)
        held = {}
        for name, shape in self._shapes().items():
            values = random.standard_normal(shape, np.float32) * (0.15 if len(shape) == 2 else 0.3)
            if "norm" in name:
                values += 1
            short = name.removesuffix(".weight").split(".")[-1]
            kind = self.kinds.get(short, self.kind) if len(shape) == 2 else "F32"
            number = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(values, number)
            writer.add_tensor(name, data, raw_dtype=number)
            held[name] = gguf.quants.dequantize(data, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return held

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["output.weight"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            shapes |= {
                block + "attn_norm.weight": (self.hidden,),
                block + "ffn_norm.weight": (self.hidden,),
                block + "attn_q.weight": (query, self.hidden),
                block + "attn_k.weight": (kv, self.hidden),
                block + "attn_v.weight": (kv, self.hidden),
                block + "attn_output.weight": (self.hidden, query),
                block + "ffn_gate.weight": (self.intermediate, self.hidden),
                block + "ffn_up.weight": (self.intermediate, self.hidden),
                block + "ffn_down.weight": (self.hidden, self.intermediate),
            }
            if self.architecture == "qwen2":
                shapes |= {
                    block + "attn_q.bias": (query,),
                    block + "attn_k.bias": (kv,),
                    block + "attn_v.bias": (kv,),
                }
        return shapes


# No K is a multiple of 256. 1 and 2 KV heads are fewer than 3 ranks.
MODELS = {
    "q4_0": Model("Q4_0", hidden=96, heads=5, kv_heads=5, intermediate=160),
    "q4_1": Model("Q4_1", hidden=160, heads=3, kv_heads=1, intermediate=224, tied=True),
    "q8_0": Model("Q8_0", hidden=64, heads=6, kv_heads=2, intermediate=96, tied=True),
    # Q, K and V of two kinds, and a kind that is not held as blocks, beside one kind for each matrix.
    "mixed": Model(
        "Q4_1",
        hidden=128,
        heads=4,
        kv_heads=2,
        intermediate=192,
        architecture="qwen2",
        kinds={
            "token_embd": "Q8_0",
            "output": "Q8_0",
            "attn_v": "Q8_0",
            "attn_output": "Q4_0",
            "ffn_down": "Q5_0",
        },
    ),
    # Two ranks' three heads of 16 end inside a block; three ranks' two do not.
    "narrow heads": Model("Q8_0", hidden=96, heads=6, kv_heads=6, intermediate=128, head_dim=16),
}
