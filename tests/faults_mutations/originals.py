"""The tiny files that are mutated, and what a plain reference makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoint.gguf_files import Model
from tests.transformers_models import randomize

IDS = torch.tensor([[3, 7, 11, 2, 9, 5, 8, 8, 1]])
_SIZES = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KV = {"num_key_value_heads": 1, "head_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, **_KV, "tie_word_embeddings": True},
    "mistral": {**_SIZES, **_KV, "sliding_window": 4},
    "qwen2": {**_SIZES, "num_key_value_heads": 1},
    "qwen3": {**_SIZES, **_KV},
    "gpt2": {"vocab_size": 17, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 32},
    "gpt_neox": {**_SIZES, "rotary_pct": 0.5},
    # Run by transformers' own modules.
    "olmo2": {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
}
GGUF = Model("Q8_0", hidden=32, heads=2, kv_heads=1, intermediate=32, layers=1, vocab=17)


@dataclass(frozen=True)
class Original:
    """A folder to mutate.

    Attributes:
        path: what is opened: the folder, or a file in it.
        reference: logits of what the folder holds, by other code than ours.
    """

    path: Path
    reference: Callable[[Path], Tensor]


def write_all(root: Path) -> dict[str, Original]:
    """Write every original into a folder of its own."""
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    made = {}
    for name, values in CONFIGS.items():
        config = transformers.CONFIG_MAPPING[name](**values)
        model = randomize(transformers.AutoModelForCausalLM.from_config(config)).eval()
        model.save_pretrained(root / name)
        made[name] = Original(root / name, hugging_face)
        if name in ("llama", "gpt_neox"):
            parts = root / f"{name} parts"
            model.save_pretrained(parts, max_shard_size="1KB")
            made[parts.name] = Original(parts, hugging_face)
    _write_sharded(root / "llama", root / "sharded")
    made["sharded"] = Original(root / "sharded", sharded)
    (root / "gguf").mkdir()
    GGUF.write(root / "gguf" / "model.gguf")
    made["gguf"] = Original(root / "gguf" / "model.gguf", gguf_file)
    return made


def hugging_face(path: Path) -> Tensor:
    """transformers' own class on the same folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        return model(IDS).logits.float()


def _write_sharded(source: Path, folder: Path) -> None:
    """As save() writes a folder, from two ranks."""
    folder.mkdir()
    with safe_open(source / "model.safetensors", "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    files: dict[str, dict[str, Tensor]] = {}
    listed = {}
    for name, value in tensors.items():
        rows = -(-value.shape[0] // 2)
        chunks = []
        for rank, start in enumerate(range(0, value.shape[0], rows)):
            part = value[start : start + rows].clone()
            offsets = [start, *[0] * (value.dim() - 1)]
            file = f"rank_{rank:05}_00.safetensors"
            files.setdefault(file, {})[f"{name}@{','.join(map(str, offsets))}"] = part
            chunks.append([file, offsets, list(part.shape)])
        listed[name] = {"shape": list(value.shape), "dtype": "float32", "chunks": chunks}
    for file, parts in files.items():
        save_file(parts, folder / file)
    index = {
        "format": 1,
        "tensors": listed,
        "files": {file: (folder / file).stat().st_size for file in files},
        "state": {"extra": {"step": 3}, "optimizer": None},
    }
    (folder / "pyparallel.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


def sharded(path: Path) -> Tensor:
    """Boxes pasted together one by one, in transformers' class."""
    index = json.loads((path / "pyparallel.index.json").read_text())
    tensors = {}
    for name, stored in index["tensors"].items():
        if name.startswith("optimizer/"):
            continue
        count = torch.zeros(stored["shape"], dtype=torch.int64)
        value = torch.empty(stored["shape"], dtype=getattr(torch, stored["dtype"]))
        for file, offsets, sizes in stored["chunks"]:
            box = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            with safe_open(path / file, "pt") as opened:
                value[box] = opened.get_tensor(f"{name}@{','.join(map(str, offsets))}")
            count[box] += 1
        assert (count == 1).all()
        tensors[name] = value
    config = transformers.AutoConfig.from_pretrained(path)
    dtype = config.dtype or next(iter(tensors.values())).dtype
    return _answer(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype), tensors)


def gguf_file(path: Path) -> Tensor:
    """The gguf package's reader, and transformers' Llama with rotary pairs put in its order."""
    reader = gguf.GGUFReader(path)
    get = {name: field.contents() for name, field in reader.fields.items()}.get
    heads, hidden = get("llama.attention.head_count"), get("llama.embedding_length")
    head_dim = get("llama.attention.key_length", hidden // heads)
    values = {tensor.name: tensor for tensor in reader.tensors}
    factor = get("llama.rope.scaling.factor", 0) or 1
    linear = {"rope_type": "linear", "factor": float(factor)}
    config = transformers.LlamaConfig(
        vocab_size=int(values["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=get("llama.context_length"),
        rms_norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=get("llama.rope.freq_base", 10000.0),
        rope_scaling=linear if factor != 1 else None,
        tie_word_embeddings="output.weight" not in values,
    )
    kinds = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors = {}
    for name, tensor in values.items():
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                pairs = value.view(-1, head_dim // 2, 2, value.shape[-1])
                value = pairs.transpose(1, 2).reshape(value.shape)
            key = f"model.layers.{parts[1]}.{kinds[parts[2]]}.weight"
        else:
            key = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
                "output.weight": "lm_head.weight",
            }[name]
        tensors[key] = value
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return _answer(transformers.LlamaForCausalLM(config), tensors)


def _answer(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    if model.config.tie_word_embeddings and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def alike(one: Tensor, other: Tensor) -> bool:
    """The same logits, up to the rounding of other kernels.

    Where the other's are not finite, a changed weight of 1e38 overflowed in it: what comes of that
    depends on the order of the sums, and is not compared.
    """
    if one.shape != other.shape:
        return False
    finite = other.isfinite()
    one, other = one[finite], other[finite]
    scale = other.abs().max().item() if other.numel() else 1.0
    return torch.allclose(one, other, rtol=2e-4, atol=2e-4 * max(scale, 1e-3))
